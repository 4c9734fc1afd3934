"""checkpoint_io.StateSaver: what is saved in the background, errors, kills."""

import os
import random
import signal
import threading

import pytest
import torch
from torch import nn

from templates import checkpoint_io
from templates.checkpoint_io import (
    CheckpointError,
    HostBuffers,
    RankStateSaver,
    RunState,
    StateSaver,
    full_state_dict,
    list_training_states,
    load_checkpoint,
    read_checkpoint_file,
    run_on_all_ranks,
    run_on_rank_zero,
    save_checkpoint,
    save_training_state,
)
from tests.templates.test_checkpoint_io import (
    Training,
    damage,
    equal,
    fork,
    run_child,
    seed_everything,
)


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until the event is set."""
    may_write = threading.Event()
    write = checkpoint_io.write_checkpoint_file

    def write_later(state, path):
        assert may_write.wait(10)
        write(state, path)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint_file", write_later)
    yield may_write
    may_write.set()


def begin(folder, seed: int = 0) -> tuple[Training, StateSaver]:
    seed_everything(seed)
    training = Training(folder)
    training.folder.mkdir(parents=True, exist_ok=True)
    return training, StateSaver(training.folder, training.parts, report=print)


def test_what_is_saved_is_the_state_when_save_was_called(tmp_path, slow_disk):
    whole, _ = begin(tmp_path / "whole")
    whole.train(9)

    first, saver = begin(tmp_path / "parts")
    first.train(5)
    first.run.history = [1, [2]]
    saver.save(5)
    first.run.history[1].append(3)
    first.train(3)  # goes on while the state is written, and is lost
    assert list_training_states(first.folder) == []
    slow_disk.set()
    saver.wait()

    second, saver = begin(tmp_path / "parts", seed=99)
    assert saver.resume() == first.folder / "step-00000005.pt"
    assert second.run.history == [1, [2]]
    del second.run.history
    second.train(4)
    assert equal(second.state(), whole.state())
    assert second.log.read_bytes() == whole.log.read_bytes()


def test_the_file_is_that_of_save_training_state(tmp_path):
    training, saver = begin(tmp_path)
    training.train(2)
    here = save_training_state(tmp_path / "here", 2, training.parts)
    with saver:
        saver.save(2)
    there = training.folder / "step-00000002.pt"
    assert equal(read_checkpoint_file(here), read_checkpoint_file(there))
    assert here.read_bytes() == there.read_bytes()


def test_a_second_save_waits_and_only_the_newest_stay(tmp_path, slow_disk):
    training, saver = begin(tmp_path)
    saver.save(0)
    timer = threading.Timer(0.2, slow_disk.set)
    timer.start()
    for step in range(1, 4):
        training.train(1)
        saver.save(step)
        assert slow_disk.is_set()
    saver.wait()
    names = [path.name for path in list_training_states(training.folder)]
    assert names == ["step-00000002.pt", "step-00000003.pt"]
    saved = read_checkpoint_file(training.folder / names[0])
    assert saved["parts"]["run"]["step"] == 2


def test_the_log_reaches_the_disk_before_the_state_that_counts_on_it(
    tmp_path, monkeypatch
):
    training, saver = begin(tmp_path)
    training.train(1)
    synced = []

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    saver.save(1)
    saver.wait()
    order = [training.log, training.folder / "step-00000001.pt", training.folder]
    assert synced == [path.stat().st_ino for path in order]


def test_what_the_thread_could_not_do_is_raised_once_by_the_next_call(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, no folder")
    training, _ = begin(tmp_path / "run")
    saver = StateSaver(blocked, training.parts)
    saver.save(1)
    with pytest.raises(CheckpointError, match="blocked"):
        saver.save(2)
    saver.wait()
    with pytest.raises(CheckpointError, match="blocked"), saver:
        saver.save(3)

    told = []

    def save_and_fail():
        with StateSaver(blocked, training.parts, report=told.append) as saver:
            saver.save(4)
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        save_and_fail()
    assert "the last save failed" in told[0]


def test_what_cannot_be_saved_is_refused_by_save_itself(tmp_path):
    training, saver = begin(tmp_path)
    training.run.bad = object()
    with pytest.raises(TypeError, match="a object cannot be saved"):
        saver.save(1)
    saver.wait()
    assert list_training_states(training.folder) == []


def test_a_damaged_newest_file_is_named(tmp_path):
    training, saver = begin(tmp_path)
    told = []
    saver.report = told.append
    for step in (1, 2):
        saver.save(step)
    saver.wait()
    damage(training.folder / "step-00000002.pt")
    assert saver.resume().name == "step-00000001.pt"
    assert "step-00000002.pt.damaged" in told[0]


def test_killed_during_any_save_nothing_confirmed_is_lost(tmp_path):
    moments = random.Random(0)
    step = 0
    for _ in range(8):
        reader, writer = os.pipe()

        def train_and_save(step=step, writer=writer):
            run = RunState(step=step, weights=torch.full((200_000,), float(step)))
            saver = StateSaver(tmp_path, {"run": run})
            assert step == 0 or saver.resume() is not None
            assert run.step >= step
            while True:
                run.step += 1
                run.weights += 1
                saver.save(run.step)  # confirms the one before
                os.write(writer, (run.step - 1).to_bytes(4, "big"))

        child = fork(train_and_save)
        while (first := int.from_bytes(os.read(reader, 4), "big")) <= step:
            pass  # each child gets on, however busy the machine is
        signal.sigtimedwait([], moments.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        with open(reader, "rb") as confirmations:
            confirmed = confirmations.read()[-4:]
        step = int.from_bytes(confirmed, "big") if confirmed else first

        def check(step=step):
            run = RunState(step=0)
            StateSaver(tmp_path, {"run": run}).resume()
            assert run.step >= step
            assert (run.weights == run.step).all()

        assert run_child(check) == 0


def test_buffers_are_kept_and_hold_no_view_of_the_state():
    shared = torch.randn(4, 3)
    state = {
        "tied": [shared, shared],
        "transposed": shared.t(),
        "slice": torch.arange(10)[2:4],
        "none": torch.empty(0),
        "expanded": torch.ones(1).expand(5),
        "number": torch.tensor(3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    buffers = HostBuffers()
    first = buffers.copy_state(state)
    assert equal(first, state)
    assert first["tied"][0] is first["tied"][1]
    assert first["transposed"].stride() == shared.t().stride()
    assert first["slice"].untyped_storage().nbytes() == 16
    pointers = {tensor.data_ptr() for tensor in first["tied"]}
    shared.zero_()
    assert first["tied"][0].any()
    second = buffers.copy_state(state)
    assert equal(second, state)
    assert {tensor.data_ptr() for tensor in second["tied"]} == pointers
    state["tied"] = [torch.zeros(2, 2)]  # another shape: a new buffer
    assert equal(buffers.copy_state(state), state)


@pytest.mark.gpu
def test_buffers_for_a_gpu_are_pinned():
    state = {"a": torch.randn(1000, 1000, device="cuda"), "b": torch.ones(3)}
    copied = HostBuffers().copy_state(state)
    assert copied["a"].is_pinned()
    assert not copied["b"].is_pinned()
    assert torch.equal(copied["a"], state["a"].cpu())


def test_whole_weights_of_a_plain_model_can_be_saved_without_it(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    save_checkpoint(full_state_dict(model), None, 3, tmp_path / "best.pt", loss=1.0)
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert load_checkpoint(tmp_path / "best.pt", other)["epoch"] == 3
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


def test_without_ranks_the_savers_for_ranks_are_plain_ones(tmp_path):
    training, _ = begin(tmp_path)
    training.train(2)
    parts, folder = training.parts, training.folder
    with RankStateSaver(folder, parts, rank_parts=["run"]) as saver:
        assert saver.resume() is None
        saver.save(2)
    assert saver.resume() == folder / "step-00000002.pt"
    assert run_on_rank_zero(lambda: 3) == run_on_all_ranks(lambda: 3) == 3
