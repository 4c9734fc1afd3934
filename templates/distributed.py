"""Process groups for training on several devices or machines (section 15).

    local_rank = setup_distributed()
    if distributed_world_size() > 1:
        model = DistributedDataParallel(model)
    ...
    cleanup_distributed()

Started with `torchrun --nproc-per-node=N train.py`; without torchrun the same script
runs as one process.
"""

import datetime
import os

import torch
import torch.distributed as dist

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def distributed_rank() -> int:
    """Return this process's number among all; 0 while there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def distributed_world_size() -> int:
    """Return how many processes train; 1 while there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Tell whether this process logs and saves; ask before `cleanup_distributed`."""
    return distributed_rank() == 0


def _read_torchrun_variables() -> tuple[int, int, int] | None:
    """Return rank, world size and local rank, or None outside torchrun."""
    # Clusters set MASTER_ADDR and MASTER_PORT for every job: alone they say nothing.
    if not any(name in os.environ for name in TORCHRUN_VARIABLES[:3]):
        return None
    found = {n: os.environ[n] for n in TORCHRUN_VARIABLES if os.environ.get(n)}
    missing = [name for name in TORCHRUN_VARIABLES if name not in found]
    if missing:
        raise ValueError(
            f"{', '.join(found)} set without {', '.join(missing)}: start with "
            "`torchrun --nproc-per-node=N SCRIPT`, or unset RANK, WORLD_SIZE and "
            "LOCAL_RANK to train in one process"
        )
    for name in found:
        if name != "MASTER_ADDR" and not found[name].isdecimal():
            raise ValueError(
                f"{name}={found[name]!r} is no whole number: start with torchrun"
            )
    rank, world_size, local_rank = (int(found[n]) for n in TORCHRUN_VARIABLES[:3])
    if not local_rank <= rank < world_size:
        raise ValueError(
            f"RANK={rank}, WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} do not "
            "fit together (LOCAL_RANK <= RANK < WORLD_SIZE): start with torchrun"
        )
    return rank, world_size, local_rank


def setup_distributed(
    device: torch.device | None = None, timeout_s: float = 600.0
) -> int:
    """Join the process group that torchrun started; return the rank on this machine.

    NCCL on CUDA, gloo on a CPU. Outside torchrun no group is made and the answer is 0
    (`torchrun --nproc-per-node=1` makes a group of one). A group that already exists
    is kept.

    Args:
        device: This process's device; None is `cuda:LOCAL_RANK` where there is CUDA,
            else the CPU. Pass the CPU to train there on a machine with GPUs.
        timeout_s: How long to wait for the other processes, at the start and in each
            collective operation, before this one fails.

    Raises:
        ValueError: Only some of torchrun's environment variables are set, they
            contradict each other, or LOCAL_RANK names no visible GPU.
        RuntimeError: The other processes did not come in time.
    """
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s}: give the seconds to wait, above 0")
    if dist.is_available() and dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", "0"))
    variables = _read_torchrun_variables()
    if variables is None:
        return 0
    if not dist.is_available():
        raise RuntimeError(
            "this PyTorch build has no torch.distributed: install an official wheel"
        )
    rank, world_size, local_rank = variables
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, device_id = "gloo", None
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        visible = torch.cuda.device_count()
        if index >= visible:
            raise ValueError(
                f"LOCAL_RANK={local_rank} is outside the {visible} visible device(s): "
                "set CUDA_VISIBLE_DEVICES or lower --nproc-per-node"
            )
        torch.cuda.set_device(index)  # before NCCL, which would open all on GPU 0
        if dist.is_nccl_available():  # Windows has none
            backend, device_id = "nccl", torch.device("cuda", index)
    try:
        dist.init_process_group(
            backend,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device_id,
        )
    except dist.DistError as error:
        raise RuntimeError(
            f"rank {rank} of {world_size} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"(timeout_s={timeout_s:g}): {str(error).splitlines()[0]} Start every "
            "process with the same WORLD_SIZE, and check that this address can be "
            "reached from here and the port is free"
        ) from error
    return local_rank


def cleanup_distributed() -> None:
    """Leave the process group, if there is one; call it at the end of every rank."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
