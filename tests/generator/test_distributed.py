"""Scripts under torchrun (gloo on a CPU): equal to one process, and exact on resume."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from generator.options import TASKS

from .scripts import (
    EXACT,
    best_weights,
    data_words,
    largest_difference,
    run,
    same,
    start,
    wait_for_lines,
    write_script,
)
from .test_oom import SHORT_OF_MEMORY

# What `make test` runs of all tasks x {ddp, fsdp} x {2, 3} ranks; each takes a while.
QUICK = {("lm", "ddp", 3), ("text", "fsdp", 2), ("embedding", "ddp", 2)}


def logged(out_dir: Path) -> list[float]:
    """All numbers in the log of a run, in order."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for value in json.loads(line).values()]


@pytest.mark.parametrize(
    ("task", "kind", "ranks"),
    [
        pytest.param(
            *case,
            id="-".join(map(str, case)),
            marks=() if case in QUICK else pytest.mark.slow,
        )
        for case in (
            (task, kind, ranks)
            for task in TASKS
            for kind in ("ddp", "fsdp")
            for ranks in (2, 3)
        )
    ],
)
def test_ranks_together_equal_one_process(task, kind, ranks, tmp_path):
    """In double precision, without dropout; batches of 16 do not divide by 3 ranks."""
    flags = ("--task", task, "--clip=0.1", "--scheduler=linear", "--ema=0.9")
    words = data_words(task, tmp_path)
    one = write_script(tmp_path, *flags, name="one.py", edits=EXACT[task])
    run(one, *words, "--out-dir=one")
    flags += (f"--distributed={kind}",)
    many = write_script(tmp_path, *flags, name="many.py", edits=EXACT[task])
    output = run(many, *words, "--out-dir=many", ranks=ranks)
    assert output.count("epoch 2: ") == 1  # only the first rank speaks
    assert logged(tmp_path / "many") == pytest.approx(logged(tmp_path / "one"))
    weights = (best_weights(tmp_path / name) for name in ("one", "many"))
    assert largest_difference(*weights) < 1e-9


@pytest.mark.parametrize("task", ["lm", pytest.param("text", marks=pytest.mark.slow)])
def test_accumulation_and_one_rank_out_of_memory_change_nothing(task, tmp_path):
    """Memory runs out on the second rank only; both halve, the batch stays whole."""
    flags = ("--task", task, "--clip=0.1", "--distributed=ddp", "--oom-recovery")
    words = data_words(task, tmp_path)
    script = write_script(tmp_path, *flags, edits=EXACT[task])
    run(script, *words, "--out-dir=whole", ranks=2)
    only_second = SHORT_OF_MEMORY.format(first=3, room=2).replace(
        "if model.training:", "if model.training and int(os.environ['RANK']) == 1:"
    )
    inject = "import os\n" + only_second
    output = run(script, *words, "--out-dir=short", ranks=2, inject=inject)
    assert "trying 2: CUDA out of memory" in output
    weights = (best_weights(tmp_path / name) for name in ("whole", "short"))
    assert largest_difference(*weights) < 1e-9


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_and_stopped_ranks_go_on_exactly(kind, tmp_path):
    """kill -9 of all processes at a random moment, then SIGTERM; dropout is on."""
    flags = ("--resume", "--ema=0.9", "--scheduler=cosine", "--distributed", kind)
    script = write_script(tmp_path, *flags)
    words = [*data_words("text", tmp_path), "--save-every=2"]
    run(script, *words, "--out-dir=whole", ranks=2)
    log = tmp_path / "cut/metrics.jsonl"
    ranks = {"ranks": 2, "start_new_session": True}
    process = start(script, *words, "--out-dir=cut", **ranks)
    wait_for_lines(log, 2, process)
    time.sleep(random.Random(kind).random() * 0.2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process = start(script, *words, "--out-dir=cut", **ranks)
    wait_for_lines(log, 5, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to both ranks
    process.wait(timeout=120)
    output = run(script, *words, "--out-dir=cut", ranks=2)
    assert output.count("going on from") == 1
    assert log.read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert same(best_weights(tmp_path / "cut"), best_weights(tmp_path / "whole"))


def test_other_numbers_of_ranks_and_bad_launches_are_one_line(tmp_path):
    script = write_script(tmp_path, "--distributed=ddp")
    words = [*data_words("text", tmp_path), "--batch-size=2"]
    output = run(script, *words, ranks=3, expect=1)
    assert "leaves some of the 3 ranks without a row" in output
    single = write_script(tmp_path, name="single.py")
    output = run(single, *words, expect=2, WORLD_SIZE="2")
    assert "generate it with --distributed ddp" in output
    assert "Traceback" not in output


def test_batches_of_like_length_are_the_same_on_two_ranks(tmp_path):
    """Of 512 padded tokens; the samples of a batch, and so its loss, stay the same."""
    flags = ("--token-budget=512", "--clip=0.1", "--resume")
    words = data_words("text", tmp_path)
    at = words.index("--batch-size")
    del words[at : at + 2]
    one = write_script(tmp_path, *flags, name="one.py", edits=EXACT["text"])
    run(one, *words, "--out-dir=one")
    flags += ("--distributed=ddp",)
    two = write_script(tmp_path, *flags, name="two.py", edits=EXACT["text"])
    run(two, *words, "--out-dir=two", ranks=2)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"))
    output = run(two, *words, "--token-budget=64", "--out-dir=bad", ranks=2, expect=1)
    assert "ranks without one" in output


OTHER_DATA = """
import os
make = script.build_datasets
if os.environ["RANK"] == "1":
    script.build_datasets = lambda *values: make({})
"""


@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("text", "*values[:-2], 0.3, values[-1]"),  # another number of rows
        pytest.param(
            *("tabular", "*values[:-1], values[-1] + 1"),  # another order
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_see_other_data_are_refused(task, values, tmp_path):
    """As machines with copies of their own may; they would wait for each other."""
    script = write_script(tmp_path, f"--task={task}", "--distributed=ddp")
    inject = OTHER_DATA.format(values)
    words = data_words(task, tmp_path)
    output = run(script, *words, ranks=2, expect=1, inject=inject)
    assert "rank 1 has" in output
    assert "give all machines the same data" in output
