"""Parameter groups, fused kernels, and Muon with AdamW as one optimizer."""

import copy
import io

import pytest
import torch
from torch import nn

from templates.optimizers import (
    MuonWithAdamW,
    build_adafactor,
    build_adamw,
    build_muon,
    build_sgd,
    find_hidden_matrices,
    parameter_groups,
)

BUILDERS = [build_adamw, build_sgd, build_muon, build_adafactor]
needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is in torch 2.9"
)


class Block(nn.Module):
    """Attention and an MLP. x_BTD -> x_BTD."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


class Decoder(nn.Module):
    """Embedding, learned positions, blocks, a head. tokens_BT -> logits_BTV."""

    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 11, bias=False)  # registered first, on purpose
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(4, 8))
        self.input = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.input(self.embedding(tokens) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


HIDDEN = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in (
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    )
]
TOKENS = torch.arange(12).view(3, 4) % 11


def names_of(model: nn.Module, parameters) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def train(model, optimizer, steps: int = 3, scheduler=None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(TOKENS)
        nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got, expected, **tolerance) -> None:
    torch.testing.assert_close(got, expected, **({"rtol": 0, "atol": 0} | tolerance))


# --- parameter_groups -----------------------------------------------------------------


def test_parameter_groups_decay_matrices_only_and_each_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    model[2].weight = model[0].weight  # tied
    model[1].bias.requires_grad_(False)
    decay, plain = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decay["params"]] == [id(model[0].weight)]
    assert [id(p) for p in plain["params"]] == [id(model[1].weight), id(model[2].bias)]
    torch.optim.AdamW([decay, plain])


def test_parameter_groups_leave_out_an_empty_group():
    (only,) = parameter_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert only["weight_decay"] == 0.1


# --- all builders ---------------------------------------------------------------------


@needs_muon
@pytest.mark.parametrize("build", BUILDERS)
def test_each_optimizer_trains_decays_matrices_only_and_covers_every_parameter(build):
    model = Decoder()
    model.input.bias.requires_grad_(False)
    optimizer = build(model, 1e-2, 0.1)
    groups = optimizer.param_groups
    trainable = [p for p in model.parameters() if p.requires_grad]
    held = [p for group in groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trainable))
    for group in groups:
        assert group["lr"] == 1e-2
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)
    before = weights(model)
    train(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "input.bias"), name


@needs_muon
@pytest.mark.parametrize("build", BUILDERS)
def test_each_optimizer_resumes_bit_by_bit_under_a_schedule(build):
    def start():
        model = Decoder()
        optimizer = build(model, 1e-2, 0.1)
        factors = [0.1, 0.5, 1.0, 0.7, 0.4, 0.2, 0.1]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: factors[i])
        return {"model": model, "optimizer": optimizer, "schedule": schedule}

    whole = start()
    train(whole["model"], whole["optimizer"], 6, whole["schedule"])
    first = start()
    train(first["model"], first["optimizer"], 3, first["schedule"])
    stored = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in first.items()}, stored)
    stored.seek(0)
    second = start()
    train(second["model"], second["optimizer"], 1)  # has a state that must go
    for name, state in torch.load(stored, weights_only=True).items():
        second[name].load_state_dict(state)
    train(second["model"], second["optimizer"], 3, second["schedule"])
    assert_same(weights(second["model"]), weights(whole["model"]))
    got, expected = (run["optimizer"].state_dict() for run in (second, whole))
    assert_same(got["state"], expected["state"])
    assert got["param_groups"] == expected["param_groups"]


@needs_muon
@pytest.mark.parametrize("build", BUILDERS)
def test_each_optimizer_works_with_a_grad_scaler(build):
    plain, scaled = Decoder(), Decoder()
    train(plain, build(plain, 1e-2, 0.1), 2)
    optimizer = build(scaled, 1e-2, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        logits = scaled(TOKENS)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9  # one overflow, skipped
    assert_same(weights(scaled), weights(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [build_adamw, build_sgd])
def test_fused_kernels_are_chosen_where_they_exist(build):
    assert build(nn.Linear(2, 2), 0.1, 0.1).defaults["fused"] is True
    assert build(nn.Linear(2, 2, device="meta"), 0.1, 0.1).defaults["fused"] is None
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    optimizer = build(complex_model, 0.1, 0.0)
    complex_model(torch.ones(1, 2, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()


def test_adamw_equals_pytorchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11))
    reference = copy.deepcopy(model)
    train(model, build_adamw(model, 1e-2, 0.1))
    groups = parameter_groups(reference, 0.1)
    train(reference, torch.optim.AdamW(groups, lr=1e-2, foreach=False))
    assert_same(weights(model), weights(reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_nesterovs(momentum):
    """By hand: v = m v + g; w -= rate (g + m v)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = build_sgd(model, 0.1, 0.0, momentum)
    weight, velocity = 1.0, 0.0
    for _ in range(4):
        optimizer.zero_grad()
        model.weight.square().sum().backward()
        optimizer.step()
        gradient = 2 * weight
        velocity = momentum * velocity + gradient
        weight -= 0.1 * (gradient + momentum * velocity)
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_adafactor_keeps_rows_and_columns_only_and_its_step_is_relative():
    model = nn.Linear(64, 32, bias=False)
    big = copy.deepcopy(model)
    with torch.no_grad():
        big.weight.mul_(100)
    moved = []
    for each in (model, big):
        optimizer = build_adafactor(each, 1e-2, 0.0)
        each(torch.ones(1, 64)).square().sum().backward()
        before = each.weight.detach().clone()
        optimizer.step()
        moved.append(((each.weight - before).norm() / before.norm()).item())
        (state,) = optimizer.state.values()
        assert sum(t.numel() for t in state.values()) == 64 + 32 + 1
    assert moved == pytest.approx([1e-2, 1e-2], rel=1e-3)


# --- Muon -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_are_those_inside_of_blocks(tied):
    model = Decoder(tied)
    assert names_of(model, find_hidden_matrices(model)) == HIDDEN
    inner = find_hidden_matrices(model, blocks=[model.blocks[1].mlp])
    assert names_of(model, inner) == ["blocks.1.mlp.0.weight", "blocks.1.mlp.2.weight"]


def test_a_weight_that_is_tied_to_an_embedding_is_never_hidden():
    model = Decoder()
    model.blocks[0].lookup = nn.Embedding(16, 8)
    model.blocks[1].lookup = nn.Embedding(3, 8)
    model.blocks[0].mlp[0].weight = model.blocks[0].lookup.weight
    names = names_of(model, find_hidden_matrices(model))
    assert "blocks.0.mlp.0.weight" not in names
    assert not any("lookup" in name for name in names)
    assert len(names) == len(HIDDEN) - 1


def test_frozen_matrices_are_left_out():
    model = Decoder()
    model.blocks[0].requires_grad_(False)
    assert names_of(model, find_hidden_matrices(model)) == HIDDEN[4:]


def test_without_blocks_the_first_and_last_matrix_are_not_hidden():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert names_of(model, find_hidden_matrices(model)) == ["1.weight", "2.weight"]
    assert find_hidden_matrices(nn.Linear(3, 3)) == []


def test_what_the_model_calls_its_output_layer_is_not_hidden():
    class Named(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Dropout(), nn.Linear(8, 3)) for _ in range(2)
            )
            self.return_tuple = heads == "two"

        def get_classifier(self):
            return tuple(self.heads) if self.return_tuple else self.heads

    for heads in ("two", "one"):
        model = Named(heads)
        names = names_of(model, find_hidden_matrices(model))
        assert len(names) == len(HIDDEN)
        assert not any(name.startswith("heads") for name in names)


def test_hidden_matrices_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**small, tie_word_embeddings=False)
    gpt = transformers.GPT2LMHeadModel(config)
    names = names_of(gpt, find_hidden_matrices(gpt))
    assert len(names) == 2 * 4  # c_attn, c_proj, c_fc, c_proj: Conv1D, not nn.Linear
    assert all(name.startswith("transformer.h.") for name in names)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    bert = transformers.BertForSequenceClassification(config)
    names = names_of(bert, find_hidden_matrices(bert))
    assert len(names) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in names)


@needs_muon
def test_muon_equals_the_two_optimizers_apart():
    model, reference = Decoder(), Decoder()
    optimizer = build_muon(model, 1e-2, 0.1)
    assert isinstance(optimizer, MuonWithAdamW)
    train(model, optimizer, 4)
    hidden = find_hidden_matrices(reference)
    rest = [p for p in reference.parameters() if id(p) not in set(map(id, hidden))]
    muon = torch.optim.Muon(
        hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for _ in range(4):
        reference.zero_grad()
        logits = reference(TOKENS)
        nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        muon.step()
        adamw.step()
    assert_same(weights(model), weights(reference))


@needs_muon
def test_muon_orthogonalises_and_has_the_size_of_adamw():
    model = Decoder()
    matrix = model.blocks[0].mlp[0].weight
    before = matrix.detach().clone()
    optimizer = build_muon(model, 1e-2, 0.0)
    train(model, optimizer, 1)
    update = (matrix - before).detach() / 1e-2
    values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
    # All about 1 (arXiv:2502.16982), where the gradient's own span decades.
    assert values.max() < 1.5
    assert values.median() > 0.5


@needs_muon
def test_muon_takes_closures_more_parameters_and_copies():
    model = Decoder()
    optimizer = build_muon(model, 1e-2, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(TOKENS).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert len(optimizer.state) == len(list(model.parameters()))
    train(model, copy.deepcopy(optimizer), 1)  # shares nothing with the original
    assert all(
        state["step"] == 1 for state in optimizer.state.values() if "step" in state
    )


@needs_muon
def test_muon_without_hidden_matrices_says_so_and_is_adamw():
    lines = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_muon(model, 1e-2, 0.1, report=lines.append)
    assert type(optimizer) is torch.optim.AdamW
    (line,) = lines
    assert "Sequential has no matrices" in line
    only_hidden = nn.ModuleList(nn.Sequential(nn.Linear(2, 2, False)) for _ in range(2))
    assert type(build_muon(only_hidden, 1e-2, 0.1)) is torch.optim.Muon


def test_muon_on_an_old_torch_says_what_to_install(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match=r'pip install "torch>=2.9".*adamw'):
        build_muon(Decoder(), 1e-2, 0.1)
