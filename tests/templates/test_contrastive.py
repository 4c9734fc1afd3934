"""Contrastive loss, gradient caching, recall."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from templates import contrastive
from templates.contrastive import (
    accumulate_contrastive_gradients,
    contrastive_loss,
    evaluate_embeddings,
    recall_at_k,
)


def pairs(count: int = 10, width: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, count, width, generator=generator, dtype=dtype)
    return x[0], x[1]


def make_model(dropout: float = 0.0, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)
    ).to(dtype)


def encode_with(model):
    return lambda pair: (model(pair[0]), model(pair[1]))


def cut(x, y, size: int) -> list:
    return list(zip(x.split(size), y.split(size), strict=True))


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def largest_difference(got, expected) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))


# --- contrastive_loss -----------------------------------------------------------------


def test_loss_is_the_mean_negative_log_probability_of_both_directions():
    queries, documents = pairs(5)
    expected = 0.0
    unit = [[row / row.norm() for row in x] for x in (queries, documents)]
    for a, b in (unit, unit[::-1]):
        for i, row in enumerate(a):
            scores = [math.exp((row @ other).item() / 0.07) for other in b]
            expected -= math.log(scores[i] / sum(scores)) / (2 * len(a))
    assert contrastive_loss(queries, documents, 0.07).item() == pytest.approx(expected)
    longer = contrastive_loss(queries * 7, documents / 3, 0.07)
    assert longer.item() == pytest.approx(expected)


def test_loss_of_embeddings_that_say_nothing_is_log_b():
    same = torch.ones(8, 3)
    assert contrastive_loss(same, same).item() == pytest.approx(math.log(8))
    assert contrastive_loss(torch.eye(8), torch.eye(8), 0.01).item() < 1e-6


def test_loss_is_computed_in_fp32_under_autocast():
    queries, documents = pairs(16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = contrastive_loss(queries.bfloat16(), documents.bfloat16(), 0.01)
    rounded = queries.bfloat16().double(), documents.bfloat16().double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), contrastive_loss(*rounded, 0.01))


def test_temperature_can_be_learned():
    scale = torch.tensor(0.1, requires_grad=True)
    contrastive_loss(*pairs(), scale).backward()
    assert scale.grad != 0


@pytest.mark.parametrize(("a", "b"), [((3, 2), (4, 2)), ((3, 2), (3, 1)), ((3,), (3,))])
def test_loss_refuses_rows_that_do_not_match(a, b):
    with pytest.raises(ValueError, match="row by row"):
        contrastive_loss(torch.ones(a), torch.ones(b))


# --- accumulate_contrastive_gradients -------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
def test_gradients_are_those_of_the_whole_batch(size):
    queries, documents = pairs()
    model, reference = make_model(), make_model()
    expected_loss = contrastive_loss(reference(queries), reference(documents))
    expected_loss.backward()
    loss = accumulate_contrastive_gradients(
        encode_with(model), cut(queries, documents, size)
    )
    assert not loss.requires_grad
    assert abs(loss - expected_loss) < 1e-12
    assert largest_difference(gradients(model), gradients(reference)) < 1e-12


def test_gradients_add_to_what_is_there():
    queries, documents = pairs()
    model = make_model()
    for _ in range(2):
        accumulate_contrastive_gradients(encode_with(model), cut(queries, documents, 4))
    twice = gradients(model)
    model.zero_grad()
    accumulate_contrastive_gradients(encode_with(model), cut(queries, documents, 4))
    assert largest_difference(twice, [2 * g for g in gradients(model)]) < 1e-12


def test_dropout_is_the_same_in_both_passes_and_differs_between_micro_batches():
    queries, documents = pairs()
    model, reference = make_model(0.5), make_model(0.5)
    pieces = cut(queries, documents, 4)
    torch.manual_seed(11)
    embedded = [encode_with(reference)(piece) for piece in pieces]  # one graph for all
    after = torch.rand(1)
    contrastive_loss(*map(torch.cat, zip(*embedded, strict=True))).backward()
    torch.manual_seed(11)
    accumulate_contrastive_gradients(encode_with(model), pieces)
    assert torch.equal(torch.rand(1), after)
    assert largest_difference(gradients(model), gradients(reference)) < 1e-12
    other = make_model(0.5)
    torch.manual_seed(12)
    accumulate_contrastive_gradients(encode_with(other), pieces)
    assert largest_difference(gradients(other), gradients(model)) > 1e-3


def test_only_one_micro_batch_is_kept_for_backward():
    queries, documents = pairs(64)
    model = make_model()

    def kept_values(run) -> int:
        live, most = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal live, most
                self.tensor = tensor
                live += tensor.numel()
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            run()
        return most

    def encode_only(size):
        pieces = cut(queries, documents, size)
        loss = lambda q, d: (q * d).sum()  # noqa: E731
        accumulate_contrastive_gradients(encode_with(model), pieces, loss)

    assert (
        kept_values(partial(encode_only, 4)) < kept_values(lambda: encode_only(64)) / 4
    )


@pytest.mark.parametrize("outside", [False, True])
def test_gradients_under_autocast(outside):
    """Autocast around both passes must not reuse weights that carry no gradient."""
    queries, documents = pairs(dtype=torch.float32)
    model, reference = (make_model(dtype=torch.float32) for _ in range(2))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast():
        embedded = reference(queries), reference(documents)
        contrastive_loss(*embedded).backward()

    def encode(pair):
        if outside:
            return encode_with(model)(pair)
        with autocast():
            return encode_with(model)(pair)

    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        accumulate_contrastive_gradients(encode, cut(queries, documents, 5))
    expected = gradients(reference)
    scale = max(g.abs().max().item() for g in expected)
    assert largest_difference(gradients(model), expected) < 0.02 * scale


def test_a_scaler_scales_once():
    queries, documents = pairs()
    model, reference = make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    pieces = cut(queries, documents, 4)
    accumulate_contrastive_gradients(encode_with(reference), pieces)
    loss = accumulate_contrastive_gradients(
        encode_with(model), pieces, backward=lambda x: scaler.scale(x * 2).backward()
    )
    expected = [g * 2 * 2.0**7 for g in gradients(reference)]
    assert largest_difference(gradients(model), expected) < 1e-12
    reference_loss = contrastive_loss(reference(queries), reference(documents))
    assert loss.item() == pytest.approx(reference_loss.item())  # neither scaled


def test_gathered_rows_are_negatives_too():
    """As if of a second rank, as constants: gradients are those of the joint loss."""
    queries, documents = pairs()
    model, reference = make_model(), make_model()
    encode = encode_with(model)
    with torch.no_grad():
        others = dict(zip("qd", encode((queries[6:], documents[6:])), strict=True))
    sides = iter("qd")
    gather = lambda x: torch.cat([x, others[next(sides)]])  # noqa: E731
    accumulate_contrastive_gradients(
        encode, cut(queries[:6], documents[:6], 4), gather=gather
    )
    rows = [
        torch.cat([reference(x[:6]), other])
        for x, other in zip((queries, documents), others.values(), strict=True)
    ]
    contrastive_loss(*rows).backward()
    assert largest_difference(gradients(model), gradients(reference)) < 1e-12


def test_gradients_are_exchanged_in_the_last_micro_batch_only():
    seen = []
    model = make_model()

    def encode(pair):
        seen.append(f"forward{len(pair[0])}")
        return encode_with(model)(pair)

    accumulate_contrastive_gradients(
        encode, cut(*pairs(), 4), set_sync=lambda sync: seen.append(sync)
    )
    first = ["forward4", "forward4", "forward2"]
    second = [False, "forward4", False, "forward4", True, "forward2"]
    assert seen == first + second


@pytest.mark.parametrize("fails_at", [1, 3, 5])
def test_it_can_be_called_again_after_out_of_memory(fails_at):
    queries, documents = pairs()
    model, reference = make_model(), make_model()
    accumulate_contrastive_gradients(encode_with(reference), [(queries, documents)])
    calls = 0

    def encode(pair):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise torch.OutOfMemoryError("injected")
        return encode_with(model)(pair)

    with pytest.raises(torch.OutOfMemoryError):
        accumulate_contrastive_gradients(encode, cut(queries, documents, 4))
    model.zero_grad()
    accumulate_contrastive_gradients(encode, cut(queries, documents, 2))
    assert largest_difference(gradients(model), gradients(reference)) < 1e-12


def test_the_gpus_generator_is_set_back_too(monkeypatch):
    """With a fake CUDA generator that counts: its state is what encode draws from."""
    state = 0

    def set_state(value):
        nonlocal state
        state = value

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
    model, drawn = make_model(), []

    def encode(pair):
        drawn.append(state)
        set_state(state + 1)
        return encode_with(model)(pair)

    accumulate_contrastive_gradients(encode, cut(*pairs(), 4))
    assert drawn == [0, 1, 2, 0, 1, 2]
    assert state == 3


# --- recall_at_k ----------------------------------------------------------------------


def test_recall_equals_topk():
    queries, documents = pairs(300, 5)
    documents = documents + queries
    scores = nn.functional.cosine_similarity(queries[:, None], documents[None], dim=-1)
    for chunk in (contrastive.SCORES_AT_ONCE, 300, 7 * 300 + 1, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contrastive, "SCORES_AT_ONCE", chunk)
            got = recall_at_k(queries, documents, ks=(1, 3, 300, 1000))
        for k in (1, 3, 300):
            best = scores.topk(k).indices
            hits = (best == torch.arange(300)[:, None]).any(1).double().mean().item()
            assert got[f"recall@{k}"] == pytest.approx(hits)
        assert got["recall@1000"] == 1.0
        assert 0 < got["recall@1"] < got["recall@3"] < 1


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_recall_of_embeddings_that_are_all_alike_is_0(value):
    same = torch.full((20, 3), value)
    assert recall_at_k(same, same, (1, 19)) == {"recall@1": 0.0, "recall@19": 0.0}


def test_recall_holds_a_bounded_number_of_scores(monkeypatch):
    monkeypatch.setattr(contrastive, "SCORES_AT_ONCE", 5 * 40)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    queries, documents = pairs(40, 3)
    with Watch():
        recall_at_k(queries, documents)
    assert largest == 5 * 40


def test_recall_refuses_what_cannot_be():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"ks=\[0\]"):
        recall_at_k(x, x, (0,))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 2\)"):
        recall_at_k(x, x[:2])
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        recall_at_k(x[:0], x[:0])


def test_training_finds_the_pairs():
    queries, documents = pairs(40, dtype=torch.float32)
    documents = queries @ torch.linalg.qr(torch.randn(6, 6))[0] + 0.01 * documents
    towers = nn.ModuleList([make_model(dtype=torch.float32), nn.Linear(6, 4)])
    untrained = copy.deepcopy(towers)
    optimizer = torch.optim.Adam(towers.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        accumulate_contrastive_gradients(
            lambda pair: (towers[0](pair[0]), towers[1](pair[1])),
            cut(queries, documents, 15),
        )
        optimizer.step()
    before, after = (
        recall_at_k(a(queries), b(documents))["recall@1"]
        for a, b in (untrained, towers)
    )
    assert before < 0.2
    assert after > 0.8


def test_evaluation_in_pieces_is_that_of_whole_batches():
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    model.scale = 3.0  # read by the loss
    batches = [(torch.randn(n, 6).double(), torch.randn(n, 6).double()) for n in (8, 5)]
    sizes = []
    model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))

    def compute_loss(model, queries, documents):
        queries, documents = (
            nn.functional.normalize(model(x), dim=-1) for x in (queries, documents)
        )
        loss = contrastive_loss(queries, documents, 1 / model.scale)
        return loss, (queries, documents)

    def evaluate(**options):
        return evaluate_embeddings(model, batches, compute_loss, ks=(1, 3), **options)

    whole = evaluate()
    assert set(sizes) == {8, 5}
    sizes.clear()
    assert evaluate(split=lambda x: x.split(3)) == pytest.approx(whole, abs=1e-12)
    assert max(sizes) == 3
    batches.append((torch.empty(0, 6).double(), torch.empty(0, 6).double()))
    evaluate(split=lambda x: iter(x.split(3)[: len(x)]))  # nothing to cut
