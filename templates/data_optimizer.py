"""Data loading that keeps memory bounded and the sample order reproducible.

Section 2 of the guide (and `seed_worker` of section 8): lazy images, streaming text
and Parquet, the DataLoader factory, and a sampler whose order depends on seed and
epoch alone.

    sampler = ResumableBatchSampler(len(dataset), batch_size=64, seed=0)
    loader = create_optimized_dataloader(dataset, 64, device, batch_sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            ...
"""

import contextlib
import importlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    get_worker_info,
)


class DataError(ValueError):
    """Bad input data: the message names the file or column and the remedy."""


def _import_data_package(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed to read this data: pip install {package}"
        ) from error


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


class StreamingTextDataset(IterableDataset):
    """Rows of one text column of a CSV or JSONL file, in bounded memory."""

    def __init__(
        self,
        file_path: str,
        text_column: str = "text",
        chunk_size: int = 10000,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        self.file_path, self.text_column = str(file_path), text_column
        self.chunk_size = chunk_size
        self.rank, self.world_size = _data_rank(rank, world_size)

    def __iter__(self) -> Iterator[str]:
        pd = _import_data_package("pandas", "pandas")
        jsonl = ".json" in Path(self.file_path).name
        kwargs: dict[str, Any] = {"lines": True} if jsonl else {}
        if not jsonl:
            kwargs = {"usecols": [self.text_column], "keep_default_na": False}
        read = pd.read_json if jsonl else pd.read_csv
        shard, shards = _stream_shard(self.rank, self.world_size)
        try:
            chunks = read(self.file_path, chunksize=self.chunk_size, **kwargs)
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read column {self.text_column!r} of {self.file_path}: {error}"
            ) from error
        with chunks:
            position = 0
            for chunk in chunks:
                if self.text_column not in chunk:
                    raise DataError(
                        f"no column {self.text_column!r} in {self.file_path}: "
                        f"it has {list(chunk)}"
                    )
                first = (shard - position) % shards
                yield from chunk[self.text_column].iloc[first::shards].tolist()
                position += len(chunk)


class StreamingParquetDataset(IterableDataset):
    """Rows of a Parquet file as dicts, in bounded memory."""

    def __init__(
        self,
        file_path: str,
        columns: list[str] | None = None,
        batch_size: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        self.file_path, self.columns = str(file_path), columns
        self.batch_size = batch_size
        self.rank, self.world_size = _data_rank(rank, world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pq = _import_data_package("pyarrow.parquet", "pyarrow")
        shard, shards = _stream_shard(self.rank, self.world_size)
        try:
            parquet_file = pq.ParquetFile(self.file_path)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.file_path}: {error}") from error
        with parquet_file:
            names = parquet_file.schema_arrow.names
            missing = [c for c in self.columns or [] if c not in names]
            if missing:
                raise DataError(f"no column {missing} in {self.file_path}: has {names}")
            position = 0
            for batch in parquet_file.iter_batches(self.batch_size, None, self.columns):
                data = batch.to_pydict()
                rows = zip(*data.values(), strict=True)
                for i, row in enumerate(rows, position):
                    if i % shards == shard:
                        yield dict(zip(data, row, strict=True))
                position += batch.num_rows


def _stream_shard(rank: int, world_size: int) -> tuple[int, int]:
    """Return this reader's number and how many there are: workers of all ranks."""
    worker = get_worker_info()
    if worker is None:
        return rank, world_size
    return rank * worker.num_workers + worker.id, world_size * worker.num_workers


def _decode_image_rgb(path: str | Path) -> Any:
    """Read an image file as an upright 8-bit RGB Pillow image, whatever its mode."""
    pil_image = _import_data_package("PIL.Image", "pillow")
    pil_ops = _import_data_package("PIL.ImageOps", "pillow")
    with pil_image.open(path) as image:
        image = pil_ops.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow clips 16-bit grey to 255 instead of scaling it to 8 bits.
            image = image.convert("F").point(lambda v: v * (255 / 65535) + 0.5)
            image = image.convert("L")
        if image.mode in ("P", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode in ("RGBA", "LA", "La", "RGBa"):
            # What is transparent may hold any colour: show it on white.
            image = image.convert("RGBA")
            white = pil_image.new("RGBA", image.size, "white")
            image = pil_image.alpha_composite(white, image)
        return image.convert("RGB")


class LazyImageDataset(Dataset):
    """Images that are opened when they are asked for, as RGB and upright.

    Args:
        transform: called with the Pillow image.
        labels: one a path; items are then (image, label).
        on_error: "raise" names an unreadable file; "skip" reports it, notes it in
            `skipped` and gives None in its place (`skip_missing_collate` drops it).

    Raises:
        DataError: for an unreadable file under "raise".
    """

    def __init__(
        self,
        image_paths: list[str],
        transform: Callable[[Any], Any] | None = None,
        labels: Sequence[Any] | None = None,
        on_error: str = "raise",
        report: Callable[[str], None] = print,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"{on_error=}: must be 'raise' or 'skip'")
        if labels is not None and len(labels) != len(image_paths):
            raise DataError(f"{len(image_paths)} images but {len(labels)} labels")
        self.paths, self.labels = image_paths, labels
        self.transform, self.on_error, self.report = transform, on_error, report
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, idx: int) -> Any:
        path = self.paths[idx]
        try:
            image = _decode_image_rgb(path)
        except (OSError, SyntaxError, ValueError) as error:
            message = f"cannot read image {path}: {error}"
            if self.on_error == "raise":
                raise DataError(
                    f"{message}. Repair or remove it, or pass on_error='skip'"
                ) from error
            self.skipped.append(str(path))
            self.report(f"{message} (skipped)")
            return None
        if self.transform:
            image = self.transform(image)
        return image if self.labels is None else (image, self.labels[idx])


def skip_missing_collate(samples: list[Any]) -> Any:
    """Collate what is not None; a batch of nothing but None is None."""
    kept = [sample for sample in samples if sample is not None]
    return torch.utils.data.default_collate(kept) if kept else None


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
