"""ModelEMA: the average, its state, and swapping it into the model."""

import copy
import io

import pytest
import torch
from torch import nn

from templates.training_utils import ModelEMA


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def train_a_bit(model: nn.Module, steps: int = 1) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def assert_equal(got, expected, **tolerance) -> None:
    torch.testing.assert_close(got, expected, **({"rtol": 0, "atol": 0} | tolerance))


def test_average_equals_pytorchs_averaged_model():
    model = make_model()
    ema = ModelEMA(model, decay=0.9)
    reference = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    reference.update_parameters(model)  # its first update copies
    for _ in range(5):
        train_a_bit(model)
        ema.update(model)
        reference.update_parameters(model)
    got = dict(ema.ema_model.named_parameters())
    assert_equal(got, dict(reference.module.named_parameters()))
    assert ema.updates == 5
    assert all(not p.requires_grad for p in ema.ema_model.parameters())
    assert not ema.ema_model.training


def test_buffers_are_copied_integers_too():
    model = make_model()
    ema = ModelEMA(model)
    train_a_bit(model, 3)
    ema.update(model)
    assert_equal(dict(ema.ema_model.named_buffers()), dict(model.named_buffers()))
    assert ema.ema_model[1].num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_a_half_precision_model_moves_in_fp32(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    model[1].float()  # mixed models are usual
    ema = ModelEMA(model, decay=0.999)
    start = ema.ema_model[0].weight.clone()
    assert start.dtype == torch.float32
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].weight.add_(1.0)
    for _ in range(10):
        ema.update(model)
    moved = 1 - 0.999**10
    distance = model[0].weight.float() - start
    torch.testing.assert_close(ema.ema_model[0].weight - start, distance * moved)
    torch.testing.assert_close(ema.ema_model[1].weight, torch.full((3,), 1 + moved))
    assert model[0].weight.dtype == dtype


def test_double_precision_is_kept():
    assert ModelEMA(nn.Linear(2, 2).double()).ema_model.weight.dtype == torch.float64


def test_tied_weights_stay_tied_and_move_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ema = ModelEMA(model, decay=0.5)
    before = ema.ema_model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.update(model)
    assert ema.ema_model[0].weight is ema.ema_model[1].weight
    torch.testing.assert_close(ema.ema_model[0].weight, before + 0.5)


def test_tensors_that_were_replaced_are_followed():
    model = make_model()
    ema = ModelEMA(model, decay=0.0)  # each update copies
    ema.update(model)
    other = make_model(seed=1)
    train_a_bit(other, 2)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    ema.update(model)
    assert_equal(ema.ema_model.state_dict(), other.state_dict())
    model.to(torch.float64).to(torch.float32)  # puts new buffers in place
    train_a_bit(model, 2)
    ema.update(model)
    assert_equal(ema.ema_model.state_dict(), model.state_dict())
    ema.ema_model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    ema.update(model)
    assert_equal(ema.ema_model.state_dict(), model.state_dict())
    model.bfloat16()
    ema.update(model)
    assert_equal(ema.ema_model[0].weight, model[0].weight.float())


def test_update_from_another_copy_of_the_model():
    model = make_model()
    ema = ModelEMA(model, decay=0.0)
    ema.update(model)
    twin = copy.deepcopy(model)
    train_a_bit(twin)
    ema.update(twin)
    assert_equal(ema.ema_model.state_dict(), twin.state_dict())


def test_update_refuses_another_model():
    model = make_model()
    ema = ModelEMA(model)
    wrapper = nn.Module()
    wrapper.module = model
    with pytest.raises(ValueError, match=r"not the one that is averaged.*of DDP"):
        ema.update(wrapper)


@pytest.mark.parametrize("warmup", [False, True])
def test_state_continues_bit_by_bit(warmup):
    def run(interrupted: bool):
        other = make_model(seed=9)
        model = make_model()
        ema = ModelEMA(model, 0.99, warmup)
        for step in range(6):
            train_a_bit(model)
            ema.update(model)
            if interrupted and step == 2:
                stored = io.BytesIO()
                torch.save(ema.state_dict(), stored)
                stored.seek(0)
                ema = ModelEMA(other, 0.99, warmup)
                ema.update(other)  # has its lists from before loading
                ema.load_state_dict(torch.load(stored, weights_only=True))
        return ema.state_dict()

    assert_equal(run(True), run(False))


def test_warmup_moves_fast_at_first():
    model = nn.Linear(1, 1, bias=False)
    ema = ModelEMA(model, decay=0.3, warmup=True)
    decays = []
    for _ in range(5):
        before = ema.ema_model.weight.item()
        with torch.no_grad():
            model.weight.copy_(before + 1.0)
        ema.update(model)
        decays.append(1 - (ema.ema_model.weight.item() - before))
    assert decays == pytest.approx([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_in_evaluates_the_average_and_restores_every_bit(dtype):
    model = make_model().to(dtype)
    ema = ModelEMA(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model[1].running_mean.fill_(3.0)
    ema.update(model)
    model[1].running_mean.fill_(4.0)
    own = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    averages = copy.deepcopy(ema.ema_model.state_dict())
    model.eval()
    x = torch.randn(5, 4).to(dtype)
    with ema.swapped_in(model):
        expected = {k: v.to(own[k].dtype) for k, v in averages.items()}
        assert_equal(model.state_dict(), expected)
        if dtype == torch.float32:
            assert torch.equal(model(x), ema(x))
    assert_equal(model.state_dict(), own)
    assert_equal(ema.ema_model.state_dict(), averages)
    # In place: a captured CUDA graph or a DDP bucket still sees the weights.
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.requires_grad for p in model.parameters())


def test_swapped_in_restores_after_an_error_and_in_inference_mode():
    model = make_model()
    ema = ModelEMA(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    own = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError, match="mine"), ema.swapped_in(model):
        raise KeyError("mine")
    assert_equal(model.state_dict(), own)
    with torch.inference_mode(), ema.swapped_in(model):
        model.eval()(torch.randn(2, 4))
    assert_equal(model.state_dict(), own)
    train_a_bit(model)  # the weights are still ordinary, trainable tensors


def test_forward_and_call_run_the_average():
    ema = ModelEMA(make_model())
    x = torch.randn(3, 4)
    assert torch.equal(ema(x), ema.ema_model(x))
    assert torch.equal(ema.forward(x), ema.ema_model(x))


def test_models_without_parameters_or_buffers():
    empty = ModelEMA(nn.ReLU())
    empty.update(nn.ReLU())
    frozen = nn.Linear(2, 2)
    frozen.weight = nn.Parameter(
        torch.ones(2, 2, dtype=torch.int8), requires_grad=False
    )
    ema = ModelEMA(frozen)
    frozen.weight.data.fill_(7)
    ema.update(frozen)
    assert_equal(ema.ema_model.weight.data, torch.full((2, 2), 7, dtype=torch.int8))


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        ModelEMA(nn.Linear(1, 1), decay)


@pytest.mark.gpu
def test_average_on_a_real_gpu_never_waits():
    model = make_model().cuda().bfloat16()
    ema = ModelEMA(model, decay=0.5)
    ema.update(model)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(model)
        with ema.swapped_in(model):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
