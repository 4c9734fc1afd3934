"""Generated scripts, run as scripts: every pair of sections, against its plain twin.

A section that must not change the result (amp on a CPU, checkpointing, resume, recovery
from out of memory, determinism) is compared to the bit with the script without it.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allpairspy import AllPairs

from generator.options import SECTIONS, TASKS, check_request
from generator.render import render_script
from generator.stitch import Library

from .scripts import (
    data_words,
    largest_difference,
    newest_state,
    run,
    same,
    write_script,
)

VALUES = {
    name: [None, *(f"{section.flag}={choice}" for choice in section.choices)]
    if section.choices
    else [None, f"{section.flag}=2" if section.number is int else section.flag]
    for name, section in SECTIONS.items()
    if not section.writes[0]  # they leave the script itself as it is
} | {"ema": [None, "--ema=0.9"], "split": [None, "--split"]}
CHANGES_RESULT = ("accumulate", "clip", "scheduler", "ema")


def pairwise() -> list[dict[str, str]]:
    """Rows of flags in which every pair of values of two sections comes up."""
    rows = AllPairs([[(name, v) for v in values] for name, values in VALUES.items()])
    return [{name: flag for name, flag in row if flag} for row in rows]


ROWS = pairwise()
TWINS = sorted(
    {tuple(f for n, f in row.items() if n in CHANGES_RESULT) for row in ROWS}
)


def test_the_rows_hold_every_pair():
    wanted = {
        frozenset(pair)
        for first, second in itertools.combinations(VALUES, 2)
        for pair in itertools.product(
            [(first, v) for v in VALUES[first]], [(second, v) for v in VALUES[second]]
        )
    }
    for row in ROWS:
        full = [(name, row.get(name)) for name in VALUES]
        wanted -= {frozenset(pair) for pair in itertools.combinations(full, 2)}
    assert not wanted


def run_and_read(folder: Path, task: str, *flags: str) -> tuple[str, dict]:
    """Generate, run on little data; the log and the best weights."""
    folder.mkdir()
    script = write_script(folder, "--task", task, *flags)
    # Compiled code is tested on its own: here it would take most of the time.
    words = [*data_words(task, folder), "--out-dir=run"]
    output = run(script, *words, TORCHDYNAMO_DISABLE="1")
    assert f"weights in {Path('run/best.pt')}" in output
    best = torch.load(folder / "run/best.pt", weights_only=True)
    return (folder / "run/metrics.jsonl").read_text(), best["model_state_dict"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("twin", TWINS, ids="".join)
def test_every_pair_of_sections_runs_and_equals_its_twin(task, twin, tmp_path):
    twin_log, twin_weights = run_and_read(tmp_path / "twin", task, *twin)
    losses = [json.loads(line).get("loss") for line in twin_log.splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    for number, row in enumerate(ROWS):
        if tuple(flag for name, flag in row.items() if name in CHANGES_RESULT) == twin:
            log, weights = run_and_read(tmp_path / str(number), task, *row.values())
            assert log == twin_log, row
            assert same(weights, twin_weights), row


def all_requests():
    """Each section alone, all but one, none, all, and every pair, for both tasks."""
    alone = [{n: f} for n, flags in VALUES.items() for f in flags[1:]]
    everything = {name: flags[-1] for name, flags in VALUES.items()}
    without = [{k: v for k, v in everything.items() if k != n} for n in VALUES]
    for task, row in itertools.product(
        TASKS, [{}, everything, *alone, *without, *ROWS]
    ):
        values = {
            n: f.partition("=")[2] or None for n, f in row.items() if n != "split"
        }
        request, problems = check_request(task, values, "train.py", "split" in row)
        assert not problems
        yield request


def test_all_scripts_are_clean_to_ruff_and_short_enough_to_own(tmp_path):
    library = Library.load()
    requests = list(all_requests())
    for number, request in enumerate(requests):
        folder = tmp_path / str(number)
        folder.mkdir()
        script = render_script(request, library)
        (folder / "train.py").write_text(script.text)
        if script.tools:
            (folder / "train_tools.py").write_text(script.tools)
        yours = script.text.partition("# --- Settings")[2].partition("# --- templates/")
        assert yours[0].count("\n") < 320
    rules = "E,F,W,I,B,UP,SIM,C4,RUF,PIE,RET"
    ruff = [sys.executable, "-m", "ruff"]
    # One root a script, as a user has it: its tools are a module of its own.
    folders = [str(folder) for folder in tmp_path.iterdir()]
    src = "src = [" + ", ".join(map(json.dumps, folders)) + "]"
    for words in (
        ["check", "--isolated", "--select", rules, "--config", src],
        ["format", "--isolated", "--check"],
    ):
        done = subprocess.run(
            [*ruff, *words, str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[:3000] + done.stderr[:1000]


# In double precision and without dropout, so that only a real difference shows.
EXACT = {
    "text": {"dropout=0.1": "dropout=0.0", ".to(device)\n": ".to(device).double()\n"},
    "image": {
        "dropout=0.1": "dropout=0.0",
        ".to(device)\n": ".to(device).double()\n",
        "images_BCHW.float()": "images_BCHW.double()",
        "if model.training:": "if False:",
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_equals_the_whole_batch(task, tmp_path):
    flags = ("--accumulate=2", "--resume", "--clip=0.1", "--scheduler=linear")
    script = write_script(tmp_path, "--task", task, *flags, edits=EXACT[task])
    words = data_words(task, tmp_path)
    states = []
    for parts in (1, 2, 5):
        run(script, *words, f"--out-dir={parts}", f"--accumulate={parts}")
        states.append(newest_state(tmp_path / str(parts))["parts"]["model"])
    for state in states[1:]:
        assert largest_difference(states[0], state) < 1e-9
