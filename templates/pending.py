"""Pending: goes into data_optimizer, config and profiling."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset


def read_columns(path: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Whole columns of a CSV, JSONL or Parquet file, as lists.

    Raises:
        ValueError: missing or unreadable file, missing column, empty values.
    """
    try:
        import pyarrow
        from pyarrow import csv, json, parquet
    except ImportError as error:
        raise ImportError("pyarrow is needed: pip install pyarrow") from error
    kind = Path(path).suffix.lower()
    try:
        if kind == ".parquet":
            table = parquet.read_table(path)
        elif kind == ".csv":
            table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True))
        else:
            table = json.read_json(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path}: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: no column {missing}: has {table.column_names}")
    return {name: table[name].cast("string").to_pylist() for name in columns}




def number_classes(labels: Iterable[str]) -> tuple[list[str], list[int]]:
    """The sorted names of the classes, and for each label the number of its class."""
    labels = list(labels)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} classes")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[label] for label in labels]


def split_samples(samples: Any, val_fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Samples to train on and samples to validate on, drawn at random by `seed`."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    val_count = round(len(samples) * val_fraction)
    if not 0 < val_count < len(samples):
        raise ValueError(f"{len(samples)} samples")
    order = order.tolist()
    return Subset(samples, order[val_count:]), Subset(samples, order[:val_count])


def list_image_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The image files in `folder/CLASS/`, sorted, and the class of each."""
    paths = [path for path in sorted(folder.glob("*/*")) if path.is_file()]
    return [str(path) for path in paths], [path.parent.name for path in paths]


def image_to_uint8(image: Any, size: int) -> torch.Tensor:
    """A Pillow RGB image as bytes of shape (3, size, size)."""
    data = bytearray(image.resize((size, size)).tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def format_values(values: Mapping[str, Any]) -> str:
    """Names and values in one line, numbers with four significant digits."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


class TrainingDisplay:
    """Progress"""

    def __init__(self, total_steps: int, batch_size: int, step: int = 0) -> None:
        self.total_steps, self.batch_size, self.step = total_steps, batch_size, step
        self.time_s = time.perf_counter()

    def __enter__(self) -> "TrainingDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, step: int, **values: Any) -> None:
        now = time.perf_counter()
        rate = (step - self.step) * self.batch_size / (now - self.time_s)
        self.step, self.time_s = step, now
        print(f"step {step}/{self.total_steps}: {format_values(values)}, {rate:.0f} samples/s", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


def move_batches(loader, device):
    """The batches of a loader"""
    for batch in loader:
        yield tuple(t.to(device, non_blocking=True) for t in batch)
