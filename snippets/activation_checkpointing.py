"""Use when activations do not fit: full saves most, keeping matmuls costs least time.

Not when weights and optimizer fill the memory, nor around BatchNorm as it stands: the
recomputation updates its running statistics a second time.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
KEPT = {aten.mm.default, aten.addmm.default, aten.bmm.default}


def keep_matmuls(context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op in KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Blocks(nn.Module):
    def __init__(self, blocks: nn.ModuleList, mode: str = "none") -> None:
        super().__init__()
        self.blocks, self.mode = blocks, mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = {}
        if self.mode == "selective":
            contexts = partial(create_selective_checkpoint_contexts, keep_matmuls)
            options["context_fn"] = contexts
        for block in self.blocks:
            if self.mode != "none" and self.training:
                # use_reentrant=True loses gradients where no input requires them.
                x = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x = block(x)
        return x


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layers = [
        nn.Sequential(
            nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64)
        )
        for _ in range(4)
    ]
    model = Blocks(nn.ModuleList(layers)).to(device)
    x = torch.randn(512, 64, device=device)
    kept, flops, results = {}, {}, {}
    for model.mode in ("none", "selective", "full"):
        torch.manual_seed(1)
        model.zero_grad()
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(x).square().mean()
            loss.backward()
        kept[model.mode] = sum(sizes.values())
        flops[model.mode] = counter.get_total_flops()
        results[model.mode] = [p.grad.clone() for p in model.parameters()]
    print(kept, flops)
    assert kept["full"] < 0.3 * kept["none"]
    assert flops["selective"] == flops["none"] < flops["full"]
    for mode in ("selective", "full"):  # dropout is replayed: the same to the bit
        pairs = zip(results[mode], results["none"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
