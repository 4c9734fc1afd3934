"""Interrupted and resumed equals uninterrupted, to the bit."""

import functools
from pathlib import Path

from evals.common import copy_of, expect, load_tensors, losses, must_run, need, original


@functools.cache
def straight(path: Path) -> tuple[dict, list[float]]:
    with copy_of(path.parent) as folder:
        output = must_run([path.name], folder)
        return load_tensors(folder / "weights.pt"), losses(output)


def check_training_is_the_same_kind(answer: Path) -> None:
    """Uninterrupted it still takes 24 steps, and learns as well as the original."""
    got = straight(need(answer, "train.py"))[1]
    wanted = straight(original(4, "train.py"))[1]
    expect(len(got) == 24, f"{len(got)} lines with a loss")
    close = abs(sum(got[-5:]) - sum(wanted[-5:])) < 0.35 * sum(wanted[-5:])
    expect(close, f"last losses {got[-5:]}, of the original {wanted[-5:]}")


def check_resumes_exactly(answer: Path) -> None:
    """Stopped after 7 and 13 steps, it goes on and weights.pt is equal to the bit."""
    import torch

    expected, _ = straight(need(answer, "train.py"))
    with copy_of(answer) as folder:
        steps = []
        for words in (["--stop-after", "7"], ["--stop-after", "13"], []):
            steps.append(len(losses(must_run(["train.py", *words], folder))))
        resumed = load_tensors(folder / "weights.pt")
    expect(sum(steps) <= 24 + 4, f"{steps} steps: it began anew")
    bad = [k for k in expected if not torch.equal(expected[k], resumed[k])]
    expect(not bad, f"other weights: {bad}")
