"""Use when rows come from a file larger than memory, or workers repeat every row.

Not when the data fits in memory: a list or TensorDataset shuffles and resumes better.
"""

import csv
import os
import tempfile
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class CsvTexts(IterableDataset):
    """One column of a CSV file, cut by rank and worker so that each row comes once."""

    def __init__(self, path: str, column: str, rank: int = 0, ranks: int = 1) -> None:
        self.path, self.column, self.rank, self.ranks = path, column, rank, ranks

    def __iter__(self) -> Iterator[str]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        shard, shards = self.rank * workers + worker, self.ranks * workers
        with open(self.path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file)):
                if number % shards == shard:
                    yield row[self.column]


def make_loader(rows: IterableDataset, batch_size: int, workers: int) -> DataLoader:
    """Shuffling is the dataset's own task: shuffle=True raises for this kind."""
    many = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    pin = torch.cuda.is_available()  # then .to(device, non_blocking=True) overlaps
    return DataLoader(
        rows, batch_size, num_workers=workers, pin_memory=pin, collate_fn=list, **many
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.csv")
        with open(path, "w", encoding="utf-8") as file:
            file.write("text\n" + "".join(f"row {i}\n" for i in range(10)))
        for ranks, workers in ((1, 0), (1, 2), (2, 2), (3, 0)):
            loaders = [
                make_loader(CsvTexts(path, "text", rank, ranks), 4, workers)
                for rank in range(ranks)
            ]
            rows = [row for loader in loaders for batch in loader for row in batch]
            assert sorted(rows) == [f"row {i}" for i in range(10)], (ranks, workers)
