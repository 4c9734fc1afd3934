"""What an update of the average costs: ours, PyTorch's AveragedModel, a naive loop.

    OMP_NUM_THREADS=1 python benchmarks/ema.py [--rounds 100] [--burst 10]

All take turns in one process, `burst` updates a turn, so compare the ratios; with
--burst 1 each finds the caches cold. The model has 200 tensors of 16 to 4096 values, so
that calls count, not memory.
"""

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from templates.training_utils import ModelEMA

DECAY = 0.999


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 16 + 48 * (i % 2)) for i in range(100)))


def naive_updater(model: nn.Module) -> Callable[[], None]:
    """Average as most training scripts write it."""
    average = copy.deepcopy(model)

    def update() -> None:
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.mul_(DECAY).add_(p, alpha=1 - DECAY)

    return update


def state_dict_updater(model: nn.Module) -> Callable[[], None]:
    """Average by way of both state_dicts, the other usual way."""
    average = copy.deepcopy(model)

    def update() -> None:
        with torch.no_grad():
            values = model.state_dict()
            for name, a in average.state_dict().items():
                a.copy_(a * DECAY + (1 - DECAY) * values[name])

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--burst", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    ema = ModelEMA(model, DECAY)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    contenders = {
        "ModelEMA.update": lambda: ema.update(model),
        "AveragedModel (multi_avg_fn)": lambda: averaged.update_parameters(model),
        "naive loop": naive_updater(model),
        "naive loop over state_dict": state_dict_updater(model),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, update in contenders.items():
            start = time.perf_counter()
            for _ in range(options.burst):
                update()
            took_ms = (time.perf_counter() - start) * 1e3
            times[name].append(took_ms / options.burst)
    medians = {name: statistics.median(values) for name, values in times.items()}
    count = len(list(model.parameters()))
    print(f"torch {torch.__version__}, {platform.machine()}, {count} tensors, 1 thread")
    for name, median_ms in medians.items():
        ratio = median_ms / medians["ModelEMA.update"]
        print(f"{name:30} {median_ms:7.3f} ms  {ratio:5.1f} x")


if __name__ == "__main__":
    main()
