"""Labelled samples in memory: columns of a file, image folders, classes, the split."""

import json

import pytest
import torch

from templates.data_optimizer import (
    DataError,
    list_image_folder,
    move_batches,
    number_classes,
    read_columns,
    split_samples,
)

ROWS = [
    ("plain", "1"),
    ('with "quotes", commas', "2"),
    ("two\nlines", "NA"),
    ("é", "1"),
]


def write(path, rows=ROWS):
    import pandas

    table = pandas.DataFrame(rows, columns=["text", "label"])
    table["other"] = range(len(rows))
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "ndjson", "parquet"])
def test_every_kind_of_file_gives_the_same_text(kind, tmp_path):
    path = write(tmp_path / f"data.{kind}")
    columns = read_columns(str(path), ["label", "text"])
    assert list(zip(columns["text"], columns["label"], strict=True)) == ROWS


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_numbers_as_labels_become_text(kind, tmp_path):
    import pandas

    path = tmp_path / f"data.{kind}"
    table = pandas.DataFrame({"text": ["a", "b"], "label": [3, 4]})
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    assert read_columns(str(path), ["label"]) == {"label": ["3", "4"]}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_damage_is_named(kind, tmp_path):
    path = write(tmp_path / f"data.{kind}")
    with pytest.raises(DataError, match=r"data\.\w+: has no column body, only text"):
        read_columns(str(path), ["body", "label"])
    with pytest.raises(DataError, match=r"data\.\w+: column text is empty in 2 rows"):
        read_columns(str(write(path, [(None, "1"), ("a", "2"), (None, "1")])), ["text"])
    path.write_bytes(b'{"text": "unclosed\n"\x00')
    with pytest.raises(DataError, match=r"data\.\w+: (cannot be read|has no column)"):
        read_columns(str(path), ["text"])
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.\w+: cannot be read"):
        read_columns(str(path), ["text"])


def test_a_column_that_is_no_text_is_refused_in_one_line(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    bad = [[1], [2]], [{"a": 1}, {"a": 2}], [b"\xff", b"ok"]
    for values in bad:
        parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(DataError, match=r"data\.parquet: cannot be read as text"):
            read_columns(str(path), ["text"])


def test_missing_file_unknown_kind_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_columns(str(tmp_path / "none.csv"), ["text"])
    with pytest.raises(DataError, match=r"give a file that ends with .csv, .jsonl"):
        read_columns(str(tmp_path), ["text"])
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(DataError, match=r"folder.parquet"):
        read_columns(str(tmp_path / "folder.parquet"), ["text"])


def test_number_classes():
    assert number_classes(["b", "a", "b"]) == (["a", "b"], [1, 0, 1])
    with pytest.raises(DataError, match="two classes"):
        number_classes(iter(["a", "a"]))
    with pytest.raises(DataError, match="some labels are empty"):
        number_classes(["a", "", "b"])


def test_split_takes_every_sample_once_and_depends_on_the_seed_alone():
    samples = [f"s{index}" for index in range(101)]
    train, val = split_samples(samples, 0.1, seed=3)
    assert len(val) == 10
    assert sorted([*train, *val]) == sorted(samples)
    again, _ = split_samples(samples, 0.1, seed=3)
    other, _ = split_samples(samples, 0.1, seed=4)
    assert list(again) == list(train) != list(other)
    for fraction in (0.0, 0.004, 0.999, 1.0):
        with pytest.raises(DataError, match="of 101 samples"):
            split_samples(samples, fraction, seed=0)


def test_image_folder(tmp_path):
    from PIL import Image

    for label, name, size in (("b", "1.PNG", (3, 2)), ("a", "2.png", (2, 2))):
        (tmp_path / label).mkdir()
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / label / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    paths, labels = list_image_folder(tmp_path)
    assert labels == ["a", "b"]
    assert [path[-5:] for path in paths] == ["2.png", "1.PNG"]
    with pytest.raises(DataError, match="holds no images: expected FOLDER/CLASS"):
        list_image_folder(tmp_path / "a")
    with pytest.raises(DataError, match="is no folder"):
        list_image_folder(tmp_path / "none")


def test_move_batches_gives_tuples_on_the_device():
    batches = list(
        move_batches([[torch.ones(2), torch.zeros(2)]], torch.device("meta"))
    )
    assert len(batches) == 1
    assert [tensor.device.type for tensor in batches[0]] == ["meta", "meta"]


def test_a_data_error_from_a_worker_says_only_what_is_wrong():
    from torch.utils.data import DataLoader

    loader = DataLoader([1], num_workers=1, collate_fn=fail_to_collate)
    with pytest.raises(DataError) as raised:
        next(iter(loader))
    assert str(raised.value) == "cat.png: cannot be read: remove it"
    assert "Traceback" in raised.value.args[0]  # for those who look


def fail_to_collate(samples):
    raise DataError("cat.png: cannot be read: remove it")
