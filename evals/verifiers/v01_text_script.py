"""A text classifier that learns and resumes exactly after SIGKILL."""

from pathlib import Path

from evals.common import (
    copy_of,
    expect,
    expect_equal,
    go_on,
    kill_after,
    load_tensors,
    trained,
)

WORDS = "train.py --data reviews.csv --text-column review --label-column stars"
WORDS = (*WORDS.split(), "--epochs", "4", "--out-dir", "runs/a")
NAME = "val_accuracy"


def check_learns(answer: Path) -> None:
    """It trains, logs val_accuracy for each of 4 epochs and gets over 0.8."""
    _, accuracies = trained(answer, WORDS, NAME)
    expect(len(accuracies) == 4, f"{len(accuracies)} lines with val_accuracy")
    expect(max(accuracies) > 0.8, f"val_accuracy {accuracies}")


def check_resumes_exactly(answer: Path) -> None:
    """Killed twice after an epoch, it goes on and best.pt is equal to the bit."""
    expected, accuracies = trained(answer, WORDS, NAME)
    with copy_of(answer) as folder:
        for epochs in (1, 2):
            kill_after(WORDS, folder, NAME, epochs)
        got = go_on(WORDS, folder, NAME)
        expect(got == accuracies, "another val_accuracy after resuming")
        expect_equal(
            load_tensors(folder / "runs/a/best.pt"), expected, "after resuming"
        )
