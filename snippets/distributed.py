"""Use when one device is too slow: torchrun --nproc-per-node=N distributed.py

Not when the model does not fit on one device (fully_shard), nor for a first try.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def start() -> tuple[torch.device, int, int]:
    """Device, rank and number of ranks; one process where torchrun did not start it."""
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0, 1
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # else every rank computes on GPU 0
    # Without a backend: nccl and gloo as the device needs them; "nccl" fails on CPUs.
    dist.init_process_group(device_id=device if device.type == "cuda" else None)
    return device, dist.get_rank(), dist.get_world_size()


def share_of_mean(losses: torch.Tensor, count: int, ranks: int) -> torch.Tensor:
    """A rank's part of the mean loss over the `count` samples of the global batch.

    For any shares, such as rows[rank::ranks] of the same rows on all ranks: uneven ones
    (a mean of means is wrong) and empty ones (their mean is NaN, their sum is 0).
    """
    return losses.sum() * ranks / count  # DDP averages over ranks; a sum is wanted


def finish() -> None:
    """At the end of every rank, when its model is gone."""
    gc.collect()  # else DDP's cycles hold the group, and gloo aborts the process's end
    dist.destroy_process_group()


def train(model: nn.Module, batches: list, rank: int, ranks: int) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:  # as many on every rank, or DDP hangs
        optimizer.zero_grad(set_to_none=True)
        losses = model(x[rank::ranks]).square()
        share_of_mean(losses, len(x), ranks).backward()  # gradients are averaged here
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


if __name__ == "__main__":
    device, rank, ranks = start()
    torch.manual_seed(0)  # the same weights and data everywhere
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    single = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    single.load_state_dict(model.state_dict())
    batches = torch.randn(52, 4).to(device).split(17)  # the last one: 1 row
    if ranks > 1:
        model = DistributedDataParallel(model)
    trained = train(model, batches, rank, ranks)
    torch.testing.assert_close(trained, train(single, batches, 0, 1))
    if ranks > 1:
        first = trained.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, trained), "ranks have drifted apart"
        dist.barrier()  # no rank leaves while another still needs it
        del model
        finish()
    print(f"rank {rank} of {ranks}: as one process on whole batches")
