"""A text classifier that learns and resumes exactly after SIGKILL."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from evals.common import (
    Failed,
    clean_environment,
    copy_of,
    expect,
    load_tensors,
    must_run,
    need,
)

WORDS = "train.py --data reviews.csv --text-column review --label-column stars"
WORDS = [*WORDS.split(), "--epochs", "4", "--out-dir", "runs/a"]


def epoch_lines(folder: Path) -> list[float]:
    path = folder / "runs/a/metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # being written
        if "val_accuracy" in record:
            found.append(record["val_accuracy"])
    return found


@functools.cache
def uninterrupted(answer: Path) -> tuple[dict, list[float]]:
    need(answer, "train.py")
    with copy_of(answer) as folder:
        must_run(WORDS, folder)
        return load_tensors(folder / "runs/a/best.pt"), epoch_lines(folder)


def check_learns(answer: Path) -> None:
    """It trains, logs val_accuracy for each of 4 epochs and gets over 0.8."""
    _, accuracies = uninterrupted(answer)
    expect(len(accuracies) == 4, f"{len(accuracies)} lines with val_accuracy")
    expect(max(accuracies) > 0.8, f"val_accuracy {accuracies}")


def check_resumes_exactly(answer: Path) -> None:
    """Killed twice after an epoch, it goes on and best.pt is equal to the bit."""
    import torch

    expected, accuracies = uninterrupted(answer)
    with copy_of(answer) as folder:
        for epochs in (1, 2):
            kill_after(folder, epochs)
        process = start(folder)
        fewest = len(epoch_lines(folder))
        while process.poll() is None:
            fewest = min(fewest, len(epoch_lines(folder)))
            time.sleep(0.02)
        expect(process.returncode == 0, f"exit code {process.returncode} on resuming")
        expect(fewest >= 1, "the log of finished epochs was thrown away: it began anew")
        expect(epoch_lines(folder) == accuracies, "another val_accuracy after resuming")
        resumed = load_tensors(folder / "runs/a/best.pt")
    expect(resumed.keys() == expected.keys(), "other contents of best.pt")
    bad = [k for k in expected if not torch.equal(expected[k], resumed[k])]
    expect(not bad, f"other weights after resuming: {bad[:3]}")


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *WORDS],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_after(folder: Path, epochs: int) -> None:
    """Start it and kill it, workers too, soon after this many epochs are in the log."""
    process = start(folder)
    give_up = time.monotonic() + 90
    while process.poll() is None and len(epoch_lines(folder)) < epochs:
        if time.monotonic() > give_up:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed(f"no {epochs} epochs within 90 s")
        time.sleep(0.02)
    time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
