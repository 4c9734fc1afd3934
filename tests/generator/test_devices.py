"""Generated scripts with compiled code, forced precision, and on a GPU."""

import json
import shutil

import pytest
import torch

from generator.options import TASKS

from .scripts import (
    END_AFTER_FOUR_SAVES,
    data_words,
    largest_difference,
    newest_state,
    run,
    same,
    write_script,
)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a compiler")
def test_compiled_equals_eager(tmp_path):
    edits = {"dropout=0.1": "dropout=0.0"}
    flags = ("--task=image", "--compile", "--checkpointing", "--resume", "--ema=0.9")
    script = write_script(tmp_path, *flags, edits=edits)
    words = [*data_words("image", tmp_path), "--epochs=1"]
    output = run(script, *words, "--out-dir=compiled")
    assert "staying eager" not in output
    run(script, *words, "--out-dir=eager", TORCHDYNAMO_DISABLE="1")
    compiled, eager = (
        newest_state(tmp_path / n)["parts"] for n in ("compiled", "eager")
    )
    assert compiled["model"].keys() == eager["model"].keys()
    assert largest_difference(compiled["model"], eager["model"]) < 1e-3


def test_language_models_compile_their_loss_as_well(tmp_path):
    script = write_script(tmp_path, "--task=lm", "--compile")
    words = [*data_words("lm", tmp_path), "--epochs=1"]
    inject = "script.compile_model_if_available = lambda m, **_: print(type(m))"
    output = run(script, *words, inject=inject)
    assert "DecoderLM'>\n<class 'torch.nn.modules.loss.CrossEntropyLoss'>" in output


def test_without_a_compiler_the_script_falls_back_and_gives_the_same(tmp_path):
    script = write_script(tmp_path, "--compile", "--resume")
    words = [*data_words("text", tmp_path), "--epochs=1"]
    nowhere = {
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c"),
    }
    output = run(script, *words, "--out-dir=fallen", **nowhere)
    assert "staying eager" in output
    run(script, *words, "--out-dir=eager", TORCHDYNAMO_DISABLE="1")
    fallen, eager = (newest_state(tmp_path / n)["parts"] for n in ("fallen", "eager"))
    assert same(fallen["model"], eager["model"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_forced_precision_on_the_cpu_trains_and_resumes_exactly(dtype, tmp_path):
    flags = ("--amp", "--resume", "--clip", "--scheduler=cosine", "--ema=0.9")
    script = write_script(tmp_path, *flags)
    words = [*data_words("text", tmp_path), f"--dtype={dtype}", "--save-every=1000"]
    run(script, *words, "--out-dir=whole")
    losses = [row["loss"] for row in metrics(tmp_path / "whole") if "loss" in row]
    assert losses[-1] < losses[0]
    stop = """
real, calls = script.SafeTrainingContext.should_stop, []
def should_stop(context):
    calls.append(1)
    context.signal_number = 15 if len(calls) > 9 else None
    return len(calls) > 9
script.SafeTrainingContext.should_stop = property(should_stop)
"""
    run(script, *words, "--out-dir=stopped", expect=143, inject=stop)
    run(script, *words, "--out-dir=stopped")
    whole, stopped = (newest_state(tmp_path / name) for name in ("whole", "stopped"))
    assert same(whole, stopped)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["auto", "fp16", "fp32"])
def test_gpu_trains_and_resumes_exactly(task, dtype, tmp_path):
    flags = ("--amp", "--checkpointing", "--resume", "--clip", "--ema=0.9")
    more = ("--scheduler=cosine", "--deterministic", "--accumulate=2")
    script = write_script(tmp_path, "--task", task, *flags, *more)
    words = [*data_words(task, tmp_path), f"--dtype={dtype}", "--num-workers=2"]
    output = run(script, *words, "--out-dir=whole")
    assert "cuda" in output.lower()
    words += ["--save-every=2"]
    run(script, *words, "--out-dir=killed", expect=1, inject=END_AFTER_FOUR_SAVES)
    run(script, *words, "--out-dir=killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    whole, killed = (
        newest_state(tmp_path / name)["parts"] for name in ("whole", "killed")
    )
    assert same(whole["model"], killed["model"])
    assert same(whole["ema"], killed["ema"])


@pytest.mark.gpu
def test_gpu_out_of_memory_halves_the_micro_batch(tmp_path):
    script = write_script(tmp_path, "--oom-recovery", "--resume", "--amp")
    words = data_words("text", tmp_path)
    # Room for the model and little more: real allocations fail in the first step.
    fault = """
import torch
real = script.compute_loss
def compute_loss(model, inputs, labels):
    if model.training:
        free, total = torch.cuda.mem_get_info()
        hog = torch.empty(len(labels) * (free // 12), dtype=torch.uint8, device="cuda")
    return real(model, inputs, labels)
script.compute_loss = compute_loss
"""
    output = run(script, *words, "--out-dir=run", inject=fault)
    assert newest_state(tmp_path / "run")["parts"]["run"]["micro_batch"] < 16
    assert "weights in" in output
    assert torch.cuda.is_available()
