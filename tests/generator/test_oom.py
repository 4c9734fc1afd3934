"""Out of memory, injected: the micro-batch halves, the effective batch does not."""

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
if hasattr(script, "accumulate_contrastive_gradients"):
    accumulate = script.accumulate_contrastive_gradients
    def accumulate_short_of_memory(encode, *others, **options):
        def encode_short_of_memory(piece):
            result = encode(piece)
            calls.append(len(piece[0]))
            if len(calls) > {first} and len(piece[0]) > {room}:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")
            return result
        return accumulate(encode_short_of_memory, *others, **options)
    script.accumulate_contrastive_gradients = accumulate_short_of_memory
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


def test_an_out_of_memory_midway_leaves_nothing_behind(tmp_path):
    """In the second half of step 3, when the first has left its gradients already.

    Against a run whose micro-batch is set to 4 at that step, without a fault.
    """
    script = write_script(tmp_path, *FLAGS, "--accumulate=2")
    words = data_words("text", tmp_path)
    fault = SHORT_OF_MEMORY.format(first=5, room=4)
    run(script, *words, "--out-dir=oom", inject=fault)
    planned = """
real, calls = script.train_with_oom_recovery, []
def halve_from_step_three(train_fn, size, **options):
    calls.append(1)
    return real(train_fn, 4 if len(calls) > 2 else size, **options)
script.train_with_oom_recovery = halve_from_step_three
"""
    run(script, *words, "--out-dir=planned", inject=planned)
    assert same(weights(tmp_path / "oom"), weights(tmp_path / "planned"))


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
    """Tried now and then, here at every third step; three times there is none."""
    edits = {**EXACT["text"], "run.step % 100": "run.step % 3"}
    script = write_script(tmp_path, *FLAGS, edits=edits)
    words = data_words("text", tmp_path)
    fault = """
import torch
loss, failed, halve = script.compute_loss, [], script.train_with_oom_recovery
def compute_loss(model, inputs, labels):
    if model.training and len(labels) > 4 and len(failed) < 3:
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")
    return loss(model, inputs, labels)
def write_size(train_fn, size, **options):
    with open("sizes.txt", "a") as file:
        print(size, file=file)
    return halve(train_fn, size, **options)
script.compute_loss, script.train_with_oom_recovery = compute_loss, write_size
"""
    run(script, *words, "--out-dir=short", inject=fault)
    sizes = [int(line) for line in (tmp_path / "sizes.txt").read_text().split()]
    assert sizes == [16, 4, 4, 8, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16]
    run(script, *words, "--out-dir=enough")
    pair = (weights(tmp_path / name) for name in ("short", "enough"))
    assert largest_difference(*pair) < 1e-9


def test_other_errors_pass_and_hopeless_ones_say_what_was_tried(tmp_path):
    script = write_script(tmp_path, "--oom-recovery")
    words = data_words("text", tmp_path)
    fault = SHORT_OF_MEMORY.format(first=0, room=0)
    output = run(script, *words, "--out-dir=hopeless", expect=1, inject=fault)
    assert "error: out of memory at every batch size tried (16, 8, 4, 2, 1" in output
    assert "Traceback" not in output
    other = SHORT_OF_MEMORY.format(first=0, room=0).replace(
        'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")',
        'ValueError("mine")',
    )
    output = run(script, *words, "--out-dir=other", expect=1, inject=other)
    assert "ValueError: mine" in output
