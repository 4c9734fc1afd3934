"""Every snippet runs as it stands, with warnings as errors, and proves what it shows.

MUTANTS breaks each idiom on purpose: a snippet that still passes then proves nothing.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.generator.scripts import run_forked

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "snippets"
PATHS = sorted(FOLDER.glob("*.py"))
NAMES = [path.stem for path in PATHS]

# One for each section of the guide, in its order, and error handling.
GUIDE = [
    *("device", "data_loading", "mixed_precision", "activation_checkpointing"),
    *("compile", "out_of_memory", "save_load", "reproducibility", "schedules"),
    *("early_stopping", "gradient_clipping", "ema", "profiling", "inference"),
    *("distributed", "config", "unit_tests", "error_handling"),
]

# (what stands there, what it is replaced by): the wrong form that the idiom avoids.
MUTANTS = {
    "device": [
        ("return torch.float32  # bf16", "return torch.bfloat16  # bf16"),
    ],
    "data_loading": [
        ("info.id, info.num_workers", "0, 1"),
        ("self.rank * workers + worker, self.ranks * workers", "worker, workers"),
    ],
    "mixed_precision": [
        ("            scaler.unscale_(optimizer)", "            pass"),
        ("scaler.scale(loss).backward()", "loss.backward()"),
        ("                scheduler.step()", "                pass"),
        ("optimizer.zero_grad(set_to_none=True)", "pass"),
    ],
    "activation_checkpointing": [
        ('self.mode != "none" and self.training', "False"),
        ("aten.addmm.default, ", ""),
        ("use_reentrant=False", "use_reentrant=False, preserve_rng_state=False"),
    ],
    "compile": [
        ("        step(compiled)\n        return", "        return"),
        ("torch.compile(model, **options)", "torch.compile(model)"),
        ("    return model\n", "    return compiled\n"),
    ],
    "out_of_memory": [
        ("share = len(part) / len(x)", "share = micro_batch / len(x)"),
        (
            "            if micro_batch == 1:",
            "            micro_batch //= 2\n"
            "            return backward_in_pieces(model, loss_of, x, y, micro_batch)\n"
            "            if micro_batch == 1:",
        ),
        ("        model.zero_grad(set_to_none=True)  #", "        pass  #"),
    ],
    "save_load": [
        ('temporary := path + ".tmp"', "temporary := path"),
        ("    torch.set_rng_state(state[1])", "    pass"),
        ("    random.setstate(state[0])", "    pass"),
        ('            set_rng(state["rng"])', "            pass"),
        ('        set_rng(state["epoch_rng"])', "        pass"),
        ("            next(batches)", "            pass"),
        (
            "        part.load_state_dict(state[name])",
            '        name == "model" and part.load_state_dict(state[name])',
        ),
    ],
    "reproducibility": [
        ("self.seed * 1_000_003 + self.epoch", "self.seed * 1_000_003"),
        (", generator=draw)", ")"),
        ("    torch.manual_seed(seed)  #", "    pass  #"),
        ("generator=order", "generator=None"),
    ],
    "schedules": [
        ("return (step + 1) / warmup", "return step / warmup"),
        (
            "min(1.0, (step - warmup) / max(1, total - warmup))",
            "(step - warmup) / max(1, total - warmup)",
        ),
        ("scheduler.load_state_dict(saved[1])", "pass"),
    ],
    "early_stopping": [
        ("if loss < self.best - self.min_delta", "if not loss >= self.best"),
        ("copy.deepcopy(model.state_dict())", "model.state_dict()"),
        ('self.best, self.bad = state["best"], state["bad"]', "pass"),
    ],
    "gradient_clipping": [
        ("share = len(part) / len(x)", "share = micro_batch / len(x)"),
        ("if not norm.isfinite():", "if False:"),
        (
            "target) * share).backward()",
            "target) * share).backward()\n"
            "        nn.utils.clip_grad_norm_(model.parameters(), max_norm)",
        ),
    ],
    "ema": [
        (".float().eval()", ".eval()"),
        ("            average.copy_(buffer)", "            pass"),
        ("current, 1 - decay", "current, decay"),
    ],
    "profiling": [
        ("waits.append(loaded - clock)", "waits.append(0.0)"),
        ("key=lambda e: -getattr(e, key)", "key=lambda e: getattr(e, key)"),
    ],
    "inference": [
        ("outputs[i] = row", "outputs[order.index(i) if i in order else 0] = row"),
        ("key=lambda i: len(rows[i]), reverse=True", "key=lambda i: i"),
    ],
    "distributed": [
        ("[rank::ranks]", "[: len(x) // 2]"),
        ("model = DistributedDataParallel(model)", "pass"),
        ("losses.sum() * ranks / count", "losses.mean()"),
    ],
    "config": [
        ("        value = float(value)", "        pass"),
        ('{"true": True, "false": False}.get(value.lower(), value)', "bool(value)"),
        ("given.keys() - kinds.keys()", "set()"),
        ("if type(value) is not kind:", "if False:"),
    ],
    "unit_tests": [
        ("nn.GELU(), nn.Dropout(0.1)", "nn.BatchNorm1d(32), nn.Dropout(0.0)"),
        ("nn.GELU()", "nn.Softmax(0)"),
        ("nn.Linear(8, 32)", "nn.Linear(8, 32).requires_grad_(False)"),
        ("requires_grad=True)", "requires_grad=True).cpu().mul(1)"),
    ],
    "error_handling": [
        ("        self.signal = number", "        pass"),
        ("            signal.signal(number, handler)", "            pass"),
        ("return 128 + self.signal", "return 1"),
    ],
}


def command(path: Path) -> list[str]:
    """distributed.py as two processes of torchrun, all others as they are."""
    start = [sys.executable, "-W", "error"]
    if path.stem == "distributed":
        start = [sys.executable, "-m", "torch.distributed.run"]
        start += ["--standalone", "--nproc-per-node=2"]
    return [*start, str(path)]


def run(words: list[str], cwd: Path, gpu: bool = False) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_every_section_of_the_guide_has_a_snippet():
    assert sorted(GUIDE) == NAMES
    assert MUTANTS.keys() == set(NAMES)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_snippet_proves_itself(path, tmp_path):
    done = run(command(path), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_distributed_runs_without_torchrun(tmp_path):
    done = run([sys.executable, "-W", "error", FOLDER / "distributed.py"], tmp_path)
    assert done.stdout.startswith("rank 0 of 1"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_snippet_proves_itself_on_a_gpu(path, tmp_path):
    words = command(path)
    if path.stem == "distributed":
        words = [w.replace("=2", f"={torch.cuda.device_count()}") for w in words]
    done = run(words, tmp_path, gpu=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "distributed"])
def test_broken_idiom_does_not_pass(name, tmp_path):
    survivors = []
    for number, (old, new) in enumerate(MUTANTS[name]):
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert text.count(old) >= 1, f"{name}: {old!r} is not there"
        broken = tmp_path / f"{name}_{number}.py"
        broken.write_text(text.replace(old, new, 1), encoding="utf-8")
        code, _ = run_forked([str(broken)], tmp_path, CUDA_VISIBLE_DEVICES="")
        if code == 0:
            survivors.append(old)
    assert not survivors


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), MUTANTS["distributed"])
def test_broken_distributed_does_not_pass(old, new, tmp_path):
    text = (FOLDER / "distributed.py").read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "distributed.py"
    broken.write_text(text.replace(old, new), encoding="utf-8")
    assert run(command(broken), tmp_path).returncode != 0


def idiom_lines(text: str) -> list[str]:
    """What is to be pasted: before the proof, without docstrings, comments, blanks."""
    idiom = text.partition("\nif __name__ == ")[0]
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(idiom)):
        if isinstance(node, kinds) and ast.get_docstring(node):
            end = node.body[0].end_lineno
            documentation |= set(range(node.body[0].lineno, end + 1))
    lines = enumerate(idiom.splitlines(), 1)
    code = [line for number, line in lines if number not in documentation]
    return [c for c in code if c.strip() and not c.strip().startswith("#")]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_snippet_is_short_says_when_and_stands_alone(path):
    text = path.read_text(encoding="utf-8")
    assert 10 <= len(idiom_lines(text)) <= 40
    assert text.count("\n") <= 95  # save_load, with its proof
    opening = ast.get_docstring(ast.parse(text))
    assert opening.startswith("Use when ")
    assert "\n\nNot when " in opening
    allowed = {*sys.stdlib_module_names, "torch", "yaml"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or node.names[0].name
            assert module.partition(".")[0] in allowed, module


@pytest.mark.parametrize(
    ("native_bf16", "capability", "dtype"),
    [
        (True, (9, 0), torch.bfloat16),
        (False, (7, 5), torch.float16),
        (False, (6, 1), torch.float32),
    ],
)
def test_device_and_dtype_on_cuda(monkeypatch, native_bf16, capability, dtype):
    """The branches for GPUs, with two that do not exist."""
    import contextlib
    import runpy

    fake = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda i: SimpleNamespace(total_memory=[8, 24][i]),
        "device": contextlib.nullcontext,
        # As the real one: with emulation, every card says yes.
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or native_bf16
        ),
        "get_device_capability": lambda device: capability,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    snippet = runpy.run_path(str(FOLDER / "device.py"))
    device = snippet["pick_device"]()
    assert device == torch.device("cuda", 1)
    assert snippet["pick_dtype"](device) is dtype
    assert snippet["pick_device"](force_cpu=True).type == "cpu"
