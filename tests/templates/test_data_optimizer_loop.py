"""What training loops need: splits, labels, collate functions, empty shares."""

import gc
import os
import threading
import weakref
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from templates.data_optimizer import (
    DataError,
    LazyImageDataset,
    ResumableBatchSampler,
    StreamBatchLoader,
    StreamingParquetDataset,
    StreamingTextDataset,
    collate_images,
    create_optimized_dataloader,
    describe_skipped,
    make_loaders,
    move_batches,
)

CPU = torch.device("cpu")
SHARDS = (700, 0, 1, 333, 64)
ROWS = sum(SHARDS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    start = 0
    for i, rows in enumerate(SHARDS):
        ids = np.arange(start, start + rows)
        columns = {
            "id": ids,
            "label": ids * 4 // ROWS,
            "text": [f"row {j}" for j in ids],
        }
        pq.write_table(pa.table(columns), folder / f"{i}.parquet", row_group_size=100)
        start += rows
    return folder


def stream(shards, **options):
    return StreamingParquetDataset(
        shards, **{"shuffle": True, "window_rows": 256, **options}
    )


def all_ids(data, batch_size=64, workers=0):
    loader = StreamBatchLoader(data, batch_size, num_workers=workers)
    return [row for batch in loader for row in batch["id"].tolist()]


# --- splits


@pytest.mark.parametrize("fraction", [0.0005, 0.1, 1 / 3, 0.5, 0.93, 0.9995])
def test_a_split_has_every_row_in_one_part(shards, fraction):
    train, val = stream(shards).split(fraction, seed=3)
    assert val.rows == round(ROWS * fraction)
    assert train.rows == ROWS - val.rows
    drawn = all_ids(val)
    assert drawn == sorted(drawn), "validation keeps the order of the files"
    assert len(drawn) == val.rows
    assert sorted([*drawn, *all_ids(train)]) == list(range(ROWS))


@pytest.mark.parametrize("part", [0, 1])
def test_a_split_does_not_depend_on_ranks_workers_or_windows(shards, part):
    whole = sorted(all_ids(stream(shards).split(0.2, 1)[part]))
    assert whole != sorted(all_ids(stream(shards).split(0.2, 2)[part]))
    for workers in (0, 2):
        seen = []
        for rank in range(2):
            data = stream(shards, rank=rank, world_size=2, window_rows=100)
            seen += all_ids(data.split(0.2, 1)[part], workers=workers)
        assert sorted(seen) == whole
    rows = [row["id"] for row in stream(shards).split(0.2, 1)[part]]
    assert sorted(rows) == whole


def test_a_split_reads_nothing_and_resumes(shards, monkeypatch):
    train, _ = stream(shards).split(0.1)
    whole = [batch["id"].tolist() for batch in StreamBatchLoader(train, 64)]
    loader = StreamBatchLoader(train, 64)
    loader.set_epoch(0, start=9)
    assert [batch["id"].tolist() for batch in loader] == whole[9:]
    data = stream(shards)
    monkeypatch.setattr(type(data.source), "_read_raw", None)
    for part in data.split(0.1):
        assert len(StreamBatchLoader(part, 64)) > 0


def test_every_row_is_drawn_equally_often_and_sorted_labels_evenly(shards):
    drawn = np.zeros(ROWS)
    for seed in range(200):
        _, val = stream(shards).split(0.1, seed)
        rows = all_ids(val, 256)
        drawn[rows] += 1
        # The labels are sorted: a split by files would miss some of them.
        counts = np.bincount(np.array(rows) * 4 // ROWS)
        assert counts.max() - counts.min() <= 2
    # Binomial(200, 0.1): mean 20, standard deviation 4.2.
    assert abs(drawn.mean() - 20) < 0.1
    assert abs(drawn.std() - 4.24) < 0.5
    assert drawn.min() > 3
    # Neighbours in other cells are drawn independently of each other.
    odd, even = drawn[0:-21:21], drawn[20:-1:21]
    assert abs(np.corrcoef(odd, even)[0, 1]) < 0.45


def test_split_counts_rows_beyond_64_bit_products(shards):
    from templates.data_optimizer import _SplitSource

    rows = [3 * 10**9, 1, 0, 7 * 10**9]
    source = stream(shards).source
    source.block_rows = np.array(rows)
    count = 10**9
    val = _SplitSource(source, count, 0, drawn=True)
    train = _SplitSource(source, count, 0, drawn=False)
    assert val.block_rows.sum() == count
    assert (val.block_rows + train.block_rows == rows).all()
    assert abs(val.block_rows[0] - 3 * 10**8) <= 1


def test_splits_of_splits_text_and_filters(shards, tmp_path):
    rest, test = stream(shards).split(0.2, 0)
    train, val = rest.split(0.25, 0)
    parts = [all_ids(part) for part in (train, val, test)]
    assert sorted(row for part in parts for row in part) == list(range(ROWS))
    train, val = stream(shards, filters=[("id", "<", 500)]).split(0.1, 0)
    assert sorted(all_ids(train) + all_ids(val)) == list(range(500))
    path = tmp_path / "t.csv"
    path.write_text("text\n" + "".join(f"t{i}\n" for i in range(100)))
    train, val = StreamingTextDataset(path).split(0.1, 0)
    assert len(list(val)) == 10
    assert sorted([*train, *val]) == sorted(f"t{i}" for i in range(100))


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.9999, 1.0])
def test_a_split_refuses_an_empty_part(shards, fraction):
    with pytest.raises(DataError, match=rf"of {ROWS} rows.*val_fraction"):
        stream(shards).split(fraction)


# --- labels


def test_unique_gives_sorted_values_of_any_part(shards, tmp_path):
    data = stream(shards)
    assert data.unique("label") == [0, 1, 2, 3]
    assert data.split(0.1)[1].unique("label") == [0, 1, 2, 3]
    assert len(data.unique("text")) == ROWS
    with pytest.raises(DataError, match="'text' has more than 100 distinct values"):
        data.unique("text", limit=100)
    with pytest.raises(DataError, match=r"no column 'y'.*id, label, text"):
        data.unique("y")
    path = tmp_path / "t.parquet"
    table = {"kind": pa.array(["b", "a", "b"]).dictionary_encode(), "gap": [1, None, 2]}
    pq.write_table(pa.table(table), path)
    data = StreamingParquetDataset(path)
    assert data.unique("kind") == ["a", "b"]
    with pytest.raises(DataError, match=r"'gap' of .*t\.parquet has nulls"):
        data.unique("gap")
    csv = tmp_path / "t.csv"
    csv.write_text("text,label\nx,b\ny,a\nz,b\n")
    assert StreamingTextDataset(csv, columns=["label"]).unique("label") == ["a", "b"]


# --- collate functions


def tokenize(batch):
    """What a script does with text: numbers of the letters, padded."""
    width = max((len(text) for text in batch["text"]), default=0)
    rows = [[*map(ord, text), *[0] * (width - len(text))] for text in batch["text"]]
    tokens = torch.tensor(rows, dtype=torch.int64).view(len(rows), width)
    where = torch.tensor([os.getpid(), threading.get_ident() & 0xFFFFFFFF])
    return {"tokens": tokens, "where": where}, batch["id"]


@pytest.mark.parametrize("workers", [0, 2])
def test_collate_runs_elsewhere_in_the_same_order_and_resumes(shards, workers):
    wanted = [tokenize(b) for b in StreamBatchLoader(stream(shards), 64)]
    loader = StreamBatchLoader(
        stream(shards), 64, num_workers=workers, collate_fn=tokenize
    )
    assert len(loader) == len(wanted)

    def check(batches, expected):
        for (inputs, ids), (tokens, rows) in zip(batches, expected, strict=True):
            assert torch.equal(inputs["tokens"], tokens["tokens"])
            assert torch.equal(ids, rows)
            assert inputs["where"].tolist() != wanted[0][0]["where"].tolist()

    check(loader, wanted)
    loader.set_epoch(0, start=5)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()  # the batches made ahead do not count
    assert state["epoch"] == 0
    del iterator
    again = StreamBatchLoader(
        stream(shards), 64, num_workers=workers, collate_fn=tokenize
    )
    again.load_state_dict(state)
    check(again, wanted[6:])
    loader.set_epoch(0, start=17)
    check(loader, wanted[17:])
    loader.set_epoch(0)
    check(loader, wanted)


def fail(batch):
    raise DataError("row 3: no text: give it one")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_collate_arrives_in_one_line(shards, workers):
    def first_batch():
        data = stream(shards)
        loader = StreamBatchLoader(data, 64, num_workers=workers, collate_fn=fail)
        if workers:
            watched.append(weakref.ref(iter(loader._workers)))
        try:
            return next(iter(loader))
        except DataError as error:
            return str(error)

    watched = []
    gc.disable()
    try:
        assert first_batch() == "row 3: no text: give it one"
        # Workers that the garbage collector finds in a cycle take ten seconds to end.
        assert [ref() for ref in watched] == [None] * workers
    finally:
        gc.enable()


def test_collate_gets_empty_shares_of_tiny_data(shards):
    for workers in (0, 1):
        data = stream([shards / "2.parquet"], rank=0, world_size=2)
        loader = StreamBatchLoader(data, 8, num_workers=workers, collate_fn=tokenize)
        ((inputs, ids),) = loader
        assert inputs["tokens"].shape == (0, 0)
        assert ids.shape == (0,)


# --- shares without a sample


@pytest.fixture
def images(tmp_path):
    """Ten images; those of the numbers 2 to 5 cannot be read."""
    paths = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
        if 2 <= i < 6:
            path.write_bytes(b"")
        paths.append(str(path))
    return LazyImageDataset(
        paths, labels=range(10), size=4, on_error="skip", report=lambda line: None
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_batch_of_unreadable_images_is_replaced(images, workers):
    def labels(data, sampler):
        loader = create_optimized_dataloader(
            data,
            2,
            CPU,
            num_workers=workers,
            batch_sampler=sampler,
            collate_fn=collate_images,
        )
        batches = list(move_batches(loader, CPU))
        assert all(torch.equal(x[:, 0, 0, 0], y.to(torch.uint8)) for x, y in batches)
        return [y.tolist() for _, y in batches]

    sampler = ResumableBatchSampler(10, 2, shuffle=False)
    # As many steps as without: a skipped batch would shift resume and hang ranks.
    assert labels(images, sampler) == [[0, 1], [0, 1], [0, 1], [6, 7], [8, 9]]
    rows = [3, 4, 7, 8]  # the replacement comes from the same part of the data
    sampler = ResumableBatchSampler(4, 2, shuffle=False)
    assert labels(Subset(images, rows), sampler) == [[7, 8], [7, 8]]
    sampler = ResumableBatchSampler(10, 4, shuffle=False)
    assert labels(images, sampler) == [[0, 1], [6, 7], [8, 9]]
    with pytest.raises(DataError, match="none of the 2 samples can be read"):
        labels(Subset(images, [3, 4]), ResumableBatchSampler(2, 2))


@pytest.mark.parametrize("length", [1, 3, 9])
def test_evaluation_of_few_rows_gives_empty_shares(images, length):
    seen = []
    for rank in range(8):
        sampler = ResumableBatchSampler(
            length, 4, shuffle=False, rank=rank, world_size=8, allow_empty=True
        )
        loader = create_optimized_dataloader(
            Subset(images, range(length)),
            4,
            CPU,
            num_workers=0,
            batch_sampler=sampler,
            collate_fn=collate_images,
        )
        shares = list(move_batches(loader, CPU))
        assert len(shares) == len(sampler) == -(-length // 4)
        for pixels, labels in shares:
            assert pixels.shape[1:] == (3, 4, 4)
            assert pixels.dtype == torch.uint8
            assert len(pixels) == len(labels)
            seen += labels.tolist()
    assert sorted(seen) == [i for i in range(length) if not 2 <= i < 6]


def test_augmentation_changes_by_epoch_and_is_for_training_alone(images):
    def noise(image, generator):
        return torch.randint(256, image.shape, generator=generator, dtype=torch.uint8)

    images.augment = noise
    images.drop_unreadable()
    train, val = images.split(0.5, seed=0)
    assert sorted([*train.labels, *val.labels]) == [0, 1, 6, 7, 8, 9]
    plain = [int(image[0, 0, 0]) for image, _ in val]
    assert plain == val.labels, "what is validated on is as it is in the file"

    def epochs(dataset, workers):
        loader, _ = make_loaders(dataset, val, 2, CPU, workers, 0, collate_images)
        seen = []
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            batches = [(y, x) for x, y in loader]
            rows = {int(n): x for y, xs in batches for n, x in zip(y, xs, strict=True)}
            seen.append(torch.stack([rows[n] for n in sorted(rows)]))
        assert torch.equal(seen[0], seen[2])
        assert not torch.equal(seen[0], seen[1])
        return torch.stack(seen)

    whole = epochs(train, 0)
    assert torch.equal(whole, epochs(train, 2))
    # The epoch reaches a dataset through Subsets, such as those of tests of a script.
    assert torch.equal(whole, epochs(Subset(Subset(train, range(3)), [2, 0, 1]), 0))
    # A part has the images as the whole has them.
    train.set_epoch(1)
    images.set_epoch(1)
    for number, image in zip(train.numbers, train, strict=True):
        assert torch.equal(image[0], images[images.numbers.index(number)][0])


def test_unreadable_images_are_dropped_before_a_split(images):
    digest = images.order_digest()
    images.drop_unreadable()
    assert images.labels == [0, 1, 6, 7, 8, 9]
    assert images.order_digest() != digest
    for part in images.split(0.5, seed=0):
        assert len(part.skipped) == 4
        assert all("cannot read image" in line for line in part.skipped)
    assert describe_skipped(Subset(images, [0])).startswith("\n4 left out")
    broken = LazyImageDataset(["none.png"], on_error="skip")
    with pytest.raises(DataError, match=r"no image can be read, such as: .*none\.png"):
        broken.drop_unreadable()
    strict = LazyImageDataset(["none.png"])
    strict.drop_unreadable()  # does nothing: it is named when it is asked for
    with pytest.raises(DataError, match="--on-error skip"):
        strict[0]


class Numbers(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"x": torch.tensor([index])}, index


def test_empty_shares_keep_the_structure_of_the_default_collate():
    sampler = ResumableBatchSampler(
        3, 3, shuffle=False, rank=0, world_size=8, allow_empty=True
    )
    loader = create_optimized_dataloader(
        Numbers(), 3, CPU, num_workers=0, batch_sampler=sampler
    )
    ((inputs, targets),) = move_batches(loader, CPU)
    assert inputs["x"].shape == (0, 1)
    assert targets.shape == (0,)
    assert targets.dtype == torch.int64


def test_move_batches_moves_what_is_nested():
    point = namedtuple("point", "x y")
    one = torch.ones(2)
    batch = [{"a": one, "b": (one, [one])}, point(one, "text")]
    ((inputs, target),) = move_batches([batch], torch.device("meta"))
    assert inputs["a"].device.type == "meta"
    assert inputs["b"][0].device.type == inputs["b"][1][0].device.type == "meta"
    assert isinstance(target, point)
    assert target.x.device.type == "meta"
    assert target.y == "text"
    ((moved, _),) = move_batches([(one, one)], CPU)
    assert moved is one
