"""Seeds, schedules, early stopping, batches, optimizer steps, mixed precision."""

import math
import os
import random
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from templates.training_utils import (
    EarlyStopping,
    MixedPrecisionTrainer,
    NonFiniteError,
    check_finite,
    clear_gradients,
    count_right,
    evaluate_model,
    get_cosine_warmup_scheduler,
    get_linear_warmup_scheduler,
    get_onecycle_warmup_scheduler,
    get_wsd_warmup_scheduler,
    gradients_are_finite,
    is_better,
    set_seed,
    split_batch,
    split_batches,
    split_evenly,
    step_optimizer,
    train_step_with_clipping,
)

OVERFLOW = 1e36  # times the initial loss scale, 65536, this is more than fp32 holds


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def device_manager(dtype: torch.dtype, device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def scaler_on(device: str = "cpu") -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device)


# --- set_seed -------------------------------------------------------------------------


@pytest.fixture
def restored_determinism(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    yield
    cudnn.deterministic, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("restored_determinism")
def test_set_seed_repeats_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    set_seed(7)
    first = draw()
    assert draw() != first
    set_seed(7)
    assert draw() == first
    set_seed(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.usefixtures("restored_determinism")
@pytest.mark.parametrize("seed", [-1, 2**32 + 5, 2**63])
def test_set_seed_takes_seeds_that_numpy_refuses(seed):
    set_seed(seed)
    first = np.random.rand()
    set_seed(seed)
    assert np.random.rand() == first


def test_set_seed_without_deterministic_kernels_does_not_load_the_compiler():
    code = (
        "import sys; from templates.training_utils import set_seed;"
        "set_seed(1, deterministic=False); assert 'torch._dynamo' not in sys.modules"
    )
    folder = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@pytest.mark.usefixtures("restored_determinism")
def test_set_seed_sets_the_cublas_workspace_before_it_touches_cuda(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch,
        "manual_seed",
        lambda seed: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")),
    )
    set_seed(0)
    assert seen == [":4096:8"]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"  # the user's own choice stays
    set_seed(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("restored_determinism")
def test_set_seed_without_determinism_takes_the_switches_back():
    set_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    set_seed(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("restored_determinism")
def test_set_seed_works_without_numpy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    set_seed(3)


# --- schedules ------------------------------------------------------------------------

TO_ZERO = [
    get_linear_warmup_scheduler,
    get_cosine_warmup_scheduler,
    get_wsd_warmup_scheduler,
]
SCHEDULES = [*TO_ZERO, get_onecycle_warmup_scheduler]


def rates(get_scheduler, warmup: int, total: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = get_scheduler(optimizer, warmup, total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("get_scheduler", SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 1), (0, 7), (1, 1), (2, 6), (5, 5), (6, 5), (9, 3)]
)
def test_schedules_start_above_zero_and_never_rise_again(get_scheduler, warmup, total):
    seen = rates(get_scheduler, warmup, total, 3 * total + 4)
    assert seen[0] > 0
    assert all(rate > 0 for rate in seen[:total])  # no step of the training is wasted
    peak = seen.index(max(seen))
    assert all(a >= b for a, b in zip(seen[peak:], seen[peak + 1 :], strict=False))
    end = 0.0 if get_scheduler in TO_ZERO else pytest.approx(4e-6)
    assert seen[total:] == [end] * len(seen[total:])
    if warmup <= total and (get_scheduler in TO_ZERO or warmup < total):
        assert max(seen) == 1.0


def test_linear_schedule_gives_the_documented_factors():
    assert rates(get_linear_warmup_scheduler, 2, 6, 8) == pytest.approx(
        [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    )
    assert rates(get_linear_warmup_scheduler, 4, 2, 3) == [0.25, 0.5, 0]


def test_cosine_schedule_equals_pytorchs_after_warmup():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    got = rates(get_cosine_warmup_scheduler, 3, 13, 13)
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert got[3:] == pytest.approx(expected)


def test_wsd_schedule_gives_the_documented_factors():
    assert rates(get_wsd_warmup_scheduler, 2, 10, 12) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0, 0]
    )


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.75, 1.0])
@pytest.mark.parametrize("warmup", [0, 3, 35])
def test_wsd_schedule_is_the_closed_form(warmup, fraction):
    def get_scheduler(optimizer, warmup, total):
        return get_wsd_warmup_scheduler(optimizer, warmup, total, fraction)

    total = 40
    decay_steps = min(fraction * total, total - warmup)
    expected = [
        (step + 1) / warmup if step < warmup else min(1, (total - step) / decay_steps)
        for step in range(total)
    ]
    assert rates(get_scheduler, warmup, total, total) == pytest.approx(expected)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_wsd_schedule_refuses_an_impossible_fraction(fraction):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=f"decay_fraction={fraction}"):
        get_wsd_warmup_scheduler(optimizer, 1, 10, fraction)


@pytest.mark.parametrize(("warmup", "total"), [(3, 10), (1, 8), (9, 30), (19, 20)])
def test_onecycle_schedule_equals_pytorchs_until_its_end(warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=total + 1,
        pct_start=(warmup + 1) / (total + 1),
        cycle_momentum=False,
    )
    expected = [reference.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        reference.step()
        expected.append(reference.get_last_lr()[0])
    got = rates(get_onecycle_warmup_scheduler, warmup, total, total + 5)
    assert got[: total + 1] == pytest.approx(expected)
    assert got[total:] == [got[total]] * 5  # PyTorch's raises here


@pytest.mark.parametrize("get_scheduler", SCHEDULES)
def test_schedules_resume_from_their_state(get_scheduler):
    def build():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        return optimizer, get_scheduler(optimizer, 3, 9)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = build()
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(4):
        for o, s in ((optimizer, scheduler), (resumed_optimizer, resumed)):
            o.step()
            s.step()
        assert resumed.get_last_lr() == scheduler.get_last_lr()
        assert resumed_optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


@pytest.mark.parametrize("get_scheduler", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(-1, 5), (0, 0)])
def test_schedules_refuse_impossible_steps(get_scheduler, warmup, total):
    with pytest.raises(ValueError, match=f"warmup_steps={warmup}.*total_steps={total}"):
        rates(get_scheduler, warmup, total, 1)


# --- EarlyStopping --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "scores"), [("min", [3, 2, 2, 1.95, 1]), ("max", [1, 2, 2, 2.05, 3])]
)
def test_early_stopping_counts_calls_without_improvement(mode, scores):
    stopping = EarlyStopping(patience=2, min_delta=0.1, mode=mode)
    stops, counts, improved = [], [], []
    for score in scores:
        stops.append(stopping(score))
        counts.append(stopping.counter)
        improved.append(stopping.improved)
    assert stops == [False, False, False, True, False]
    assert counts == [0, 0, 1, 2, 0]
    assert improved == [True, True, False, False, True]
    assert stopping.best_score == scores[-1]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_is_not_fooled_by_nan(mode):
    stopping = EarlyStopping(patience=2, mode=mode)
    assert not stopping(math.nan)  # a NaN first score is no best score
    assert stopping.best_score is None
    assert stopping.counter == 1
    assert not stopping(1.0)
    assert stopping.best_score == 1.0
    assert stopping.counter == 0
    assert not stopping(math.nan)
    assert stopping(math.nan)
    assert stopping.should_stop
    assert stopping.best_score == 1.0


def test_early_stopping_takes_tensors_and_keeps_plain_numbers():
    stopping = EarlyStopping(patience=1)
    stopping(torch.tensor(0.5))
    assert type(stopping.best_score) is float
    assert stopping(torch.tensor(0.5))


def test_early_stopping_continues_from_its_state():
    scores = [3.0, math.nan, 2.0, 2.5, 2.4, 2.3, 2.2]
    whole = EarlyStopping(patience=4)
    expected = [whole(score) for score in scores]
    first = EarlyStopping(patience=4)
    got = [first(score) for score in scores[:3]]  # the last is a new best
    state = first.state_dict()
    assert all(type(v) in (float, int, bool, type(None)) for v in state.values())
    second = EarlyStopping(patience=4)
    second.load_state_dict(state)
    assert second.improved
    got += [second(score) for score in scores[3:]]
    assert got == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"mode": "auto"}, "mode='auto'"),
        ({"patience": 0}, "patience=0"),
        ({"min_delta": -1}, "min_delta=-1"),
    ],
)
def test_early_stopping_refuses_what_cannot_be(kwargs, named):
    with pytest.raises(ValueError, match=named):
        EarlyStopping(**kwargs)


# --- values that are not finite ------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite_names_what_is_not(bad):
    model = make_model()
    model(torch.ones(3, 4)).sum().backward()
    check_finite(torch.tensor(0.5), model, 3)
    check_finite(0.5, model, 3)
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is (nan|-?inf)") as e:
        check_finite(torch.tensor(bad), model, 3)
    assert "Parameters that are not finite: none. Gradients: none." in str(e.value)
    with torch.no_grad():
        model[2].weight[0, :2] = bad
        model[0].weight.grad[1, 1] = bad
    with pytest.raises(NonFiniteError) as e:
        check_finite(0.5, model, 120)
    for word in (
        "step 120",
        "2.weight (2 of 16 values)",
        "0.weight (1 of 32 values)",
        "learning rate",
        "warm-up",
        "--clip",
        "bf16",
        "rows",
        "--skip-nonfinite",
    ):
        assert word in str(e.value)
    assert "0.bias" not in str(e.value)


def test_check_finite_names_the_first_few_only():
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(5)))
    for p in model.parameters():
        nn.init.constant_(p, math.nan)
    with pytest.raises(NonFiniteError, match=r"0\.weight.*2\.weight.* and 2 more\."):
        check_finite(1.0, model, 1)


def test_overflowed_gradients_are_no_error_for_a_scaler_skips_them():
    model = make_model()
    model(torch.ones(3, 4)).sum().backward()
    model[0].bias.grad[0] = math.inf
    check_finite(1.0, model, 1)
    assert not gradients_are_finite(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_finite_sees_every_value_and_never_overflows(dtype):
    model = make_model().to(dtype)
    assert gradients_are_finite(model)  # there are none yet
    model(torch.ones(3, 4, dtype=dtype)).sum().backward()
    model[2].bias.grad = None
    largest = torch.finfo(torch.float32).max
    model[0].weight.grad.fill_(largest * 0.9)  # its sum of squares is infinite
    assert gradients_are_finite(model)
    for bad in (math.nan, math.inf, -math.inf):
        model[2].weight.grad[1, 3] = bad
        assert not gradients_are_finite(model)
        model[2].weight.grad[1, 3] = 0


def test_gradients_are_finite_takes_sparse_and_empty_ones():
    model = nn.Sequential(nn.Embedding(6, 2, sparse=True), nn.Linear(2, 2))
    model[0](torch.tensor([1, 1, 4])).sum().backward()
    model[1].weight = nn.Parameter(torch.zeros(0, 2))
    model[1].weight.grad = torch.zeros(0, 2)
    assert gradients_are_finite(model)
    model[0].weight.grad._values()[0] = math.nan
    assert not gradients_are_finite(model)


def test_gradients_are_finite_waits_once(monkeypatch):
    model = make_model()
    model(torch.ones(3, 4)).sum().backward()
    waits = []
    read = torch.Tensor.__bool__
    monkeypatch.setattr(
        torch.Tensor, "__bool__", lambda self: waits.append(1) or read(self)
    )
    assert gradients_are_finite(model)
    assert len(waits) == 1


# --- split_batch ----------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


def joined(parts):
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("micro", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (99, [10])]
)
def test_split_batch_covers_every_sample_once(micro, sizes):
    x, y = torch.arange(20).view(10, 2), torch.arange(10)
    for batch, get_x, get_y in [
        ((x, y), lambda b: b[0], lambda b: b[1]),
        ([x, y], lambda b: b[0], lambda b: b[1]),
        ({"x": x, "y": y}, lambda b: b["x"], lambda b: b["y"]),
        (({"x": x}, y), lambda b: b[0]["x"], lambda b: b[1]),
        (Pair(x, y), lambda b: b.x, lambda b: b.y),
    ]:
        pieces = list(split_batch(batch, micro))
        assert [len(get_y(p)) for p in pieces] == sizes
        assert all(type(p) is type(batch) for p in pieces)
        assert torch.equal(joined([get_x(p) for p in pieces]), x)
        assert torch.equal(joined([get_y(p) for p in pieces]), y)


def test_split_batches_keeps_an_empty_share():
    """With more ranks than rows of validation data one rank has none."""
    batches = [torch.arange(5), torch.arange(0), torch.arange(2)]
    pieces = split_batches(batches, 2)
    assert [piece.tolist() for piece in pieces] == [[0, 1], [2, 3], [4], [], [0, 1]]


def test_split_batch_gives_views_of_a_plain_tensor():
    x = torch.zeros(6, 2)
    pieces = list(split_batch(x, 4))
    assert [p.data_ptr() for p in pieces] == [x.data_ptr(), x[4:].data_ptr()]


def test_split_batch_refuses_before_the_first_piece():
    x = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="micro_batch=0"):
        split_batch(x, 0)
    with pytest.raises(ValueError, match="'3', '4'"):
        split_batch((x, torch.zeros(3)), 2)
    with pytest.raises(ValueError, match="every tensor needs"):
        split_batch((x, torch.tensor(1.0)), 2)
    with pytest.raises(ValueError, match="every tensor needs"):
        split_batch([], 2)
    with pytest.raises(TypeError, match="str"):
        split_batch((x, ["a", "b", "c", "d"]), 2)


@pytest.mark.parametrize(
    ("pieces", "sizes"), [(1, [10]), (3, [4, 3, 3]), (4, [3, 2, 3, 2]), (10, [1] * 10)]
)
def test_split_evenly_gives_as_many_pieces_as_were_asked_for(pieces, sizes):
    x, y = torch.arange(20).view(10, 2), torch.arange(10)
    parts = list(split_evenly({"x": x, "y": y}, pieces))
    assert [len(part["y"]) for part in parts] == sizes
    assert torch.equal(joined([part["x"] for part in parts]), x)
    assert torch.equal(joined([part["y"] for part in parts]), y)


def test_split_evenly_refuses_before_the_first_piece():
    x = torch.zeros(4, 1)
    for pieces in (0, 5):
        with pytest.raises(ValueError, match=f"pieces={pieces}: a batch of 4 has 1 to"):
            split_evenly(x, pieces)
    with pytest.raises(ValueError, match="'3', '4'"):
        split_evenly((x, torch.zeros(3)), 2)
    with pytest.raises(ValueError, match="every tensor needs"):
        split_evenly((torch.tensor(1.0), x), 2)
    with pytest.raises(ValueError, match="every tensor needs"):
        split_evenly([], 2)


# --- evaluation -----------------------------------------------------------------------


def cross_entropy_of(model, inputs, targets):
    outputs = model(inputs)
    return nn.functional.cross_entropy(outputs, targets), outputs


def count_real(targets):
    return (targets != -100).sum()


@pytest.mark.parametrize("count_targets", [len, count_real])
@pytest.mark.parametrize("sizes", [[7], [4, 3], [0, 4, 0, 3], [1] * 7])
def test_evaluation_does_not_depend_on_how_the_samples_are_cut(count_targets, sizes):
    model = make_model()
    x, y = torch.randn(7, 4), torch.randint(0, 2, (7,))
    if count_targets is count_real:
        y[4:6] = -100  # batches of size 1 have no target at all then
    loss, outputs = cross_entropy_of(model, x, y)
    found = evaluate_model(
        model,
        zip(x.split(sizes), y.split(sizes), strict=True),
        cross_entropy_of,
        count_right,
        count_targets,
    )
    right = (outputs.argmax(-1) == y).sum().item()
    assert found == {
        "val_loss": pytest.approx(loss.item(), rel=1e-6),
        "val_accuracy": pytest.approx(right / count_targets(y)),
    }


def test_an_evaluation_records_no_gradients():
    def compute_loss(model, x, y):
        assert torch.is_inference_mode_enabled()
        return cross_entropy_of(model, x, y)

    batches = [(torch.randn(2, 4), torch.zeros(2).long())]
    assert evaluate_model(make_model(), batches, compute_loss, count_right)


@pytest.mark.parametrize("count_targets", [len, count_real])
def test_an_evaluation_does_not_hide_a_loss_that_is_nan(count_targets):
    batches = [
        (torch.full((2, 4), value), torch.zeros(2).long()) for value in (1.0, math.nan)
    ]
    found = evaluate_model(
        make_model(), batches, cross_entropy_of, count_right, count_targets
    )
    assert math.isnan(found["val_loss"])


@pytest.mark.gpu
def test_an_evaluation_waits_for_a_real_gpu_only_at_its_end():
    model = make_model().cuda()
    x = torch.randn(6, 4, device="cuda")
    y = torch.randint(0, 2, (6,), device="cuda")

    def batches(mode):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield from [(x, y)] * 3
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for mode in ("default", "error"):  # the first one creates workspaces
        evaluate_model(model, batches(mode), cross_entropy_of, count_right)


# --- optimizer steps ------------------------------------------------------------------


def backward(model, scaler, factor=1.0):
    loss = model(torch.ones(3, 4)).square().mean() * factor
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize(
    ("loss", "accuracy", "by_loss", "by_accuracy"),
    [
        (0.4, 0.7, True, False),
        (0.6, 0.9, False, True),
        (0.4, 0.8, True, True),  # equal accuracy: the loss decides
        (0.5, 0.8, False, False),
        (math.nan, 0.9, False, False),
        (0.4, math.nan, True, False),
    ],
)
def test_is_better_by_loss_or_by_accuracy(loss, accuracy, by_loss, by_accuracy):
    best = {"epoch": 1, "val_loss": 0.5, "val_accuracy": 0.8}
    metrics = {"val_loss": loss, "val_accuracy": accuracy}
    assert is_better(metrics, best, "val_loss") is by_loss
    assert is_better(metrics, best, "val_accuracy") is by_accuracy
    first = {"epoch": 0, "val_loss": math.inf}
    assert is_better(metrics, first, "val_loss") is math.isfinite(loss)


def test_clear_gradients_leaves_what_zero_grad_leaves():
    model = nn.Linear(3, 2)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    groups = [{"params": [model.weight, frozen]}, {"params": [model.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    model(torch.ones(1, 3)).sum().backward()
    clear_gradients(optimizer)
    assert model.weight.grad is model.bias.grad is frozen.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_step_optimizer_tells_a_skipped_step_from_a_taken_one(fused):
    model, scaler = make_model(), scaler_on()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    taken, changed, scales = [], [], []
    for factor in (1.0, OVERFLOW, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        backward(model, scaler, factor)
        taken.append(step_optimizer(optimizer, scaler))
        changed.append(
            any(
                not torch.equal(a, b)
                for a, b in zip(before, model.parameters(), strict=True)
            )
        )
        scales.append(scaler.get_scale())
    assert taken == changed == [True, False, True]
    assert scales == [65536.0, 32768.0, 32768.0]


def test_step_optimizer_counts_a_growing_scale_as_taken():
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, scaler)
    assert step_optimizer(optimizer, scaler) is True
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_step_optimizer_without_scaling_never_waits(monkeypatch, scaler):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, scaler)
    forbid_waiting(monkeypatch)
    assert step_optimizer(optimizer, scaler) is True


def test_train_step_with_clipping_is_the_same_with_and_without_a_scaler():
    results = []
    for scaler in (None, scaler_on(), torch.amp.GradScaler("cpu", enabled=False)):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = model(torch.ones(3, 4)).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        true_norm = torch.cat([g.flatten() for g in grads]).norm()
        before = [p.detach().clone() for p in model.parameters()]
        norm = train_step_with_clipping(model, optimizer, loss, 0.01, scaler)
        torch.testing.assert_close(norm, true_norm)  # not 65536 times it
        steps = [b - p for b, p in zip(before, model.parameters(), strict=True)]
        step_norm = torch.cat([s.flatten() for s in steps]).norm()
        torch.testing.assert_close(
            step_norm, torch.tensor(0.01), rtol=1e-3, atol=0, check_dtype=False
        )
        assert all(p.grad is None for p in model.parameters())
        results.append([p.detach().clone() for p in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


# --- MixedPrecisionTrainer ------------------------------------------------------------


def forbid_waiting(monkeypatch) -> None:
    """Make reading a tensor's value an error, as it would stall a GPU."""

    def wait(self, *args):
        raise AssertionError("this reads a tensor's value")

    for name in ("item", "__bool__", "__float__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, wait)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_returns_a_detached_loss_and_never_waits(monkeypatch, dtype):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    trainer = MixedPrecisionTrainer(
        model, optimizer, criterion, device_manager(dtype), max_grad_norm=1.0
    )
    x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        loss = trainer.train_step(x, y)
        assert trainer.step_skipped is False
    assert isinstance(loss, torch.Tensor)
    assert loss.ndim == 0
    assert not loss.requires_grad


def test_trainer_in_fp32_is_the_plain_loop():
    x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
    model, reference = make_model(), make_model()
    trainer = MixedPrecisionTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        device_manager(torch.float32),
        max_grad_norm=0.05,
    )
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        loss = trainer.train_step(x, y)
        optimizer.zero_grad()
        expected = nn.functional.cross_entropy(reference(x), y)
        expected.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        optimizer.step()
        assert torch.equal(loss, expected)
    torch.testing.assert_close(
        model.state_dict(), reference.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainer_runs_the_forward_in_the_managers_dtype(dtype):
    seen = []
    model = make_model()
    trainer = MixedPrecisionTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda outputs, targets: seen.append(outputs.dtype) or outputs.float().mean(),
        device_manager(dtype),
    )
    trainer.train_step(torch.randn(2, 4), None)
    assert seen == [dtype]
    assert trainer.scaler.is_enabled() == (dtype == torch.float16)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_trainer_tells_a_skipped_step_and_clips_unscaled_gradients():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = MixedPrecisionTrainer(
        model,
        optimizer,
        lambda outputs, factor: outputs.float().square().mean() * factor,
        device_manager(torch.float16),
        max_grad_norm=0.01,
    )
    skipped = []
    for factor in (1.0, OVERFLOW, 1.0):
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        trainer.train_step(torch.ones(3, 4), factor)
        skipped.append(trainer.step_skipped)
        step = nn.utils.parameters_to_vector(model.parameters()) - before
        expected = 0.0 if skipped[-1] else 0.01
        assert step.norm().item() == pytest.approx(expected, rel=1e-2)
    assert skipped == [False, True, False]


def test_trainer_with_fp16_waits_no_more_often_than_the_scaler_itself(monkeypatch):
    calls = []
    item = torch.Tensor.item
    monkeypatch.setattr(
        torch.Tensor, "item", lambda self: calls.append(1) or item(self)
    )

    def count(step):
        calls.clear()
        step()
        return len(calls)

    model, scaler = make_model(), scaler_on()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def plain_step():
        scaler.step(optimizer)
        scaler.update()

    backward(model, scaler)
    plain = count(plain_step)
    trainer = MixedPrecisionTrainer(
        model,
        optimizer,
        lambda outputs, _: outputs.float().mean(),
        device_manager(torch.float16),
    )
    assert count(lambda: trainer.train_step(torch.ones(3, 4), None)) == plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trainer_never_waits_for_a_real_gpu(dtype):
    model = make_model().cuda()
    trainer = MixedPrecisionTrainer(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),  # else fp16's scaler waits
        nn.CrossEntropyLoss(),
        device_manager(dtype, "cuda"),
        max_grad_norm=1.0,
    )
    x = torch.randn(6, 4, device="cuda")
    y = torch.randint(0, 2, (6,), device="cuda")
    trainer.train_step(x, y)  # creates states and workspaces
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step_skipped is False


@pytest.mark.gpu
def test_step_optimizer_on_a_real_gpu():
    model = make_model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = scaler_on("cuda")
    taken = []
    for factor in (1.0, OVERFLOW, 1.0):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4, device="cuda")).square().mean() * factor
        scaler.scale(loss).backward()
        taken.append(step_optimizer(optimizer, scaler))
    assert taken == [True, False, True]
