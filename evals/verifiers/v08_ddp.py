"""Any number of processes gives the weights of one."""

import functools
from pathlib import Path

from evals.common import (
    LAUNCH,
    copy_of,
    expect,
    load_tensors,
    must_run,
    need,
    original,
)


@functools.cache
def expected() -> dict:
    with copy_of(original(8, "train.py").parent) as folder:
        must_run(["train.py"], folder)
        return load_tensors(folder / "weights.pt")


# Put before the script: count the rows that this process sends through the model.
COUNTER = """
import atexit, os, runpy, sys
from torch import nn
forward, rows = nn.Linear.forward, []
def counted(self, x):
    if self.in_features == 6:
        rows.append(len(x))
    return forward(self, x)
nn.Linear.forward = counted
name = "rows_" + os.environ.get("RANK", "0")
atexit.register(lambda: open(name, "w").write(str(sum(rows))))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def compare(answer: Path, start: list[str]) -> None:
    import torch

    need(answer, "train.py")
    with copy_of(answer) as folder:
        (folder / "counter.py").write_text(COUNTER, encoding="utf-8")
        must_run([*start, "counter.py", "train.py"], folder)
        got = load_tensors(folder / "weights.pt")
        rows = [int(path.read_text()) for path in folder.glob("rows_*")]
    expect(got.keys() == expected().keys(), f"names in weights.pt: {list(got)}")
    worst = max((got[k] - v).abs().max().item() for k, v in expected().items())
    expect(worst < 1e-5, f"weights off by {worst:.2g}")
    expect(all(v.dtype is torch.float32 for v in got.values()), "another dtype")
    # 3 epochs of 52, and perhaps a few that fill up a share
    expect(sum(rows) <= 180, f"rows of each process: {rows}, so work is done twice")


def check_one_process(answer: Path) -> None:
    """python train.py still gives the same weights."""
    compare(answer, [])


def check_two_processes(answer: Path) -> None:
    """torchrun with 2 processes gives the same weights, each with its share of rows."""
    compare(answer, [*LAUNCH, "--nproc-per-node=2"])


def check_three_processes(answer: Path) -> None:
    """torchrun with 3 processes, which the batch does not divide by, does as well."""
    compare(answer, [*LAUNCH, "--nproc-per-node=3"])
