"""A DataLoader that a training loop can put to any epoch, and any batch of it.

batches = ResumableBatchSampler(len(dataset), batch_size, seed)
loader = EpochLoader(DataLoader(dataset, batch_sampler=batches))
loader.set_epoch(3, start=120)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader


class EpochLoader:
    """What a loop asks of its loader: batches, their number, and `set_epoch`.

    Args:
        loader: with a batch sampler that has `set_epoch(epoch, start)`. A dataset with
            `set_epoch(epoch)` is told as well.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch (counted from 0) that comes first in it."""
        self.loader.batch_sampler.set_epoch(epoch, start)
        if hasattr(self.loader.dataset, "set_epoch"):
            self.loader.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever `set_epoch` starts."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


@dataclass
class StreamedRows:
    """Rows that are read from disk batch by batch, and what makes a batch of them."""

    stream: Any  # with `rows`, their number
    collate_fn: Callable[[dict[str, Any]], Any]
    stack: dict[str, list[str]] | None = None  # columns that come as one tensor

    def __len__(self) -> int:
        return self.stream.rows
