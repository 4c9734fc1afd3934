"""Batches of events for training."""

import pandas as pd
import torch
from torch.utils.data import DataLoader, IterableDataset

FEATURES = [f"f{i}" for i in range(8)]


class Events(IterableDataset):
    def __init__(self, path, batch_size):
        self.path = path
        self.batch_size = batch_size

    def __iter__(self):
        frame = pd.read_parquet(self.path)
        features, labels = [], []
        for _, row in frame.iterrows():
            values = [float(row[name]) for name in FEATURES]
            features.append(torch.tensor(values, dtype=torch.float32))
            labels.append(torch.tensor(int(row["label"])))
            if len(features) == self.batch_size:
                yield torch.stack(features), torch.stack(labels)
                features, labels = [], []
        if features:
            yield torch.stack(features), torch.stack(labels)


def make_loader(path, batch_size=256, workers=0):
    """Yields (features (B, 8) float32, labels (B,) int64)."""
    return DataLoader(Events(path, batch_size), batch_size=None, num_workers=workers)
