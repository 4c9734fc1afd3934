"""Section 17, unit tests: what the tests of a training script are made of.

    unreached = find_unreached_parameters(model)  # after a backward pass
    difference = find_difference(state, state_of_another_run)  # None: equal to the bit
    with out_of_memory_at_call(model, 2):
        ...  # the second forward from here raises what a full GPU raises

`drive_script` runs the main() of an imported script on a few samples, and kills or
stops it at a step. Nothing here knows a task: batches are tensors, or nested dicts,
tuples and lists of them, with samples in the first dimension.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset


def list_tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested mappings, tuples and lists, in their order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [tensor for item in tree for tensor in list_tensors(item)]
    return []


def find_unreached_parameters(model: nn.Module) -> dict[str, str]:
    """Name -> what is wrong with its gradient, of each parameter that is trained."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            found[name] = "none"
        elif not parameter.grad.isfinite().all():
            found[name] = "not finite"
        elif not parameter.grad.any():
            found[name] = "all zeros"
    return found


def compare_values(
    left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest relative difference of two dicts of tensors, and where it is.

    Relative to the norm of the tensor on the left, or to the largest of these norms
    where a tensor is thousand times smaller: such a one is rounding all through.
    """
    if left.keys() != right.keys():
        return math.inf, f"only one of them has {min(left.keys() ^ right.keys())}"
    norms = {name: tensor.double().norm().item() for name, tensor in left.items()}
    floor = max(norms.values(), default=0.0) / 1000 or 1e-30
    worst = (0.0, "")
    for name, tensor in left.items():
        distance = (tensor.double() - right[name].double()).norm().item()
        relative = distance / max(norms[name], floor)
        worst = max(worst, (math.inf if math.isnan(relative) else relative, name))
    return worst


def find_difference(left: Any, right: Any, place: str = "") -> str | None:
    """Where two nested states differ first, None if they are equal to the bit."""
    where = place or "the whole"
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        kinds = [f"{tensor.dtype} {[*tensor.shape]}" for tensor in (left, right)]
        if kinds[0] != kinds[1]:
            return f"{where}: {kinds[0]} and {kinds[1]}"
        if torch.allclose(left, right, rtol=0, atol=0, equal_nan=True):
            return None
        distance = (left.double() - right.double()).abs().max().item()
        return f"{where}: differs by up to {distance:g}"
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        if left.keys() != right.keys():
            names = ", ".join(sorted(map(str, left.keys() ^ right.keys())))
            return f"{where}: only one of them has {names}"
        items: Iterable[tuple[Any, Any, Any]] = (
            (name, left[name], right[name]) for name in left
        )
    elif isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        if len(left) != len(right):
            return f"{where}: {len(left)} and {len(right)} items"
        items = zip(range(len(left)), left, right, strict=True)
    else:
        return None if left == right else f"{where}: {left!r} and {right!r}"
    prefix = f"{place}/" if place else ""
    found = (
        find_difference(one, other, f"{prefix}{name}") for name, one, other in items
    )
    return next((difference for difference in found if difference), None)


@contextlib.contextmanager
def out_of_memory_at_call(
    model: nn.Module, number: int, backward: bool = False, times: int = 1
) -> Iterator[list[int]]:
    """Let one forward of the model, or one gradient, raise what a full GPU raises.

    Args:
        number: of that forward, or gradient of a parameter, counted from 1.
        backward: a gradient: with 2 the first one is there when memory runs out.
        times: it and the next ones, so many in all: a second try fails too.

    Yields:
        A list with the number of samples in each forward, to look at afterwards.
    """
    sizes: list[int] = []
    calls = {"forward": 0, "backward": 0}

    def fail_at(kind: str) -> None:
        calls[kind] += 1
        turn = calls[kind] - number
        if 0 <= turn < times and backward == (kind == "backward"):
            raise torch.OutOfMemoryError("CUDA out of memory (injected by a test)")

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        sizes.append(len(list_tensors([args, kwargs])[0]))
        fail_at("forward")

    hooks = [model.register_forward_pre_hook(count, with_kwargs=True)]
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda _: fail_at("backward"))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def cut_dataset(dataset: Any, samples: int) -> Any:
    """The first samples of a dataset that has an index.

    Of `StreamedRows` as many rows, spread over all; any other stream stays whole.
    """
    stream = getattr(dataset, "stream", None)
    if stream is not None and len(dataset) > samples:
        few = copy.copy(dataset)
        few.stream = stream.split(samples / len(dataset), seed=0)[1]
        few.stream.shuffle = stream.shuffle
        return few
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return dataset
    return Subset(dataset, range(min(samples, len(dataset))))


def drive_script(
    script: ModuleType, words: Sequence[str], plan: Mapping[str, Any]
) -> int:
    """Run the main() of a training script on few samples; its exit code.

    The script is changed in this process only: its `build_datasets` gives the first
    samples, its `set_seed` chooses deterministic kernels, and after a step that it
    reports through its `TrainingDisplay`, the process ends.

    Args:
        words: the script's options.
        plan: "samples" (to train on; as many to validate on at most), "kill_at" (a
            step after which the process is killed), "stop_at" (one after which it gets
            SIGTERM), "end_at" (one after which it exits), "no_dropout" (the model is
            in eval mode while it trains, so that nothing in it is random),
            "out_of_memory_every" (of so many calls of compute_loss memory runs out in
            two, one after the other: in one before it, in one in its backward).
    """
    sys.argv = [script.__file__ or "", *words]
    build, seed = script.build_datasets, script.set_seed
    update, compute = script.TrainingDisplay.update, script.compute_loss

    def build_few(*args: Any, **kwargs: Any) -> Any:
        train_set, val_set, spec = build(*args, **kwargs)
        few = [cut_dataset(part, plan["samples"]) for part in (train_set, val_set)]
        return few[0], few[1], spec

    def update_and_end(display: Any, step: int, **values: Any) -> None:
        update(display, step, **values)
        if step == plan.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == plan.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if step == plan.get("end_at"):
            raise SystemExit(0)

    def run_out_of_memory(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected by a test)")

    calls = itertools.count(1)
    every = plan.get("out_of_memory_every", 0)

    def compute_as_planned(model: nn.Module, *batch: Any) -> Any:
        if plan.get("no_dropout"):
            model.eval()
        turn = next(calls) % every if every else 2
        if turn == 0:
            run_out_of_memory(None)
        loss, outputs = compute(model, *batch)
        if turn == 1 and loss.requires_grad:
            loss.register_hook(run_out_of_memory)
        return loss, outputs

    script.build_datasets = build_few
    script.set_seed = lambda value, **_: seed(value, deterministic=True)
    script.TrainingDisplay.update = update_and_end
    script.compute_loss = compute_as_planned
    return script.main()


def run_words(words: Sequence[str], folder: Path, timeout_s: float) -> tuple[int, str]:
    """Run a command in a folder; its exit code, and all that it printed.

    It sends nothing to a tracker, compiles nothing, and has one thread, so that it
    starts fast and does not wait for other processes.

    Raises:
        AssertionError: it had not ended after timeout_s seconds.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "WANDB_MODE": "disabled",
        "TRACKIO_DIR": str(folder / ".trackio"),
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            [*map(str, words)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")
        raise AssertionError(
            f"the script had not ended after {timeout_s:g} s: set OPTIONS to less data"
            f" or a smaller model. It printed:\n{printed}"
        ) from None
    return done.returncode, done.stdout


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def name_some(names: Iterable[str], limit: int = 8) -> str:
    """Names, one a line, and how many more there are."""
    names = list(names)
    rows = [f"  {name}" for name in names[:limit]]
    rows += [f"  and {len(names) - limit} more"] if len(names) > limit else []
    return "\n".join(rows)


def train_on_one_batch(
    model: nn.Module,
    compute_loss: Callable[..., tuple[torch.Tensor, Any]],
    batch: tuple[Any, Any],
    steps: int,
    learning_rate: float,
    enough: float = 0.0,
) -> list[float]:
    """AdamW steps on one batch; the loss of each.

    Args:
        enough: ends early at a loss of this share of the first one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(model, *batch)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] <= enough * losses[0]:
            break
    return losses
