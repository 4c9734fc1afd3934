"""An image script with mixed precision, without deprecated API."""

import ast
import functools
import json
from pathlib import Path

from evals.common import copy_of, expect, load_tensors, must_run, need

WORDS = ["train.py", "--data", "photos", "--epochs", "6", "--out-dir", "runs/a"]


@functools.cache
def trained(answer: Path) -> list[float]:
    need(answer, "train.py")
    with copy_of(answer) as folder:
        warnings = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
        must_run([*warnings, *WORDS], folder)
        load_tensors(folder / "runs/a/best.pt")
        path = need(folder, "runs/a/metrics.jsonl")
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [r["val_accuracy"] for r in records if "val_accuracy" in r]


def check_learns(answer: Path) -> None:
    """It runs on a CPU with deprecation as an error and gets over 0.7 in 6 epochs."""
    accuracies = trained(answer)
    expect(len(accuracies) == 6, f"{len(accuracies)} lines with val_accuracy")
    expect(max(accuracies) > 0.7, f"val_accuracy {accuracies}")


def check_mixed_precision(answer: Path) -> None:
    """torch.autocast is in the code; fp32 may be right for the CPU of this check."""
    found = [
        node
        for path in answer.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr == "autocast")
        or (isinstance(node, ast.alias) and node.name == "autocast")
    ]
    expect(bool(found), "no code refers to torch.autocast")
