"""Micro-batches that fit: gradients_apart and run_in_pieces."""

import random

import pytest
import torch
from torch import nn

from templates.error_handlers import train_with_oom_recovery
from templates.training_utils import gradients_apart, run_in_pieces


def noisy_model() -> nn.Module:
    """With all that a forward changes: dropout, BatchNorm's statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
    ).double()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def test_gradients_apart_add_up_as_backward_does():
    plain, apart = nn.Linear(3, 2), nn.Linear(3, 2)
    apart.load_state_dict(plain.state_dict())
    apart.unused = nn.Parameter(torch.ones(1))
    apart.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    for seed in range(3):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        plain(x).square().sum().backward()
        with gradients_apart(apart):
            assert apart.weight.grad is None
            apart(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, apart.weight.grad)
    assert torch.equal(plain.bias.grad, apart.bias.grad)
    assert apart.unused.grad is None


def test_gradients_apart_are_as_before_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for already in (False, True):
        if already:
            model(torch.ones(2, 3)).sum().backward()
        before = gradients_of(model)
        hook = model[1].weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(torch.OutOfMemoryError), gradients_apart(model):
            model(torch.ones(2, 3)).square().sum().backward()
        hook.remove()
        for name, gradient in gradients_of(model).items():
            if already:
                assert torch.equal(gradient, before[name])
            else:
                assert gradient is None


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_done_once_however_often_memory_runs_out(seed):
    """Random failures before and after the gradients; against the same pieces, calm."""
    draw = random.Random(seed).random
    x, y = torch.randn(13, 4).double(), torch.randn(13, 1).double()
    pieces: list[int] = []

    def train(model, batch, micro_batch, failing):
        torch.manual_seed(1)

        def work(inputs, targets):
            if failing and draw() < 0.3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            loss = (model(inputs) - targets).square().sum()
            loss.backward()
            if failing and draw() < 0.3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if failing:
                pieces.append(len(inputs))

        def recover(attempt, size, max_retries, on_retry):
            return train_with_oom_recovery(
                attempt,
                size,
                max_retries=max_retries,
                on_retry=on_retry,
                patience=10**6,
                report=lambda line: None,
            )

        return run_in_pieces(work, batch, micro_batch, recover, model=model)

    stormy, calm = noisy_model(), noisy_model()
    for model in (stormy, calm):  # a piece may be one sample: no BatchNorm
        model[1].eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)
        fitted = train(stormy, (x, y), 8, failing=True)
    assert sum(pieces) == 13
    assert fitted <= 8
    torch.manual_seed(1)
    for inputs, targets in zip(x.split(pieces), y.split(pieces), strict=True):
        (calm(inputs) - targets).square().sum().backward()
    for name, gradient in gradients_of(calm).items():
        assert torch.equal(gradient, gradients_of(stormy)[name]), name


def test_a_second_try_finds_buffers_and_gradients_as_the_first_did():
    stormy = noisy_model().train()
    x = torch.randn(24, 4).double()
    calls, moved = [], []

    def work(piece):
        stormy(piece).sum().backward()
        calls.append(len(piece))
        if len(calls) in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def move(piece):
        moved.append(len(piece[0]))
        return piece

    def recover(attempt, size, max_retries, on_retry):
        while True:
            try:
                return attempt(size)
            except torch.OutOfMemoryError:
                size //= 2
                on_retry(size)

    torch.manual_seed(1)
    fitted = run_in_pieces(work, (x,), 8, recover, move, stormy)
    assert calls == [8, 8, 4] + [2] * 8
    assert moved == calls
    assert fitted == 2
    assert stormy[1].num_batches_tracked == 9
    # The last piece of a batch is smaller, but not for want of memory.
    assert run_in_pieces(lambda piece: None, (x[:13],), 8, recover) == 8
    with pytest.raises(ZeroDivisionError):
        run_in_pieces(lambda piece: 1 / 0, (x,), 4, recover, move, stormy)
    empty = []
    assert (
        run_in_pieces(lambda piece: empty.append(len(piece)), (x[:0],), 4, recover) == 4
    )
    assert empty == [0]
