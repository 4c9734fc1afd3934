"""Data loading beside its peers: rows a second, memory and first-batch latency.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--quick] [--only parquet,csv,...]

Peers live in an environment of their own (requirements/bench-data.txt); one that is
not installed is left out and named. All contenders of a table take turns in one
process, so that whatever else the machine does slows all alike: compare the ratios.
Memory and first-batch latency come from a fresh process for each. The data is made
from a seed in a temporary folder. Writes results/data.md and .png,
or with --only data-<first table>.md.
"""

import argparse
import contextlib
import csv
import functools
import importlib.machinery
import importlib.util
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.csv as pa_csv  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset, IterableDataset  # noqa: E402

from templates.data_optimizer import (  # noqa: E402
    LazyImageDataset,
    StreamBatchLoader,
    StreamingParquetDataset,
    StreamingTextDataset,
    collate_images,
)

torch.set_num_threads(1)
BATCH = 1024
LIMIT_S = 2.0
# Slow, or they leave threads, processes or files that are still being written.
LATE = {"Hugging Face streaming, torch", "Hugging Face map-style", "litdata"}
LATE |= {"Mosaic streaming", "csv.DictReader", "ours, kept as Parquet, first epoch"}
LATE |= {"ours, kept as Parquet, later", "ours, kept as Parquet, all of 4 epochs"}
FLOATS = [f"f{i:02d}" for i in range(16)]
RESULTS = Path(__file__).parent / "results"


# --- data


def write_parquet(folder: Path, rows: int, dtype: str, text: bool) -> None:
    """Write shards with the default options of pyarrow (row groups of a million)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards = 4
    for shard in range(shards):
        count = rows // shards
        table: dict[str, Any] = {
            name: rng.standard_normal(count).astype(dtype) for name in FLOATS
        }
        table["label"] = rng.integers(0, 10, count)
        if text:
            numbers = rng.integers(0, 1 << 40, count)
            table["text"] = [f"the text of row number {n}" for n in numbers]
        pq.write_table(pa.table(table), folder / f"{shard}.parquet")


def write_csv(path: Path, rows: int) -> None:
    """One text column among 31 numbers."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(2000)])
    picks = words[rng.integers(0, 2000, (rows, 12))]
    frame = pd.DataFrame(rng.standard_normal((rows, 31)).round(6))
    frame.columns = [f"c{i}" for i in range(31)]
    texts = [f"{' '.join(row[:6])}, {' '.join(row[6:])}" for row in picks]
    frame.insert(4, "text", texts)
    frame.to_csv(path, index=False)


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Photo-like JPEG files: soft shapes and a little noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, height = size
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.BICUBIC)
        pixels = np.asarray(image) + rng.normal(0, 3, (height, width, 1))
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg", quality=85)


# --- contenders: each yields the number of rows of each batch

Contender = Callable[[], Iterator[int]]


def decode_only(files: list[str]) -> Iterator[int]:
    """The bound: Arrow decodes everything, as it does by default, to no purpose."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(65536):
            yield batch.num_rows


def decode_fastest(files: list[str]) -> Iterator[int]:
    """The fastest of eight ways to ask Arrow for the same: less memory is touched."""
    for file in files:
        opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)
        for batch in opened.iter_batches(65536, use_threads=False):
            yield batch.num_rows


def decode_only_1024(files: list[str]) -> Iterator[int]:
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(BATCH):
            yield batch.num_rows


class SeedParquet(IterableDataset):
    """The guide's pattern."""

    def __init__(self, files: list[str]):
        self.files = files

    def __iter__(self) -> Iterator[dict]:
        for file in self.files:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
                for _, row in batch.to_pandas().iterrows():
                    yield dict(row)


def seed_rows(files: list[str]) -> Iterator[int]:
    for _ in itertools.islice(SeedParquet(files), 20000):
        yield 1


def our_rows(files: list[str]) -> Iterator[int]:
    for _ in itertools.islice(StreamingParquetDataset(files), 400000):
        yield 1


def ours(files: list[str], workers: int, stack: bool = True) -> Callable[[], Any]:
    """Return a function that starts an epoch; workers live through all of them."""
    stream = StreamingParquetDataset(files, shuffle=True)
    loader = StreamBatchLoader(
        stream,
        BATCH,
        num_workers=workers,
        strings="arrow",
        stack={"x": FLOATS} if stack else None,
    )

    def epoch() -> Iterator[int]:
        for batch in loader:
            yield len(batch["label"])

    return epoch


def hf_streaming(files: list[str], form: str, workers: int = 0) -> Iterator[int]:
    import datasets

    data = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True
    )
    data = data.shuffle(seed=0, buffer_size=4096) if form == "torch" else data
    if form == "arrow":
        for table in data.with_format("arrow").iter(BATCH):
            yield len(table)
        return
    data = data.with_format("torch")
    if workers:
        loader = DataLoader(data, BATCH, num_workers=workers)
        for batch in loader:
            yield len(batch["label"])
    else:
        for batch in data.iter(BATCH):
            yield len(batch["label"])


def hf_map_style(files: list[str]) -> Iterator[int]:
    import datasets

    cache = str(Path(files[0]).parent / "hf-cache")
    data = datasets.Dataset.from_parquet(files, cache_dir=cache, keep_in_memory=False)
    data = data.with_format("torch")
    order = np.random.default_rng(0).permutation(len(data))
    for i in range(0, len(order), BATCH):
        yield len(data[order[i : i + BATCH]]["label"])


def torchdata_nodes(files: list[str]) -> Iterator[int]:
    import torchdata.nodes as tn

    class Groups(tn.BaseNode):
        def reset(self, state: Any = None) -> None:
            super().reset(state)
            self.left = iter(files)

        def next(self) -> Any:
            return next(self.left)

        def get_state(self) -> dict:
            return {}

    class Rows(tn.BaseNode):
        def __init__(self, source: Any):
            super().__init__()
            self.source = source

        def reset(self, state: Any = None) -> None:
            super().reset(state)
            self.source.reset()
            self.batches = self.iterate()

        def iterate(self) -> Iterator[Any]:
            for file in self.source:
                yield from pq.ParquetFile(file).iter_batches(BATCH)

        def next(self) -> Any:
            batch = next(self.batches)
            names = batch.schema.names
            return {
                name: torch.from_numpy(column.to_numpy(zero_copy_only=False))
                if pa.types.is_primitive(column.type)
                else column
                for name, column in zip(names, batch.columns, strict=True)
            }

        def get_state(self) -> dict:
            return {}

    for batch in tn.Loader(tn.Prefetcher(Rows(Groups()), prefetch_factor=4)):
        yield len(batch["label"])


def polars_slices(files: list[str]) -> Iterator[int]:
    import polars as pl

    for file in files:
        frame = pl.read_parquet(file)
        for part in frame.iter_slices(BATCH):
            tensors = [c.to_numpy() for c in part if c.dtype != pl.String]
            yield len(tensors[0])


def litdata_stream(files: list[str], workers: int = 0) -> Iterator[int]:
    import litdata
    from litdata.streaming.item_loader import ParquetLoader

    folder = Path(files[0]).parent
    litdata.index_parquet_dataset(str(folder))
    data = litdata.StreamingDataset(
        str(folder), item_loader=ParquetLoader(), shuffle=True
    )
    loader = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)
    for batch in itertools.islice(loader, 60):
        yield len(batch["label"])


def mosaic_stream(files: list[str], workers: int = 0) -> Iterator[int]:
    if importlib.util.find_spec("torchvision") is None:
        # It is imported for vision datasets only, and has no build for this torch.
        for name in ("", ".datasets", ".datasets.vision", ".transforms"):
            stub = types.ModuleType(f"torchvision{name}")
            stub.__spec__ = importlib.machinery.ModuleSpec(stub.__name__, None)
            stub.__path__ = []
            stub.VisionDataset = object
            sys.modules[stub.__name__] = stub
        functional = types.ModuleType("torchvision.transforms.functional")
        functional.to_tensor = None
        sys.modules[functional.__name__] = functional
    import streaming

    folder = Path(files[0]).parent / "mds"
    if not folder.exists():  # conversion is not timed: the warm-up run makes it
        columns = {**dict.fromkeys(FLOATS, "float64"), "label": "int64"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for batch in pq.ParquetFile(files[0]).iter_batches(60000):
                for row in batch.select([*FLOATS, "label"]).to_pylist():
                    writer.write({k: columns_cast(v) for k, v in row.items()})
                break
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    try:
        for batch in DataLoader(data, BATCH, num_workers=workers):
            yield len(batch["label"])
    finally:
        if hasattr(data, "_iterator"):  # else its threads go on beside all others
            data._iterator.exit()
            data._executor.shutdown()


def columns_cast(value: Any) -> Any:
    return np.int64(value) if isinstance(value, int) else np.float64(value)


def csv_pandas(path: str) -> Iterator[int]:
    for chunk in pd.read_csv(path, chunksize=10000):
        for _ in chunk["text"]:
            yield 1


def csv_module(path: str) -> Iterator[int]:
    with open(path, newline="") as file:
        for _ in csv.DictReader(file):
            yield 1


def csv_polars(path: str) -> Iterator[int]:
    import polars as pl

    for frame in pl.scan_csv(path).select("text").collect_batches():
        yield len(frame["text"].to_list())


def csv_pyarrow(path: str) -> Iterator[int]:
    convert = pa_csv.ConvertOptions(include_columns=["text"])
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    for batch in pa_csv.open_csv(path, parse_options=parse, convert_options=convert):
        yield len(batch.column(0).to_pylist())


def csv_parse(path: str) -> Contender:
    """The bound: Arrow parses the blocks in two threads, and nobody uses the rows."""
    load = functools.cache(lambda: StreamingTextDataset(path).source)

    def run() -> Iterator[int]:
        source = load()

        def parse(block: int) -> int:
            return sum(rows for rows, _ in source._read_raw(block, 1 << 16))

        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(parse, range(len(source.block_rows)))

    return run


def csv_ours(
    path: str,
    shuffle: bool,
    again: bool = False,
    keep: bool = False,
    epochs: int = 1,
    strings: str = "list",
) -> Contender:
    """The first epochs, with the pass that counts the rows, or one of the later ones.

    Args:
        keep: the column is kept as Parquet, which the first epoch begins with.
    """
    cache_dir = f"{path}-kept-{again}-{epochs}" if keep else None

    def load() -> StreamBatchLoader:
        data = StreamingTextDataset(path, shuffle=shuffle, cache_dir=cache_dir)
        return StreamBatchLoader(data, BATCH, strings=strings)

    kept = functools.cache(load)

    def run() -> Iterator[int]:
        if cache_dir and not again:
            shutil.rmtree(cache_dir, ignore_errors=True)
        loader = (kept if again else load)()
        for batch in itertools.chain(*[loader] * epochs):
            yield len(batch["text"])

    return run


class SeedImages(Dataset):
    """The guide's pattern with a usual transform."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        image = image.resize((224, 224), Image.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class CvImages(SeedImages):
    def __getitem__(self, index: int) -> torch.Tensor:
        import cv2

        cv2.setNumThreads(1)
        image = cv2.imread(self.paths[index], cv2.IMREAD_COLOR_RGB)
        image = cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(image).permute(2, 0, 1)


def images(data: Dataset, workers: int, collate: Any = None) -> Callable[[], Any]:
    loader = DataLoader(
        data,
        32,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )

    def epoch() -> Iterator[int]:
        for batch in loader:
            yield len(batch)

    return epoch


def hf_images(paths: list[str]) -> Iterator[int]:
    import datasets

    data = datasets.Dataset.from_dict({"image": paths})
    data = data.cast_column("image", datasets.Image())
    for i in range(0, len(paths), 32):
        batch = [
            np.asarray(image.convert("RGB").resize((224, 224), Image.BILINEAR))
            for image in data[i : i + 32]["image"]
        ]
        yield len(batch)


# --- measuring

Contenders = dict[str, Contender]


def contenders(table: str, folder: Path) -> Contenders:
    """Return the functions to time, by name; the first is what ratios refer to."""
    if table.startswith("parquet"):
        files = sorted(map(str, (folder / table).glob("*.parquet")))
        both: Contenders = {
            "decode only (bound)": lambda: decode_only(files),
            "decode only, fastest settings": lambda: decode_fastest(files),
            "decode only, batches of 1024": lambda: decode_only_1024(files),
            "ours": ours(files, 0),
            "ours, 2 workers": ours(files, 2),
            "ours, a tensor a column": ours(files, 0, stack=False),
            "Hugging Face streaming, Arrow": lambda: hf_streaming(files, "arrow"),
            "Hugging Face streaming, torch": lambda: hf_streaming(files, "torch"),
            "Hugging Face map-style": lambda: hf_map_style(files),
            "torchdata nodes (file order)": lambda: torchdata_nodes(files),
            "polars slices (file order)": lambda: polars_slices(files),
            "litdata": lambda: litdata_stream(files),
            "Mosaic streaming": lambda: mosaic_stream(files),
        }
        return both
    if table == "rows":
        files = sorted(map(str, (folder / "parquet-float64").glob("*.parquet")))
        return {
            "seed (iterrows)": lambda: seed_rows(files),
            "ours": lambda: our_rows(files),
        }
    if table == "csv":
        path = str(folder / "t.csv")
        return {
            "pandas chunks (seed)": lambda: csv_pandas(path),
            "csv.DictReader": lambda: csv_module(path),
            "pyarrow open_csv (file order)": lambda: csv_pyarrow(path),
            "polars scan_csv (file order)": lambda: csv_polars(path),
            "parsing alone, 2 threads (bound)": csv_parse(path),
            "ours, shuffled, first epoch": csv_ours(path, True),
            "ours, shuffled, later epochs": csv_ours(path, True, again=True),
            "ours, the same as Arrow arrays": csv_ours(
                path, True, again=True, strings="arrow"
            ),
            "ours, file order, first epoch": csv_ours(path, False),
            "ours, kept as Parquet, first epoch": csv_ours(path, True, keep=True),
            "ours, kept as Parquet, later": csv_ours(path, True, True, keep=True),
            "ours, kept as Parquet, all of 4 epochs": csv_ours(
                path, True, keep=True, epochs=4
            ),
        }
    paths = sorted(map(str, (folder / table).glob("*.jpg")))
    sized = LazyImageDataset(paths, size=224)
    return {
        "seed (Pillow)": images(SeedImages(paths), 0),
        "seed, 2 workers": images(SeedImages(paths), 2),
        "ours": images(sized, 0, collate_images),
        "ours, 2 workers": images(sized, 2, collate_images),
        "OpenCV": images(CvImages(paths), 0),
        "OpenCV, 2 workers": images(CvImages(paths), 2),
        "Hugging Face": lambda: hf_images(paths),
    }


def time_table(table: str, folder: Path, runs: int) -> dict[str, list[float]]:
    """Rows a second of each run, contenders taking turns; failures are reported.

    Each turn begins with another contender. Those of LATE take their turns when the
    others are done: what they leave behind would slow down whoever comes after them.
    """
    functions = contenders(table, folder)
    late = {name: functions.pop(name) for name in list(functions) if name in LATE}
    rates: dict[str, list[float]] = {name: [] for name in [*functions, *late]}
    for group in (functions, late):
        time_group(group, runs, rates)
    return rates


def time_group(functions: Contenders, runs: int, rates: dict[str, list[float]]) -> None:
    """Add the rates of contenders that take turns."""
    for turn in range(runs + 1):
        names = list(functions)
        begin = turn % max(1, len(names))
        for name in names[begin:] + names[:begin]:
            function = functions[name]
            try:
                rows, start = 0, time.perf_counter()
                for count in function():
                    rows += count
                    if time.perf_counter() - start > LIMIT_S:
                        break  # the slow ones need no whole epoch for a rate
                elapsed = time.perf_counter() - start
            except Exception as error:
                print(f"  {name}: left out: {type(error).__name__}: {str(error)[:150]}")
                del functions[name], rates[name]
                continue
            if turn:  # the first turn warms caches, converts and starts workers
                rates[name].append(rows / elapsed)


def time_in_process(table: str, folder: Path, runs: int) -> dict[str, list[float]]:
    """Call `time_table` where no table before has left anything."""
    words = [sys.executable, __file__, "--time", table, str(folder), str(runs)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    told, rates = done.stdout.rstrip().rpartition("\n")[::2]
    print(told)
    return json.loads(rates)


def measure_process(table: str, name: str, folder: Path) -> tuple[float, float, float]:
    """First-batch latency (s), peak and end memory (MB) above the imports, fresh."""
    words = [sys.executable, __file__, "--one", table, name, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return float("nan"), float("nan"), float("nan")
    return tuple(map(float, done.stdout.split()[-3:]))  # type: ignore[return-value]


def used_mb() -> float:
    """Private and shared memory of this process and its workers, no file cache."""
    total = 0
    for process in [os.getpid(), *child_pids()]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        values = {w[0]: int(w[1]) for line in lines[1:] if (w := line.split())}
        total += values["Pss_Anon:"] + values["Pss_Shmem:"]
    return total / 1024


def child_pids() -> list[int]:
    pids: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            pids += map(int, task.read_text().split())
    return pids


def run_one(table: str, name: str, folder: Path) -> None:
    base = used_mb()
    start = time.perf_counter()
    iterator = contenders(table, folder)[name]()
    next(iterator)
    first = time.perf_counter() - start
    peak, next_look = 0.0, 0.0
    for _ in iterator:
        if time.perf_counter() - start > 2 * LIMIT_S:
            break
        if time.perf_counter() > next_look:
            peak = max(peak, used_mb() - base)
            next_look = time.perf_counter() + 0.05
    print(first, peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def picture(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(8, 2.6 * len(results)))
    for axis, (table, rates) in zip(np.atleast_1d(axes), results.items(), strict=True):
        names = list(rates)[::-1]
        base = statistics.median(rates[names[-1]])
        values = [statistics.median(rates[name]) / base for name in names]
        colours = ["tab:orange" if n.startswith("ours") else "tab:gray" for n in names]
        axis.barh(names, values, color=colours)
        axis.set_title(f"{table}: rows a second, x {names[-1]}", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small data, two runs")
    parser.add_argument("--only", help="tables, with commas between them")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(*arguments.one[:2], Path(arguments.one[2]))
        return
    if arguments.time:
        table, folder, runs = arguments.time
        print(json.dumps(time_table(table, Path(folder), int(runs))))
        return
    names = ["parquet-float64", "parquet-float32", "parquet-text"]
    names += ["rows", "csv", "jpeg-1600x1200", "jpeg-500x400"]
    if arguments.only:
        names = arguments.only.split(",")
    runs, rows = (2, 1 << 19) if arguments.quick else (arguments.runs, 1 << 21)
    results: dict[str, dict[str, list[float]]] = {}
    lines = [
        "# Data loading",
        "",
        f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, "
        f"torch {torch.__version__}, pyarrow {pa.__version__}; "
        f"`OMP_NUM_THREADS=1 python benchmarks/data.py`, median of {runs} interleaved "
        "runs, the contenders that leave work behind after the others. Ours shuffles. "
        "First batch and memory: a fresh process; memory is the "
        "peak above the imports, anonymous and shared, workers included. By "
        "that variable Arrow's own pool has one thread, for peers and bound alike; "
        "ours decodes in two.",
    ]
    RESULTS.mkdir(exist_ok=True)
    name_of_run = f"data-{arguments.only.split(',')[0]}" if arguments.only else "data"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for table in names:
            if table.startswith("parquet") or table == "rows":
                kind = "parquet-float64" if table == "rows" else table
                if not (folder / kind).exists():
                    dtype = "float64" if "64" in kind else "float32"
                    write_parquet(folder / kind, rows, dtype, "text" in kind)
            elif table == "csv":
                write_csv(folder / "t.csv", rows)
            else:
                size = (1600, 1200) if "1600" in table else (500, 400)
                write_photos(folder / table, 64 if arguments.quick else 160, size)
            print(table, flush=True)
            rates = results[table] = time_in_process(table, folder, runs)
            base = statistics.median(next(iter(rates.values())))
            lines += [
                "",
                f"## {table}",
                "",
                "| | rows/s | ratio | first batch s | memory MB |",
                "|---|---|---|---|---|",
            ]
            for name, values in rates.items():
                first, memory, _ = measure_process(table, name, folder)
                rate = statistics.median(values)
                line = (
                    f"| {name} | {rate:,.0f} | {rate / base:.3g} | {first:.2f} "
                    f"| {memory:.0f} |"
                )
                print(line, flush=True)
                lines.append(line)
            if not arguments.quick:  # after each table: a full run takes long
                (RESULTS / f"{name_of_run}.md").write_text("\n".join(lines) + "\n")
                picture(results, RESULTS / f"{name_of_run}.png")


if __name__ == "__main__":
    main()
