"""Out of memory, injected: the micro-batch halves, the effective batch does not."""

import json
import random
from pathlib import Path

import pytest

from .scripts import (
    EXACT,
    ONE_TASK,
    data_words,
    largest_difference,
    newest_state,
    run,
    same,
    write_script,
)

FLAGS = ("--oom-recovery", "--resume", "--clip", "--scheduler=cosine", "--ema=0.9")

# More than `room` samples at once do not fit, from the call number `first` on, in
# training and in the evaluation after it.
SHORT_OF_MEMORY = """
import torch
real, calls = script.compute_loss, []
def compute_loss(model, inputs, labels):
    result = real(model, inputs, labels)
    if model.training:
        calls.append(len(labels))
    if len(calls) > {first} and len(labels) > {room}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return result
script.compute_loss = compute_loss
if hasattr(script, "accumulate_contrastive_gradients"):  # the encoder is what is cut
    script.compute_loss, build = real, script.build_model
    def check(model, inputs):
        if model.training:
            calls.append(len(inputs[0]))
        if len(calls) > {first} and len(inputs[0]) > {room}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    def build_model(**spec):
        model = build(**spec)
        model.register_forward_pre_hook(check)
        return model
    script.build_model = build_model
"""


def weights(out_dir: Path) -> dict:
    return newest_state(out_dir)["parts"]["model"]


@pytest.mark.parametrize("task", ONE_TASK)
def test_out_of_memory_at_some_step_ends_as_with_small_micro_batches(task, tmp_path):
    script = write_script(tmp_path, "--task", task, *FLAGS, edits=EXACT[task])
    words = data_words(task, tmp_path)
    calls = [0, *random.Random(task).sample(range(1, 14), 2)]  # of 14 steps
    for number, first in enumerate(calls):
        fault = SHORT_OF_MEMORY.format(first=first, room=4)
        output = run(script, *words, f"--out-dir=oom{number}", inject=fault)
        assert "out of memory" in output.lower()
        assert (
            newest_state(tmp_path / f"oom{number}")["parts"]["run"]["micro_batch"] == 4
        )
    folder = tmp_path / "small"
    folder.mkdir()
    small = write_script(
        folder, "--task", task, *FLAGS, "--accumulate=4", edits=EXACT[task]
    )
    run(small, *words, "--out-dir=run")  # micro-batches of 16 / 4 from the start
    for number in range(3):
        difference = largest_difference(
            weights(tmp_path / f"oom{number}"), weights(folder / "run")
        )
        # Double precision: a lost or a doubled sample would show at 1e-3.
        assert difference < 1e-9


def test_a_retry_repeats_dropout_to_the_bit(tmp_path):
    """Short of memory from the first step: as if started with that micro-batch."""
    script = write_script(tmp_path, *FLAGS, "--checkpointing", "--accumulate=2")
    words = data_words("text", tmp_path)
    fault = SHORT_OF_MEMORY.format(first=0, room=4)
    run(script, *words, "--out-dir=oom", inject=fault)
    run(script, *words, "--out-dir=small", "--accumulate=4")
    assert same(weights(tmp_path / "oom"), weights(tmp_path / "small"))
    log = (tmp_path / "oom/metrics.jsonl").read_text()
    assert log == (tmp_path / "small/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("where", "times"),
    [
        pytest.param("forward", 2, marks=pytest.mark.slow),
        ("backward", 2),
        ("backward", 1),
    ],
)
def test_an_out_of_memory_midway_repeats_only_that_piece(where, times, tmp_path):
    """In the second half of step 3, when the first has left its gradients already.

    At the same size first: where that fits, the result is the same to the bit.
    """
    script = write_script(tmp_path, *FLAGS, "--accumulate=2", edits=EXACT["text"])
    words = data_words("text", tmp_path)
    fault = """
import torch
real, calls, sizes, failing = script.compute_loss, [], [], range(6, 6 + TIMES)
class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)
    @staticmethod
    def backward(ctx, grad):
        calls.append(1)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad
def compute_loss(model, inputs, labels):
    if not model.training:
        return real(model, inputs, labels)
    sizes.append(len(labels))
    if len(sizes) == 9:
        print("sizes", sizes)
    if "WHERE" == "backward":
        hidden = model.head.register_forward_pre_hook(lambda m, x: (Fail.apply(x[0]),))
    loss = real(model, inputs, labels)
    if "WHERE" == "backward":
        hidden.remove()
    elif len(sizes) in failing:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return loss
script.compute_loss = compute_loss
"""
    fault = fault.replace("WHERE", where).replace("TIMES", str(times))
    output = run(script, *words, "--out-dir=oom", inject=fault)
    cut = "4, 4" if times == 2 else "8, 8"
    assert f"sizes [8, 8, 8, 8, 8, 8, 8, {cut}]" in output
    run(script, *words, "--out-dir=whole")
    pair = [weights(tmp_path / name) for name in ("oom", "whole")]
    assert same(*pair) if times == 1 else largest_difference(*pair) < 1e-9


def test_a_batch_gets_through_however_often_memory_runs_out(tmp_path):
    """At two calls of six, one after the other, also in evaluation."""
    script = write_script(tmp_path, *FLAGS, edits=EXACT["text"])
    words = data_words("text", tmp_path)
    fault = """
import torch
real, calls = script.compute_loss, []
script._seconds_to_wait = lambda waits: 0.0
def compute_loss(model, inputs, labels):
    calls.append(1)
    if len(calls) % 6 < 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(model, inputs, labels)
script.compute_loss = compute_loss
"""
    run(script, *words, "--out-dir=oom", inject=fault)
    run(script, *words, "--out-dir=whole")
    pair = (weights(tmp_path / name) for name in ("oom", "whole"))
    assert largest_difference(*pair) < 1e-9
    logs = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("oom", "whole")]
    for one, two in zip(*(log.splitlines() for log in logs), strict=True):
        assert json.loads(one) == pytest.approx(json.loads(two), rel=1e-6)


@pytest.mark.slow
def test_a_retry_leaves_batch_norm_as_if_nothing_had_failed(tmp_path):
    edits = {"nn.GroupNorm(8, width)": "nn.BatchNorm2d(width)"}
    script = write_script(tmp_path, "--task=image", *FLAGS, edits=edits)
    words = [*data_words("image", tmp_path), "--epochs=1"]
    # The batch has gone through the model when memory runs out.
    fault = SHORT_OF_MEMORY.format(first=0, room=8)
    run(script, *words, "--out-dir=oom", inject=fault)
    planned = """
real = script.train_with_oom_recovery
script.train_with_oom_recovery = lambda f, size, **options: real(f, 8, **options)
"""
    run(script, *words, "--out-dir=planned", inject=planned)
    assert same(weights(tmp_path / "oom"), weights(tmp_path / "planned"))


def test_the_micro_batch_grows_back_when_memory_is_free_again(tmp_path):
    """Tried now and then, here at every third step; six times there is none."""
    edits = {**EXACT["text"], "run.step % 10": "run.step % 3"}
    script = write_script(tmp_path, *FLAGS, edits=edits)
    words = data_words("text", tmp_path)
    fault = """
import torch
loss, failed, pieces = script.compute_loss, [], script.run_in_pieces
def compute_loss(model, inputs, labels):
    if model.training and len(labels) > 4 and len(failed) < 6:
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")
    return loss(model, inputs, labels)
def write_size(work, batch, micro_batch, *others, **options):
    if others:  # not the evaluation
        with open("sizes.txt", "a") as file:
            print(micro_batch, file=file)
    return pieces(work, batch, micro_batch, *others, **options)
script.compute_loss, script.run_in_pieces = compute_loss, write_size
"""
    run(script, *words, "--out-dir=short", inject=fault)
    sizes = [int(line) for line in (tmp_path / "sizes.txt").read_text().split()]
    assert sizes == [16, 4, 4, 8, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16]
    run(script, *words, "--out-dir=enough")
    pair = (weights(tmp_path / name) for name in ("short", "enough"))
    assert largest_difference(*pair) < 1e-9


def test_out_of_memory_anywhere_else_changes_nothing(tmp_path):
    """Where the model and the optimizer's state are made, in a step, in evaluation."""
    script = write_script(tmp_path, *FLAGS, "--amp")
    words = data_words("text", tmp_path)
    fault = """
import torch
def fail_at(owner, name, calls):
    real, made = getattr(owner, name), []
    def call(*values, **options):
        made.append(1)
        if len(made) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*values, **options)
    setattr(owner, name, call)
fail_at(torch.nn.Module, "to", [1])
fail_at(script, "ModelEMA", [1])
fail_at(torch.optim.AdamW, "step", [1, 5, 6, 9])  # the first: allocation
fail_at(torch.nn.utils, "clip_grad_norm_", [2, 7, 8])
fail_at(script, "check_finite", [4, 5])  # three for the log
fail_at(script, "count_right", [2, 3, 4, 5])
"""
    output = run(script, *words, "--out-dir=short", inject=fault)
    for purpose, times in (
        ("for the model", 1),
        ("for the optimizer,", 1),
        ("for averaged weights", 1),
        ("for the optimizer's step", 3),
        ("for clipping", 3),
        ("for a check of the weights", 2),
        *((f"at batch size {pair}", 1) for pair in ("12, trying 12", "12, trying 6")),
        *((f"at batch size {pair}", 1) for pair in ("6, trying 6", "6, trying 3")),
    ):
        assert output.count(f"Out of memory {purpose}") == times, purpose
    run(script, *words, "--out-dir=enough")
    assert same(weights(tmp_path / "short"), weights(tmp_path / "enough"))
    logs = [
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("short", "enough")
    ]
    for one, two in zip(*(log.splitlines() for log in logs), strict=True):
        # Validation is a mean over smaller pieces.
        assert json.loads(one) == pytest.approx(json.loads(two), rel=1e-5)


@pytest.mark.slow
def test_a_step_that_fails_halfway_is_not_repeated(tmp_path):
    script = write_script(tmp_path, *FLAGS)
    words = [*data_words("text", tmp_path), "--save-every=2", "--out-dir=run"]
    fault = """
import torch
real, calls = torch.optim.AdamW.step, []
def step(self, *values):
    calls.append(1)
    result = real(self, *values)
    if len(calls) == 6:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return result
torch.optim.AdamW.step = step
"""
    output = run(script, *words, expect=1, inject=fault)
    assert "error: memory ran out while the optimizer was updating" in output
    assert "Traceback" not in output
    run(script, *words)  # goes on from step 4
    run(script, *words[:-1], "--out-dir=undisturbed")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))


def test_other_errors_pass_and_hopeless_ones_say_what_was_tried(tmp_path):
    edits = {"patience=6": "patience=3"}  # less than a second
    script = write_script(tmp_path, "--oom-recovery", edits=edits)
    words = data_words("text", tmp_path)
    fault = SHORT_OF_MEMORY.format(first=0, room=0)
    output = run(script, *words, "--out-dir=hopeless", expect=1, inject=fault)
    assert "error: not even one sample fits: out of memory at every batch" in output
    assert "tried (16, 8, 4, 2, 1;" in output
    assert "Traceback" not in output
    other = SHORT_OF_MEMORY.format(first=0, room=0).replace(
        'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")',
        'ValueError("mine")',
    )
    output = run(script, *words, "--out-dir=other", expect=1, inject=other)
    assert "ValueError: mine" in output


def test_out_of_memory_while_a_saved_state_is_loaded_is_waited_for(tmp_path):
    """It is no sign of another script's file."""
    script = write_script(tmp_path, *FLAGS)
    words = data_words("text", tmp_path)
    stop = """
import os, signal
real, calls = script.compute_loss, []
def compute_loss(*batch):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*batch)
script.compute_loss = compute_loss
"""
    run(script, *words, "--out-dir=run", inject=stop, expect=143)
    fault = """
import torch
real, calls = torch.optim.AdamW.load_state_dict, []
def load(self, state):
    calls.append(1)
    if len(calls) < 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(self, state)
torch.optim.AdamW.load_state_dict = load
"""
    output = run(script, *words, "--out-dir=run", inject=fault)
    assert output.count("Out of memory for the saved state, trying again") == 2
    assert "does not fit" not in output
    run(script, *words, "--out-dir=whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
