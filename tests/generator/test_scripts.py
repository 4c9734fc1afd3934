"""Generated scripts, run as scripts: pairs of tasks and sections, against their twins.

A section that must not change the result (amp on a CPU, checkpointing, resume, recovery
from out of memory, profiling, ...) is compared to the bit with the script without it.
"""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from allpairspy import AllPairs

from generator.options import (
    PRESETS,
    REQUIREMENTS,
    SECTIONS,
    TASKS,
    check_request,
    find_conflicts,
    preset_sections,
)
from generator.render import render_script
from generator.stitch import Library

from .scripts import (
    EXACT,
    assert_clean_to_ruff,
    best_weights,
    data_words,
    largest_difference,
    newest_state,
    run,
    same,
    write_script,
)

VALUES = {"task": [f"--task={name}" for name in TASKS]}
VALUES |= {
    name: [None, *(f"{s.flag}={choice}" for choice in s.choices if choice != s.usual)]
    if s.choices
    else [None, f"{s.flag}=2" if s.number is int else s.flag]
    for name, s in SECTIONS.items()
}
VALUES |= {"ema": [None, "--ema=0.9"], "split": [None, "--split"]}
VALUES |= {"token_budget": [None, "--token-budget=512"]}
# What needs an account or a server is run with a stand-in in test_loggers.py.
RUN_VALUES = VALUES | {"logger": [None, "--logger=tensorboard"]}
CHANGES_RESULT = (
    "task",
    "accumulate",
    "optimizer",
    "clip",
    "scheduler",
    "ema",
    "distributed",
    "stream",
    "token_budget",
)


def is_legal(row: list[tuple[str, str | None]]) -> bool:
    """Whether the flags of a row, or of the beginning of one, go together."""
    flags = {flag for _, flag in row if flag}
    flags |= {flag.partition("=")[0] for flag in flags}
    absent = {
        SECTIONS[name].flag for name, flag in row if not flag and name in SECTIONS
    }
    lacking = any(r.first in flags and r.needed in absent for r in REQUIREMENTS)
    return not lacking and not find_conflicts(flags)


def pairwise(values: dict[str, list[str | None]]) -> list[dict[str, str | None]]:
    """Rows of flags in which every legal pair of two sections' values comes up."""
    columns = [[(name, v) for v in flags] for name, flags in values.items()]
    rows = [dict(row) for row in AllPairs(columns, filter_func=is_legal)]
    # AllPairs gives up on a pair that its rows so far cannot take in.
    dice = random.Random(0)
    missing = legal_pairs(values)
    for row in rows:
        missing -= set(itertools.combinations(row.items(), 2))
    while missing:
        fixed = dict(min(missing, key=str))
        tries = (
            {n: fixed.get(n, dice.choice(flags)) for n, flags in values.items()} | fixed
            for _ in range(4000)
        )
        legal = (row for row in tries if is_legal(list(row.items())))
        best = max(
            itertools.islice(legal, 100),
            key=lambda row: len(missing & set(itertools.combinations(row.items(), 2))),
        )
        missing -= set(itertools.combinations(best.items(), 2))
        rows.append(best)
    return rows


def legal_pairs(values: dict[str, list[str | None]]) -> set[tuple]:
    """All pairs of two sections' values that go together."""
    return {
        pair
        for first, second in itertools.combinations(values, 2)
        for pair in itertools.product(
            [(first, v) for v in values[first]], [(second, v) for v in values[second]]
        )
        if is_legal(list(pair))
    }


ROWS = pairwise(RUN_VALUES)
# Spread over the rows, so that `make test` sees every task and most of the flags.
SAMPLE = random.Random(0).sample(range(len(ROWS)), 5)


def test_the_rows_hold_every_legal_pair():
    wanted = legal_pairs(RUN_VALUES)
    for row in ROWS:
        assert is_legal(list(row.items()))
        wanted -= set(itertools.combinations(row.items(), 2))
    assert not wanted


def run_and_read(folder: Path, flags: dict[str, str | None]) -> tuple[str, dict]:
    """Generate, run on little data; the log and the best weights."""
    folder.mkdir()
    task = flags["task"].removeprefix("--task=")
    script = write_script(folder, *filter(None, flags.values()))
    words = [*data_words(task, folder), "--out-dir=run"]
    if flags.get("token_budget"):
        at = words.index("--batch-size")
        del words[at : at + 2]
    # Compiled code is tested on its own: here it would take most of the time.
    ranks = 2 if flags.get("distributed") else 0
    output = run(script, *words, ranks=ranks, TORCHDYNAMO_DISABLE="1")
    assert f"weights in {Path('run/best.pt')}" in output
    return (folder / "run/metrics.jsonl").read_text(), best_weights(folder / "run")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=[] if n in SAMPLE else pytest.mark.slow)
        for n in range(len(ROWS))
    ],
)
def test_every_pair_of_sections_runs_and_equals_its_twin(number, tmp_path):
    row = ROWS[number]
    twin = {name: flag for name, flag in row.items() if name in CHANGES_RESULT}
    log, weights = run_and_read(tmp_path / "row", row)
    assert log.count('"loss": ') >= 6
    assert "null" not in log  # NaN
    twin_log, twin_weights = run_and_read(tmp_path / "twin", twin)
    if row["skip_nonfinite"]:
        log = log.replace(', "skipped": 0', "")
    assert log == twin_log
    assert same(weights, twin_weights)


def request_of(row: dict[str, str | None]):
    """The checked request of a row of flags."""
    values = {
        name: flag.partition("=")[2] or None
        for name, flag in row.items()
        if flag and name in SECTIONS
    }
    task = row["task"].removeprefix("--task=")
    request, problems = check_request(task, values, "train.py", bool(row.get("split")))
    assert not problems
    return request


def some_rows(count: int) -> list[dict[str, str | None]]:
    """Each section alone and missing, the presets, all pairs, `count` of all others."""
    dice = random.Random(count)
    rows = [dict(row) for row in pairwise(VALUES)]
    for task in VALUES["task"]:
        rows.append({"task": task})
        for name, flags in VALUES.items():
            rows += [{"task": task, name: flag} for flag in flags if name != "task"]
        for preset in PRESETS:
            chosen = preset_sections(preset, task.removeprefix("--task="))
            row = {
                n: SECTIONS[n].flag + (f"={v}" if v else "") for n, v in chosen.items()
            }
            rows.append({"task": task} | row)
        everything = {n: flags[-1] for n, flags in VALUES.items()} | {"task": task}
        most = everything | dict.fromkeys(("accumulate", "oom_recovery", "stream"))
        rows += [everything | dict.fromkeys((n, "token_budget")) for n in SECTIONS]
        rows += [most | {name: None} for name in SECTIONS]
    while count:
        row = {name: dice.choice(flags) for name, flags in VALUES.items()}
        if is_legal(list(row.items())):
            rows.append(row)
            count -= 1
    complete = [dict.fromkeys(VALUES) | row for row in rows]
    return [row for row in complete if is_legal(list(row.items()))]


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_scripts_are_clean_to_ruff_and_short_enough_to_own(count, tmp_path):
    library = Library.load()
    for number, row in enumerate(some_rows(count)):
        folder = tmp_path / str(number)
        folder.mkdir()
        script = render_script(request_of(row), library)
        files = {"train.py": script.text, "train_tools.py": script.tools}
        for name, text in {**files, **script.further}.items():
            if text:
                (folder / name).write_text(text)
        yours = script.text.partition("# --- Settings")[2]
        yours = re.split(r"\n# --- templates/|\nif __name__", yours)[0]
        assert yours.count("\n") < 320
    assert_clean_to_ruff(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_user_reads_stays_under_200_lines(task):
    values = PRESETS["recommended"]
    request, _ = check_request(task, values, "train.py", False)
    text = render_script(request).text
    yours = text[text.index("# --- Settings") : text.index("# --- templates/")]
    assert len(yours.strip().splitlines()) < 200


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


def test_best_by_accuracy_and_a_log_of_epochs_alone(tmp_path):
    script = write_script(tmp_path, "--task=image")
    # By loss the first epoch is the best, by accuracy the second.
    fake = (
        "rows = iter([(0.1, 0.5), (0.2, 0.9), (0.3, 0.7)]); "
        "script.evaluate_model = lambda *args, **settings: dict("
        "zip(('val_loss', 'val_accuracy'), next(rows)))"
    )
    words = [*data_words("image", tmp_path), "--epochs=3", "--log-every=0"]
    run(script, *words, "--best-by=val_accuracy", inject=fake)
    log = (tmp_path / "runs/image/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2, 3]
    assert torch.load(tmp_path / "runs/image/best.pt")["epoch"] == 2
