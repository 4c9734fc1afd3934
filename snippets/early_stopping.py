"""Use when validation runs often enough to say that training no longer helps.

Not when a schedule falls to zero at a fixed step: stopping before wastes the decay.
"""

import copy
import math

import torch
from torch import nn


class EarlyStopping:
    """Call with each validation loss; True once `patience` of them brought nothing."""

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.best, self.bad = math.inf, 0
        self.weights: dict | None = None

    def __call__(self, loss: float, model: nn.Module) -> bool:
        if loss < self.best - self.min_delta:  # False for NaN, which must count as bad
            self.best, self.bad = loss, 0
            # A copy: state_dict() hands out the tensors that training goes on changing.
            self.weights = copy.deepcopy(model.state_dict())
        else:
            self.bad += 1
        return self.bad >= self.patience

    def state_dict(self) -> dict:
        """Part of the checkpoint, or a resumed run stops at another epoch."""
        return {"best": self.best, "bad": self.bad, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.bad = state["best"], state["bad"]
        self.weights = state["weights"]


if __name__ == "__main__":
    model = nn.Linear(1, 1, bias=False)
    stopping = EarlyStopping(patience=3, min_delta=0.01)
    losses = [1.0, 0.5, math.nan, 0.495, 0.6, 0.1]
    stopped_at = None
    for epoch, loss in enumerate(losses):
        nn.init.constant_(model.weight, epoch)
        if epoch == 3:  # resumed here
            state = stopping.state_dict()
            stopping = EarlyStopping(patience=3, min_delta=0.01)
            stopping.load_state_dict(state)
        if stopping(loss, model):
            stopped_at = epoch
            break
    assert stopped_at == 4, stopped_at
    assert stopping.best == 0.5
    model.load_state_dict(stopping.weights)
    assert torch.equal(model.weight, torch.ones(1, 1))  # those of epoch 1
