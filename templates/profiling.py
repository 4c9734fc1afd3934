"""Where time and memory go in a training step (section 13).

    print_memory_stats(device, prefix="after the first epoch: ")
    profile_training_step(model, inputs, targets, criterion, optimizer)
    with StepProfiler(out_dir, device, dtype) as profiler:
        for inputs, targets in profiler.batches(loader):
            train_step(inputs, targets)
            profiler.step()
    with TrainingDisplay(total_steps, batch_size) as display:
        display.update(step, loss=loss.item())

All figures in GB are 1e9 bytes.
"""

import contextlib
import copy
import itertools
import json
import math
import re
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Dense peaks (without structured sparsity) in TFLOP/s, as the maker's data sheets give
# them. float16 and bfloat16 accumulate in float32, as PyTorch does: consumer cards
# reach only half of what is advertised for float16 that way. "tf32" is what float32
# reaches on tensor cores, if it may use them.
_HOPPER_SXM = {"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "tf32": 494.7, "fp32": 66.9}
_HOPPER_NVL = {"bf16": 835.5, "fp16": 835.5, "fp8": 1670.5, "tf32": 417.5, "fp32": 60.0}
_AMPERE_A100 = {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}
_VOLTA_SXM = {"fp16": 125.0, "fp32": 15.7}
_VOLTA_PCIE = {"fp16": 112.0, "fp32": 14.0}
# Keys are `torch.cuda.get_device_name()` without maker and memory size. Whatever is
# not here to the letter has no known peak: "H100 80GB HBM3 MIG 1g.10gb" is one
# seventh of an H100, and "RTX 4090 D" is not a 4090.
PEAK_TFLOPS = {
    # NVIDIA HGX data sheet: eight B200 have 36 PFLOP/s of bf16 with sparsity
    "B200": {"bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "tf32": 1125.0},
    # NVIDIA H200 data sheet
    "H200": _HOPPER_SXM,
    "H200 NVL": _HOPPER_NVL,
    # NVIDIA H100 and GH200 data sheets
    "H100 HBM3": _HOPPER_SXM,
    "H100 SXM5": _HOPPER_SXM,
    "H100 NVL": _HOPPER_NVL,
    "H100 PCIe": {
        "bf16": 756.5,
        "fp16": 756.5,
        "fp8": 1513.0,
        "tf32": 378.0,
        "fp32": 51.2,
    },
    "GH200": _HOPPER_SXM,
    # NVIDIA A100 data sheet: the same for all forms
    "A100-SXM4": _AMPERE_A100,
    "A100-PCIE": _AMPERE_A100,
    "A100 PCIe": _AMPERE_A100,
    # NVIDIA A10, A30 and A40 data sheets
    "A10": {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2},
    "A30": {"bf16": 165.0, "fp16": 165.0, "tf32": 82.0, "fp32": 10.3},
    "A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    # NVIDIA L4, L40 and L40S data sheets
    "L4": {"bf16": 121.0, "fp16": 121.0, "fp8": 242.5, "tf32": 60.0, "fp32": 30.3},
    "L40": {"bf16": 181.0, "fp16": 181.0, "fp8": 362.0, "tf32": 90.5, "fp32": 90.5},
    "L40S": {"bf16": 362.0, "fp16": 362.0, "fp8": 733.0, "tf32": 183.0, "fp32": 91.6},
    # NVIDIA Ada (appendix A) and Ampere GA102 architecture white papers
    "GeForce RTX 4090": {
        "bf16": 165.2,
        "fp16": 165.2,
        "fp8": 330.3,
        "tf32": 82.6,
        "fp32": 82.6,
    },
    "GeForce RTX 3090": {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6},
    "RTX A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    # NVIDIA T4 and V100 data sheets: neither has bf16 or TF32
    "T4": {"fp16": 65.0, "fp32": 8.1},
    "V100-SXM2": _VOLTA_SXM,
    "V100-SXM3": _VOLTA_SXM,
    "V100-PCIE": _VOLTA_PCIE,
}
PEAK_DTYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}


def get_memory_stats(device: torch.device) -> dict[str, float]:
    """Return what PyTorch holds on a GPU, in GB; {} on a CPU, where nothing counts it.

    Returns:
        "allocated" (by tensors), "reserved" (with PyTorch's cache) and, on CUDA,
        "max_allocated" since the start or `torch.cuda.reset_peak_memory_stats()`.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device) / 1e9,
            "reserved": torch.cuda.memory_reserved(device) / 1e9,
            "max_allocated": torch.cuda.max_memory_allocated(device) / 1e9,
        }
    if device.type == "mps":
        return {
            "allocated": torch.mps.current_allocated_memory() / 1e9,
            "reserved": torch.mps.driver_allocated_memory() / 1e9,
        }
    return {}


def print_memory_stats(
    device: torch.device, prefix: str = "", report: Callable[[str], None] = print
) -> None:
    """Report `get_memory_stats` in one line; nothing on a CPU."""
    stats = get_memory_stats(device)
    if stats:
        figures = ", ".join(f"{name} {gb:.2f} GB" for name, gb in stats.items())
        report(f"{prefix}Memory: {figures}")


def peak_memory_gb() -> float | None:
    """Return the most memory that this process has used so far, in GB.

    On CUDA what tensors took on the current GPU, on MPS what the driver holds now; in
    a process that has nothing on a GPU its resident memory, None on Windows.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        on_gpu = torch.cuda.max_memory_allocated()
    elif torch.backends.mps.is_available():
        on_gpu = torch.mps.driver_allocated_memory()
    else:
        on_gpu = 0
    if on_gpu:
        return on_gpu / 1e9
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # in KiB


@contextlib.contextmanager
def _undo_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[None]:
    """Put weights, buffers, gradients, optimizer and random state back at the end."""
    groups = optimizer.param_groups
    parameters = dict.fromkeys(
        itertools.chain(model.parameters(), *(group["params"] for group in groups))
    )
    gradients = {parameter: parameter.grad for parameter in parameters}
    values = {
        tensor: tensor.detach().clone()
        for tensor in itertools.chain(parameters, model.buffers())
    }
    # Not load_state_dict(): it would cast fp32 moments of bf16 weights to bf16.
    states = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    settings = [dict(group) for group in groups]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)


def _profiler_settings(
    device: torch.device,
) -> tuple[list[torch.profiler.ProfilerActivity], str]:
    """Return what to record and the table's sort key, an attribute of its rows."""
    if device.type == "cuda":
        return [
            torch.profiler.ProfilerActivity.CPU,
            torch.profiler.ProfilerActivity.CUDA,
        ], "self_device_time_total"
    return [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"


def profile_training_step(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    criterion: Callable[[Any, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    warmup_steps: int = 3,
    recorded_steps: int = 3,
    trace_path: str | Path | None = None,
    restore: bool = True,
    row_limit: int = 10,
    report: Callable[[str], None] = print,
) -> torch.profiler.profile:
    """Run training steps on one batch under the profiler, and report the dearest ops.

    The steps are real ones: they move the weights and the optimizer's state. With
    `restore` all of it is put back, the random state and gradients too, so that a run
    goes on as if it had not been profiled. That takes a second copy of the weights
    and the optimizer's state on the device in the meantime.

    For mixed precision call this within `torch.autocast`.

    Args:
        inputs: One batch, on the model's device, passed on as `model(inputs)`.
        warmup_steps: Steps before the recorded ones: the first steps also pay for
            compiling, algorithm search, memory pools and the optimizer's state.
        recorded_steps: Steps whose sum the table shows.
        trace_path: Also write a trace for chrome://tracing or Perfetto; a name
            that ends in .gz is compressed.
        restore: False leaves the model trained on this batch.
        row_limit: Rows of the table.

    Raises:
        ValueError: `warmup_steps` is negative or `recorded_steps` is below 1.
    """
    if warmup_steps < 0 or recorded_steps < 1:
        raise ValueError(
            f"warmup_steps={warmup_steps}, recorded_steps={recorded_steps}: "
            "give at least 0 and 1"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    activities, sort_by = _profiler_settings(device)

    def train_steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()

    training_modes = [(module, module.training) for module in model.modules()]
    if not model.training:  # else leave submodules that are frozen in eval mode alone
        model.train()
    try:
        with contextlib.ExitStack() as stack:
            if restore:
                stack.enter_context(_undo_training(model, optimizer, device))
            train_steps(warmup_steps)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the warm-up's kernels end before
            profiler = torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True
            )
            with profiler:
                train_steps(recorded_steps)
    finally:
        for module, training in training_modes:
            module.training = training

    outcome = "are as before" if restore else "have been trained on this batch"
    report(
        f"Profiled {recorded_steps} training steps on {device} after {warmup_steps} "
        f"to warm up; weights and optimizer state {outcome}."
    )
    report(profiler.key_averages().table(sort_by=sort_by, row_limit=row_limit))
    if trace_path is not None:
        Path(trace_path).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace_path))
        report(f"Trace: {trace_path} (open it in chrome://tracing or Perfetto)")
    return profiler


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s that a GPU has at most for dense matrices of `dtype`.

    For float32 the peak of TF32 where `torch.set_float32_matmul_precision` allows it.

    Returns:
        The maker's figure from `PEAK_TFLOPS`; None for a device or a dtype that is not
        in it, so for every CPU: no guess.
    """
    if device.type != "cuda" or dtype not in PEAK_DTYPE_NAMES:
        return None
    name = torch.cuda.get_device_name(device)
    peaks = PEAK_TFLOPS.get(re.sub(r"^(NVIDIA|Tesla) |[- ]\d+GB", "", name), {})
    kind = PEAK_DTYPE_NAMES[dtype]
    if kind == "fp32" and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32" if "tf32" in peaks else kind
    return peaks[kind] * 1e12 if kind in peaks else None


class StepFlopCounter(TorchDispatchMode):
    """Count the FLOPs of matrix products, convolutions and attention within it.

    By the formulas of `torch.utils.flop_counter` (a multiplication and an addition are
    two; causal attention counts in full), with two differences from its
    FlopCounterMode: attention on a CPU counts too, where that has 0 before 2.15, and
    what is no part of one forward and backward is kept apart. (What checkpointing
    computes again in a custom autograd function, fp8 for one, is not told apart.)

    Attributes:
        flops: of forward and backward, as without activation checkpointing.
        extra_flops: what checkpointing computes again, and an optimizer's own (Muon).
        uncounted: operations whose formula failed; then the figures are too low.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.extra_flops = 0
        self.uncounted: set[str] = set()
        self._in_optimizer = False
        aten = torch.ops.aten
        self._formulas = dict(flop_registry)
        for suffix in ("", "_backward"):
            on_gpu = getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")
            on_cpu = getattr(
                aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"
            )
            self._formulas.setdefault(on_cpu, flop_registry[on_gpu])

    def __enter__(self):
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._set_optimizer(True)),
            register_optimizer_step_post_hook(lambda *_: self._set_optimizer(False)),
        ]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _set_optimizer(self, entered: bool) -> None:
        self._in_optimizer = entered

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and add its FLOPs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            flops = None
            with contextlib.suppress(Exception):  # a shape that it does not expect
                flops = formula(*args, **kwargs, out_val=result)
            if flops is None:
                self.uncounted.add(str(func))
                return result
            # Backward runs without grad mode, but for what it has to compute again.
            in_backward = torch._C._current_graph_task_id() != -1
            if self._in_optimizer or (in_backward and torch.is_grad_enabled()):
                self.extra_flops += flops
            else:
                self.flops += flops
        return result


@contextlib.contextmanager
def _count_flops_eagerly() -> Iterator[StepFlopCounter]:
    """Count what runs within; compiled models run eagerly, else nothing shows."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stack.enter_context(StepFlopCounter())


def count_step_flops(run_step: Callable[[], Any]) -> int:
    """Return the FLOPs of a function, such as one forward and backward.

    flops = count_step_flops(lambda: compute_loss(model, inputs, targets)[0].backward())

    Matrix products, convolutions and attention count; what activation checkpointing
    computes again does not, so that the share of the peak (MFU, arXiv:2204.02311)
    tells of useful work. The function runs once, eagerly, with all that it changes:
    gradients and random numbers.
    """
    with _count_flops_eagerly() as counter:
        run_step()
    return counter.flops


class _HostStepTimer:
    """Milliseconds between marks, by the CPU's clock."""

    def __init__(self) -> None:
        self.times_ms = array("d")
        self._last_s: float | None = None

    def mark(self, keep: bool) -> None:
        """The time since the last mark is kept, or is none that counts."""
        now_s = time.perf_counter()
        if keep and self._last_s is not None:
            self.times_ms.append((now_s - self._last_s) * 1000)
        self._last_s = now_s

    def finish(self) -> None:
        """All is there already."""


class _CudaStepTimer:
    """Milliseconds between marks by events on the GPU, read once it has passed them.

    So nothing waits: the CPU is ahead of the GPU, and its own clock tells nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.times_ms = array("d")
        self._device = device
        self._marks: deque[tuple[Any, bool]] = deque()
        self._spare: list[Any] = []

    def mark(self, keep: bool) -> None:
        """The time since the last mark is kept, or is none that counts."""
        event = self._spare.pop() if self._spare else self._new_event()
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((event, keep))
        while len(self._marks) > 1 and self._marks[1][0].query():
            self._read_first()

    def finish(self) -> None:
        """Wait for the GPU and read what is left."""
        torch.cuda.synchronize(self._device)
        while len(self._marks) > 1:
            self._read_first()

    def _new_event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def _read_first(self) -> None:
        start, _ = self._marks.popleft()
        end, keep = self._marks[0]
        if keep:
            self.times_ms.append(start.elapsed_time(end))
        self._spare.append(start)


def _rank_operations(
    profiler: torch.profiler.profile, device: torch.device, steps: int, limit: int
) -> list[dict[str, Any]]:
    """Return the operations that took most time of their own, per step."""
    _, attribute = _profiler_settings(device)
    rows = [
        (getattr(event, attribute) / 1000 / steps, event)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU  # kernels count for ops
        and not event.key.startswith("ProfilerStep")
    ]
    total_ms = sum(ms for ms, _ in rows) or 1.0
    rows.sort(key=lambda row: -row[0])
    return [
        {
            "name": event.key,
            "calls": round(event.count / steps, 1),
            "ms": round(ms, 4),
            "share": round(ms / total_ms, 4),
        }
        for ms, event in rows[:limit]
        if ms > 0
    ]


class StepProfiler:
    """Time every step of a run, record a few of them, and sum up at the end.

    The first steps warm up; in the second of them FLOPs are counted (a compiled model
    runs that one eagerly). Then a trace of a few steps is recorded, and all further
    steps are timed and otherwise left alone. At the end `profile.json` and a summary
    tell step times, the share of waiting for data, peak memory, FLOPs, the share of
    the GPU's peak (MFU) and the dearest operations.

    What the run computes stays the same to the bit; compiled, within rounding.

    Args:
        out_dir: for trace.json.gz and profile.json.
        device: where the model trains.
        dtype: of the matrix products, for the peak.
        warmup_steps: at least 2. Compiling, algorithm search and memory pools are paid
            for in the first steps.
        recorded_steps: in the trace.
        active: False does nothing at all, as on all ranks but the first.
        row_limit: operations in the summary.
    """

    def __init__(
        self,
        out_dir: str | Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        warmup_steps: int = 10,
        recorded_steps: int = 3,
        active: bool = True,
        row_limit: int = 10,
        report: Callable[[str], None] = print,
    ) -> None:
        if warmup_steps < 2 or recorded_steps < 1:
            raise ValueError(
                f"warmup_steps={warmup_steps}, recorded_steps={recorded_steps}: "
                "give at least 2 and 1"
            )
        self.out_dir, self.device, self.dtype = Path(out_dir), device, dtype
        self.warmup_steps, self.recorded_steps = warmup_steps, recorded_steps
        self.active, self.row_limit, self.report = active, row_limit, report
        self.steps = 0
        self._on_cuda = device.type == "cuda"
        self._timer = _CudaStepTimer(device) if self._on_cuda else _HostStepTimer()
        self._stops_at = warmup_steps + 1 + recorded_steps
        self._counting = contextlib.ExitStack()
        self._counter: StepFlopCounter | None = None
        self._profiler: torch.profiler.profile | None = None
        self._operations: list[dict[str, Any]] = []
        self._wait_s: float | None = None  # in the step that is under way
        self._waited_s = 0.0  # in the steps whose time is kept

    def __enter__(self):
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if not self.active:
            return
        # Whatever ended the run must be seen, not what fails in its wake.
        with contextlib.suppress(*([Exception] if kind else [])):
            self._counting.close()
            self._stop_recording()
            self._timer.finish()
            self._sum_up()

    def batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Pass a loader's batches on, and time how long the loop waits for them.

        On a GPU that is an upper bound of what it idles for data: it may still be busy
        with the step before.
        """
        return self._timed_batches(loader) if self.active else loader

    def _timed_batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        self._timer.mark(keep=False)  # what was before, evaluation perhaps, is no step
        self._wait_s = 0.0
        start_s = time.perf_counter()
        for batch in loader:
            self._wait_s += time.perf_counter() - start_s
            yield batch
            start_s = time.perf_counter()

    def step(self) -> None:
        """Call it once after every optimizer step."""
        if not self.active:
            return
        self.steps += 1
        keep = self.steps > self._stops_at
        self._timer.mark(keep)
        if self._wait_s is not None:
            self._waited_s += self._wait_s * keep
            self._wait_s = 0.0
        if not keep:
            self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        if self.steps == 1:
            self._counter = self._counting.enter_context(_count_flops_eagerly())
        elif self.steps == 2:
            self._counting.close()
        if self.steps == self.warmup_steps:
            self._start_recording()
        elif self.steps == self._stops_at:
            self._stop_recording()
        elif self._profiler is not None:
            self._profiler.step()
        self._timer.mark(keep=False)  # none of this belongs to the next step

    def _start_recording(self) -> None:
        activities, _ = _profiler_settings(self.device)
        # The first step under the profiler pays for its start, and is left out.
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=0, warmup=1, active=self.recorded_steps
            ),
        )
        self._profiler.start()

    def _stop_recording(self) -> None:
        if self._profiler is None:
            return
        if self._on_cuda:
            torch.cuda.synchronize(self.device)  # else the last kernels are missing
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        recorded = min(self.steps, self._stops_at) - self.warmup_steps - 1
        if recorded < 1:
            return
        self._operations = _rank_operations(
            profiler, self.device, recorded, self.row_limit
        )
        self.out_dir.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.out_dir / "trace.json.gz"))

    def _sum_up(self) -> None:
        times_ms = sorted(self._timer.times_ms)
        summary: dict[str, Any] = {
            "device": torch.cuda.get_device_name(self.device)
            if self._on_cuda
            else str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "steps_timed": len(times_ms),
            "step_ms": None,
            "data_wait_share": None,
            "peak_memory_gb": peak_memory_gb(),
            "flops_per_step": None,
            "extra_flops_per_step": None,
            "peak_flops": peak_flops(self.device, self.dtype),
            "mfu": None,
            "operations": self._operations,
        }
        if times_ms:
            summary["step_ms"] = {
                f"p{percent}": times_ms[math.ceil(percent / 100 * len(times_ms)) - 1]
                for percent in (50, 90, 99)
            }
            summary["step_ms"]["mean"] = sum(times_ms) / len(times_ms)
            if self._wait_s is not None:
                summary["data_wait_share"] = self._waited_s * 1000 / sum(times_ms)
        counter = self._counter
        if counter is not None and self.steps > 1 and not counter.uncounted:
            summary["flops_per_step"] = counter.flops
            summary["extra_flops_per_step"] = counter.extra_flops
            if times_ms and summary["peak_flops"]:
                per_s = counter.flops / summary["step_ms"]["p50"] * 1000
                summary["mfu"] = per_s / summary["peak_flops"]
        self.out_dir.mkdir(parents=True, exist_ok=True)
        path = self.out_dir / "profile.json"
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for line in describe_profile(summary, self._stops_at):
            self.report(line)
        self.report(f"profile: {path}")
        if self._operations:
            trace = self.out_dir / "trace.json.gz"
            self.report(f"trace: {trace} (open it at https://ui.perfetto.dev)")


def _scale(value: float) -> str:
    """Four digits and the prefix of a unit: 2.5e9 is "2.5 G"."""
    power = min(int(math.log10(value) // 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {' KMGTP'[power].strip()}"


def describe_profile(summary: Mapping[str, Any], untimed_steps: int) -> list[str]:
    """Return the lines that tell a person what `StepProfiler` found."""
    if summary["step_ms"] is None:
        lines = [f"no step was timed: the run ended in the first {untimed_steps}"]
    else:
        times = summary["step_ms"]
        lines = [
            (
                f"{summary['steps_timed']} steps timed: {times['p50']:.4g} ms in the "
                f"middle, 90% within {times['p90']:.4g}, 99% within {times['p99']:.4g}"
            )
        ]
    if summary["data_wait_share"] is not None:
        lines.append(f"waiting for data: {summary['data_wait_share']:.1%} of the time")
    if summary["peak_memory_gb"] is not None:
        lines.append(f"peak memory: {summary['peak_memory_gb']:.3g} GB")
    if summary["flops_per_step"]:
        line = f"work: {_scale(summary['flops_per_step'])}FLOP a step"
        if summary["extra_flops_per_step"]:
            extra = _scale(summary["extra_flops_per_step"])
            line += f" (and {extra}FLOP of checkpointing and optimizer)"
        if summary["step_ms"]:
            per_s = summary["flops_per_step"] / summary["step_ms"]["p50"] * 1000
            line += f", {_scale(per_s)}FLOP/s"
        if summary["mfu"] is not None:
            line += (
                f", {summary['mfu']:.1%} of the {_scale(summary['peak_flops'])}FLOP/s "
                f"that {summary['device']} has for {summary['dtype']} (MFU)"
            )
        lines.append(line)
    if summary["operations"]:
        width = max(len(row["name"]) for row in summary["operations"])
        width = min(width, 50)
        lines.append(f"{'operation':{width}}  calls  ms a step  share")
        lines += [
            f"{row['name'][:width]:{width}}  {row['calls']:5.4g}  {row['ms']:9.4g}  "
            f"{row['share']:5.1%}"
            for row in summary["operations"]
        ]
    return lines


def format_values(values: Mapping[str, Any]) -> str:
    """Names and values in one line, fractions with four significant digits."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


class TrainingDisplay:
    """Progress of a training run: a tqdm bar on a terminal, plain lines elsewhere.

    Args:
        total_steps: of the whole run.
        batch_size: samples (or `unit`) in a step on all ranks, for the throughput.
        step: where the run begins, after a resume.
        unit: what `batch_size` counts: "samples", "tokens".
        speed_log: also append a line {"step", "samples_per_s", "memory_gb"} to this
            file at every update. Apart from the log of losses, which an exact resume
            reproduces to the bit: no two runs are equally fast.
        silent: show and write nothing, as on all ranks but the first.
        sinks: called with (step, values) for all that is shown: logs, trackers.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        step: int = 0,
        unit: str = "samples",
        speed_log: str | Path | None = None,
        silent: bool = False,
        sinks: Sequence[Callable[[int, Mapping[str, Any]], None]] = (),
    ) -> None:
        self.sinks = sinks
        self.total_steps, self.batch_size, self.step = total_steps, batch_size, step
        self.unit, self.speed_log, self.silent = unit, speed_log, silent
        self.bar = None
        self.time_s = time.perf_counter()

    def __enter__(self):
        if sys.stderr.isatty() and not self.silent:
            try:
                from tqdm import tqdm
            except ImportError:
                return self
            self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, step: int, **values: Any) -> None:
        """Show what step was reached, some values, and the speed since last time."""
        if self.silent:
            return
        for write in self.sinks:
            write(step, values)
        elapsed_s = time.perf_counter() - self.time_s
        speed = {
            f"{self.unit}_per_s": round(
                (step - self.step) * self.batch_size / elapsed_s
            )
        }
        values.update(speed)
        if self.bar is not None:
            self.bar.set_postfix_str(format_values(values))
        else:
            print(
                f"step {step}/{self.total_steps}: {format_values(values)}", flush=True
            )
        if self.speed_log is not None:
            memory_gb = peak_memory_gb()
            if memory_gb is not None:
                speed["memory_gb"] = round(memory_gb, 3)
            with open(self.speed_log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **speed}) + "\n")
        self._start_from(step)

    def _start_from(self, step: int) -> None:
        """Measure the speed from this step on."""
        if self.bar is not None:
            self.bar.update(step - self.step)
        self.step, self.time_s = step, time.perf_counter()

    def end_epoch(self, step: int, epoch: int, **values: Any) -> None:
        """Show the results of an epoch; the time since `update` counts in no speed."""
        if self.silent:
            return
        for write in self.sinks:
            write(step, {"epoch": epoch, **values})
        self.note(f"epoch {epoch}: {format_values(values)}")
        self._start_from(step)  # evaluating took time, and was no training

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
