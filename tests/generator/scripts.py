"""Helpers for tests that run generated scripts as scripts, on a little real data."""

import csv
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from generator.cli import main
from generator.options import TASKS
from templates.builtin_data import (
    stdlib_docstrings,
    stdlib_functions,
    write_digit_images,
    write_digit_table,
    write_jsonl,
)

# The longest sweeps: `make test` runs one task of them, `make test-all` every one.
ONE_TASK = [
    task if task == "text" else pytest.param(task, marks=pytest.mark.slow)
    for task in TASKS
]
DRIVER = Path(__file__).with_name("driver.py")
STRICT = ("-W", "error::FutureWarning", "-W", "error::DeprecationWarning")


# A model small enough for two cores; its shape is what a user edits first.
SMALLER = {
    "width=128, depth=2": "width=32, depth=2",
    "width=128, depth=4": "width=32, depth=2",
    "widths=(32, 64, 128), depth=2": "widths=(8, 16), depth=2",
}

# In double precision and without dropout, so that only a real difference shows.
EXACT = {
    task: {
        "dropout=0.1": "dropout=0.0",
        "build_model(**spec)": "build_model(**spec).double()",
        **more,
    }
    for task, more in {
        "text": {},
        "image": {"images_BCHW.float()": "images_BCHW.double()"},
        "lm": {},
        "tabular": {"model(features_BF)": "model(features_BF.double())"},
        "embedding": {},
    }.items()
}


def write_script(
    folder: Path,
    *words: str,
    name: str = "train.py",
    edits: dict[str, str] | None = None,
) -> Path:
    """Generate a script, with a smaller model and further edits, old text to new."""
    path = folder / name
    assert main([*words, "-o", str(path), "--force"]) == 0
    text = path.read_text()
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    for old, new in (edits or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


@functools.cache
def docstrings() -> list[tuple[str, str]]:
    """Docstrings of three packages with their names."""
    return list(zip(*stdlib_docstrings(("logging", "xml", "http")), strict=True))


def write_text_data(folder: Path, rows: int = 120) -> Path:
    """Docstrings as a CSV file, quotes and newlines in them."""
    path = folder / "texts.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(docstrings()[::3][:rows])
    return path


def write_image_data(folder: Path, images: int = 120) -> Path:
    """The first handwritten digits as PNG, a folder a class."""
    path = write_digit_images(folder / "digits")
    for extra in sorted(path.glob("*/*.png"), key=lambda file: file.stem)[images:]:
        extra.unlink()
    return path


def write_lm_data(folder: Path, texts: int = 60) -> Path:
    """Docstrings, a text file each."""
    path = folder / "texts"
    path.mkdir()
    for number, (text, _) in enumerate(docstrings()[::3][:texts]):
        (path / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return path


def write_tabular_data(folder: Path, rows: int = 120) -> Path:
    """The first handwritten digits, a row each: 64 pixels and the label."""
    path = write_digit_table(folder / "all.parquet")
    parquet.write_table(parquet.read_table(path).slice(0, rows), path)
    return path


def write_embedding_data(folder: Path, rows: int = 120) -> Path:
    """Functions of the standard library and their docstrings, as JSONL."""
    queries, documents = (column[:rows] for column in stdlib_functions())
    columns = {"query": queries, "document": documents}
    return write_jsonl(folder / "pairs.jsonl", columns)


WRITE_DATA = {
    "text": write_text_data,
    "image": write_image_data,
    "lm": write_lm_data,
    "tabular": write_tabular_data,
    "embedding": write_embedding_data,
}


def import_file(path: Path):
    """A generated script as a module, not to be found under its name again."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_train", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def data_words(task: str, folder: Path) -> list[str]:
    """The options that make a run short: little data, two epochs."""
    data = str(WRITE_DATA[task](folder))
    words = ["--data", data, "--epochs", "2", "--batch-size", "16"]
    words += {"lm": ["--max-tokens=64"], "image": ["--image-size=16"]}.get(task, [])
    return [*words, "--log-every", "2", "--num-workers", "0"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def command_line(script: Path, *words: str, inject: str = "", ranks: int = 0):
    """The command that runs a script, by torchrun where there are ranks.

    Args:
        inject: statements to run before main(), `script` being the module.
    """
    target = [str(DRIVER), str(script), inject] if inject else [str(script)]
    if not ranks:
        return [sys.executable, *STRICT, *target, *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    strict = ["--no-python", sys.executable, *STRICT]
    return [*launcher, f"--nproc-per-node={ranks}", *strict, *target, *words]


def run(
    script: Path,
    *words: str,
    expect: int = 0,
    inject: str = "",
    ranks: int = 0,
    **extra: str,
):
    """Run a script in its own folder; its output as text."""
    command = command_line(script, *words, inject=inject, ranks=ranks)
    if ranks or extra:
        done = subprocess.run(
            command,
            cwd=script.parent,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=600,
        )
        code, output = done.returncode, done.stdout + done.stderr
    else:
        code, output = run_forked(command[1 + len(STRICT) :], script.parent)
    assert code == expect, output
    return output


@functools.cache
def forker() -> subprocess.Popen:
    """The process that forks; it ends when this one closes its pipe, at the latest."""
    return subprocess.Popen(
        [sys.executable, *STRICT, str(DRIVER.with_name("forker.py"))],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_forked(command: list[str], folder: Path, **extra: str) -> tuple[int, str]:
    """Exit code and output of `python command`, in a process that has torch already."""
    with tempfile.TemporaryDirectory() as temporary:
        output = [Path(temporary, name) for name in ("stdout", "stderr")]
        job = {
            "command": command,
            "folder": str(folder),
            "environment": environment(**extra),
            "output": [*map(str, output)],
        }
        process = forker()
        print(json.dumps(job), file=process.stdin)
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, "".join(path.read_text() for path in output)


def start(script: Path, *words: str, ranks: int = 0, **options: Any):
    """The process of a script, to be killed or signalled."""
    return subprocess.Popen(
        command_line(script, *words, ranks=ranks),
        cwd=script.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A job in a shell's background ignores Ctrl-C; these tests may be run in one.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def wait_for_lines(log: Path, count: int, process: subprocess.Popen) -> None:
    """Until the log has `count` lines, or the process has ended."""
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


def assert_clean_to_ruff(folder: Path) -> None:
    """Lint and format of the scripts in a folder, each in a folder of its own."""
    rules = "E,F,W,I,B,UP,SIM,C4,RUF,PIE,RET"
    # One root a script, as a user has it: its tools are a module of its own.
    src = json.dumps([str(path) for path in folder.iterdir()])
    for words in (
        ["check", "--extend-select", rules, "--config", f"src = {src}"],
        ["format", "--check"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--isolated", str(folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[:3000] + done.stderr[:1000]


def newest_state(out_dir: Path) -> dict:
    """The newest training state of a run, as saved."""
    path = max((out_dir / "checkpoints").glob("step-*.pt"))
    return torch.load(path, weights_only=True)


def best_weights(out_dir: Path) -> dict[str, torch.Tensor]:
    """The model of a run's best.pt."""
    return torch.load(out_dir / "best.pt", weights_only=True)["model_state_dict"]


def same(left, right) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same(left[k], right[k]) for k in left
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def largest_difference(left: dict, right: dict) -> float:
    """Over two dicts of tensors."""
    assert left.keys() == right.keys()
    return max((left[k].double() - right[k].double()).abs().max().item() for k in left)


# To inject: the process ends after its fourth save of the training state.
END_AFTER_FOUR_SAVES = """
real, calls = script.StateSaver.save, []
def save(saver, step):
    real(saver, step)
    calls.append(1)
    if len(calls) == 4:
        raise SystemExit(1)
script.StateSaver.save = save
"""
