"""Use when a run may be killed and must go on as if it had not been, in mid-epoch too.

Not when only the weights are to be shipped: torch.save(model.state_dict(), path).
"""

import os
import random

import torch
from torch.utils.data import DataLoader


def save_atomically(state: dict, path: str) -> None:
    """torch.save over the old file would destroy it where the disk is full."""
    # In the same folder: renaming is atomic only there.
    with open(temporary := path + ".tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def get_rng() -> list:
    """Of Python, torch and the GPUs, in types that weights_only=True loads."""
    return [random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all()]


def set_rng(state: list) -> None:
    random.setstate(state[0])
    torch.set_rng_state(state[1])
    torch.cuda.set_rng_state_all(state[2])


def train(loader: DataLoader, parts: dict, train_step, steps: int, path: str) -> None:
    """Go on from `path` if it is there; parts: model, optimizer, schedule, scaler."""
    step, state = 0, None
    if os.path.exists(path):  # build the schedule before this, not after
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step = state["step"]
        set_rng(state["epoch_rng"])  # iter(loader) draws the order of the epoch from it
    while step < steps:
        epoch_rng, batches = get_rng(), iter(loader)
        first = state["done"] if state else 0
        for _ in range(first):  # trained on before: only drawn again
            next(batches)
        if state:
            set_rng(state["rng"])  # dropout, augmentation
            state = None
        for done, batch in enumerate(batches, first + 1):
            train_step(batch)
            step += 1
            now = {"step": step, "done": done, "epoch_rng": epoch_rng, "rng": get_rng()}
            now |= {name: part.state_dict() for name, part in parts.items()}
            save_atomically(now, path)  # every so many steps will do
            if step == steps:
                break


if __name__ == "__main__":
    import contextlib
    import tempfile

    from torch import nn
    from torch.utils.data import TensorDataset

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(path: str, steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))

        def train_step(batch: list) -> None:
            optimizer.zero_grad()
            model(batch[0].to(device) * random.random()).square().mean().backward()
            optimizer.step()
            schedule.step()

        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        loader = DataLoader(TensorDataset(torch.randn(20, 4)), 4, shuffle=True)
        train(loader, parts, train_step, steps, path)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    with tempfile.TemporaryDirectory() as folder:
        straight = run(os.path.join(folder, "straight.pt"), steps=13)
        for stop in range(1, 13):  # 5 steps an epoch: killed within and at its end
            path = os.path.join(folder, f"{stop}.pt")
            run(path, stop)
            with contextlib.suppress(TypeError):  # a save that fails half-way
                save_atomically({"bad": (i for i in "cannot be saved")}, path)
            assert torch.equal(run(path, steps=13), straight), stop
