"""Use when steps are many and shapes few: compiling takes seconds to minutes at first.

Not when every batch has another rank or layout: past 8 recompilations it is eager.
"""

from collections.abc import Callable

import torch
from torch import nn

Step = Callable[[nn.Module], torch.Tensor]


def compile_at_first_step(model: nn.Module, step: Step, **options) -> nn.Module:
    """Run one step compiled; where that fails, the same step and all others eager.

    torch.compile itself never fails: without a working compiler the first call does.
    Save `model`, not what comes back: that one's keys begin with `_orig_mod.`.
    """
    compiled = torch.compile(model, **options)
    try:
        step(compiled)
        return compiled
    except Exception as error:  # noqa: BLE001 compilers raise anything
        reason = str(error).strip().partition("\n")[0]
    print(f"not compiled, going on in eager mode: {reason}")
    step(model)  # raises again if the error was the model's own
    return model


if __name__ == "__main__":
    graphs = []

    def count_graphs(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    def broken(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        raise RuntimeError("no compiler here")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).to(device)

    def step(net: nn.Module, length: int = 5) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = net(torch.ones(length, 8, device=device)).square().mean()
        loss.backward()
        return loss.detach()

    assert compile_at_first_step(model, step, backend=broken) is model
    eager = step(model)
    net = compile_at_first_step(model, step, backend=count_graphs, dynamic=True)
    for length in range(3, 20):
        step(net, length)
    assert net is not model and torch.allclose(step(net), eager)
    assert len(graphs) == 1, f"{len(graphs)} graphs"  # one for all lengths
    assert all(name.startswith("_orig_mod.") for name in net.state_dict())
    assert not any("_orig_mod" in name for name in model.state_dict())
