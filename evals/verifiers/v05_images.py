"""An image script with mixed precision, without deprecated API."""

import functools
import json
from pathlib import Path

from evals.common import copy_of, expect, load_tensors, must_run, need

WORDS = ["train.py", "--data", "photos", "--epochs", "6", "--out-dir", "runs/a"]
# Put before the script: count the uses of autocast.
COUNTER = """
import atexit, torch
begin, used = torch.autocast.__init__, []
def __init__(self, *args, **kwargs):
    used.append(1)
    return begin(self, *args, **kwargs)
torch.autocast.__init__ = __init__
atexit.register(lambda: open("autocast_used", "w").write(str(len(used))))
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def trained(answer: Path) -> tuple[list[float], int]:
    need(answer, "train.py")
    with copy_of(answer) as folder:
        (folder / "counter.py").write_text(COUNTER, encoding="utf-8")
        warnings = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
        must_run([*warnings, "counter.py", *WORDS], folder)
        load_tensors(folder / "runs/a/best.pt")
        path = need(folder, "runs/a/metrics.jsonl")
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        used = int((folder / "autocast_used").read_text())
        return [r["val_accuracy"] for r in records if "val_accuracy" in r], used


def check_learns(answer: Path) -> None:
    """It runs on a CPU with deprecation as an error and gets over 0.7 in 6 epochs."""
    accuracies, _ = trained(answer)
    expect(len(accuracies) == 6, f"{len(accuracies)} lines with val_accuracy")
    expect(max(accuracies) > 0.7, f"val_accuracy {accuracies}")


def check_mixed_precision(answer: Path) -> None:
    """The forward pass goes through torch.autocast."""
    used = trained(answer)[1]
    expect(used > 0, "torch.autocast was never entered")
