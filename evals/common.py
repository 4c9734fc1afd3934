"""What verifiers share.

A check is a function `check_*(answer)`. Its docstring states what holds unless it
raises Failed.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# torchrun by its own module: the command may not be on PATH.
LAUNCH = ["-m", "torch.distributed.run", "--standalone"]


class Failed(Exception):
    """The statement of a check does not hold; the message is the evidence."""


def expect(condition: object, evidence: str) -> None:
    if not condition:
        raise Failed(evidence)


def clean_environment(**more: str) -> dict[str, str]:
    """CPU, one thread, nothing of this process's Python settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MKL_NUM_THREADS": "1"}
    return {**kept, **fixed, "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(words: list, folder: Path, timeout_s: float = 120, **more: str):
    """A finished process of this Python (a list that begins with an option or file)."""
    try:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=folder,
            env=clean_environment(**more),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{words} did not end within {timeout_s} s") from None


def must_run(words: list, folder: Path, timeout_s: float = 120, **more: str) -> str:
    done = run(words, folder, timeout_s, **more)
    tail = (done.stderr or done.stdout).strip()[-300:]
    expect(done.returncode == 0, f"{words}: exit code {done.returncode}: {tail}")
    return done.stdout


@contextmanager
def copy_of(answer: Path) -> Iterator[Path]:
    """A copy to run in, without what earlier runs, the assistant's too, left."""
    with tempfile.TemporaryDirectory(prefix="eval ") as name:
        folder = Path(name) / "copy"
        left = shutil.ignore_patterns("__pycache__", "runs")
        shutil.copytree(answer, folder, ignore=left)
        yield folder


def need(answer: Path, name: str) -> Path:
    path = answer / name
    expect(path.is_file(), f"there is no {name}")
    return path


def original(number: int, name: str) -> Path:
    """The input file as the task gave it."""
    return FOLDER / "files" / f"{number:02}" / name


def load_tensors(path: Path) -> dict:
    """All tensors of a saved file by their place in it; only data, no code."""
    import torch

    expect(path.is_file(), f"there is no {path.name}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Failed(f"{path.name} does not load: {str(error)[:200]}") from None
    found = {}

    def walk(value: object, place: str) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{place}/{key}")

    walk(saved, "")
    expect(found, f"{path.name} holds no tensors")
    return found


def losses(output: str) -> list[float]:
    """The values of all lines `...: loss X`."""
    lines = [line for line in output.splitlines() if ": loss " in line]
    return [float(line.rpartition(" ")[2]) for line in lines]


def expect_equal(got: dict, wanted: dict, when: str) -> None:
    """The same tensors to the last bit."""
    import torch

    expect(got.keys() == wanted.keys(), f"other names of tensors {when}")
    bad = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    expect(not bad, f"other tensors {when}: {bad[:3]}")


# A training script is started by `words` in a folder, and writes its log, one JSON line
# an epoch with a value `name` in it, and its weights to runs/a.


def logged(folder: Path, name: str) -> list[float]:
    path = folder / "runs/a/metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # being written
        if name in record:
            found.append(record[name])
    return found


@functools.cache
def trained(
    answer: Path, words: tuple[str, ...], name: str
) -> tuple[dict, list[float]]:
    """The tensors of best.pt and what was logged, of a run that nothing disturbs."""
    need(answer, words[0])
    with copy_of(answer) as folder:
        must_run(list(words), folder)
        return load_tensors(folder / "runs/a/best.pt"), logged(folder, name)


def start(words: tuple[str, ...], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL, for its workers as well."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_until(
    words: tuple[str, ...], folder: Path, name: str, epochs: int
) -> subprocess.Popen:
    """Started, and it has just logged this many epochs (or has ended)."""
    process = start(words, folder)
    give_up = time.monotonic() + 90
    while process.poll() is None and len(logged(folder, name)) < epochs:
        if time.monotonic() > give_up:
            kill(process)
            raise Failed(f"no {epochs} epochs within 90 s")
        time.sleep(0.02)
    return process


def kill_after(
    words: tuple[str, ...], folder: Path, name: str, epochs: int, seconds: float = 0.1
) -> None:
    """Start it and kill it when this many epochs are in the log, and some seconds."""
    process = start_until(words, folder, name, epochs)
    time.sleep(seconds)
    kill(process)


def go_on(words: tuple[str, ...], folder: Path, name: str) -> list[float]:
    """What is in the log after the last start; that has to go on where it was."""
    process = start(words, folder)
    fewest = len(logged(folder, name))
    while process.poll() is None:
        fewest = min(fewest, len(logged(folder, name)))
        time.sleep(0.02)
    expect(process.returncode == 0, f"exit code {process.returncode} on resuming")
    expect(fewest >= 1, "the log of finished epochs was thrown away: it began anew")
    return logged(folder, name)


def no_pytorch(answer: Path) -> None:
    """For tasks in which the skill has nothing to say."""
    for path in answer.rglob("*"):
        if path.suffix in (".py", ".sh", ".md") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            expect("Stitched by pytorch-optimization" not in text, f"{path.name}: ours")
            expect("import torch" not in text, f"{path.name} imports torch")
