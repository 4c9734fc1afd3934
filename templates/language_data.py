"""Texts to tokens: words by their hash, and a flat memory-mapped file for corpora.

    paths = list_text_files("corpus/**/*.txt")
    folder = write_tokens("tokens", read_text_files(paths), str.encode, 256, 257, paths)
    train_set, val_set = split_tokens(folder, length=1024, val_fraction=0.1, seed=0)
    tokens = train_set[0]  # (1025,): inputs are all but the last, targets but the first

The file is written once, in bounded memory, and again when the sources change; reading
needs no memory either, in any number of workers.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset


def hash_words(texts: Sequence[str], vocab_size: int, max_tokens: int) -> torch.Tensor:
    """Words and signs, hashed to token ids: (B, T), 0 for padding, 1 for no word.

    It needs no vocabulary, and is the same in every process; words may share an id.
    `snake_case` is two words.
    """
    rows = []
    for text in texts:
        words = re.findall(r"[^\W_]+|[^\w\s]", text.lower())[:max_tokens]
        ids = [2 + zlib.crc32(word.encode()) % (vocab_size - 2) for word in words]
        rows.append(torch.tensor(ids or [1]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def write_tokens(
    folder: str | Path,
    pieces: Iterable[tuple[str, bool]],
    encode: Callable[[str], bytes | Sequence[int]],
    end_token: int,
    vocab_size: int,
    paths: Iterable[Path],
    settings: Any = None,
) -> Path:
    """Encode texts into one file of tokens, unless that has been done before.

    Args:
        folder: the tokens go into a subfolder of it, named by a digest of the rest.
        pieces: texts or parts of one, with whether it ends there; not touched when
            the tokens are there. A text without tokens is left out.
        encode: gives token ids below `vocab_size`; other source code of it makes
            other tokens.
        end_token: is put after each text.
        paths: the sources; path, size or time of change make other tokens.
        settings: what else does, such as the tokenizer's name; anything for JSON.

    Returns:
        The subfolder: tokens.bin (int16 or int32), ends.bin (int64, where each text
        ends) and meta.json. It appears in one step, complete.
    """
    stats = [(str(path), path.stat()) for path in paths]
    source = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    try:
        code = inspect.getsource(encode)
    except (OSError, TypeError):  # built in, or typed into an interpreter
        code = getattr(encode, "__qualname__", "")
    key = json.dumps([source, code, end_token, vocab_size, settings]).encode()
    target = Path(folder) / hashlib.sha256(key).hexdigest()[:16]
    if (target / "meta.json").exists():
        return target
    Path(folder).mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(".partial", target.name, folder))
    try:
        _encode_into(partial, pieces, encode, end_token, vocab_size)
        try:
            os.rename(partial, target)
        except OSError:  # another process was faster, with the same tokens
            if not (target / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _encode_into(
    folder: Path,
    pieces: Iterable[tuple[str, bool]],
    encode: Callable[[str], bytes | Sequence[int]],
    end_token: int,
    vocab_size: int,
) -> None:
    kind, dtype = ("h", "int16") if vocab_size <= 1 << 15 else ("i", "int32")
    size = text_start = 0
    tokens_path, ends_path = folder / "tokens.bin", folder / "ends.bin"
    with open(tokens_path, "wb") as tokens, open(ends_path, "wb") as ends:
        for text, is_end in pieces:
            ids = list(encode(text))
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"token ids from {min(ids)} to {max(ids)}: encode must give ids "
                    f"from 0 to below {vocab_size=}"
                )
            if is_end and size + len(ids) > text_start:
                ids.append(end_token)
                text_start = size + len(ids)
                ends.write(text_start.to_bytes(8, sys.byteorder))
            tokens.write(array(kind, ids).tobytes())
            size += len(ids)
        for file in (tokens, ends):
            file.flush()
            os.fsync(file.fileno())
    meta = {"dtype": dtype, "tokens": size}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _map_file(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file as a tensor that the system reads where it is used."""
    count = path.stat().st_size // dtype.itemsize
    if not count:  # an empty file cannot be mapped
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


class TokenWindows(Dataset):
    """Windows of `length` + 1 tokens over stretches of a token file, joined.

    The last token of a window is the first of the next: every token but the very first
    is a target once. The last window is as long as what is left.

    Args:
        folder: as `write_tokens` made it.
        stretches: (N, 2), where each stretch begins and ends, in tokens.
    """

    def __init__(self, folder: Path, stretches: torch.Tensor, length: int) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder, self.length = folder, length
        self.dtype = getattr(torch, meta["dtype"])
        self.stretches = stretches
        sizes = stretches[:, 1] - stretches[:, 0]
        self.offsets = [0, *sizes.cumsum(0).tolist()]  # of each in the whole
        self._tokens: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file, which would be copied to a worker."""
        return {**self.__dict__, "_tokens": None}

    def __len__(self) -> int:
        return max(0, -(-(self.offsets[-1] - 1) // self.length))

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} of {len(self)} windows")
        if self._tokens is None:
            self._tokens = _map_file(self.folder / "tokens.bin", self.dtype)
        low = index * self.length
        high = min(low + self.length + 1, self.offsets[-1])
        number = bisect_right(self.offsets, low) - 1
        pieces = []
        while low < high:
            stop = min(high, self.offsets[number + 1])
            begin = int(self.stretches[number, 0]) + low - self.offsets[number]
            pieces.append(self._tokens[begin : begin + stop - low])
            low, number = stop, number + 1
        return torch.cat(pieces).long()


def split_tokens(
    folder: Path, length: int, val_fraction: float, seed: int
) -> tuple[TokenWindows, TokenWindows]:
    """Windows to train on and windows to validate on, of different texts.

    Texts are drawn at random until they hold `val_fraction` of the tokens. A text that
    is longer than a quarter of that is cut into parts of this length first: a single
    text can be split too. No token is in both.
    """
    ends_N = _map_file(folder / "ends.bin", torch.int64).clone()
    starts_N = torch.cat((torch.zeros(1, dtype=torch.int64), ends_N))[:-1]
    wanted = round(val_fraction * int(ends_N[-1])) if len(ends_N) else 0
    longest = max(length + 1, wanted // 4)
    parts_N = (ends_N - starts_N + longest - 1) // longest
    text_M = torch.repeat_interleave(torch.arange(len(ends_N)), parts_N)
    part_M = torch.arange(len(text_M)) - (parts_N.cumsum(0) - parts_N)[text_M]
    low_M = starts_N[text_M] + part_M * longest
    high_M = torch.minimum(low_M + longest, ends_N[text_M])

    order_M = torch.randperm(len(low_M), generator=torch.Generator().manual_seed(seed))
    size_M = (high_M - low_M)[order_M]
    chosen_M = torch.zeros(len(low_M), dtype=torch.bool)
    chosen_M[order_M] = size_M.cumsum(0) - size_M < wanted
    return tuple(
        TokenWindows(folder, _join_stretches(low_M[mask], high_M[mask]), length)
        for mask in (~chosen_M, chosen_M)
    )


def _join_stretches(low_M: torch.Tensor, high_M: torch.Tensor) -> torch.Tensor:
    """(N, 2) stretches in order, those that touch as one."""
    if not len(low_M):
        return torch.zeros(0, 2, dtype=torch.int64)
    gap = low_M[1:] != high_M[:-1]
    first = torch.cat((torch.ones(1, dtype=torch.bool), gap))
    return torch.stack((low_M[first], high_M[first.roll(-1)]), dim=1)


def collate_windows(
    windows: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and the tokens that follow them, (B, T) each.

    Shorter windows are filled up with token 0, as targets with -100, which no loss
    counts.
    """
    pad = nn.utils.rnn.pad_sequence
    inputs_BT = pad([window[:-1] for window in windows], batch_first=True)
    targets_BT = pad(
        [window[1:] for window in windows], batch_first=True, padding_value=-100
    )
    return inputs_BT, targets_BT
