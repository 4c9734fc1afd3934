"""The models: what they compute, that their blocks are found, that they compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from templates import builtin_models
from templates.builtin_models import (
    DecoderLM,
    ResidualImageNet,
    RMSNorm,
    SwiGLU,
    TabularMLP,
    TextClassifier,
    TextEmbedder,
    TransformerBlock,
    mean_over_tokens,
    rotary_angles,
    rotate_pairs,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape)


MODELS = {
    "DecoderLM": (lambda: DecoderLM(50, 32, 2, 2, 0.1), tokens(3, 7)),
    "TextClassifier": (lambda: TextClassifier(50, 4, 32, 2, 2, 0.1), tokens(3, 7)),
    "TextEmbedder": (lambda: TextEmbedder(50, 32, 2, 2, 0.1), tokens(3, 7)),
    "ResidualImageNet": (
        lambda: ResidualImageNet(4, (8, 16), 2, 0.1),
        torch.randn(3, 3, 17, 23),
    ),
    "TabularMLP": (
        lambda: TabularMLP(torch.zeros(5), torch.ones(5), 4, 16, 2, 0.1),
        torch.randn(3, 5),
    ),
}


@pytest.fixture(params=MODELS)
def model_and_batch(request):
    build, batch = MODELS[request.param]
    return build(), batch


def test_gradients_reach_every_parameter(model_and_batch):
    model, batch = model_and_batch
    model(batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_repeated_blocks_are_in_a_module_list(model_and_batch):
    model, _ = model_and_batch
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    assert len(lists) == 1
    assert len(lists[0]) >= 2
    in_blocks = sum(p.numel() for p in lists[0].parameters())
    assert in_blocks > sum(p.numel() for p in model.parameters()) / 2


def test_dropout_acts_in_training_only(model_and_batch):
    model, batch = model_and_batch
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_the_graph_is_whole(model_and_batch):
    """No control flow that depends on data, nothing that torch.compile cannot trace."""
    model, batch = model_and_batch
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(batch), model(batch), atol=1e-6)
    torch._dynamo.reset()


def test_it_runs_in_bfloat16_under_autocast_and_in_double(model_and_batch):
    model, batch = model_and_batch
    model.eval()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(batch).float() - exact).abs().max() < 0.1 * exact.abs().max()
    model.double()
    batch = batch.double() if batch.is_floating_point() else batch
    assert (model(batch) - exact).abs().max() < 1e-4 * exact.abs().max()


# --- The Transformer block -----------------------------------------------------------


def test_rotation_matches_complex_numbers():
    cos, sin = rotary_angles(6, 8, CPU)
    x = torch.randn(2, 6, 2, 3, 8, dtype=torch.float64)
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    frequency = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = torch.arange(6)[:, None] * frequency
    turned = as_complex * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(rotate_pairs(x, cos, sin), expected, atol=1e-6)


def test_rotated_products_depend_on_the_distance_alone():
    cos, sin = rotary_angles(40, 16, CPU)
    query, key = torch.randn(16), torch.randn(16)

    def product(i: int, j: int) -> float:
        turned = [
            rotate_pairs(vector, cos[at, 0, 0], sin[at, 0, 0])
            for vector, at in ((query, i), (key, j))
        ]
        return (turned[0] @ turned[1]).item()

    assert product(3, 1) == pytest.approx(product(37, 35), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-4)


def test_a_block_equals_its_formula():
    block = TransformerBlock(width=16, heads=2, dropout=0.0).double()
    nn.init.normal_(block.attention_norm.weight)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    cos, sin = rotary_angles(5, 8, CPU)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    normed = norm(x, block.attention_norm.weight)
    split = (normed @ block.attention.qkv.weight.T).view(2, 5, 3, 2, 8)
    query, key = (
        rotate_pairs(split[:, :, i : i + 1], cos, sin)[:, :, 0] for i in (0, 1)
    )
    scores = torch.einsum("bthd,bshd->bhts", query, key) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), split[:, :, 2])
    h = x + mixed.reshape(2, 5, 16) @ block.attention.out.weight.T
    gate, up = (norm(h, 1) @ block.mlp.gate_up.weight.T).chunk(2, -1)
    expected = h + (gate * gate.sigmoid() * up) @ block.mlp.down.weight.T
    assert torch.allclose(block(x, cos, sin), expected, atol=1e-12)


def test_the_gated_layer_is_as_large_as_a_plain_one_four_times_as_wide():
    for width in (128, 768, 2048):
        gated = sum(p.numel() for p in SwiGLU(width).parameters())
        assert 1 <= gated / (8 * width**2) < 1.15


def test_rms_norm_keeps_fp32_where_squares_leave_half_precision():
    norm = RMSNorm(4, eps=1e-6)
    x = torch.tensor([300.0, -300, 300, 300], dtype=torch.float16)  # 300^2 > 65504
    assert torch.allclose(norm(x), torch.tensor([1.0, -1, 1, 1]), atol=1e-3)
    assert norm.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match=r"width=30 must be a multiple of 2 \* heads"):
        TextEmbedder(50, 30, 1, 4)


# --- Language model ------------------------------------------------------------------


def test_a_token_does_not_see_those_after_it():
    model = DecoderLM(50, 32, 2, 2).eval()
    batch = tokens(2, 9)
    changed = batch.clone()
    changed[:, 6:] = tokens(2, 3)
    before, after = model(batch), model(changed)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-5)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-2)


def test_output_weights_are_tied_and_padded():
    model = DecoderLM(257, 32, 2, 2)
    assert model(tokens(1, 3)).shape == (1, 3, 320)
    names = [name for name, p in model.named_parameters() if 320 in p.shape]
    assert names == ["embed.weight"]


def test_it_starts_out_knowing_nothing():
    model = DecoderLM(1000, 64, 4, 4).eval()
    logits = model(torch.randint(0, 1000, (4, 32))).flatten(0, 1)
    loss = F.cross_entropy(logits, torch.randint(0, 1000, (128,)))
    assert loss.item() == pytest.approx(math.log(1024), abs=0.1)


def test_what_blocks_add_starts_out_smaller_in_deeper_models():
    for depth in (2, 8):
        model = DecoderLM(64, 128, depth, 4)
        for block in model.blocks:
            std = block.mlp.down.weight.std().item()
            assert std == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.05)
            assert block.mlp.gate_up.weight.std().item() == pytest.approx(
                0.02, rel=0.05
            )


def test_it_uses_the_causal_kernel_without_a_mask(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(builtin_models.F, "scaled_dot_product_attention", spy)
    DecoderLM(50, 32, 2, 2).eval()(tokens(2, 5))
    assert len(calls) == 2
    assert all(call["is_causal"] and call["attn_mask"] is None for call in calls)


# --- Text ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TextClassifier", "TextEmbedder"])
def test_padding_changes_nothing(name):
    model = MODELS[name][0]().eval()
    batch = tokens(3, 7)
    padded = F.pad(batch, (0, 4))
    assert torch.allclose(model(batch), model(padded), atol=1e-5)
    padded[0, 3:] = 0
    assert torch.allclose(model(padded)[0], model(batch[:1, :3])[0], atol=1e-5)


def test_a_row_of_padding_alone_is_finite():
    model = TextEmbedder(50, 32, 2, 2)
    vectors = model(torch.zeros(2, 3, dtype=torch.int64))
    vectors.sum().backward()
    assert vectors.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_word_order_counts():
    model = TextClassifier(50, 4, 32, 2, 2).eval()
    batch = tokens(1, 7)
    assert not torch.allclose(model(batch), model(batch.flip(1)), atol=1e-6)


def test_embeddings_have_length_one():
    vectors = TextEmbedder(50, 32, 2, 2)(tokens(3, 7))
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_the_mean_is_that_of_the_real_tokens():
    x = torch.randn(2, 3, 4)
    real = torch.tensor([[True, True, False], [False, False, False]])
    means = mean_over_tokens(x, real)
    assert torch.allclose(means[0], x[0, :2].mean(0), atol=1e-6)
    assert torch.equal(means[1], torch.zeros(4))


# --- Images and tables ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 16, 33, 224])
def test_images_of_any_size(size):
    model = ResidualImageNet(4, (16, 16, 16, 16, 16), 1).eval()
    sizes = []
    model.norm.register_forward_hook(lambda _m, args, _out: sizes.append(args[0].shape))
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 4)
    assert sizes[0][-1] == -(-size // 32)  # 224 pixels come to 7


def test_an_image_does_not_depend_on_its_batch():
    model = ResidualImageNet(4, (8, 16), 1)
    images = torch.randn(4, 3, 16, 16)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


def test_features_are_standardised_and_missing_ones_are_the_mean():
    mean, std = torch.tensor([5.0, -2.0, 7.0]), torch.tensor([10.0, 0.1, 0.0])
    model = TabularMLP(mean, std, 2, 16, 2).eval()
    plain = TabularMLP(torch.zeros(3), torch.ones(3), 2, 16, 2).eval()
    weights = {k: v for k, v in model.state_dict().items() if k not in ("mean", "std")}
    plain.load_state_dict(weights, strict=False)
    rows = torch.randn(6, 3) * std + mean
    scaled = torch.stack(
        [(rows[:, 0] - 5) / 10, (rows[:, 1] + 2) / 0.1, rows[:, 2] - 7]
    )
    assert torch.allclose(model(rows), plain(scaled.T), atol=1e-4)
    missing = rows.clone()
    missing[0, 1] = torch.nan
    rows[0, 1] = -2.0
    assert torch.equal(model(missing), model(rows))
    assert torch.equal(model.state_dict()["mean"], mean)
