"""templates/data_optimizer.py: sampler, images and factory."""

import random
import struct
import sys

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from templates.data_optimizer import (
    DataError,
    LazyImageDataset,
    ResumableBatchSampler,
    StreamingParquetDataset,
    TokenBudgetBatchSampler,
    _start_loader_worker,
    collate_images,
    create_optimized_dataloader,
    normalize_images,
    sample_generator,
    seed_worker,
    tune_dataloader,
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
    joined = [[i for share in s for i in share] for s in zip(*ranks, strict=True)]
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
    assert loader.worker_init_fn is _start_loader_worker


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


@pytest.mark.parametrize("workers", [0, 2])
def test_sized_images_come_as_uint8_batches_without_the_unreadable(tmp_path, workers):
    paths, labels = [], list(range(7))
    for i in labels:
        image = Image.new("RGB", (40 + i, 30), (i * 30, 0, 0))
        paths.append(save(tmp_path / f"{i}.png", image))
    paths[2] = "missing.png"
    data = LazyImageDataset(
        paths, labels=labels, size=(8, 6), on_error="skip", report=lambda line: None
    )
    loader = create_optimized_dataloader(
        data, 4, CPU, shuffle=False, num_workers=workers, collate_fn=collate_images
    )
    batches = list(loader)
    assert [label for _, batch in batches for label in batch] == [0, 1, 3, 4, 5, 6]
    for images_BCHW, label_B in batches:
        assert images_BCHW.shape[1:] == (3, 8, 6)
        assert images_BCHW.dtype == torch.uint8
        assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images_BCHW[:, 0, 0, 0], (label_B * 30).to(torch.uint8))
    assert data.skipped == ["missing.png"]
    assert collate_images([None]) is None


def photo(path, width, height):
    """A smooth picture with edges, as photos have them."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 37 + c) + np.cos(y / 23 - c) for c in range(3)], 2)
    pixels = (waves * 50 + 127 + 40 * ((x // 90 + y // 70) % 2)[..., None]).astype("u1")
    return save(path, Image.fromarray(pixels), quality=90)


def test_jpeg_is_decoded_small_and_close_to_the_exact_resize(tmp_path, monkeypatch):
    path = photo(tmp_path / "p.jpg", 1600, 1200)
    exact = Image.open(path).convert("RGB").resize((224, 224), Image.BILINEAR)
    fast = LazyImageDataset([path], size=224)[0].permute(1, 2, 0).numpy()
    error = np.abs(np.asarray(exact).astype(float) - fast).mean()
    assert error < 2, "mean of 0 to 255"
    opened = []
    monkeypatch.setattr(
        "templates.data_optimizer._resize_to_tensor",
        lambda image, size: opened.append(image.size),
    )
    assert LazyImageDataset([path], size=224)[0] is None
    assert opened == [(400, 300)]


@pytest.mark.parametrize("arrow", [True, False])
def test_scaling_is_pillows_within_one(tmp_path, monkeypatch, arrow):
    if not arrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    for size, to in (((500, 400), 224), ((224, 224), 224), ((60, 90), (128, 64))):
        path = photo(tmp_path / "p.png", *size)
        wanted = LazyImageDataset([path], np.asarray, size=to)[0].astype(int)
        scaled = LazyImageDataset([path], size=to)[0].permute(1, 2, 0).numpy()
        assert np.abs(wanted - scaled).max() <= 1


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.new("RGB", (4, 4))) for i in range(6)]

    def add_noise(image, generator):
        return image + torch.rand(1, generator=generator)

    data = LazyImageDataset(paths, size=4, augment=add_noise, seed=3)

    def epoch(number, workers, order):
        data.set_epoch(number)
        loader = create_optimized_dataloader(
            data, 1, CPU, num_workers=workers, batch_sampler=[[i] for i in order]
        )
        return {i: float(batch.flatten()[0]) for i, batch in zip(order, loader)}  # noqa: B905

    first = epoch(0, 0, range(6))
    assert epoch(0, 2, [5, 3, 1, 0, 2, 4]) == first
    assert len(set(first.values())) == 6
    assert not set(epoch(1, 0, range(6)).values()) & set(first.values())
    assert sample_generator(0, 1, 2).initial_seed() != (
        sample_generator(0, 2, 1).initial_seed()
    )


def test_normalize_images_matches_the_formula():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalize_images(images), wanted)


# --- lengths


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_token_budget_holds_and_every_row_comes_once(world_size, shuffle):
    lengths = torch.randint(0, 100, (3000,), generator=torch.Generator().manual_seed(0))
    whole = TokenBudgetBatchSampler(lengths, 800, shuffle=shuffle, stretch=500)
    counts = [whole.count_batches(epoch) for epoch in range(4)]
    assert (len(set(counts)) > 1) == shuffle
    assert len(whole) == counts[0]
    whole.set_epoch(2)
    assert len(whole) == counts[2]
    ranks = []
    for rank in range(world_size):
        sampler = TokenBudgetBatchSampler(
            lengths, 800, 0, shuffle, rank, world_size, stretch=500
        )
        sampler.set_epoch(2)
        assert len(sampler) == len(whole)
        ranks.append(list(sampler))
    joined = [[i for share in s for i in share] for s in zip(*ranks, strict=True)]
    assert joined == list(whole)
    assert sorted(i for batch in joined for i in batch) == list(range(3000))
    for shares in zip(*ranks, strict=True):
        assert min(map(len, shares)) > 0
    padded = [len(batch) * int(lengths[batch].max()) for batch in joined]
    assert max(padded) <= 800
    tokens = int(lengths.sum())
    random_padding = 3000 * 99
    assert sum(padded) < tokens * 1.2 < random_padding
    whole.set_epoch(2, start=5)
    assert list(whole) == joined[5:]
    if not shuffle:
        assert lengths[joined[0][0]] == lengths.max()


def test_token_budget_refuses_what_it_cannot_hold():
    with pytest.raises(DataError, match="longest sample has 9 tokens"):
        TokenBudgetBatchSampler([1, 9], 8)
    with pytest.raises(DataError, match="a budget of 36 tokens"):
        TokenBudgetBatchSampler([9, 9], 9, rank=0, world_size=2)
    few = {"rank": 0, "world_size": 2, "allow_empty": True}
    assert list(TokenBudgetBatchSampler([9], 9, **few)) == [[]]
    assert list(TokenBudgetBatchSampler([], 8)) == []


# --- tuning


class Slow(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.tensor(index)


def test_tune_takes_the_fewest_workers_that_are_as_fast(monkeypatch):
    rates = iter([(10.0, "b"), (99.0, "b"), (100.0, "b"), (50.0, "b")])
    monkeypatch.setattr(
        "templates.data_optimizer._batches_per_second", lambda *args: next(rates)
    )
    said = []
    result = tune_dataloader(
        Slow(), 4, CPU, step=len, workers=[0, 1, 2], report=said.append
    )
    assert result["num_workers"] == 1
    assert result["bottleneck"] == "model"
    assert result["batches_per_s"] == {0: 10.0, 1: 99.0, 2: 100.0}
    assert "1 workers" in said[0]
    assert "bottleneck" in said[1]


def test_tune_runs_on_datasets_and_streams(tmp_path):
    result = tune_dataloader(
        Slow(), 4, CPU, step=lambda b: b.sum(), seconds=0.05, workers=[0, 1]
    )
    assert set(result["batches_per_s"]) == {0, 1}
    assert result["steps_per_s"] > 0
    pandas.DataFrame({"x": range(100)}).to_parquet(tmp_path / "t.parquet")
    stream = StreamingParquetDataset(tmp_path / "t.parquet")
    seen = []
    result = tune_dataloader(
        stream,
        4,
        CPU,
        step=seen.append,
        seconds=0.05,
        workers=[0, 1],
        collate_fn=lambda batch: batch["x"].sum().item(),
    )
    assert set(result["batches_per_s"]) == {0, 1}
    assert isinstance(seen[0], int)
