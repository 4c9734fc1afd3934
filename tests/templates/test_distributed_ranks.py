"""distributed, in real process groups of two and three: distributed_checks.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from templates.distributed import any_rank, setup_distributed
from tests.templates.test_checkpoint_io import fork

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("distributed_checks.py")


def start(tmp_path: Path, ranks: int, check: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),  # torchrun leaves its log folders there
    }
    return subprocess.Popen(
        [*command, f"--nproc-per-node={ranks}", str(SCRIPT), check, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_way_to_train_equals_one_process_and_resumes(tmp_path):
    for ranks in (2, 3):  # three go on with what two have saved
        process = start(tmp_path, ranks, "all")
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
        print(json.loads((tmp_path / "figures.json").read_text()))
    alone = [sys.executable, str(SCRIPT), "one", str(tmp_path)]  # without torchrun
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(alone, cwd=ROOT, env=environment, check=True, timeout=60)


def test_all_ranks_stop_after_the_same_step(tmp_path):
    process = start(tmp_path, 3, "sigterm")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 3:  # a signal before that kills
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "not every rank has begun to train"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to every rank
    output, _ = process.communicate(timeout=60)
    steps = [path.read_text() for path in tmp_path.glob("stopped-*")]
    assert len(steps) == 3, output
    assert len(set(steps)) == 1


def test_the_death_of_a_rank_ends_the_run(tmp_path):
    process = start(tmp_path, 3, "death")
    output, _ = process.communicate(timeout=60)  # the group's timeout is longer
    assert process.returncode != 0, output


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_asked(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    values = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))

    def take_part(rank):
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        setup_distributed(torch.device("cpu"), timeout_s=1)
        assert any_rank(rank == 1)
        if rank == 1:
            time.sleep(20)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="Timed out"):
            any_rank(True)
        assert time.monotonic() - started < 5

    waiting, absent = [fork(lambda rank=rank: take_part(rank)) for rank in range(2)]
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 0
    os.kill(absent, signal.SIGKILL)
    os.waitpid(absent, 0)
