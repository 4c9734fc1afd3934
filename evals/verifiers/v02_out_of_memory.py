"""Half the memory, the same losses."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

from evals.common import clean_environment, copy_of, expect, losses, need, original


@functools.cache
def measure(path: Path) -> tuple[list[float], float, float]:
    """Losses, peak of memory above that of a Python with torch (MB), seconds."""
    base = peak_of(["-c", "import torch; torch.randn(64, 64) @ torch.randn(64, 64)"])[1]
    with copy_of(path.parent) as folder:
        began = time.monotonic()
        output, peak = peak_of([path.name], folder)
        return losses(output), peak - base, time.monotonic() - began


def peak_of(words: list[str], folder: Path | None = None) -> tuple[str, float]:
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        # glibc gives back what is freed; without it holes in the heap count as used.
        env=clean_environment(MALLOC_MMAP_THRESHOLD_="65536"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    expect(process.returncode == 0, f"exit code {process.returncode}: {errors[-300:]}")
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return output, usage.ru_maxrss / unit


def check_same_losses(answer: Path) -> None:
    """It prints the losses that the original prints, within 0.0002."""
    got = measure(need(answer, "train.py"))[0]
    wanted = measure(original(2, "train.py"))[0]
    expect(len(got) == len(wanted), f"{len(got)} losses")
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    expect(worst < 2e-4, f"losses {got}, the original has {wanted}")


def check_half_the_memory(answer: Path) -> None:
    """Its peak memory, less that of torch itself, is at most half of the original's."""
    new = measure(need(answer, "train.py"))[1]
    old = measure(original(2, "train.py"))[1]
    expect(new <= old / 2, f"{new:.0f} MB, the original {old:.0f} MB")


def check_not_much_slower(answer: Path) -> None:
    """It takes at most three times as long."""
    new = measure(need(answer, "train.py"))[2]
    old = measure(original(2, "train.py"))[2]
    expect(new <= 3 * old, f"{new:.0f} s, the original {old:.0f} s")
