"""Saving a training state: how long training is blocked, and until it is on the disk.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--megabytes 200] [--rounds 15]

All contenders take turns in one process and write into a folder of their own, so that
whatever else the machine does slows all alike: compare the ratios to memcpy. Writes
results/checkpoint.md.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch import nn  # noqa: E402

from templates.checkpoint_io import (  # noqa: E402
    StateSaver,
    capture_training_state,
    save_training_state,
)

Contender = Callable[[int], Callable[[], Any] | None]


def make_parts(megabytes: int) -> dict[str, Any]:
    """A model with Adam's two moments: `megabytes` in all."""
    layers, width = 16, 0
    while layers * (width + 64) ** 2 * 12 <= 1.02 * megabytes * 1e6:
        width += 64
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(torch.randn(2, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"model": model, "optimizer": optimizer}


def list_tensors(parts: dict[str, Any]) -> list[torch.Tensor]:
    moments = [
        value for state in parts["optimizer"].state.values() for value in state.values()
    ]
    return [*parts["model"].parameters(), *moments]


def make_contenders(parts: dict[str, Any], folder: Path) -> dict[str, Contender]:
    """Name -> a function that saves, and returns what waits until it is written."""
    tensors = [tensor.detach() for tensor in list_tensors(parts)]
    buffers = [torch.empty_like(tensor) for tensor in tensors]
    saver = StateSaver(folder / "saver", parts)
    for name in ("plain", "dcp"):
        (folder / name).mkdir()

    def memcpy(step: int) -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)

    def torch_save(step: int) -> None:
        torch.save(capture_training_state(parts), folder / "plain" / "state.pt")

    def synchronous(step: int) -> None:
        save_training_state(folder / "synchronous", step, parts)

    def background(step: int) -> Callable[[], Any]:
        saver.save(step)
        return saver.wait

    def dcp_async(step: int) -> Callable[[], Any]:
        state = {name: part.state_dict() for name, part in parts.items()}
        path = folder / "dcp" / str(step)
        future = dcp.async_save(state, checkpoint_id=str(path), no_dist=True)

        def wait() -> None:
            future.result()
            shutil.rmtree(folder / "dcp" / str(step - 2), ignore_errors=True)

        return wait

    return {
        "memcpy of all tensors": memcpy,
        "StateSaver": background,
        "DCP async_save": dcp_async,
        "torch.save (not atomic, no fsync, no checksum)": torch_save,
        "save_training_state (atomic, fsync, checksum)": synchronous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = make_parts(options.megabytes)
    size = sum(t.numel() * t.element_size() for t in list_tensors(parts)) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(parts, Path(folder))
        blocked: dict[str, list[float]] = {name: [] for name in contenders}
        total: dict[str, list[float]] = {name: [] for name in contenders}
        for step in range(options.rounds + 1):
            for name, save in contenders.items():
                start = time.perf_counter()
                wait = save(step)
                blocked[name].append((time.perf_counter() - start) * 1e3)
                if wait is not None:
                    wait()
                total[name].append((time.perf_counter() - start) * 1e3)
    copy_ms = statistics.median(blocked["memcpy of all tensors"][1:])
    lines = [
        f"State of {size:.0f} MB, {options.rounds} rounds in turn (median; the first"
        f" round, which allocates, apart). torch {torch.__version__}, Python"
        f" {platform.python_version()}, {platform.machine()}, one CPU thread.",
        "",
        "| | blocked ms | x memcpy | until written ms | first time blocked ms |",
        "|---|---|---|---|---|",
    ]
    for name in contenders:
        times = statistics.median(blocked[name][1:])
        lines.append(
            f"| {name} | {times:.0f} | {times / copy_ms:.2f}"
            f" | {statistics.median(total[name][1:]):.0f} | {blocked[name][0]:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "checkpoint.md").write_text(text)


if __name__ == "__main__":
    main()
