"""Use when a run has a known number of steps: warm up, then fall (cosine, or WSD).

Not when its length is open: use the constant part of `wsd` and decay when you decide.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR


def cosine(step: int, warmup: int, total: int) -> float:
    """Share of the peak rate; clamped, where CosineAnnealingLR rises again."""
    if step < warmup:
        return (step + 1) / warmup  # step / warmup would waste the first step at 0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def wsd(step: int, warmup: int, total: int, decay: int) -> float:
    """Warm up, stay, fall over the last `decay` steps: checkpoints before can go on."""
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (total - step) / decay))


def rates_of(shape: Callable[[int], float], steps: int, resume_at: int) -> list[float]:
    """The rates that an optimizer sees when the run is cut and resumed in between."""
    rates, saved = [], None
    for begin, end in ((0, resume_at), (resume_at, steps)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        scheduler = LambdaLR(optimizer, shape)  # before the states are loaded
        if saved:
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        for _ in range(begin, end):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()  # once for each step that the optimizer really took
        saved = optimizer.state_dict(), scheduler.state_dict()
    return rates


if __name__ == "__main__":
    for shape in (
        partial(cosine, warmup=10, total=100),
        partial(wsd, warmup=10, total=100, decay=20),
    ):
        rates = rates_of(shape, steps=130, resume_at=57)
        assert math.isclose(rates[0], 0.2) and max(rates) == rates[9] == 2.0
        assert rates[9:] == sorted(rates[9:], reverse=True)  # never up again
        assert max(rates[100:]) < 1e-9  # also past the end
        assert rates == [2.0 * shape(i) for i in range(130)]  # the cut does not show
    assert cosine(0, warmup=0, total=10) == 1.0
