"""Checkpoints of a run: FOLDER/step_N.pt."""

from pathlib import Path

import torch


def save(state, folder, step):
    """state: a dict of plain values and tensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"step_{step}.pt")


def load_latest(folder):
    """(state, step) of the newest checkpoint; (None, 0) where there is none."""
    paths = sorted(Path(folder).glob("step_*.pt"))
    if not paths:
        return None, 0
    state = torch.load(paths[-1], weights_only=False)
    return state, int(paths[-1].stem.partition("_")[2])
