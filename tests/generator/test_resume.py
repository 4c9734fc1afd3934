"""Exact resume: killed anywhere, the run ends as one that never was killed.

Weights, averaged weights, optimizer, schedule, random generators and the log are
compared to the bit; dropout and augmentation are on.
"""

import functools
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest

from templates.checkpoint_io import find_damage, list_training_states

from .scripts import (
    END_AFTER_FOUR_SAVES,
    ONE_TASK,
    data_words,
    newest_state,
    run,
    same,
    start,
    wait_for_lines,
    write_script,
)

SECTIONS = (
    "--resume",
    "--ema=0.9",
    "--clip",
    "--scheduler=cosine",
    "--accumulate=2",
    "--early-stopping=9",
    "--amp",
)


def write_job(folder: Path, task: str, *more: str) -> tuple[Path, list[str]]:
    """A script with all that has state, and the options of a short run."""
    script = write_script(folder, "--task", task, *SECTIONS, *more)
    return script, [*data_words(task, folder), "--epochs=3", "--save-every=2"]


def finished(out_dir: Path) -> tuple[dict, str]:
    """The final state of everything, and the log."""
    return newest_state(out_dir), (out_dir / "metrics.jsonl").read_text()


@functools.cache
def uninterrupted(task: str) -> tuple[dict, str]:
    """How the job of `write_job` ends when nobody disturbs it."""
    with tempfile.TemporaryDirectory() as folder:
        script, words = write_job(Path(folder), task)
        run(script, *words, "--out-dir=run")
        return finished(script.parent / "run")


def assert_as_uninterrupted(task: str, out_dir: Path) -> None:
    state, log = finished(out_dir)
    assert log == uninterrupted(task)[1]
    assert same(state, uninterrupted(task)[0])


@pytest.mark.parametrize("task", ONE_TASK)
def test_killed_at_five_random_moments(task, tmp_path):
    script, words = write_job(tmp_path, task)
    dice = random.Random(task)
    log = tmp_path / "killed/metrics.jsonl"
    kills = 0
    for number in range(5):
        # Workers change as well: the order of samples must not depend on them.
        process = start(
            script, *words, "--out-dir=killed", f"--num-workers={number % 3}"
        )
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        wait_for_lines(log, max(0, lines - 1) + dice.randint(1, 3), process)
        time.sleep(dice.random() * 0.2)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 3
    run(script, *words, "--out-dir=killed")
    assert_as_uninterrupted(task, tmp_path / "killed")


@pytest.mark.parametrize(
    "moment",
    [
        "write",
        "replace",
        pytest.param("sync_folder", marks=pytest.mark.slow),
        pytest.param("unlink", marks=pytest.mark.slow),
    ],
)
def test_killed_during_a_save(moment, tmp_path):
    script, words = write_job(tmp_path, "text")
    victim = {
        "write": "script.ChecksumWriter.write",
        "replace": "os.replace",
        "sync_folder": "script.sync_folder",
        "unlink": "pathlib.Path.unlink",
    }[moment]
    inject = f"""
import os, pathlib, signal
real, calls = {victim}, []
def kill(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{victim} = kill
"""
    # It dies in its fifth call; started again it must get further, in the end through.
    for _ in range(2):
        run(script, *words, "--out-dir=killed", expect=-signal.SIGKILL, inject=inject)
    run(script, *words, "--out-dir=killed")
    assert_as_uninterrupted("text", tmp_path / "killed")


def test_sigterm_saves_and_exits(tmp_path):
    script, words = write_job(tmp_path, "text")
    words += ["--save-every=1000"]
    process = start(script, *words, "--out-dir=stopped")
    wait_for_lines(tmp_path / "stopped/metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    state = list_training_states(tmp_path / "stopped/checkpoints")[-1]
    assert int(state.stem.split("-")[1]) % 7  # in the middle of an epoch
    assert "going on from" in run(script, *words, "--out-dir=stopped")
    assert_as_uninterrupted("text", tmp_path / "stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_the_job_saves_as_well(number, tmp_path):
    """Slurm and Ctrl-C reach the loader's workers too, which must go on for a while."""
    script, words = write_job(tmp_path, "text")
    words += ["--save-every=1000", "--num-workers=2"]
    process = start(script, *words, "--out-dir=stopped", start_new_session=True)
    wait_for_lines(tmp_path / "stopped/metrics.jsonl", 2, process)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number
    run(script, *words, "--out-dir=stopped")
    assert_as_uninterrupted("text", tmp_path / "stopped")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    script, words = write_job(tmp_path, "image")
    run(script, *words, "--out-dir=hurt", expect=1, inject=END_AFTER_FOUR_SAVES)
    newest = list_training_states(tmp_path / "hurt/checkpoints")[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    assert find_damage(newest)
    output = run(script, *words, "--out-dir=hurt")
    assert f"{newest.name}: its checksum does not match" in output
    assert newest.with_name(newest.name + ".damaged").exists()
    assert_as_uninterrupted("image", tmp_path / "hurt")


def test_a_finished_run_says_so_and_other_settings_are_refused(tmp_path):
    script, words = write_job(tmp_path, "text")
    run(script, *words, "--out-dir=run")
    before = finished(tmp_path / "run")
    assert "weights in run/best.pt" in run(script, *words, "--out-dir=run")
    after = finished(tmp_path / "run")
    assert same(before[0], after[0])
    assert before[1] == after[1]
    output = run(script, *words, "--out-dir=run", "--clip-norm=2", expect=2)
    assert "error: run holds a run with other settings (clip_norm was 1.0" in output
    assert "Traceback" not in output


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_lost(tmp_path):
    script, words = write_job(tmp_path, "text")
    run(script, *words, "--out-dir=run")
    states = list_training_states(tmp_path / "run/checkpoints")
    for state in states:
        state.write_bytes(state.read_bytes()[:-100])
    output = run(script, *words, "--out-dir=run", expect=2)
    assert "every checkpoint in it is damaged" in output
    assert "Traceback" not in output
    for state in states:
        assert state.with_name(state.name + ".damaged").exists()
