"""Optimizers with the right parameter groups, and fused kernels where they exist.

    model.to(device)  # first: the fused kernels depend on the device
    optimizer = build_adamw(model, learning_rate=3e-4, weight_decay=0.1)

Weights with two or more dimensions decay, biases and norm scales do not. All of them
take a learning-rate schedule, a GradScaler, and resume exactly from their state_dict.
Build them after `fully_shard` (FSDP2): then they work on the sharded parameters.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# Where torch 2.6 and later has fused SGD and AdamW kernels (torch.optim's notes).
FUSED_OPTIMIZER_DEVICES = ("cpu", "cuda", "mps", "xpu")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters for an optimizer: weights decay, the rest does not.

    Parameters with two or more dimensions decay (matrices, convolutions, embeddings:
    the rule of GPT-2 reimplementations); biases, norm scales and other vectors do not.
    A tied parameter comes once. The order is that of `model.named_parameters()`, and
    an empty group is left out.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _has_fused_kernels(groups: Iterable[dict[str, Any]]) -> bool:
    return all(
        p.device.type in FUSED_OPTIMIZER_DEVICES and p.is_floating_point()
        for group in groups
        for p in group["params"]
    )


def _has_shards(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether FSDP2 (or another DTensor) shards a parameter."""
    return any(hasattr(p, "device_mesh") for group in groups for p in group["params"])


def build_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused where the device has it.

    Over 200 tensors on one CPU thread a step took 1.6 ms fused, 8.1 ms by default.

    Args:
        model: on its device already.
        learning_rate: 1e-3 for small models from scratch, 6e-4 down to 1.6e-4 for
            language models of 125 M to 6.7 B parameters with about 0.5 M to 2 M tokens
            a batch (GPT-3, arXiv:2005.14165, table 2.1), 2e-5 to 5e-5 for fine-tuning
            a Transformer (BERT, arXiv:1810.04805, A.3). Half the batch: about 0.7 of
            the rate (square-root rule, arXiv:2205.10287).
        weight_decay: 0.1 for language models (GPT-3), 0.01 for fine-tuning.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(
        groups, lr=learning_rate, fused=_has_fused_kernels(groups) or None
    )


def build_sgd(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> torch.optim.SGD:
    """SGD with Nesterov momentum, fused where the device has it (not with FSDP2).

    Args:
        model: on its device already.
        learning_rate: 0.1 for a batch of 256 images with BatchNorm, in proportion to
            the batch (arXiv:1706.02677); 0.001 to 0.01 for fine-tuning. Transformers
            train badly with SGD.
        weight_decay: 1e-4 for ImageNet, 5e-4 for small images. Not decoupled: it is
            added to the gradient.
        momentum: 0 is plain SGD.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.SGD(
        groups,
        lr=learning_rate,
        momentum=momentum,
        nesterov=momentum > 0,
        fused=(_has_fused_kernels(groups) and not _has_shards(groups)) or None,
    )


def build_adafactor(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Adafactor:
    """Adafactor (arXiv:1804.04235): of each matrix only row and column statistics.

    For memory: its state is about 1/500 of AdamW's at a width of 1000. It has no
    momentum, and reads two norms of each parameter a step, for which a GPU is waited.

    Args:
        model: not sharded by FSDP2, whose tensors torch.optim.Adafactor cannot step.
        learning_rate: relative to each parameter's root mean square, so 1e-2 (from
            scratch) to 1e-3 (fine-tuning) where AdamW takes 1e-3 to 1e-5. At step t it
            is at most 1/sqrt(t) as in the paper, under any schedule: 1e-2 is cut after
            10,000 steps, 1e-3 never in practice.
        weight_decay: times the learning rate, as in AdamW.

    Raises:
        ValueError: the parameters are sharded.
    """
    groups = parameter_groups(model, weight_decay)
    if _has_shards(groups):
        raise ValueError(
            "torch.optim.Adafactor cannot step parameters that FSDP2 has sharded (it "
            "fails on their norms): use build_adamw, or DDP instead of FSDP2"
        )
    return torch.optim.Adafactor(groups, lr=learning_rate)


def _embedding_ids(model: nn.Module) -> set[int]:
    """Return the ids of embedding weights, and so of whatever is tied to them."""
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }


def _declared_output_layers(model: nn.Module) -> list[nn.Module]:
    """Return what the model itself calls its output layer (transformers, timm)."""
    layers = []
    for module in model.modules():
        for name in ("get_output_embeddings", "get_classifier"):
            method = getattr(module, name, None)
            if callable(method) and not inspect.signature(method).parameters:
                found = method()
                found = found if isinstance(found, (tuple, list)) else [found]
                layers += [layer for layer in found if isinstance(layer, nn.Module)]
    return layers


def _stacked_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the members of lists of two or more blocks of one class."""
    kinds: Counter[type] = Counter()
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        kinds.update(type(c) for c in module if any(True for _ in c.children()))
    stacked = []
    for child in module.children():
        stacked += [child] if kinds[type(child)] > 1 else _stacked_blocks(child)
    return stacked


def _weight_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable 2-D parameters that are called some weight."""
    return [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and p.ndim == 2 and "weight" in name.rpartition(".")[2]
    ]


def find_hidden_matrices(
    model: nn.Module, blocks: Iterable[nn.Module] | None = None
) -> list[nn.Parameter]:
    """Return the matrices between a model's hidden layers, in parameter order.

    They are the 2-D weights inside of its repeated blocks (members of an
    `nn.ModuleList` or `nn.Sequential` that holds two or more modules of one class with
    modules of their own). A model without such blocks has all its 2-D weights but the
    first and the last. Never among them: weights of embeddings, all that is tied to
    one, what `get_output_embeddings` (transformers) or `get_classifier` (timm) return,
    and 2-D parameters without "weight" in their name, such as learned positions.

    Args:
        blocks: modules whose 2-D weights are hidden, instead of looking for them.
    """
    excluded = _embedding_ids(model)
    for layer in _declared_output_layers(model):
        excluded |= {id(p) for p in layer.parameters()}
    inner = _stacked_blocks(model) if blocks is None else list(blocks)
    if inner:
        candidates = {id(p) for block in inner for p in _weight_matrices(block)}
    else:
        candidates = {id(p) for p in _weight_matrices(model)[1:-1]}
    return [
        p
        for p in _weight_matrices(model)
        if id(p) in candidates and id(p) not in excluded
    ]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer: each steps its own parameter groups.

    One `param_groups` and one `state` serve schedules, GradScaler, state_dict and
    `torch.distributed.checkpoint`.

    Args:
        muon: a torch.optim.Muon.
        adamw: a torch.optim.AdamW of other parameters.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["kind"] = "muon" if optimizer is muon else "adamw"
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon = muon
        self.adamw = adamw

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "muon": self.muon, "adamw": self.adamw}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both; groups and state are handed on, because loading replaces them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, optimizer in (("muon", self.muon), ("adamw", self.adamw)):
            optimizer.param_groups = [g for g in self.param_groups if g["kind"] == kind]
            optimizer.state = self.state
            optimizer.step()
        return loss


def build_muon(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    blocks: Iterable[nn.Module] | None = None,
    report: Callable[[str], None] = print,
) -> torch.optim.Optimizer:
    """Muon for the hidden layers' matrices, AdamW (fused) for all other parameters.

    Muon orthogonalises each matrix's momentum by five Newton-Schulz steps
    (https://kellerjordan.github.io/posts/muon). Its update is scaled to the size of
    AdamW's (0.2 sqrt(max(rows, columns)), arXiv:2502.16982), so both share one rate.
    `find_hidden_matrices` says what Muon gets. Convolutions go to AdamW:
    torch.optim.Muon takes matrices only. With FSDP2 it gathers pieces of each matrix
    several times a step, and rounds otherwise (bf16) than in one process.

    Args:
        model: on its device already.
        learning_rate: as for AdamW (arXiv:2502.16982); 2e-4 to 1e-3 there.
        weight_decay: 0.1 (arXiv:2502.16982); vectors do not decay.
        blocks: modules whose 2-D weights Muon gets, instead of looking for them.
        report: takes a line where the model has no hidden matrix; AdamW does all then.

    Raises:
        RuntimeError: torch older than 2.9.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.optim.Muon: "
            'pip install "torch>=2.9", or use AdamW (--optimizer adamw)'
        )
    hidden = find_hidden_matrices(model, blocks)
    if not hidden:
        report(
            f"{type(model).__name__} has no matrices between hidden layers that Muon "
            "could take: AdamW trains all of it"
        )
        return build_adamw(model, learning_rate, weight_decay)
    hidden_ids = {id(p) for p in hidden}
    groups = parameter_groups(model, weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in hidden_ids]
    groups = [group for group in groups if group["params"]]
    muon = torch.optim.Muon(
        hidden,
        lr=learning_rate,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    if not groups:
        return muon
    adamw = torch.optim.AdamW(
        groups, lr=learning_rate, fused=_has_fused_kernels(groups) or None
    )
    return MuonWithAdamW(muon, adamw)
