"""Use when a run may be killed and must go on as if it had not been.

Not when only the weights are to be shipped: torch.save(model.state_dict(), path).
"""

import os
import random

import torch
from torch import nn


def save_atomically(state: dict, path: str) -> None:
    """torch.save over the old file would destroy it where the disk is full."""
    temporary = path + ".tmp"  # in the same folder: renaming is atomic only there
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def get_state(step: int, **parts) -> dict:
    """Everything that the next step depends on, in types that weights_only loads."""
    rng = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    return {"step": step, "rng": rng, **{k: v.state_dict() for k, v in parts.items()}}


def restore(path: str, **parts) -> int:
    """The step to go on from. Build the schedule before this, not after."""
    # weights_only=True loads all of these; False would run code from the file.
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    random.setstate(state["rng"]["python"])
    torch.set_rng_state(state["rng"]["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    return state["step"]


if __name__ == "__main__":
    import contextlib
    import tempfile

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(path: str, stop: int, steps: int = 8) -> torch.Tensor:
        torch.manual_seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        step = restore(path, **parts) if os.path.exists(path) else 0
        while step < min(stop, steps):
            scale = random.random()
            loss = model(torch.ones(16, 4, device=device) * scale).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            save_atomically(get_state(step, **parts), path)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    with tempfile.TemporaryDirectory() as folder:
        straight = run(os.path.join(folder, "a.pt"), stop=8)
        path = os.path.join(folder, "b.pt")
        run(path, stop=3)  # killed after 3 steps
        with contextlib.suppress(TypeError):  # a save that fails half-way
            save_atomically({"bad": (i for i in "cannot be saved")}, path)
        assert torch.equal(run(path, stop=8), straight)
