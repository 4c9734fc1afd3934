"""Use when validation is noisy: averaged weights, for one fused kernel a step.

Not when the model is sharded (FSDP2 cannot deepcopy) or the run only a few hundred
steps long: then shorten the memory (`decay`) or leave it out.
"""

import copy

import torch
from torch import nn


class WeightAverage:
    """Evaluate and save `self.model`; call update after each optimizer step taken."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        # fp32: in bf16 the update is below the resolution, the average never moves.
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay, self.updates = decay, 0
        # Lists made once: gathering them takes longer than the update itself.
        self.averages = list(self.model.parameters())
        self.parameters = [p.detach() for p in model.parameters()]
        self.buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        # Short memory at first, or the random start weighs for thousands of steps.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.float() for p in self.parameters]  # nothing to do in fp32
        torch._foreach_lerp_(self.averages, current, 1 - decay)
        for average, buffer in self.buffers:  # else BatchNorm keeps its start values
            average.copy_(buffer)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.to(device, torch.bfloat16)
    average = WeightAverage(model, decay=0.99)
    expected = model[0].weight.detach().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(1, 31):
        x = torch.randn(8, 4, device=device, dtype=torch.bfloat16) + 3
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update()
        decay = min(0.99, (1 + i) / (10 + i))
        expected += (1 - decay) * (model[0].weight.detach().double() - expected)
    assert average.model[0].weight.dtype is torch.float32
    torch.testing.assert_close(average.model[0].weight.double(), expected)
    mean = average.model[1].running_mean
    assert torch.equal(mean, model[1].running_mean.float()) and mean.abs().max() > 0.1
    assert not average.model.training and model.training
