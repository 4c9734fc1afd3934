"""Process groups for training on several devices or machines (section 15).

    setup_distributed(device)
    model = wrap_ddp(build_model().to(device), device)
    seed_rank(seed)  # other dropout on each rank, after the same first weights
    for batch in loader:  # each rank its share, all ranks as many steps
        ...
        if any_rank(context.should_stop):  # all ranks stop at the same step
            break
    cleanup_distributed()

Started with `torchrun --nproc-per-node=N train.py`; without torchrun the same script
runs as one process. Gradients are averaged over the ranks: a rank weighs its mean loss
by (its samples / all samples) x world size, so that uneven shares count right.
"""

import contextlib
import datetime
import gc
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """Processes that were started in a way that does not fit; says the remedy."""


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
        raise LaunchError(
            f"{', '.join(found)} set without {', '.join(missing)}: start with "
            "`torchrun --nproc-per-node=N SCRIPT`, or unset RANK, WORLD_SIZE and "
            "LOCAL_RANK to train in one process"
        )
    for name, value in found.items():
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise LaunchError(
                f"{name}={value!r} is no whole number: start with torchrun"
            )
    rank, world_size, local_rank = (int(found[n]) for n in TORCHRUN_VARIABLES[:3])
    if not local_rank <= rank < world_size:
        raise LaunchError(
            f"RANK={rank}, WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} do not "
            "fit together (LOCAL_RANK <= RANK < WORLD_SIZE): start with torchrun"
        )
    return rank, world_size, local_rank


def setup_distributed(
    device: torch.device | None = None, timeout_s: float = 600.0
) -> int:
    """Join the process group that torchrun started; return the rank on this machine.

    On CUDA one group holds NCCL for tensors on the GPU and gloo for those on the CPU,
    so that a flag is agreed on without waiting for the GPU; on a CPU it is gloo alone.
    Outside torchrun no group is made and the answer is 0 (`torchrun --nproc-per-node=1`
    makes a group of one). A group that already exists is kept.

    Args:
        device: This process's device; None is `cuda:LOCAL_RANK` where there is CUDA,
            else the CPU. Pass the CPU to train there on a machine with GPUs.
        timeout_s: How long to wait for the other processes, at the start and in each
            collective operation, before this one fails.

    Raises:
        LaunchError: Only some of torchrun's environment variables are set, they
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
            raise LaunchError(
                f"LOCAL_RANK={local_rank} is outside the {visible} visible device(s): "
                "set CUDA_VISIBLE_DEVICES or lower --nproc-per-node"
            )
        torch.cuda.set_device(index)  # before NCCL, which would open all on GPU 0
        if dist.is_nccl_available():  # Windows has none
            backend = "cpu:gloo,cuda:nccl"
            device_id = torch.device("cuda", index)
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
    """Leave the process group, if there is one; call it at the end of every rank.

    Call it after the model is gone. DDP sits in reference cycles that hold the group,
    and gloo's threads abort a process that ends before them ("terminate called without
    an active exception"): 3 of 6 runs did, with the cycles collected first 0 of 16.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def seed_rank(seed: int) -> None:
    """Give this rank random numbers of its own (dropout, augmentation).

    Call it after the model was built: that has to be the same on every rank. Rank 0 of
    a run has the numbers of a run in one process that calls this as well.
    """
    number = (seed + 1_000_003 * distributed_rank()) % 2**32  # NumPy takes 32 bits
    random.seed(number)
    torch.manual_seed(number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)


def any_rank(flag: bool) -> bool:
    """Tell every rank whether the flag is set on any of them.

    Every rank has to ask, equally often. Over the CPU: the GPU's queue is not waited
    for, but the slowest rank is.
    """
    if distributed_world_size() == 1:
        return bool(flag)
    answer = torch.tensor(int(flag), dtype=torch.int32)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer.item())


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks; without a group the tensor itself.

    No gradient flows through it. Every rank has to call it, with the same shape.
    """
    if distributed_world_size() == 1:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _join_a_group(device: torch.device) -> None:
    """Make a group of this process alone, where torchrun has made none."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class _AllParameters(nn.Module):
    """Give every parameter a gradient of zeros; stands in for a model once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def forward(self) -> torch.Tensor:
        return torch.stack([(p.sum() * 0).float() for p in self.trained]).sum()


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Let backward average the gradients over the ranks, and forward rank 0's buffers.

    All ranks begin with rank 0's weights. Outside torchrun this process makes a group
    of one, so that the script runs unchanged.

    Neither `find_unused_parameters` (walks the graph each step) nor `static_graph`
    (breaks when a later step takes another path or accumulates another way) is on;
    a parameter that gets no gradient is an error in the next forward that says so.
    Blocks checkpointed with `use_reentrant=False` and models compiled in place
    before are fine.

    DDP orders its buckets anew after the first step, and with three or more ranks the
    order decides how sums are rounded: a resumed run would differ in the last bits. So
    the order is fixed here, by a first step whose gradients are all zeros.

    Args:
        model: on its device, its blocks checkpointed and compiled already.
    """
    _join_a_group(device)
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # or every gradient is in memory twice
    )
    wrapped.module = _AllParameters(model)
    wrapped.require_forward_param_sync = False  # the stand-in has no buffers
    wrapped().backward()
    wrapped.module = model
    model.zero_grad(set_to_none=True)
    return wrapped


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Switch whether the next forward and backward exchange gradients (DDP, FSDP2).

    Off for all but the last micro-batch of an accumulated step, on before the forward
    of the last. FSDP2 then keeps whole, unsharded gradients in between; leave it on
    where these do not fit, the sum is the same.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = enabled
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)


GRADIENT_BUCKET_BYTES = 1 << 26


def _group_for_exchange(
    tensors: Iterable[torch.Tensor],
) -> Iterator[list[torch.Tensor]]:
    """Yield lists of tensors of one dtype and device that travel as one."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        key = (tensor.dtype, tensor.device)
        group = groups.setdefault(key, [])
        group.append(tensor)
        if sum(t.numel() * t.element_size() for t in group) >= GRADIENT_BUCKET_BYTES:
            yield groups.pop(key)
    yield from groups.values()


def _unflatten_into(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy what `torch.cat` of the flattened tensors has become back into them."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    shaped = [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


def _broadcast_from_rank_zero(tensors: Iterable[torch.Tensor]) -> None:
    for group in _group_for_exchange(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        dist.broadcast(flat, 0)
        _unflatten_into(flat, group)


@torch.no_grad()
def broadcast_model(model: nn.Module) -> None:
    """Give every rank rank 0's weights and buffers, before the first step.

    For a model that is not wrapped, because `average_gradients` takes DDP's place.
    """
    if distributed_world_size() > 1:
        _broadcast_from_rank_zero([*model.parameters(), *model.buffers()])


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average the gradients over all ranks: what DDP does, but after backward.

    For steps that a rank may have to repeat (out of memory): backward exchanges
    nothing, so no rank waits for one that failed. A parameter without a gradient on
    some ranks counts as zeros there; without one on all of them it stays without.
    Buffers that are saved (BatchNorm's statistics) become rank 0's, as with DDP.

    Takes no DDP wrapper: it holds memory for an exchange that does not take place.

    Args:
        model: not wrapped; begin with `broadcast_model`.
    """
    ranks = distributed_world_size()
    if ranks == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, dist.ReduceOp.MAX)  # over the CPU
    gradients = []
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if is_used:
            gradients.append(parameter.grad)
    for group in _group_for_exchange(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in group]).div_(ranks)
        dist.all_reduce(flat)
        _unflatten_into(flat, group)
    _broadcast_from_rank_zero(
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )


class _GatherRows(torch.autograd.Function):
    """All ranks' rows forward; the sum of all ranks' gradients of mine backward."""

    @staticmethod
    def forward(ctx, x_BD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        rank = distributed_rank()
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        padded = x_BD.new_zeros((max(counts), *x_BD.shape[1:]))
        padded[: len(x_BD)] = x_BD
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return torch.cat([p[:n] for p, n in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = sum_over_ranks(gradient)
        return total[ctx.start : ctx.start + ctx.count], None


def gather_rows(x_BD: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks in rank order; shares may differ or be empty.

    Differentiable: a row's gradient is the SUM over the ranks of the gradients of
    their copies. So with each rank's loss weighed by its share x world size, and
    gradients averaged over ranks, the result is that of one process. Every rank has to
    run backward through it. Without a group the rows come back as they are.
    """
    ranks = distributed_world_size()
    if ranks == 1:
        return x_BD
    counts = torch.zeros(ranks, dtype=torch.int64)
    counts[distributed_rank()] = len(x_BD)
    counts = sum_over_ranks(counts)  # over the CPU: the GPU is not waited for
    return _GatherRows.apply(x_BD, counts.tolist())


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most max_norm; return the old norm.

    For plain, DDP and FSDP2 models: of sharded gradients the norm is over all shards,
    so every rank has to call it. Unscale first under a GradScaler.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _find_tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that the model holds under several names."""
    named = model.named_parameters(remove_duplicate=False)
    counts = Counter(id(parameter) for _, parameter in named)
    return {key for key, count in counts.items() if count > 1}


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    replicas: int = 1,
) -> nn.Module:
    """Shard weights, gradients and optimizer state over all ranks (FSDP2).

    Each rank keeps 1/ranks of every tensor; a block's whole weights exist only while it
    runs. Build the optimizer at once: after a forward without a backward `parameters()`
    are whole ones, which are not trained. Outside torchrun this process makes a group
    of one, so that the script runs unchanged.

    Forward gathers weights: every rank has to run it equally often, in evaluation too.
    With fp16 use a GradScaler: its check for overflow covers all shards. Of torch's
    optimizers (2.13) AdamW, SGD (not fused) and Muon take sharded weights.

    Args:
        model: changed in place, on `device`; its blocks checkpointed before, compiled
            in place before or after.
        blocks: what is gathered and freed as one, usually the repeated layers. One that
            shares a weight with the rest of the model stays with the model's own.
        dtype: bf16 or fp16 computes in it, with weights, gradient sums and outputs in
            fp32 and without autocast; fp32 computes in fp32.
        replicas: groups of world_size / replicas ranks (say, one machine each) that
            hold all shards, so that only gradients travel between them (HSDP).

    Returns:
        The same model.

    Raises:
        LaunchError: the ranks cannot be divided into so many replicas.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _join_a_group(device)
    ranks = distributed_world_size()
    if replicas < 1 or ranks % replicas:
        raise LaunchError(
            f"replicas={replicas} does not divide the {ranks} rank(s): use the number "
            "of machines, or 1 to shard over all ranks"
        )
    if replicas == 1:
        mesh = init_device_mesh(device.type, (ranks,))
    else:
        shape, names = (replicas, ranks // replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    block_policy = root_policy = MixedPrecisionPolicy()
    if dtype is not torch.float32:
        block_policy = MixedPrecisionPolicy(dtype, torch.float32)
        root_policy = MixedPrecisionPolicy(dtype, torch.float32, torch.float32)
    tied = _find_tied_parameters(model)
    for block in blocks:
        if not any(id(parameter) in tied for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=block_policy)
    fully_shard(model, mesh=mesh, mp_policy=root_policy)
    # Whole weights are made once here: if an evaluation under inference_mode made them
    # (after a resume), training could not write to them.
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.unshard()
            module.reshard()
    return model


def print_once(*values: Any, **options: Any) -> None:
    """`print` on the first rank; the others stay silent."""
    if is_main_process():
        print(*values, **options)


@contextlib.contextmanager
def main_rank_first() -> Iterator[None]:
    """Let the first rank run the body before the others do, to prepare their files."""
    if not is_main_process():
        any_rank(False)  # waits for the first rank
    yield
    if is_main_process():
        any_rank(False)


def rank_weight(count: int | torch.Tensor) -> float | torch.Tensor:
    """What this rank's mean loss counts in the average over ranks.

    DDP and FSDP average gradients as if each rank had as many samples. Multiplied by
    this, the average of the ranks' mean losses is the mean over all samples: with 3
    and 1 samples the weights are 1.5 and 0.5.

    Args:
        count: What the rank's mean is over (samples, tokens). A tensor on a GPU gives
            a tensor there, without waiting for it.
    """
    world_size = distributed_world_size()
    if world_size == 1:
        return 1.0
    total = sum_over_ranks(torch.as_tensor(count, dtype=torch.float64))
    weight = count * world_size / total
    return weight if isinstance(count, torch.Tensor) else weight.item()


def smallest_over_ranks(number: int) -> int:
    """The smallest of the ranks' whole numbers, on every rank, over the CPU."""
    if distributed_world_size() == 1:
        return number
    answer = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return int(answer.item())


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over ranks, on every rank."""
    return sum_over_ranks(value) / distributed_world_size()


def sum_values_over_ranks(
    values: Mapping[str, float | torch.Tensor], device: torch.device
) -> dict[str, float]:
    """Named numbers, each summed over ranks, in one exchange."""
    row = [torch.as_tensor(value, dtype=torch.float64) for value in values.values()]
    row = sum_over_ranks(torch.stack([value.to(device) for value in row]))
    return dict(zip(values, row.tolist(), strict=True))
