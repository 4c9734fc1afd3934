"""profiling: it measures real steps, and leaves the run as it found it."""

import gzip
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from templates import profiling
from templates.profiling import (
    StepFlopCounter,
    StepProfiler,
    TrainingDisplay,
    _CudaStepTimer,
    _profiler_settings,
    count_step_flops,
    get_memory_stats,
    peak_flops,
    peak_memory_gb,
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
    keys = [event.key for event in events[:6]]  # PyTorch shortens long ones
    shown = [key if len(key) <= 55 else f"{key[:52]}..." for key in keys]
    positions = [table.index(f" {name}  ") for name in shown[:5]]
    assert positions == sorted(positions)
    assert f" {shown[5]}  " not in table


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


def test_display_writes_speed_and_memory_to_a_file_of_its_own(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 12.0, 13.0, 13.0])
    monkeypatch.setattr("templates.profiling.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("templates.profiling.peak_memory_gb", lambda: 1.23456)
    path = tmp_path / "speed.jsonl"
    with TrainingDisplay(9, 512, unit="tokens", speed_log=path) as display:
        display.update(3, loss=0.5)
        monkeypatch.setattr("templates.profiling.peak_memory_gb", lambda: None)
        display.update(4, loss=0.4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 3, "tokens_per_s": 768, "memory_gb": 1.235},
        {"step": 4, "tokens_per_s": 512},
    ]


def test_speed_leaves_out_what_an_evaluation_took(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 100.0, 102.0, 102.0])
    monkeypatch.setattr("templates.profiling.time.perf_counter", lambda: next(clock))
    path = tmp_path / "speed.jsonl"
    with TrainingDisplay(9, 4, speed_log=path) as display:
        display.update(2, loss=0.5)
        display.end_epoch(3, 1, val_loss=0.25)  # at 100 s
        display.update(5, loss=0.4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["samples_per_s"] for line in lines] == [8, 4]


def test_display_gives_all_that_it_shows_to_its_sinks(capsys):
    seen = []
    sinks = [lambda step, values: seen.append((step, dict(values)))] * 2
    with TrainingDisplay(9, 4, sinks=sinks) as display:
        display.update(3, loss=0.5)
        display.end_epoch(4, 1, val_loss=0.25)
        display.note("saved")
    assert seen == [
        *[(3, {"loss": 0.5})] * 2,  # no speed: it is not reproducible
        *[(4, {"epoch": 1, "val_loss": 0.25})] * 2,
    ]
    assert "epoch 1: val_loss 0.25" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_silent_display_leaves_no_trace(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    path = tmp_path / "speed.jsonl"
    seen = []
    sinks = [lambda step, values: seen.append(step)]
    with TrainingDisplay(9, 4, speed_log=path, silent=True, sinks=sinks) as display:
        display.update(3, loss=0.5)
        display.end_epoch(3, 1, val_loss=0.25)
        display.note("saved")
    assert capsys.readouterr() == ("", "")
    assert seen == []
    assert not path.exists()


def test_peak_memory_is_the_processs_where_no_gpu_is_used(monkeypatch):
    before = peak_memory_gb()
    block = torch.ones(60_000_000)  # 0.24 GB
    assert peak_memory_gb() >= before
    assert 0.24 < peak_memory_gb() < 100
    del block
    assert peak_memory_gb() > 0.24  # the peak stays
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 10**9)
    assert peak_memory_gb() == 5.0


# --- peaks and FLOPs


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5),
        ("NVIDIA H200", torch.float8_e4m3fn, 1978.9),
        ("NVIDIA GH200 480GB", torch.float16, 989.4),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-PCIE-32GB", torch.float32, 14),
        # unknown, or cannot do it: no guess
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.float8_e4m3fn, None),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("a card of tomorrow", torch.float16, None),
    ],
)
def test_peaks_are_those_of_the_data_sheet_or_none(name, dtype, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda:0"), dtype)
    assert peak is None if tflops is None else peak == pytest.approx(tflops * 1e12)
    assert peak_flops(CPU, dtype) is None


def test_float32_has_the_peak_of_tf32_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda")
    assert peak_flops(device, torch.float32) == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(device, torch.float32) == pytest.approx(494.7e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_flops(device, torch.float32) == pytest.approx(8.1e12)


class Attention(nn.Module):
    """One block; (B, T, D) = (2, 8, 16), 4 heads."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x_BTD):
        q, k, v = self.qkv(x_BTD).view(2, 8, 3, 4, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(2, 8, 16))


# By hand: 2 x rows x in x out for each Linear, and twice that in backward; attention
# has two products of (T, d) and (d, T) in forward, five in backward, in every head.
LINEAR_FLOPS = 2 * (2 * 8) * 16 * (48 + 16)
ATTENTION_FLOPS = 2 * (2 * 4) * 8 * 8 * 4
STEP_FLOPS = 3 * LINEAR_FLOPS + (2 + 5) * ATTENTION_FLOPS


def test_attention_on_a_cpu_counts():
    model = Attention()
    x_BTD = torch.randn(2, 8, 16, requires_grad=True)
    assert count_step_flops(lambda: model(x_BTD).sum().backward()) == STEP_FLOPS
    with FlopCounterMode(display=False) as reference:
        model(x_BTD).sum().backward()
    assert reference.get_total_flops() in (STEP_FLOPS, 3 * LINEAR_FLOPS)


def test_what_needs_no_gradient_is_not_counted_and_convolutions_are():
    model = nn.Conv2d(3, 8, 3, padding=1)
    images = torch.randn(2, 3, 6, 6)
    forward = 2 * (2 * 6 * 6) * (3 * 3 * 3) * 8
    counted = count_step_flops(lambda: model(images).sum().backward())
    assert counted == 2 * forward  # the images need no gradient
    with FlopCounterMode(display=False) as reference:
        model(images).sum().backward()
    assert counted == reference.get_total_flops()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_kept_apart(reentrant):
    model = Attention()
    x_BTD = torch.randn(2, 8, 16, requires_grad=True)
    with StepFlopCounter() as counter:
        checkpoint(model, x_BTD, use_reentrant=reentrant).sum().backward()
    # Recomputing stops early, once backward has all that it needs: without the last
    # Linear. The old form runs all of it, and backward within backward
    last = 2 * (2 * 8) * 16 * 16
    forward = LINEAR_FLOPS + 2 * ATTENTION_FLOPS
    assert counter.flops == STEP_FLOPS
    assert counter.extra_flops == (forward if reentrant else forward - last)


def test_an_optimizers_own_products_are_kept_apart():
    model = nn.Linear(8, 4)
    inputs = torch.randn(2, 8)
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("Muon came with torch 2.9")
    optimizer = muon([model.weight], lr=0.1)
    with StepFlopCounter() as counter:
        model(inputs).sum().backward()
        optimizer.step()
        model(inputs)
    assert counter.flops == (2 + 1) * 2 * 2 * 8 * 4
    assert counter.extra_flops > 0
    optimizer.step()  # the hooks are gone
    assert counter._in_optimizer is False


def test_a_formula_that_fails_makes_no_figure(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("shapes")

    counter = StepFlopCounter()
    counter._formulas[torch.ops.aten.addmm] = fail
    with counter:
        nn.Linear(8, 4)(torch.randn(2, 8))
    assert counter.uncounted == {"aten.addmm.default"}


# --- StepProfiler


def run_profiled(tmp_path, steps, **options):
    model, optimizer = build()
    inputs, targets = batch()
    lines = []
    profiler = StepProfiler(tmp_path, CPU, report=lines.append, **options)
    with profiler:
        for x, y in profiler.batches([(inputs, targets)] * steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            profiler.step()
    return model, optimizer, "\n".join(lines)


def test_a_profiled_run_computes_the_same_to_the_bit(tmp_path):
    plain, plain_optimizer = build()
    train(plain, plain_optimizer, 12)
    model, optimizer, _ = run_profiled(tmp_path, 12, warmup_steps=3)
    for expected, actual in zip(
        everything(plain, plain_optimizer), everything(model, optimizer), strict=True
    ):
        assert torch.equal(expected, actual)


def test_the_profile_tells_steps_work_and_operations(tmp_path):
    _, _, text = run_profiled(tmp_path, 30, warmup_steps=4, recorded_steps=3)
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert summary["steps_timed"] == 30 - 4 - 1 - 3
    times = summary["step_ms"]
    assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    assert 0 < summary["data_wait_share"] < 1
    assert summary["peak_memory_gb"] > 0.01
    forward = 2 * 12 * (8 * 16 + 16 * 3)  # the inputs need no gradient
    assert summary["flops_per_step"] == 3 * forward - 2 * 12 * 8 * 16
    assert (summary["peak_flops"], summary["mfu"]) == (None, None)
    operations = {row["name"]: row for row in summary["operations"]}
    assert operations["aten::addmm"]["calls"] == 2
    assert 0 < operations["aten::addmm"]["share"] < 1
    assert "22 steps timed" in text
    assert "aten::addmm" in text
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("Optimizer.step#AdamW.step") == 3


def test_every_step_and_every_wait_is_timed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        profiling,
        "time",
        types.SimpleNamespace(perf_counter=lambda: now[0]),
    )

    def loader():
        for _ in range(100):
            now[0] += 1  # waiting for data
            yield 0

    with StepProfiler(tmp_path, CPU, warmup_steps=2, report=lambda line: None) as p:
        for epoch in range(2):
            for step, _ in enumerate(p.batches(loader()), start=1):
                now[0] += 3
                if (epoch, step) == (1, 50):
                    now[0] += 96
                p.step()
            now[0] += 1000  # evaluation
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert summary["steps_timed"] == 200 - 2 - 1 - 3
    times = summary["step_ms"]
    assert (times["p50"], times["p90"], times["p99"]) == (4000, 4000, 4000)
    assert times["mean"] == pytest.approx(4000 + 96_000 / 194)
    assert summary["data_wait_share"] == pytest.approx(194 / (194 * 4 + 96))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6])
def test_a_run_that_is_too_short_says_so(steps, tmp_path):
    _, _, text = run_profiled(tmp_path, steps, warmup_steps=3, recorded_steps=2)
    assert "no step was timed: the run ended in the first 6" in text
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert summary["step_ms"] is None
    assert (tmp_path / "trace.json.gz").exists() is (steps >= 5)
    assert (summary["flops_per_step"] is None) is (steps < 2)
    assert count_step_flops(lambda: None) == 0  # nothing is left switched on


@pytest.mark.parametrize("failing_step", [2, 5, 9])
def test_an_error_in_the_loop_is_not_hidden(failing_step, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(StepProfiler, "_sum_up", fail)

    def train_until_it_fails():
        with StepProfiler(tmp_path, CPU, warmup_steps=3) as profiler:
            for step in range(1, 20):
                torch.ones(2, 2) @ torch.ones(2, 2)
                if step == failing_step:
                    raise RuntimeError("boom")
                profiler.step()

    with pytest.raises(RuntimeError, match="boom"):
        train_until_it_fails()
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


def test_an_inactive_profiler_does_nothing(tmp_path):
    loader = [1, 2]
    with StepProfiler(tmp_path / "out", CPU, active=False) as profiler:
        assert profiler.batches(loader) is loader
        for _ in range(30):
            profiler.step()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [{"warmup_steps": 1}, {"recorded_steps": 0}])
def test_the_profiler_refuses_impossible_step_counts(steps, tmp_path):
    name = next(iter(steps))
    with pytest.raises(ValueError, match=f"{name}={steps[name]}"):
        StepProfiler(tmp_path, CPU, **steps)


class FakeGpu:
    """A GPU that finishes each step `delay_ms` after the one before, much later."""

    def __init__(self, monkeypatch):
        self.recorded, self.finished, self.waits, self.created = 0, 0, 0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                gpu.created += 1

            def record(self, stream):
                self.number = gpu.recorded
                gpu.recorded += 1

            def query(self):
                return self.number < gpu.finished

            def elapsed_time(self, end):
                assert end.query(), "read before the GPU has passed it"
                return 10.0 * end.number - 10.0 * self.number

        def synchronize(device):
            gpu.waits += 1
            gpu.finished = gpu.recorded

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


def test_steps_on_a_gpu_are_timed_without_waiting_for_it(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer = _CudaStepTimer(torch.device("cuda"))
    for step in range(1000):
        timer.mark(keep=step % 2 == 1)
        gpu.finished = max(0, gpu.recorded - 5)  # the CPU is five steps ahead
    assert gpu.waits == 0
    assert gpu.created < 10  # events are used again
    assert len(timer.times_ms) > 490
    timer.finish()
    assert list(timer.times_ms) == [10.0] * 500


def test_a_gpus_profile_has_its_share_of_the_peak(tmp_path, monkeypatch):
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    # The profiler would look for a real GPU
    monkeypatch.setattr(StepProfiler, "_start_recording", lambda self: None)
    device = torch.device("cuda")
    lines = []
    with StepProfiler(
        tmp_path, device, torch.bfloat16, warmup_steps=2, report=lines.append
    ) as profiler:
        left, right = torch.randn(64, 64), torch.randn(64, 64)
        for _ in range(30):
            left @ right
            profiler.step()
        assert gpu.waits == 0
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert summary["device"] == "NVIDIA H200"
    assert summary["flops_per_step"] == 2 * 64**3
    assert summary["step_ms"]["p50"] == 10.0
    assert summary["mfu"] == pytest.approx(2 * 64**3 / 0.010 / 989.4e12)
    assert any("NVIDIA H200 has for bfloat16 (MFU)" in line for line in lines)


def test_a_compiled_model_is_counted_eagerly_and_stays_compiled(tmp_path):
    compiled_calls = []

    def backend(graph, inputs):
        def run(*args):
            compiled_calls.append(1)
            return graph.forward(*args)

        return run

    model = nn.Linear(8, 4)
    compiled = torch.compile(model, backend=backend)
    with StepProfiler(
        tmp_path, CPU, warmup_steps=2, report=lambda line: None
    ) as profiler:
        for _ in range(12):
            compiled(torch.randn(2, 8)).sum().backward()
            profiler.step()
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert summary["flops_per_step"] == 2 * 2 * 2 * 8 * 4
    assert len(compiled_calls) == 11


@pytest.mark.gpu
def test_step_profiler_on_a_real_gpu(tmp_path):
    device = torch.device("cuda")
    model = nn.Linear(1024, 1024, device=device, dtype=torch.bfloat16)
    inputs = torch.randn(4096, 1024, device=device, dtype=torch.bfloat16)
    lines = []
    with StepProfiler(
        tmp_path, device, torch.bfloat16, report=lines.append
    ) as profiler:
        for x in profiler.batches([inputs] * 100):
            model(x).float().sum().backward()
            profiler.step()
    summary = json.loads((tmp_path / "profile.json").read_text())
    assert summary["steps_timed"] == 100 - 10 - 1 - 3
    assert summary["flops_per_step"] == 2 * 2 * 4096 * 1024 * 1024
    assert summary["mfu"] is None or 0 < summary["mfu"] < 1
    assert summary["operations"][0]["ms"] > 0
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "kernel" in kinds
