"""Training utilities: precision, memory, compilation, schedules, averaging.

Sections 3-5 and 8-12 of the guide: mixed precision, activation checkpointing,
torch.compile, seeds, warm-up schedules, early stopping, gradient clipping, EMA.

    set_seed(42)
    model = enable_gradient_checkpointing(build_model())
    trainer = MixedPrecisionTrainer(model, optimizer, criterion, DeviceManager())
    scheduler = get_cosine_warmup_scheduler(optimizer, 100, total_steps)
    for inputs, targets in loader:
        loss = trainer.train_step(inputs.to(trainer.device), targets.to(trainer.device))
        if not trainer.step_skipped:
            scheduler.step()
"""

import contextlib
import copy
import functools
import itertools
import math
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# What selective checkpointing keeps: the results that cost most to compute again.
KEPT_CHECKPOINT_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)

# Where activations wait for backward in host memory instead (mode "offload").
OFFLOADED_DEVICES = ("cuda",)


def set_seed(
    seed: int = 42, deterministic: bool = True, warn_only: bool = False
) -> None:
    """Seed every random generator, and switch deterministic kernels on or off.

    Call it before CUDA is first used: cuBLAS reads its workspace setting once.

    Args:
        seed: for Python, NumPy (where installed, modulo 2**32) and PyTorch.
        deterministic: True chooses deterministic kernels; False takes those switches
            back. An operation that has none raises RuntimeError with its name.
        warn_only: such operations warn and run. On GPUs attention is one of them then:
            its flash and memory-efficient kernels are deterministic only without this
            (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
    """
    if deterministic:
        # Without it cuBLAS (10.2 and later) may pick another workspace every run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    if deterministic or torch.are_deterministic_algorithms_enabled():
        # Imports the compiler, which takes two seconds.
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    random.seed(seed)
    torch.manual_seed(seed)  # the CPU, every CUDA and XPU device, and MPS
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed % 2**32)


def _warmup_then_decay(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    decay: Callable[[float], float],
    rise: Callable[[float], float] | None = None,
) -> LambdaLR:
    """LambdaLR that rises, follows decay(progress in [0, 1]), then stays.

    It rises linearly to 1 in the last warm-up step, or by rise(progress in [0, 1)).
    """
    if warmup_steps < 0 or total_steps < 1:
        raise ValueError(
            f"warmup_steps={warmup_steps} and total_steps={total_steps}: a schedule "
            "needs warmup_steps >= 0 and total_steps >= 1 (batches x epochs)"
        )

    def factor(step: int) -> float:
        if step >= total_steps:
            return decay(1.0)
        if step < warmup_steps:
            return rise(step / warmup_steps) if rise else (step + 1) / warmup_steps
        return decay((step - warmup_steps) / (total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


def get_linear_warmup_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Linear warm-up, then linear decay that reaches 0 after the last step.

    Factors for warmup_steps=2, total_steps=6: .5, 1, 1, .75, .5, .25, and 0 from step 6
    on. With warmup_steps >= total_steps the rate only rises: 4 and 2 give .25, .5, 0.

    Args:
        optimizer: its present learning rates are the peaks.
        warmup_steps: optimizer steps until the peak; 0 starts at the peak.
        total_steps: optimizer steps of the whole training.
    """
    return _warmup_then_decay(optimizer, warmup_steps, total_steps, lambda p: 1 - p)


def get_cosine_warmup_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Linear warm-up, then half a cosine that reaches 0 after the last step.

    Factors for warmup_steps=2, total_steps=6: .5, 1, 1, .854, .5, .146, and 0 from step
    6 on (SGDR, arXiv:1608.03983, without restarts).

    Args:
        optimizer: its present learning rates are the peaks.
        warmup_steps: optimizer steps until the peak; 0 starts at the peak.
        total_steps: optimizer steps of the whole training.
    """
    return _warmup_then_decay(
        optimizer,
        warmup_steps,
        total_steps,
        lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    )


def get_wsd_warmup_scheduler(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    decay_fraction: float = 0.2,
) -> LambdaLR:
    """Linear warm-up, the peak for most of the training, linear decay to 0 at the end.

    Warm-up, stable, decay (arXiv:2404.06395, there with a decay over the last 10%; that
    20% with a linear one equal a cosine: arXiv:2405.18392). Factors for warmup_steps=2,
    total_steps=10: .5, 1, ... 1, .5, and 0 from step 10 on.

    Args:
        optimizer: its present learning rates are the peaks.
        warmup_steps: optimizer steps until the peak; 0 starts at the peak.
        total_steps: optimizer steps of the whole training.
        decay_fraction: share of total_steps that decays, above 0 and at most 1; it
            begins after the warm-up at the earliest.
    """
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"decay_fraction={decay_fraction}: use 0.2, at most 1")
    after_warmup = max(1, total_steps - warmup_steps)
    share = min(1.0, decay_fraction * total_steps / after_warmup)
    return _warmup_then_decay(
        optimizer, warmup_steps, total_steps, lambda p: min(1.0, (1 - p) / share)
    )


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def get_onecycle_warmup_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> LambdaLR:
    """Rise from 1/25 of the peak by half a cosine, then fall by another to almost 0.

    The 1cycle policy (arXiv:1708.07120) with the constants of PyTorch's OneCycleLR,
    which raises past its end where this one stays at 4e-6 of the peak. Momentum is not
    cycled. The usual warm-up is long: 30% of the steps.

    Args:
        optimizer: its present learning rates are the peaks.
        warmup_steps: optimizer steps until the peak; 0 starts at the peak.
        total_steps: optimizer steps of the whole training.
    """
    return _warmup_then_decay(
        optimizer,
        warmup_steps,
        total_steps,
        functools.partial(_cosine_between, 1.0, 1 / 25 / 1e4),
        functools.partial(_cosine_between, 1 / 25, 1.0),
    )


class EarlyStopping:
    """Tell when a score has not improved for `patience` calls in a row.

    Args:
        patience: calls without improvement after which to stop, at least 1.
        min_delta: an improvement must be larger than this.
        mode: "min" for losses, "max" for accuracies.

    Attributes:
        best_score: best score so far, None before the first.
        counter: calls since the best score.
        improved: whether the last score was a new best (save the model then).
        should_stop: whether counter has reached patience.
    """

    def __init__(self, patience: int = 5, min_delta: float = 0.0, mode: str = "min"):
        if mode not in ("min", "max"):
            raise ValueError(f'mode={mode!r}: use "min" (losses) or "max" (accuracies)')
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"patience={patience}, min_delta={min_delta}: "
                "patience must be at least 1 and min_delta at least 0"
            )
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.counter = 0
        self.best_score: float | None = None
        self.improved = False
        self.should_stop = False

    def __call__(self, score: float | torch.Tensor) -> bool:
        """Take a score (a number or a 0-dim tensor); return whether to stop now."""
        score = float(score)
        if math.isnan(score):  # a diverged epoch counts against patience
            self.improved = False
        elif self.best_score is None:
            self.improved = True
        elif self.mode == "min":
            self.improved = score < self.best_score - self.min_delta
        else:
            self.improved = score > self.best_score + self.min_delta
        if self.improved:
            self.best_score = score
        self.counter = 0 if self.improved else self.counter + 1
        self.should_stop = self.counter >= self.patience
        return self.should_stop

    def state_dict(self) -> dict[str, Any]:
        """Return what changes during training, as plain Python values."""
        names = ("best_score", "counter", "improved", "should_stop")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        vars(self).update(state)


def _batch_tensors(batch: Any) -> list[torch.Tensor]:
    """Return the tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"a batch holds a {type(batch).__name__}: only tensors and tuples, lists "
            "and dicts of tensors can be cut into micro-batches"
        )
    return [tensor for part in batch for tensor in _batch_tensors(part)]


def _count_samples(batch: Any) -> int:
    """Return the length that all tensors of a batch have."""
    lengths = {t.shape[0] if t.ndim else None for t in _batch_tensors(batch)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"the batch's tensors have the lengths {sorted(map(str, lengths))}: every "
            "tensor needs the same number of samples in its first dimension"
        )
    return lengths.pop()


def _slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return samples start to stop of every tensor, in the batch's own structure."""
    if isinstance(batch, torch.Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: _slice_batch(part, start, stop) for key, part in batch.items()}
    parts = [_slice_batch(part, start, stop) for part in batch]
    if hasattr(batch, "_fields"):  # a namedtuple takes its fields one by one
        return type(batch)(*parts)
    return type(batch)(parts)


def split_batch(batch: Any, micro_batch: int) -> Iterator[Any]:
    """Cut a batch into consecutive micro-batches of at most `micro_batch` samples.

    10 samples in micro-batches of 4 give 4, 4 and 2. The pieces are views.

    Args:
        batch: a tensor, or a tuple, list or dict (also nested) of tensors that all have
            the samples in their first dimension.
        micro_batch: samples in a piece, at least 1.

    Raises:
        ValueError: micro_batch < 1, or tensors of unequal length.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}: at least 1 sample is needed")
    length = _count_samples(batch)
    return (
        _slice_batch(batch, start, start + micro_batch)
        for start in range(0, length, micro_batch)
    )


def split_batches(batches: Iterable[Any], micro_batch: int) -> Iterator[Any]:
    """The micro-batches of each batch, by `split_batch`; an empty batch stays one."""
    for batch in batches:
        yield from split_batch(batch, micro_batch) if _count_samples(batch) else [batch]


def split_evenly(batch: Any, pieces: int) -> Iterator[Any]:
    """Cut a batch into exactly `pieces` parts of nearly equal size, as views.

    10 samples in 3 pieces give 4, 3 and 3. For FSDP, where every rank has to run
    forward equally often.

    Args:
        batch: as for `split_batch`.
        pieces: at most the number of samples.

    Raises:
        ValueError: more pieces than samples or < 1, or tensors of unequal length.
    """
    length = _count_samples(batch)
    if not 1 <= pieces <= length:
        raise ValueError(f"pieces={pieces}: a batch of {length} has 1 to {length}")
    bounds = [-(-length * k // pieces) for k in range(pieces + 1)]
    return (_slice_batch(batch, *pair) for pair in itertools.pairwise(bounds))


def _step_and_flag_skip(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> torch.Tensor:
    """Step with an enabled scaler; return on the device whether it skipped the step."""
    # Scaling a one reads the scale without waiting for the GPU (get_scale() waits).
    one = torch.ones((), device=optimizer.param_groups[0]["params"][0].device)
    scale_before = scaler.scale(one)
    scaler.step(optimizer)
    scaler.update()
    return scaler.scale(one) < scale_before  # lowered after an overflow only


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Free all gradients, as `optimizer.zero_grad(set_to_none=True)` does.

    Without its hooks for profilers: 1 instead of 17 of the 310 microseconds that a
    step of a perceptron with 6 tensors takes (benchmarks/loop.py).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def step_optimizer(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> bool:
    """Step the optimizer, through the scaler if there is one, and update the scaler.

    Returns:
        True when the step was taken; False when the scaler skipped it because fp16
        gradients overflowed: then the schedule and the EMA must not step either. Only
        an enabled scaler makes this wait for the GPU.
    """
    if scaler is None or not scaler.is_enabled():
        optimizer.step()
        return True
    return not _step_and_flag_skip(optimizer, scaler).item()


class NonFiniteError(RuntimeError):
    """The loss or a parameter is NaN or infinite: training on would be wasted."""


def _floating_shards(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return what this rank holds of each tensor, leaving out integers and nothing."""
    shards = []
    for tensor in tensors:
        tensor = tensor.detach()
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()  # FSDP2: no communication for looking at it
        if tensor.is_sparse:
            tensor = tensor.coalesce().values()
        if tensor.is_floating_point() and tensor.numel():
            shards.append(tensor)
    return shards


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no value on any rank is NaN or infinite; waits once for each device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for shard in _floating_shards(tensors):
        by_device.setdefault(shard.device, []).append(shard)
    flags = [
        # The maximum norm is finite exactly where all values are: nothing overflows.
        torch.stack([n.float() for n in torch._foreach_norm(shards, math.inf)])
        .isfinite()
        .all()
        for shards in by_device.values()
    ]
    meshes = [t.device_mesh for t in tensors if hasattr(t, "device_mesh")]
    if not meshes:
        return all(map(bool, flags))
    # FSDP2: each rank sees its shards only, and all of them must decide alike.
    finite = torch.ones((), dtype=torch.int32, device=meshes[0].device_type)
    for flag in flags:
        finite *= flag.to(finite.device)
    torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether no gradient is NaN or infinite: skip the optimizer's step if one is.

    Waits for the GPU once. With FSDP2 all ranks get the same answer and must call it.
    """
    return _all_finite([p.grad for p in model.parameters() if p.grad is not None])


def _describe_nonfinite(tensors: Mapping[str, torch.Tensor], limit: int = 3) -> str:
    """Name the first tensors with values that are not finite, and how many they are."""
    found = []
    for name, tensor in tensors.items():
        for shard in _floating_shards([tensor]):
            if bad := int((~shard.isfinite()).sum()):
                found.append(f"{name} ({bad} of {shard.numel()} values)")
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    sharded = any(hasattr(tensor, "device_mesh") for tensor in tensors.values())
    nothing = "none on this rank" if sharded else "none"
    return ", ".join(found[:limit]) + more if found else nothing


def check_finite(
    loss: torch.Tensor | float,
    model: nn.Module,
    step: int,
    parameters_too: bool = True,
) -> None:
    """Raise where the loss or a parameter is NaN or infinite.

    Waits for the GPU: call it where the loss is read anyway, and before a save, so that
    the last checkpoint stays a good one. Gradients do not count, because a GradScaler
    skips those that overflow, but the error names them. With FSDP2 all ranks must call
    it, with the same loss.

    Args:
        loss: of one step, or a mean over several.
        step: optimizer steps so far, for the message.
        parameters_too: False looks at the loss alone, which costs nothing.

    Raises:
        NonFiniteError: names the first parameters and gradients, and what to look at.
    """
    loss = float(loss)
    if not parameters_too and math.isfinite(loss):
        return
    parameters = dict(model.named_parameters())
    if _all_finite(list(parameters.values())) and math.isfinite(loss):
        return
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    raise NonFiniteError(
        f"step {step}: the loss is {loss:g}. Parameters that are not finite: "
        f"{_describe_nonfinite(parameters)}. Gradients: "
        f"{_describe_nonfinite(gradients)}. What to look at: a lower learning rate, a "
        "longer warm-up, clipping of gradients (--clip), bf16 or fp32 instead of fp16 "
        "(--dtype), input rows with NaN or huge values; --skip-nonfinite skips single "
        "steps. The last checkpoint is from before this."
    )


def step_if_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> bool:
    """Step the optimizer unless a gradient is NaN or infinite; whether it stepped.

    Waits for the GPU. An enabled scaler looks at the gradients itself, and lowers its
    scale. Schedule and EMA must not step where this returns False.
    """
    if scaler is not None and scaler.is_enabled():
        return step_optimizer(optimizer, scaler)
    if not gradients_are_finite(model):
        return False
    optimizer.step()
    return True


def count_right(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """How many labels have the largest logit, as "accuracy" for `evaluate_model`.

    Args:
        logits: (..., C) of classes or tokens.
        labels: (...), numbers of classes; -100 never counts.
    """
    return {"accuracy": (logits.argmax(-1) == labels).sum()}


def is_better(
    metrics: Mapping[str, float], best: Mapping[str, float], best_by: str
) -> bool:
    """Whether an epoch's metrics are the best so far; a NaN never is.

    Args:
        best: metrics of the best epoch; at first {"val_loss": inf} will do.
        best_by: "val_loss", or a metric that is better when it is higher; of equal ones
            the lower val_loss wins.
    """

    def rank(values: Mapping[str, float]) -> tuple[float, float]:
        loss = -values["val_loss"]
        return (loss if best_by == "val_loss" else values.get(best_by, -math.inf), loss)

    return math.isfinite(metrics["val_loss"]) and rank(metrics) > rank(best)


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    compute_loss: Callable[..., tuple[torch.Tensor, Any]],
    measure: Callable[[Any, Any], Mapping[str, torch.Tensor]],
    count_targets: Callable[[Any], Any] = len,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    reduce: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    run: Callable[..., Any] = lambda work, batch: work(*batch),
) -> dict[str, float]:
    """Mean loss and metrics over batches, in eval mode, each sample counted once.

    Args:
        batches: (inputs, targets) on the model's device.
        compute_loss: (model, inputs, targets) -> mean loss, outputs.
        measure: (outputs, targets) -> further metrics, as sums over the batch.
        count_targets: what the mean loss of a batch is a mean over.
        reduce: sums the totals over ranks.
        run: (work, batch) calls work(inputs, targets) for all of a batch, in pieces and
            again if need be (`run_in_pieces`).

    Returns:
        "val_loss", and "val_" before each name that `measure` gives.
    """
    model.eval()
    totals: dict[str, Any] = {}

    def add(inputs: Any, targets: Any) -> None:
        nonlocal totals
        with autocast():
            loss, outputs = compute_loss(model, inputs, targets)
        count = count_targets(targets)
        # A rank's share may be empty, and the mean of nothing is NaN. To make a tensor
        # of a number would wait for the GPU, to add one does not.
        is_empty = torch.zeros((), device=loss.device) + count <= 0
        loss_sum = (loss * count).masked_fill(is_empty, 0.0)
        sums = {"loss": loss_sum, **measure(outputs, targets), "count": count}
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}

    for batch in batches:
        run(add, batch)
    totals = dict(reduce(totals))
    count = float(totals.pop("count")) or math.nan
    return {f"val_{name}": float(total) / count for name, total in totals.items()}


def train_step_with_clipping(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    max_norm: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """Run backward, clip the gradients' total norm, step, and clear the gradients.

    Args:
        loss: unscaled, 0-dim.
        max_norm: largest total 2-norm of the gradients.
        scaler: the fp16 scaler, if there is one: gradients are unscaled before they
            are clipped, else the scaled ones would be.

    Returns:
        Total norm before clipping, 0-dim, on the device.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    total_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total_norm


class MixedPrecisionTrainer:
    """One training step in the device manager's precision.

    fp16 and bf16 run under autocast, fp16 with a gradient scaler as well; fp32 runs
    plainly. Build the optimizer from `model.parameters()` as usual.

    Args:
        criterion: called with (outputs, targets), returns a 0-dim loss.
        device_manager: anything with `.device` (torch.device) and `.dtype`.
        max_grad_norm: clip the gradients' total norm to this; None leaves them alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., torch.Tensor],
        device_manager: Any,
        max_grad_norm: float | None = None,
    ):
        self.device = device_manager.device
        self.dtype = device_manager.dtype
        self.model = model.to(self.device)
        self.optimizer = optimizer
        self.criterion = criterion
        self.max_grad_norm = max_grad_norm
        self.use_amp = self.dtype in (torch.float16, torch.bfloat16)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16
        )
        self._skipped: torch.Tensor | bool = False

    def train_step(self, inputs: Any, targets: Any) -> torch.Tensor:
        """Train on one batch that is already on the device.

        Returns:
            The loss, 0-dim, detached, still on the device: `.item()` would wait for
            the GPU, so read it only when it is printed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type,
            dtype=self.dtype if self.use_amp else None,
            enabled=self.use_amp,
        ):
            loss = self.criterion(self.model(inputs), targets)
        self.scaler.scale(loss).backward()
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)  # else the scaled ones are clipped
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if self.scaler.is_enabled():
            self._skipped = _step_and_flag_skip(self.optimizer, self.scaler)
        else:
            self.optimizer.step()
        return loss.detach()

    @property
    def step_skipped(self) -> bool:
        """Whether fp16 overflow made the scaler skip the last step (waits for it)."""
        return bool(self._skipped)


@contextlib.contextmanager
def _spare_running_statistics(
    block: nn.Module, recompute_context: contextlib.AbstractContextManager
) -> Iterator[None]:
    """Recompute on copies of the normalisation statistics: a batch counts once."""
    norms = [
        module
        for module in block.modules()
        if isinstance(getattr(module, "running_mean", None), torch.Tensor)
    ]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        with recompute_context:
            yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class _RepeatedContext(contextlib.AbstractContextManager):
    """A context made anew each time it is entered: backward may run twice."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager]):
        self.make = make

    def __enter__(self) -> Any:
        self.context = self.make()
        return self.context.__enter__()

    def __exit__(self, *error) -> bool | None:
        return self.context.__exit__(*error)


def _selective_contexts() -> tuple[Any, Any]:
    """Return the contexts of a forward that keeps some results, and of the second."""
    return create_selective_checkpoint_contexts(list(KEPT_CHECKPOINT_OPS))


def _checkpoint_contexts(
    block: nn.Module, selective: bool
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of the forward and of its recomputation."""
    forward_context, recompute_context = (
        _selective_contexts()
        if selective
        else (contextlib.nullcontext(), contextlib.nullcontext())
    )
    spare = functools.partial(_spare_running_statistics, block, recompute_context)
    return forward_context, _RepeatedContext(spare)


def _checkpointed_call(
    function: Callable[..., Any],
    block: nn.Module,
    mode: str,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Call function(*args, **kwargs), keeping its inputs instead of its activations."""
    selective = mode == "selective"
    if torch.compiler.is_compiling():
        # The compiler recomputes inside its graph: statistics change once anyway, and
        # it knows no other contexts than the selective ones.
        if selective:
            kwargs = kwargs | {"context_fn": _selective_contexts}
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    context_fn = functools.partial(_checkpoint_contexts, block, selective)
    if mode == "offload":
        return _offloaded_call(function, context_fn, args, kwargs)
    # Keyword arguments travel as one dict: checkpoint looks for the device, whose
    # random state dropout needs again, in positional arguments only.
    return checkpoint(
        lambda args, kwargs: function(*args, **kwargs),
        args,
        kwargs,
        use_reentrant=False,
        context_fn=context_fn,
    )


@functools.cache
def _offload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pack_to_host(tensor: torch.Tensor) -> Any:
    """Start copying a GPU's tensor into pinned memory beside its other work."""
    if tensor.device.type not in OFFLOADED_DEVICES:
        return tensor  # it is in host memory already
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    stream = _offload_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is free only when it has been copied
    return tensor.device, host, stream.record_event()


def _unpack_from_host(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    device, host, copied = packed
    torch.cuda.current_stream(device).wait_event(copied)
    return host.to(device, non_blocking=True)


def _offloaded_call(
    function: Callable[..., Any],
    context_fn: Callable[[], tuple],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Checkpoint a call whose inputs with gradients are kept in host memory.

    Its other inputs, such as masks, are the same for all blocks and stay.
    """
    names, positional = list(kwargs), len(args)
    others = [*args, *kwargs.values()]
    moved = [
        index
        for index, value in enumerate(others)
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    tensors = [others[index] for index in moved]
    for index in moved:
        others[index] = None

    def call(others, *tensors):
        values = list(others)
        for index, tensor in zip(moved, tensors, strict=True):
            values[index] = tensor
        named = dict(zip(names, values[positional:], strict=True))
        return function(*values[:positional], **named)

    # checkpoint saves tensors that are arguments of their own through these hooks.
    with torch.autograd.graph.saved_tensors_hooks(_pack_to_host, _unpack_from_host):
        return checkpoint(
            call, others, *tensors, use_reentrant=False, context_fn=context_fn
        )


class CheckpointedModel(nn.Module):
    """Layers in sequence whose activations are computed again in backward.

    Cuts the layers into segments and keeps only their inputs; the last segment is kept
    whole, because backward starts with it. Results, dropout, gradients and BatchNorm
    statistics are those of the plain run.

    Args:
        layers: any number of modules of one argument, called in order.
        use_checkpointing: False runs them plainly; can be changed at any time.
        checkpoint_segments: at most one per layer is used.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        use_checkpointing: bool = False,
        checkpoint_segments: int = 4,
    ):
        super().__init__()
        if checkpoint_segments < 1:
            raise ValueError(
                f"checkpoint_segments={checkpoint_segments}: use 1 or more"
            )
        self.layers = layers
        self.use_checkpointing = use_checkpointing
        self.checkpoint_segments = checkpoint_segments

    def forward(self, x: Any) -> Any:
        kept_from = 0
        if self.use_checkpointing and self.training and self.layers:
            segments = min(self.checkpoint_segments, len(self.layers))
            size = len(self.layers) // segments
            kept_from = size * (segments - 1)
            for start in range(0, kept_from, size):
                segment = functools.partial(self._run_layers, start, start + size)
                x = _checkpointed_call(segment, self, "full", (x,), {})
        return self._run_layers(kept_from, len(self.layers), x)

    def _run_layers(self, start: int, stop: int, x: Any) -> Any:
        for index in range(start, stop):
            x = self.layers[index](x)
        return x


def find_repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return a model's repeated blocks, in order: units to checkpoint or to shard.

    They are the members of the outermost `nn.ModuleList` or `nn.Sequential` that holds
    two or more modules of the same class which have modules of their own. Empty where
    there is none.
    """
    kinds: Counter[type] = Counter()
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        kinds.update(
            type(child) for child in module if any(True for _ in child.children())
        )
    blocks = []
    for child in module.children():
        blocks += [child] if kinds[type(child)] > 1 else find_repeated_blocks(child)
    return blocks


@functools.cache
def _checkpointing_class(block_class: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of block_class whose forward is checkpointed in training."""

    def forward(self, *args, **kwargs):
        if not self.training:
            return block_class.forward(self, *args, **kwargs)
        return _checkpointed_call(
            functools.partial(block_class.forward, self),
            self,
            self._checkpoint_mode,
            args,
            kwargs,
        )

    def __reduce__(self):  # pickle cannot find a class made at run time by its name
        return _new_checkpointing_block, (block_class,), self.__getstate__()

    name = f"Checkpointed{block_class.__name__}"
    return type(name, (block_class,), {"forward": forward, "__reduce__": __reduce__})


def _new_checkpointing_block(block_class: type[nn.Module]) -> nn.Module:
    checkpointing_class = _checkpointing_class(block_class)
    return checkpointing_class.__new__(checkpointing_class)


def enable_gradient_checkpointing(
    model: nn.Module,
    mode: str = "full",
    blocks: Iterable[nn.Module] | None = None,
) -> nn.Module:
    """Make a model's repeated blocks recompute their activations in backward.

    A Hugging Face model does so by its own `gradient_checkpointing_enable` (not in mode
    "offload"). In any other model the blocks are those of `find_repeated_blocks` (also
    `nn.TransformerEncoder`'s layers). Each block's class is swapped for a subclass
    whose forward is checkpointed: parameters, state_dict keys, hooks and isinstance
    stay as they are, and copies (EMA) work.

    Dropout, gradients and BatchNorm statistics equal the plain run's; other buffers
    that a block changes in forward are changed twice a step. Measured on 8 Transformer
    blocks: "full" takes 26-33% more time and 78% less activation memory, "selective"
    (keeps the results of matrix products and attention) 9-15% and 26%. "offload" is
    "full" with the blocks' inputs in pinned host memory: on a GPU nothing is kept of a
    block. The copies run beside the computing, those back wait for it; on a CPU, and
    where the model is compiled as a whole, it is the same as "full".

    Args:
        model: changed in place; call it before compiling, DDP or FSDP.
        mode: "full", "selective" or "offload"; a second call only changes the mode.
            In-place activations right after a Linear (`nn.ReLU(inplace=True)`) must
            not be "selective".
        blocks: the modules to checkpoint, instead of looking for them.

    Raises:
        ValueError: unknown mode, or no such blocks.
    """
    if mode not in ("full", "selective", "offload"):
        raise ValueError(f'mode={mode!r}: use "full", "selective" or "offload"')
    hugging_face = hasattr(model, "gradient_checkpointing_enable")
    if hugging_face and mode == "offload":
        if hasattr(model, "config"):
            model.config.use_cache = False  # recomputing would append to it again
    elif hugging_face and blocks is None:
        options: dict[str, Any] = {"use_reentrant": False}
        if mode == "selective":
            options["context_fn"] = _selective_contexts
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return model
    blocks = find_repeated_blocks(model) if blocks is None else list(blocks)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of repeated "
            "blocks: pass the modules to checkpoint, e.g. "
            "enable_gradient_checkpointing(model, blocks=[model.layer1, model.layer2])"
        )
    for block in blocks:
        if not hasattr(block, "_checkpoint_mode"):
            block.__class__ = _checkpointing_class(type(block))
        block._checkpoint_mode = mode
    return model


def _fp8_obstacle(device: torch.device) -> str:
    """Say why this machine cannot train in fp8; empty where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}, fp8 needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return (
            f"this GPU has compute capability {major}.{minor}, fp8 needs 8.9 (Ada, "
            "Hopper or newer)"
        )
    if find_spec("torchao") is None:
        return "torchao is not installed: pip install torchao"
    return ""


def find_fp8_layers(model: nn.Module) -> set[str]:
    """Return the names of the Linear layers that are worth computing in fp8.

    Those with input and output widths divisible by 16 (the hardware's tiles) inside of
    repeated blocks. So the output layer, whose logits need precision, is left out; in a
    model without such blocks it is the last Linear.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    blocks = find_repeated_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    if not blocks:
        inside = {id(module) for module in list(linears.values())[:-1]}
    return {
        name
        for name, layer in linears.items()
        if id(layer) in inside
        and layer.in_features % 16 == 0
        and layer.out_features % 16 == 0
    }


def convert_to_fp8(
    model: nn.Module, device: torch.device, report: Callable[[str], None] = print
) -> bool:
    """Make a model's Linear layers compute in fp8 by torchao, where the GPU has it.

    Weights and optimizer stay as they are; inputs, weights and gradients are scaled and
    cast for the matrix products, each tensor by its own maximum (torchao's tensorwise
    recipe). Without torch.compile the casts cost more than the products save.

    Args:
        model: changed in place; call it before FSDP, compiling and the optimizer, and
            use it with bf16 autocast.
        device: where the model trains.
        report: takes one line: how many layers, or why there are none.

    Returns:
        Whether any layer was converted.
    """
    if obstacle := _fp8_obstacle(device):
        report(f"fp8 is off: {obstacle}")
        return False
    names = find_fp8_layers(model)
    if not names:
        report(
            f"fp8 is off: {type(model).__name__} has no hidden nn.Linear whose widths "
            "are divisible by 16"
        )
        return False
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: name in names,
        config=Float8LinearConfig(pad_inner_dim=True),  # for batches of any size
    )
    report(f"fp8: {len(names)} Linear layers")
    return True


def _is_compile_failure(error: Exception) -> bool:
    """Whether the compiler raised it, not the model; never true for out of memory."""
    cause = getattr(error, "inner_exception", None) or error
    return not isinstance(cause, torch.OutOfMemoryError) and any(
        base.__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
        for base in type(error).__mro__
    )


def remember_forward_state(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores what a forward changes: generators, buffers."""
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    gpu_states = [(gpu, torch.cuda.get_rng_state(gpu)) for gpu in gpus]
    cpu_state = torch.get_rng_state()

    def restore() -> None:
        torch.set_rng_state(cpu_state)
        for gpu, state in gpu_states:
            torch.cuda.set_rng_state(state, gpu)
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)

    return restore


@contextlib.contextmanager
def gradients_apart(model: nn.Module) -> Iterator[None]:
    """Add the gradients of the block to those that are there, if all of it succeeds.

    After an error they are as they were, even if a backward pass was half done. Takes
    the memory of a second set of gradients, where there are some already.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
        news = [parameter.grad for parameter in parameters]
        both = [
            (old, new)
            for old, new in zip(kept, news, strict=True)
            if old is not None and new is not None
        ]
        if both:
            torch._foreach_add_(*map(list, zip(*both, strict=True)))
        kept = [
            new if old is None else old for old, new in zip(kept, news, strict=True)
        ]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def run_in_pieces(
    work: Callable[..., Any],
    batch: Any,
    micro_batch: int,
    recover: Callable[..., int],
    move: Callable[[Any], Any] = lambda piece: piece,
    model: nn.Module | None = None,
) -> int:
    """Call work(*piece) for all of a batch, in micro-batches that fit into memory.

    A piece for which memory runs out is done again in halves; what was done before it
    stays done. So a batch gets through, however often memory runs out.

    Args:
        work: leaves nothing behind when it fails but what `model` says.
        batch: as for `split_batch`. An empty one is passed on as it is.
        recover: `train_with_oom_recovery`, with its options.
        move: brings a piece to its device.
        model: whose gradients, dropout and buffers (BatchNorm) a second try finds as
            the first one did.

    Returns:
        The micro-batch that fitted.

    Raises:
        InsufficientMemoryError: there is not enough for one sample.
    """
    count, start = _count_samples(batch), 0
    if not count:
        work(*move(batch))

    def run_piece(start: int, wanted: int) -> int:
        restore = remember_forward_state(model) if model else None

        def attempt(size: int) -> int:
            piece = _slice_batch(batch, start, start + size)
            with gradients_apart(model) if model else contextlib.nullcontext():
                work(*move(piece))
            return size

        return recover(
            attempt,
            wanted,
            max_retries=wanted.bit_length(),
            on_retry=lambda _: restore() if restore else None,
        )

    while start < count:
        wanted = min(micro_batch, count - start)  # the last one may be smaller
        done = run_piece(start, wanted)
        start += done
        if done < wanted:
            micro_batch = done
    return micro_batch


@contextlib.contextmanager
def _compiler_warnings_ignored() -> Iterator[None]:
    """Ignore what torch warns of in itself when it imports its compiler."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        yield


def compile_model_if_available(
    model: nn.Module,
    mode: str = "reduce-overhead",
    dynamic: bool | None = False,
    report: Callable[[str], None] = print,
) -> nn.Module:
    """Compile a model in place, and fall back to eager where compiling fails.

    torch.compile fails late, in the first forward. If eager runs that very call, the
    compiler was at fault: that is reported once and the model stays eager. An error
    that eager has as well, or out of memory, reaches the caller, and the model stays
    compiled.

    Args:
        model: its state_dict keys stay as they are (no `_orig_mod.`).
        mode: "default"; "reduce-overhead" (CUDA graphs: small batches; an output must
            be used before the next call overwrites it); "max-autotune" (slow to start).
        dynamic: False compiles anew for every shape (silently eager after 8: bucket
            lengths), True once for all shapes, None decides at the second shape.

    Returns:
        The same model.
    """

    def forward(*args, **kwargs):  # a frame of ours: those of torch.nn are not compiled
        return model._call_impl(*args, **kwargs)

    # Its own code object, else all compiled models share one recompile limit.
    forward.__code__ = forward.__code__.replace()
    try:
        with _compiler_warnings_ignored():
            compiled = torch.compile(forward, mode=mode, dynamic=dynamic)
    except RuntimeError as error:
        if "not supported" not in str(error):  # an unknown mode, for one
            raise
        report(f"torch.compile is not available, staying eager: {error}")
        return model
    succeeded = False

    def call(*args, **kwargs):
        nonlocal succeeded
        restore, context = None, contextlib.nullcontext()
        if not succeeded:
            restore = remember_forward_state(model)
            context = _compiler_warnings_ignored()
        try:
            with context:
                result = compiled(*args, **kwargs)
            succeeded = True
            return result
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            cause = getattr(error, "inner_exception", None) or error
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        if restore is not None:  # what ran before the failure must not count twice
            restore()
        result = model._call_impl(*args, **kwargs)
        model._compiled_call_impl = None
        report(f"torch.compile failed, staying eager: {reason}")
        return result

    model._compiled_call_impl = call
    return model


@torch.no_grad()
def _copy_all(targets: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _tensor_slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Map each tensor's name to the dict that holds it, and its key there."""
    slots = {}
    seen = set()
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))  # a tied tensor comes once
                    slots[f"{prefix}.{key}" if prefix else key] = (holder, key)
    return slots


class ModelEMA:
    """Exponential moving average of a model's weights, in fp32.

    Each update moves the average by (1 - decay) of its distance to the model; buffers
    (BatchNorm statistics) are copied. Call `update` after every optimizer step that was
    taken.

    Args:
        model: any module that can be deep-copied (of DDP pass `.module`). A compiled or
            checkpointed one will do; the average itself runs eagerly.
        decay: 0.999 averages over about the last 1000 steps.
        warmup: let the first updates move faster: decay is at most
            (1 + updates) / (10 + updates), so .1, .18, .25 ... .99 after 890.
        ema_model: a second copy of the model to hold the average, for FSDP2, which
            cannot be deep-copied: built and sharded like the model; its values are
            overwritten by the model's.

    Raises:
        ValueError: decay outside 0 to 1, or an ema_model that is another one or not in
            fp32.

    Attributes:
        ema_model: the average, in eval mode, without gradients.
        updates: updates so far.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        warmup: bool = False,
        ema_model: nn.Module | None = None,
    ):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: use a value from 0 to 1, such as 0.999")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._source: nn.Module | None = None
        self.ema_model = copy.deepcopy(model) if ema_model is None else ema_model
        self.ema_model.eval().requires_grad_(False)
        if ema_model is not None:
            self._connect(model)
            slots = self._averaged + self._copied
            _copy_all(
                [holder[key] for _, _, holder, key in slots],
                [holder[key] for holder, key, _, _ in slots],
            )
        for name, tensor in [
            *self.ema_model.named_parameters(),
            *self.ema_model.named_buffers(),
        ]:
            if tensor.dtype not in (torch.float16, torch.bfloat16):
                continue
            if ema_model is not None:
                raise ValueError(
                    f"ema_model's {name} is in {tensor.dtype}: build it in fp32, the "
                    "average of a half-precision model at 0.999 would never move"
                )
            tensor.data = tensor.data.float()  # a bf16 average at .999 never moves

    def _connect(self, model: nn.Module) -> None:
        """Note once where both models hold their tensors: walking them is slow."""
        self._sharded = [
            module
            for root in (model, self.ema_model)
            for module in root.modules()
            if hasattr(module, "reshard")
        ]
        self._reshard()
        slots, ema_slots = _tensor_slots(model), _tensor_slots(self.ema_model)
        if slots.keys() != ema_slots.keys():
            odd = sorted(slots.keys() ^ ema_slots.keys())
            raise ValueError(
                f"the model is not the one that is averaged, they differ in {odd[:3]}: "
                "pass the same module (of DDP or torch.compile the one inside)"
            )
        self._averaged, self._copied = [], []
        for name, (holder, key) in ema_slots.items():
            average = holder[key]
            moves = isinstance(average, nn.Parameter) and average.is_floating_point()
            group = self._averaged if moves else self._copied
            group.append((*slots[name], holder, key))
        self._dtypes = [holder[key].dtype for _, _, holder, key in self._averaged]
        self._source = model

    def _reshard(self) -> None:
        """FSDP2: a forward without backward leaves gathered copies in the weights."""
        for module in self._sharded:
            module.reshard()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model.

        Tensors that `.to()` or `load_state_dict` replaced are found; after replacing a
        whole submodule build a new ModelEMA.
        """
        if model is not self._source:
            self._connect(model)
        self._reshard()
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._averaged:
            values = [holder[key] for holder, key, _, _ in self._averaged]
            averages = [holder[key] for _, _, holder, key in self._averaged]
            if [value.dtype for value in values] != self._dtypes:
                values = list(map(torch.Tensor.to, values, self._dtypes))
            torch._foreach_lerp_(averages, values, 1 - decay)
        for holder, key, ema_holder, ema_key in self._copied:
            ema_holder[ema_key].copy_(holder[key])

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Evaluate with the averaged weights inside the model itself.

        The model's own weights come back bit by bit, after an error too. Takes memory
        for one more copy of the weights meanwhile.
        """
        if model is not self._source:
            self._connect(model)
        self._reshard()
        slots = self._averaged + self._copied
        tensors = [holder[key] for holder, key, _, _ in slots]
        averages = [holder[key] for _, _, holder, key in slots]
        own = [tensor.detach().clone() for tensor in tensors]
        try:
            _copy_all(tensors, averages)
            yield
        finally:
            self._reshard()
            _copy_all(tensors, own)

    def forward(self, *args, **kwargs) -> Any:
        """Run the averaged model."""
        return self.ema_model(*args, **kwargs)

    __call__ = forward

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the update count."""
        return {"model": self.ema_model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit by bit, where `state_dict` was taken."""
        self.ema_model.load_state_dict(state["model"])
        self.updates = state["updates"]
