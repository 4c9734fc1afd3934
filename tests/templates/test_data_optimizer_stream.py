"""templates/data_optimizer.py: columnar streams, their one order, and resume."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from templates.data_optimizer import (
    DataError,
    StreamBatchLoader,
    StreamingParquetDataset,
    StreamingTextDataset,
    _EpochPlan,
    _LineSource,
    _list_data_files,
    _submit_after,
    open_text_stream,
)

SHARDS = (700, 0, 1, 333, 64)  # uneven, empty and tiny
ROWS = sum(SHARDS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    start = 0
    for i, rows in enumerate(SHARDS):
        ids = np.arange(start, start + rows)
        table = {"id": ids, "x": ids * 0.5, "text": [f"row {j}" for j in ids]}
        pq.write_table(pa.table(table), folder / f"{i}.parquet", row_group_size=100)
        start += rows
    return folder


def ids(batches):
    return [batch["id"].tolist() for batch in batches]


def flat(batches):
    return [row for batch in batches for row in batch]


def stream(shards, **options):
    return StreamingParquetDataset(
        shards, **{"shuffle": True, "window_rows": 256, **options}
    )


# --- the order, from row counts alone


def plan_batches(plan, batch_size, rank=0, ranks=1, position=0, drop_last=False):
    """Global row numbers of each batch of a rank."""
    starts = np.cumsum(plan.block_rows) - plan.block_rows
    batches, done = [], True
    shares = plan.shares(position, batch_size, drop_last, rank, ranks)
    for window, to, counts, whole in shares:
        parts = [
            np.arange(starts[b] + low, starts[b] + high)
            for b, low, high in zip(window.blocks, window.low, window.high, strict=True)
        ]
        assert len(to) == window.rows
        taken = np.flatnonzero(to >= 0)
        assert sorted(to[taken]) == list(range(sum(counts)))
        rows = np.concatenate(parts)[taken[np.argsort(to[taken])]]
        for count in counts:
            if done:
                batches.append([])
            batches[-1] += rows[:count].tolist()
            rows, done = rows[count:], True
        done = whole
    assert done
    return batches


LAYOUTS = {
    "even": [100] * 20,
    "uneven": [1, 700, 0, 33, 5, 5, 900, 0, 2, 64],
    "one block": [1000],
    "tiny": [1] * 50,
    "few rows": [3],
    "nothing": [0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_every_row_once_at_any_batch_and_window_size(layout, shuffle, batch_size):
    rows = np.array(LAYOUTS[layout])
    for window_rows in (1, 50, 128, 10000):
        plan = _EpochPlan(rows, window_rows, 3, 1, shuffle)
        batches = plan_batches(plan, batch_size)
        assert len(batches) == -(-rows.sum() // batch_size)
        assert all(len(batch) == batch_size for batch in batches[:-2])
        order = flat(batches)
        if shuffle:
            assert sorted(order) == list(range(rows.sum()))
        else:
            assert order == list(range(rows.sum()))
        dropped = flat(plan_batches(plan, batch_size, drop_last=True))
        assert len(dropped) == rows.sum() // batch_size * batch_size
        assert len(set(dropped)) == len(dropped)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "ranks", [1, 2, 3, 8, 100, pytest.param(1024, marks=pytest.mark.slow)]
)
def test_ranks_share_the_same_global_batches(layout, ranks):
    rows = np.array(LAYOUTS[layout])
    plan = _EpochPlan(rows, 128, 0, 0, True)
    whole = [sorted(batch) for batch in plan_batches(plan, 48)]
    shares = [plan_batches(plan, 48, rank, ranks) for rank in range(ranks)]
    for k, batch in enumerate(whole):
        sizes = [len(share[k]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(flat(share[k] for share in shares)) == batch
    assert all(len(share) == len(whole) for share in shares)


@pytest.mark.parametrize("layout", ["even", "uneven", "one block", "tiny"])
def test_resume_at_any_position_gives_the_rest(layout):
    rows = np.array(LAYOUTS[layout])
    plan = _EpochPlan(rows, 128, 0, 0, True)
    whole = plan_batches(plan, 32)
    position = 0
    for k, batch in enumerate(whole):
        fresh = _EpochPlan(rows, 128, 0, 0, True)
        assert plan_batches(fresh, 32, position=position) == whole[k:]
        position += len(batch)


def test_order_depends_on_seed_and_epoch_and_draws_nothing():
    rows = np.array(LAYOUTS["uneven"])
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    orders = {
        (seed, epoch): str(plan_batches(_EpochPlan(rows, 128, seed, epoch, True), 8))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    again = _EpochPlan(rows, 128, 2, 1, True)
    assert str(plan_batches(again, 8)) == orders[2, 1]


def test_no_two_windows_of_a_group_are_in_the_same_order():
    plan = _EpochPlan(np.array([1000, 1000]), 200, 0, 0, True)
    orders = {tuple(to) for _, to, _, _ in plan.shares(0, 50, False, 0, 1)}
    assert len(orders) == 10
    assert all(sorted(order) == list(range(200)) for order in orders)


def test_a_rank_reads_few_blocks_that_others_read():
    rows = np.full(64, 1000)
    plan = _EpochPlan(rows, 4000, 0, 0, True)
    read = 0
    for rank in range(4):
        for window, to, _, _ in plan.shares(0, 400, False, rank, 4):
            mine = np.flatnonzero(to >= 0)
            edges = np.append(0, np.cumsum(window.high - window.low))
            touched = np.searchsorted(edges, [mine.min(), mine.max()], "right")
            read += touched[1] - touched[0] + 1
    windows = 64 * 1000 // 4000
    assert read < 2 * windows * 8  # all ranks reading everything would be 4


def test_a_batch_mixes_all_blocks_of_its_group_like_a_full_shuffle():
    """How evenly the blocks of a group come in its batches, against randperm."""
    plan = _EpochPlan(np.full(64, 1000), 2048, 0, 0, True)
    batches = np.array(plan_batches(plan, 250)) // 1000
    distance = []
    full = np.random.default_rng(0)
    for group in batches.reshape(8, 32, 250):  # 8 groups of 8 blocks
        blocks = np.unique(group)
        assert len(blocks) == 8
        counts = np.stack([(group == block).sum(1) for block in blocks])
        ideal = full.permutation(np.repeat(np.arange(8), 1000)).reshape(32, 250)
        wanted = np.stack([(ideal == block).sum(1) for block in range(8)])
        distance.append((counts.std(), wanted.std()))
    ours, ideal = np.mean(distance, 0)
    assert ours < 1.15 * ideal


# --- batches


def test_batches_hold_tensors_and_text(shards):
    loader = StreamBatchLoader(stream(shards), 64)
    batches = list(loader)
    assert len(loader) == len(batches) == -(-ROWS // 64)
    assert sorted(flat(ids(batches))) == list(range(ROWS))
    for batch in batches:
        assert batch["id"].dtype == torch.int64
        assert torch.equal(batch["x"], batch["id"] * 0.5)
        assert batch["x"].dtype == torch.float64
        assert batch["text"] == [f"row {i}" for i in batch["id"]]
    arrow = next(iter(StreamBatchLoader(stream(shards), 64, strings="arrow")))
    assert arrow["text"].to_pylist() == batches[0]["text"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_same_batches_for_any_number_of_workers_and_ranks(shards, world_size):
    whole = list(StreamBatchLoader(stream(shards), 64))

    def rank_batches(rank, workers):
        data = stream(shards, rank=rank, world_size=world_size)
        return list(StreamBatchLoader(data, 64, num_workers=workers))

    none = [rank_batches(rank, 0) for rank in range(world_size)]
    for k, batch in enumerate(whole):
        joined = flat(ids([rank[k] for rank in none]))
        assert sorted(joined) == sorted(batch["id"].tolist())
    for workers in (1, 2, 3):
        some = rank_batches(world_size - 1, workers)
        assert ids(some) == ids(none[-1])  # bit for bit: the order inside too
        assert [b["text"] for b in some] == [b["text"] for b in none[-1]]


def test_workers_follow_the_epoch_and_resume(shards):
    fresh = StreamBatchLoader(stream(shards), 64)
    with_workers = StreamBatchLoader(stream(shards), 64, num_workers=2)
    epochs = [ids(fresh), ids(fresh)]
    assert [ids(with_workers), ids(with_workers)] == epochs
    assert sorted(flat(epochs[0])) == sorted(flat(epochs[1]))
    assert epochs[0] != epochs[1]
    with_workers.set_epoch(1, start=5)
    assert ids(with_workers) == epochs[1][5:]


@pytest.mark.parametrize("used", [0, 1, 9, 17, 18])
def test_resume_on_other_workers_and_ranks(shards, used):
    whole = StreamBatchLoader(stream(shards), 64)
    whole.set_epoch(3)
    batches = [sorted(b) for b in ids(whole)]
    assert len(batches) == 18
    first = StreamBatchLoader(stream(shards), 64, num_workers=2)
    first.set_epoch(3)
    iterator = iter(first)
    for _ in range(used):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    rest = []
    for rank in range(2):
        loader = StreamBatchLoader(stream(shards, rank=rank, world_size=2), 64)
        loader.load_state_dict(state)
        rest.append(ids(loader))
        after = loader.state_dict()
        assert (after["epoch"], after["position"]) == (4, 0)
    joined = [sorted(a + b) for a, b in zip(*rest, strict=True)]
    assert joined == batches[used:]


def test_resume_with_another_batch_size_repeats_and_loses_nothing(shards):
    first = StreamBatchLoader(stream(shards), 64)
    iterator = iter(first)
    seen = flat(ids([next(iterator) for _ in range(5)]))
    second = StreamBatchLoader(stream(shards), 100)
    second.load_state_dict(first.state_dict())
    assert sorted(seen + flat(ids(second))) == list(range(ROWS))


@pytest.mark.parametrize("rows", [1, 700, 1024, 4096, 9000])  # whole pages, and not
@pytest.mark.parametrize("dtype", ["bool", "int8", "float32", "float64"])
def test_stacks_and_lists_of_any_type_and_number_of_rows(tmp_path, rows, dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2 if dtype == "bool" else 100, (rows, 5)).astype(dtype)
    table = {str(i): values[:, i] for i in range(5)}
    lists = () if dtype == "bool" else (1, 3)
    for size in lists:
        flat = pa.array(values[:, :size].ravel())
        table[f"list{size}"] = pa.FixedSizeListArray.from_arrays(flat, size)
    table["id"] = np.arange(rows)
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    data = StreamingParquetDataset(tmp_path, shuffle=True, window_rows=8192)
    seen = []
    for batch in StreamBatchLoader(data, 1000, stack={"x": list("2034"), "y": ["1"]}):
        wanted = torch.from_numpy(values)[batch["id"]]
        assert torch.equal(batch["x"], wanted[:, [2, 0, 3, 4]])
        assert torch.equal(batch["y"], wanted[:, 1:2])
        for size in lists:
            assert torch.equal(batch[f"list{size}"], wanted[:, :size])
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(rows))


def test_drop_last_and_stack(shards):
    loader = StreamBatchLoader(
        stream(shards, columns=["x", "id"]), 64, drop_last=True, stack={"in": ["x"]}
    )
    batches = list(loader)
    assert len(batches) == len(loader) == ROWS // 64
    assert all(list(b) == ["id", "in"] and b["in"].shape == (64, 1) for b in batches)
    assert torch.equal(batches[0]["in"][:, 0], batches[0]["id"] * 0.5)
    with pytest.raises(DataError, match="several types"):
        StreamBatchLoader(stream(shards), 64, stack={"in": ["x", "id"]})
    with pytest.raises(DataError, match="'text'"):
        StreamBatchLoader(stream(shards), 64, stack={"in": ["text"]})


def test_more_ranks_than_rows_take_empty_steps(shards):
    data = stream([shards / "2.parquet"], rank=0, world_size=2)
    (batch,) = StreamBatchLoader(data, 8)
    assert batch["x"].shape == (0,)
    assert batch["x"].dtype == torch.float64
    assert batch["text"] == []
    (nothing,) = [stream([shards / "1.parquet"])]
    assert list(StreamBatchLoader(nothing, 8)) == []


def test_row_interface_yields_every_row_once_over_workers_and_ranks(shards):
    expected = [{"id": i, "x": i * 0.5, "text": f"row {i}"} for i in range(ROWS)]
    assert list(StreamingParquetDataset(shards)) == expected
    seen = []
    for rank in range(2):
        data = stream(shards, rank=rank, world_size=2)
        seen += list(DataLoader(data, batch_size=None, num_workers=2))
    assert sorted(seen, key=lambda row: row["id"]) == expected
    data = stream(shards)
    loader = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True)
    first = [row["id"] for row in loader]
    data.set_epoch(1)
    second = [row["id"] for row in loader]
    assert first != second
    assert sorted(first) == sorted(second)


# --- types


def test_column_types(tmp_path):
    day, moment = datetime.date(1970, 1, 3), datetime.datetime(1970, 1, 1, 0, 0, 2)
    columns = {
        "bool": pa.array([True, False, True]),
        "half": pa.array(np.array([1, 2, 3], np.float16)),
        "u16": pa.array([1, 2, 65535], pa.uint16()),
        "u64": pa.array([1, 2, 3], pa.uint64()),
        "null": pa.array([1.5, None, 3.5], pa.float32()),
        "day": pa.array([day] * 3),
        "moment": pa.array([moment] * 3, pa.timestamp("ms")),
        "money": pa.array([decimal.Decimal("1.25")] * 3),
        "kind": pa.array(["a", "b", None]).dictionary_encode(),
        "vector": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
        "ragged": pa.array([[1], [], [2, 3]]),
        "bytes": pa.array([b"x", b"", None]),
    }
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    data = StreamingParquetDataset(path)
    (batch,) = StreamBatchLoader(data, 3)
    assert batch["bool"].tolist() == [True, False, True]
    assert batch["bool"].dtype == torch.bool
    assert batch["half"].dtype == torch.float16
    assert batch["u16"].tolist() == [1, 2, 65535]
    assert batch["u64"].tolist() == [1, 2, 3]
    assert batch["null"].isnan().tolist() == [False, True, False]
    assert batch["day"].tolist() == [2, 2, 2]
    assert batch["moment"].tolist() == [2000] * 3
    assert batch["money"].tolist() == [1.25] * 3
    assert batch["kind"] == ["a", "b", None]
    assert batch["vector"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert batch["ragged"] == [[1], [], [2, 3]]
    assert batch["bytes"] == [b"x", b"", None]
    row = next(iter(data))
    assert (row["day"], row["moment"], row["money"]) == (
        day,
        moment,
        decimal.Decimal("1.25"),
    )


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_nulls_and_lists_are_handled_or_refused_by_column(tmp_path):
    path = write(
        tmp_path / "t.parquet",
        label=pa.array([1, None, 3]),
        vector=pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        pair=pa.array([{"a": 1}] * 3),
    )
    with pytest.raises(DataError, match=r"'label'.*fill_null"):
        list(StreamBatchLoader(StreamingParquetDataset(path, ["label"]), 2))
    filled = StreamingParquetDataset(path, ["label"], fill_null={"label": -1})
    assert next(iter(StreamBatchLoader(filled, 3)))["label"].tolist() == [1, -1, 3]
    fixed = StreamingParquetDataset(
        path, ["vector"], column_types={"vector": pa.list_(pa.float32(), 2)}
    )
    (batch,) = StreamBatchLoader(fixed, 3)
    assert batch["vector"].shape == (3, 2)
    assert batch["vector"].dtype == torch.float32
    with pytest.raises(DataError, match=r"'pair'.*columns="):
        StreamBatchLoader(StreamingParquetDataset(path), 2)
    assert next(iter(StreamingParquetDataset(path)))["pair"] == {"a": 1}
    kinds = {"vector": pa.list_(pa.float32(), 2)}
    for rows, cause, lists in (
        ([[1.0], [3.0, 4.0]], "1 values, not 2", pa.list_),
        ([[1.0, 2.0], [3.0]], "1 values, not 2", pa.large_list),  # as polars writes
        ([None], "missing", pa.list_),
    ):
        ragged = write(
            tmp_path / "r.parquet", vector=pa.array(rows, lists(pa.float64()))
        )
        wrong = StreamingParquetDataset(ragged, column_types=kinds)
        with pytest.raises(DataError, match=rf"'vector' of .*r\.parquet: .*{cause}"):
            list(StreamBatchLoader(wrong, 2))
    filled = StreamingParquetDataset(
        ragged, column_types=kinds, fill_null={"vector": 7}
    )
    (batch,) = StreamBatchLoader(filled, 2)
    assert batch["vector"].tolist() == [[7, 7]]


# --- files


def test_folders_globs_lists_and_hive_partitions(tmp_path):
    for year in (2023, 2024):
        for place in ("a", "b c"):
            folder = tmp_path / f"year={year}" / f"place={place.replace(' ', '%20')}"
            folder.mkdir(parents=True)
            write(folder / "part.parquet", id=[year])
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "year=2023" / "notes.txt").write_text("no data")
    rows = list(StreamingParquetDataset(tmp_path))
    assert len(rows) == 4
    assert {(r["id"], r["year"], r["place"]) for r in rows} == {
        (2023, 2023, "a"),
        (2023, 2023, "b c"),
        (2024, 2024, "a"),
        (2024, 2024, "b c"),
    }
    data = StreamingParquetDataset(tmp_path, ["place", "year"])
    (batch,) = StreamBatchLoader(data, 4)
    assert batch["year"].tolist() == [2023, 2023, 2024, 2024]
    assert batch["place"] == ["a", "b c", "a", "b c"]
    only = StreamingParquetDataset(tmp_path, filters=[("year", "==", 2024)])
    assert [r["year"] for r in only] == [2024, 2024]
    some = list(StreamingParquetDataset(f"{tmp_path}/year=2023/*/*.parquet"))
    assert len(some) == 2
    assert set(some[0]) == {"id", "place"}, "folders above the data are no columns"
    assert len(list(StreamingParquetDataset(f"{tmp_path}/**/part.*"))) == 4
    with pytest.raises(DataError, match="no files"):
        StreamingParquetDataset(f"{tmp_path}/*.parquet")
    files = sorted(tmp_path.rglob("*.parquet"))
    assert len(list(StreamingParquetDataset(files[:3]))) == 3
    assert len(list(StreamingParquetDataset(f"file://{tmp_path}"))) == 4


@pytest.mark.parametrize(
    "filters",
    [
        [("year", "==", 2024)],
        ("year", ">=", 2023),
        [[("year", "==", 2024)], [("id", "<", 3)]],
        [("year", "==", 2024), ("id", ">", 25)],
        ds.field("year").is_null(),
        ds.field("year").is_valid() & (ds.field("x") > 4),
    ],
    ids=str,
)
def test_filters_by_folders_give_what_pyarrow_gives(filters, tmp_path):
    """Also in several row groups, which pyarrow's count_rows does not tell apart."""
    for start, year in enumerate(["2023", "2024", "__HIVE_DEFAULT_PARTITION__"]):
        numbers = np.arange(start * 10, start * 10 + 23)
        (tmp_path / f"year={year}").mkdir()
        path = tmp_path / f"year={year}/a.parquet"
        table = pa.table({"id": numbers, "x": numbers / 5, "note": ["-"] * 23})
        pq.write_table(table, path, row_group_size=5)
    data = stream(tmp_path, columns=["id"], filters=filters, shuffle=False)
    whole = ds.dataset(tmp_path, partitioning="hive")
    wanted = whole.to_table(filter=data.source.filters)["id"].to_pylist()
    assert data.rows == len(wanted) > 0
    assert flat(ids(StreamBatchLoader(data, 4))) == wanted
    assert "note" not in [*data.source.types, *data.source.filter_columns]


def test_filters_read_no_column_that_nobody_asks_for(tmp_path):
    path = write(tmp_path / "a.parquet", id=range(9), x=range(9), note=["n" * 99] * 9)
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert column.path_in_schema == "note"
    raw = bytearray(path.read_bytes())
    start = column.dictionary_page_offset
    raw[start : start + 20] = b"\xff" * 20
    path.write_bytes(raw)
    data = stream(path, columns=["id"], filters=[("x", ">", 4)], shuffle=False)
    assert flat(ids(StreamBatchLoader(data, 4))) == [5, 6, 7, 8]


def test_filters_are_part_of_what_a_state_is_held_against(tmp_path):
    path = write(tmp_path / "a.parquet", id=range(10), lang=["en", "de"] * 5)
    english, german = (
        StreamBatchLoader(stream(path, filters=[("lang", "==", lang)]), 2)
        for lang in ("en", "de")
    )
    with pytest.raises(DataError, match="rows in another order"):
        german.load_state_dict(english.state_dict())
    with pytest.raises(DataError, match=r"no row of 1 files passes.*EN.*values"):
        stream(path, filters=[("lang", "==", "EN")])


def test_filters_with_values_of_another_type_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", id=range(10))
    with pytest.raises(DataError, match=r"a\.parquet: .*values of their types"):
        stream(path, filters=[("id", "==", "3")])


def test_texts_of_either_arrow_type_go_together(tmp_path):
    """pandas 3 writes large_string, pyarrow string."""
    write(tmp_path / "a.parquet", id=[1], text=pa.array(["a"], pa.large_string()))
    write(tmp_path / "b.parquet", id=[2], text=pa.array(["b"]))
    write(tmp_path / "c.parquet", id=[3], text=pa.nulls(1))
    write(tmp_path / "d.parquet", id=pa.nulls(0, pa.int64()), text=pa.nulls(0))
    (batch,) = StreamBatchLoader(stream(tmp_path, shuffle=False), 3)
    assert batch["text"] == ["a", "b", None]
    rows = list(stream(tmp_path, shuffle=False))
    assert [row["text"] for row in rows] == ["a", "b", None]


def test_column_types_that_do_not_exist_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", id=[1])
    with pytest.raises(DataError, match=r"'list<float>' of column 'id'.*pa\.list_"):
        stream(path, column_types={"id": "list<float>"})


def test_the_commonest_schema_counts_when_others_are_skipped(tmp_path):
    for name, kind in zip("abcd", ["string", "int64", "int64", "string"], strict=True):
        array = pa.array([1, 2]).cast(pa.type_for_alias(kind))
        write(tmp_path / f"{name}.parquet", id=array)
    write(tmp_path / "e.parquet", id=[3, 4])
    data = stream(tmp_path, on_error="skip", shuffle=False)
    assert flat(ids(StreamBatchLoader(data, 6))) == [1, 2, 1, 2, 3, 4]
    assert [line.rpartition(" (")[2] for line in data.skipped] == [
        "the whole file, 2 rows)"
    ] * 2
    with pytest.raises(
        DataError, match=r"'id' is string in .*such as {'id': 'string'}"
    ):
        stream(tmp_path)


def test_fsspec_filesystems(shards):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.parquet", (shards / "0.parquet").read_bytes())
    assert len(list(StreamingParquetDataset("memory://bucket"))) == SHARDS[0]
    given = StreamingParquetDataset("/bucket/a.parquet", filesystem=memory)
    assert len(list(given)) == SHARDS[0]


def test_filters_prune_row_groups_and_keep_the_guarantees(shards, monkeypatch):
    data = stream(shards, filters=[("id", ">=", 650), ("id", "<", 720)])
    assert data.rows == 70
    # Row groups of 100: 650 to 720 lies in 600-700, 700 and 701-801 of the shards.
    assert (data.source.block_rows > 0).sum() == 3
    loader = StreamBatchLoader(stream(shards, filters=pa.compute.field("x") < 5), 4)
    batches = ids(loader)
    assert sorted(flat(batches)) == list(range(10))
    assert len(loader) == len(batches)
    columns = stream(shards, columns=["text"], filters=[("id", "<", 3)])
    assert sorted(r["text"] for r in columns) == ["row 0", "row 1", "row 2"]


# --- CSV and JSONL

TEXTS = [
    *(f"line {i}" for i in range(300)),
    "two\nlines",
    'a "quoted" word',
    "comma, and\r\nCRLF",
    "",
    "NA",
    "123",
    "한국어",
]


@pytest.fixture(params=["csv", "csv.gz", "csv.zst", "jsonl", "jsonl.gz", "tsv"])
def text_file(request, tmp_path):
    path = tmp_path / f"t.{request.param}"
    frame = pd.DataFrame({"n": range(len(TEXTS)), "text": TEXTS, "y": 0.5})
    if "jsonl" in request.param:
        data = frame.to_json(orient="records", lines=True, force_ascii=False)
    else:
        tabs = "\t" if "tsv" in request.param else ","
        data = frame.to_csv(index=False, sep=tabs, lineterminator="\n")
    raw = data.encode()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=codec) as file:
        file.write(raw)
    return path


def test_text_formats(text_file, monkeypatch):
    data = StreamingTextDataset(text_file)
    assert list(data) == TEXTS
    # Blocks of 200 bytes cut through rows, quotes and letters of several bytes.
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 200)
    shuffled = StreamingTextDataset(
        text_file, columns=["n"], shuffle=True, window_rows=50
    )
    if not text_file.suffix.endswith(("gz", "zst")):
        assert len(shuffled.source.block_rows) > 10
    loader = StreamBatchLoader(shuffled, 16)
    whole = list(loader)
    numbers = flat(batch["n"].tolist() for batch in whole)
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(len(TEXTS)))
    assert flat(b["text"] for b in whole) == [TEXTS[n] for n in numbers]
    loader.set_epoch(0, start=7)
    assert flat(b["text"] for b in loader) == flat(b["text"] for b in whole[7:])
    workers = StreamBatchLoader(shuffled, 16, num_workers=2)
    assert [b["text"] for b in workers] == [b["text"] for b in whole]


def test_text_files_that_are_indexed_late_keep_all_their_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 200)
    texts = [f"text, {i}" for i in range(100)]
    for part, name in enumerate(["a.csv", "b.csv"]):
        rows = [f'{i},"{t}",x' for i, t in enumerate(texts[50 * part : 50 * part + 50])]
        (tmp_path / name).write_text("\n".join(["n,text,other", *rows]))
    index_file = _LineSource._index_file

    def index_late(source, file):
        if file.endswith("b.csv"):  # when the columns were taken from the first
            for _ in range(1000):
                if source.first_file:
                    break
                time.sleep(0.01)
            assert source.first_file
        return index_file(source, file)

    monkeypatch.setattr(_LineSource, "_index_file", index_late)
    assert list(StreamingTextDataset(tmp_path)) == texts


def test_text_encodings_blank_lines_and_no_last_newline(tmp_path):
    path = tmp_path / "t.csv"
    for encoding in ("utf-8", "utf-8-sig", "latin-1", "utf-16", "cp949"):
        word = "한국어" if encoding in ("cp949", "utf-16") else "Größe"
        text = f'id,text\n1,{word}\n\n\r\n2,"a\n\nb"\n3,end'
        path.write_bytes(text.encode(encoding))
        name = encoding.removesuffix("-sig")
        data = StreamingTextDataset(path, encoding=name, columns=["id"])
        assert list(data) == [word, "a\n\nb", "end"], encoding
        (batch,) = StreamBatchLoader(data, 3)
        assert batch["id"].tolist() == [1, 2, 3]


def test_text_types(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"{i},{i},t{i}" for i in range(2000)] + ["0.5,,t"]
    path.write_text("\n".join(["price,count,text", *rows]))
    options = {"columns": ["price", "count"], "fill_null": {"count": -1}}
    import templates.data_optimizer as module

    block = module._LINE_BLOCK_BYTES
    module._LINE_BLOCK_BYTES = 4096
    try:
        data = StreamingTextDataset(path, **options)
        with pytest.raises(DataError, match=r"t\.csv.*price|t\.csv.*CSV"):
            list(StreamBatchLoader(data, 64))
        data = StreamingTextDataset(path, column_types={"price": "float64"}, **options)
        last = list(StreamBatchLoader(data, 2001))[-1]
    finally:
        module._LINE_BLOCK_BYTES = block
    assert last["price"][-1] == 0.5
    assert last["count"][-1] == -1


def test_text_kept_as_parquet_is_the_same_and_made_once(
    text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 200)
    options = {"columns": ["n", "y"], "shuffle": True, "window_rows": 50}
    options |= {"cache_dir": tmp_path / "new" / "cache"}

    def load(workers=0):
        data = StreamingTextDataset(text_file, **options)
        return StreamBatchLoader(data, 16, num_workers=workers)

    loader = load()
    whole = list(loader)
    numbers = flat(batch["n"].tolist() for batch in whole)
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(len(TEXTS)))
    assert flat(b["text"] for b in whole) == [TEXTS[n] for n in numbers]
    assert whole[0]["n"].dtype == torch.int64
    assert whole[0]["y"].unique().tolist() == [0.5]
    with monkeypatch.context() as patch:

        def parse(*values, **options):
            raise AssertionError("it is converted already")

        patch.setattr("templates.data_optimizer._LineSource._parse", parse)
        for again in (load(), load(workers=2)):
            assert [b["text"] for b in again] == [b["text"] for b in whole]
        again.set_epoch(0, start=7)
        assert flat(b["text"] for b in again) == flat(b["text"] for b in whole[7:])
        with pytest.raises(AssertionError):  # another column is another file
            StreamingTextDataset(text_file, **{**options, "columns": ["n"]})
    # Other rows: the same name, and here even the same size.
    raw = text_file.read_bytes()
    changed = raw.replace(b"line 7", b"LINE 7")
    if changed != raw:
        text_file.write_bytes(changed)
        assert "LINE 7" in flat(b["text"] for b in load())
    assert not list(options["cache_dir"].glob(".*"))


def test_text_kept_as_parquet_lies_in_bounded_row_groups(tmp_path):
    path = tmp_path / "t.jsonl"
    texts = [f"{i:05}" * 200 for i in range(20_000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = StreamingTextDataset(path, cache_dir=tmp_path / "cache")
    assert list(data) == texts
    (kept,) = (tmp_path / "cache").iterdir()
    meta = pq.ParquetFile(kept).metadata
    sizes = [meta.row_group(g).total_byte_size for g in range(meta.num_row_groups)]
    assert len(sizes) > 1
    assert max(sizes) < 12 << 20


def test_what_a_killed_conversion_left_is_removed_but_not_what_is_being_written(
    tmp_path,
):
    path, cache = tmp_path / "t.csv", tmp_path / "cache"
    path.write_text("id,text\n1,one\n")
    StreamingTextDataset(path, cache_dir=cache)
    (kept,) = cache.iterdir()
    old, new = (cache / f".{kept.name}.{pid}.tmp" for pid in (1, 2))
    for left in (old, new):
        left.write_text("half")
    os.utime(old, (0, 0))
    assert list(StreamingTextDataset(path, cache_dir=cache)) == ["one"]
    assert not old.exists()
    assert new.exists()


def test_a_text_stream_takes_further_options_and_two_different_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("text,label\ncaf\xe9,a\n'tea,b\n".encode("latin-1"))
    options = {"encoding": "latin-1", "quote_char": None}
    stream = open_text_stream(str(path), ("text", "label"), 0, **options)
    assert sorted(stream) == ["'tea", "caf\xe9"]
    with pytest.raises(DataError, match="columns text, text: name two different ones"):
        open_text_stream(str(path), ("text", "text"), 0)


def test_text_that_cannot_be_kept(tmp_path, monkeypatch):
    path, cache = tmp_path / "t.csv", tmp_path / "cache"
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 100)
    rows = [f"{i},text {i}" for i in range(100)]
    path.write_text("\n".join(["id,text", *rows[:50], "1,2,3", *rows[50:]]) + "\n")
    with pytest.raises(DataError, match=r"t\.csv.*Expected 2 columns"):
        StreamingTextDataset(path, cache_dir=cache)
    with pytest.raises(DataError, match=r"no column 'body' in .*t\.csv"):
        StreamingTextDataset(path, "body", cache_dir=cache)
    data = StreamingTextDataset(path, cache_dir=cache, on_error="skip")
    assert list(data) == [f"text {i}" for i in range(100)]
    assert re.fullmatch(r".*t\.csv, the row at byte \d+: .*\(1 row\)", data.skipped[0])
    assert not list(cache.iterdir())  # the next run must hear of it, too
    path.write_text("\n".join(["id,text", *rows]))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(DataError, match=r"cannot write .*leave cache_dir out"):
        StreamingTextDataset(path, cache_dir=in_the_way)


# --- bad input


def test_errors_are_one_line_with_file_and_remedy(tmp_path, shards):
    good = shards / "0.parquet"
    torn, text = tmp_path / "torn.parquet", tmp_path / "text.parquet"
    torn.write_bytes(good.read_bytes()[:-100])
    text.write_text("no parquet")
    other = write(tmp_path / "other.parquet", id=["a"], x=[1.0], text=["b"])
    empty = tmp_path / "folder"
    empty.mkdir()
    csv = tmp_path / "t.csv"
    csv.write_text("id,text\n1,a\n2\n3,c\n")
    fine, nothing = tmp_path / "fine.csv", tmp_path / "nothing.csv"
    fine.write_text("id,text\n1,a\n")
    twice, semicolons = tmp_path / "twice.csv", tmp_path / "semicolons.csv"
    twice.write_text("id,text,text\n1,a,b\n")
    semicolons.write_text("id;text\n1;a\n")
    bare = tmp_path / "bare.jsonl"
    bare.write_text("{}\n{}\n")
    nothing.write_text("")
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_text('{"text": "a"}\n{"text": \n')
    cases = [
        (lambda: stream(tmp_path / "none.parquet"), r"none\.parquet does not exist"),
        (lambda: stream(torn), r"torn\.parquet.*on_error"),
        (lambda: stream(text), r"text\.parquet.*on_error"),
        (lambda: stream([good, other]), r"'id' is int64.*string in .*other"),
        (lambda: stream(good, columns=["y"]), r"no column 'y' in .*id, x, text"),
        (lambda: stream(empty), "no files of type .parquet"),
        (lambda: stream([]), "empty"),
        (lambda: list(StreamingTextDataset(csv)), r"t\.csv.*Expected 2 columns"),
        (lambda: StreamingTextDataset(nothing), r"nothing\.csv: it is empty. Repair"),
        (lambda: list(StreamingTextDataset(jsonl)), r"t\.jsonl"),
        (lambda: StreamingTextDataset(fine, "body"), "no column 'body' in .*id, text"),
        (lambda: StreamingTextDataset(twice), r"twice\.csv has several columns 'text'"),
        (lambda: StreamingTextDataset(semicolons), r"id;text \(is the delimiter ';'"),
        (lambda: StreamingTextDataset(bare), r"no column 'text' in .*bare\.jsonl"),
        (lambda: StreamingTextDataset(fine, encoding="latin99"), "encoding: latin99"),
        (lambda: StreamingTextDataset("nowhere/*.csv"), r"nowhere.*Check the path"),
    ]
    for make, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value).strip()
    with pytest.raises(ValueError, match="on_error"):
        stream(good, on_error="ignore")


def corrupt(source, target):
    """Flip bytes in the middle of the data: the footer stays whole."""
    raw = bytearray(source.read_bytes())
    middle = len(raw) // 3
    raw[middle : middle + 400] = bytes(b ^ 0x5A for b in raw[middle : middle + 400])
    target.write_bytes(raw)
    return target


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_blocks_are_named_or_skipped(tmp_path, shards, workers):
    broken = corrupt(shards / "0.parquet", tmp_path / "broken.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    good = shards / "3.parquet"
    loader = StreamBatchLoader(stream([broken, good]), 64, num_workers=workers)
    with pytest.raises(DataError, match=r"broken\.parquet, row group \d"):
        list(loader)
    files = [broken, good, tmp_path / "torn.parquet"]
    data = stream(files, on_error="skip")
    loader = StreamBatchLoader(data, 64, num_workers=workers)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = flat(ids(batches))
    assert len(seen) == len(set(seen))
    assert set(range(701, 701 + 333)) <= set(seen)
    assert 333 < len(seen) < 333 + 700
    assert "torn.parquet" in data.skipped[0]
    assert len(data.skipped) > 1
    assert all("broken.parquet" in line for line in data.skipped[1:])
    assert sum(lost_rows(line) for line in data.skipped[1:]) == 333 + 700 - len(seen)


def lost_rows(line):
    return int(re.search(r"\((\d+) rows?\)$", line)[1])


BAD_ROWS = {
    ".csv": {
        "too many cells": b'7,"a, b",x,y\n',
        "too few": b"7,a\n",
        "no number": b"seven,a,x\n",
        "no UTF-8": b"7,\xff\xfe,x\n",
        "no value": b",a,x\n",  # nulls fit no integers
    },
    ".jsonl": {
        "broken": b'{"n": 7, "text": \n',
        "another type": b'{"n": "seven", "text": "a", "tag": "x"}\n',
        "no UTF-8": b'{"n": 7, "text": "\xff", "tag": "x"}\n',
        "no value": b'{"text": "a", "tag": "x"}\n',
    },
}


def write_rows(path, rows, bad):
    """Write (n, text, tag) rows, and lines that cannot be read before some of them."""
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        if ".csv" in path.name:
            file.write(b"n,text,tag\n")
        for n, text, tag in rows:
            file.write(b"".join(bad.get(n, [])))
            row = {"n": n, "text": text, "tag": tag}
            line = json.dumps(row) if ".json" in path.name else f'{n},"{text}",{tag}'
            file.write(line.encode() + b"\n")
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.gz"])
def test_of_bad_lines_only_they_are_left_out(name, workers, tmp_path, monkeypatch):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 3000)
    rows = [(n, f"text\n{n}, é"[n % 2 * 5 :], f"tag {n % 3}") for n in range(900)]
    bad = list(BAD_ROWS[Path(name).suffixes[0]].values())
    # The first row, two in a row, several in a block, the last but one.
    places = {0: bad[:1], 200: bad[1:3], 210: bad[3:], 899: bad[:1]}
    count = sum(map(len, places.values()))
    path = write_rows(tmp_path / name, rows, places)
    options = {"columns": ["n", "tag"], "on_error": "skip", "window_rows": 100}
    plain = StreamingTextDataset(path, **options)
    whole = StreamBatchLoader(plain, 64, num_workers=workers)
    for _ in range(2):
        numbers = flat(batch["n"].tolist() for batch in whole)
        assert sorted(numbers) == list(range(900))
    assert sum(map(lost_rows, plain.skipped)) == count  # not told twice
    raw = gzip.decompress(path.read_bytes()) if "gz" in name else path.read_bytes()
    for line in plain.skipped:  # the first of its block
        if at := re.search(rf"{re.escape(str(path))}, the row at byte (\d+)", line):
            assert raw[int(at[1]) :].startswith(tuple(bad))
        else:
            assert "has nulls" in line

    data = StreamingTextDataset(path, shuffle=True, **options)
    digest = data.order_digest()
    data.drop_unreadable()
    assert data.rows == 900
    assert data.order_digest() != digest
    assert sum(map(lost_rows, data.skipped)) == count
    assert data.unique("tag") == ["tag 0", "tag 1", "tag 2"]  # read by itself
    parts = [data, *data.split(0.2)]
    found = []
    for part in parts:
        batches = list(StreamBatchLoader(part, 64, num_workers=workers))
        assert sum(len(batch["n"]) for batch in batches) == part.rows
        found.append(
            flat(
                zip(b["n"].tolist(), b["text"], b["tag"], strict=True) for b in batches
            )
        )
    assert sorted(found[0]) == sorted(found[1] + found[2]) == rows
    clean = write_rows(tmp_path / f"clean-{name}", rows, {})
    if name.endswith("gz"):  # one block: the same order, as if they were not there
        options["shuffle"] = True
        wanted = StreamBatchLoader(StreamingTextDataset(clean, **options), 64)
        assert flat(b["text"] for b in wanted) == [text for _, text, _ in found[0]]
        digest = data.order_digest()
        write_rows(path, rows, {**places, 0: [], 5: bad[:1]})  # as many others
        data = StreamingTextDataset(path, **options)
        data.drop_unreadable()
        assert data.rows == 900
        assert data.order_digest() != digest


def test_a_quote_that_is_not_closed_leaves_the_rows_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 3000)
    lines = [f"{n},text {n},x" for n in range(900)]
    lines.insert(450, '7,"5 pipe,x')
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["n,text,tag", *lines, ""]))
    data = StreamingTextDataset(path, on_error="skip")
    assert data.rows == 451  # the rest of the file is one row
    assert list(data) == [f"text {n}" for n in range(450)]
    (line,) = data.skipped
    assert re.search(r"last 451 lines: the row at byte \d+ does .* \(1 row\)$", line)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "inner.csv", "t.jsonl"])
def test_what_is_too_long_to_be_a_row_is_not_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 3000)
    monkeypatch.setattr("templates.data_optimizer._MOST_ROW_BYTES", 9000)
    lines = ["n,text", *(f"{n},text {n}" for n in range(3000))]
    lines.insert(1001, '7,"5 pipe')
    if name == "inner.csv":  # quotes are looked at column by column
        lines.insert(10, '7,5" wide')
    if name == "t.jsonl":
        lines = [json.dumps({"text": f"text {n}"}) for n in range(1000)] + ["x" * 20000]
    path = tmp_path / name
    data = "\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    begin = data.index(b'7,"5' if "csv" in name else b"xxx")
    told = rf"{name}.*: the row at byte {begin} does not end, neither in .*close each"
    with pytest.raises(DataError, match=told):
        StreamingTextDataset(path)
    largest, cut = [0], _LineSource._parse_rows

    def watch(self, file, data, *rest):
        largest[0] = max(largest[0], len(data))
        return cut(self, file, data, *rest)

    monkeypatch.setattr(_LineSource, "_parse_rows", watch)
    if name in ("t.csv.gz", "inner.csv"):  # read from its begin: left out as a whole
        (tmp_path / "good.csv").write_text("n,text\n1,good\n")
        rest = StreamingTextDataset([path, tmp_path / "good.csv"], on_error="skip")
        assert list(rest) == ["good"]
    else:
        rest = StreamingTextDataset(path, on_error="skip")
        assert list(rest) == [f"text {n}" for n in range(1000)]
    assert re.search(told, *rest.skipped)
    assert largest[0] < 9000


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "inner.csv"])
@pytest.mark.parametrize("after", [0, 1, 500])  # lines in the row that does not end
def test_a_quote_that_is_open_where_the_file_ends_is_told(tmp_path, name, after):
    lines = ["n,text", *(f"{n},text {n}" for n in range(1000))]
    if name == "inner.csv":
        lines.insert(10, '7,5" wide')
    good = len(lines) - 1
    lines += ['7,"5 pipe', *(f"{n},more" for n in range(after))]
    path, data = tmp_path / name, "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    begin = data.index(b'7,"5 pipe')
    told = rf"{name}.*: the row at byte {begin} does not end"
    with pytest.raises(DataError, match=told):
        StreamingTextDataset(path)
    rest = StreamingTextDataset(path, on_error="skip")
    assert len(list(rest)) == good
    (line,) = rest.skipped
    assert re.search(told, line)
    assert line.endswith("(1 row)")
    assert (f"its last {after:,} lines" in line) == (after > 1)


def test_carriage_returns_end_rows_only_before_newlines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"id,text\r1,a\r2,b\r")
    with pytest.raises(DataError, match=r"t\.csv: its lines end with \\r alone: write"):
        StreamingTextDataset(path)
    path.write_bytes(b"text\na\nb\rc\nd\n")
    with pytest.raises(DataError, match=r"t\.csv has 1 row more .* texts with a \\r"):
        list(StreamingTextDataset(path))
    data = StreamingTextDataset(path, on_error="skip")
    assert list(data) == ["a", "d"]
    assert data.skipped[0].endswith("the row at byte 7: it holds 2 rows (1 row)")
    path.write_bytes(b'text\na\n"b\rc"\nd\n')
    assert list(StreamingTextDataset(path)) == ["a", "b\rc", "d"]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("block", [50, 700, 1 << 22])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_quotes_within_text_are_text(tmp_path, monkeypatch, name, block, on_error):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", block)
    draw = random.Random(block)
    path = tmp_path / name
    tab = "\t" if ".tsv" in name else ","
    cells = [
        '5" disk',
        'a "b"',
        ' "c',
        'd""',
        '"e"f"g',
        f'"i{tab}\n""j"',
        "",
        "k",
    ]
    for bom, end in [("", "\n"), ("\ufeff", "\r\n"), ("", "\n\n")]:
        rows = [tab.join(map(str, [i, *draw.choices(cells, k=2)])) for i in range(200)]
        text = bom + end.join([f'"n"{tab}text{tab}"other"', *rows, ""])
        packed = gzip.open if name.endswith(".gz") else open
        with packed(path, "wb") as file:
            file.write(text.encode())
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=tab)
        wanted = [row[1] for row in reader if row][1:]
        data = StreamingTextDataset(path, on_error=on_error)
        assert data.rows == len(wanted)
        assert list(data) == wanted
        assert data.skipped == []


def test_files_of_nothing_but_bad_lines_are_given_up_soon(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good"}\n' + "{]\n" * 20_000)
    parses = []
    parse = _LineSource._parse

    def count(*values, **options):
        parses.append(1)
        return parse(*values, **options)

    monkeypatch.setattr(_LineSource, "_parse", count)
    data = StreamingTextDataset(path, on_error="skip")
    data.drop_unreadable()
    assert list(data) == ["good"]
    assert lost_rows(data.skipped[0]) == 20_000
    path.write_text("{]\n" * 20_000)
    parses.clear()
    with pytest.raises(DataError, match="none of 1 files can be read"):
        StreamingTextDataset(path, on_error="skip")
    assert len(parses) < 5000
    blank = tmp_path / "blank.csv"
    blank.write_text("\n\r\n")
    with pytest.raises(DataError, match=r"none of 1 files can be read.*blank\.csv"):
        StreamingTextDataset(blank, on_error="skip")


def test_rows_of_parquet_that_fit_no_tensor_are_left_out_one_by_one(tmp_path):
    write(tmp_path / "a.parquet", id=pa.array([*range(50), None, *range(50, 99), None]))
    data = stream(tmp_path, on_error="skip", shuffle=False)
    assert flat(ids(StreamBatchLoader(data, 32))) == list(range(99))
    (line,) = data.skipped
    assert re.search(r"'id' .* has nulls.*row 50 of .*, row group 0 \(2 rows\)$", line)
    data.drop_unreadable()
    assert data.rows == 99
    assert flat(ids(StreamBatchLoader(data, 33))) == list(range(99))


def test_rows_without_a_required_value(tmp_path):
    path = tmp_path / "t.jsonl"
    texts = ["a", None, "", "b"]
    path.write_text("".join(json.dumps({"text": t, "n": 1.0}) + "\n" for t in texts))
    data = StreamingTextDataset(path, columns=["n"], on_error="skip")
    data.drop_unreadable(["text", "n"])
    assert list(data) == ["a", "b"]
    assert data.skipped == [f"column 'text' of {path} is empty (2 rows)"]
    data = StreamingTextDataset(path, columns=["n"])
    data.drop_unreadable(["text"])
    for read in (lambda: list(data), lambda: list(StreamBatchLoader(data, 2))):
        with pytest.raises(DataError, match=r"'text' of .*t\.jsonl has nulls: fill"):
            read()
    write(tmp_path / "a.parquet", y=[0.5, float("nan"), None, 2.0, float("inf")])
    data = StreamingParquetDataset(tmp_path / "a.parquet", on_error="skip")
    data.drop_unreadable(["y"])
    assert [row["y"] for row in data] == [0.5, 2.0]
    assert data.skipped[0].endswith("a.parquet is empty or not finite (3 rows)")
    (tmp_path / "head.csv").write_text("text\n")
    data = StreamingTextDataset(tmp_path / "head.csv", on_error="skip")
    data.drop_unreadable()  # nothing is lost where nothing is
    assert (data.rows, data.skipped) == (0, [])


def test_a_key_that_nobody_asked_for_may_change_its_type(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"text": "a", "other": 5}, {"text": "b", "other": "x"}, {"text": "c"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(StreamingTextDataset(path)) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"other.*changed"):
        StreamingTextDataset(path, columns=["other"])


@pytest.mark.parametrize("bad", ['"text": 5', '"text": {"a": 1}', '"n": true', "]"])
@pytest.mark.parametrize("place", [0, 3, 19])
def test_types_of_jsonl_are_those_of_most_rows(bad, place, tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": f"t{i}", "n": i / 2}) for i in range(20)]
    lines[:0] = ["[1, 2]"]
    lines.insert(place, "{" + bad + "}")
    path.write_text("\n".join(lines))
    data = StreamingTextDataset(path, columns=["n"], on_error="skip")
    data.drop_unreadable()
    (batch,) = StreamBatchLoader(data, 20)
    assert batch["text"] == [f"t{i}" for i in range(20)]
    assert batch["n"].tolist() == [i / 2 for i in range(20)]
    assert sum(map(lost_rows, data.skipped)) == 2
    with pytest.raises(DataError, match=r"t\.jsonl: JSON parse error"):
        StreamingTextDataset(path, columns=["n"])


@pytest.mark.parametrize("workers", [0, 2])
def test_without_the_unreadable_all_batches_are_whole(tmp_path, shards, workers):
    broken = corrupt(shards / "0.parquet", tmp_path / "broken.parquet")
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1")
    files = [broken, torn, shards / "1.parquet", shards / "3.parquet"]
    data = stream(files, on_error="skip", fill_null={"x": 0.0})
    before = data.rows
    data.drop_unreadable()
    assert str(torn) in data.skipped[0]
    lost = sum(lost_rows(line) for line in data.skipped[1:])
    assert 0 < lost == before - data.rows
    said = list(data.skipped)
    for part in (data, *data.split(0.3)):
        batches = list(StreamBatchLoader(part, 64, num_workers=workers))
        sizes = [len(batch["id"]) for batch in batches]
        assert sum(sizes) == part.rows
        assert min(sizes[:-2]) == 64
    assert data.skipped == said
    unskipped = stream(files[2:])
    unskipped.drop_unreadable()  # nothing to do
    with pytest.raises(
        DataError, match=r"no rows can be read, such as: .*all\.parquet"
    ):
        stream([all_broken(shards, tmp_path)], on_error="skip").drop_unreadable()


def all_broken(shards, tmp_path):
    """A file whose rows cannot be read, in one row group, while its footer can."""
    path = tmp_path / "all.parquet"
    pq.write_table(pq.read_table(shards / "0.parquet"), path)
    return corrupt(path, path)


def test_rows_without_a_file_that_cannot_be_read_are_those_of_the_others(
    tmp_path, shards
):
    bad, good = all_broken(shards, tmp_path), [shards / f"{i}.parquet" for i in (1, 3)]
    with_bad = stream([good[0], bad, good[1]], on_error="skip")
    with_bad.drop_unreadable()
    without = stream(good)
    assert with_bad.rows == without.rows
    pairs = zip(with_bad.split(0.2), without.split(0.2), strict=True)
    for ours, wanted in [(with_bad, without), *pairs]:
        assert ids(StreamBatchLoader(ours, 64)) == ids(StreamBatchLoader(wanted, 64))
    state = StreamBatchLoader(with_bad, 64).state_dict()
    with pytest.raises(DataError, match="another order"):
        StreamBatchLoader(stream([*good, bad]), 64).load_state_dict(state)


def test_damage_that_only_checksums_show_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    values = np.random.default_rng(0).random(10_000)
    options = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"x": values}), path, **options, write_page_checksum=True)
    corrupt(path, path)
    with pytest.raises(DataError, match=r"a\.parquet, row group 0.*CRC"):
        list(StreamBatchLoader(stream(path), 64))


def test_texts_of_a_folder_of_parquet_are_streamed(tmp_path):
    write(tmp_path / "a.parquet", text=["one"], label=["x"])
    rows = open_text_stream(str(tmp_path), ("text", "label"), 0)
    assert [row["text"] for row in rows] == ["one"]
    (tmp_path / "t.csv").write_text("text,label\ntwo,y\n")
    with pytest.raises(DataError, match="Parquet and text files: choose by a glob"):
        open_text_stream(str(tmp_path), ("text", "label"), 0)
    glob = str(tmp_path / "*.csv")
    assert list(open_text_stream(glob, ("text", "label"), 0)) == ["two"]


def test_a_file_that_is_written_anew_is_noticed(tmp_path):
    path = write(tmp_path / "a.parquet", id=list(range(100)))
    changes = [(99, "1 row less"), (101, "1 row more"), (300, "200 rows more")]
    for rows, change in changes:
        data = stream(path)
        write(tmp_path / "a.parquet", id=list(range(rows)))
        with pytest.raises(DataError, match=rf"a\.parquet has {change}"):
            list(StreamBatchLoader(data, 10))
        write(tmp_path / "a.parquet", id=list(range(100)))


def test_text_in_another_encoding_says_what_helps(tmp_path):
    for name, line in (
        ("t.jsonl", '{"text": "caf\xe9"}\n'),
        ("t.csv", "text\ncaf\xe9\n"),
    ):
        path = tmp_path / name
        path.write_text(line, encoding="cp1252")
        with pytest.raises(DataError, match=rf"{name}.*encoding that it has"):
            list(StreamingTextDataset(path))
        assert list(StreamingTextDataset(path, encoding="cp1252")) == ["caf\xe9"]


def test_a_filter_by_a_column_that_is_not_there_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", id=[1, 2])
    with pytest.raises(DataError, match=r"(?s)idd.*columns in filters"):
        stream(path, filters=[("idd", ">", 1)])


def test_missing_embeddings_and_elements_are_filled(tmp_path):
    kind = pa.list_(pa.float32(), 2)
    rows = [[1, 2], None, [3, None], [5, 6]]
    pq.write_table(pa.table({"emb": pa.array(rows, kind)}), tmp_path / "a.parquet")
    data = stream(tmp_path / "a.parquet", shuffle=False)
    with pytest.raises(DataError, match=r"'emb'.*fill_null"):
        list(StreamBatchLoader(data, 4))
    data = stream(tmp_path / "a.parquet", shuffle=False, fill_null={"emb": 0})
    (batch,) = StreamBatchLoader(data, 4)
    assert batch["emb"].tolist() == [[1, 2], [0, 0], [3, 0], [5, 6]]


def test_list_data_files_passes_over_hidden_files(tmp_path):
    for name in ("b.parquet", "a.parquet", ".hidden.parquet", "_tmp/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    _, files = _list_data_files(tmp_path, (".parquet",), None)
    assert [f.rpartition("/")[2] for f in files] == ["a.parquet", "b.parquet"]


def test_many_small_files_are_not_all_open_at_once(tmp_path, monkeypatch):
    for i in range(60):
        write(tmp_path / f"{i:02d}.parquet", id=[i])
    open_files = []
    real = pq.ParquetFile.__init__

    def count_open(self, *args, **options):
        real(self, *args, **options)
        open_files.append(len(os.listdir("/proc/self/fd")))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc on this system")
    data = StreamingParquetDataset(tmp_path, shuffle=True)
    monkeypatch.setattr(pq.ParquetFile, "__init__", count_open)
    before = len(os.listdir("/proc/self/fd"))
    (batch,) = StreamBatchLoader(data, 60)
    assert sorted(batch["id"].tolist()) == list(range(60))
    assert max(open_files) < before + 20


def test_gzip_of_python_is_read_too(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"text": "a"}\n{"text": null}\n')
    assert list(StreamingTextDataset(path)) == ["a", None]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("quote_char", [None, ""])
def test_without_a_quote_char_quotes_are_plain_letters(name, quote_char, tmp_path):
    path = tmp_path / name
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write('text\n5" pipe\nbolt\n')
    texts = list(StreamingTextDataset(path, quote_char=quote_char))
    assert texts == ['5" pipe', "bolt"]


# --- processes and object stores

RANK_SCRIPT = """
import json, sys
import torch.distributed as dist
from templates.data_optimizer import StreamBatchLoader, StreamingParquetDataset

dist.init_process_group("gloo")
data = StreamingParquetDataset(sys.argv[1], shuffle=True, window_rows=256)
loader = StreamBatchLoader(data, 48, num_workers=dist.get_rank() % 2)
loader.set_epoch(1, start=3)
batches = [batch["id"].tolist() for batch in loader]
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, batches)
if dist.get_rank() == 0:
    print("RESULT", json.dumps(everyone))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_torchrun_ranks_share_the_batches(tmp_path, shards, ranks):
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(script), str(shards)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    everyone = json.loads(line.removeprefix("RESULT"))
    whole = StreamBatchLoader(stream(shards), 48)
    whole.set_epoch(1, start=3)
    joined = [sorted(flat(shares)) for shares in zip(*everyone, strict=True)]
    assert joined == [sorted(batch) for batch in ids(whole)]


def test_streams_from_s3(shards):
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3 = fs.S3FileSystem(
            access_key="a",
            secret_key="b",
            endpoint_override=f"http://{host}:{port}",
            allow_bucket_creation=True,
        )
        s3.create_dir("bucket/data")
        for file in shards.glob("*.parquet"):
            with s3.open_output_stream(f"bucket/data/{file.name}") as target:
                target.write(file.read_bytes())
        with s3.open_output_stream("bucket/t.csv") as target:
            target.write(b"text\none\ntwo\n")
        local = ids(StreamBatchLoader(stream(shards), 64))
        for workers in (0, 2):
            remote = stream("bucket/data", filesystem=s3)
            loader = StreamBatchLoader(remote, 64, num_workers=workers)
            assert ids(loader) == local
        assert len(list(stream("bucket/data/*.parquet", filesystem=s3))) == ROWS
        texts = StreamingTextDataset("bucket/t.csv", filesystem=s3)
        assert list(texts) == ["one", "two"]
    finally:
        server.stop()


def test_memory_does_not_grow_with_the_file_or_over_epochs(tmp_path):
    smaps = Path("/proc/self/smaps_rollup")
    if not smaps.exists():
        pytest.skip("no smaps_rollup on this system")
    path = tmp_path / "big.parquet"
    values = np.arange(3 << 20) // 64 % 1000 / 7  # compresses to a few MB
    table = {f"c{i}": values for i in range(16)}
    pq.write_table(pa.table(table), path, row_group_size=len(values))
    del table
    loader = StreamBatchLoader(StreamingParquetDataset(path, shuffle=True), 1024)

    def private_mb():
        lines = smaps.read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if "Pss_Anon" in x) / 1024

    # The row group is 400 MB: kept whole, or a quarter of what three epochs read,
    # it would break the bound. Pages that an allocator has yet to give back count
    # in private_mb, and vary with the load; what Arrow holds does not.
    before, held = private_mb(), []
    for _ in range(3):
        held.append(0)
        for k, _ in enumerate(loader):
            if k % 64 == 0:
                assert private_mb() - before < 300
                held[-1] = max(held[-1], pa.total_allocated_bytes() / 2**20)
    assert max(held) < 60
    assert held[2] < held[0] + 20


def test_an_epoch_left_early_does_not_leak_into_the_next(shards):
    whole = ids(StreamBatchLoader(stream(shards), 64))
    loader = StreamBatchLoader(stream(shards), 64, num_workers=2)
    for stop in (1, 9):
        for k, _ in enumerate(loader):
            if k == stop:
                break
        loader.set_epoch(0)
        assert ids(loader) == whole
        loader.set_epoch(0)


@pytest.mark.parametrize("odd", [None, '"b\nc"', '"b\rc"', '5" disk', "g" * 500])
@pytest.mark.parametrize("stream", [128, 4096])
def test_csv_parsed_as_a_stream_agrees_with_the_csv_module(
    tmp_path, monkeypatch, stream, odd
):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", 2000)
    monkeypatch.setattr("templates.data_optimizer._CACHE_BYTES", stream)
    draw = random.Random(stream)
    path = tmp_path / "t.csv"
    for end in ["", "\n", "\n\n"]:
        cells = ["a", '"b, c"', '"d""e"', "f" * 30, '""', '"한국어"', ""]
        rows = [f"{i},{draw.choice(cells)},{draw.choice(cells)}" for i in range(300)]
        if odd:
            rows[draw.randrange(300)] = f"0,{odd},"
        path.write_bytes(("\n".join(["id,text,other", *rows]) + end).encode())
        with open(path, newline="") as file:
            wanted = [row[1] for row in csv.reader(file) if row][1:]
        data = StreamingTextDataset(path)
        assert bool(data.source.plain) == (odd is None or "g" in odd)
        assert list(data) == wanted
        if odd is None:
            assert data.source.plain
        elif len(odd) > stream:  # found where it is parsed
            assert not data.source.plain


def test_tasks_that_wait_for_others_keep_no_thread():
    gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = _submit_after(None, pool, gate.wait)
        second = _submit_after(first, pool, lambda: first.done())
        try:
            assert _submit_after(None, pool, lambda: 3).result(timeout=60) == 3
        finally:
            gate.set()  # or the pool would wait for ever
        failed = _submit_after(second, pool, lambda: 1 / 0)
        last = _submit_after(failed, pool, lambda: 4)
        assert last.result(timeout=60) == 4
        assert second.result()
        with pytest.raises(ZeroDivisionError):
            failed.result()


@pytest.mark.parametrize("block", [7, 64, 500])
def test_cutting_lines_agrees_with_the_csv_module(tmp_path, monkeypatch, block):
    monkeypatch.setattr("templates.data_optimizer._LINE_BLOCK_BYTES", block)
    draw = random.Random(block)
    path = tmp_path / "t.csv"
    for turn in range(40):
        cells = ["a", '"b\nc"', '"d""\r\n\n""e"', '"\n"', "f" * 30, '""']
        rows = [f"{i},{draw.choice(cells)}" for i in range(draw.randrange(30))]
        end = draw.choice(["\n", "\r\n", "\n\n", "\n\r\n"])
        text = end.join(["id,text", *rows]) + draw.choice(["", end])
        path.write_bytes(text.encode())
        with open(path, newline="") as file:
            wanted = [row[1] for row in csv.reader(file) if row][1:]
        data = StreamingTextDataset(path)
        assert data.rows == len(wanted), (turn, text)
        assert list(data) == wanted


@pytest.mark.parametrize(
    "changed", [{"seed": 8}, {"shuffle": False}, {"window_rows": 77}]
)
def test_a_state_of_another_order_is_refused(shards, changed):
    state = StreamBatchLoader(stream(shards), 64).state_dict()
    StreamBatchLoader(stream(shards), 8).load_state_dict(state)
    with pytest.raises(DataError, match="rows in another order: seed, shuffle"):
        StreamBatchLoader(stream(shards, **changed), 64).load_state_dict(state)


def test_a_state_of_other_files_is_refused(tmp_path):
    pq.write_table(pa.table({"id": range(100)}), tmp_path / "a.parquet")
    state = StreamBatchLoader(StreamingParquetDataset(tmp_path), 8).state_dict()
    pq.write_table(pa.table({"id": range(10)}), tmp_path / "b.parquet")
    more = StreamBatchLoader(StreamingParquetDataset(tmp_path), 8)
    with pytest.raises(DataError, match="the files' rows must be as they were"):
        more.load_state_dict(state)


def test_several_processes_without_a_process_group_are_refused(shards, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"init_process_group\(\) first, or pass rank"
    ):
        StreamingParquetDataset(shards)
    assert StreamingParquetDataset(shards, rank=1, world_size=2).rank == 1


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"h": ["xx"]}, "no column 'xx' for stack 'h': there are "),
        ({"id": ["x"]}, "with a name that no column has"),
        ({"h": []}, "must be a list of columns"),
        ({"h": "x"}, "must be a list of columns"),
        ({"h": ["x"], "i": ["x"]}, "column 'x' is in stacks twice"),
    ],
)
def test_stacks_that_cannot_be(shards, stack, message):
    stream = StreamingParquetDataset(shards, columns=["id", "x"])
    with pytest.raises(DataError, match=message):
        StreamBatchLoader(stream, 8, stack=stack)


def test_settings_of_unknown_columns_are_refused(shards):
    with pytest.raises(DataError, match="no column 'lable' to fill_null"):
        StreamingParquetDataset(shards, fill_null={"lable": 0})
    with pytest.raises(DataError, match="no column 'lable' in "):
        StreamingParquetDataset(shards, column_types={"lable": "int64"})
    with pytest.raises(ValueError, match="-5 in window_rows"):
        StreamingParquetDataset(shards, window_rows=-5)


def test_a_key_that_no_json_row_has_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "one"}\n{"txt": null, "n": 1}\n')
    with pytest.raises(DataError, match=r"no column 'text' in .*: it has txt, n"):
        StreamingTextDataset(tmp_path / "a.jsonl")
    data = StreamingTextDataset(tmp_path / "a.jsonl", text_column="txt")
    assert list(data) == ["one", None]


def test_a_skipped_first_file_decides_nothing(tmp_path):
    pq.write_table(pa.table({"id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [2], "x": [0.5]}), tmp_path / "b.parquet")
    data = StreamingParquetDataset(tmp_path, columns=["id", "x"], on_error="skip")
    assert list(data) == [{"id": 2, "x": 0.5}]
    assert len(data.skipped) == 1
