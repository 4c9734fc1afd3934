"""A small GPT that saves on SIGTERM, and learns the same on any number of processes."""

import signal
import subprocess
import time
from pathlib import Path

from evals.common import (
    LAUNCH,
    Failed,
    copy_of,
    expect,
    go_on,
    kill,
    logged,
    must_run,
    start_until,
    trained,
)

WORDS = "train.py --data notes --epochs 4 --out-dir runs/a"
WORDS = tuple(WORDS.split())
NAME = "val_loss"


def check_learns(answer: Path) -> None:
    """It trains, logs val_loss for each of 4 epochs and gets under 1 nat a byte."""
    _, losses = trained(answer, WORDS, NAME)
    expect(len(losses) == 4, f"{len(losses)} lines with val_loss")
    # A bigram model has 1.9; the choices that make a sentence are 0.12 a byte.
    expect(0.1 < min(losses) < 1, f"val_loss {losses}")


def check_saves_on_sigterm(answer: Path) -> None:
    """On SIGTERM it saves and exits; run again, it goes on with the same losses."""
    _, losses = trained(answer, WORDS, NAME)
    with copy_of(answer) as folder:
        process = start_until(WORDS, folder, NAME, 1)
        time.sleep(0.5)
        began = time.time()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            raise Failed("30 s after SIGTERM it still runs") from None
        finally:
            kill(process)
        done = len(logged(folder, NAME))
        expect(done < 4, "SIGTERM was ignored: all epochs are done")
        files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".jsonl"]
        saved = [p for p in files if p.stat().st_mtime > began]
        expect(saved, "no file was written after SIGTERM")
        got = go_on(WORDS, folder, NAME)
    expect(len(got) == len(losses), f"{len(got)} lines with val_loss after resuming")
    worst = max(abs(a - b) for a, b in zip(got, losses, strict=True))
    expect(worst < 1e-6, f"val_loss {got} after resuming, {losses} in one go")


def check_two_processes(answer: Path) -> None:
    """torchrun with 2 processes gives the same val_loss, each epoch within 0.1%."""
    _, losses = trained(answer, WORDS, NAME)
    with copy_of(answer) as folder:
        must_run([*LAUNCH, "--nproc-per-node=2", *WORDS], folder)
        got = logged(folder, NAME)
    expect(len(got) == len(losses), f"{len(got)} lines with val_loss of 2 processes")
    worst = max(abs(a / b - 1) for a, b in zip(got, losses, strict=True))
    expect(worst < 1e-3, f"val_loss {got} of 2 processes, {losses} of one")
