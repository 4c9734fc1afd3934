"""device_manager: the choice of device, precision and threads, on faked hardware."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from templates import device_manager
from templates.device_manager import (
    DeviceManager,
    available_cpu_count,
    describe_device,
    free_memory_gb,
    get_optimal_device,
    get_optimal_dtype,
    resolve_dtype,
    set_cpu_threads,
)

CPU = torch.device("cpu")


class FakeGpus:
    """Stands for `torch.cuda`: GPUs of the given compute capability and memory."""

    def __init__(self, *gpus: tuple[int, int]) -> None:
        self.gpus = gpus  # (major, memory in GB)
        self.current = 0
        self.contexts_opened = set()

    def is_available(self) -> bool:
        return bool(self.gpus)

    def device_count(self) -> int:
        return len(self.gpus)

    def get_device_properties(self, device: torch.device | int) -> SimpleNamespace:
        major, memory_gb = self.gpus[getattr(device, "index", device)]
        return SimpleNamespace(
            name=f"Fake {memory_gb}",
            total_memory=memory_gb * 10**9,
            major=major,
            minor=0,
        )

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.contexts_opened.add(device.index)
        before, self.current = self.current, device.index
        yield
        self.current = before

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return including_emulation or self.gpus[self.current][0] >= 8


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def install(*specs: tuple[int, int]) -> FakeGpus:
        fake = FakeGpus(*specs)
        for name in (
            "is_available",
            "device_count",
            "get_device_properties",
            "device",
            "is_bf16_supported",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        return fake

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return install


def test_the_gpu_with_the_most_memory_is_chosen(gpus):
    gpus((9, 24), (9, 80), (9, 80), (9, 48))
    assert get_optimal_device() == torch.device("cuda:1")
    assert get_optimal_device(force_cpu=True) == CPU


def test_without_cuda_mps_then_cpu(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert get_optimal_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert get_optimal_device() == CPU


def test_under_torchrun_each_rank_gets_its_own_gpu(gpus, monkeypatch):
    fake = gpus((9, 24), (9, 80))
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert get_optimal_device() == torch.device("cuda", rank)
    assert not fake.contexts_opened


@pytest.mark.parametrize("local_rank", ["2", "-1", "one", ""])
def test_a_local_rank_without_gpu_is_named(gpus, monkeypatch, local_rank):
    gpus((9, 24), (9, 80))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=f"LOCAL_RANK={local_rank} .* 2 visible"):
        get_optimal_device()


def test_local_rank_is_ignored_on_a_cpu_machine(gpus, monkeypatch):
    gpus()
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert get_optimal_device() == CPU


def test_bf16_only_where_that_very_gpu_has_it(gpus):
    # GPU 0 is a Turing card, which emulates bf16, GPU 1 an Ampere card.
    fake = gpus((7, 24), (8, 24))
    assert get_optimal_dtype(torch.device("cuda:0")) == torch.float16
    assert get_optimal_dtype(torch.device("cuda:1")) == torch.bfloat16
    fake.current = 1
    assert get_optimal_dtype(torch.device("cuda:0")) == torch.float16
    assert fake.current == 1


def test_mps_and_cpu_stay_in_fp32():
    assert get_optimal_dtype(torch.device("mps")) == torch.float32
    assert get_optimal_dtype(CPU) == torch.float32


def test_resolve_dtype_takes_names_and_says_when_auto_is_fp32(gpus):
    gpus((7, 24), (8, 24))
    lines = []
    assert resolve_dtype("bf16", CPU, lines.append) == torch.bfloat16
    assert resolve_dtype("fp16", CPU, lines.append) == torch.float16
    assert resolve_dtype("fp32", CPU, lines.append) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda:1"), lines.append) == torch.bfloat16
    assert lines == []
    assert resolve_dtype("auto", CPU, lines.append) == torch.float32
    assert len(lines) == 1
    assert lines[0].startswith("cpu:")
    assert "fp32" in lines[0]
    assert resolve_dtype("bf16", torch.device("cuda:0"), lines.append) == torch.bfloat16
    assert len(lines) == 2
    assert "emulated" in lines[1]


def test_an_unknown_dtype_names_the_choices():
    with pytest.raises(ValueError, match=r"'float8'.*auto, fp32, fp16, bf16"):
        resolve_dtype("float8", CPU)


def test_the_manager_reports_exactly_once(gpus, capsys):
    gpus((9, 24), (8, 80))
    lines = []
    manager = DeviceManager(report=lines.append)
    assert (manager.device, manager.dtype) == (torch.device("cuda:1"), torch.bfloat16)
    assert lines == [
        "cuda:1: Fake 80, 80.0 GB, compute capability 8.0; dtype torch.bfloat16"
    ]
    assert capsys.readouterr().out == ""
    DeviceManager(force_cpu=True)
    assert capsys.readouterr().out.startswith("cpu: ")


def test_describe_device_is_one_line(monkeypatch):
    assert f"{torch.get_num_threads()} thread(s)" in describe_device(CPU)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000_000_000)
    assert "12.0 GB" in describe_device(torch.device("mps"))
    assert "\n" not in describe_device(CPU)


def fake_cgroup(tmp_path: Path, monkeypatch, lines: str, files: dict[str, str]) -> None:
    (tmp_path / "self").write_text(lines)
    for name, text in files.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    folders = device_manager._cgroup_folders
    monkeypatch.setattr(
        device_manager,
        "_cgroup_folders",
        lambda controller: folders(controller, tmp_path / "self", tmp_path / "mount"),
    )


V1 = "4:memory:/job\n3:cpu,cpuacct:/job/step\n0::/\n"


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        # the parent's limit binds too
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"},
            3,
        ),
        # no cgroup namespace: the host's path does not exist in the container
        ("0::/docker/0af3\n", {"cpu.max": "500000 100000"}, 5),
        (
            V1,
            {
                "cpu/job/step/cpu.cfs_quota_us": "-1",
                "cpu/job/step/cpu.cfs_period_us": "100000",
                "cpu/job/cpu.cfs_quota_us": "600000",
                "cpu/job/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        ("", {}, 16),
    ],
)
def test_cpu_count_honours_the_cgroup_quota(
    tmp_path, monkeypatch, lines, files, expected
):
    fake_cgroup(tmp_path, monkeypatch, lines, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    assert available_cpu_count() == expected


def test_cpu_count_honours_affinity():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no CPU affinity on this system")
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from templates.device_manager import available_cpu_count, set_cpu_threads\n"
        "print(available_cpu_count(), set_cpu_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "1"]


@pytest.fixture
def threads(monkeypatch):
    """PyTorch's thread count, faked: starts at 8."""
    state = SimpleNamespace(count=8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: state.count)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(state, "count", n))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return state


@pytest.mark.parametrize(
    ("cpus", "ranks_here", "expected"), [(4, 1, 4), (4, 2, 2), (2, 3, 1), (32, 1, 8)]
)
def test_threads_fit_the_usable_cpus(monkeypatch, threads, cpus, ranks_here, expected):
    monkeypatch.setattr(device_manager, "available_cpu_count", lambda: cpus)
    if ranks_here > 1:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    assert set_cpu_threads() == expected
    assert threads.count == expected


def test_threads_respect_the_user(monkeypatch, threads):
    monkeypatch.setattr(device_manager, "available_cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert set_cpu_threads() == 8
    assert set_cpu_threads(3) == 3
    assert threads.count == 3
    with pytest.raises(ValueError, match="threads=0"):
        set_cpu_threads(0)


def test_free_memory_is_bounded_by_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(
        device_manager, "_cgroup_folders", lambda controller: [], raising=True
    )
    unbounded_gb = free_memory_gb(CPU)
    if unbounded_gb is None:
        pytest.skip("no /proc/meminfo")
    assert unbounded_gb > 0.05
    monkeypatch.undo()
    fake_cgroup(
        tmp_path,
        monkeypatch,
        "0::/\n",
        {
            "memory.max": "50000000",
            "memory.current": "40000000",
            "memory.stat": "anon 10000000\ninactive_file 15000000\n",
        },
    )
    assert free_memory_gb(CPU) == pytest.approx(0.025)


def test_free_memory_honours_cgroup_v1_and_no_limit(tmp_path, monkeypatch):
    fake_cgroup(
        tmp_path,
        monkeypatch,
        V1,
        {
            "memory/job/memory.limit_in_bytes": "30000000",
            "memory/job/memory.usage_in_bytes": "20000000",
            "memory/job/memory.stat": "cache 9\ntotal_inactive_file 5000000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "20000000",
            "memory/memory.stat": "cache 9\ntotal_inactive_file 5000000\n",
            "memory.max": "max",
            "memory.current": "5",
            "memory.stat": "",
        },
    )
    if free_memory_gb(CPU) is not None:
        assert free_memory_gb(CPU) == pytest.approx(0.015)


def test_free_memory_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (5 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: 2 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 10**9)
    assert free_memory_gb(torch.device("cuda:0")) == 6.0
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 9 * 10**9)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 10**9)
    assert free_memory_gb(torch.device("mps")) == 8.0
    assert free_memory_gb(torch.device("meta")) is None


@pytest.mark.gpu
def test_on_a_real_gpu():
    device = get_optimal_device()
    assert device.type == "cuda"
    total_gb = torch.cuda.get_device_properties(device).total_memory / 1e9
    free_gb = free_memory_gb(device)
    held = torch.empty(10**9, dtype=torch.uint8, device=device)
    assert 0 < free_memory_gb(device) < free_gb < total_gb
    del held  # back in PyTorch's cache: free again for new tensors
    assert free_memory_gb(device) == pytest.approx(free_gb, abs=0.5)
    torch.ones(2, device=device, dtype=get_optimal_dtype(device)).sum().item()
    assert f"{total_gb:.1f} GB" in describe_device(device)


@pytest.mark.gpu
def test_choosing_opens_no_context_on_any_gpu():
    code = (
        "import torch; from templates.device_manager import get_optimal_device\n"
        "get_optimal_device()\n"
        "print([torch._C._cuda_hasPrimaryContext(i)"
        " for i in range(torch.cuda.device_count())])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "True" not in done.stdout
