"""distributed: real torchrun with gloo, and the CUDA branches with fakes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from templates.distributed import (
    TORCHRUN_VARIABLES,
    cleanup_distributed,
    distributed_rank,
    distributed_world_size,
    is_main_process,
    setup_distributed,
    wrap_ddp,
)

ROOT = Path(__file__).resolve().parents[2]

RANK_SCRIPT = """
import json, sys, torch
import torch.distributed as dist
from templates.distributed import *

assert distributed_world_size() == 1
local_rank = setup_distributed(torch.device("cpu"), timeout_s=60)
assert setup_distributed(torch.device("cpu"), timeout_s=60) == local_rank
total = torch.tensor(float(2 ** distributed_rank()))
dist.all_reduce(total)
found = {
    "local_rank": local_rank,
    "rank": distributed_rank(),
    "world_size": distributed_world_size(),
    "main": is_main_process(),
    "backend": dist.get_backend(),
    "total": total.item(),
}
cleanup_distributed()
cleanup_distributed()
found["after"] = [dist.is_initialized(), distributed_world_size()]
with open(f"{sys.argv[1]}/{found['rank']}.json", "w") as file:
    json.dump(found, file)
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def rank_environment(tmp_path: Path) -> dict[str, str]:
    # torchrun leaves its log folders in TMPDIR
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch, **values: object) -> None:
    defaults = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }
    for name, value in {**defaults, **values}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_with_gloo(tmp_path, ranks):
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={ranks}", str(script), str(tmp_path)),
        ],
        cwd=ROOT,
        env=rank_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "local_rank": rank,
            "rank": rank,
            "world_size": ranks,
            "main": rank == 0,
            "backend": "gloo",
            "total": 2**ranks - 1,  # every rank added its own power of two, once
            "after": [False, 1],
        }


def test_without_torchrun_it_is_one_process(monkeypatch):
    # Some clusters set these two for every job.
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert setup_distributed() == 0
    assert not dist.is_initialized()
    assert (distributed_rank(), distributed_world_size()) == (0, 1)
    assert is_main_process()
    cleanup_distributed()


def test_torchrun_with_one_process_makes_a_group_of_one(monkeypatch):
    set_variables(monkeypatch, MASTER_PORT=free_port())
    try:
        assert setup_distributed(torch.device("cpu")) == 0
        assert dist.get_backend() == "gloo"
        assert distributed_world_size() == 1
    finally:
        cleanup_distributed()
    assert not dist.is_initialized()


def test_without_torchrun_a_wrapped_model_is_in_a_group_of_one():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    try:
        wrapped = wrap_ddp(model, torch.device("cpu"))
        assert wrapped.module is model
        assert all(p.grad is None for p in model.parameters())
        for _ in range(2):
            wrapped(torch.ones(3, 2)).sum().backward()
        assert model[1].bias.grad.tolist() == [6, 6]
        assert model[0].num_batches_tracked == 2
        assert distributed_world_size() == 1
    finally:
        cleanup_distributed()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "without WORLD_SIZE, MASTER_PORT"),
        ({"LOCAL_RANK": None}, "without LOCAL_RANK.*torchrun --nproc-per-node"),
        ({"RANK": ""}, "without RANK"),
        ({"RANK": "one"}, "RANK='one' is no whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is no whole number"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2, WORLD_SIZE=2 and"),
        ({"LOCAL_RANK": 1}, "LOCAL_RANK=1 do not fit together"),
    ],
)
def test_a_half_set_environment_is_named(monkeypatch, variables, message):
    set_variables(monkeypatch, **variables)
    with pytest.raises(ValueError, match=message):
        setup_distributed(torch.device("cpu"))
    assert not dist.is_initialized()


def test_a_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout_s=0"):
        setup_distributed(timeout_s=0)


def test_missing_ranks_are_reported_with_the_address(monkeypatch):
    port = free_port()
    set_variables(monkeypatch, WORLD_SIZE=2, MASTER_PORT=port)
    with pytest.raises(RuntimeError, match=f"rank 0 of 2 .*127.0.0.1:{port}") as caught:
        setup_distributed(torch.device("cpu"), timeout_s=0.5)
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_a_taken_port_is_reported(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        set_variables(monkeypatch, WORLD_SIZE=2, MASTER_PORT=port)
        with pytest.raises(RuntimeError, match=r"EADDRINUSE.*port is free"):
            setup_distributed(torch.device("cpu"), timeout_s=0.5)


@pytest.fixture
def cuda(monkeypatch):
    """Two fake GPUs with NCCL; returns the calls in order."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: calls.append(i))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, timeout, device_id: calls.append(
            (backend, device_id, timeout.total_seconds())
        ),
    )
    return calls


@pytest.mark.parametrize("device", [None, torch.device("cuda"), torch.device("cuda:1")])
def test_cuda_uses_nccl_bound_to_the_ranks_own_gpu(monkeypatch, cuda, device):
    set_variables(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1)
    assert setup_distributed(device, timeout_s=30) == 1
    assert cuda == [1, ("cpu:gloo,cuda:nccl", torch.device("cuda:1"), 30)]


def test_a_cpu_run_on_a_gpu_machine_uses_gloo(monkeypatch, cuda):
    set_variables(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=5)
    assert setup_distributed(torch.device("cpu")) == 5
    assert cuda == [("gloo", None, 600)]


def test_cuda_without_nccl_uses_gloo(monkeypatch, cuda):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    set_variables(monkeypatch)
    setup_distributed()
    assert cuda == [0, ("gloo", None, 600)]


def test_more_ranks_than_gpus_is_named(monkeypatch, cuda):
    set_variables(monkeypatch, RANK=2, WORLD_SIZE=4, LOCAL_RANK=2)
    with pytest.raises(ValueError, match="LOCAL_RANK=2 is outside the 2 visible"):
        setup_distributed()
    assert cuda == []


def test_a_build_without_distributed_is_one_process(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert setup_distributed() == 0
    assert (distributed_rank(), distributed_world_size()) == (0, 1)
    cleanup_distributed()
    set_variables(monkeypatch)
    with pytest.raises(RuntimeError, match=r"no torch\.distributed"):
        setup_distributed()


@pytest.mark.gpu
def test_nccl_on_a_real_gpu(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        RANK_SCRIPT.replace('torch.device("cpu"), ', "").replace(
            "distributed_rank()))", 'distributed_rank()), device="cuda")'
        )
    )
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=1", str(script), str(tmp_path)),
        ],
        cwd=ROOT,
        env=rank_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "0.json").read_text())
    assert "nccl" in found["backend"]
    assert found["total"] == 1
