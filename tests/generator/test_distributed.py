"""Scripts under torchrun (gloo on a CPU): the same as one process, and exact on resume."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from generator.options import TASKS
from templates.checkpoint_io import list_training_states

from .scripts import (
    EXACT,
    command_line,
    data_words,
    environment,
    largest_difference,
    run,
    write_script,
)
from .test_oom import SHORT_OF_MEMORY


def best_weights(out_dir):
    return torch.load(out_dir / "best.pt", weights_only=True)["model_state_dict"]


def losses(out_dir) -> list[float]:
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for key, value in json.loads(line).items()]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "kind", "ranks"),
    [
        pytest.param(
            task,
            kind,
            ranks,
            marks=() if (task, kind, ranks) in QUICK else slow,
        )
        for task in TASKS
        for kind in ("ddp", "fsdp")
        for ranks in (2, 3)
    ],
)
def test_ranks_together_equal_one_process(task, kind, ranks, tmp_path):
    """In double precision, without dropout; the last batch is shared unevenly."""
    flags = ("--task", task, "--clip=0.1", "--scheduler=linear", "--ema=0.9")
    words = data_words(task, tmp_path)
    one = write_script(tmp_path, *flags, name="one.py", edits=EXACT[task])
    run(one, *words, "--out-dir=one")
    many = write_script(
        tmp_path, *flags, f"--distributed={kind}", name="many.py", edits=EXACT[task]
    )
    output = run(many, *words, "--out-dir=many", ranks=ranks)
    assert output.count("epoch 2:") == 1  # only the first rank speaks
    difference = largest_difference(
        best_weights(tmp_path / "one"), best_weights(tmp_path / "many")
    )
    assert difference < 1e-9
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"))
