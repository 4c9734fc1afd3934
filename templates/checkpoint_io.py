"""Section 7, saving and loading: atomic, durable, verified, and exact on resume.

    save_checkpoint(model, optimizer, epoch, "last.pt", best_loss=0.31)
    checkpoint = load_checkpoint("last.pt", model, optimizer, device)

Exact resume needs every part that holds state, and every random number generator:

    run = RunState(epoch=0, step=0)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "run": run}
    resume_training_state(folder, parts, device)  # does nothing the first time
    save_training_state(folder, run.step, parts)

The same while training goes on, blocked only while the state is copied:

    # RankStateSaver with DDP, ShardedStateSaver with FSDP2
    with StateSaver(folder, parts) as saver:
        saver.resume(device)
        ...
        saver.save(run.step)
"""

import collections
import contextlib
import dataclasses
import enum
import functools
import glob
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; names the file and remedy."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint file that is incomplete, or whose bytes have changed."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that a crash leaves either the old one or the new one, whole.

    `torch.save` alone truncates the good file first. Here: a temporary file in the same
    folder, flushed to the disk, then renamed over `path`; then those that killed
    processes have left of it are removed. Only one process may write a file at a time.

    Raises:
        CheckpointError: the disk refused; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the disk's refusal behind an error of its zip writer.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({reason}); what was there before is"
            " unchanged: free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, or never made
            temporary.unlink()
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system has a way to."""
    with contextlib.suppress(OSError):  # Windows and some network file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ChecksumWriter:
    """A binary file that keeps the CRC-32 of all that is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.crc = 0

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


# The checksum travels in the comment that every zip file may end with, so that it
# cannot get lost or out of step, and torch.load reads the file as any other.
CHECKSUM_LABEL = b"crc32:"
CHECKSUM_SIZE = len(CHECKSUM_LABEL) + 8


def format_checksum(crc: int) -> bytes:
    """The last bytes of a checkpoint file: the length of the comment, the comment."""
    return CHECKSUM_SIZE.to_bytes(2, "little") + CHECKSUM_LABEL + b"%08x" % crc


def write_checkpoint_file(state: Any, path: Path) -> None:
    """`torch.save`, but atomic, durable, with a checksum, and loadable as weights only.

    Raises:
        CheckpointError: the disk refused; what was at `path` is still there.
        TypeError: `state` holds an object that would not load safely.
    """
    state = to_loadable(state)

    def write(file: BinaryIO) -> None:
        checked = ChecksumWriter(file)
        torch.save(state, checked)
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
        file.write(format_checksum(checked.crc))

    write_atomically(path, write)


def _find_damaged_record(path: Path) -> str | None:
    """Return the first record that fails its checksum, or raise BadZipFile."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch leaves a record that is marked as a folder (16) uninitialised.
            marked = [i.filename for i in archive.infolist() if i.external_attr & 16]
            return archive.testzip() or next(iter(marked), None)
    except Exception as error:  # zipfile has a dozen kinds for a damaged file
        raise zipfile.BadZipFile(str(error)) from error


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if it is whole.

    A flipped bit can load without an error, so every byte is compared with the
    checksum; in a file that `torch.save` wrote, with those of the zip records.
    """
    with open(path, "rb") as file:
        left = file.seek(0, os.SEEK_END) - 2 - CHECKSUM_SIZE
        file.seek(max(0, left))
        ending = file.read()
        if CHECKSUM_LABEL in ending:
            file.seek(0)
            crc = 0
            while left > 0 and (block := file.read(min(left, 1 << 22))):
                crc, left = zlib.crc32(block, crc), left - len(block)
            intact = ending == format_checksum(zlib.crc32(b"\0\0", crc))
            return None if intact else "its checksum does not match"
    try:
        record = _find_damaged_record(path)
    except zipfile.BadZipFile as error:
        return f"it is not a complete checkpoint file ({error})"
    return f"its record {record} does not match its checksum" if record else None


def read_checkpoint_file(path: Path, device: torch.device | None = None) -> Any:
    """What `write_checkpoint_file` or `torch.save` wrote; runs no code from the file.

    Raises:
        CheckpointError: missing, damaged (DamagedCheckpointError), or holding objects
            other than plain values.
    """
    try:
        damage = find_damage(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if damage:
        raise DamagedCheckpointError(
            f"{path}: {damage}: use an older checkpoint or a copy of this one"
        )
    return load_plain_values(path, device)


def load_plain_values(
    path: Path, device: torch.device | None = None, mmap: bool = False
) -> Any:
    """A checkpoint file's content, unchecked; runs no code from the file.

    Args:
        mmap: leave tensors in the file until they are read; for the CPU.
    """
    try:
        return torch.load(
            path, map_location=device or "cpu", weights_only=True, mmap=mmap
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects, which could run code, so they are not"
            " loaded: save it again with save_checkpoint where it was written"
        ) from error
    except torch.OutOfMemoryError:
        raise  # says nothing about the file
    except Exception as error:  # another kind of zip file, ...
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from error


def to_loadable(
    value: Any, convert_tensor: Callable[[torch.Tensor], Any] | None = None
) -> Any:
    """`value` with only what `torch.load(weights_only=True)` accepts.

    NumPy scalars and arrays become numbers and tensors; paths, enum members,
    dataclasses, deques and named tuples plain values. A tensor that is a slice is
    cloned: saving it would write the whole storage that it looks into. Containers are
    new ones, so that the result does not change when the original does.

    Args:
        convert_tensor: what to put in each tensor's place.

    Raises:
        TypeError: for anything else, naming its type.
    """
    if isinstance(value, torch.Tensor):
        if convert_tensor is not None:
            return convert_tensor(value)
        plain = type(value) in (torch.Tensor, nn.Parameter)
        if plain and value.layout is torch.strided:
            used = value.numel() * value.element_size()
            if value.untyped_storage().nbytes() > used:
                return value.detach().clone()
        return value
    if isinstance(value, enum.Enum):
        return to_loadable(value.value)
    for plain_type in (bool, int, float, complex, str, bytes):
        if isinstance(value, plain_type):  # np.float64 is a float, but not a plain one
            return plain_type(value)
    if value is None or isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return value
    convert = functools.partial(to_loadable, convert_tensor=convert_tensor)
    if isinstance(value, Mapping):
        items = ((convert(key), convert(item)) for key, item in value.items())
        if not isinstance(value, collections.OrderedDict):
            return dict(items)
        converted = collections.OrderedDict(items)
        vars(converted).update(vars(value))  # a state_dict's module versions
        return converted
    if isinstance(value, (tuple, list, set, collections.deque)):
        kind = next((k for k in (tuple, set) if isinstance(value, k)), list)
        return kind(convert(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: convert(getattr(value, name)) for name in names}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and value.ndim == 0:
        return to_loadable(value.item())
    if type(value).__module__ == "numpy":
        return torch.tensor(value.copy())  # a view may have strides unknown to torch
    raise TypeError(
        f"a {type(value).__name__} cannot be saved in a checkpoint that loads safely:"
        " save its plain values (numbers, text, lists, dicts, tensors)"
    )


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and (Distributed)DataParallel."""
    if hasattr(model, "_orig_mod"):
        return unwrap_model(model._orig_mod)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap_model(model.module)
    return model


def in_process_group() -> bool:
    """Whether this process is a rank, which has to agree with others."""
    return dist.is_available() and dist.is_initialized()


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole weights of a sharded model (FSDP2) on rank 0's CPU, None elsewhere.

    Every rank has to call it; one tensor at a time is whole on the device. Of other
    models it is what their state_dict holds, on rank 0 or without ranks.
    """
    is_writer = not in_process_group() or dist.get_rank() == 0
    weights = unwrap_model(model).state_dict(keep_vars=True)
    gathered: dict[int, torch.Tensor | None] = {}
    for name, tensor in weights.items():
        if hasattr(tensor, "full_tensor"):
            if id(tensor) not in gathered:  # a tied weight is gathered once
                whole = tensor.full_tensor()
                gathered[id(tensor)] = whole.cpu() if is_writer else None
            weights[name] = gathered[id(tensor)]
        elif isinstance(tensor, torch.Tensor):
            weights[name] = tensor.detach()
    return weights if is_writer else None


def save_checkpoint(
    model: nn.Module | Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
    epoch: int,
    path: str,
    **kwargs: Any,
) -> None:
    """Save weights, optimizer state, the epoch and any further values in one file.

    Atomic and durable: a crash leaves the file that was there before. `load_checkpoint`
    gives `epoch` and the further values back.

    Args:
        model: the model, or the weights that `full_state_dict` collected of a sharded
            one (then without an optimizer).

    Raises:
        CheckpointError: the disk refused; what was at `path` is still there.
        TypeError: a further value that would not load safely, such as an object.
        ValueError: a further value has the name of one of the checkpoint's own parts.
    """
    if isinstance(model, nn.Module):
        model = unwrap_model(model)
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    checkpoint = {"epoch": epoch, "model_state_dict": weights}
    if optimizer is not None:
        checkpoint["optimizer_state_dict"] = optimizer.state_dict()
        checkpoint["optimizer_parameters"] = name_parameters(model, optimizer)
    if clash := sorted(checkpoint.keys() & kwargs.keys()):
        raise ValueError(f"{', '.join(clash)} is saved already: choose another name")
    write_checkpoint_file({**checkpoint, **kwargs}, Path(path))


def load_checkpoint(
    path: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    device: torch.device | None = None,
) -> dict:
    """Load what `save_checkpoint` saved into `model` and `optimizer`.

    Nothing is changed unless all of it fits. Wrappers (`torch.compile`, DataParallel,
    DistributedDataParallel) may differ between the saved model and this one.

    Args:
        device: where the tensors of the result go, by default the CPU; the model's
            stay where they are.

    Returns:
        The whole checkpoint: `epoch`, the state dicts, and the further values.

    Raises:
        CheckpointError: missing or damaged file, missing or unexpected weights, other
            shapes, an optimizer over other parameters; each of them named.
    """
    checkpoint = read_checkpoint_file(Path(path), device)
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path}: has no 'model_state_dict': it was not written by save_checkpoint"
        )
    model = unwrap_model(model)
    weights = checkpoint["model_state_dict"]
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of another program's file
        if model.state_dict().keys().isdisjoint(weights):
            strip = nn.modules.utils.consume_prefix_in_state_dict_if_present
            strip(weights, prefix)
    problems = compare_weights(model, weights)
    optimizer_state = optimizer and checkpoint.get("optimizer_state_dict")
    if optimizer_state:
        saved_names = checkpoint.get("optimizer_parameters")
        # Its state is matched by position: another order would load without an error.
        if saved_names not in (None, name_parameters(model, optimizer)):
            problems.append("the optimizer was built over other parameters")
    try:
        if problems:
            raise ValueError("; ".join(problems))
        if optimizer_state:  # first: it refuses other groups before it changes anything
            optimizer.load_state_dict(optimizer_state)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: does not fit: {error}: build the model and the optimizer as they"
            " were when it was saved"
        ) from error
    model.load_state_dict(weights)
    return checkpoint


def compare_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps `weights` from being loaded into `model`; an empty list if nothing."""
    own = model.state_dict()
    findings = {
        "the file lacks": [name for name in own if name not in weights],
        "the model lacks": [name for name in weights if name not in own],
        "other shapes:": [
            f"{name} {tuple(weights[name].shape)} in the file, {tuple(here.shape)} here"
            for name, here in own.items()
            if name in weights
            and isinstance(here, torch.Tensor)
            and here.shape != weights[name].shape
        ],
    }
    return [
        f"{title} {', '.join(names[:5])}"
        + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for title, names in findings.items()
        if names
    ]


def name_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups, in its order."""
    weights = model.state_dict(keep_vars=True)  # wrappers leave no trace in its names
    names = {id(parameter): name for name, parameter in weights.items()}
    return [
        [names.get(id(parameter), "?") for parameter in group["params"]]
        for group in optimizer.param_groups
    ]


def capture_rng_state() -> dict[str, Any]:
    """The state of every global random number generator: Python, NumPy, torch, GPUs.

    NumPy only where something has imported it already.
    """
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        state["numpy"] = to_loadable(numpy.random.get_state())
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `capture_rng_state` returned, as far as this machine has it."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())  # map_location may have moved it
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.cpu().numpy(), *rest))
    if "cuda" in state and torch.cuda.is_available():
        for index, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(saved.cpu(), index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


def capture_training_state(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The state of all parts and random number generators, as it is now."""
    return {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "rng": capture_rng_state(),
    }


def write_training_state(
    folder: Path, step: int, state: Any, parts: Mapping[str, Any], keep: int
) -> Path:
    """Write what `capture_training_state` returned; remove all but the newest `keep`.

    What the state counts on, such as the log's lines, reaches the disk before it.
    """
    path = folder / f"step-{step:08d}.pt"
    for part in parts.values():
        if hasattr(part, "make_durable"):
            part.make_durable()
    write_checkpoint_file(state, path)
    for old in list_training_states(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def save_training_state(
    folder: Path,
    step: int,
    parts: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Save all that an exact resume needs as `folder/step-00000120.pt`.

    Args:
        step: the file's number; the highest is the newest.
        parts: name -> anything with state_dict() and load_state_dict().
        keep: how many of the newest files stay. Two, so that one is left if the
            newest turns out to be damaged.

    Raises:
        CheckpointError: the disk refused; the older files are still there.
    """
    return write_training_state(
        folder, step, capture_training_state(parts), parts, keep
    )


def list_training_states(folder: Path) -> list[Path]:
    """The files of `save_training_state`, the oldest first."""
    return sorted(folder.glob("step-*.pt"))


def read_newest_training_state(
    folder: Path,
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole file of `save_training_state` and its content, None without any.

    A damaged one is reported, renamed to `.damaged` and the one before it is taken.

    Raises:
        CheckpointError: all files are damaged, or the newest cannot be read.
    """
    for leftover in folder.glob(".step-*.pt.*.tmp"):  # of a process killed while saving
        leftover.unlink(missing_ok=True)
    paths = list_training_states(folder)
    for path in reversed(paths):
        try:
            return path, read_checkpoint_file(path, device)
        except DamagedCheckpointError as error:
            renamed = path.replace(path.with_name(path.name + ".damaged"))
            report(
                f"{error}\nrenamed to {renamed.name}; going on with the one before it"
            )
    if paths:
        raise CheckpointError(
            f"{folder}: every checkpoint in it is damaged: restore one from a backup,"
            " or start again in another folder"
        )
    return None


def load_training_state(
    states: Mapping[str, Any], parts: Mapping[str, Any], path: Path
) -> None:
    """Load each part's saved state into it.

    Raises:
        CheckpointError: the parts differ from the saved ones; names the file `path`.
    """
    try:
        if differing := sorted(states.keys() ^ parts.keys()):
            raise ValueError(f"only one of them has {', '.join(differing)}")
        for name, part in parts.items():
            part.load_state_dict(states[name])
            # The optimizer's state goes by position, so the order counts as well.
            if isinstance(part, nn.Module) and [*part.state_dict()] != [*states[name]]:
                raise ValueError(f"the weights of {name} come in another order")
    except torch.OutOfMemoryError:
        raise  # says nothing about the file
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not fit this script ({' '.join(str(error).split())}):"
            " resume with the one that wrote it, or start again in another folder"
        ) from error


def resume_training_state(
    folder: Path,
    parts: Mapping[str, Any],
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> Path | None:
    """Load the newest whole file of `save_training_state` into `parts`.

    A damaged one is reported, renamed to `.damaged` and the one before it is taken.

    Returns:
        The file that was loaded, None where nothing was saved yet.

    Raises:
        CheckpointError: all files are damaged, or the parts differ from the saved ones.
    """
    found = read_newest_training_state(folder, device, report)
    if found is None:
        return None
    path, saved = found
    load_training_state(saved["parts"], parts, path)
    restore_rng_state(saved["rng"])
    return path


class HostBuffers:
    """Main memory that a state's tensors are copied into; kept for the next time.

    Pinned for tensors on a GPU, whose copies then run together at the bus's full speed.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[tuple, torch.Tensor]] = []

    def copy_state(self, state: Any) -> Any:
        """`state` as plain values that share nothing with the original.

        The tensors in it are valid until the next call. Tied tensors stay tied.

        Raises:
            TypeError: `state` holds an object that would not load safely.
        """
        free: dict[tuple, list[torch.Tensor]] = {}
        for layout, buffer in self._buffers:
            free.setdefault(layout, []).append(buffer)
        copied: dict[tuple, tuple[tuple, torch.Tensor]] = {}

        def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach()
            if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
                return tensor.to("cpu", copy=True)
            layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cuda)
            key = (tensor.device, tensor.data_ptr(), *layout)
            if key not in copied:
                if free.get(layout):
                    buffer = free[layout].pop()
                else:
                    buffer = torch.empty_like(
                        tensor, device="cpu", pin_memory=tensor.is_cuda
                    )
                buffer.copy_(tensor, non_blocking=True)
                copied[key] = layout, buffer
            return copied[key][1]

        result = to_loadable(state, copy_tensor)
        for device in {key[0] for key in copied}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._buffers = list(copied.values())
        return result


@dataclasses.dataclass(eq=False, repr=False)
class StateSaver:
    """`save_training_state` in the background, for one process.

        with StateSaver(folder, parts) as saver:
            saver.resume(device)
            ...
            saver.save(step)

    `save` returns as soon as the state is copied; a thread serialises, checksums and
    writes it, whole or not at all. Costs main memory for one copy of the state. What
    the thread could not do is raised by the next `save` or `wait`, or on leaving the
    context.

    Args:
        folder, parts, keep: as for `save_training_state`.
    """

    folder: Path
    parts: Mapping[str, Any]
    keep: int = 2
    report: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self._buffers = HostBuffers()
        self._writing: Future | None = None

    def resume(self, device: torch.device | None = None) -> Path | None:
        """Load the newest whole file, as `resume_training_state` does."""
        self.wait()
        path = resume_training_state(self.folder, self.parts, device, self.report)
        if path is not None:
            self.report(f"going on from {path}")
        return path

    def save(self, step: int) -> None:
        """Copy the state, and write it while training goes on.

        Waits until the save before is written: there is one copy of the state.

        Raises:
            CheckpointError: the disk refused the save before this one.
            TypeError: a part's state holds an object that would not load safely.
        """
        self.wait()
        state = self._buffers.copy_state(capture_training_state(self.parts))
        self._write(step, state)

    def _write(self, step: int, state: Any) -> None:
        self._start(
            lambda: write_training_state(
                self.folder, step, state, self.parts, self.keep
            )
        )

    def _start(self, write: Callable[[], Any]) -> None:
        # No daemon: the interpreter does not end before the file is whole.
        pool = ThreadPoolExecutor(1, "StateSaver")
        self._writing = pool.submit(write)
        pool.shutdown(wait=False)

    def _finish(self) -> BaseException | None:
        """Return, when the last save has ended, what kept it from the disk."""
        if self._writing is None:
            return None
        error = self._writing.exception()
        self._writing = None
        return error

    def wait(self) -> None:
        """Return when the last save is safely on the disk; raise what kept it."""
        if (error := self._finish()) is not None:
            raise error

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc is None:
            self.wait()
        elif error := self._finish():
            self.report(f"the last save failed: {error}")  # the first error says more


def run_on_rank_zero(action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, on every rank; its error is everyone's too.

    Raises:
        CheckpointError: rank 0's action raised one; nobody waits for it in vain.
    """
    if not in_process_group():
        return action()
    result = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = action()
        except CheckpointError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise CheckpointError(result[1])
    return result[0]


def run_on_all_ranks(action: Callable[[], Any]) -> Any:
    """What `action` returns here, once it has succeeded on every rank.

    Raises:
        CheckpointError: it raised one on some rank; no other goes on alone.
    """
    if not in_process_group():
        return action()
    result, failure = None, None
    try:
        result = action()
    except CheckpointError as error:
        failure = f"rank {dist.get_rank()}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if first := next(filter(None, failures), None):
        raise CheckpointError(first)
    return result


@dataclasses.dataclass(eq=False, repr=False)
class RankStateSaver(StateSaver):
    """`StateSaver` for several processes that hold the same state (DDP).

    Every rank calls every method. Rank 0 copies and writes, one file for all; in it are
    the random number generators of every rank. On resume rank 0 picks the newest whole
    file, and only rank 0 renames or removes files; all ranks read that one, so `folder`
    has to be one that all of them see. Without a process group it is a StateSaver.

    A file of another number of ranks is taken: weights, optimizer and counters go on
    exactly, but the random numbers (dropout) are others; this is reported.

    Args:
        folder, parts, keep: as for `save_training_state`.
        rank_parts: names of the parts that differ between ranks, such as a loss that
            each rank sums up for itself; each rank gets its own back.
    """

    rank_parts: Collection[str] = ()

    def resume(self, device: torch.device | None = None) -> Path | None:
        """Load on every rank the file that rank 0 finds to be the newest whole one.

        Raises:
            CheckpointError: on every rank, if any cannot go on.
        """
        if not in_process_group():
            return super().resume(device)
        self.wait()
        found = None

        def find() -> str | None:
            nonlocal found
            found = read_newest_training_state(self.folder, device, self.report)
            return found and found[0].name

        name = run_on_rank_zero(find)
        if name is None:
            return None
        path = self.folder / name
        run_on_all_ranks(lambda: self._load(path, found, device))
        if dist.get_rank() == 0:
            self.report(f"going on from {path}")
        return path

    def _load(self, path: Path, found: Any, device: torch.device | None) -> None:
        saved = found[1] if found else read_checkpoint_file(path, device)
        ranks = saved.get("ranks", [{"rng": saved["rng"], "parts": {}}])
        rank, states = dist.get_rank(), dict(saved["parts"])
        if rank < len(ranks):
            states |= ranks[rank]["parts"]
        load_training_state(states, self.parts, path)
        if rank < len(ranks):
            restore_rng_state(ranks[rank]["rng"])
        if rank == 0 and len(ranks) != dist.get_world_size():
            self.report(
                f"{path}: saved by {len(ranks)} rank(s), now {dist.get_world_size()}:"
                " weights and optimizer go on exactly, random numbers (dropout) differ"
            )

    def save(self, step: int) -> None:
        """Collect the ranks' own states, copy rank 0's, write while training goes on.

        Raises:
            CheckpointError: on every rank, the disk refused the save before this one.
            TypeError: a part's state holds an object that would not load safely.
        """
        if not in_process_group():
            return super().save(step)
        run_on_all_ranks(self.wait)
        own = {name: self.parts[name] for name in self.rank_parts}
        is_writer = dist.get_rank() == 0
        state = capture_training_state(self.parts if is_writer else own)
        state = self._buffers.copy_state(state)
        mine = {
            "rng": state["rng"],
            "parts": {name: state["parts"][name] for name in own},
        }
        packed = io.BytesIO()  # tensors travel as torch.save writes them
        torch.save(mine, packed)
        ranks = [None] * dist.get_world_size() if is_writer else None
        dist.gather_object(packed.getvalue(), ranks)
        if is_writer:
            ranks = [torch.load(io.BytesIO(b), weights_only=True) for b in ranks]
            self._write(step, {**state, "ranks": ranks})
        return None


def describe_shard(tensor: Any) -> dict[str, Any]:
    """A sharded tensor (DTensor of FSDP2 or HSDP) as plain values: shape, place, shard.

    Of ranks that hold the same shard only the first one's has the values.

    Raises:
        ValueError: it is sharded over another than the last dimension of its mesh.
    """
    *others, last = tensor.placements
    if any(not p.is_replicate() for p in others) or last.is_partial():
        raise ValueError(
            f"a tensor with placements {tensor.placements} cannot be saved: only those"
            " of FSDP2 (one mesh dimension) and HSDP (replicate, shard) can"
        )
    (chunk,) = tensor.__create_chunk_list__()
    place = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    is_first = all(at == 0 for at, placement in place if placement.is_replicate())
    return {
        "shape": tuple(tensor.shape),
        "dtype": tensor.dtype,
        "dim": last.dim if last.is_shard() else None,
        "offset": tuple(chunk.offsets),
        "values": tensor.to_local() if is_first else None,
    }


def assemble_shard(pieces: list[dict[str, Any]], mesh: Any) -> torch.Tensor:
    """This rank's shard of a tensor, from the shards that other ranks described."""
    from torch.distributed.tensor import Replicate, Shard, empty

    first = pieces[0]
    placements = [Replicate()] * mesh.ndim
    if first["dim"] is not None:
        placements[-1] = Shard(first["dim"])
    result = empty(
        *first["shape"], dtype=first["dtype"], device_mesh=mesh, placements=placements
    )
    (chunk,) = result.__create_chunk_list__()
    target = result.to_local()
    for piece in pieces:
        if piece["values"] is not None:
            copy_overlap(target, chunk.offsets, piece["values"], piece["offset"])
    return result


def copy_overlap(
    target: torch.Tensor,
    target_offset: Sequence[int],
    source: torch.Tensor,
    source_offset: Sequence[int],
) -> None:
    """Copy what two boxes of one tensor have in common; offsets are their corners."""
    inside_target, inside_source = [], []
    for here, there, size, other_size in zip(
        target_offset, source_offset, target.shape, source.shape, strict=True
    ):
        start, stop = max(here, there), min(here + size, there + other_size)
        if start >= stop:
            return
        inside_target.append(slice(start - here, stop - here))
        inside_source.append(slice(start - there, stop - there))
    target[tuple(inside_target)].copy_(source[tuple(inside_source)])


SHARD_LABEL = "sharded tensor"  # stands, with a number, where a sharded tensor was


def put_shards_back(
    value: Any, shards: Callable[[int], torch.Tensor], device: torch.device | None
) -> Any:
    """A loaded state with its sharded tensors in their places, the others on `device`.

    Other tensors are copied: they are views of a file.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device or "cpu", copy=True)
    if isinstance(value, dict):
        if value.keys() == {SHARD_LABEL}:
            return shards(value[SHARD_LABEL])
        for key in value:  # in place: an OrderedDict carries module versions
            value[key] = put_shards_back(value[key], shards, device)
        return value
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(put_shards_back(item, shards, device) for item in value)
    return value


def list_sharded_states(folder: Path) -> list[Path]:
    """The folders of `ShardedStateSaver`, the oldest first."""
    folders = (path for path in folder.glob("step-*") if path.is_dir())
    return sorted(path for path in folders if path.suffix != ".damaged")


def name_rank_files(count: int) -> list[str]:
    """The files of a state that `count` ranks saved."""
    return [f"rank-{rank:05d}-of-{count:05d}.pt" for rank in range(count)]


def find_damaged_shard(folder: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with this rank's part of a saved state's files, None if nothing.

    Each of `ranks` checks every `ranks`-th file, so that together they read it once.
    """
    names = sorted(path.name for path in folder.glob("rank-*-of-*.pt"))
    expected = name_rank_files(int(names[0][-8:-3])) if names else ["rank-00000"]
    if missing := sorted(set(expected) - set(names)):
        return f"{folder}: lacks {missing[0]}"
    for name in expected[rank::ranks]:
        try:
            damage = find_damage(folder / name)
        except OSError as error:
            damage = f"cannot be read ({error.strerror})"
        if damage:
            return f"{folder / name}: {damage}"
    return None


class ShardedStateSaver(StateSaver):
    """`StateSaver` for sharded models and optimizers (FSDP2, HSDP).

    Every rank calls every method, and makes one at the same place: it holds a group of
    its own. Each rank copies its shards and writes them in the background to
    `folder/step-00000120/rank-00000-of-00002.pt`; when all have, rank 0 renames the
    folder, so that it is there whole or not at all. On resume all ranks check the
    files together; rank 0 renames a damaged folder, and all take the one before it.

    On as many ranks a run goes on to the bit; each rank gets back all of its own. On
    another number, or with other replicas, weights and optimizer are equal, the random
    numbers (dropout) are not; this is reported.

    Why not the files of `torch.distributed.checkpoint`: their `.metadata` and whatever
    is no tensor are pickles, which run code when loaded, and have no checksum; its
    safetensors format holds tensors only. These are weights-only files with one.

    Args:
        folder: one that every rank sees.
        parts, keep: as for `save_training_state`; one part is the sharded model.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._group = dist.new_group(backend="gloo")  # the writing thread's

    def save(self, step: int) -> None:
        """Copy this rank's shards, and write them while training goes on.

        Raises:
            CheckpointError: on every rank, the save before this one failed on some.
            TypeError: a part's state holds an object that would not load safely.
        """
        run_on_all_ranks(self.wait)
        shards: list[dict[str, Any]] = []

        def convert(tensor: torch.Tensor) -> Any:
            if not hasattr(tensor, "device_mesh"):
                return tensor
            shards.append(describe_shard(tensor))
            return {SHARD_LABEL: len(shards) - 1}

        state = to_loadable(capture_training_state(self.parts), convert)
        state = self._buffers.copy_state({**state, "shards": shards})
        self._start(lambda: self._write_shards(step, state))

    def _write_shards(self, step: int, state: Any) -> None:
        rank, names = dist.get_rank(), name_rank_files(dist.get_world_size())
        temporary = self.folder / f".step-{step:08d}.tmp"
        try:
            for part in self.parts.values():
                if rank == 0 and hasattr(part, "make_durable"):
                    part.make_durable()
            write_checkpoint_file(state, temporary / names[rank])
        except Exception:
            self._fail_together(True)
            raise
        self._fail_together(False)
        if rank == 0:
            try:
                self._publish(step, temporary, names)
            except OSError as error:
                self._fail_together(True)
                raise CheckpointError(
                    f"{temporary}: cannot be renamed ({error})"
                ) from error
        self._fail_together(False)

    def _fail_together(self, failed_here: bool) -> None:
        failed = torch.tensor(int(failed_here))
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        if failed and not failed_here:
            raise CheckpointError(
                f"{self.folder}: another rank could not write its shards; what was"
                " saved before is unchanged: see that rank's error"
            )

    def _publish(self, step: int, temporary: Path, names: list[str]) -> None:
        for stray in temporary.iterdir():  # of a killed run with other ranks
            if stray.name not in names:
                stray.unlink()
        path, number = self.folder / f"step-{step:08d}", 1
        while path.exists():  # saved before at this step: that one stays, for now
            number += 1
            path = self.folder / f"step-{step:08d}-{number:02d}"
        temporary.rename(path)
        sync_folder(self.folder)
        for old in list_sharded_states(self.folder)[: -self.keep]:
            removed = old.rename(old.with_name(f".{old.name}.tmp"))  # or half of it
            shutil.rmtree(removed, ignore_errors=True)

    def resume(self, device: torch.device | None = None) -> Path | None:
        """Load the newest whole folder, the same on every rank.

        Raises:
            CheckpointError: on every rank, if any cannot go on.
        """
        self.wait()
        damage = None

        def choose() -> str | None:
            if damage:
                broken = list_sharded_states(self.folder)[-1]
                renamed = broken.rename(broken.with_name(broken.name + ".damaged"))
                self.report(
                    f"{damage}\nrenamed to {renamed.name}; going on with the one before"
                )
            for leftover in self.folder.glob(".step-*.tmp"):  # of a killed run
                shutil.rmtree(leftover, ignore_errors=True)
            paths = list_sharded_states(self.folder)
            if damage and not paths:
                raise CheckpointError(
                    f"{self.folder}: every checkpoint in it is damaged: restore one"
                    " from a backup, or start again in another folder"
                )
            return paths[-1].name if paths else None

        while name := run_on_rank_zero(choose):
            path = self.folder / name
            findings: list[str | None] = [None] * dist.get_world_size()
            finding = find_damaged_shard(path, dist.get_rank(), len(findings))
            dist.all_gather_object(findings, finding)
            damage = next(filter(None, findings), None)
            if damage is None:
                run_on_all_ranks(lambda path=path: self._load(path, device))
                if dist.get_rank() == 0:
                    self.report(f"going on from {path}")
                return path
        return None

    def _load(self, path: Path, device: torch.device | None) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        files = sorted(path.glob("rank-*-of-*.pt"))
        # Mapped: of the other ranks' files only what this rank needs is read.
        states = [load_plain_values(file, mmap=True) for file in files]
        meshes = [
            parameter.device_mesh
            for part in self.parts.values()
            if isinstance(part, nn.Module)
            for parameter in part.parameters()
            if hasattr(parameter, "device_mesh")
        ]
        if not meshes:
            raise CheckpointError(f"{path}: none of the parts is a sharded model")

        def make_shard(number: int) -> torch.Tensor:
            return assemble_shard([s["shards"][number] for s in states], meshes[0])

        own = states[rank if rank < len(states) else 0]
        parts = put_shards_back(own["parts"], make_shard, device)
        load_training_state(parts, self.parts, path)
        if rank < len(states):
            restore_rng_state(own["rng"])
        if rank == 0 and len(states) != ranks:
            self.report(
                f"{path}: saved by {len(states)} rank(s), now {ranks}: weights and"
                " optimizer are equal, random numbers (dropout) differ"
            )


def append_jsonl(path: Path, step: int, values: Mapping[str, Any]) -> None:
    """Add `{"step": step, ...}` as a line to a file: a killed process loses none.

    NaN and infinity, which JSON has not, become null.
    """
    record = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in {"step": step, **values}.items()
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class LogPosition:
    """The length of a log file, as a part of the training state.

    On resume the log is cut back to what it held at the checkpoint, so that a line
    never comes twice. Of several ranks only rank 0 cuts it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def state_dict(self) -> dict[str, int]:
        """The length in bytes."""
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0}

    def make_durable(self) -> None:
        """Return when the lines are safely on the disk: before the state that counts
        on them is written."""
        if self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut the log back to `state["bytes"]`."""
        if in_process_group() and dist.get_rank() > 0:
            return
        if self.path.exists() and self.path.stat().st_size > state["bytes"]:
            os.truncate(self.path, state["bytes"])


class RunState(types.SimpleNamespace):
    """Counters and figures of a run, as a part of the training state.

    run = RunState(epoch=0, step=0)
    run.step += 1
    """

    def state_dict(self) -> dict[str, Any]:
        """The values by name."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values over."""
        vars(self).update(state)
