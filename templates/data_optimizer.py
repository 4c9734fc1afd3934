"""Data loading: bounded memory, every row once, one order for any workers and ranks.

Section 2 of the guide (and `seed_worker` of section 8). Rows in memory or on disk by
index go through `ResumableBatchSampler` and the DataLoader factory:

    sampler = ResumableBatchSampler(len(dataset), batch_size=64, seed=0)
    loader = create_optimized_dataloader(dataset, 64, device, batch_sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            ...

More than memory holds goes through a stream and its own loader:

    stream = StreamingParquetDataset("folder/*.parquet", shuffle=True, seed=0)
    loader = StreamBatchLoader(stream, 1024, device, stack={"x": ["a", "b"]})
    for epoch in range(epochs):  # each iteration is one epoch
        for batch in loader:  # {"x": (B, 2) tensor, "column": tensor, list or array}
            state = loader.state_dict()  # for any number of workers and ranks
    loader.load_state_dict(state)  # goes on after the batch last yielded

Sizes in names: B batch, C channel, H height, W width.
"""

import abc
import codecs
import collections
import contextlib
import copy
import fnmatch
import functools
import glob
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import signal
import threading
import time
import traceback
import urllib.parse
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    get_worker_info,
)

PARQUET_ENDINGS = (".parquet", ".pq")
TEXT_ENDINGS = tuple(
    ending + packed
    for packed in ("", ".gz", ".zst", ".bz2", ".lz4")
    for ending in (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
)
_SKIP_IT = "pass on_error='skip' (--on-error skip)"
_LINE_BLOCK_BYTES = 1 << 22  # CSV and JSONL are read in pieces of about this size
_MOST_ROW_BYTES = 1 << 26  # more in a row is a quote that is never closed
_CACHE_BYTES = 1 << 19  # fits a core's cache: scanned 3 x, CSV parsed 1.1 x as fast
_DECODED_ROWS = 8192  # fewer at once cost more: 1024 take two and a half times as long
_borrowed = threading.local()


class DataError(ValueError):
    """Bad input data: the message names the file or column and the remedy."""

    def __str__(self) -> str:
        """The message, without the traceback that a worker puts before it."""
        return super().__str__().rpartition("DataError: ")[2].rstrip("\n")


@functools.cache  # import_module takes 5 us, several times a batch
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
            if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RuntimeError(
                    "a launcher started several processes, but torch.distributed is "
                    "not initialized: each would read all rows. Call "
                    "dist.init_process_group() first, or pass rank= and world_size="
                )
            return 0, 1
        return dist.get_rank(), dist.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"{rank=} is outside of {world_size=}")
    return rank, world_size


def _gather_objects(value: Any) -> list[Any]:
    """Return what each rank gives, on all of them; all have to call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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


def _start_loader_worker(worker_id: int) -> None:
    """Seed a worker, and let it outlive a stop signal that goes to the whole job.

    Slurm, systemd and Ctrl-C signal every process. The main process then finishes its
    step and saves, for which it may still need this worker's batch; after five seconds,
    or as soon as the loader is closed, the worker is gone all the same.
    """
    seed_worker(worker_id)
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(5))


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
        allow_empty: a rank may get no row of a short batch, as in the evaluation of
            few rows; `create_optimized_dataloader` makes an empty batch of that.

    Raises:
        DataError: if a rank would get no row of some batch, without `allow_empty`.
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
        allow_empty: bool = False,
    ):
        if length < 0 or batch_size < 1:
            raise ValueError(
                f"{length=}, {batch_size=}: need length >= 0 and batch_size >= 1"
            )
        self.rank, self.world_size = _data_rank(rank, world_size)
        self.length = length // batch_size * batch_size if drop_last else length
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.allow_empty = allow_empty
        self.epoch = self.start = 0
        steps = len(self)
        shortest = self._bound(steps) - self._bound(steps - 1) if steps else None
        if not allow_empty and shortest is not None and shortest < self.world_size:
            raise DataError(
                f"a batch of {shortest} rows ({length=}, {batch_size=}) leaves some of "
                f"the {self.world_size} ranks without a row: use a batch_size of "
                f"at least {2 * self.world_size}, drop_last=True or fewer ranks"
            )

    def _bound(self, k: int) -> int:
        return _epoch_batch_bound(k, self.length, self.batch_size)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever `set_epoch` starts."""
        return (self.length + self.batch_size - 1) // self.batch_size

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
        rows, base = [], 0  # some thousand rows as numbers: cheaper than each batch
        for k in range(self.start, len(self)):
            low, high = self._bound(k), self._bound(k + 1)
            first = low + (high - low) * self.rank // self.world_size
            last = low + (high - low) * (self.rank + 1) // self.world_size
            if last > base + len(rows):
                base, rows = first, order[first : max(last, first + 4096)].tolist()
            yield rows[first - base : last - base]


# --- Streams, part 1: which rows there are (an index of blocks)


def _match_files(found: list[str], pattern: str) -> list[str]:
    """Filter paths by a glob: `*` stays within one folder, `**/` spans them."""
    flat = pattern.replace("**/", "*")
    depth = None if flat != pattern else pattern.count("/")
    return [
        path
        for path in found
        if fnmatch.fnmatchcase(path, flat) and depth in (None, path.count("/"))
    ]


def _list_data_files(
    paths: Any, suffixes: tuple[str, ...], filesystem: Any
) -> tuple[Any, dict[str, str]]:
    """Resolve files, folders, globs and URIs.

    Returns:
        (Arrow filesystem, path -> its part below the folder or glob it came from).
    """
    pa_fs = _import_data_package("pyarrow.fs", "pyarrow")

    def adapt(fsspec_filesystem: Any) -> Any:
        return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(fsspec_filesystem))

    if filesystem is not None and not isinstance(filesystem, pa_fs.FileSystem):
        filesystem = adapt(filesystem)
    files: dict[str, str] = {}
    for given in [paths] if isinstance(paths, str | Path) else paths:
        path = str(given)
        if "://" in path:
            scheme, bare = path.split("://", 1)
            if filesystem is None:
                wildcard = re.search(r"[*?\[]", bare)
                plain = bare[: wildcard.start()] if wildcard else bare
                try:
                    filesystem, _ = pa_fs.FileSystem.from_uri(f"{scheme}://{plain}")
                except ValueError:  # a scheme that only fsspec knows
                    fsspec = _import_data_package("fsspec", "fsspec")
                    filesystem = adapt(fsspec.filesystem(scheme))
            path = bare.split("?", 1)[0] if scheme in ("s3", "gs") else bare
        filesystem = filesystem or pa_fs.LocalFileSystem()
        try:
            info = filesystem.get_file_info(path)
            if info.type == pa_fs.FileType.File:
                files[path] = ""
                continue
            folder = path.rstrip("/")
            if info.type == pa_fs.FileType.NotFound:
                folder = re.split(r"[*?\[]", path)[0]
                if folder == path:
                    raise DataError(f"{given} does not exist: check the path")
                folder = folder.rpartition("/")[0] or ("/" if path[0] == "/" else ".")
            selector = pa_fs.FileSelector(folder, recursive=True)
            listed = filesystem.get_file_info(selector)
        except OSError as error:
            raise DataError(f"cannot list {given}: {error}. Check the path") from error
        found = sorted(
            entry.path.removeprefix("./")
            for entry in listed
            if entry.type == pa_fs.FileType.File
            # _SUCCESS, .crc and the like are no data.
            and not re.search(r"/[._]", entry.path.removeprefix(folder))
        )
        if info.type == pa_fs.FileType.NotFound:
            found = _match_files(found, path)
        else:
            found = [name for name in found if name.endswith(suffixes)]
        if not found:
            raise DataError(f"no files of type {', '.join(suffixes)} in {given}")
        files |= {name: name.removeprefix(folder) for name in found}
    if not files:
        raise DataError("the list of files is empty")
    return filesystem, files


def _read_arrow_type(pa: Any, name: str, kind: Any) -> Any:
    """Return the Arrow type that column_types gives a column, perhaps by its name."""
    if not isinstance(kind, str):
        return kind
    try:
        return pa.type_for_alias(kind)
    except ValueError:
        raise DataError(
            f"column_types: {kind!r} of column {name!r} names no type: give one of "
            "pyarrow, such as pa.float32() or pa.list_(pa.float32(), 384)"
        ) from None


def _tensor_type(pa: Any, kind: Any) -> Any:
    """Return the Arrow type under which a column goes into a batch; None: refused.

    Numbers, booleans, dates and times (as integers of their own unit) and decimals
    (as float64) become tensors, so do fixed-size lists of them; text, bytes and lists
    of any length stay Arrow data.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return _tensor_type(pa, kind.value_type)
    if types.is_fixed_size_list(kind):
        value = _tensor_type(pa, kind.value_type)
        fixed = value is not None and (
            types.is_integer(value) or types.is_floating(value)
        )
        return pa.list_(value, kind.list_size) if fixed else None
    if types.is_list(kind) or types.is_large_list(kind):
        return kind if _tensor_type(pa, kind.value_type) is not None else None
    if (
        types.is_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    ):
        return kind
    if types.is_null(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_decimal(kind):
        return pa.float64()
    if types.is_date32(kind) or types.is_time32(kind) or types.is_uint16(kind):
        return pa.int32()
    if types.is_temporal(kind) or types.is_uint32(kind) or types.is_uint64(kind):
        return pa.int64()
    plain = (types.is_integer, types.is_floating, types.is_boolean)
    return kind if any(is_plain(kind) for is_plain in plain) else None


class _BlockSource(abc.ABC):
    """What a stream reads: rows in blocks that can be read apart from each other.

    Attributes:
        block_rows: (blocks,) rows of each block.
        block_file: (blocks,) number of its file in `files`.
        first_file: that the types are from.
        types: column name -> Arrow type of the file (or as column_types asks).
        chosen_by: what decides beside the files which rows there are.
        row_bytes: rough size of a row, to bound windows by memory.
        together: how many large blocks to read side by side.
        on_error: "raise" or "skip", for what cannot be read.
        skipped: what could not be read, file and cause.
        lost: block -> numbers of its rows, sorted, that `block_rows` does not count.
    """

    files: list[str]
    block_rows: Any
    block_file: Any
    first_file: str
    types: dict[str, Any]
    chosen_by: tuple[str, ...] = ()
    row_bytes: int
    together: int
    on_error: str
    skipped: list[str]
    lost: dict[int, Any]

    @abc.abstractmethod
    def _read_all(
        self, block: int, batch_rows: int, convert: Callable[[str, str, Any], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield what `read` does, with the rows that are lost."""

    def read(
        self, block: int, batch_rows: int, convert: Callable[[str, str, Any], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (rows, converted arrays in the order of `types`) of a block.

        In place of the arrays comes a DataError for rows that are skipped.
        """
        read = self._read_all(block, batch_rows, convert)
        if block not in self.lost:
            yield from read
            return
        np = _import_data_package("numpy", "numpy")
        lost, begin = self.lost[block], 0
        for rows, arrays in read:
            low, high = np.searchsorted(lost, [begin, begin + rows]).tolist()
            keep = np.ones(rows, dtype=bool)
            keep[lost[low:high] - begin] = False
            begin += rows
            if high - low < rows:
                yield rows - (high - low), _filter_rows(arrays, keep)

    def select(self, column: str) -> "_BlockSource":
        """Return the same rows with one column."""
        selected = copy.copy(self)
        selected.types = {column: self.types[column]}
        return selected


def _count_rows(rows: int) -> str:
    return f"{rows} row{'' if rows == 1 else 's'}"


def _filter_rows(arrays: Any, keep: Any) -> Any:
    """Return the rows that are marked, of arrays or of what stands for lost rows."""
    if isinstance(arrays, DataError):
        return arrays
    mask = _import_data_package("pyarrow", "pyarrow").array(keep)
    return [array.filter(mask) for array in arrays]


def _try_in_halves(
    attempt: Callable[[int, int], Any], rows: int, refusals: tuple[type, ...]
) -> tuple[list[tuple[int, Any]], list[tuple[int, Exception]]]:
    """Call attempt(low, high) for all rows, in halves where it refuses them.

    After a thousand errors, and more than good rows, the rest counts as refused.

    Returns:
        [(rows, what attempt gives, or None for rows that it refuses), ...] in order,
        and [(row, its error), ...].
    """
    pieces: list[tuple[int, Any]] = []
    errors: list[tuple[int, Exception]] = []
    todo, good = [(0, rows)], 0
    while todo:
        low, high = todo.pop()
        try:
            if len(errors) < max(1000, good):  # else it is not worth the time
                pieces.append((high - low, attempt(low, high)))
                good += high - low
                continue
        except refusals as error:
            if high - low > 1:
                middle = (low + high) // 2
                todo += [(middle, high), (low, middle)]
                continue
            errors.append((low, error))
        pieces.append((high - low, None))
    return pieces, errors


def _stand_for_lost(
    pieces: list[tuple[int, Any]], error: DataError
) -> list[tuple[int, Any]]:
    """Put an error, with their number, in the place of all rows that are lost."""
    count = sum(rows for rows, piece in pieces if piece is None)
    told = DataError(f"{error} ({_count_rows(count)})")
    return [(rows, told if piece is None else piece) for rows, piece in pieces]


class _FileSource(_BlockSource):
    """Rows of many files, whose blocks are found when it is made."""

    typed = True  # every file says which types its columns have
    together = 8

    def __init__(
        self,
        paths: Any,
        suffixes: tuple[str, ...],
        filesystem: Any,
        columns: list[str] | None,
        column_types: dict[str, Any] | None,
        on_error: str,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"{on_error=}: must be 'raise' or 'skip'")
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        self.filesystem, self.below = _list_data_files(paths, suffixes, filesystem)
        self.files = list(self.below)
        self.wanted, self.on_error = columns, on_error
        self.given_types = {
            name: _read_arrow_type(pa, name, kind)
            for name, kind in (column_types or {}).items()
        }
        self.types, self.skipped, self.first_file = {}, [], ""
        self.lost = {}
        blocks: list[tuple[int, int, Any]] = []
        size = 0
        # Footers of many remote files arrive together; 16 requests are polite.
        with ThreadPoolExecutor(16) as pool:
            indexed = pool.map(self._try_index, self.files)
            if on_error == "skip":
                indexed = list(indexed)
                self._take_commonest_schema(indexed)
            for number, found in enumerate(indexed):
                if isinstance(found, Exception):
                    if on_error == "raise":
                        raise found
                    self.skipped.append(f"{found} (the whole file)")
                    continue
                schema, rows, keys, nbytes = found
                try:
                    self._check_schema(self.files[number], schema)
                except DataError as error:
                    if on_error == "raise":
                        raise
                    told = f"{error} (the whole file, {_count_rows(sum(rows))})"
                    self.skipped.append(told)
                    continue
                blocks += [(number, r, k) for r, k in zip(rows, keys, strict=True)]
                size += nbytes
        self.types = {
            name: pa.string() if pa.types.is_null(kind) else kind
            for name, kind in self.types.items()
        }
        if not self.first_file:
            raise DataError(
                f"none of {len(self.files)} files can be read, such as: "
                f"{self.skipped[0]}"
            )
        self.block_file = np.array([b[0] for b in blocks], dtype=np.int64)
        self.block_rows = np.array([b[1] for b in blocks], dtype=np.int64)
        self.stored_rows = self.block_rows  # those that are left out later as well
        self.block_key = [b[2] for b in blocks]
        self.row_bytes = max(1, size // max(1, int(self.block_rows.sum())))

    def _try_index(self, file: str) -> Any:
        pa = _import_data_package("pyarrow", "pyarrow")
        try:
            return self._index_file(file)
        except DataError as error:
            return error
        except (OSError, ValueError, pa.ArrowException) as error:
            return self._unreadable(file, error)

    def _take_commonest_schema(self, indexed: list[Any]) -> None:
        """Take the columns from a file that is like most, as the odd ones are left out.

        Args:
            indexed: of each file what `_index_file` returns, or an error.
        """
        pa = _import_data_package("pyarrow", "pyarrow")

        def describe(schema: Any) -> str:
            names = schema.names if self.wanted is None else self.wanted
            kinds = {
                name: schema.field(name).type for name in names if name in schema.names
            }
            return repr({name: _tensor_type(pa, k) or k for name, k in kinds.items()})

        alike = collections.defaultdict(list)
        for file, found in zip(self.files, indexed, strict=True):
            if not isinstance(found, Exception):
                alike[describe(found[0])].append((file, found[0]))
        if alike:
            with contextlib.suppress(DataError):  # it is said of each file
                self._check_schema(*max(alike.values(), key=len)[0])

    def _unreadable(self, what: str, error: Exception) -> DataError:
        """Say what cannot be read, why, and what helps unless it is skipped."""
        cause = " ".join(str(error).split()).rstrip(".")
        text = f"cannot read {what}: {cause}"
        if self.on_error == "skip":
            return DataError(text)
        remedy = "Repair or remove it"
        if "FieldRef" in cause:
            return DataError(
                f"{text}. Check the names of columns in filters; `key=value` folders "
                "are columns below the folder or glob that was given"
            )
        if "no kernel matching" in cause:
            remedy = "Compare its columns with values of their types in filters"
        elif re.search("utf-?8", cause, re.IGNORECASE):
            remedy = "Pass the encoding that it has (encoding='cp1252'), repair it"
        elif re.search(r"[Ee]xpected \d+ columns", cause):
            remedy = "Close its quotes, repair it"
        elif re.search("conversion error|changed from", cause):
            remedy = "Give the column another type in column_types, repair the file"
        return DataError(f"{text}. {remedy}, or {_SKIP_IT}")

    @abc.abstractmethod
    def _index_file(self, file: str) -> tuple[Any, list[int], list[Any], int]:
        """Return a file's schema, the rows and key of each block, and its bytes."""

    @abc.abstractmethod
    def _describe(self, block: int) -> str:
        """Name a block for a person to find it."""

    @abc.abstractmethod
    def _read_raw(self, block: int, batch_rows: int) -> Iterator[tuple[int, Any]]:
        """Yield (rows, Arrow record batch of at most about batch_rows rows) of a block.

        In place of the batch comes a DataError for rows that are skipped.
        """

    def _check_schema(self, file: str, schema: Any) -> None:
        """Take the columns from the first file and hold the others against them."""
        pa = _import_data_package("pyarrow", "pyarrow")
        have = dict(zip(schema.names, schema.types, strict=True))
        wanted = schema.names if self.wanted is None else self.wanted
        for name in self.types or [*wanted, *self.given_types]:
            if name not in have:
                # Of a text file that seems to have one column.
                one = "" if self.typed or len(have) != 1 else schema.names[0]
                mark = re.search(r"[,;|\t]", one)
                hint = f" (is the delimiter {mark[0]!r}?)" if mark else ""
                raise DataError(
                    f"no column {name!r} in {file}: it has {', '.join(have)}{hint}"
                )
            if schema.names.count(name) > 1:
                raise DataError(f"{file} has several columns {name!r}: rename them")
        kinds = {
            name: self.given_types.get(name, have[name])
            for name in self.types or wanted
        }
        if not self.first_file:
            self.types, self.first_file, self.first_schema = kinds, file, schema
        for name, known in self.types.items():
            kind = kinds[name]
            if pa.types.is_null(known):  # no row of the files before has a value
                self.types[name] = kind if self.typed else pa.string()
                continue
            types = _tensor_type(pa, kind) or kind, _tensor_type(pa, known) or known
            if self.typed and types[0] != types[1] and not pa.types.is_null(kind):
                raise DataError(
                    f"column {name!r} is {known} in {self.first_file} but {kind} in "
                    f"{file}: pass column_types with one type for both, such as "
                    f"{{{name!r}: {str(known)!r}}}"
                )

    def _read_all(
        self, block: int, batch_rows: int, convert: Callable[[str, str, Any], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield what `read` does, with the rows that are lost."""
        pa = _import_data_package("pyarrow", "pyarrow")
        file, begin = self.files[self.block_file[block]], 0
        try:
            for rows, batch in self._read_raw(block, batch_rows):
                if isinstance(batch, DataError):
                    yield rows, batch
                else:
                    yield from self._convert(block, begin, batch, convert)
                begin += rows
        except DataError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(self._describe(block), error) from error
        self._check_rows(file, int(self.stored_rows[block]) - begin)

    def _convert(
        self,
        block: int,
        begin: int,
        batch: Any,
        convert: Callable[[str, str, Any], Any],
    ) -> Iterable[tuple[int, Any]]:
        """Convert the columns of a record batch, a block's rows from `begin` on.

        With on_error="skip" an error stands for the rows that cannot be converted.
        """
        file = self.files[self.block_file[block]]

        def attempt(low: int, high: int) -> list[Any]:
            part = batch.slice(low, high - low)
            return [convert(file, name, part.column(name)) for name in self.types]

        if self.on_error == "raise":
            return [(batch.num_rows, attempt(0, batch.num_rows))]
        pieces, errors = _try_in_halves(attempt, batch.num_rows, (DataError,))
        if not errors:
            return pieces
        row, error = errors[0]
        where = f"row {begin + row} of {self._describe(block)}"
        return _stand_for_lost(pieces, DataError(f"{error}, in {where}"))

    def _check_rows(self, file: str, missing: int) -> None:
        if missing:
            raise DataError(
                f"{file} has {_count_rows(abs(missing))} "
                f"{'less' if missing > 0 else 'more'} than it had when it was indexed: "
                "do not change files while they are read; in CSV close each quote (or "
                "set quote_char), and quote texts with a \\r"
            )


class _ParquetSource(_FileSource):
    """Row groups of Parquet files, indexed by their footers alone."""

    def __init__(self, *args: Any, filters: Any = None):
        if isinstance(filters, list | tuple):
            pq = _import_data_package("pyarrow.parquet", "pyarrow")
            one = bool(filters) and isinstance(filters[0], str)
            filters = pq.filters_to_expression([filters] if one else filters)
        self.filters = filters
        self.filter_columns: list[str] = []
        super().__init__(*args)
        if filters is not None:
            self.filter_columns = self._find_filter_columns()
            self.chosen_by = (str(filters),)
            if not self.block_rows.any():
                raise DataError(
                    f"no row of {len(self.files)} files passes the filters {filters}: "
                    "check their values"
                )
        # Arrow holds a page of each column of each open row group, 1 MB by default:
        # three row groups of 16 columns are 48 MB, and leave the cache alone as well.
        chunk = self.row_bytes * int(self.block_rows.max(initial=0)) // len(self.types)
        pages = len(self.types) * max(1, min(chunk, 1 << 20))
        self.together = max(1, min(16, (54 << 20) // pages))

    def _hive_values(self, file: str) -> dict[str, Any]:
        """Return the `key=value` folders below the path that the user gave."""
        values: dict[str, Any] = {}
        for part in self.below[file].split("/")[:-1]:
            key, equals, value = part.partition("=")
            if equals and key:
                values[key] = urllib.parse.unquote(value)
                if value == "__HIVE_DEFAULT_PARTITION__":
                    values[key] = None
                elif re.fullmatch(r"-?\d{1,18}", values[key]):
                    values[key] = int(values[key])
        return values

    def _open(self, file: str) -> Any:
        pq = _import_data_package("pyarrow.parquet", "pyarrow")
        pa_fs = _import_data_package("pyarrow.fs", "pyarrow")
        local = isinstance(self.filesystem, pa_fs.LocalFileSystem)
        # Locally a small buffer per column bounds memory; remotely one request for
        # the whole row group saves round trips.
        options = {"pre_buffer": False, "buffer_size": 1 << 16} if local else {}
        options["page_checksum_verification"] = True  # where there are any
        return pq.ParquetFile(file, filesystem=self.filesystem, **options)

    def _index_file(self, file: str) -> tuple[Any, list[int], list[Any], int]:
        pa = _import_data_package("pyarrow", "pyarrow")
        with self._open(file) as opened:
            schema, meta = opened.schema_arrow, opened.metadata
        for name, value in self._hive_values(file).items():
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.scalar(value).type))
        groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
        keys = list(range(len(groups)))
        rows = [group.num_rows for group in groups]
        if self.filters is not None:
            rows = self._count_filtered(file, schema, rows)
        size = sum(group.total_byte_size for group in groups)
        if self.wanted is not None and groups:  # the share of the columns asked for
            columns = [groups[0].column(c) for c in range(groups[0].num_columns)]
            sizes = [
                (column.path_in_schema.split(".")[0], column.total_uncompressed_size)
                for column in columns
            ]
            read = sum(part for name, part in sizes if name in self.wanted)
            size = size * read // max(1, sum(part for _, part in sizes))
        return schema, rows, keys, size

    def _count_filtered(self, file: str, schema: Any, rows: list[int]) -> list[int]:
        """Count what passes the filter; statistics rule row groups out unread."""
        ds = _import_data_package("pyarrow.dataset", "pyarrow")
        partition = None
        for name, value in self._hive_values(file).items():
            field = ds.field(name)
            equal = field.is_null() if value is None else field == value
            partition = equal if partition is None else partition & equal
        layout = ds.ParquetFileFormat()
        fragment = layout.make_fragment(
            file, self.filesystem, partition_expression=partition
        )
        counts = [0] * len(rows)
        for piece in fragment.split_by_row_group(self.filters, schema):
            group = piece.row_groups[0].id
            one = ds.FileSystemDataset([piece], schema, layout, self.filesystem)
            # count_rows() counts all row groups where folders decide the filter.
            found = one.scanner(columns=[], filter=self.filters, use_threads=False)
            counts[group] = sum(batch.num_rows for batch in found.to_batches())
        return counts

    def _find_filter_columns(self) -> list[str]:
        """Return the columns of files that the filters ask for: they fail without."""
        pa = _import_data_package("pyarrow", "pyarrow")
        empty, needed = self.first_schema.empty_table(), []
        for name in empty.column_names:
            try:
                empty.drop_columns([name]).filter(self.filters)
            except (ValueError, pa.ArrowException):
                needed.append(name)
        return needed

    def _describe(self, block: int) -> str:
        file = self.files[self.block_file[block]]
        return f"{file}, row group {self.block_key[block]}"

    def _read_raw(self, block: int, batch_rows: int) -> Iterator[tuple[int, Any]]:
        pa = _import_data_package("pyarrow", "pyarrow")
        file = self.files[self.block_file[block]]
        hive = self._hive_values(file)
        with self._open(file) as opened:
            if self.filters is None:  # a block is not read beyond the rows it had
                group = opened.metadata.row_group(self.block_key[block])
                self._check_rows(file, int(self.stored_rows[block]) - group.num_rows)
            stored = opened.schema_arrow.names
            needed = [*self.types, *self.filter_columns]
            columns = [name for name in dict.fromkeys(needed) if name in stored]
            for batch in opened.iter_batches(
                batch_rows, [self.block_key[block]], columns, use_threads=False
            ):
                for name, value in hive.items():
                    if name not in stored:
                        constant = pa.repeat(value, batch.num_rows)
                        batch = batch.append_column(name, constant)
                if self.filters is None:
                    yield batch.num_rows, batch
                    continue
                table = pa.Table.from_batches([batch]).filter(self.filters)
                yield from ((part.num_rows, part) for part in table.to_batches())


class _SplitSource(_BlockSource):
    """The rows of another source that are drawn for validation, or the others.

    The rows are cut into as many cells of neighbours as rows are to be drawn, and one
    row of each cell is. So both parts hold the same mixture, also of sorted data, and
    which rows of a block are drawn follows from row counts and seed, without reading.
    """

    def __init__(self, source: _BlockSource, count: int, seed: int, drawn: bool):
        np = _import_data_package("numpy", "numpy")
        self.files, self.block_file = source.files, source.block_file
        self.first_file, self.types = source.first_file, source.types
        self.row_bytes, self.together = source.row_bytes, source.together
        self.on_error, self.skipped = source.on_error, source.skipped  # one list
        self.chosen_by, self.lost = source.chosen_by, {}
        self.inner, self.count, self.drawn = source, count, drawn
        self.salt = random.Random(f"split/{seed}").getrandbits(64)
        self.total = int(source.block_rows.sum())
        edges = np.append(0, np.cumsum(source.block_rows))
        self.starts = edges[:-1]
        # Products of two row counts need more than 64 bits: Python's integers.
        cells = ((edges.astype(object) + 1) * count - 1) // self.total
        cells = np.minimum(cells.astype(np.int64), count - 1)
        before = cells + (self._drawn_rows(cells) < edges)
        inside = np.diff(before)
        self.block_rows = inside if drawn else source.block_rows - inside

    def _drawn_rows(self, cells: Any) -> Any:
        """Return which row of the source each cell gives."""
        np = _import_data_package("numpy", "numpy")
        width, rest = divmod(self.total, self.count)
        low = cells * width + cells * rest // self.count
        high = (cells + 1) * width + (cells + 1) * rest // self.count
        # SplitMix64 (Steele, Lea, Flood 2014): a hash, so any cell can be asked for.
        bits = cells.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits += np.uint64(self.salt)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        return low + (bits % (high - low).astype(np.uint64)).astype(np.int64)

    def select(self, column: str) -> "_BlockSource":
        """Return the same rows with one column."""
        selected = super().select(column)
        selected.inner = self.inner.select(column)
        return selected

    def _read_all(
        self, block: int, batch_rows: int, convert: Callable[[str, str, Any], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Yield what `read` does, with the rows that are lost."""
        np = _import_data_package("numpy", "numpy")
        begin = int(self.starts[block])
        for rows, arrays in self.inner.read(block, batch_rows, convert):
            first = begin * self.count // self.total
            last = (begin + rows) * self.count // self.total + 1
            cells = np.arange(max(0, first - 1), min(last, self.count))
            found = self._drawn_rows(cells) - begin
            keep = np.full(rows, not self.drawn)
            keep[found[(found >= 0) & (found < rows)]] = self.drawn
            begin += rows
            yield int(keep.sum()), _filter_rows(arrays, keep)


# --- Streams, part 2: in which order they come


def _invert(numbers: Any, count: int) -> Any:
    """Return where each number below `count` stands, or -1; those below 0 are left out.

    Args:
        numbers: each at most once.
    """
    np = _import_data_package("numpy", "numpy")
    where = np.full(count, -1, dtype=np.intp)
    if numbers.min(initial=0) >= 0:
        where[numbers] = np.arange(len(numbers))
    else:
        kept = np.flatnonzero(numbers >= 0)
        where[numbers[kept]] = kept
    return where


class _StreamWindow:
    """One stretch of the epoch's order: parts of some blocks, shuffled together."""

    def __init__(
        self, group: int, number: int, begin: int, blocks: Any, low: Any, high: Any
    ):
        self.group, self.number, self.begin = group, number, begin
        self.blocks, self.low, self.high = blocks, low, high
        self.rows = int((high - low).sum())
        self.end = begin + self.rows


class _EpochPlan:
    """The order of one epoch, computed from row counts alone; nothing is read.

    Blocks are permuted and put into groups, of `together` large or many small ones. The
    blocks of a group are read side by side: each of its windows holds the same
    fraction of every block, and the rows of a window are permuted. So a batch mixes
    rows of all blocks of a group, memory is bounded by a window, and any position
    belongs to a window that can be found and read without those before it.

    Within a group batches are as mixed as a full shuffle makes them, but they hold no
    rows of other groups. So data that is sorted from end to end should be written in
    another order: of 10 million sorted rows in 10 row groups, the rows of a batch of
    1024 are off from an even spread over 50 stretches by 0.93 (total variation); file
    order is by 0.98, a full shuffle by 0.09.
    """

    def __init__(
        self,
        block_rows: Any,
        window_rows: int,
        seed: int,
        epoch: int,
        shuffle: bool,
        together: int = 8,
    ):
        np = self.np = _import_data_package("numpy", "numpy")
        self.name, self.shuffle = f"{seed}/{epoch}", shuffle
        self.block_rows, self.window_rows = block_rows, window_rows
        blocks = np.flatnonzero(block_rows)
        if shuffle:
            blocks = blocks[self._permute("blocks", len(blocks))]
        rows = block_rows[blocks]
        self.total = int(rows.sum())
        start = np.cumsum(rows) - rows
        # Reading stops somewhere inside a group when a run ends; a resumed one has to
        # skip up to there, so groups of huge blocks are bounded too.
        reach = window_rows
        if shuffle and self.total:
            mixed = min(together * int(rows.mean()), 128 * window_rows)
            reach = max(reach, mixed)
        groups = max(1, -(-self.total // reach))
        _, first = np.unique(start * groups // max(1, self.total), return_index=True)
        self.blocks, self.first = blocks, np.append(first, len(blocks))
        self.group_begin = np.append(start[first], self.total)
        self._windows: tuple[int, list[_StreamWindow]] = (-1, [])
        self._recent: dict[Any, Any] = {}

    def _permute(self, name: Any, rows: int) -> Any:
        mixed_seed = random.Random(f"{self.name}/{name}").getrandbits(63)
        generator = torch.Generator().manual_seed(mixed_seed)
        return torch.randperm(rows, generator=generator, dtype=torch.int32).numpy()

    def _remember(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._recent:
            while len(self._recent) > 3:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = compute()
        return self._recent[key]

    def window_at(self, position: int) -> _StreamWindow:
        """Return the window that holds a position of the epoch."""
        np = self.np
        group = int(np.searchsorted(self.group_begin, position, "right")) - 1
        if self._windows[0] != group:
            blocks = self.blocks[self.first[group] : self.first[group + 1]]
            rows = self.block_rows[blocks]
            count = -(-int(rows.sum()) // self.window_rows)
            if self.shuffle:
                edges = np.outer(np.arange(count + 1), -(-rows // count))
                cuts = np.minimum(edges, rows)
            else:
                edges = int(rows.sum()) * np.arange(count + 1) // count
                cuts = np.clip(edges[:, None] - (np.cumsum(rows) - rows), 0, rows)
            begins = (int(self.group_begin[group]) + cuts.sum(1)).tolist()
            windows = [
                _StreamWindow(group, t, begins[t], blocks, cuts[t], cuts[t + 1])
                for t in range(count)
            ]
            self._windows = (group, [w for w in windows if w.rows])
        windows = self._windows[1]
        return next(w for w in windows if w.begin <= position < w.end)

    def positions(self, window: _StreamWindow) -> Any:
        """Return at which of the window's positions each of its rows comes.

        Windows of a group share a permutation, which each turns by a number of its own:
        to draw one for each would cost as much as to gather the rows.
        """
        if not self.shuffle:
            return self.np.arange(window.rows)
        name = f"{window.group}/{window.rows}"
        shared = self._remember(
            name, lambda: self._permute(name, window.rows).astype(self.np.intp)
        )
        turn = random.Random(f"{self.name}/{window.group}/{window.number}")
        return self.np.roll(shared, turn.randrange(window.rows))

    def _crossing(self, low: int, high: int, rank: int, ranks: int) -> dict[int, Any]:
        """Return a rank's rows of a batch, sorted, by the windows it lies in."""
        np = self.np
        begins, rows, depth = [], [], []
        while low < high:
            window = self.window_at(low)
            stop = min(high, window.end)
            to = self.positions(window) + window.begin
            piece = np.flatnonzero((to >= low) & (to < stop))
            begins.append(np.full(len(piece), window.begin))
            rows.append(piece)
            depth.append((piece + 0.5) / window.rows)
            low = stop
        begin, row = np.concatenate(begins), np.concatenate(rows)
        # A rank takes the same fraction of every window, so it keeps to its blocks.
        ranked = np.argsort(np.concatenate(depth), kind="stable")
        mine = np.sort(
            ranked[len(row) * rank // ranks : len(row) * (rank + 1) // ranks]
        )
        return {b: row[mine][begin[mine] == b] for b in np.unique(begin).tolist()}

    def shares(
        self, position: int, batch_size: int, drop_last: bool, rank: int, ranks: int
    ) -> Iterator[tuple[_StreamWindow, Any, list[int], bool]]:
        """Yield what a rank takes of each window from `position` on.

        Yields:
            (window, the place of each of its rows among those that are taken, or -1,
            how many of these go into each batch, whether the last of them ends here).
        """
        np, start = self.np, position
        total = self.total - start
        if drop_last:
            total -= total % batch_size

        def bound(k: int) -> int:
            return start + _epoch_batch_bound(k, total, batch_size)

        k = 0
        while position < start + total:
            window, begin = self.window_at(position), position
            to = self.positions(window)
            order = _invert(to, window.rows) if ranks > 1 else None
            pieces, counts, whole = [], [], True
            while position < min(window.end, start + total):
                low, high = bound(k), bound(k + 1)
                if low == position and high <= window.end:
                    # All batches of this length that lie in the window, at once.
                    last = k + (window.end - low) // (high - low)
                    while bound(last) - low != (last - k) * (high - low):
                        last -= 1
                    cut = [(high - low) * r // ranks for r in (rank, rank + 1)]
                    counts += [cut[1] - cut[0]] * (last - k)
                    if order is not None:
                        inside = slice(low - window.begin, bound(last) - window.begin)
                        rows = order[inside].reshape(-1, high - low)
                        # Sorted, so that a rank keeps to its part of the blocks.
                        rows = np.sort(rows, axis=1) if self.shuffle else rows
                        pieces.append(rows[:, cut[0] : cut[1]].ravel())
                    k, position = last, bound(last)
                    continue
                stop = min(high, window.end)
                counts.append(stop - position)
                if order is not None:
                    rows = self._remember(
                        (low, high, rank, ranks),
                        functools.partial(self._crossing, low, high, rank, ranks),
                    )[window.begin]
                    pieces.append(rows)
                    counts[-1] = len(rows)
                position = stop
                whole = high <= window.end
                k += whole
            if order is not None:
                to = _invert(np.concatenate(pieces), window.rows)
            elif position - begin < window.rows:
                to = to - (begin - window.begin)
                to[(to < 0) | (to >= position - begin)] = -1
            yield window, to, counts, whole


# --- Streams, part 3: reading windows and cutting batches


def _check_list_sizes(array: Any, size: int, fill: Any) -> Any:
    """Return lists that are all of one size, those that are missing filled.

    Raises:
        ValueError: a list has another size, or is missing without a number to fill.
    """
    pa = _import_data_package("pyarrow", "pyarrow")
    compute = _import_data_package("pyarrow.compute", "pyarrow")
    if array.null_count:
        if not isinstance(fill, int | float):
            raise ValueError("a list is missing: pass a number in fill_null for it")
        array = array.fill_null(pa.scalar([fill] * size, array.type))
    sizes = compute.unique(compute.list_value_length(array)).to_pylist()
    if other := [found for found in sizes if found != size]:
        raise ValueError(
            f"a list has {other[0]} values, not {size}: repair it or leave it out"
        )
    return array


class _BlockReader:
    """Reads stretches of one block, in order, as slices of what is decoded."""

    def __init__(self, batches: Iterator[tuple[int, Any]]):
        self._batches = batches
        self._position, self._left = 0, 0
        self._arrays: Any = []

    def read(self, low: int, high: int) -> list[tuple[int, Any]]:
        """Return [(rows, arrays or an error), ...] of the block's rows low to high."""
        pieces = []
        while self._position < high:
            if not self._left:
                self._left, self._arrays = next(self._batches)
                continue
            # Rows before `low` are decoded and dropped.
            stop = low if self._position < low else high
            take = min(self._left, stop - self._position)
            part = self._arrays
            if take < self._left and not isinstance(part, DataError):
                part = [array.slice(0, take) for array in part]
                self._arrays = [array.slice(take) for array in self._arrays]
            if self._position >= low:
                pieces.append((take, part))
            self._left -= take
            self._position += take
        return pieces


def _borrow(purpose: str, nbytes: int) -> memoryview:
    """Return memory of this thread that the next call for this purpose uses again.

    The pages of fresh memory cost three times as much as what is copied into them.
    """
    memory = getattr(_borrowed, purpose, b"")
    if len(memory) < nbytes:
        memory = bytearray(nbytes + nbytes // 8)
        setattr(_borrowed, purpose, memory)
    return memoryview(memory)[:nbytes]


class _RowLayout:
    """How columns are stored in a chunk of rows, ready to be cut into batches.

    A chunk is a list of matrices, one row a row: of all numeric columns of one type, of
    each stack of columns, of each fixed-size list. Decoded rows are written where the
    shuffled order has them, so that a batch is a stretch of the chunk. Other columns
    stay Arrow arrays, in the order in which they are read.
    """

    def __init__(
        self,
        source: _BlockSource,
        fill_null: dict[str, Any] | None = None,
        as_rows: bool = False,
        stack: dict[str, list[str]] | None = None,
        required: Sequence[str] = (),
    ):
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        self.as_rows, self.fill_null = as_rows, fill_null or {}
        self.required = required
        self.types: dict[str, Any] = {}
        # (name of a matrix that goes into the batch as a whole, its columns, NumPy
        # type, values in a row if it has such a name, else 0).
        self.matrices: list[tuple[str | None, list[int], Any, int]] = []
        self.others: list[int] = []
        stacked = self._stacked(stack or {}, source.types)
        numbers: dict[tuple[str | None, Any], list[int]] = {}
        for i, (name, stored) in enumerate(source.types.items()):
            kind = stored if as_rows else _tensor_type(pa, stored)
            if kind is None:
                raise DataError(
                    f"column {name!r} of {source.first_file} has type {stored}, which "
                    "fits no batch: leave it out with columns=[...] or convert it with "
                    "column_types"
                )
            self.types[name] = kind
            if not as_rows and pa.types.is_fixed_size_list(kind):
                dtype = np.dtype(kind.value_type.to_pandas_dtype())
                self.matrices.append((name, [i], dtype, kind.list_size))
            elif not as_rows and pa.types.is_primitive(kind):
                key = stacked.pop(name, None), np.dtype(kind.to_pandas_dtype())
                numbers.setdefault(key, []).append(i)
            else:
                self.others.append(i)
        for name, to in stacked.items():
            raise DataError(
                f"column {name!r} of stack {to!r} is {self.types[name]}: only columns "
                "of single numbers can be stacked"
            )
        for (to, dtype), columns in numbers.items():
            if to in [done for done, *_ in self.matrices if done]:
                raise DataError(
                    f"the columns of stack {to!r} have several types, {dtype} among "
                    "them: make them one with column_types"
                )
            if to:
                position = {name: i for i, name in enumerate(source.types)}
                columns = [position[name] for name in (stack or {})[to]]
            self.matrices.append((to, columns, dtype, len(columns) if to else 0))
        self.names = list(self.types)
        hidden = {name for names in (stack or {}).values() for name in names}
        self.outputs = [name for name in self.names if name not in hidden]
        self.outputs += list(stack or {})
        kinds = list(self.types.values())
        self.schema = pa.schema([(str(i), kinds[i]) for i in self.others])

    @staticmethod
    def _stacked(stack: dict[str, list[str]], types: dict[str, Any]) -> dict[str, str]:
        """Return the stack of each column that is in one, which it checks."""
        stacked: dict[str, str] = {}
        for to, names in stack.items():
            if to in types or not names or isinstance(names, str):
                raise DataError(
                    f"stack {to!r} must be a list of columns, with a name that no "
                    f"column has: {names!r}"
                )
            for name in names:
                if name not in types:
                    raise DataError(
                        f"no column {name!r} for stack {to!r}: there are "
                        f"{', '.join(types)}"
                    )
                if name in stacked:
                    raise DataError(f"column {name!r} is in stacks twice")
                stacked[name] = to
        return stacked

    def convert(self, file: str, name: str, array: Any) -> Any:
        """Give a decoded column its type, and fill or refuse its nulls."""
        pa = _import_data_package("pyarrow", "pyarrow")
        kind = self.types[name]
        if not array.null_count and array.type == kind and pa.types.is_primitive(kind):
            return array
        try:
            if pa.types.is_dictionary(array.type) and array.type != kind:
                array = array.dictionary_decode()
            value = self.fill_null.get(name)
            any_size = pa.types.is_list(array.type) or pa.types.is_large_list(
                array.type
            )
            if any_size and pa.types.is_fixed_size_list(kind):
                array = _check_list_sizes(array, kind.list_size, value)
            if array.type != kind:
                # Large integers may be rounded on their way to floats.
                array = array.cast(kind, safe=not pa.types.is_floating(kind))
            if pa.types.is_fixed_size_list(kind) and isinstance(value, int | float):
                array = array.fill_null(pa.scalar([value] * kind.list_size, kind))
                elements = array.flatten().fill_null(value)
                array = pa.FixedSizeListArray.from_arrays(elements, kind.list_size)
            elif array.null_count and name in self.fill_null:
                array = array.fill_null(pa.scalar(value, kind))
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise DataError(f"column {name!r} of {file}: {error}") from error
        if array.null_count and name in self.required:
            raise DataError(
                f"column {name!r} of {file} has nulls: fill them, or {_SKIP_IT}"
            )
        if self.as_rows:
            return array
        nulls = array.null_count
        if pa.types.is_fixed_size_list(kind):
            nulls += array.flatten().null_count
        elif not pa.types.is_primitive(kind):
            return array
        elif nulls and pa.types.is_floating(kind):
            return array.fill_null(float("nan"))
        if nulls:
            raise DataError(
                f"column {name!r} of {file} has nulls, which {kind} tensors cannot "
                f"hold: pass fill_null={{{name!r}: ...}}"
            )
        return array

    def row_bytes(self) -> int:
        """Return the bytes of a row in the matrices."""
        return sum(
            dtype.itemsize * (size or len(columns))
            for _, columns, dtype, size in self.matrices
        )

    def view(self, memory: torch.Tensor, rows: int) -> list[Any]:
        """Lay out the matrices of so many rows in a piece of memory."""
        chunk, begin, raw = [], 0, memory.numpy()
        for _, columns, dtype, size in self.matrices:
            width = size or len(columns)
            end = begin + rows * width * dtype.itemsize
            matrix = raw[begin:end].view(dtype)
            chunk.append(matrix.reshape(rows, width))
            begin = end
        return chunk

    def place(self, chunk: list[Any], to: Any, arrays: list[Any]) -> None:
        """Write decoded columns into a chunk.

        Args:
            to: the place in the chunk of each row; -1, for those that are not used, is
                its last place.
        """
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        for matrix, (_, columns, dtype, size) in zip(chunk, self.matrices, strict=True):
            values = [arrays[i] for i in columns]
            if matrix.shape[1] == 1 and not size:
                # Copies only booleans, which Arrow keeps as bits.
                matrix[:, 0][to] = values[0].to_numpy(zero_copy_only=False)
                continue
            # Each row is one item of so many bytes: four times as fast.
            row = np.dtype((np.void, matrix.shape[1] * dtype.itemsize))
            items = matrix.view(row)
            if pa.types.is_fixed_size_list(values[0].type):
                flat = values[0].flatten().to_numpy(zero_copy_only=False)
                np.put(items, to, flat.view(row))
                continue
            width, count = len(values), len(to)
            if count * dtype.itemsize % 4096 == 0:
                # At the same place of a page columns push each other out of the cache.
                gap = values[0].slice(0, 64)
                values = [array for value in values for array in (value, gap)]
            # Joined first: this is faster than column by column.
            lines = pa.concat_arrays(values).to_numpy(zero_copy_only=False)
            lines = lines.reshape(width, -1)
            tile = np.frombuffer(_borrow("tile", count * row.itemsize), dtype)
            tile = tile.reshape(count, width)
            tile[:] = lines[:, :count].T
            np.put(items, to, tile.view(row))

    def take(self, arrays: list[Any], rows: Any) -> list[Any]:
        """Return rows of Arrow arrays in the given order."""
        pa = _import_data_package("pyarrow", "pyarrow")
        indices = pa.array(rows.astype("int32"))
        return [array.take(indices) for array in arrays]

    def batches(
        self, chunk: list[Any], others: list[Any], bounds: list[int]
    ) -> Iterator[list[Any]]:
        """Copy batches out of a chunk, which is used again, and cut other arrays.

        Args:
            bounds: where each batch begins, and where the last ends.
        """
        whole = [size > 0 for *_, size in self.matrices]
        for low, high in itertools.pairwise(bounds):
            parts = [
                (matrix[low:high] if rows else matrix[low:high].T).copy()
                for matrix, rows in zip(chunk, whole, strict=True)
            ]
            texts = [array.slice(low, high - low) for array in others]
            yield parts + texts

    def batch(self, pieces: list[list[Any]], strings: str, pin: bool) -> dict[str, Any]:
        """Join slices to one batch: column name -> tensor, list or Arrow array."""
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        joined: list[Any] = pieces[0]
        if len(pieces) > 1:
            count = len(self.matrices)
            parts = list(zip(*pieces, strict=True))
            joined = [
                np.concatenate(part, 0 if size else 1)
                for part, (*_, size) in zip(parts, self.matrices, strict=False)
            ]
            joined += [pa.concat_arrays(part) for part in parts[count:]]
        batch: dict[str, Any] = dict.fromkeys(self.outputs)
        for matrix, (to, columns, _, _) in zip(joined, self.matrices, strict=False):
            single = to or len(columns) == 1
            tensor = torch.from_numpy(matrix if to or not single else matrix[0])
            tensor = tensor.pin_memory() if pin else tensor
            if single:
                batch[to or self.names[columns[0]]] = tensor
                continue
            for i, column in zip(columns, tensor.unbind(), strict=True):
                batch[self.names[i]] = column
        for i, texts in zip(self.others, joined[len(self.matrices) :], strict=True):
            batch[self.names[i]] = texts if strings == "arrow" else texts.to_pylist()
        return batch


def _submit_after(before: Future | None, pool: Any, task: Callable[[], Any]) -> Future:
    """Run a task in a pool once another is done, for which no thread waits."""
    if not before:
        return pool.submit(task)
    result: Future = Future()

    def finish(done: Future) -> None:
        error = done.exception()
        if error:
            result.set_exception(error)
        else:
            result.set_result(done.result())

    def submit(_: Future) -> None:
        with contextlib.suppress(RuntimeError):  # closed: nobody asks for the result
            pool.submit(task).add_done_callback(finish)

    before.add_done_callback(submit)
    return result


class _WindowFeed(IterableDataset):
    """Decodes windows into a ring of buffers that all workers share.

    Workers own whole blocks of a window, so no block is decoded twice, and write them
    side by side: numbers are never sent, and where they lie does not depend on the
    number of workers.
    """

    def __init__(
        self,
        stream: "_ColumnStream",
        layout: _RowLayout,
        batch_size: int,
        drop_last: bool,
        workers: int = 0,
    ):
        self.stream, self.layout = stream, layout
        self.batch_size, self.drop_last = batch_size, drop_last
        # Epoch and position, in shared memory: workers live longer than an epoch.
        self.cursor = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.told = len(stream.source.skipped)
        # A window is in use while threads decode four more: the blocks of a group of
        # CSV are parsed whole, with its first window, and have about three windows.
        # Workers decode one, and DataLoader lets them run two ahead. Windows of many
        # small blocks are larger than asked for; pages never used cost nothing.
        self.depth, buffers = (1, 4) if workers else (4, 5)
        # One place more for rows that are not used; numbers of any size lie aligned.
        self.rows = -(-(2 * stream.window_rows + 1025) // 64) * 64
        nbytes = self.rows * layout.row_bytes()
        self.ring = [
            torch.empty(0, dtype=torch.uint8).set_(
                torch.UntypedStorage._new_shared(nbytes)  # as default_collate does
                if workers
                else torch.UntypedStorage(nbytes)
            )
            for _ in range(buffers)
        ]

    def __iter__(self) -> Iterator[Any]:
        """Yield what `windows` does, in a worker, without what lies in the ring."""
        worker = get_worker_info()
        pa = _import_data_package("pyarrow", "pyarrow")
        source, layout = self.stream.source, self.layout
        windows = self.windows(worker.id, worker.num_workers)
        for _, first, lost, _, others in windows:
            texts = None
            if layout.others:
                batch = pa.record_batch(others, schema=layout.schema)
                texts = torch.frombuffer(batch.serialize(), dtype=torch.uint8)
            skipped, self.told = source.skipped[self.told :], len(source.skipped)
            yield first, lost, texts, skipped

    def shares(self) -> Iterator[Any]:
        """Yield what this rank takes of each window: see `_EpochPlan.shares`."""
        stream, (epoch, position) = self.stream, self.cursor.tolist()
        return stream.plan(epoch).shares(
            position,
            self.batch_size,
            self.drop_last,
            stream.rank,
            stream.world_size,
        )

    def receive(self, items: Iterator[Any], workers: int) -> Iterator[Any]:
        """Put together what all workers tell of each window, as `windows` has it."""
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        schema = self.layout.schema
        ring = [self.layout.view(memory, self.rows) for memory in self.ring]
        for (_, *share), chunk in zip(self.shares(), itertools.cycle(ring)):
            told = list(itertools.islice(items, workers))
            told.sort(key=lambda item: item[0])
            others: list[Any] = []
            if schema:
                buffers = [pa.py_buffer(item[2].numpy()) for item in told]
                parts = [pa.ipc.read_record_batch(b, schema).columns for b in buffers]
                others = [pa.concat_arrays(part) for part in zip(*parts, strict=True)]
            for item in told:
                self.stream.source.skipped += item[3]
            lost = np.concatenate([item[1] for item in told])
            yield share, told[0][0], lost, chunk, others

    def windows(self, worker: int = 0, workers: int = 1) -> Iterator[Any]:
        """Decode window after window, ahead of what is used.

        Yields:
            ((the place of each of its rows or -1, how many go into each batch, whether
            the last batch ends here), the first row that was read, rows that were
            lost, matrices in the order of the batches, other arrays as they were read).
        """
        ring = [self.layout.view(memory, self.rows) for memory in self.ring]
        todo = zip(self.shares(), itertools.cycle(ring))
        readers: dict[int, _BlockReader | None] = {}
        threads = 1 if workers > 1 else min(4, _usable_cpu_count())
        with ThreadPoolExecutor(threads) as pool:
            begun: dict[int, Future] = {}
            start = functools.partial(
                self._start_window, pool, readers, begun, worker, workers
            )
            ahead = collections.deque(
                itertools.starmap(start, itertools.islice(todo, self.depth))
            )
            while ahead:
                following = next(todo, None)  # before waiting: its order is computed
                share, first, chunk, parts = ahead.popleft()
                done = [part.result() for part in parts]
                if following:
                    ahead.append(start(*following))
                lost, others = self._join(done)
                yield share, first, lost, chunk, others

    def _start_window(
        self,
        pool: Any,
        readers: dict[int, Any],
        begun: dict[int, Future],
        worker: int,
        workers: int,
        share: tuple[_StreamWindow, Any, list[int], bool],
        chunk: list[Any],
    ) -> Any:
        """Begin to decode a worker's blocks of a window."""
        np = _import_data_package("numpy", "numpy")
        window, to, counts, whole = share
        edges = np.append(0, np.cumsum(window.high - window.low))
        first, last, taken = 0, len(window.blocks), sum(counts)
        if taken >= self.rows:  # the last place is for rows that are not used
            raise DataError(
                f"{len(window.blocks)} row groups or files of few rows come together "
                f"with large ones: pass window_rows={2 * self.stream.window_rows}"
            )
        if taken < window.rows:  # a rank reads no block that holds none of its rows
            ends = np.flatnonzero(to >= 0)[[0, -1]] if taken else [0, -1]
            first, last = np.searchsorted(edges, ends, "right") - [1, 0]
        if workers > 1 and first < last:
            size = self.stream.source.block_rows[window.blocks[first:last]]
            middle = (np.cumsum(size) - size / 2) / size.sum()
            # Workers take turns in owning the first blocks of a group.
            turn = (worker - window.group) % workers
            mine = np.searchsorted(middle * workers, [turn, turn + 1])
            first, last = first + mine[0], first + mine[1]
        for block, part in list(begun.items()):
            if block not in window.blocks and part.done():
                del begun[block]
                readers.pop(block, None)
        parts = []
        for i in first + np.flatnonzero(np.diff(edges[first : last + 1])):
            block = int(window.blocks[i])
            read = functools.partial(
                self._read_part,
                readers,
                chunk,
                to[edges[i] : edges[i + 1]],
                int(edges[i]),
                block,
                int(window.low[i]),
                int(window.high[i]),
            )
            begun[block] = _submit_after(begun.get(block), pool, read)
            parts.append(begun[block])
        begin = int(edges[first]) if parts else window.rows
        return (to, counts, whole), begin, chunk, parts

    def _read_part(
        self,
        readers: dict[int, Any],
        chunk: list[Any],
        to: Any,
        begin: int,
        block: int,
        low: int,
        high: int,
    ) -> tuple[list[list[Any]], Any]:
        """Decode a block's rows low to high, which are a window's from `begin` on.

        The rows before them come first.

        Args:
            to: the place in the chunk of each of these rows.

        Returns:
            (the arrays of the columns that are in no matrix, rows that were lost).
        """
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        source, layout = self.stream.source, self.layout
        others: list[list[Any]] = [[] for _ in layout.others]
        lost = [np.empty(0, dtype=np.int64)]
        at = 0
        try:
            if block not in readers:
                # In whole parts of windows, so that none is cut in two.
                parts = -(-_DECODED_ROWS // (high - low))
                ahead = min(parts * (high - low), 1 << 16)
                readers[block] = _BlockReader(source.read(block, ahead, layout.convert))
            reader = readers[block]
            if reader is None:
                raise DataError("was skipped before")
            for rows, arrays in reader.read(low, high):
                if isinstance(arrays, DataError):
                    if str(arrays) not in source.skipped:
                        source.skipped.append(str(arrays))
                    lost.append(np.arange(begin + at, begin + at + rows))
                    texts = [pa.nulls(rows, kind) for kind in layout.schema.types]
                else:
                    layout.place(chunk, to[at : at + rows], arrays)
                    texts = [arrays[i] for i in layout.others]
                at += rows
                for values, text in zip(others, texts, strict=True):
                    values.append(text)
            if high == source.block_rows[block]:
                del readers[block]  # closes the file
        except DataError as error:
            if source.on_error == "raise":
                raise
            if readers.get(block, self) is not None:
                rows = source.block_rows[block] - low
                if not any(told.startswith(str(error)) for told in source.skipped):
                    source.skipped.append(f"{error} ({_count_rows(rows)})")
            readers[block] = None
            others = [[pa.nulls(high - low, kind)] for kind in layout.schema.types]
            return others, np.arange(begin, begin + high - low)
        if others and get_worker_info():  # its allocator keeps 70 MB of texts else
            pa.default_memory_pool().release_unused()
        return others, np.concatenate(lost)

    def _join(self, done: list[Any]) -> tuple[Any, list[Any]]:
        """Return the rows that were lost, and the columns that are in no matrix."""
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        joined = []
        for i, kind in enumerate(self.layout.schema.types):
            arrays = [array for others, _ in done for array in others[i]]
            joined.append(pa.concat_arrays(arrays) if arrays else pa.array([], kind))
        lost = [rows for _, rows in done]
        return np.concatenate([np.empty(0, np.int64), *lost]), joined

    def batches(self, windows: Iterator[Any]) -> Iterator[tuple[bool, list[Any]]]:
        """Yield (whether it ends there, its columns) of each batch in each window."""
        np = _import_data_package("numpy", "numpy")
        for (to, counts, whole), first, lost, chunk, others in windows:
            ends = np.cumsum(counts)
            if others or len(lost):
                rows = _invert(to, sum(counts))
                if len(lost):
                    kept = np.flatnonzero(~np.isin(rows, lost))
                    rows, ends = rows[kept], np.searchsorted(kept, ends)
                    chunk = [matrix[kept] for matrix in chunk]
                others = self.layout.take(others, rows - first)
            batches = self.layout.batches(chunk, others, [0, *ends.tolist()])
            for b, batch in enumerate(batches, 1):
                yield whole or b < len(counts), batch


def _read_piece(opened: Any, offset: int, nbytes: int) -> memoryview:
    """Read a piece of a file into memory that the next call in this thread uses."""
    opened.seek(offset)
    piece = _borrow("piece", nbytes)
    return piece[: opened.readinto(piece)]


class _Lines(NamedTuple):
    """The newlines of a piece of a file, which may begin inside of quotes."""

    ends: Any  # where each newline is
    inside: Any  # whether the number of quotes before it is odd (0 or 1)
    blank: Any  # whether it ends a blank line
    odd: int  # whether the number of all quotes is odd
    # Whether each quote opens or closes a column if the piece begins outside of quotes,
    # and if it begins inside. Others (5" wide) are text, and `inside` does not hold.
    regular: tuple[bool, bool]
    has_return: bool  # whether there is a carriage return

    def count(self, begin: int, state: int) -> tuple[int, int]:
        """Count the rows, not the blank lines, that end in a piece.

        Args:
            begin: of the piece in its file, outside (state 0) or inside (1) of quotes.

        Returns:
            (rows, where the last of them ends in the file or -1).
        """
        is_end = self.inside == state
        last = self.ends[is_end][-1:]
        end = begin + int(last[0]) + 1 if len(last) else -1
        return int((is_end & ~self.blank).sum()), end


def _find_lines(piece: Any, lead: int, marks: tuple[int | None, int]) -> _Lines:
    """Find the newlines of a piece of a file.

    Args:
        piece: begins with `lead` bytes of the piece before.
        marks: the bytes that quote (or None) and that separate columns.
    """
    np = _import_data_package("numpy", "numpy")
    quote, delimiter = marks
    letters = np.frombuffer(piece, np.uint8)
    found = []
    for low in range(lead, len(letters), _CACHE_BYTES):
        part = letters[low : low + _CACHE_BYTES]
        is_mark = part - np.uint8(10) <= 3  # newlines, returns, and rare others
        if quote is not None:  # a newline after an odd number of quotes is text
            is_mark |= part == quote
        found.append(np.flatnonzero(is_mark) + low)
    where = np.concatenate([np.empty(0, np.int64), *found])
    mark = letters[where]
    is_end, is_quote = mark == 10, mark == (quote or 0)
    inside = np.cumsum(is_quote, dtype=np.int32) & 1
    ends, quotes = where[is_end], where[is_quote]
    # Blank: right after another newline, with or without a carriage return.
    before, second = (
        np.where(ends < back, 10, letters[np.maximum(ends - back, 0)])
        for back in (1, 2)  # a file begins a line
    )
    blank = (before == 10) | ((before == 13) & (second == 10))
    may_precede = np.zeros(256, dtype=bool)
    may_precede[[10, 13, delimiter, quote or 10]] = True
    opens = may_precede[letters[quotes - 1]] | (quotes == 0)
    if not lead and piece[:3] == codecs.BOM_UTF8:
        opens |= quotes == 3
    regular = bool(opens[0::2].all()), bool(opens[1::2].all())
    odd, has_return = len(quotes) & 1, bool((mark == 13).any())
    return _Lines(ends, inside[is_end], blank, odd, regular, has_return)


def _find_ends(
    piece: bytes | memoryview, marks: tuple[int | None, int]
) -> tuple[Any, Any]:
    """Return where rows end, in a piece that begins with one, and which are blank."""
    np = _import_data_package("numpy", "numpy")
    ends, inside, blank, _, regular, _ = _find_lines(piece, 0, marks)
    if not regular[0]:  # quotes within text: column by column
        quote, delimiter = (re.escape(bytes([mark])) for mark in marks)
        begin = rb"(?:\A(?:%b)?|(?<=[\r\n%b]))%b" % (codecs.BOM_UTF8, delimiter, quote)
        text = rb"[^%b]*" % quote
        quoted = rb"%b%b(?:%b%b%b)*(?:%b|\Z)" % (begin, text, quote, quote, text, quote)
        columns = re.finditer(quoted, piece)
        spans = np.array([column.span() for column in columns]).reshape(-1, 2)
        begun, done = (np.searchsorted(edge, ends, "right") for edge in spans.T)
        inside = begun - done
    return ends[inside == 0], blank[inside == 0]


def _no_row_end(begin: int) -> ValueError:
    return ValueError(
        f"the row at byte {begin} does not end, neither in {_MOST_ROW_BYTES >> 20} MB "
        "nor with the file: close each quote, pass another quote_char (None if quotes "
        "are text), or write one JSON object a line"
    )


def _cut_lines(
    stream: Any, block_bytes: int, marks: tuple[int | None, int]
) -> Iterator[tuple[bytes, int, bool]]:
    """Cut a text stream after whole rows.

    Yields:
        (bytes, rows that are not blank, whether the last of them ends).

    Raises:
        ValueError: a row is too long to be one.
    """
    rest, begin = b"", 0
    while data := stream.read(block_bytes):
        block = rest + data
        ends, blank = _find_ends(block, marks)
        if not len(ends):
            rest = block
            if len(rest) > _MOST_ROW_BYTES:
                raise _no_row_end(begin)
            continue
        stop = int(ends[-1]) + 1
        yield block[:stop], int((~blank).sum()), True
        rest = block[stop:]
        begin += stop
    if rest:  # no newline at the end, or it is in quotes
        ends, _ = _find_ends(rest + b"\n", marks)
        yield rest, int(rest != b"\r"), len(ends) > 0


def _load_objects(lines: bytes) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in lines.split(b"\n") if line]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object")
    return rows


class _LineSource(_FileSource):
    """CSV and JSONL files as blocks of whole rows, found by one pass over the bytes.

    The pass counts rows (about 1 GB/s) and is what makes the order, equal steps and
    resume possible. Compressed files and UTF-16/32 cannot be entered in the middle:
    each is one block, read as a stream.
    """

    typed = False

    def __init__(
        self,
        *args: Any,
        encoding: str = "utf-8",
        delimiter: str | None = None,
        quote_char: str | None = '"',
    ):
        self.encoding, self.delimiter = encoding.lower().replace("_", "-"), delimiter
        self.is_utf8 = self.encoding in ("utf-8", "utf8")
        self.quote_char = quote_char
        self.names: dict[str, list[str]] = {}
        self.plain: set[str] = set()  # local UTF-8 CSV in which each line is a row
        self.unended: dict[str, int] = {}  # where a file's last row begins, without end
        # All files' pieces in one pool: what it holds does not grow with the files.
        with ThreadPoolExecutor(min(4, _usable_cpu_count())) as self._scanners:
            super().__init__(*args)
        del self._scanners  # cannot be sent to a worker

    def _is_json(self, file: str) -> bool:
        return ".json" in Path(file).name or ".ndjson" in Path(file).name

    def _is_whole(self, file: str) -> bool:
        packed = Path(file).suffix in (".gz", ".zst", ".bz2", ".lz4")
        return packed or self.encoding.startswith(("utf-16", "utf-32"))

    def _delimiter(self, file: str) -> str:
        return self.delimiter or ("\t" if ".tsv" in Path(file).name else ",")

    def _marks(self, file: str) -> tuple[int | None, int]:
        """Return the bytes between which newlines are text, and that end a column."""
        # JSON writes a newline in a string as backslash n.
        is_quoted = self.quote_char and not self._is_json(file)
        quote = ord(self.quote_char) if is_quoted else None
        return quote, ord(self._delimiter(file))

    def _cut_file(self, file: str) -> Iterator[tuple[bytes, int]]:
        """Yield (bytes, rows) of whole rows; a last one without end is noted."""
        pa = _import_data_package("pyarrow", "pyarrow")
        begin = 0
        with self.filesystem.open_input_stream(file) as opened:
            stream = opened
            if self._is_whole(file) and not self.is_utf8:
                stream = pa.transcoding_input_stream(opened, self.encoding, "utf-8")
            blocks = _cut_lines(stream, _LINE_BLOCK_BYTES, self._marks(file))
            for data, rows, ended in blocks:
                if not ended:
                    self.unended[file] = begin
                begin += len(data)
                yield data, rows

    def _scan_file(self, file: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Cut a file into blocks of whole rows: rows, and (offset, bytes), of each."""
        marks = self._marks(file)
        size = self.filesystem.get_file_info(file).size
        starts = range(0, size, _LINE_BLOCK_BYTES)
        rows: list[int] = []
        keys: list[tuple[int, int]] = []
        begin, state = 0, 0
        plain = self.is_utf8 and not self._is_json(file)
        plain = plain and self.filesystem.type_name == "local"

        def scan(start: int) -> tuple[list[tuple[int, int]], int, Any, bool]:
            lead = min(2, start)
            piece = opened.read_at(_LINE_BLOCK_BYTES + lead, start - lead)
            lines = _find_lines(piece, lead, marks)
            counts = [lines.count(start - lead, state) for state in (0, 1)]
            return counts, lines.odd, lines.regular, lines.has_return

        with self.filesystem.open_input_file(file) as opened:
            for some in range(0, len(starts), 4096):  # a bounded number of futures
                part = starts[some : some + 4096]
                for counts, odd, regular, has_return in self._scanners.map(scan, part):
                    if not regular[state]:
                        return self._scan_in_order(file)
                    (count, end), (within, _) = counts[state], counts[1 - state]
                    plain = plain and not within and not has_return
                    if end >= 0:
                        rows.append(count)
                        keys.append((begin, end - begin))
                        begin = end
                    state ^= odd
            tail = opened.read_at(2, begin)
        if begin < size:  # no newline at the end
            rows.append(int(tail != b"\r"))
            keys.append((begin, size - begin))
        if state:
            self.unended[file] = begin
        for offset, nbytes in keys:
            if nbytes > _MOST_ROW_BYTES:
                self.unended.setdefault(file, offset)
        if plain and not state:
            self.plain.add(file)
        return rows, keys

    def _scan_in_order(self, file: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Do what `_scan_file` does for a file with quotes that are text: slowly."""
        rows: list[int] = []
        keys: list[tuple[int, int]] = []
        begin = 0
        for data, count in self._cut_file(file):
            rows.append(count)
            keys.append((begin, len(data)))
            begin += len(data)
        return rows, keys

    def _infer_types(self, file: str, head: bytes, types: dict[str, Any]) -> Any:
        """Parse the first rows of a file, with the types given or that Arrow finds.

        With on_error="skip" without those that cannot be parsed, or whose types are not
        those of most. A key of JSONL that nobody asked for may change its type.
        """
        pa = _import_data_package("pyarrow", "pyarrow")
        refusals, is_json = (ValueError, pa.ArrowException), self._is_json(file)

        def parse(data: bytes) -> Any:
            try:
                return self._parse(file, data, None, types, all_columns=True)
            except refusals as error:
                if not is_json or self.wanted is None:
                    raise
                try:
                    return self._parse_keys(data, types)
                except (*refusals, TypeError):  # not even these
                    raise error from None

        try:
            return parse(head)
        except refusals:
            if self.on_error == "raise" or not head.strip():
                raise
        bounds = self._find_rows(file, head)
        header = head[: 0 if is_json else bounds[1]]
        bounds = bounds if is_json else bounds[1:]

        def attempt(low: int, high: int) -> bytes:
            rows = head[bounds[low] : bounds[high]]
            parse(header + rows)
            return rows

        pieces, errors = _try_in_halves(attempt, len(bounds) - 1, refusals)
        good = b"".join(rows for _, rows in pieces if rows)
        if not good:
            raise errors[0][1]
        try:
            return parse(header + good)
        except refusals:  # each row by itself can be parsed
            found = {**self._commonest_types(good), **types}
            if found.keys() == types.keys():
                raise
        return self._infer_types(file, head, found)

    def _parse_keys(self, lines: bytes, types: dict[str, Any]) -> Any:
        """Parse those keys of JSONL that are wanted, whatever the others hold."""
        pa = _import_data_package("pyarrow", "pyarrow")
        rows = _load_objects(lines)
        keys = [key for key in self.wanted if any(key in row for row in rows)]
        columns = {key: [row.get(key) for row in rows] for key in keys}
        return pa.table({key: pa.array(columns[key], types.get(key)) for key in keys})

    def _commonest_types(self, lines: bytes) -> dict[str, Any]:
        """Return the type that most values of each wanted key of JSONL have."""
        pa = _import_data_package("pyarrow", "pyarrow")
        rows = _load_objects(lines)

        def kind(value: Any) -> type:
            return float if type(value) is int else type(value)

        types = {}
        for key in self.wanted or ():
            values = [row[key] for row in rows if row.get(key) is not None]
            if values:
                most = collections.Counter(map(kind, values)).most_common(1)[0][0]
                types[key] = pa.array([v for v in values if kind(v) is most]).type
        return types

    def _first_rows(self, file: str, data: bytes) -> bytes:
        """Return the rows that end in the first megabyte."""
        ends, _ = _find_ends(data[: 1 << 20], self._marks(file))
        return data[: int(ends[-1]) + 1 if len(ends) else 0]

    def _index_file(self, file: str) -> tuple[Any, list[int], list[Any], int]:
        if self._is_whole(file):
            head, count, nbytes = b"", 0, 0
            for data, rows_here in self._cut_file(file):
                head = head or data
                count += rows_here
                nbytes += len(data)
            rows, keys = [count], [(0, -1)]
            head = self._first_rows(file, head) or head
        else:
            rows, keys = self._scan_file(file)
            nbytes = sum(length for _, length in keys)
            with self.filesystem.open_input_file(file) as opened:
                block = keys[0][1] if keys else 0
                start = opened.read_at(min(block, 1 << 20), 0)
                head = self._first_rows(file, start)
                if not head and block > _MOST_ROW_BYTES:
                    raise _no_row_end(0)
                head = head or opened.read_at(block, 0)  # a row of more than that
        if file in self.unended and self.on_error == "raise":
            raise _no_row_end(self.unended[file])
        if not head:
            raise ValueError("it is empty")
        if b"\n" not in head and b"\r" in head.strip():
            raise ValueError("its lines end with \\r alone: write \\n or \\r\\n")
        table = self._infer_types(file, head, self.given_types)
        given = [name for name in self.given_types if name in table.schema.names]
        if self._is_json(file) and any(
            table[name].null_count == len(table) for name in given
        ):  # Arrow makes a column of a key that no row has, if its type is given
            found = self._infer_types(file, head, {}).schema.names
            table = table.select([n for n in table.schema.names if n in found])
        schema = table.schema
        rows[0] -= not self._is_json(file)
        self.names[file] = schema.names
        return schema, rows, keys, nbytes

    def _parse(
        self,
        file: str,
        data: Any,
        names: list[str] | None,
        types: dict[str, Any],
        all_columns: bool = False,
    ) -> Any:
        """Parse whole rows into the columns that have a type here.

        Args:
            data: bytes, or a stream of CSV in which each line is a row.
            names: of all columns; None: the first row of the file is among the rows.
            all_columns: the others as well, with the types that Arrow finds.
        """
        pa = _import_data_package("pyarrow", "pyarrow")
        is_stream = isinstance(data, pa.NativeFile)
        if not self._is_whole(file) and not self.is_utf8:
            data = str(data, self.encoding).encode()
        if self._is_json(file):
            pa_json = _import_data_package("pyarrow.json", "pyarrow")
            table = pa_json.read_json(
                pa.BufferReader(data[3:] if data[:3] == codecs.BOM_UTF8 else data),
                pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
                pa_json.ParseOptions(
                    explicit_schema=pa.schema(types.items()),
                    unexpected_field_behavior="infer" if all_columns else "ignore",
                ),
            )
            table.validate(full=True)  # that texts are UTF-8, as read_csv does
            return table
        pa_csv = _import_data_package("pyarrow.csv", "pyarrow")
        if not is_stream and data[-1:] != b"\n":
            data = bytes(data) + b"\n"  # Arrow wants one after a header without rows
        return pa_csv.read_csv(
            data if is_stream else pa.BufferReader(data),
            pa_csv.ReadOptions(
                use_threads=False,
                block_size=_CACHE_BYTES if is_stream else len(data) + 1,
                column_names=names,
            ),
            pa_csv.ParseOptions(
                delimiter=self._delimiter(file),
                quote_char=self.quote_char or False,
                newlines_in_values=not is_stream,
            ),
            pa_csv.ConvertOptions(
                column_types=types,
                include_columns=None if all_columns else list(types),
            ),
        )

    def _describe(self, block: int) -> str:
        file = self.files[self.block_file[block]]
        offset, length = self.block_key[block]
        return file if length < 0 else f"{file}, bytes {offset} to {offset + length}"

    def _find_rows(self, file: str, data: bytes | memoryview) -> list[int]:
        """Return where the rows of a block begin, and where the last one ends."""
        ends, blank = _find_ends(data, self._marks(file))
        bounds = [0, *(ends[~blank] + 1).tolist()]
        if bytes(data[bounds[-1] :]).strip(b"\r\n"):  # no newline at the end
            bounds.append(len(data))
        return bounds

    def _parse_rows(
        self,
        file: str,
        data: bytes | memoryview,
        names: list[str] | None,
        rows: int,
        begin: int,
    ) -> list[tuple[int, Any]]:
        """Parse whole rows: [(rows, table), ...].

        With on_error="skip" an error stands for the rows that cannot be parsed.

        Args:
            rows: how many there are.
            begin: where in the file, or in its text, the data begins.
        """
        pa = _import_data_package("pyarrow", "pyarrow")
        try:
            table = self._parse(file, data, names, self.types)
            if table.num_rows == rows:
                return [(rows, table)]
            if self.on_error == "raise":
                self._check_rows(file, rows - table.num_rows)
        except (ValueError, pa.ArrowException):
            if self.on_error == "raise":
                raise
        bounds = self._find_rows(file, data)
        if names is None and not self._is_json(file):
            names, bounds = self.names[file], bounds[1:]

        def attempt(low: int, high: int) -> Any:
            part = data[bounds[low] : bounds[high]]
            table = self._parse(file, part, names, self.types)
            if table.num_rows != high - low:
                raise ValueError(f"it holds {table.num_rows} rows")
            return table

        refusals = (ValueError, pa.ArrowException)
        pieces, errors = _try_in_halves(attempt, len(bounds) - 1, refusals)
        if not errors:
            return pieces
        row, error = errors[0]
        cause = ValueError(re.sub(r"Row #1: |,? in row 0", "", str(error)))
        where = f"{file}, the row at byte {begin + bounds[row]}"
        lines = bytes(data[bounds[row] : bounds[row + 1]]).count(b"\n")
        if lines > 1:
            where += f" of {lines:,} lines (is each quote closed?)"
        return _stand_for_lost(pieces, self._unreadable(where, cause))

    def _read_tables(self, block: int) -> Iterator[tuple[int, Any]]:
        """Yield (rows, table), or an error for rows that cannot be parsed."""
        pa = _import_data_package("pyarrow", "pyarrow")
        file = self.files[self.block_file[block]]
        offset, length = self.block_key[block]
        names = None if offset == 0 else self.names[file]
        rows = int(self.stored_rows[block])
        if length > _MOST_ROW_BYTES:
            yield from self._miss_end(file, offset, rows)
            return
        if file in self.plain:
            with self.filesystem.open_input_file(file) as opened:
                try:
                    stream = opened.get_stream(offset, length)
                    table = self._parse(file, stream, names, self.types)
                except (ValueError, pa.ArrowException):
                    table = None  # a bad row, or one that is longer than a piece
            if table is not None and table.num_rows == rows:
                yield rows, table
                return
            self.plain.discard(file)
        header = int(offset == 0 and not self._is_json(file))
        blocks: Iterable[tuple[bytes | memoryview, int]]
        if length < 0:
            blocks = self._cut_file(file)
        else:
            with self.filesystem.open_input_file(file) as opened:
                blocks = [(_read_piece(opened, offset, length), rows + header)]
        for data, rows in blocks:
            if self.unended.get(file) == offset:
                lines = bytes(data).count(b"\n")
                yield from self._miss_end(file, offset, rows - header, lines)
            else:
                yield from self._parse_rows(file, data, names, rows - header, offset)
            names, header = self.names[file], 0
            offset += len(data)

    def _miss_end(
        self, file: str, begin: int, rows: int, lines: int = 0
    ) -> list[tuple[int, Any]]:
        """Return what stands for rows of which the last does not end."""
        what = f"{file}, its last {lines:,} lines" if lines > 1 else file
        error = self._unreadable(what, _no_row_end(begin))
        return _stand_for_lost([(rows, None)], error)

    def _read_raw(self, block: int, batch_rows: int) -> Iterator[tuple[int, Any]]:
        for rows, table in self._read_tables(block):
            if isinstance(table, DataError):
                yield rows, table
            else:
                yield from ((part.num_rows, part) for part in table.to_batches())


def _read_in_order(source: _LineSource) -> Iterator[Any]:
    """Yield tables of all rows, in the order of the files, decoded in threads."""
    pa = _import_data_package("pyarrow", "pyarrow")
    schema = pa.schema(source.types.items())

    def read(block: int) -> Iterator[Any]:
        for _, arrays in source.read(block, 1 << 16, lambda *given: given[2]):
            if isinstance(arrays, DataError):
                raise arrays
            yield pa.table(arrays, names=schema.names).cast(schema)

    threads = min(4, _usable_cpu_count())
    ahead: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for block in source.block_rows.nonzero()[0].tolist():
            is_file = source.block_key[block][1] < 0  # of any size: piece by piece
            while len(ahead) > (0 if is_file else 2 * threads):
                yield from ahead.popleft().result()
            if is_file:
                yield from read(block)
            else:
                ahead.append(pool.submit(lambda block: list(read(block)), block))
        while ahead:
            yield from ahead.popleft().result()


def _write_parquet(tables: Iterable[Any], schema: Any, path: Path) -> None:
    """Write tables to a file, all or nothing, in row groups of about 8 MB."""
    pa = _import_data_package("pyarrow", "pyarrow")
    pq = _import_data_package("pyarrow.parquet", "pyarrow")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # What is read fastest: neither compressed nor dictionaries.
    options = {"compression": "none", "use_dictionary": False}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            group, size = [], 0
            for table in tables:
                group.append(table)
                size += table.nbytes
                if size >= 8 << 20:
                    writer.write_table(pa.concat_tables(group), row_group_size=1 << 30)
                    group, size = [], 0
            if group:
                writer.write_table(pa.concat_tables(group), row_group_size=1 << 30)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _convert_once(
    cache_dir: str | Path,
    make_source: Callable[[], _LineSource],
    filesystem: Any,
    files: Iterable[str],
    settings: Any,
) -> _FileSource:
    """Return the rows of text files from a Parquet file, which is made if need be.

    Its name is a hash of the settings and of all files' names, sizes and times. Where
    on_error="skip" has left something out, nothing is kept.
    """
    pa = _import_data_package("pyarrow", "pyarrow")
    found = filesystem.get_file_info(list(files))
    facts = [[info.path, info.size, info.mtime_ns] for info in found]
    way = 3  # in which it is made; 1 could mix up columns, 2 lost rows after 5" wide
    text = json.dumps([way, settings, facts], default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{digest}.parquet"
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by one that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:  # nobody writes it any more
                left.unlink()
    if not path.exists():
        source = make_source()
        if source.skipped:
            return source
        tables = _read_in_order(source)
        try:
            _write_parquet(tables, pa.schema(source.types.items()), path)
        except DataError:
            if source.on_error == "raise":
                raise
            return source
        except OSError as error:
            raise DataError(
                f"cannot write {path}: {error}. Free space, or leave cache_dir out"
            ) from error
        finally:
            tables.close()
    return _ParquetSource(str(path), (".parquet",), None, None, None, "raise")


# --- Streams, part 4: what users make


class _ColumnStream(IterableDataset):
    """Rows of column files in an order that seed and epoch alone decide."""

    def __init__(
        self,
        source: _BlockSource,
        batch_size: int,
        shuffle: bool,
        seed: int,
        fill_null: dict[str, Any] | None,
        rank: int | None,
        world_size: int | None,
        window_rows: int | None,
    ):
        self.batch_size = batch_size
        self.shuffle, self.seed, self.fill_null = shuffle, seed, fill_null
        self.required: Sequence[str] = ()
        self.rank, self.world_size = _data_rank(rank, world_size)
        # A few MB shuffle in the cache, and there are five such buffers. Parquet of few
        # columns gains a tenth by more rows, CSV loses a fifth.
        limits = [(1 << 15, 16 << 20)] + [(1 << 16, 4 << 20)] * source.typed
        sizes = [min(rows, nbytes // source.row_bytes) for rows, nbytes in limits]
        bounded = max(1024, *sizes)
        self.window_rows = bounded if window_rows is None else window_rows
        if batch_size < 1 or self.window_rows < 1:
            raise ValueError(
                f"rows must be at least 1: {self.window_rows} in window_rows, "
                f"{batch_size} in batch_size or chunk_size"
            )
        for name in fill_null or {}:
            if name not in source.types:
                raise DataError(
                    f"no column {name!r} to fill_null: there are "
                    f"{', '.join(source.types)}"
                )
        self._take_source(source)

    def _take_source(self, source: _BlockSource) -> None:
        self.source, self.rows = source, int(source.block_rows.sum())
        layout = _RowLayout(
            source, self.fill_null, as_rows=True, required=self.required
        )
        self._row_feed = _WindowFeed(self, layout, self.batch_size, False)

    def split(
        self, val_fraction: float, seed: int = 0
    ) -> tuple["_ColumnStream", "_ColumnStream"]:
        """Split into (rows to train on, rows to validate on, in the files' order).

        Every row is in one of them; which, depends on row counts and seed alone, and
        nothing is read for it. Both have the same mixture of rows, but near copies of
        a row may be in both: split such data by files yourself. Each part is read by
        decoding all, so validating costs at most what an epoch's reading does.

        Raises:
            DataError: one of the two would be empty.
        """
        count = round(self.rows * val_fraction)
        if not 0 < count < self.rows:
            raise DataError(
                f"{count} of {self.rows} rows would be kept for validation: give more "
                "data or another val_fraction"
            )
        train, val = copy.copy(self), copy.copy(self)
        train._take_source(_SplitSource(self.source, count, seed, drawn=False))
        val._take_source(_SplitSource(self.source, count, seed, drawn=True))
        val.shuffle = False
        return train, val

    def drop_unreadable(self, required: Sequence[str] = ()) -> None:
        """With on_error="skip", read all rows once and leave out what cannot be read.

        Else a batch has fewer rows, or none, where something cannot be read. After this
        call, before `split` and on every rank, all batches are whole.

        Args:
            required: columns (labels, for instance) without whose value a row is left
                out as well; an empty text, NaN and infinity are none. With
                on_error="raise" a null in them is an error where it is met.

        Raises:
            DataError: no row can be read.
        """
        source, layout = self.source, _RowLayout(self.source, self.fill_null)
        if source.on_error == "raise":
            self.required = required
            self._take_source(source)
            return

        find_lost = functools.partial(self._find_lost, layout, required)
        blocks = source.block_rows.nonzero()[0].tolist()
        kept, lost_rows = source.block_rows.copy(), {}
        digest = hashlib.sha256()
        with ThreadPoolExecutor(min(4, _usable_cpu_count())) as pool:
            for block, (lost, told) in zip(
                blocks, pool.map(find_lost, blocks), strict=True
            ):
                source.skipped += dict.fromkeys(told)
                kept[block] -= len(lost)
                if len(lost) and kept[block]:
                    lost_rows[block] = lost
                    digest.update(lost.tobytes())
        if blocks and not kept.any():
            raise DataError(f"no rows can be read, such as: {source.skipped[-1]}")
        source.block_rows = kept
        if lost_rows:
            source.lost = lost_rows
            source.chosen_by = (*source.chosen_by, digest.hexdigest()[:16])
        self._take_source(source)

    def _find_lost(
        self, layout: _RowLayout, required: Sequence[str], block: int
    ) -> tuple[Any, list[str]]:
        """Return which rows of a block cannot be used, and why."""
        np = _import_data_package("numpy", "numpy")
        pa = _import_data_package("pyarrow", "pyarrow")
        source, begin, told = self.source, 0, []
        lost, empty = [np.empty(0, dtype=np.int64)], collections.Counter[str]()
        try:
            for rows, arrays in source.read(block, 1 << 14, layout.convert):
                if isinstance(arrays, DataError):
                    lost.append(np.arange(begin, begin + rows))
                    told.append(str(arrays))
                else:
                    columns = dict(zip(source.types, arrays, strict=True))
                    for name in required:
                        found = np.flatnonzero(_is_missing(columns[name]))
                        lost.append(begin + found)
                        empty[name] += len(found)
                begin += rows
        except DataError as error:
            rows = int(source.block_rows[block])
            return np.arange(rows), [f"{error} ({_count_rows(rows)})"]
        file = source.files[source.block_file[block]]
        for name, count in (+empty).items():
            number = pa.types.is_floating(layout.types[name])
            what = "empty or not finite" if number else "empty"
            told.append(f"column {name!r} of {file} is {what} ({_count_rows(count)})")
        return np.unique(np.concatenate(lost)), told

    def unique(self, column: str, limit: int = 10000) -> list[Any]:
        """Return a column's distinct values, sorted: the labels, for instance.

        Reads this column of all the data once, on every rank.

        Raises:
            DataError: there are nulls, or more than `limit` values.
        """
        compute = _import_data_package("pyarrow.compute", "pyarrow")
        if column not in self.source.types:
            raise DataError(
                f"no column {column!r} in the stream: it has "
                f"{', '.join(self.source.types)}"
            )
        source, values = self.source.select(column), set()
        for block in source.block_rows.nonzero()[0].tolist():
            try:
                read = source.read(block, 1 << 16, lambda *given: given[2])
                found = [
                    compute.unique(arrays[0])
                    for _, arrays in read
                    if not isinstance(arrays, DataError)
                ]
            except DataError:
                if source.on_error == "raise":
                    raise
                continue  # training comes to this block again, and lists it then
            values.update(*(part.to_pylist() for part in found))
            if None in values:
                file = source.files[source.block_file[block]]
                raise DataError(
                    f"column {column!r} of {file} has nulls: fill them, or leave these "
                    f"rows out by drop_unreadable([{column!r}]) with on_error='skip' "
                    "(--on-error skip)"
                )
            if len(values) > limit:
                raise DataError(
                    f"column {column!r} has more than {limit} distinct values, such as "
                    f"{next(iter(values))!r}: name another column, or raise the limit"
                )
        return sorted(values)

    @property
    def skipped(self) -> list[str]:
        """What on_error="skip" left out so far: file and cause."""
        return self.source.skipped

    def plan(self, epoch: int) -> _EpochPlan:
        """Return the order of an epoch."""
        source = self.source
        return _EpochPlan(
            source.block_rows,
            self.window_rows,
            self.seed,
            epoch,
            self.shuffle,
            source.together,
        )

    def order_digest(self) -> str:
        """Return what all that decides the order is hashed to."""
        way = 2  # a new number where the same facts give another order than before
        facts = [way, self.seed, self.shuffle, self.window_rows, self.source.together]
        facts += self.source.chosen_by
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(self.source.block_rows.tobytes())
        return digest.hexdigest()[:16]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of row iteration (running workers hear of it)."""
        self._row_feed.cursor[0] = epoch

    def __iter__(self) -> Iterator[Any]:
        np = _import_data_package("numpy", "numpy")
        worker, feed = get_worker_info(), self._row_feed
        which = (worker.id, worker.num_workers) if worker else (0, 1)
        for (to, counts, _), first, lost, _, others in feed.windows(*which):
            rows = _invert(to, sum(counts))
            rows = rows[~np.isin(rows, lost)] - first
            mine = rows[(rows >= 0) & (rows < len(others[0]))]
            columns = feed.layout.take(others, mine)
            yield from self._iterate_rows([_list_values(c) for c in columns])

    def _iterate_rows(self, columns: list[list[Any]]) -> Iterator[Any]:
        names = list(self.source.types)
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _list_values(array: Any) -> list[Any]:
    """Return an Arrow array's Python values, numbers the fast way."""
    if array.null_count or str(array.type) not in ("int64", "int32", "float", "double"):
        return array.to_pylist()
    return array.to_numpy().tolist()


def _is_missing(array: Any) -> Any:
    """Return which values of an Arrow array are null, not finite or an empty text."""
    pa = _import_data_package("pyarrow", "pyarrow")
    compute = _import_data_package("pyarrow.compute", "pyarrow")
    missing = compute.is_null(array)
    if pa.types.is_floating(array.type):
        missing = compute.invert(compute.is_finite(array)).fill_null(True)
    if pa.types.is_string(array.type):
        empty = compute.equal(compute.binary_length(array), 0).fill_null(False)
        missing = compute.or_(missing, empty)
    return missing.to_numpy(zero_copy_only=False)


class StreamingTextDataset(_ColumnStream):
    """Texts of CSV and JSONL files, in bounded memory and any number of workers.

    Iterating gives the text of each row; `StreamBatchLoader` gives batches.

    Args:
        file_path: a file, folder, glob or URI, or a list of them; gzip, zstd and bz2
            by their ending.
        chunk_size: rows of which the ranks take their shares (row iteration only).
        columns: further columns for the batches, a label for instance.
        column_types: Arrow types by column, where those of the first megabyte of the
            first file will not do: {"price": "float64"}.
        fill_null: value by column, for nulls in columns that become integer tensors.
        on_error: "skip" leaves out what cannot be read and lists it in `skipped`;
            batches are whole if `drop_unreadable` is called first.
        encoding: of the files; UTF-16 and UTF-32 are read in one piece, like .gz.
        quote_char: None where quotes are plain letters.
        rank, world_size: by default those of torch.distributed, which has to be
            initialized before.
        window_rows: rows that are shuffled together, by default 32768, or fewer if
            they are more than about 16 MB.
        cache_dir: folder in which the columns are kept as Parquet, so that only the
            first epoch parses text; takes as much disk as they do. Their order is
            another one than without. Files that have changed are converted again, what
            was made of the old ones stays until you delete it. Nothing is kept where
            on_error="skip" has left something out.

    Raises:
        DataError: names the file, column and remedy.
    """

    def __init__(
        self,
        file_path: str | Path | Sequence[str | Path],
        text_column: str = "text",
        chunk_size: int = 10000,
        columns: list[str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        column_types: dict[str, Any] | None = None,
        fill_null: dict[str, Any] | None = None,
        on_error: str = "raise",
        encoding: str = "utf-8",
        delimiter: str | None = None,
        quote_char: str | None = '"',
        filesystem: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        window_rows: int | None = None,
        cache_dir: str | Path | None = None,
    ):
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise DataError(f"{error}: pass one that Python knows") from None
        names = list(dict.fromkeys([text_column, *(columns or [])]))
        types = {text_column: "string", **(column_types or {})}
        style = {
            "encoding": encoding,
            "delimiter": delimiter,
            "quote_char": quote_char,
        }

        def make_source() -> _LineSource:
            given = (file_path, TEXT_ENDINGS, filesystem, names, types, on_error)
            return _LineSource(*given, **style)

        source: _FileSource
        if cache_dir is None:
            source = make_source()
        else:
            found = _list_data_files(file_path, TEXT_ENDINGS, filesystem)
            source = _convert_once(
                cache_dir, make_source, *found, [names, types, style]
            )
        super().__init__(
            source, chunk_size, shuffle, seed, fill_null, rank, world_size, window_rows
        )

    def _iterate_rows(self, columns: list[list[Any]]) -> Iterator[Any]:
        return iter(columns[0])


class StreamingParquetDataset(_ColumnStream):
    """Rows of Parquet files, in bounded memory and any number of workers.

    Iterating gives each row as a dict of Python values; `StreamBatchLoader` gives
    batches of tensors and never makes an object a row.

    Memory does not grow with the files, but with their width: Arrow holds a page (up to
    1 MB) and a dictionary of each column that is read. Measured with imports: under
    300 MB for 17 columns, 0.6 to 1.0 GB for 400 (row groups of 20 and 100 thousand).

    Args:
        file_path: a file, folder, glob or URI (s3://, gs://, what fsspec knows), or a
            list of them. `key=value` folders below it become columns.
        columns: the columns to read, all by default.
        batch_size: rows of which the ranks take their shares (row iteration only).
        filters: an Arrow expression or [(column, "==", value), ...]; row groups that
            their statistics rule out are never read.
        column_types: Arrow types by column to cast to: {"emb": pa.list_(pa.float32(),
            384)} makes a (B, 384) tensor of lists that all have 384 numbers; without
            it they come as lists, several times slower.
        fill_null: value by column, for nulls in columns that become integer tensors
            (those of floats become NaN); of a fixed-size list for each missing element.
        on_error: "skip" leaves out what cannot be read and lists it in `skipped`;
            batches are whole if `drop_unreadable` is called first.
        filesystem: of pyarrow or fsspec, where the path alone does not say it.
        rank, world_size: by default those of torch.distributed, which has to be
            initialized before.
        window_rows: rows that are shuffled together, by default 32768 (up to 65536
            of less than 4 MB), or fewer if they are more than about 16 MB.

    Raises:
        DataError: names the file, column and remedy.
    """

    def __init__(
        self,
        file_path: str | Path | Sequence[str | Path],
        columns: list[str] | None = None,
        batch_size: int = 1000,
        shuffle: bool = False,
        seed: int = 0,
        filters: Any = None,
        column_types: dict[str, Any] | None = None,
        fill_null: dict[str, Any] | None = None,
        on_error: str = "raise",
        filesystem: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        window_rows: int | None = None,
    ):
        source = _ParquetSource(
            file_path,
            PARQUET_ENDINGS,
            filesystem,
            columns,
            column_types,
            on_error,
            filters=filters,
        )
        super().__init__(
            source, batch_size, shuffle, seed, fill_null, rank, world_size, window_rows
        )


def _same_item(item: Any) -> Any:
    """Return the item: the default collate would walk through all of it."""
    return item


def _map_batch(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Apply a function to every tensor of nested dicts, lists and tuples."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _map_batch(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        mapped = [_map_batch(function, value) for value in batch]
        if isinstance(batch, list):
            return mapped
        return type(batch)(*mapped) if hasattr(batch, "_fields") else tuple(mapped)
    return batch


def _break_cycles(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Iterate; an exception of a worker does not keep the workers alive.

    torch raises it in a frame that refers to it, so that it forms a cycle with the
    iterator. Workers whose queues the garbage collector finds in a cycle never hear
    that they should end, and are waited for, ten seconds.
    """
    try:
        yield from batches
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _run_ahead(items: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    """Iterate in a thread that is `depth` items ahead of what is used."""
    end = object()
    with contextlib.closing(items), ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(
            pool.submit(next, items, end) for _ in range(depth + 1)
        )
        while (item := ahead.popleft().result()) is not end:
            yield item
            ahead.append(pool.submit(next, items, end))


class _BatchMaker(Dataset):
    """Makes batches of the pieces that windows are cut into, in any process.

    As the dataset and the sampler of a DataLoader it hands its workers pieces in place
    of indices, and the batches come back in their order.
    """

    def __init__(
        self,
        layout: _RowLayout,
        strings: str,
        pin: bool,
        collate_fn: Callable[[dict[str, Any]], Any] | None,
    ):
        self.layout, self.strings, self.pin = layout, strings, pin
        self.collate_fn = collate_fn
        self.pieces: Iterator[list[list[Any]]] = iter(())

    def make(self, pieces: list[list[Any]]) -> Any:
        """Make a batch here."""
        if self.collate_fn is None:
            return self.layout.batch(pieces, self.strings, self.pin)
        batch = self.collate_fn(self.layout.batch(pieces, self.strings, False))
        return _map_batch(torch.Tensor.pin_memory, batch) if self.pin else batch

    def __iter__(self) -> Iterator[list[list[Any]]]:
        """Return the pieces, for workers."""
        return self.pieces

    def __getitem__(self, pieces: list[list[Any]]) -> Any:
        """Make a batch in a worker; the loader pins it."""
        return self.collate_fn(self.layout.batch(pieces, self.strings, False))


class StreamBatchLoader:
    """Batches of a stream: dicts of tensors (and lists), with exact resume.

    Global batch k is the same set of rows for any number of ranks and workers, every
    row comes once an epoch, and all ranks take the same number of steps; a rank's
    share may be empty where a batch has fewer rows than there are ranks. The order of
    the rows inside a batch does not depend on the number of workers either.

    Each epoch goes on from where `set_epoch` or `load_state_dict` put it, by default
    from the start, and hands over to the next epoch at its end.

    Args:
        batch_size: rows of a global batch, over all ranks together, whose shares may
            differ by a row: a loss of the global batch is the sum over all ranks,
            divided by all rows. Where few rows are left for the last batch of an epoch
            it is evened out with the one before it.
        device: batches come in pinned memory if it is a CUDA device.
        num_workers: 0 decodes in threads, which suits numbers; processes pay where
            decoding takes more than one core. With a `collate_fn` they run that.
        drop_last: leave out the rows that do not fill a batch.
        strings: "list" gives text as Python lists, "arrow" as Arrow arrays (faster).
        stack: {"x": ["a", "b"]} gives columns of one type as one (batch, 2) tensor
            "x", which is also faster than column by column.
        collate_fn: called with each batch, to tokenise its text for instance, in the
            workers or, without any, in a thread that is two batches ahead. It must
            not draw random numbers: which process it runs in may change. A rank's
            share may have no rows.
    """

    def __init__(
        self,
        stream: _ColumnStream,
        batch_size: int,
        device: torch.device | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        strings: str = "list",
        stack: dict[str, list[str]] | None = None,
        collate_fn: Callable[[dict[str, Any]], Any] | None = None,
    ):
        if batch_size < 1 or strings not in ("list", "arrow"):
            raise ValueError(
                f"{batch_size=} must be at least 1, {strings=} be 'list' or 'arrow'"
            )
        self.stream, self.batch_size, self.drop_last = stream, batch_size, drop_last
        self.layout = _RowLayout(
            stream.source, stream.fill_null, stack=stack, required=stream.required
        )
        pin = device is not None and device.type == "cuda"
        self.maker = _BatchMaker(self.layout, strings, pin, collate_fn)
        self.decoders = num_workers if collate_fn is None else 0
        self.feed = _WindowFeed(
            stream, self.layout, batch_size, drop_last, self.decoders
        )
        self.epoch = self.position = self._start = 0
        self._workers: DataLoader | None = None
        if num_workers:
            self._workers = DataLoader(
                self.feed if self.decoders else self.maker,
                batch_size=None,
                sampler=None if self.decoders else self.maker,
                num_workers=num_workers,
                collate_fn=_same_item,
                pin_memory=pin and not self.decoders,
                persistent_workers=True,
                prefetch_factor=2,
                worker_init_fn=_start_loader_worker,
                generator=torch.Generator(),
            )

    def _bound(self, k: int, start: int = 0) -> int:
        """Return the global position where batch k, counted from `start`, begins."""
        rows = self.stream.rows - start
        rows -= rows % self.batch_size if self.drop_last else 0
        return start + _epoch_batch_bound(k, rows, self.batch_size)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever this one starts."""
        whole, rest = divmod(self.stream.rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch (counted from 0) that comes first in it."""
        self.epoch, self.position = epoch, self._bound(start)
        self._start = self.position

    def state_dict(self) -> dict[str, int | str]:
        """Return epoch and position in rows; the batch last yielded counts as used."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": self.stream.order_digest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was last yielded, on any ranks and workers.

        Raises:
            DataError: the state is of rows in another order, some of which would come
                twice and others never.
        """
        order = self.stream.order_digest()
        if state.get("order", order) != order:
            raise DataError(
                "this state is of rows in another order: seed, shuffle, window_rows, "
                "columns, cache_dir and the files' rows must be as they were when it "
                "was saved"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._start = self.position

    def __iter__(self) -> Iterator[Any]:
        base, self._start = self._start, 0
        self.position = base
        pieces = self._cut_windows(base)
        batches = (self.maker.make(piece) for piece in pieces)
        if self._workers is not None and not self.decoders:
            self.maker.pieces = pieces
            batches = _break_cycles(self._workers)
        elif self.maker.collate_fn is not None:
            batches = _run_ahead(batches, depth=2)
        try:
            for k, batch in enumerate(batches):
                self.position = self._bound(k + 1, base)
                yield batch
        finally:
            batches.close()
            pieces.close()  # it is in a cycle with the workers: see _break_cycles
        self.epoch, self.position = self.epoch + 1, 0

    def _cut_windows(self, base: int) -> Generator[list[list[Any]], None, None]:
        """Yield the pieces of each batch of an epoch, from position `base` on."""
        self.feed.cursor[0], self.feed.cursor[1] = self.epoch, base
        windows = self.feed.windows()
        if self.decoders:
            windows = self.feed.receive(_break_cycles(self._workers), self.decoders)
        pending: list[list[Any]] = []
        for ended, piece in self.feed.batches(windows):
            pending.append(piece)
            if ended:
                yield pending
                pending = []


class StreamedRows:
    """Rows on disk as a data set of a training loop: loaders of (inputs, targets).

    Args:
        stream: a part of a StreamingParquetDataset or StreamingTextDataset.
        collate_fn: what the loader gives ({"column": tensor or list}) -> a batch.
        stack: as for StreamBatchLoader.
    """

    def __init__(
        self,
        stream: _ColumnStream,
        collate_fn: Callable[[dict[str, Any]], Any],
        stack: dict[str, list[str]] | None = None,
    ) -> None:
        self.stream, self.collate_fn, self.stack = stream, collate_fn, stack

    def __len__(self) -> int:
        return self.stream.rows

    @property
    def skipped(self) -> list[str]:
        """What on_error="skip" left out: file and cause."""
        return self.stream.skipped

    def order_digest(self) -> str:
        """What all that decides the order is hashed to."""
        return self.stream.order_digest()

    def load(
        self,
        batch_size: int,
        device: torch.device | None = None,
        num_workers: int | None = 0,
    ) -> StreamBatchLoader:
        """Batches of the rows, in the stream's order."""
        return StreamBatchLoader(
            self.stream,
            batch_size,
            device,
            num_workers or 0,
            stack=self.stack,
            collate_fn=self.collate_fn,
        )


def number_labels(labels: Any, classes: Sequence[Any]) -> torch.Tensor:
    """The number of each label's class, (B,), of labels in a list or tensor."""
    number_of = {name: number for number, name in enumerate(classes)}
    values = labels.tolist() if isinstance(labels, torch.Tensor) else labels
    return torch.tensor([number_of[value] for value in values], dtype=torch.int64)


def split_label(
    batch: dict[str, Any], features: str, label_column: str, classes: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, labels) of a batch: numbers of classes, or without classes values.

    Raises:
        DataError: a value to regress on is missing.
    """
    labels = batch[label_column]
    if classes:
        return batch[features], number_labels(labels, classes)
    if labels.isnan().any():
        raise DataError(
            f"column {label_column} is empty in some rows: fill them, or {_SKIP_IT}"
        )
    return batch[features], labels.float()


def number_columns(types: Mapping[str, Any], label: str) -> list[str]:
    """The columns whose Arrow type is a number or boolean, without the label."""
    from pyarrow.types import is_boolean, is_decimal, is_floating, is_integer

    kinds = (is_boolean, is_decimal, is_floating, is_integer)
    return [
        name
        for name, kind in types.items()
        if name != label and any(is_kind(kind) for is_kind in kinds)
    ]


def is_fraction(kind: Any) -> bool:
    """Whether an Arrow type holds numbers that need not be whole (None: no type)."""
    from pyarrow.types import is_decimal, is_floating

    return kind is not None and (is_floating(kind) or is_decimal(kind))


def column_statistics(
    batches: Iterable[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column over all (B, F) batches, in fp32.

    In one pass and fp64, by Chan's update: no difference of large sums. Missing values
    (NaN) are left out; a column of nothing else has mean 0 and deviation 0.
    """
    count_F = mean_F = squares_F = torch.zeros((), dtype=torch.float64)
    for x_BF in batches:
        x_BF = x_BF.double()
        there_F = (~x_BF.isnan()).sum(0)
        batch_mean_F = x_BF.nanmean(0).nan_to_num()
        batch_squares_F = (x_BF - batch_mean_F).square().nansum(0)
        total_F = (count_F + there_F).clamp(min=1)
        delta_F = batch_mean_F - mean_F
        mean_F = mean_F + delta_F * there_F / total_F
        squares_F = squares_F + batch_squares_F
        squares_F = squares_F + delta_F.square() * count_F * there_F / total_F
        count_F = count_F + there_F
    return mean_F.float(), (squares_F / count_F.clamp(min=1)).sqrt().float()


def measure_scales(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], regress: bool
) -> dict[str, torch.Tensor]:
    """Mean and deviation of each feature; in a regression, of the labels as well.

    Args:
        batches: features (B, F) and labels (B,).

    Returns:
        mean and std, (F,); output_mean and output_std, 0-dimensional.
    """
    if not regress:
        mean_F, std_F = column_statistics(x_BF for x_BF, _ in batches)
        return {"mean": mean_F, "std": std_F}
    mean_F, std_F = column_statistics(
        torch.cat((x_BF, y_B[:, None]), dim=1) for x_BF, y_B in batches
    )
    names = ("mean", "output_mean", "std", "output_std")
    parts = (mean_F[:-1], mean_F[-1], std_F[:-1], std_F[-1])
    return {name: part.clone() for name, part in zip(names, parts, strict=True)}


def measure_table(
    outputs: torch.Tensor, labels_B: torch.Tensor
) -> dict[str, torch.Tensor]:
    """For `evaluate_model`: how many classes are right, or the errors of a regression.

    Args:
        outputs: logits (B, C) for labels that are whole numbers, else values (B, 1).
    """
    if labels_B.is_floating_point():
        return {"absolute_error": (outputs.squeeze(-1) - labels_B).abs().sum()}
    return {"accuracy": (outputs.argmax(-1) == labels_B).sum()}


MAX_TABLE_CLASSES = 1000  # of a label; with more values it is rather one to regress on
ROWS_TO_SCALE_BY = 1_000_000  # that mean and deviation of columns are taken from


def open_table(
    path: str,
    label_column: str,
    objective: str,
    val_fraction: float,
    seed: int,
    on_error: str = "raise",
) -> tuple[StreamedRows, StreamedRows, dict[str, Any]]:
    """Parquet rows to train and to validate on: a label, and all other numbers.

    Args:
        path: a file, a folder or a glob.
        objective: "classify", "regress", or "auto": a label of fractions is regressed
            on, one of whole numbers or text classified.
        on_error: "skip" reads all rows once and leaves out what cannot be read, and
            rows without a label.

    Returns:
        Two data sets of (features (B, F), labels (B,)), and what a model has to know:
        "features" (their names), "classes" (the values of the label, none in a
        regression) and "scales" (`measure_scales` of the training rows).

    Raises:
        DataError: no column of numbers, a label with too many values, missing values.
    """
    types = StreamingParquetDataset(
        path, on_error=on_error, rank=0, world_size=1
    ).source.types
    if label_column not in types:
        raise DataError(f"{path}: no column {label_column!r}, only {', '.join(types)}")
    features = number_columns(types, label_column)
    if not features:
        raise DataError(f"{path}: no column but {label_column} holds numbers")
    kinds = dict.fromkeys(features, "float32")
    regress = objective == "regress" or (
        objective == "auto" and is_fraction(types.get(label_column))
    )
    if regress:
        kinds[label_column] = "float32"

    rows = StreamingParquetDataset(
        path,
        [*features, label_column],
        shuffle=True,
        seed=seed,
        column_types=kinds,
        on_error=on_error,
    )
    rows.drop_unreadable([label_column])
    classes = []
    if not regress:
        classes, _ = number_classes(rows.unique(label_column, MAX_TABLE_CLASSES))
    collate = functools.partial(
        split_label, features="x", label_column=label_column, classes=classes
    )

    def split(stream: _ColumnStream) -> list[StreamedRows]:
        parts = stream.split(val_fraction, seed)
        return [StreamedRows(part, collate, {"x": features}) for part in parts]

    whole = copy.copy(rows)
    whole.rank, whole.world_size = 0, 1  # all ranks scale alike
    batches = itertools.islice(split(whole)[0].load(8192), -(-ROWS_TO_SCALE_BY // 8192))
    scales = measure_scales(batches, regress)
    train_set, val_set = split(rows)
    return (
        train_set,
        val_set,
        {"features": features, "classes": classes, "scales": scales},
    )


def open_text_stream(
    data: str,
    columns: Sequence[str],
    seed: int,
    cache_dir: str = "",
    on_error: str = "raise",
    **options: Any,
) -> _ColumnStream:
    """Rows of CSV, JSONL or Parquet files, of a folder or a glob, shuffled, as text.

    Args:
        cache_dir: of StreamingTextDataset; empty keeps nothing.
        on_error: "skip" reads all rows once and leaves out what cannot be read, and
            rows in which one of the columns is empty.
        options: further ones of the dataset, such as encoding or quote_char.

    Raises:
        DataError: a column is named twice, and what the stream raises.
    """
    if len(set(columns)) < len(columns):
        raise DataError(f"columns {', '.join(columns)}: name two different ones")
    options |= {
        "shuffle": True,
        "seed": seed,
        "column_types": dict.fromkeys(columns, "string"),
        "on_error": on_error,
    }
    rows: _ColumnStream
    _, files = _list_data_files(data, PARQUET_ENDINGS + TEXT_ENDINGS, None)
    kinds = {name.endswith(PARQUET_ENDINGS) for name in files}
    if len(kinds) > 1:
        raise DataError(f"{data} holds Parquet and text files: choose by a glob")
    if kinds == {True}:
        rows = StreamingParquetDataset(data, list(columns), **options)
    else:
        first, *others = columns
        options["cache_dir"] = cache_dir or None
        rows = StreamingTextDataset(data, first, columns=others, **options)
    rows.drop_unreadable(columns)
    return rows


TEXT_PIECE = 1 << 20  # characters of a text that are read and encoded at once


def list_text_files(data: str) -> list[Path]:
    """A file, the files in a folder and its subfolders, or those of a glob; sorted.

    Hidden ones, whose own name or folder below `data` begins with a dot, are left out.

    Raises:
        DataError: there is none.
    """
    path = Path(data)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(name[0] == "." for name in file.relative_to(path).parts)
        ]
    else:
        names = sorted(glob.glob(data, recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
    if not files:
        raise DataError(f"{data}: no such file: give a text file, a folder or a glob")
    return files


def read_text_files(paths: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    """Each file in pieces of at most a million characters, and whether it ends there.

    Pieces end with a line where they can. Bytes that are not UTF-8 become U+FFFD.
    """
    for path in paths:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            piece = file.read(TEXT_PIECE)
            while following := file.read(TEXT_PIECE):
                cut = piece.rfind("\n") + 1 or len(piece)
                yield piece[:cut], False
                piece = piece[cut:] + following
            yield piece, True


def read_texts(paths: list[Path], text_column: str) -> Iterator[tuple[str, bool]]:
    """Texts of files, or parts of one, and whether it ends there.

    Args:
        paths: all plain text, or all Parquet, CSV or JSONL.
        text_column: to read from files that have columns.
    """
    options = {"rank": 0, "world_size": 1, "column_types": {text_column: "string"}}
    if paths[0].suffix in (".parquet", ".pq"):
        rows = StreamingParquetDataset(paths, [text_column], **options)
        return ((row[text_column] or "", True) for row in rows)
    if paths[0].suffix in (".jsonl", ".ndjson", ".csv"):
        rows = StreamingTextDataset(paths, text_column, **options)
        return ((text or "", True) for text in rows)
    return read_text_files(paths)


# --- Images


def _decode_image_rgb(path: str | Path, size: tuple[int, int] | None = None) -> Any:
    """Read an image file as an upright 8-bit RGB Pillow image, whatever its mode.

    Args:
        size: (height, width) that it will be scaled to. JPEG files are then decoded at
            the smallest of 1/1, 1/2, 1/4, 1/8 that is not below it.
    """
    pil_image = _import_data_package("PIL.Image", "pillow")
    pil_ops = _import_data_package("PIL.ImageOps", "pillow")
    with pil_image.open(path) as image:
        if size is not None:
            longest = max(size)  # the file may be turned by its EXIF tag
            image.draft(None, (longest, longest))
        image = pil_ops.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow clips 16-bit grey to 255 instead of scaling it to 8 bits.
            image = image.convert("F").point(lambda v: v * (255 / 65535) + 0.5)
            image = image.convert("L")
        if image.mode in ("PA", "LA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            # What is transparent may hold any colour: show it on white.
            white = pil_image.new("RGBA", image.size, "white")
            image = pil_image.alpha_composite(white, image)
        return image.convert("RGB")


def _resize_to_tensor(image: Any, size: tuple[int, int]) -> torch.Tensor:
    """Scale an RGB Pillow image to a uint8 tensor (3, height, width).

    torch's antialiased scaling is off by at most 1 from Pillow's bilinear one, in a
    third of the time. The pixels are borrowed where Pillow and pyarrow can do that.
    """
    try:
        pixels = importlib.import_module("pyarrow").array(image)
        pixels_HWC = torch.from_dlpack(pixels.flatten()).view(*image.size[::-1], 4)
    except (ImportError, TypeError, ValueError):
        # No pyarrow, a Pillow before 11.3, or an image too large for one block.
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels_HWC = pixels.view(*image.size[::-1], 3)
    scaled_1CHW = torch.nn.functional.interpolate(
        pixels_HWC.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True
    )
    return scaled_1CHW[0, :3]


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return the generator for one sample's augmentation in one epoch.

    It depends on nothing else, so augmentation survives resume and any number of
    workers, which the generators of the workers do not.
    """
    mixed_seed = random.Random(f"{seed}/{epoch}/{index}").getrandbits(63)
    return torch.Generator().manual_seed(mixed_seed)


def normalize_images(
    images_BCHW: torch.Tensor,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Turn uint8 images into normalised floats, on the device where they are.

    Move them as uint8: that is a quarter of the bytes. The defaults are ImageNet's.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "device": images_BCHW.device}
    scale_C11 = torch.tensor(std, **options).mul(255)[:, None, None]
    shift_C11 = torch.tensor(mean, **options).mul(255)[:, None, None]
    return images_BCHW.float().sub_(shift_C11).div_(scale_C11).to(dtype)


class LazyImageDataset(Dataset):
    """Images that are opened when they are asked for, as RGB and upright.

    With `size` items are uint8 tensors (3, height, width); without it, Pillow images.
    A batch is decoded by as many threads as there are free CPUs.

    Args:
        transform: called with the Pillow image (after the resize to `size`).
        labels: one a path; items are then (image, label).
        on_error: "raise" names an unreadable file; "skip" reports it, lists it in
            `skipped` and gives None in its place, which `collate_images` drops; none
            are left after `drop_unreadable`.
        size: height and width, or one number for both. JPEG files are decoded at a
            half, quarter or eighth where that is enough: photos differ from the exact
            resize by 0.5 of 255 on average (at most 4), noise pixel by pixel by 1.4.
        augment: called with the tensor and a generator that depends on seed, epoch
            (`set_epoch`) and index alone. Needs `size` or a transform to a tensor.
            `split` takes it from the images to validate on.

    Raises:
        DataError: for an unreadable file under "raise".
    """

    def __init__(
        self,
        image_paths: list[str],
        transform: Callable[[Any], Any] | None = None,
        labels: Sequence[Any] | None = None,
        on_error: str = "raise",
        size: int | tuple[int, int] | None = None,
        augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
        seed: int = 0,
        report: Callable[[str], None] = print,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"{on_error=}: must be 'raise' or 'skip'")
        if labels is not None and len(labels) != len(image_paths):
            raise DataError(f"{len(image_paths)} images but {len(labels)} labels")
        self.paths, self.labels = image_paths, labels
        self.numbers: Sequence[int] = range(len(image_paths))
        self.dropped: list[str] = []
        self.transform, self.on_error, self.report = transform, on_error, report
        self.size = (size, size) if isinstance(size, int) else size
        self.augment, self.seed = augment, seed
        # Shared with the workers: the epoch, and which files could not be read (with
        # the parts of a split as well).
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._all_paths = image_paths
        self._bad = torch.zeros(len(image_paths), dtype=torch.bool).share_memory_()

    @property
    def skipped(self) -> list[str]:
        """The files that could not be read so far, in any worker, of all parts."""
        bad = self._bad.nonzero().flatten().tolist()
        return self.dropped + [str(self._all_paths[i]) for i in bad]

    def _choose(self, positions: Sequence[int]) -> "LazyImageDataset":
        """Return some of the images, whose augmentation stays theirs."""
        chosen = copy.copy(self)
        chosen.paths = [self.paths[i] for i in positions]
        chosen.numbers = [self.numbers[i] for i in positions]
        if self.labels is not None:
            chosen.labels = [self.labels[i] for i in positions]
        chosen._epoch = self._epoch.clone().share_memory_()
        return chosen

    def split(
        self, val_fraction: float, seed: int
    ) -> tuple["LazyImageDataset", "LazyImageDataset"]:
        """Images to train on, and images to validate on as they are, without `augment`.

        Raises:
            DataError: one of the two would be empty.
        """
        train, val = split_samples(self, val_fraction, seed)
        unchanged = self._choose(val.indices)
        unchanged.augment = None
        return self._choose(train.indices), unchanged

    def drop_unreadable(self) -> None:
        """With on_error="skip", decode all images once and leave out the unreadable.

        Else others stand in for them in their batches. Call it before `split`.

        Raises:
            DataError: no image can be read.
        """
        if self.on_error == "raise":
            return

        def find_fault(position: int) -> str:
            try:
                self._decode(position)
            except DataError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(_usable_cpu_count()) as pool:
            faults = list(pool.map(find_fault, range(len(self))))
        kept = self._choose([i for i, fault in enumerate(faults) if not fault])
        self.paths, self.labels, self.numbers = kept.paths, kept.labels, kept.numbers
        self.dropped += filter(None, faults)
        if not self.paths:
            raise DataError(f"no image can be read, such as: {self.dropped[0]}")

    def order_digest(self) -> str:
        """What the images and their order are hashed to."""
        return hashlib.sha256(repr([*map(str, self.paths)]).encode()).hexdigest()[:16]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the augmentation (running workers hear of it)."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.paths)

    def _decode(self, idx: int) -> Any:
        """Read an image in its size: a tensor, or with a transform Pillow's."""
        path = self.paths[idx]
        try:
            image = _decode_image_rgb(path, self.size)
            if self.size is None:
                return image
            if self.transform:
                return image.resize(self.size[::-1], 2)  # 2: bilinear
            return _resize_to_tensor(image, self.size)
        except ImportError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything
            raise DataError(f"cannot read image {path}: {error}") from error

    def __getitem__(self, idx: int) -> Any:
        number = self.numbers[idx]
        try:
            image = self._decode(idx)
        except DataError as error:
            if self.on_error == "raise":
                raise DataError(
                    f"{error}. Repair or remove it, or {_SKIP_IT}"
                ) from error
            if not self._bad[number]:
                self._bad[number] = True
                self.report(f"{error} (skipped)")
            return None
        if self.transform:
            image = self.transform(image)
        if self.augment:
            generator = sample_generator(self.seed, int(self._epoch), number)
            image = self.augment(image, generator)
        return image if self.labels is None else (image, self.labels[idx])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return several items; DataLoader calls it with the indices of a batch."""
        threads = 1 if get_worker_info() else min(_usable_cpu_count(), len(indices))
        if threads < 2:
            return [self[i] for i in indices]
        with ThreadPoolExecutor(threads) as pool:  # decoding releases the GIL
            return list(pool.map(self.__getitem__, indices))


def collate_images(samples: list[Any]) -> Any:
    """Collate images, or tuples that begin with one, and drop those that are None.

    A batch of images is stored channels-last (six times faster to put together, and
    what convolutions on GPUs like); nothing but None gives None.
    """
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    if isinstance(kept[0], tuple):
        images, *others = zip(*kept, strict=True)
        others = [torch.utils.data.default_collate(list(other)) for other in others]
        return (collate_images(list(images)), *others)
    if isinstance(kept[0], torch.Tensor) and kept[0].ndim == 3:
        return torch.stack([i.permute(1, 2, 0) for i in kept]).permute(0, 3, 1, 2)
    return torch.utils.data.default_collate(kept)


# --- Lengths


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of texts of like length, each of at most `max_tokens` padded tokens.

    Rows are shuffled, sorted by length within stretches of about `stretch` rows, cut
    into batches, and the batches shuffled. Every row comes once an epoch; global
    batches depend on seed and epoch alone, each rank gets its slice of them. With
    shuffle=False the longest come first, so that too large a budget fails at once.

    Args:
        lengths: tokens of each row.
        max_tokens: rows x longest row of a global batch, over all ranks together.
        allow_empty: a rank may get no row of a short batch, as in the evaluation of
            few rows; `create_optimized_dataloader` makes an empty batch of that.

    Raises:
        DataError: a row is longer than `max_tokens`, or a rank would get no row of a
            batch, without `allow_empty`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        stretch: int = 8192,
        allow_empty: bool = False,
    ):
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.max_tokens, self.seed, self.shuffle = max_tokens, seed, shuffle
        self.stretch = stretch if shuffle else max(1, len(self.lengths))
        self.allow_empty = allow_empty
        self.rank, self.world_size = _data_rank(rank, world_size)
        if len(self.lengths):
            self._check_budget()
        self.set_epoch(0)

    def _check_budget(self) -> None:
        longest = max(1, int(self.lengths.max()))
        if longest > self.max_tokens:
            raise DataError(
                f"the longest sample has {longest} tokens, the budget of a batch is "
                f"{self.max_tokens}: raise the budget or truncate the text"
            )
        # Of the last two batches of a stretch, which share their rows, one may be half.
        fewest = min(len(self.lengths), (self.max_tokens // longest + 1) // 2)
        if fewest < self.world_size and not self.allow_empty:
            raise DataError(
                f"a batch of {fewest} samples leaves some of the {self.world_size} "
                "ranks without one: take fewer ranks, or a budget of "
                f"{2 * self.world_size * longest} tokens"
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch (counted from 0) that comes first in it."""
        self.start = start
        self.batches = self._make_batches(epoch)

    def count_batches(self, epoch: int) -> int:
        """Batches of an epoch; of many rows it differs a little from epoch to epoch."""
        return len(self._make_batches(epoch))

    def _make_batches(self, epoch: int) -> list[list[int]]:
        mixed_seed = random.Random(f"{self.seed}/{epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(mixed_seed)
        count = len(self.lengths)
        order = (
            torch.randperm(count, generator=generator)
            if self.shuffle
            else torch.arange(count)
        )
        batches: list[list[int]] = []
        for part in order.tensor_split(max(1, -(-count // self.stretch))):
            by_length = self.lengths[part].argsort(descending=True, stable=True)
            rows = part[by_length].tolist()
            lengths = self.lengths[rows].tolist()
            first = 0
            made: list[list[int]] = []
            while first < len(rows):
                size = self.max_tokens // max(1, lengths[first])
                made.append(rows[first : first + size])
                first += size
            if len(made) > 1 and len(made[-1]) < len(made[-2]):
                # The last two share their rows evenly, so that no batch is tiny.
                tail = made[-2] + made[-1]
                made[-2:] = tail[: (len(tail) + 1) // 2], tail[(len(tail) + 1) // 2 :]
            batches += made
        if not self.shuffle:
            return batches
        turns = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in turns]

    def __len__(self) -> int:
        """Batches of this epoch, wherever `set_epoch` starts."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches[self.start :]:
            first = len(batch) * self.rank // self.world_size
            yield batch[first : len(batch) * (self.rank + 1) // self.world_size]


# --- The factory


def _collate_share(
    dataset: Any, collate: Callable[[list[Any]], Any], empty: bool, samples: list[Any]
) -> Any:
    """Collate a rank's share of a batch, also where nothing of it can be read.

    Every rank has to take the same number of steps, and a resumed run has to count the
    same batches, so that no batch may be left out. In training the first samples that
    can be read stand in for those of the batch. In evaluation (`empty`) the batch has
    the shapes and types of the others, and no samples.

    Raises:
        DataError: no sample of the dataset can be read.
    """
    if any(sample is not None for sample in samples):
        return collate(samples)
    all_samples = (dataset[i] for i in range(len(dataset)))
    readable = (sample for sample in all_samples if sample is not None)
    chosen = list(itertools.islice(readable, 1 if empty else len(samples)))
    if not chosen:
        raise DataError(f"none of the {len(dataset)} samples can be read")
    batch = collate(chosen)
    return _map_batch(lambda tensor: tensor[:0], batch) if empty else batch


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
        collate_fn: see also `_collate_share`, for samples that are None.
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
        "worker_init_fn": _start_loader_worker,
        "generator": torch.Generator().manual_seed(seed),
        "collate_fn": collate_fn,
    }
    if num_workers > 0:
        options["prefetch_factor"] = 2
    if not isinstance(dataset, IterableDataset):
        options["collate_fn"] = functools.partial(
            _collate_share,
            dataset,
            collate_fn or torch.utils.data.default_collate,
            getattr(batch_sampler, "allow_empty", False),
        )
    if batch_sampler is not None:
        options["batch_sampler"] = batch_sampler
    else:
        options |= {"batch_size": batch_size, "drop_last": drop_last}
        if not isinstance(dataset, IterableDataset):
            options["shuffle"] = shuffle
    return DataLoader(dataset, **options)


def find_in_subset(samples: Any, name: str) -> Any:
    """An attribute of samples, or of those that Subsets are of; None if none has it."""
    while not hasattr(samples, name) and isinstance(samples, Subset):
        samples = samples.dataset
    return getattr(samples, name, None)


class EpochLoader:
    """What a loop asks of its loader: batches, their number, and `set_epoch`.

    Args:
        loader: with a batch sampler that has `set_epoch(epoch, start)`. A dataset with
            `set_epoch(epoch)`, also inside of Subsets, is told as well.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch (counted from 0) that comes first in it."""
        self.loader.batch_sampler.set_epoch(epoch, start)
        tell = find_in_subset(self.loader.dataset, "set_epoch")
        if tell is not None:
            tell(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever `set_epoch` starts."""
        return len(self.loader)

    def count_steps(self, epochs: int) -> int:
        """Batches of so many epochs together, of a TokenBudgetBatchSampler."""
        return sum(map(self.loader.batch_sampler.count_batches, range(epochs)))

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        if loader.num_workers or loader.pin_memory:
            return _break_cycles(loader)
        return self._load_here()

    def _load_here(self) -> Iterator[Any]:
        """As DataLoader without workers, at a fraction of its cost per batch."""
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        fetch = getattr(dataset, "__getitems__", None)
        for rows in self.loader.batch_sampler:
            yield collate(fetch(rows) if fetch else [dataset[row] for row in rows])


def make_loaders(
    train_set: Any,
    val_set: Any,
    batch_size: int,
    device: torch.device,
    num_workers: int | None,
    seed: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    length: Callable[[Any], int] | None = None,
) -> tuple[Any, Any]:
    """Batches to train on, shuffled anew each epoch, and batches to validate on.

    Ranks call it together, to see that all have the same data. Both loaders have
    `set_epoch(epoch, start)` and a length; of several ranks each gets its share of the
    same global batches.

    Args:
        train_set, val_set: with samples by index; or with a method `load(batch_size,
            device, num_workers)` that gives such a loader (StreamedRows).
        batch_size: samples of a global batch, over all ranks together; with `length`
            the padded tokens of one, at most.
        num_workers: None chooses from the CPUs that this process may use.
        collate_fn: a list of samples -> (inputs, targets).
        length: tokens of a sample; puts samples of like length into batches.

    Raises:
        DataError: there is nothing to train or to validate on, or ranks differ in it.
    """
    if not len(train_set) or not len(val_set):
        raise DataError(
            f"{len(train_set)} samples to train on and {len(val_set)} to validate on:"
            " give more with --data, or another --val-fraction"
        )
    orders = [order_digest(train_set), order_digest(val_set)]
    seen = _gather_objects([len(train_set), len(val_set), *orders])
    for rank, facts in enumerate(seen):
        if facts != seen[0]:
            raise DataError(
                f"rank {rank} has {facts[0]} samples to train on and {facts[1]} to "
                f"validate on, rank 0 has {seen[0][0]} and {seen[0][1]}, or other "
                "files: give all machines the same data"
            )
    loaders = []
    for samples, shuffle in ((train_set, True), (val_set, False)):
        if hasattr(samples, "load"):
            loaders.append(samples.load(batch_size, device, num_workers))
            continue
        batches: Any
        options = {"seed": seed, "shuffle": shuffle, "allow_empty": not shuffle}
        if length:
            lengths = [length(samples[i]) for i in range(len(samples))]
            batches = TokenBudgetBatchSampler(lengths, batch_size, **options)
        else:
            batches = ResumableBatchSampler(len(samples), batch_size, **options)
        loader = create_optimized_dataloader(
            samples,
            batch_size,
            device,
            num_workers=num_workers,
            batch_sampler=batches,
            collate_fn=collate_fn,
        )
        loaders.append(EpochLoader(loader))
    return loaders[0], loaders[1]


def _batches_per_second(batches: Iterator[Any], seconds: float) -> tuple[float, Any]:
    """Time batches after the first, which pays for the start; return a batch too."""
    first = batch = next(batches, None)
    start = time.perf_counter()
    count, elapsed = 0, 0.0
    while elapsed < seconds and batch is not None:
        batch = next(batches, None)
        count += batch is not None
        elapsed = time.perf_counter() - start
    return count / max(elapsed, 1e-9), first


def tune_dataloader(
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    step: Callable[[Any], Any] | None = None,
    seconds: float = 1.0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    workers: Sequence[int] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time a few numbers of workers on the user's data and say which to take.

    Args:
        step: the training step for one batch; times it too, to tell whether loader or
            model is the bottleneck.
        seconds: how long each setting is timed, once it has started.
        collate_fn: as the loader has it: of a list of samples, or a stream's batches.
        workers: numbers to try: by default 0, 1, 2, 4 ... up to the usable CPUs.

    Returns:
        num_workers (the least that is within 5% of the fastest), batches_per_s by
        number of workers, steps_per_s and bottleneck ("loader", "model" or None).
    """
    cpus = _usable_cpu_count()
    if workers is None:
        tries = [0, *(2**i for i in range(8) if 2**i <= min(cpus, 16))]
        workers = [0] if device.type == "mps" else tries
    rates: dict[int, float] = {}
    batch = None
    for count in workers:
        loader: Any
        if isinstance(dataset, _ColumnStream):
            loader = StreamBatchLoader(
                dataset, batch_size, device, count, collate_fn=collate_fn
            )
        else:
            loader = create_optimized_dataloader(
                dataset, batch_size, device, num_workers=count, collate_fn=collate_fn
            )
        rates[count], batch = _batches_per_second(iter(loader), seconds)
        del loader  # stops its workers before the next are timed
    best = min(n for n in rates if rates[n] >= 0.95 * max(rates.values()))
    tried = ", ".join(f"{n}: {rate:.1f}" for n, rate in rates.items())
    report(
        f"{best} workers: {rates[best]:.1f} batches/s on {cpus} CPUs (tried {tried})"
    )
    result = {
        "num_workers": best,
        "batches_per_s": rates,
        "steps_per_s": None,
        "bottleneck": None,
    }
    if step is not None and batch is not None:

        def steps() -> Iterator[Any]:
            while True:
                step(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield True

        rate = _batches_per_second(steps(), seconds)[0]
        slower = "loader" if rates[best] < rate else "model"
        report(f"the model takes {rate:.1f} batches/s: the {slower} is the bottleneck")
        result |= {"steps_per_s": rate, "bottleneck": slower}
    return result


def read_columns(path: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a CSV, JSONL or Parquet file as text, all rows in memory.

    Raises:
        DataError: the file is missing, damaged or of another kind, a column is missing
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
        raise DataError(f"{path}: give a file that ends with {', '.join(kinds)}")
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
            table = parquet.ParquetFile(path)
        names = table.schema_arrow.names if module is parquet else table.column_names
        if missing := [name for name in columns if name not in names]:
            raise DataError(
                f"{path}: has no column {' or '.join(missing)}, only"
                f" {', '.join(names)}: choose from these"
            )
        if module is parquet:
            table = table.read(list(columns))
        texts = {name: table[name].cast("string") for name in columns}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check --data") from None
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]  # Arrow's may list the whole file
        raise DataError(f"{path}: cannot be read as text: {reason}") from error
    for name, text in texts.items():
        if text.null_count:
            raise DataError(
                f"{path}: column {name} is empty in {text.null_count} rows: fill them"
            )
    return {name: text.to_pylist() for name, text in texts.items()}


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(folder: Path, pattern: str) -> list[Path]:
    """The images under `folder` that fit a glob pattern, in sorted order.

    Not what is hidden: macOS's copies of metadata, .ipynb_checkpoints.
    """
    return [
        path
        for path in sorted(folder.glob(pattern))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def list_image_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The images in `folder/CLASS/`, in sorted order, and the class of each.

    Raises:
        DataError: there is no such folder, or no image in a folder of a class.
    """
    paths = find_images(folder, "*/*")
    if not paths:
        state = "holds no images" if folder.is_dir() else "is no folder"
        raise DataError(f"{folder} {state}: expected FOLDER/CLASS/IMAGE.png or .jpg")
    return [str(path) for path in paths], [path.parent.name for path in paths]


def number_classes(labels: Iterable[str]) -> tuple[list[str], list[int]]:
    """The sorted names of the classes, and for each label the number of its class.

    Raises:
        DataError: there are fewer than two classes, or empty labels.
    """
    labels = list(labels)
    classes = sorted(set(labels))
    if "" in classes:
        raise DataError(
            "some labels are empty: fill them, or leave these rows out (--on-error "
            "skip does, where data is streamed)"
        )
    if not classes:
        raise DataError("there are no labels: the data has no rows")
    if len(classes) < 2:
        raise DataError(f"all labels are {classes}: a classifier needs two classes")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[label] for label in labels]


def split_samples(
    samples: Any, val_fraction: float, seed: int
) -> tuple[Subset, Subset]:
    """Samples to train on and samples to validate on, drawn at random.

    Raises:
        DataError: one of the two would be empty.
    """
    val_count = round(len(samples) * val_fraction)
    if not 0 < val_count < len(samples):
        raise DataError(
            f"{val_count} of {len(samples)} samples would be kept for validation:"
            " give more data or another val_fraction"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator).tolist()
    return Subset(samples, order[val_count:]), Subset(samples, order[:val_count])


def describe_skipped(samples: Any, path: Path | None = None, most: int = 10) -> str:
    """What on_error="skip" has left out on any rank so far, in lines; often "".

    Args:
        samples: with a list `skipped`, or a Subset of such samples.
        path: a file to name all of it in, if there is any.
        most: that are named, each in a line.
    """
    skipped = find_in_subset(samples, "skipped") or []
    skipped = list(dict.fromkeys(itertools.chain(*_gather_objects(skipped))))
    if not skipped:
        return ""
    lines = [f"\n{len(skipped)} left out, which cannot be used:", *skipped[:most]]
    if path and _data_rank(None, None)[0] == 0:
        path.write_text("\n".join(skipped) + "\n", encoding="utf-8")
    if len(skipped) > most:
        lines.append(f"and {len(skipped) - most} more{f', see {path}' if path else ''}")
    return "\n  ".join(lines)


def order_digest(samples: Any) -> str:
    """What the samples' order is hashed to, by themselves; "" where they do not."""
    compute = getattr(samples, "order_digest", None)
    return compute() if compute else ""


def move_batch(batch: Any, device: torch.device) -> Any:
    """A batch on a device; pinned memory is copied without waiting.

    The tensors of nested dicts, lists and tuples are moved; a list of tensors, which
    the default collate makes of tuples, becomes a tuple.
    """
    # Elsewhere a copy that goes on may read freed memory.
    pinned = device.type == "cuda"
    moved = _map_batch(lambda x: x.to(device, non_blocking=pinned), batch)
    return tuple(moved) if isinstance(moved, list) else moved


def move_batches(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches of a loader on a device, by `move_batch`."""
    for batch in _break_cycles(loader):
        yield move_batch(batch, device)
