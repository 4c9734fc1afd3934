"""A retrieval model, kept by its recall, that resumes exactly after SIGKILL."""

import functools
import time
from pathlib import Path

from evals.common import (
    copy_of,
    expect,
    expect_equal,
    go_on,
    kill,
    kill_after,
    load_tensors,
    logged,
    need,
    start,
)

WORDS = "train.py --data pairs.csv --query-column question --document-column answer"
WORDS += " --epochs 6 --out-dir runs/a"
WORDS = tuple(WORDS.split())
NAME = "val_recall_at_1"


@functools.cache
def watched(answer: Path) -> tuple[dict, list[float], int]:
    """The tensors of best.pt, what was logged, and the epoch of best.pt."""
    need(answer, "train.py")
    with copy_of(answer) as folder:
        best = folder / "runs/a/best.pt"
        lines: list[float] = []  # when each was there
        versions: dict[bytes, float] = {}  # of best.pt, when each was there
        process = start(WORDS, folder)
        changed, give_up = None, time.monotonic() + 180
        while process.poll() is None and time.monotonic() < give_up:
            now = time.monotonic()
            lines += [now] * (len(logged(folder, NAME)) - len(lines))
            if best.exists() and best.stat().st_mtime_ns != changed:
                changed = best.stat().st_mtime_ns
                versions.setdefault(best.read_bytes(), now)
            time.sleep(0.02)
        kill(process)
        expect(process.returncode == 0, f"exit code {process.returncode}")
        tensors = load_tensors(best)
        seen = versions.get(best.read_bytes(), time.monotonic())
        recalls = logged(folder, NAME)
    expect(recalls, f"no line with {NAME}")
    lines += [time.monotonic()] * (len(recalls) - len(lines))
    return tensors, recalls, min(range(len(lines)), key=lambda i: abs(lines[i] - seen))


def check_learns(answer: Path) -> None:
    """It trains, logs val_recall_at_1 for each of 6 epochs and gets over 0.5."""
    _, recalls, _ = watched(answer)
    expect(len(recalls) == 6, f"{len(recalls)} lines with {NAME}")
    expect(0.5 < max(recalls) <= 1, f"{NAME} {recalls}")  # 0.8 can be right at all


def check_best(answer: Path) -> None:
    """best.pt was written in the epoch with the highest val_recall_at_1."""
    _, recalls, epoch = watched(answer)
    evidence = f"written in epoch {epoch + 1} of {recalls}"
    expect(recalls[epoch] == max(recalls), evidence)


def check_resumes_exactly(answer: Path) -> None:
    """Killed twice within an epoch, it goes on and best.pt is equal to the bit."""
    expected, recalls, _ = watched(answer)
    with copy_of(answer) as folder:
        for epochs in (1, 3):
            kill_after(WORDS, folder, NAME, epochs, seconds=1)
        got = go_on(WORDS, folder, NAME)
        expect(got == recalls, f"{NAME} {got} after resuming, {recalls} in one go")
        found = load_tensors(folder / "runs/a/best.pt")
        expect_equal(found, expected, "after resuming")
