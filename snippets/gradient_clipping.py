"""Use when the loss spikes, or gradients are accumulated over micro-batches.

Not when single elements are wrong: clipping scales all of them (look for NaN first).
"""

import math

import torch
from torch import nn


def step_in_pieces(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    micro_batch: int,
    max_norm: float = 1.0,
) -> float:
    """One optimizer step; the norm before clipping. A non-finite one is skipped."""
    optimizer.zero_grad(set_to_none=True)
    for part, target in zip(x.split(micro_batch), y.split(micro_batch), strict=True):
        share = len(part) / len(x)  # not 1 / pieces: the last may be smaller
        (nn.functional.cross_entropy(model(part), target) * share).backward()
    # Once, after the last piece: clipping each piece would weigh them differently.
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if not norm.isfinite():  # waits for the GPU; without it NaN ruins the weights
        return float("nan")
    optimizer.step()
    return norm.item()


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x = 10 * torch.randn(11, 4, device=device)
    y = torch.randint(3, (11,), device=device)
    start = nn.Linear(4, 3).state_dict()
    steps, norms = [], []
    for micro_batch in (11, 4):
        model = nn.Linear(4, 3).to(device)
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        norms.append(step_in_pieces(model, optimizer, x, y, micro_batch))
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        steps.append(after - before)
    torch.testing.assert_close(steps[0], steps[1])
    assert norms[0] > 1 and abs(steps[0].norm().item() - 1) < 1e-4, norms

    weights = model.weight.clone()
    norm = step_in_pieces(model, optimizer, x / 0, y, 4)
    assert math.isnan(norm) and torch.equal(model.weight, weights)
