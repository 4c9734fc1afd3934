"""checkpoint_io.ShardedStateSaver: kills at random moments, and files that are none.

What torchrun is needed for is in distributed_checks.py.
"""

import os
import random
import signal
import socket
import sys
import traceback

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from templates import checkpoint_io
from templates.checkpoint_io import (
    CheckpointError,
    RunState,
    ShardedStateSaver,
    copy_overlap,
    find_damaged_shard,
    list_sharded_states,
)
from tests.templates.test_checkpoint_io import fork


def join_group(rank: int, ranks: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_killed_during_any_save_nothing_confirmed_is_lost(tmp_path):

    moments = random.Random(1)
    step = 0
    for attempt in range(5):
        reader, writer = os.pipe()
        port = free_port()

        def train_and_save(rank, step=step, writer=writer, port=port):
            try:
                join_group(rank, 2, port)
                model = fully_shard(nn.Linear(999, 101, bias=False))
                nn.init.zeros_(model.weight)
                run = RunState(step=0)
                parts = {"model": model, "run": run}
                saver = ShardedStateSaver(tmp_path, parts)
                saver.resume()
                assert run.step >= step
                assert (model.weight.to_local() == run.step).all()
                while True:
                    run.step += 1
                    with torch.no_grad():
                        model.weight += 1
                    saver.save(run.step)  # confirms the one before
                    if rank == 0:
                        os.write(writer, (run.step - 1).to_bytes(4, "big"))
            except BaseException:
                if not list(tmp_path.glob("killing")):
                    traceback.print_exc(file=sys.stderr)
                    os.write(writer, b"fail")
                raise

        children = [fork(lambda rank=rank: train_and_save(rank)) for rank in range(2)]
        for _ in range(3):
            first = os.read(reader, 4)
            assert first != b"fail"
        signal.sigtimedwait([], moments.random() * 0.05)
        (tmp_path / "killing").touch()
        moments.shuffle(children)
        for child in children:  # now one first, now the other
            os.kill(child, signal.SIGKILL)
            signal.sigtimedwait([], moments.random() * 0.005)
        for child in children:
            os.waitpid(child, 0)
        (tmp_path / "killing").unlink()
        os.close(writer)
        with open(reader, "rb") as confirmations:
            confirmed = confirmations.read()[-4:] or first
        step = int.from_bytes(confirmed, "big")
        newest = list_sharded_states(tmp_path)[-1] if step else None
        assert step == 0 or int(newest.name[5:13]) >= step, attempt
        assert step == 0 or find_damaged_shard(newest, 0, 1) is None
    assert step > 0


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trap:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_no_code_from_a_shard_is_run(tmp_path, alone, capsys):
    model = fully_shard(nn.Linear(4, 4))
    with ShardedStateSaver(tmp_path, {"model": model}) as saver:
        saver.save(1)
    (shard,) = tmp_path.glob("step-00000001/*.pt")
    torch.save({"parts": Trap(), "shards": [], "rng": {}}, shard)
    with pytest.raises(CheckpointError, match="could run code"):
        saver.resume()
    assert "code from" not in capsys.readouterr().out


def test_only_a_sharded_model_can_take_shards(tmp_path, alone):
    with ShardedStateSaver(tmp_path, {"model": fully_shard(nn.Linear(4, 4))}) as saver:
        saver.save(1)
    saver.parts = {"model": nn.Linear(4, 4)}
    with pytest.raises(CheckpointError, match="none of the parts is a sharded model"):
        saver.resume()


def test_a_failed_rename_is_raised_and_leaves_what_was_there(
    tmp_path, alone, monkeypatch
):
    saver = ShardedStateSaver(tmp_path, {"model": fully_shard(nn.Linear(4, 4))})
    saver.save(1)
    saver.wait()

    def refuse(self, target):
        raise OSError("no")

    monkeypatch.setattr(checkpoint_io.Path, "rename", refuse)
    saver.save(2)
    with pytest.raises(CheckpointError, match="cannot be renamed"):
        saver.wait()
    assert [path.name for path in list_sharded_states(tmp_path)] == ["step-00000001"]


def test_overlaps_of_boxes_put_a_tensor_together_from_any_cut():
    chance = random.Random(0)
    whole = torch.arange(7 * 5).view(7, 5)
    for _ in range(20):
        cuts = sorted(chance.choices(range(8), k=3))
        rows = list(zip([0, *cuts], [*cuts, 7], strict=True))
        start, stop = sorted(chance.choices(range(8), k=2))
        left, right = sorted(chance.choices(range(6), k=2))
        target = torch.full((stop - start, right - left), -1)
        for first, last in rows:
            copy_overlap(target, (start, left), whole[first:last], (first, 0))
        assert torch.equal(target, whole[start:stop, left:right])
    number = torch.zeros(())
    copy_overlap(number, (), torch.ones(()), ())
    assert number == 1
