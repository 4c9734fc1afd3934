"""Token files: complete or absent, every token a target once, texts never in both."""

import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from templates import data_optimizer
from templates.data_optimizer import DataError, list_text_files, read_text_files
from templates.language_data import (
    TokenWindows,
    collate_windows,
    hash_words,
    split_tokens,
    write_tokens,
)

END = 256


def write_texts(folder, texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return list_text_files(str(folder))


def make(tmp_path, texts, encode=str.encode, end=END):
    paths = write_texts(tmp_path / "texts", texts)
    return write_tokens(
        tmp_path / "tokens", read_text_files(paths), encode, end, end + 1, paths
    )


def whole(windows: TokenWindows) -> list[int]:
    """All tokens behind some windows, checked to overlap by one."""
    found = []
    for index in range(len(windows)):
        window = windows[index].tolist()
        assert found[-1:] in ([], window[:1])
        found += window[1:] if found else window
    return found


TEXTS = ["one\n", "", "größer als €\r\n", "x" * 50, "\n"]


def test_the_file_holds_each_text_and_its_end(tmp_path):
    folder = make(tmp_path, TEXTS)
    windows = TokenWindows(folder, torch.tensor([[0, 1000]]), 10_000)
    expected = [[*text.encode(), END] for text in TEXTS if text]
    size = sum(map(len, expected))
    windows = TokenWindows(folder, torch.tensor([[0, size]]), 7)
    assert whole(windows) == [token for text in expected for token in text]
    assert [len(w) for w in windows][:-1] == [8] * (len(windows) - 1)
    ends = torch.frombuffer(
        bytearray((folder / "ends.bin").read_bytes()), dtype=torch.int64
    )
    assert ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist() == [
        len(tokens) for tokens in expected
    ]


def test_large_ids_and_pieces_of_a_long_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data_optimizer, "TEXT_PIECE", 16)
    text = "".join(f"line {n} ü\n" for n in range(20)) + "y" * 100
    folder = make(tmp_path, [text], lambda t: [60_000 + ord(c) for c in t], 70_000)
    assert json.loads((folder / "meta.json").read_text())["dtype"] == "int32"
    windows = TokenWindows(folder, torch.tensor([[0, len(text) + 1]]), 9)
    assert whole(windows) == [60_000 + ord(c) for c in text] + [70_000]


def test_pieces_end_with_a_line_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data_optimizer, "TEXT_PIECE", 10)
    texts = ["ab\ncd\r\nefghijklm\nno", "no line end at all, none"]
    paths = write_texts(tmp_path / "texts", texts)
    pieces = list(read_text_files(paths))
    assert [end for _, end in pieces].count(True) == 2
    assert "".join(piece for piece, _ in pieces) == "".join(texts)
    assert pieces[0] == ("ab\ncd\r\n", False)


def test_bytes_that_are_no_utf8_are_replaced(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a\xff\xfeb")
    assert list(read_text_files([tmp_path / "bad.txt"])) == [("a��b", True)]


@pytest.mark.parametrize("ids", [[-1], [0, 257]])
def test_an_id_beyond_the_last_is_refused_and_leaves_nothing(tmp_path, ids):
    with pytest.raises(
        ValueError, match=r"encode must give ids from 0 to below vocab_size=257"
    ):
        make(tmp_path, ["text"], lambda text: ids)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_it_is_written_once_and_again_when_a_source_changes(tmp_path):
    paths = write_texts(tmp_path / "texts", ["one", "two"])

    def write(settings=None, encode=str.encode):
        pieces = read_text_files(paths)
        return write_tokens(
            tmp_path / "t", pieces, encode, END, END + 1, paths, settings
        )

    first = write()
    before = (first / "tokens.bin").stat()
    assert write() == first
    assert (first / "tokens.bin").stat() == before
    assert write(["other tokenizer"]) != first
    assert write(encode=lambda text: text.encode("utf-16")) != first
    paths[1].write_text("two and more")
    assert write() != first
    os.utime(paths[0], ns=(1, 1))
    assert len({write(), write(), first}) == 2


def test_a_killed_write_leaves_no_file_that_would_be_taken(tmp_path):
    paths = write_texts(tmp_path / "texts", ["one", "two"])
    code = f"""
import os
from pathlib import Path
from templates.data_optimizer import list_text_files, read_text_files
from templates.language_data import write_tokens
paths = list_text_files({str(tmp_path / "texts")!r})
def encode(text):
    if text == "two":
        os._exit(9)
    return text.encode()
write_tokens({str(tmp_path / "t")!r}, read_text_files(paths), encode, 256, 257, paths)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not list((tmp_path / "t").glob("*/meta.json"))
    pieces = read_text_files(paths)
    folder = write_tokens(tmp_path / "t", pieces, str.encode, END, END + 1, paths)
    windows = TokenWindows(folder, torch.tensor([[0, 8]]), 100)
    assert windows[0].tolist() == [*b"one", END, *b"two", END]


def test_whoever_is_second_takes_what_the_first_has_written(tmp_path):
    paths = write_texts(tmp_path / "texts", ["one"])
    written = []

    def write():
        pieces = read_text_files(paths)
        return write_tokens(tmp_path / "t", pieces, encode, END, END + 1, paths)

    def encode(text):  # the first time another process does the same meanwhile
        if not written:
            written.append(None)
            written[0] = write()
        return text.encode()

    assert [write()] == written
    assert list((tmp_path / "t").iterdir()) == written


# --- Splits --------------------------------------------------------------------------


def test_texts_are_either_to_train_or_to_validate_on(tmp_path):
    texts = [f"text number {n} " * (n % 7 + 1) for n in range(60)]
    folder = make(tmp_path, texts)
    train, val = split_tokens(folder, 10, 0.2, seed=3)

    def documents(windows):
        text = bytes(min(t, 255) if t != END else 0 for t in whole(windows))
        return [part.decode() for part in text.split(b"\0")[:-1]]

    both = [documents(train), documents(val)]
    assert sorted(both[0] + both[1]) == sorted(texts)
    size = sum(map(len, texts))
    assert 0.2 <= sum(map(len, both[1])) / size < 0.3
    again = split_tokens(folder, 10, 0.2, seed=3)
    assert documents(again[1]) == both[1]
    assert documents(split_tokens(folder, 10, 0.2, seed=4)[1]) != both[1]


def test_a_single_text_is_split_into_parts(tmp_path):
    folder = make(tmp_path, ["".join(chr(97 + n % 26) for n in range(5000))])
    train, val = split_tokens(folder, 16, 0.1, seed=0)
    pieces = [tuple(p) for s in (train, val) for p in s.stretches.tolist()]
    covered = sorted(pieces)
    assert covered[0][0] == 0
    assert covered[-1][1] == 5001
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    assert len(whole(val)) == pytest.approx(500, abs=125)
    assert len(train.stretches) <= len(val.stretches) + 1  # joined, not in crumbs


def test_too_little_text_gives_an_empty_side(tmp_path):
    assert [len(s) for s in split_tokens(make(tmp_path, ["ab"]), 8, 0.1, 0)] == [1, 0]
    assert [len(s) for s in split_tokens(make(tmp_path, [""]), 8, 0.1, 0)] == [0, 0]


def test_windows_travel_to_a_worker_without_their_tokens(tmp_path):
    train, _ = split_tokens(make(tmp_path, ["z" * 300_000]), 100, 0.1, 0)
    first = train[0]
    parcel = pickle.dumps(train)
    assert len(parcel) < 5000
    assert torch.equal(pickle.loads(parcel)[0], first)
    with pytest.raises(IndexError):
        train[len(train)]


# --- Batches -------------------------------------------------------------------------


def test_windows_of_unequal_length_count_only_what_is_there():
    inputs, targets = collate_windows([torch.arange(5, 10), torch.arange(3)])
    assert inputs.tolist() == [[5, 6, 7, 8], [0, 1, 0, 0]]
    assert targets.tolist() == [[6, 7, 8, 9], [1, 2, -100, -100]]


def test_words_are_the_same_ids_everywhere():
    rows = hash_words(["One two, two", "", "three " * 9], 100, 6)
    assert rows.shape == (3, 6)
    assert rows[0, 1] == rows[0, 3] != rows[0, 0]
    assert rows[0, 4:].tolist() == [0, 0]
    assert rows[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert ((rows[2] >= 2) & (rows[2] < 100)).all()


def test_hidden_files_are_left_out(tmp_path):
    for name in ("a.txt", ".hidden", ".git/config", "sub/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [tmp_path / "a.txt", tmp_path / "sub/b.txt"]
    assert list_text_files(str(tmp_path)) == names
    assert list_text_files(str(tmp_path / "**/*.txt")) == names
    assert list_text_files(str(tmp_path / "a.txt")) == names[:1]
    with pytest.raises(DataError, match="no such file"):
        list_text_files(str(tmp_path / "none*"))
