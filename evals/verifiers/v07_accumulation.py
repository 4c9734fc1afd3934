"""Gradients do not depend on how a batch is cut."""

from pathlib import Path

from evals.common import copy_of, expect, must_run, need

PROBE = """
import torch
from torch import nn
from accumulate import train_step

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(20, 16), nn.Tanh(), nn.Linear(16, 20))
start = {k: v.clone() for k, v in model.state_dict().items()}
tokens = torch.randint(20, (7, 12))
targets = torch.randint(20, (7, 12))
for row, length in enumerate((12, 1, 9, 2, 3, 12, 1)):
    targets[row, length:] = -100

def whole():
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

loss = whole()
wanted = torch.autograd.grad(loss, list(model.parameters()))
for micro_batches in (1, 2, 3, 7):
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    returned = float(train_step(model, optimizer, tokens, targets, micro_batches))
    worst = max((start[n] - p.detach() - g).abs().max().item()
                for (n, p), g in zip(model.named_parameters(), wanted))
    print(micro_batches, worst, abs(returned - loss.item()))
"""


def check_gradients(answer: Path) -> None:
    """Cut into 1, 2, 3 and 7, the step is that of the whole batch, within 1e-5."""
    need(answer, "accumulate.py")
    with copy_of(answer) as folder:
        (folder / "probe.py").write_text(PROBE, encoding="utf-8")
        rows = [line.split() for line in must_run(["probe.py"], folder).splitlines()]
    expect(len(rows) == 4, f"{len(rows)} results")
    for cuts, worst, loss in rows:
        expect(float(worst) < 1e-5, f"{cuts} micro-batches: gradient off by {worst}")
        expect(float(loss) < 1e-4, f"{cuts} micro-batches: loss off by {loss}")
