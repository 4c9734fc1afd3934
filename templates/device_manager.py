"""Pick the device, the precision and the CPU threads that fit this machine (section 1).

    device = get_optimal_device()
    dtype = resolve_dtype("auto", device)
    set_cpu_threads()
    print(describe_device(device))

All figures in GB are 1e9 bytes.
"""

import contextlib
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

DTYPE_NAMES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class DeviceError(ValueError):
    """A device that this process cannot have; says why, and the remedy."""


def get_optimal_device(force_cpu: bool = False) -> torch.device:
    """Return the best device: the CUDA GPU with the most memory, then MPS, then CPU.

    Under torchrun (LOCAL_RANK is set) each rank gets its own GPU, `cuda:LOCAL_RANK`.
    Reading a GPU's properties opens no context on it, so the GPUs that are not
    chosen keep all their memory.

    Raises:
        DeviceError: LOCAL_RANK names no visible GPU.
    """
    if force_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank is None:
            index = max(
                range(count),
                key=lambda i: torch.cuda.get_device_properties(i).total_memory,
            )
        elif not local_rank.isdecimal() or int(local_rank) >= count:
            raise DeviceError(
                f"LOCAL_RANK={local_rank} is outside the {count} visible device(s): "
                "set CUDA_VISIBLE_DEVICES or lower --nproc-per-node"
            )
        else:
            index = int(local_rank)
        return torch.device("cuda", index)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def claim_single_device(force_cpu: bool = False) -> torch.device:
    """Make the best device the current one, for a training in one process.

    Raises:
        DeviceError: several processes were started (torchrun): each would train alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DeviceError(
            f"started as one of {os.environ['WORLD_SIZE']} processes, but made for one"
            " device: start it with python, or generate it with --distributed ddp"
        )
    device = get_optimal_device(force_cpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_autocast(
    device: torch.device, dtype: torch.dtype
) -> Callable[[], contextlib.AbstractContextManager]:
    """Return what opens autocast to a dtype; for fp32 it does nothing, at no cost."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, dtype)


def _has_native_bf16(device: torch.device) -> bool:
    # is_bf16_supported() asks the current device, and by default says yes to cards
    # (Turing, Volta) that emulate bf16 at a fraction of fp16's speed.
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def get_optimal_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that trains fastest: bf16 or fp16 on CUDA, else fp32.

    Autocast on MPS and on CPUs is slower than fp32 for small models (on CPUs 0.54 x
    to 0.8 x measured; 1.9 x at width 512 with avx512_bf16), so both stay in fp32
    unless the user asks.
    """
    if device.type == "cuda":
        return torch.bfloat16 if _has_native_bf16(device) else torch.float16
    return torch.float32


def resolve_dtype(
    name: str, device: torch.device, report: Callable[[str], None] = print
) -> torch.dtype:
    """Turn a `--dtype` value into a dtype, and report what may surprise in one line.

    Args:
        name: "fp32", "fp16", "bf16", or "auto" for `get_optimal_dtype`.
        device: Where the model trains.

    Raises:
        ValueError: `name` is none of these.
    """
    if name == "auto":
        dtype = get_optimal_dtype(device)
        if dtype == torch.float32:
            report(
                f"{device.type}: mixed precision is rarely faster here, training in "
                "fp32 (--dtype bf16 forces it)"
            )
        return dtype
    if name not in DTYPE_NAMES:
        choices = ", ".join(["auto", *DTYPE_NAMES])
        raise ValueError(f"unknown dtype {name!r}: choose one of {choices}")
    if name == "bf16" and device.type == "cuda" and not _has_native_bf16(device):
        report(f"{device}: bf16 is emulated on this GPU, --dtype fp16 is faster")
    return DTYPE_NAMES[name]


def _cgroup_folders(
    controller: str,
    self_cgroup: Path = Path("/proc/self/cgroup"),
    mount: Path = Path("/sys/fs/cgroup"),
) -> list[Path]:
    """List the folders whose limits bind this process, innermost first.

    Each line of /proc/self/cgroup is `id:controllers:path`; id 0 is cgroup v2. A
    limit may stand on any ancestor. Without a cgroup namespace the path is the
    host's, which a container does not see: its own limits are then at the mount.
    """
    try:
        lines = self_cgroup.read_text().splitlines()
    except OSError:
        return []  # not Linux
    folders = []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            root = mount
        elif controller in controllers.split(","):
            root = mount / controller
        else:
            continue
        inner = Path(path.lstrip("/"))
        folders += [root / part for part in (inner, *inner.parents)]
    return folders


def _read_cgroup_numbers(file: Path) -> list[float]:
    """Read a cgroup file's numbers; no file is an empty list, "max" is infinity."""
    try:
        words = file.read_text().split()
    except OSError:
        return []
    return [float("inf") if word == "max" else float(word) for word in words]


def _cgroup_cpu_quota() -> float:
    """Return how many CPUs' time the cgroups allow, infinity where there is no limit.

    v2: `cpu.max` holds "quota period". v1: two files, and quota -1 means none.
    """
    quota_cpus = float("inf")
    for folder in _cgroup_folders("cpu"):
        limit = _read_cgroup_numbers(folder / "cpu.max") or [
            *_read_cgroup_numbers(folder / "cpu.cfs_quota_us"),
            *_read_cgroup_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(limit) == 2 and limit[0] > 0:
            quota_cpus = min(quota_cpus, limit[0] / limit[1])
    return quota_cpus


def available_cpu_count() -> int:
    """Return how many CPUs this process may really use, at least 1.

    `os.cpu_count()` is the machine's count: in a container or a batch job the
    affinity mask and the cgroup quota allow fewer. A quota of 2.5 CPUs counts as 2,
    since a third busy thread would get all of them throttled.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return int(max(1, min(count, _cgroup_cpu_quota())))


def set_cpu_threads(threads: int | None = None) -> int:
    """Set PyTorch's CPU threads to what this process may use, and return the count.

    By itself PyTorch counts the machine's cores and knows no cgroup quota, so that in
    a container its threads wait for each other. The ranks on one machine
    (LOCAL_WORLD_SIZE) share its CPUs evenly. PyTorch's own count, the physical cores,
    is never exceeded. OMP_NUM_THREADS, where set, wins; torchrun sets it to 1 if it
    starts several processes and the user did not.

    Args:
        threads: The exact number instead.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is None:
        if "OMP_NUM_THREADS" in os.environ:
            return torch.get_num_threads()
        share = available_cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, min(share, torch.get_num_threads()))
    if threads < 1:
        raise ValueError(f"threads={threads}: give 1 or more, or None to choose")
    torch.set_num_threads(threads)
    return threads


def _cgroup_free_memory() -> float:
    """Return the bytes left under the cgroups' memory limits, infinity without one.

    File cache that the kernel would drop (`inactive_file`) counts as free.
    """
    free = float("inf")
    for folder in _cgroup_folders("memory"):
        for limit_name, usage_name, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read_cgroup_numbers(folder / limit_name)
            usage = _read_cgroup_numbers(folder / usage_name)
            if not limit or not usage:
                continue
            stat = (folder / "memory.stat").read_text().split()
            cache = dict(zip(stat[::2], stat[1::2], strict=True)).get(cache_key, "0")
            free = min(free, limit[0] - usage[0] + float(cache))
    return free


def free_memory_gb(device: torch.device) -> float | None:
    """Return the memory that new tensors on `device` can get, in GB (None: unknown).

    On CUDA that includes what PyTorch's cache holds unused. On a CPU it is the
    system's figure or, if smaller, what the container's limit leaves (Linux only).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return (free + reserved - torch.cuda.memory_allocated(device)) / 1e9
    if device.type == "mps":
        limit = torch.mps.recommended_max_memory()
        return (limit - torch.mps.driver_allocated_memory()) / 1e9
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _cgroup_free_memory()) / 1e9
    return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """Return one line: a GPU's name and memory in GB, a CPU's name and threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{device}: {properties.name}, {properties.total_memory / 1e9:.1f} GB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    if device.type == "mps":
        memory_gb = torch.mps.recommended_max_memory() / 1e9
        return f"{device}: Apple GPU, {memory_gb:.1f} GB for tensors"
    return f"{device}: {_cpu_name()}, {torch.get_num_threads()} thread(s)"


class DeviceManager:
    """Hold the device and the dtype to use, and report them once.

    Args:
        force_cpu: Use the CPU even where there is a GPU.
        report: Gets the one line; pass `logger.info`, or on all ranks but the first
            `lambda line: None`.
    """

    def __init__(
        self, force_cpu: bool = False, report: Callable[[str], None] = print
    ) -> None:
        self.device = get_optimal_device(force_cpu)
        self.dtype = get_optimal_dtype(self.device)
        report(f"{describe_device(self.device)}; dtype {self.dtype}")
