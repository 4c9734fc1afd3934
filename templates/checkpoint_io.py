"""Section 7, saving and loading: atomic, durable, verified, and exact on resume.

    save_checkpoint(model, optimizer, epoch, "last.pt", best_loss=0.31)
    checkpoint = load_checkpoint("last.pt", model, optimizer, device)

Exact resume needs every part that holds state, and every random number generator:

    run = RunState(epoch=0, step=0)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "run": run}
    resume_training_state(folder, parts, device)  # does nothing the first time
    save_training_state(folder, run.step, parts)
"""

import collections
import contextlib
import dataclasses
import enum
import json
import math
import os
import pickle
import random
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; names the file and remedy."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint file that is incomplete, or whose bytes have changed."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that a crash leaves either the old one or the new one, whole.

    `torch.save` alone truncates the good file first. Here: a temporary file in the same
    folder, flushed to the disk, then renamed over `path`.

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
        with zipfile.ZipFile(path) as archive:
            # torch leaves a record that is marked as a folder (16) uninitialised.
            marked = [i.filename for i in archive.infolist() if i.external_attr & 16]
            record = archive.testzip() or next(iter(marked), None)
    except Exception as error:  # zipfile has a dozen kinds for a damaged file
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
    try:
        return torch.load(path, map_location=device or "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects, which could run code, so they are not"
            " loaded: save it again with save_checkpoint where it was written"
        ) from error
    except Exception as error:  # another kind of zip file, too little memory, ...
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from error


def to_loadable(value: Any) -> Any:
    """`value` with only what `torch.load(weights_only=True)` accepts.

    NumPy scalars and arrays become numbers and tensors; paths, enum members,
    dataclasses, deques and named tuples plain values. A tensor that is a slice is
    cloned: saving it would write the whole storage that it looks into.

    Raises:
        TypeError: for anything else, naming its type.
    """
    if isinstance(value, torch.Tensor):
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
    if isinstance(value, Mapping):
        items = ((to_loadable(key), to_loadable(item)) for key, item in value.items())
        if not isinstance(value, collections.OrderedDict):
            return dict(items)
        converted = collections.OrderedDict(items)
        vars(converted).update(vars(value))  # a state_dict's module versions
        return converted
    if isinstance(value, (tuple, list, set, collections.deque)):
        kind = next((k for k in (tuple, set) if isinstance(value, k)), list)
        return kind(to_loadable(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_loadable(getattr(value, name)) for name in names}
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


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    epoch: int,
    path: str,
    **kwargs: Any,
) -> None:
    """Save weights, optimizer state, the epoch and any further values in one file.

    Atomic and durable: a crash leaves the file that was there before. `load_checkpoint`
    gives `epoch` and the further values back.

    Raises:
        CheckpointError: the disk refused; what was at `path` is still there.
        TypeError: a further value that would not load safely, such as an object.
        ValueError: a further value has the name of one of the checkpoint's own parts.
    """
    model = unwrap_model(model)
    checkpoint = {"epoch": epoch, "model_state_dict": model.state_dict()}
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
    path = folder / f"step-{step:08d}.pt"
    state = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "rng": capture_rng_state(),
    }
    write_checkpoint_file(state, path)
    for old in list_training_states(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def list_training_states(folder: Path) -> list[Path]:
    """The files of `save_training_state`, the oldest first."""
    return sorted(folder.glob("step-*.pt"))


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
    for leftover in folder.glob(".step-*.tmp"):  # of a process killed while saving
        leftover.unlink(missing_ok=True)
    paths = list_training_states(folder)
    for path in reversed(paths):
        try:
            saved = read_checkpoint_file(path, device)
        except DamagedCheckpointError as error:
            renamed = path.replace(path.with_name(path.name + ".damaged"))
            report(
                f"{error}\nrenamed to {renamed.name}; going on with the one before it"
            )
            continue
        try:
            if differing := sorted(saved["parts"].keys() ^ parts.keys()):
                raise ValueError(f"only one of them has {', '.join(differing)}")
            for name, part in parts.items():
                state = saved["parts"][name]
                part.load_state_dict(state)
                # The optimizer's state goes by position, so the order counts as well.
                if isinstance(part, nn.Module) and [*part.state_dict()] != [*state]:
                    raise ValueError(f"the weights of {name} come in another order")
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: does not fit this script ({' '.join(str(error).split())}):"
                " resume with the one that wrote it, or start again in another folder"
            ) from error
        restore_rng_state(saved["rng"])
        return path
    if paths:
        raise CheckpointError(
            f"{folder}: every checkpoint in it is damaged: restore one from a backup,"
            " or start again in another folder"
        )
    return None


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON to a file, at once: a killed process loses none.

    NaN and infinity, which JSON has not, become null.
    """
    record = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class LogPosition:
    """The length of a log file, as a part of the training state.

    On resume the log is cut back to what it held at the checkpoint, so that a line
    never comes twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def state_dict(self) -> dict[str, int]:
        """The length in bytes, once they are safely on the disk."""
        if not self.path.exists():
            return {"bytes": 0}
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return {"bytes": file.tell()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut the log back to `state["bytes"]`."""
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
