"""Trains for 24 steps and writes weights.pt; saves checkpoint.pt every 3 steps.

python train.py                 # goes on from checkpoint.pt if there is one
python train.py --stop-after 7  # stands in for a preemption after 7 steps
"""

import argparse
import os
import random

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, SAVE_EVERY = 24, 3


def augment(x):
    return x * random.uniform(0.9, 1.1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop-after", type=int, default=STEPS)
    stop_after = parser.parse_args().stop_after

    torch.manual_seed(0)
    random.seed(0)
    inputs = torch.randn(40, 6)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = DataLoader(dataset, batch_size=8, shuffle=True)  # 5 steps an epoch
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / STEPS)

    step = 0
    if os.path.exists("checkpoint.pt"):
        checkpoint = torch.load("checkpoint.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        step = checkpoint["step"]

    while step < STEPS:
        for x, y in loader:
            loss = nn.functional.mse_loss(model(augment(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
            if step % SAVE_EVERY == 0:
                torch.save({"model": model.state_dict(), "step": step}, "checkpoint.pt")
            if step == stop_after and step < STEPS:
                return
            if step == STEPS:
                break
    torch.save(model.state_dict(), "weights.pt")


if __name__ == "__main__":
    main()
