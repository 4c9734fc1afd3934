"""fp16 learns as fp32 does, and clipping still works."""

import functools
import math
from pathlib import Path

from evals.common import copy_of, expect, losses, must_run, need, original


@functools.cache
def last_losses(path: Path, *words: str) -> float:
    with copy_of(path.parent) as folder:
        values = losses(must_run([path.name, *words], folder))
    expect(len(values) == 60, f"{len(values)} lines with a loss")
    return sum(values[-5:]) / 5


def compare(answer: Path, *words: str) -> None:
    got = last_losses(need(answer, "train.py"), "--precision", "fp16", *words)
    wanted = last_losses(original(6, "train.py"), "--precision", "fp32", *words)
    good = math.isfinite(got) and abs(got - wanted) < 0.03 * wanted
    expect(good, f"fp16 ends at {got:.4f}, fp32 at {wanted:.4f}")


def check_fp16_learns(answer: Path) -> None:
    """With fp16 the loss ends within 3% of that with fp32."""
    compare(answer)


def check_still_clips(answer: Path) -> None:
    """With targets 50 times as large it still does, which takes clipping at 1.0."""
    compare(answer, "--scale", "50")


def check_fp32_is_unchanged(answer: Path) -> None:
    """With fp32 it ends where the original ends."""
    for words in ((), ("--scale", "50")):
        got = last_losses(need(answer, "train.py"), "--precision", "fp32", *words)
        wanted = last_losses(original(6, "train.py"), "--precision", "fp32", *words)
        expect(abs(got - wanted) < 1e-3 * wanted, f"{got:.4f}, before {wanted:.4f}")
