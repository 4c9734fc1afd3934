"""templates/data_optimizer.py: sampler, images, factory (the streams: _stream)."""

import random
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from templates.data_optimizer import (
    DataError,
    LazyImageDataset,
    ResumableBatchSampler,
    StreamingParquetDataset,
    StreamingTextDataset,
    create_optimized_dataloader,
    seed_worker,
    skip_missing_collate,
)

CPU = torch.device("cpu")


# --- sampler


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_in_batches_that_are_never_short(length, shuffle):
    sampler = ResumableBatchSampler(length, 64, shuffle=shuffle)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(length))
    assert len(batches) == len(sampler) == -(-length // 64)
    assert all(len(batch) == 64 for batch in batches[:-2])
    if len(batches) > 1:
        assert all(32 <= len(batch) <= 64 for batch in batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("drop_last", [True, False])
def test_any_number_of_ranks_sees_the_same_global_batches(world_size, drop_last):
    def batches(rank, world):
        sampler = ResumableBatchSampler(
            1001, 32, 5, drop_last=drop_last, rank=rank, world_size=world
        )
        sampler.set_epoch(3)
        return list(sampler)

    whole = batches(0, 1)
    ranks = [batches(rank, world_size) for rank in range(world_size)]
    for shares in zip(*ranks, strict=True):  # strict: the same number of steps
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 1
    joined = [sum(shares, []) for shares in zip(*ranks, strict=True)]
    assert joined == whole
    assert len(whole) == (31 if drop_last else 32)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ResumableBatchSampler(100, 8, seed)
        sampler.set_epoch(epoch)
        return [i for batch in sampler for i in batch]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = order(0, 1)
    torch.manual_seed(1)
    assert order(0, 1) == first
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    torch.manual_seed(0)
    order(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_set_epoch_resumes_at_any_batch():
    sampler = ResumableBatchSampler(100, 8)
    sampler.set_epoch(2)
    whole = list(sampler)
    for start in range(len(whole) + 1):
        sampler.set_epoch(2, start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == len(whole)


def test_sampler_refuses_what_would_leave_a_rank_without_rows():
    with pytest.raises(ValueError, match="at least 16"):
        ResumableBatchSampler(21, 10, rank=0, world_size=8)
    ResumableBatchSampler(21, 16, rank=0, world_size=8)
    with pytest.raises(ValueError, match="rank=3"):
        ResumableBatchSampler(21, 10, rank=3, world_size=3)
    with pytest.raises(ValueError, match="together"):
        ResumableBatchSampler(21, 10, rank=3)
    with pytest.raises(ValueError, match="batch_size=0"):
        ResumableBatchSampler(21, 0)


# --- seeds and factory


class RandomRows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


class Count(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_seed_worker_repeats_python_and_numpy():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.manual_seed(3)
    draws = []
    for _ in range(2):
        seed_worker(0)
        draws.append((random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def test_factory_workers_are_seeded_by_the_loaders_own_generator():
    def epoch(seed):
        loader = create_optimized_dataloader(
            RandomRows(), 2, CPU, num_workers=2, seed=seed
        )
        return torch.cat(list(loader))

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    global_state = torch.get_rng_state()
    first = epoch(1)
    assert torch.equal(torch.get_rng_state(), global_state)
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert torch.equal(epoch(1), first)
    assert not torch.equal(epoch(2), first)
    assert len(first.unique()) == first.numel(), "two workers drew the same numbers"


def test_factory_takes_a_stream_with_its_default_shuffle():
    loader = create_optimized_dataloader(Count(), 4, CPU, num_workers=0)
    assert torch.cat(list(loader)).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("device", "cpus", "workers"),
    [("cpu", 1, 0), ("cpu", 2, 2), ("cuda", 64, 4), ("mps", 8, 0)],
)
def test_factory_options_follow_device_and_cpus(monkeypatch, device, cpus, workers):
    monkeypatch.setattr("templates.data_optimizer._usable_cpu_count", lambda: cpus)
    loader = create_optimized_dataloader(RandomRows(), 4, torch.device(device))
    assert loader.num_workers == workers
    assert loader.pin_memory == (device == "cuda")
    assert loader.persistent_workers == (workers > 0)
    assert loader.prefetch_factor == (2 if workers else None)


def test_factory_with_batch_sampler_shuffles_and_drops():
    sampler = ResumableBatchSampler(8, 3, seed=4)
    loader = create_optimized_dataloader(
        RandomRows(), 3, CPU, batch_sampler=sampler, num_workers=0
    )
    assert [len(batch) for batch in loader] == [3, 3, 2]
    dropped = create_optimized_dataloader(
        RandomRows(), 3, CPU, drop_last=True, num_workers=0
    )
    assert [len(batch) for batch in dropped] == [3, 3]


# --- images


def save(path, image, **options):
    image.save(path, **options)
    return str(path)


def gray16(path):
    image = Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16))
    return save(path, image)


def test_images_of_every_mode_arrive_as_rgb(tmp_path):
    red = Image.new("RGB", (4, 4), "red")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0] + [0] * 756)
    cases = {
        "rgb.png": (red, (255, 0, 0)),
        "cmyk.jpg": (red.convert("CMYK"), (254, 0, 0)),
        "l.png": (Image.new("L", (4, 4), 7), (7, 7, 7)),
        "bits.png": (Image.new("1", (4, 4), 1), (255, 255, 255)),
        "rgba.png": (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), (255, 255, 255)),
        "la.png": (Image.new("LA", (4, 4), (9, 255)), (9, 9, 9)),
        "p.png": (palette, (255, 0, 0)),
    }
    paths = [save(tmp_path / name, image) for name, (image, _) in cases.items()]
    expected = [colour for _, colour in cases.values()]
    clear = tmp_path / "clear.png"
    paths += [save(clear, palette, transparency=1), gray16(tmp_path / "16.png")]
    expected += [(255, 255, 255), (128, 128, 128)]
    for image, colour, path in zip(
        LazyImageDataset(paths), expected, paths, strict=True
    ):
        assert image.mode == "RGB", path
        assert np.abs(np.array(image)[0, 0].astype(int) - colour).max() <= 2, path


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    path = save(tmp_path / "turned.jpg", image, exif=exif)
    assert LazyImageDataset([path])[0].size == (4, 8)


def test_unreadable_image_is_named_or_skipped(tmp_path):
    good = save(tmp_path / "good.png", Image.new("RGB", (4, 4)))
    empty, torn = tmp_path / "empty.png", tmp_path / "torn.png"
    empty.write_bytes(b"")
    torn.write_bytes((tmp_path / "good.png").read_bytes()[:40])
    missing = str(tmp_path / "missing.png")
    huge = tmp_path / "huge.png"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header)
    bad = [str(empty), str(torn), missing, str(huge)]
    for path in bad:
        with pytest.raises(DataError, match=path):
            LazyImageDataset([path])[0]
    said = []
    data = LazyImageDataset(
        [good, *bad], labels=[3, 4, 5, 6, 7], on_error="skip", report=said.append
    )
    items = [data[i] for i in range(len(data))]
    assert items[0][1] == 3
    assert items[1:] == [None] * 4
    assert data.skipped == bad
    assert all(path in line for path, line in zip(bad, said, strict=True))


def test_skip_missing_collate_drops_the_unreadable(tmp_path):
    good = save(tmp_path / "good.png", Image.new("RGB", (4, 4)))
    data = LazyImageDataset(
        [good, "missing.png", good],
        transform=lambda image: torch.tensor(np.array(image)),
        on_error="skip",
        report=lambda line: None,
    )
    loader = DataLoader(data, 2, collate_fn=skip_missing_collate)
    assert [len(batch) for batch in loader] == [1, 1]
    assert skip_missing_collate([None]) is None


# --- streams


def test_text_rows_come_once_over_workers_and_ranks(tmp_path):
    texts = [f"row {i}\nsecond line" for i in range(25)] + ["NA"]
    csv, jsonl = tmp_path / "t.csv", tmp_path / "t.jsonl"
    frame = pd.DataFrame({"id": range(26), "text": texts})
    frame.to_csv(csv, index=False)
    frame.to_json(jsonl, orient="records", lines=True)
    for path in (csv, jsonl):
        assert list(StreamingTextDataset(path, chunk_size=4)) == texts
        seen = []
        for rank in range(2):
            data = StreamingTextDataset(path, chunk_size=4, rank=rank, world_size=2)
            seen += list(DataLoader(data, batch_size=None, num_workers=2))
        assert sorted(seen) == sorted(texts)


def test_parquet_rows_are_dicts_of_python_values(tmp_path):
    path = tmp_path / "t.parquet"
    frame = pd.DataFrame({"a": range(10), "b": [0.5] * 10, "c": ["x"] * 10})
    frame.to_parquet(path)
    rows = list(StreamingParquetDataset(path, batch_size=3))
    assert rows == [{"a": i, "b": 0.5, "c": "x"} for i in range(10)]
    only = list(StreamingParquetDataset(path, columns=["a"]))
    assert only == [{"a": i} for i in range(10)]
    loader = DataLoader(StreamingParquetDataset(path), batch_size=None, num_workers=2)
    assert sorted(row["a"] for row in loader) == list(range(10))


def test_stream_errors_name_file_and_column(tmp_path):
    csv, parquet = tmp_path / "t.csv", tmp_path / "t.parquet"
    pd.DataFrame({"a": [1]}).to_csv(csv)
    pd.DataFrame({"a": [1]}).to_parquet(parquet)
    for dataset, name in [
        (StreamingTextDataset(csv), "'text'"),
        (StreamingTextDataset(tmp_path / "none.csv"), "none.csv"),
        (StreamingParquetDataset(parquet, columns=["text"]), "'text'"),
        (StreamingParquetDataset(tmp_path / "none.parquet"), "none.parquet"),
        (StreamingParquetDataset(csv), "t.csv"),
    ]:
        with pytest.raises(DataError, match=name):
            list(dataset)
