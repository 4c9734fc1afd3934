"""Use when two runs must give the same numbers, or worker counts change the result.

Not when speed comes first: deterministic kernels can be slower, and some do not exist.
"""

import os
import random

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


def set_seed(seed: int, deterministic: bool = True) -> None:
    """NumPy has a generator of its own: numpy.random.seed(seed) where it is used."""
    random.seed(seed)
    torch.manual_seed(seed)  # the CPU and all GPUs
    # With warn_only=True attention on GPUs would keep its inexact backward.
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


class Noisy(Dataset):
    """Augmentation drawn from seed, epoch and sample: any worker gives the same."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        draw = torch.Generator()
        draw.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
        return index + 0.01 * torch.randn(3, generator=draw)


def train(
    seed: int, workers: int, dropout: float = 0.2
) -> tuple[torch.Tensor, list[int]]:
    """The weights, and the order in which the samples came."""
    set_seed(seed)
    data = Noisy(12, seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(dropout), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    # Its own generator: else the order is drawn from the global one, as dropout is.
    order, seen = torch.Generator().manual_seed(seed), []
    for data.epoch in range(2):
        # Built anew each epoch: persistent workers would never see the new epoch.
        loader = DataLoader(data, 4, shuffle=True, generator=order, num_workers=workers)
        for x in loader:
            seen += x.mean(1).round().int().tolist()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), seen


if __name__ == "__main__":
    weights, seen = train(seed=1, workers=0)
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    for workers in (0, 2):
        again, order = train(seed=1, workers=workers)
        assert torch.equal(weights, again)
        assert seen == order
    other, order = train(seed=1, workers=0, dropout=0.0)
    assert seen == order  # another model, the same order of samples
    assert not torch.equal(weights, other)
    assert seen != train(seed=2, workers=0)[1]
    data = Noisy(2, seed=1)
    early = data[0]
    data.epoch = 1
    assert not torch.equal(early, data[0])  # fresh noise in each epoch
