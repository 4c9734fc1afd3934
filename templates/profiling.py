"""Where time and memory go in a training step (section 13).

    print_memory_stats(device, prefix="after the first epoch: ")
    profile_training_step(model, inputs, targets, criterion, optimizer)
    with TrainingDisplay(total_steps, batch_size) as display:
        display.update(step, loss=loss.item())

All figures in GB are 1e9 bytes.
"""

import contextlib
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


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
        batch_size: samples in a step, for the throughput.
        step: where the run begins, after a resume.
    """

    def __init__(self, total_steps: int, batch_size: int, step: int = 0) -> None:
        self.total_steps, self.batch_size, self.step = total_steps, batch_size, step
        self.bar = None
        self.time_s = time.perf_counter()

    def __enter__(self) -> "TrainingDisplay":
        if sys.stderr.isatty():
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
        elapsed_s = time.perf_counter() - self.time_s
        values["samples_per_s"] = round(
            (step - self.step) * self.batch_size / elapsed_s
        )
        if self.bar is not None:
            self.bar.update(step - self.step)
            self.bar.set_postfix_str(format_values(values))
        else:
            print(
                f"step {step}/{self.total_steps}: {format_values(values)}", flush=True
            )
        self.step, self.time_s = step, time.perf_counter()

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
