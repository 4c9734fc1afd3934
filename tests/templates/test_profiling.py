"""profiling: it measures real steps, and leaves the run as it found it."""

import gzip
import json
import sys

import pytest
import torch
from torch import nn

from templates.profiling import (
    TrainingDisplay,
    _profiler_settings,
    get_memory_stats,
    print_memory_stats,
    profile_training_step,
)

CPU = torch.device("cpu")


def build(seed: int = 0, device: torch.device = CPU):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)
    ).to(device)
    model[1].register_buffer("calls", torch.zeros((), device=device), persistent=False)

    def count(module, args, output):
        module.calls.add_(1)

    model[1].register_forward_hook(count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer


def batch(device: torch.device = CPU):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 8, generator=generator)
    return inputs.to(device), (inputs[:, 0] > 0).long().to(device)


def train(model, optimizer, steps: int) -> None:
    inputs, targets = batch(next(model.parameters()).device)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def profile(model, optimizer, **options):
    lines = []
    profiler = profile_training_step(
        model,
        *batch(next(model.parameters()).device),
        nn.CrossEntropyLoss(),
        optimizer,
        report=lines.append,
        **options,
    )
    return profiler, "\n".join(lines)


def everything(model, optimizer) -> list[torch.Tensor]:
    states = [s for p in model.parameters() for s in optimizer.state[p].values()]
    return [*model.state_dict().values(), model[1].calls, *states]


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_run_goes_on_as_if_it_had_not_been_profiled(steps_before):
    plain, plain_optimizer = build()
    train(plain, plain_optimizer, steps_before + 3)

    model, optimizer = build()
    train(model, optimizer, steps_before)
    gradients = [p.grad for p in model.parameters()]
    profile(model, optimizer)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    train(model, optimizer, 3)  # dropout draws the same numbers too
    for expected, actual in zip(
        everything(plain, plain_optimizer), everything(model, optimizer), strict=True
    ):
        assert torch.equal(expected, actual)


def test_an_error_in_the_step_leaves_the_run_alone():
    model, optimizer = build()
    model.eval()
    before = [t.clone() for t in everything(model, optimizer)]
    calls = []

    def criterion(outputs, targets):
        calls.append(outputs)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="boom"):
        profile_training_step(model, *batch(), criterion, optimizer)
    assert not any(module.training for module in model.modules())
    for expected, actual in zip(before, everything(model, optimizer), strict=True):
        assert torch.equal(expected, actual)


def test_settings_that_a_step_changes_come_back():
    model, _ = build()

    class CountingSGD(torch.optim.SGD):  # keeps its step count in the group
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1

    optimizer = CountingSGD(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    profile(model, optimizer)
    assert optimizer.param_groups[0]["steps"] == 2


def test_fp32_moments_of_bf16_weights_come_back_as_fp32():
    model = nn.Linear(8, 3).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["master"] = torch.full((3, 8), 1 / 3)
    profile_training_step(
        model,
        batch()[0].bfloat16(),
        batch()[1],
        nn.CrossEntropyLoss(),
        optimizer,
        report=lambda line: None,
    )
    assert optimizer.state[model.weight]["master"].dtype == torch.float32


def test_without_restore_the_model_has_been_trained_and_it_says_so():
    plain, plain_optimizer = build()
    train(plain, plain_optimizer, 5)
    model, optimizer = build()
    _, text = profile(model, optimizer, warmup_steps=2, recorded_steps=3, restore=False)
    assert "trained on this batch" in text
    for expected, actual in zip(
        everything(plain, plain_optimizer), everything(model, optimizer), strict=True
    ):
        assert torch.equal(expected, actual)


def test_warm_up_steps_are_not_recorded():
    model, optimizer = build()
    profiler, text = profile(model, optimizer, warmup_steps=4, recorded_steps=2)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["Optimizer.step#AdamW.step"] == 2
    assert counts["aten::native_batch_norm"] == 2
    assert "Profiled 2 training steps on cpu after 4 to warm up" in text


def test_on_a_cpu_the_table_is_sorted_by_cpu_time_and_has_no_gpu_column():
    model, optimizer = build()
    profiler, text = profile(model, optimizer, row_limit=5)
    table = text[text.index("---") :]
    assert "CUDA" not in table
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    positions = [table.index(f" {event.key}  ") for event in events[:5]]
    assert positions == sorted(positions)
    assert f" {events[5].key}  " not in table


def test_only_a_cuda_model_records_and_sorts_by_cuda():
    kinds = torch.profiler.ProfilerActivity
    assert _profiler_settings(CPU)[0] == [kinds.CPU]
    assert _profiler_settings(torch.device("mps"))[0] == [kinds.CPU]
    activities, sort_by = _profiler_settings(torch.device("cuda:1"))
    assert activities == [kinds.CPU, kinds.CUDA]
    # Rows lost their cuda_* attributes; a wrong key raises only with a GPU
    profiler, _ = profile(*build())
    assert all(hasattr(event, sort_by) for event in profiler.key_averages())


def test_a_frozen_submodule_stays_frozen_and_an_eval_model_is_trained():
    model, optimizer = build()
    seen = []
    model[1].register_forward_hook(
        lambda module, args, output: seen.append((model.training, module.training))
    )
    model.train()
    model[1].eval()
    profile(model, optimizer)
    assert set(seen) == {(True, False)}
    assert (model.training, model[1].training, model[2].training) == (True, False, True)
    seen.clear()
    model.eval()
    profile(model, optimizer)
    assert set(seen) == {(True, True)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["new/folder/trace.json", "trace.json.gz"])
def test_the_trace_is_readable(tmp_path, name):
    model, optimizer = build()
    path = tmp_path / name
    _, text = profile(model, optimizer, trace_path=path)
    assert str(path) in text
    opener = gzip.open if name.endswith("gz") else open
    with opener(path, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::addmm" in names


@pytest.mark.parametrize("steps", [{"warmup_steps": -1}, {"recorded_steps": 0}])
def test_impossible_step_counts_are_refused(steps):
    model, optimizer = build()
    name = next(iter(steps))
    with pytest.raises(ValueError, match=f"{name}={steps[name]}"):
        profile(model, optimizer, **steps)


def test_memory_stats_of_a_cpu_are_empty_and_silent(capsys):
    assert get_memory_stats(CPU) == {}
    print_memory_stats(CPU)
    assert capsys.readouterr().out == ""


def test_memory_stats_of_fake_gpus(monkeypatch, capsys):
    device = torch.device("cuda:1")
    for name, gb in (
        ("memory_allocated", 1),
        ("memory_reserved", 3),
        ("max_memory_allocated", 2),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda d, gb=gb: gb * 10**9 if d == device else 0
        )
    stats = {"allocated": 1.0, "reserved": 3.0, "max_allocated": 2.0}
    assert get_memory_stats(device) == stats
    print_memory_stats(device, "epoch 1: ")
    assert capsys.readouterr().out == (
        "epoch 1: Memory: allocated 1.00 GB, reserved 3.00 GB, max_allocated 2.00 GB\n"
    )
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 10**9)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4 * 10**9)
    lines = []
    print_memory_stats(torch.device("mps"), report=lines.append)
    assert lines == ["Memory: allocated 1.00 GB, reserved 4.00 GB"]


@pytest.mark.gpu
def test_on_a_real_gpu(tmp_path):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    plain, plain_optimizer = build(device=device)
    train(plain, plain_optimizer, 4)
    model, optimizer = build(device=device)
    train(model, optimizer, 2)
    profiler, text = profile(model, optimizer, trace_path=tmp_path / "trace.json")
    train(model, optimizer, 2)
    for expected, actual in zip(
        everything(plain, plain_optimizer), everything(model, optimizer), strict=True
    ):
        torch.testing.assert_close(expected, actual)
    assert "CUDA" in text
    top = max(profiler.key_averages(), key=lambda e: e.self_device_time_total)
    assert top.self_device_time_total > 0
    stats = get_memory_stats(device)
    assert 0 < stats["allocated"] <= stats["max_allocated"] <= stats["reserved"]


def test_display_prints_plain_lines_where_there_is_no_terminal(capsys):
    with TrainingDisplay(total_steps=9, batch_size=4, step=1) as display:
        display.update(3, loss=0.123456, epoch=2)
        display.note("saved")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 3/9: loss 0.1235, epoch 2, samples_per_s ")
    assert second == "saved"


def test_display_counts_the_samples_between_two_updates(capsys, monkeypatch):
    clock = iter([10.0, 12.0, 12.0, 13.0, 13.0])
    monkeypatch.setattr("templates.profiling.time.perf_counter", lambda: next(clock))
    with TrainingDisplay(total_steps=9, batch_size=4) as display:
        display.update(3)
        display.update(4)
    speeds = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert speeds == ["6", "4"]  # 3 steps of 4 samples in 2 s, then 1 in 1 s


@pytest.mark.parametrize("installed", [True, False])
def test_display_is_a_bar_on_a_terminal_if_tqdm_is_there(
    installed, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with TrainingDisplay(total_steps=9, batch_size=4, step=2) as display:
        display.update(5, loss=0.5)
        display.note("saved")
    captured = capsys.readouterr()
    assert "saved" in captured.out
    assert ("5/9" in captured.err) is installed
    assert ("step 5/9: loss 0.5" in captured.out) is not installed
