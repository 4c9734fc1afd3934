"""A model of a table that stays on the disk; exact with any workers, after a kill."""

import functools
import os
import re
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
    need,
    start,
    trained,
)

WORDS = "train.py --data shards --label-column label --epochs 2 --batch-size 1024"
WORDS = (*WORDS.split(), "--out-dir", "runs/a")
ALONE, WITH_TWO = ((*WORDS, "--num-workers", n) for n in "02")
NAME = "val_accuracy"
TIMES = 24  # the data, which take 22 MB as float32


def check_learns(answer: Path) -> None:
    """It trains, logs val_accuracy for each of 2 epochs and gets over 0.9."""
    _, accuracies = trained(answer, WITH_TWO, NAME)
    expect(len(accuracies) == 2, f"{len(accuracies)} lines with val_accuracy")
    # A linear model gets 0.79.
    expect(max(accuracies) > 0.9, f"val_accuracy {accuracies}")


def check_workers(answer: Path) -> None:
    """With 0 and with 2 workers best.pt is equal to the bit."""
    expected, _ = trained(answer, WITH_TWO, NAME)
    expect_equal(measured(answer)[1], expected, "without workers")


def check_memory(answer: Path) -> None:
    """With 515 MB more of data, its peak memory grows by less than 200 MB."""
    once, more = measured(answer)[0], measured(answer, TIMES)[0]
    evidence = f"{once:.0f} MB, with {TIMES} times the data {more:.0f} MB"
    expect(more - once < 200, evidence)


def check_resumes_exactly(answer: Path) -> None:
    """Killed with SIGKILL in epoch 2, it goes on and best.pt is equal to the bit."""
    expected, accuracies = trained(answer, WITH_TWO, NAME)
    with copy_of(answer) as folder:
        kill_after(WITH_TWO, folder, NAME, 1, seconds=1)
        got = go_on(WITH_TWO, folder, NAME)
        expect(got == accuracies, "another val_accuracy after resuming")
        found = load_tensors(folder / "runs/a/best.pt")
        expect_equal(found, expected, "after resuming")


@functools.cache
def measured(answer: Path, times: int = 1) -> tuple[float, dict]:
    """Peak of memory (MB) and the tensors of best.pt, without workers.

    With more than one copy of the data it is stopped after half a minute: no tensors.
    """
    need(answer, "train.py")
    with copy_of(answer) as folder:
        for path in sorted(folder.glob("shards/*")):
            for number in range(1, times):
                os.link(path, path.with_stem(f"{path.stem}-{number}"))
        process = start(ALONE, folder)
        peak, give_up = 0.0, time.monotonic() + (120 if times == 1 else 30)
        # 2 GB are too much already: leave the machine some.
        while process.poll() is None and time.monotonic() < give_up and peak < 2000:
            peak = max(peak, memory_mb(process.pid))
            time.sleep(0.05)
        cut_short = process.poll() is None
        kill(process)
        if cut_short and (times > 1 or peak >= 2000):
            return peak, {}
        expect(process.returncode == 0, f"exit code {process.returncode}")
        return peak, load_tensors(folder / "runs/a/best.pt")


def memory_mb(session: int) -> float:
    """Of all processes of a session; pages of files, which can be dropped, left out."""
    total_kb = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name in brackets: state, parent, group, session.
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session:
                status = (folder / "status").read_text()
                found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.MULTILINE)
                total_kb += sum(map(int, found))
        except OSError:
            continue  # it has ended
    return total_kb / 1e3
