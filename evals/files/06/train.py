"""python train.py --precision {fp32,fp16} [--scale 1]: prints the loss of each step."""

import argparse

import torch
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--scale", type=float, default=1.0, help="of the targets")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    half = args.precision == "fp16"
    scaler = torch.amp.GradScaler(device, enabled=half)
    x = torch.randn(256, 8, device=device)
    y = args.scale * x.sum(1, keepdim=True).sin()

    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16, enabled=half):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        print(f"step {step}: loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
