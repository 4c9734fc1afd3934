"""Use when a new loop needs mixed precision, clipping and a schedule, all correct.

Not when a CPU trains: there autocast is mostly slower than fp32 (pass torch.float32).
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype,
    epochs: int,
) -> list[float]:
    """Mean loss of each epoch; dtype bfloat16, else float16, else float32."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    steps, warmup = epochs * len(loader), 4
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, max(0.0, 1 - i / steps))
    )
    losses = []
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # once a step, or clipping sees scaled gradients
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # fp16 skips a step that overflowed
                scheduler.step()
            total += loss.detach()  # .item() here would wait for the GPU at each step
        losses.append(total.item() / len(loader))
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data_NF = torch.randn(256, 16)
    dataset = TensorDataset(data_NF, (data_NF.sum(1) > 0).long())
    start = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 2)).state_dict()
    ends = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        order = torch.Generator().manual_seed(0)  # else it draws from the global one
        loader = DataLoader(dataset, 32, shuffle=True, generator=order)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 2))
        model.load_state_dict(start)
        losses = train(model, loader, device, dtype, epochs=5)
        print(f"{dtype}: {losses[0]:.3f} -> {losses[-1]:.3f}")
        ends.append(losses[-1])
    assert ends[0] < 0.3, ends
    assert max(ends) - min(ends) < 1e-3, ends  # precision does not show
