"""Use when a step is slow and you do not know yet whether data, CPU or GPU is.

Not when you want the time of one kernel: the profiler slows down small operations.
"""

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn


def time_steps(step: Callable, batches: Iterable, device: torch.device) -> dict:
    """Seconds that a step waits for data and computes, after a warm-up of three."""
    waits, computes = [], []
    clock = time.perf_counter()
    for batch in batches:
        loaded = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels run on: the call returns before
        done = time.perf_counter()
        waits.append(loaded - clock)
        computes.append(done - loaded)
        clock = time.perf_counter()
    count = len(waits[3:])
    return {"data_s": sum(waits[3:]) / count, "step_s": sum(computes[3:]) / count}


def top_operations(step: Callable, batch: object, device: torch.device) -> list[str]:
    """Names by the time of their own, most first, of one step after a warm-up."""
    gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if gpu else []
    step(batch)
    with torch.profiler.profile(activities=kinds) as profile:
        step(batch)
    events = profile.key_averages()
    # cuda_time_total and the like are gone from the events.
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    return [e.key for e in sorted(events, key=lambda e: -getattr(e, key))]


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
    model.to(device)

    def step(x: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(x.to(device)).square().mean().backward()

    def slow_batches() -> Iterable[torch.Tensor]:
        for _ in range(6):
            time.sleep(0.2)
            yield torch.ones(8, 1024)

    times = time_steps(step, slow_batches(), device)
    print({name: f"{value * 1e3:.1f} ms" for name, value in times.items()})
    assert times["data_s"] >= 0.2 and 0 < times["step_s"] < times["data_s"]
    names = top_operations(step, torch.ones(512, 1024), device)
    print(names[:3])
    assert any("mm" in name or "gemm" in name for name in names[:3]), names[:5]
