"""Out of memory comes and goes, and the results stay what they are."""

from pathlib import Path

from evals.common import copy_of, expect, logged, must_run, need, run, trained

WORDS = "train.py --data tickets.csv --text-column message --label-column team"
WORDS += " --batch-size 32 --epochs 4 --out-dir runs/a"
WORDS = tuple(WORDS.split())

# As sitecustomize.py: no memory for the loss of too many rows at a time, in training.
# A new limit with each call, so that some micro-batches of a step are done by then.
PRESSURE = """
import os
import random

import torch
from torch.nn import functional

calls = 0


def limited(function):
    def loss(input, *args, **options):
        global calls
        if not torch.is_grad_enabled():
            return function(input, *args, **options)
        calls += 1
        drawn = random.Random(calls).random()
        limit = 4 if drawn < 0.08 else 12 if drawn < 0.25 else 32
        if os.environ["PRESSURE"] == "always":
            limit = 0
        if len(input) > limit:
            with open("refused.txt", "a") as file:
                print(calls, file=file)
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total"
                " capacity of 23.69 GiB of which 412.00 MiB is free."
            )
        return function(input, *args, **options)

    return loss


functional.cross_entropy = limited(functional.cross_entropy)
functional.nll_loss = limited(functional.nll_loss)
"""


def check_learns(answer: Path) -> None:
    """With enough memory it logs val_accuracy for 4 epochs and gets over 0.8."""
    _, accuracies = trained(answer, WORDS, "val_accuracy")
    expect(len(accuracies) == 4, f"{len(accuracies)} lines with val_accuracy")
    expect(max(accuracies) > 0.8, f"val_accuracy {accuracies}")


def check_same_results(answer: Path) -> None:
    """Out of memory at some of the steps, val_loss is the same within 0.0001."""
    _, losses = trained(answer, WORDS, "val_loss")
    expect(len(losses) == 4, f"{len(losses)} lines with val_loss")
    with copy_of(answer) as folder:
        must_run([*WORDS], folder, 240, **pressure(folder, "sometimes"))
        got = logged(folder, "val_loss")
        expect(refused(folder), "no loss of a batch of 32 was seen")
    expect(len(got) == 4, f"{len(got)} lines with val_loss when out of memory")
    worst = max(abs(a - b) for a, b in zip(got, losses, strict=True))
    expect(worst < 1e-4, f"val_loss {got} when out of memory, {losses} otherwise")


def check_gives_up(answer: Path) -> None:
    """Out of memory even with one row, it ends with an error that says so."""
    need(answer, "train.py")
    with copy_of(answer) as folder:
        done = run([*WORDS], folder, 90, **pressure(folder, "always"))
        expect(refused(folder) >= 2, "it never tried a smaller part of the batch")
    expect(done.returncode != 0, "exit code 0 without memory for a single row")
    expect("memory" in (done.stdout + done.stderr).lower(), "no word about memory")


def pressure(folder: Path, how: str) -> dict[str, str]:
    """The environment of a process that is short of memory."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(PRESSURE, encoding="utf-8")
    return {"PYTHONPATH": str(hook), "PRESSURE": how}


def refused(folder: Path) -> int:
    path = folder / "refused.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0
