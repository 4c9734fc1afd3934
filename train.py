"""Train a text classifier with mixed precision.

    python train.py         # docstrings of the standard library, by package
    python train.py --data reviews.csv --text-column review --label-column stars
    python train.py --help  # every setting and what it means

Edit build_model and build_datasets; what follows works with any.
Suffixes of tensors: B batch, T tokens, D width, C classes.

Stitched by pytorch-optimization 0.1.0 from its tested templates; the same again:
    generate-script --task text --amp -o train.py
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import enum
import importlib
import inspect
import json
import math
import os
import platform
import random
import re
import sys
import sysconfig
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import (
    Annotated,
    Any,
    BinaryIO,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

# --- Settings ------------------------------------------------------------------------

Count = Annotated[int, (1, None)]  # the lowest and highest value that is accepted
Positive = Annotated[float, (1e-9, None)]
Share = Annotated[float, (0, 1)]


@dataclass
class Config:
    """Defaults; --config FILE goes over them, the command line over both."""

    data: str = ""  # CSV, JSONL or Parquet file; empty: the built-in docstrings
    text_column: str = "text"  # column to read
    label_column: str = "label"  # column to predict
    val_fraction: Share = 0.1  # of the samples, kept for validation
    out_dir: str = "runs/text"  # for the weights, metrics.jsonl and config.json
    epochs: Count = 6
    batch_size: Count = 32  # samples per optimizer step
    learning_rate: Positive = 0.001
    weight_decay: float = 0.01  # of weight matrices only
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # auto: the fastest here
    log_every: Count = 20  # steps
    num_workers: int | None = None  # that load data; none: what suits this machine
    seed: int = 42
    cpu: bool = False  # do not use a GPU


# --- Your model and data -------------------------------------------------------------

VOCAB_SIZE = 16384  # embeddings; words share them by their hash
MAX_TOKENS = 96  # words of a text after these are left out


class TextClassifier(nn.Module):
    """Transformer encoder over the words of a text, averaged into one vector."""

    def __init__(self, classes: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, width, padding_idx=0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        padding_BT = tokens_BT == 0
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, src_key_padding_mask=padding_BT)
        x_BTD = self.norm(x_BTD).masked_fill(padding_BT.unsqueeze(-1), 0)
        mean_BD = x_BTD.sum(1) / (~padding_BT).sum(1, keepdim=True)
        return self.head(mean_BD)


def build_model(classes: int) -> nn.Module:
    """Your model: token ids of shape (B, T) to logits of shape (B, classes)."""
    return TextClassifier(classes, width=128, depth=3, dropout=0.1)


def build_datasets(
    data: str, text_column: str, label_column: str, val_fraction: float, seed: int
) -> tuple[Dataset, Dataset, list[str]]:
    """Your data: (text, class number) pairs to train and validate on; class names."""
    if data:
        columns = read_columns(data, [text_column, label_column])
        texts, labels = columns[text_column], columns[label_column]
    else:
        texts, labels = stdlib_docstrings()
    classes, numbers = number_classes(labels)
    samples = list(zip(texts, numbers, strict=True))
    return *split_samples(samples, val_fraction, seed), classes


def collate(samples: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Words hashed to token ids, 0 for padding; put your tokenizer here."""
    texts, labels = zip(*samples, strict=True)
    rows = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())[:MAX_TOKENS]
        ids = [2 + zlib.crc32(word.encode()) % (VOCAB_SIZE - 2) for word in words]
        rows.append(torch.tensor(ids or [1]))  # 1: a text without words
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(labels)


def compute_loss(
    model: nn.Module, tokens_BT: torch.Tensor, labels_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of a batch, and its logits."""
    logits_BC = model(tokens_BT)
    return F.cross_entropy(logits_BC, labels_B), logits_BC


# --- Training ------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
) -> dict[str, float]:
    """Mean loss and accuracy over a validation set."""
    model.eval()
    loss_sum, right, count = torch.zeros((), device=device), 0, 0
    for inputs, labels in move_batches(loader, device):
        with autocast():
            loss, logits_BC = compute_loss(model, inputs, labels)
        loss_sum += loss * len(labels)
        right += (logits_BC.argmax(-1) == labels).sum()
        count += len(labels)
    return {"val_loss": loss_sum.item() / count, "val_accuracy": right.item() / count}


def main() -> int:
    """Train, evaluate after each epoch, keep the best weights; the exit code."""
    config = parse_config(Config, description=__doc__)
    set_seed(config.seed, deterministic=False)
    device = get_optimal_device(force_cpu=config.cpu)
    dtype = resolve_dtype(config.dtype, device)
    autocast = partial(
        torch.autocast, device.type, dtype, enabled=dtype is not torch.float32
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    print(f"{describe_device(device)}, {dtype}", config, sep="\n")

    train_set, val_set, classes = build_datasets(
        config.data,
        config.text_column,
        config.label_column,
        config.val_fraction,
        config.seed,
    )
    print(f"{len(train_set)} samples to train on, {len(val_set)} to validate on")
    batches = ResumableBatchSampler(len(train_set), config.batch_size, config.seed)
    make_loader = partial(
        create_optimized_dataloader,
        batch_size=config.batch_size,
        device=device,
        num_workers=config.num_workers,
        collate_fn=collate,
    )
    train_loader = make_loader(train_set, batch_sampler=batches)
    val_loader = make_loader(val_set, shuffle=False)

    model = build_model(len(classes)).to(device)
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    total_steps = config.epochs * len(batches)

    out_dir = start_run(config, config.out_dir)
    log = out_dir / "metrics.jsonl"
    run = SimpleNamespace(
        epoch=0,
        step=0,
        loss_sum=torch.zeros((), device=device),  # since the last line of the log
        best={"epoch": 0, "val_loss": inf},
    )
    with TrainingDisplay(total_steps, config.batch_size) as display:
        while run.epoch < config.epochs:
            model.train()
            batches.set_epoch(run.epoch)
            for inputs, labels in move_batches(train_loader, device):
                optimizer.zero_grad(set_to_none=True)
                with autocast():
                    loss, _ = compute_loss(model, inputs, labels)
                scaler.scale(loss).backward()
                run.loss_sum += loss.detach()
                step_optimizer(optimizer, scaler)
                run.step += 1

                if run.step % config.log_every == 0:
                    mean_loss = run.loss_sum.item() / config.log_every  # waits for GPU
                    record = {
                        "step": run.step,
                        "loss": mean_loss,
                    }
                    append_jsonl(log, record)
                    display.update(**record)
                    run.loss_sum.zero_()

            run.epoch += 1
            metrics = evaluate(model, val_loader, device, autocast)
            append_jsonl(log, {"step": run.step, "epoch": run.epoch, **metrics})
            display.note(f"epoch {run.epoch}: {format_values(metrics)}")
            if metrics["val_loss"] < run.best["val_loss"]:
                run.best = {"epoch": run.epoch, **metrics}
                save_checkpoint(
                    model,
                    None,
                    run.epoch,
                    out_dir / "best.pt",
                    classes=classes,
                    config=asdict(config),
                )

    print(f"best: {format_values(run.best)}; weights in {out_dir / 'best.pt'}")
    return 0


# --- templates/config.py --------------------------------------------------------------

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and the remedy."""


def _import_yaml() -> types.ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "YAML files need PyYAML: pip install pyyaml (or use a .json file)"
        ) from error
    return yaml


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file (which needs no PyYAML).

    Raises:
        ConfigError: the file is missing, cannot be parsed or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): check --config") from None
    if path.endswith(".json"):
        load, parse_error = json.loads, ValueError
    else:
        yaml = _import_yaml()
        load, parse_error = yaml.safe_load, yaml.YAMLError
    try:
        values = load(text)
    except parse_error as error:
        raise ConfigError(f"{path}: cannot be parsed: {error}") from None
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}: write one `name: value` a line"
        )
    return values


def _read_number(value: Any) -> int | float | None:
    """A finite number, also one spelled as a string (YAML reads `2e-5` as one)."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return _read_number(kind(value))
            except ValueError:
                continue
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def convert_setting(value: Any, wanted: Any) -> Any:
    """`value` as the annotated type `wanted`; a string may spell a number or true.

    Understands bool, int, float, str, Literal, `T | None`, and bounds on a number:
    `Annotated[int, (1, None)]` is at least 1.

    Raises:
        ValueError: its message is what was expected.
    """
    if get_origin(wanted) is Annotated:
        wanted, (low, high) = get_args(wanted)
        value = convert_setting(value, wanted)
        if low is not None and value < low:
            raise ValueError(f"at least {low}")
        if high is not None and value > high:
            raise ValueError(f"at most {high}")
        return value
    if get_origin(wanted) in (Union, types.UnionType):
        if value in (None, "none", "null"):
            return None
        (wanted,) = (kind for kind in get_args(wanted) if kind is not types.NoneType)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ValueError("one of " + ", ".join(map(str, get_args(wanted))))
        return value
    number = _read_number(value)
    if wanted is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if wanted is int and number is not None and number == int(number):
        return int(number)
    if wanted is float and number is not None:
        return float(number)
    if wanted is str and isinstance(value, str):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a finite number"}
    raise ValueError(expected.get(wanted, "a text (in quotes)"))


def _close_match(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {matches[0]}?" if matches else ""


def build_config(
    config_class: type[ConfigT], values: Mapping[str, Any], source: str
) -> ConfigT:
    """An instance of a dataclass from a mapping, every value converted and checked.

    Args:
        source: where the values came from, for the message: a file, `command line`.

    Raises:
        ConfigError: unknown keys, wrong types, missing values; all in one message.
    """
    known = {field.name: field for field in fields(config_class)}
    wanted = get_type_hints(config_class, include_extras=True)
    converted: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in known:
            problems.append(f"unknown setting {name!r}{_close_match(name, known)}")
            continue
        try:
            converted[name] = convert_setting(value, wanted[name])
        except ValueError as error:
            problems.append(
                f"{name} is {value!r} ({type(value).__name__}), expected {error}"
            )
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in values:
            problems.append(f"{name} is missing and has no default")
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config_class(**converted)


def describe_fields(config_class: type) -> dict[str, str]:
    """The comment behind each field of a dataclass; {} where there is no source."""
    try:
        lines = inspect.getsource(config_class).splitlines()
    except (OSError, TypeError):
        return {}
    found = (re.match(r"\s+(\w+): [^#]*#\s*(.+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


class ConfigArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help shows every option)")


def parse_config(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> ConfigT:
    """A config dataclass from `--config FILE` and one option for each of its fields.

    The command line goes over the file, the file over the defaults; the comments behind
    the fields are the help text.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        ConfigError: unknown options (with the nearest known one), unreadable files,
            values of the wrong type.
    """
    parser = ConfigArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was really given is set
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with settings")
    wanted = get_type_hints(config_class, include_extras=True)
    comments = describe_fields(config_class)
    for field in fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        text = comments.get(field.name, "").replace("%", "%%")
        if field.default is not MISSING:
            text += f" (default: {field.default})".replace("%", "%%")
        if wanted[field.name] is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, help=text)
        else:
            choices = get_args(wanted[field.name])
            literal = get_origin(wanted[field.name]) is Literal
            metavar = "{" + ",".join(map(str, choices)) + "}" if literal else None
            parser.add_argument(flag, metavar=metavar, help=text)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + field.name.replace("_", "-") for field in fields(config_class)]
        raise ConfigError(
            f"unknown option {unknown[0]}{_close_match(unknown[0], flags)}"
            " (--help shows every option)"
        )
    options = vars(given)
    path = options.pop("config", None)
    # The file is checked by itself, so that the message says where a value is from.
    values = read_config_file(path) if path else {}
    if values:
        build_config(config_class, values, source=path)
    return build_config(config_class, {**values, **options}, source="command line")


def start_run(config: Any, out_dir: str) -> Path:
    """A new folder for a run, with its settings in config.json.

    Nothing is overwritten: where `out_dir` holds a run already, `out_dir-2` is taken.
    """
    folder, number = Path(out_dir), 1
    while (folder / "config.json").exists():
        number += 1
        folder = Path(f"{out_dir}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder / "config.json", config)
    return folder


def write_settings(path: Path, config: Any) -> None:
    """The fields of a dataclass as JSON, which `--config` reads."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


# --- templates/device_manager.py ------------------------------------------------------

DTYPE_NAMES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def get_optimal_device(force_cpu: bool = False) -> torch.device:
    """Return the best device: the CUDA GPU with the most memory, then MPS, then CPU.

    Under torchrun (LOCAL_RANK is set) each rank gets its own GPU, `cuda:LOCAL_RANK`.
    Reading a GPU's properties opens no context on it, so the GPUs that are not
    chosen keep all their memory.

    Raises:
        ValueError: LOCAL_RANK names no visible GPU.
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
            raise ValueError(
                f"LOCAL_RANK={local_rank} is outside the {count} visible device(s): "
                "set CUDA_VISIBLE_DEVICES or lower --nproc-per-node"
            )
        else:
            index = int(local_rank)
        return torch.device("cuda", index)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _has_native_bf16(device: torch.device) -> bool:
    # is_bf16_supported() asks the current device, and by default says yes to cards
    # (Turing, Volta) that emulate bf16 at a fraction of fp16's speed.
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def get_optimal_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that trains fastest: bf16 or fp16 on CUDA, else fp32.

    Autocast on MPS and on CPUs without bf16 matrix units is often slower than fp32
    (0.54 x measured on such a CPU), so both stay in fp32 unless the user asks.
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
    return (
        f"{device}: {_cpu_name()}, {torch.get_num_threads()} thread(s) on "
        f"{available_cpu_count()} usable CPU(s)"
    )


# --- templates/builtin_data.py --------------------------------------------------------

# In every Python from 3.10 to 3.14, with at least 60 docstrings each.
STDLIB_PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)


def stdlib_docstrings(
    packages: tuple[str, ...] = STDLIB_PACKAGES,
) -> tuple[list[str], list[str]]:
    """Docstrings of the standard library and the package that each comes from.

    Parsed, never imported; a docstring that stands in two places is taken once.

    Returns:
        texts and labels, of the same length, in an order that depends only on the
        Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    label_of_text: dict[str, str] = {}
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, documented) and (text := ast.get_docstring(node)):
                    label_of_text.setdefault(text, package)
    return list(label_of_text), list(label_of_text.values())


# --- templates/data_optimizer.py ------------------------------------------------------


class DataError(ValueError):
    """Bad input data: the message names the file or column and the remedy."""


def _data_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size, asking torch.distributed for what is not given."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"{rank=} and {world_size=} must be given together")
    if rank is None or world_size is None:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(), dist.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"{rank=} is outside of {world_size=}")
    return rank, world_size


def _usable_cpu_count() -> int:
    """Count the CPUs of this process: its affinity and its cgroup v2 quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity call
        cpus = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def seed_worker(worker_id: int) -> None:
    """Seed Python's and NumPy's global generators; pass it as `worker_init_fn`.

    torch itself is already seeded by the DataLoader (base seed + worker id).
    """
    worker_seed = torch.initial_seed() % 2**32
    random.seed(worker_seed)
    with contextlib.suppress(ImportError):  # torch runs without NumPy too
        importlib.import_module("numpy").random.seed(worker_seed)


def _epoch_batch_bound(k: int, rows: int, batch_size: int) -> int:
    """Return the first position of batch k, which is the end of batch k - 1.

    All batches hold `batch_size` rows; where the last would hold less than half of
    that, the last two share their rows evenly (64, 64, 3 becomes 64, 34, 33): no rank
    runs dry, and no handful of rows gets the weight of a batch.
    """
    full, tail = divmod(rows, batch_size)
    if full and k == full and 0 < 2 * tail < batch_size:
        return (full - 1) * batch_size + (batch_size + tail + 1) // 2
    return min(k * batch_size, rows)


class ResumableBatchSampler(Sampler[list[int]]):
    """Batches of indices in an order that seed and epoch alone decide.

    Every row comes once an epoch. Global batch k is the same set of rows for any
    number of ranks and workers; each rank gets its slice of it, the slices differ by
    at most one row, and all ranks take the same number of steps. To weigh ranks
    correctly use the global mean (sum of losses / rows over all ranks).

    Args:
        length: rows of the dataset.
        batch_size: rows of a global batch, over all ranks together. A last batch of
            less than half of it shares evenly with the one before, so no batch is
            shorter than half a batch.
        shuffle: False keeps the dataset's order.
        drop_last: leave out the rows that do not fill a batch.
        rank, world_size: taken from torch.distributed where not given.

    Raises:
        ValueError: if a rank would get no row of some batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if length < 0 or batch_size < 1:
            raise ValueError(
                f"{length=}, {batch_size=}: need length >= 0 and batch_size >= 1"
            )
        self.rank, self.world_size = _data_rank(rank, world_size)
        self.length = length // batch_size * batch_size if drop_last else length
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.epoch = self.start = 0
        steps = len(self)
        shortest = self._bound(steps) - self._bound(steps - 1) if steps else None
        if shortest is not None and shortest < self.world_size:
            raise ValueError(
                f"a batch of {shortest} rows ({length=}, {batch_size=}) leaves some of "
                f"the {self.world_size} ranks without a row: use a batch_size of "
                f"at least {2 * self.world_size}, drop_last=True or fewer ranks"
            )

    def _bound(self, k: int) -> int:
        return _epoch_batch_bound(k, self.length, self.batch_size)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever `set_epoch` starts."""
        return -(-self.length // self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch (counted from 0) that comes first in it."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            # Both numbers seed the generator: seed + epoch would make epoch 1 of seed
            # 0 the same as epoch 0 of seed 1.
            mixed_seed = random.Random(f"{self.seed}/{self.epoch}").getrandbits(63)
            generator = torch.Generator().manual_seed(mixed_seed)
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        for k in range(self.start, len(self)):
            low, high = self._bound(k), self._bound(k + 1)
            first = low + (high - low) * self.rank // self.world_size
            last = low + (high - low) * (self.rank + 1) // self.world_size
            yield order[first:last].tolist()


def create_optimized_dataloader(
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int | None = None,
    batch_sampler: Iterable[list[int]] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
) -> DataLoader:
    """Build a DataLoader with the settings that suit the device and this process.

    Args:
        shuffle: a stream decides on its order itself, so it is not applied to one.
        num_workers: None takes up to 4 of the CPUs that this process may use, none on
            MPS and none where there is only one CPU.
        batch_sampler: replaces batch_size, shuffle and drop_last.
        seed: of the loader's own generator; the global one is never drawn from.
    """
    if num_workers is None:
        # Workers beside MPS may hang, and one CPU only pays for their start.
        cpus = _usable_cpu_count()
        num_workers = 0 if device.type == "mps" or cpus < 2 else min(4, cpus)
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": num_workers > 0,
        "worker_init_fn": seed_worker,
        "generator": torch.Generator().manual_seed(seed),
        "collate_fn": collate_fn,
    }
    if num_workers > 0:
        options["prefetch_factor"] = 2
    if batch_sampler is not None:
        options["batch_sampler"] = batch_sampler
    else:
        options |= {"batch_size": batch_size, "drop_last": drop_last}
        if not isinstance(dataset, IterableDataset):
            options["shuffle"] = shuffle
    return DataLoader(dataset, **options)


# --- templates/training_utils.py ------------------------------------------------------


def set_seed(seed: int = 42, deterministic: bool = True) -> None:
    """Seed every random generator, and switch deterministic kernels on or off.

    Call it before CUDA is first used: cuBLAS reads its workspace setting once.

    Args:
        seed: for Python, NumPy (where installed, modulo 2**32) and PyTorch.
        deterministic: True chooses deterministic kernels (an operation that has none
            warns and runs); False takes those switches back.
    """
    if deterministic:
        # Without it cuBLAS (10.2 and later) may pick another workspace every run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic)
    random.seed(seed)
    torch.manual_seed(seed)  # the CPU, every CUDA and XPU device, and MPS
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed % 2**32)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters for an optimizer: weights decay, the rest does not.

    Parameters with two or more dimensions decay (matrices, convolutions, embeddings:
    the rule of GPT-2 reimplementations); biases, norm scales and other vectors do not.
    A tied parameter comes once. The order is that of `model.named_parameters()`, and
    an empty group is left out.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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


# --- templates/checkpoint_io.py -------------------------------------------------------


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; names the file and remedy."""


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
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); what was there before is"
            " unchanged: free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; Windows cannot and need not."""
    if os.name == "posix":
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
        file.write(CHECKSUM_SIZE.to_bytes(2, "little"))
        file.write(CHECKSUM_LABEL + f"{checked.crc:08x}".encode())

    write_atomically(path, write)


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
        return to_loadable(dataclasses.asdict(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy":
        return to_loadable(value.item() if value.ndim == 0 else torch.tensor(value))
    raise TypeError(
        f"a {type(value).__name__} cannot be saved in a checkpoint that loads safely:"
        " save its plain values (numbers, text, lists, dicts, tensors)"
    )


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
    checkpoint = {"epoch": epoch, "model_state_dict": model.state_dict()}
    if optimizer is not None:
        checkpoint["optimizer_state_dict"] = optimizer.state_dict()
        checkpoint["optimizer_parameters"] = name_parameters(model, optimizer)
    if clash := sorted(checkpoint.keys() & kwargs.keys()):
        raise ValueError(f"{', '.join(clash)} is saved already: choose another name")
    write_checkpoint_file({**checkpoint, **kwargs}, Path(path))


def name_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), "?") for parameter in group["params"]]
        for group in optimizer.param_groups
    ]


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON to a file, at once: a killed process loses none."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


# --- templates/pending.py -------------------------------------------------------------


def read_columns(path: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a CSV, JSONL or Parquet file as text, all rows in memory.

    Raises:
        ValueError: the file is missing, damaged or of another kind, a column is missing
            or has empty values.
        ImportError: pyarrow is missing; says how to install it.
    """
    try:
        import pyarrow
        from pyarrow import csv, json, parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
    kinds = {".csv": csv, ".jsonl": json, ".ndjson": json, ".parquet": parquet}
    module = kinds.get(Path(path).suffix.lower())
    if module is None:
        raise ValueError(f"{path}: give a file that ends with {', '.join(kinds)}")
    try:
        if module is csv:
            newlines = csv.ParseOptions(newlines_in_values=True)
            as_text = csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pyarrow.string())
            )
            table = csv.read_csv(path, parse_options=newlines, convert_options=as_text)
        elif module is json:
            table = json.read_json(path)
        else:
            table = parquet.read_table(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: check --data") from None
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise ValueError(
            f"{path}: has no column {' or '.join(missing)}, only"
            f" {', '.join(table.column_names)}: choose from these"
        )
    for name in columns:
        if empty := table[name].null_count:
            raise ValueError(
                f"{path}: column {name} is empty in {empty} rows: fill them"
            )
    return {name: table[name].cast("string").to_pylist() for name in columns}


def number_classes(labels: Iterable[str]) -> tuple[list[str], list[int]]:
    """The sorted names of the classes, and for each label the number of its class.

    Raises:
        ValueError: there are fewer than two classes.
    """
    labels = list(labels)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(
            f"all {len(labels)} labels are {classes}: a classifier needs two classes"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[label] for label in labels]


def split_samples(
    samples: Any, val_fraction: float, seed: int
) -> tuple[Subset, Subset]:
    """Samples to train on and samples to validate on, drawn at random.

    Raises:
        ValueError: one of the two would be empty.
    """
    val_count = round(len(samples) * val_fraction)
    if not 0 < val_count < len(samples):
        raise ValueError(
            f"{val_count} of {len(samples)} samples would be kept for validation:"
            " give more data or another val_fraction"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator).tolist()
    return Subset(samples, order[val_count:]), Subset(samples, order[:val_count])


def move_batches(
    loader: Iterable[Sequence[torch.Tensor]], device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches of a loader on a device; pinned memory is copied without waiting."""
    for batch in loader:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, DataError, CheckpointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
