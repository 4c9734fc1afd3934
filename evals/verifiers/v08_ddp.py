"""Any number of processes gives the weights of one."""

import functools
from pathlib import Path

from evals.common import copy_of, expect, load_tensors, must_run, need, original

# By torchrun's own module: the command may not be on PATH.
LAUNCH = ["-m", "torch.distributed.run", "--standalone"]


@functools.cache
def expected() -> dict:
    with copy_of(original(8, "train.py").parent) as folder:
        must_run(["train.py"], folder)
        return load_tensors(folder / "weights.pt")


def compare(answer: Path, start: list[str]) -> None:
    import torch

    need(answer, "train.py")
    with copy_of(answer) as folder:
        must_run([*start, "train.py"], folder)
        got = load_tensors(folder / "weights.pt")
    expect(got.keys() == expected().keys(), f"names in weights.pt: {list(got)}")
    worst = max((got[k] - v).abs().max().item() for k, v in expected().items())
    expect(worst < 1e-5, f"weights off by {worst:.2g}")
    expect(all(v.dtype is torch.float32 for v in got.values()), "another dtype")


def check_one_process(answer: Path) -> None:
    """python train.py still gives the same weights."""
    compare(answer, [])


def check_two_processes(answer: Path) -> None:
    """torchrun with 2 processes gives the same weights."""
    compare(answer, [*LAUNCH, "--nproc-per-node=2"])


def check_three_processes(answer: Path) -> None:
    """torchrun with 3 processes, which the batch does not divide by, does as well."""
    compare(answer, [*LAUNCH, "--nproc-per-node=3"])
