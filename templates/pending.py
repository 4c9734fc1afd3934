"""Pending: goes into data_optimizer and profiling."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset


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
                column_types=dict.fromkeys(columns, pyarrow.string()),
                null_values=[""],  # not "NA" or "null", which may be words
                strings_can_be_null=True,
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


def list_image_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The images in `folder/CLASS/`, in sorted order, and the class of each.

    Raises:
        ValueError: there is no such folder, or no image in a folder of a class.
    """
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    paths = [p for p in sorted(folder.glob("*/*")) if p.suffix.lower() in kinds]
    if not paths:
        state = "holds no images" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {state}: expected FOLDER/CLASS/IMAGE.png or .jpg")
    return [str(path) for path in paths], [path.parent.name for path in paths]


def image_to_uint8(image: Any, size: int) -> torch.Tensor:
    """A Pillow RGB image as bytes of shape (3, size, size).

    Bytes, because they cost a quarter of floats to send to the GPU.
    """
    pixels = bytearray(image.resize((size, size)).tobytes())
    image_HWC = torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3)
    return image_HWC.permute(2, 0, 1).contiguous()


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
