"""test_train.py, which goes along with a script: each of its checks can fail.

For each fault that a user might put into the script while editing, the tests that
should notice do, and no other. Faults of what only shows in processes (kill, resume,
ranks) run those tests as well, for all faults in `make test-all`.
"""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
import unittest
from collections.abc import Collection
from pathlib import Path

import pytest

from generator.options import TASKS

from .scripts import environment, write_script, write_text_data

FLAGS = (
    "--tests",
    "--resume",
    "--oom-recovery",
    "--scheduler=cosine",
    "--ema=0.9",
)
IN_PROCESS = {
    "test_forward_shape",
    "test_samples_do_not_see_each_other",
    "test_backward",
    "test_overfits_one_batch",
    "test_deterministic",
    "test_accumulation",
    "test_out_of_memory",
}
PROCESSES = {
    "test_kill_and_resume",
    "test_two_ranks",
    "test_bad_data",
    "test_out_of_memory_in_a_run",
}


def write_lm_data(folder: Path) -> Path:
    path = folder / "words.txt"
    path.write_text(Path(unittest.__file__).with_name("case.py").read_text())
    return path


def write_tabular_data(folder: Path) -> Path:
    import pandas
    from sklearn.datasets import load_digits

    data = load_digits()
    table = pandas.DataFrame(data.data[:150], columns=[f"p{n}" for n in range(64)])
    table["label"] = data.target[:150]
    path = folder / "digits.parquet"
    table.to_parquet(path)
    return path


def write_embedding_data(folder: Path) -> Path:
    import pandas

    from .scripts import docstrings

    rows = [(text[:40], text) for text, _ in docstrings()[:120]]
    path = folder / "pairs.csv"
    pandas.DataFrame(rows, columns=["query", "document"]).to_csv(path, index=False)
    return path


WRITERS = {
    "text": write_text_data,
    "lm": write_lm_data,
    "tabular": write_tabular_data,
    "embedding": write_embedding_data,
}


def write_tested(
    folder: Path, task: str, *flags: str, edits: dict[str, str] | None = None
) -> Path:
    """A script and its tests, on little data; the folder."""
    words = ["--task", task, *(flags or FLAGS)]
    write_script(folder, *words, edits=edits)
    tests = folder / "test_train.py"
    text = tests.read_text()
    if task in WRITERS:
        data = WRITERS[task](folder).name
        old = "OPTIONS: list[str] = []"
        assert old in text
        text = text.replace(old, f"OPTIONS: list[str] = ['--data={data}']")
    tests.write_text(text)
    return folder


def run_tests(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Run tests of a folder's test_train.py in this process; what failed, and why."""
    spec = importlib.util.spec_from_file_location("emitted", folder / "test_train.py")
    cwd, path, modules = os.getcwd(), list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules["emitted"] = module
        spec.loader.exec_module(module)
        available = unittest.TestLoader().getTestCaseNames(module.TestTraining)
        assert set(available) <= IN_PROCESS | PROCESSES
        suite = unittest.TestSuite(
            module.TestTraining(name) for name in available if name in names
        )
        result = unittest.TestResult()
        with contextlib.redirect_stdout(io.StringIO()):
            suite.run(result)
    finally:
        os.chdir(cwd)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name in ("train", "train_tools", "emitted"):
                del sys.modules[name]
    assert result.testsRun == len(set(available) & set(names))
    return {
        test.id().rpartition(".")[2]: text
        for test, text in [*result.failures, *result.errors]
    }


# Fault: (old text, new text) of the script, the tests that must notice, and what one
# of their messages must say.
FAULTS = {
    "a class too many": (
        ("VOCAB_SIZE, len(classes),", "VOCAB_SIZE, len(classes) + 1,"),
        {"test_forward_shape"},
        "logits are (B, classes)",
    ),
    "padding that is not masked": (
        (
            "    return tokenize(texts), torch",
            "    return tokenize(texts).clamp(min=1), torch",
        ),
        {"test_samples_do_not_see_each_other"},
        "padding that is not masked",
    ),
    "a detached layer": (
        ("x_BTD + self.dropout(seen_BTD)", "x_BTD + self.dropout(seen_BTD).detach()"),
        {"test_backward"},
        "encoder.blocks.0.attention.qkv.weight: none",
    ),
    "a layer that is not used": (
        (
            "        self.head = ",
            "        self.spare = nn.Linear(2, 2)\n        self.head = ",
        ),
        {"test_backward"},
        "spare.weight: none",
    ),
    "a parameter frozen by mistake": (
        (
            "        self.head = nn.Linear(width, classes)\n",
            "        self.head = nn.Linear(width, classes)\n"
            "        self.encoder.embed.requires_grad_(False)\n",
        ),
        {"test_backward"},
        "encoder.embed.weight",
    ),
    "outputs that cannot reach what the loss asks for": (
        ("logits_BC = model(tokens_BT)", "logits_BC = 0.01 * model(tokens_BT).tanh()"),
        {"test_overfits_one_batch"},
        "the loss of one batch went from",
    ),
    "weights from a generator without a seed": (
        (
            "        self.head = nn.Linear(width, classes)\n",
            "        self.head = nn.Linear(width, classes)\n"
            "        unseeded = torch.Generator()\n"
            "        unseeded.seed()\n"
            "        nn.init.normal_(self.head.weight, std=0.1, generator=unseeded)\n",
        ),
        {"test_deterministic", "test_kill_and_resume", "test_out_of_memory_in_a_run"},
        "differ (weights/",
    ),
    "a loss that depends on the cut": (
        (
            "F.cross_entropy(logits_BC, labels_B)",
            'F.cross_entropy(logits_BC, labels_B, reduction="sum")',
        ),
        {"test_accumulation", "test_out_of_memory_in_a_run"},
        "compute_loss must be a mean",
    ),
    "dropout that is drawn anew after out of memory": (
        ("            on_retry=lambda _: restore() if restore else None,\n", ""),
        {"test_out_of_memory"},
        "a step repeated after out of memory differs",
    ),
    "gradients of a failed try that stay": (
        (
            "with gradients_apart(model) if model else contextlib.nullcontext():",
            "with contextlib.nullcontext():",
        ),
        {"test_out_of_memory"},
        "what the failed try leaves behind",
    ),
    "samples that are lost where memory runs out": (
        ("        start += done\n", "        start += wanted\n"),
        {"test_out_of_memory", "test_out_of_memory_in_a_run"},
        "out of memory left samples out",
    ),
    "counters that are not saved": (
        ('        "run": run,\n', '        "run": RunState(),\n'),
        {"test_kill_and_resume"},
        "after two kills the run differs (metrics.jsonl",
    ),
    "averaged weights that are not saved": (
        ('        "ema": ema,\n', ""),
        {"test_kill_and_resume"},
        "after two kills the run differs",
    ),
    "a schedule that is not saved": (
        ('        "scheduler": scheduler,\n', ""),
        {"test_kill_and_resume"},
        "after two kills the run differs",
    ),
    "a signal that is not answered": (
        ("return 128 + context.signal_number", "pass"),
        {"test_kill_and_resume"},
        "SIGTERM must save and stop",
    ),
    "ranks that do not exchange their gradients": (
        ("    average_gradients(model)", "    # average_gradients(model)"),
        {"test_two_ranks"},
        "with one process",
    ),
    "errors that are not caught": (
        ("        exit_code = 2\n", "        raise\n"),
        {"test_bad_data"},
        "exit code 2 and one line",
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_tested(tmp_path_factory.mktemp("tested"), "text")


@pytest.fixture(scope="module")
def text_ddp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    return write_tested(folder, "text", *FLAGS, "--distributed=ddp")


def with_fault(folder: Path, request: pytest.FixtureRequest, fault: str) -> Path:
    """A copy of a script and its tests with a fault in the script."""
    of_ranks = FAULTS[fault][1] == {"test_two_ranks"}
    whole = request.getfixturevalue("text_ddp" if of_ranks else "text")
    for file in whole.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    script = folder / "train.py"
    old, new = FAULTS[fault][0]
    source = script.read_text()
    assert source.count(old) >= 1, old
    script.write_text(source.replace(old, new, 1))
    return folder


# Noticed as "counters that are not saved" is, by two kills and a SIGTERM.
LIKE_ANOTHER = {
    "averaged weights that are not saved",
    "a schedule that is not saved",
    "a signal that is not answered",
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.slow) if fault in LIKE_ANOTHER else fault
        for fault in FAULTS
    ],
)
def test_a_fault_is_noticed_by_the_tests_that_should(fault, request, tmp_path):
    _, expected, part = FAULTS[fault]
    names = IN_PROCESS if expected & IN_PROCESS else expected
    failed = run_tests(with_fault(tmp_path, request, fault), names)
    assert failed.keys() == expected & set(names), failed
    assert part in "".join(failed.values())


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed_by_no_other_test(fault, request, tmp_path):
    _, expected, _ = FAULTS[fault]
    failed = run_tests(with_fault(tmp_path, request, fault), IN_PROCESS | PROCESSES)
    assert failed.keys() == expected, failed


@pytest.mark.parametrize("task", TASKS)
def test_a_script_as_it_comes_passes(task, tmp_path):
    write_tested(tmp_path, task)
    assert not run_tests(tmp_path, IN_PROCESS)


@pytest.mark.parametrize(
    "flags",
    [("--tests",), ("--tests", "--amp", "--accumulate=2"), ("--tests", "--split")],
    ids="".join,
)
def test_only_what_the_script_has_is_tested(flags, tmp_path):
    write_tested(tmp_path, "text", *flags)
    assert not run_tests(tmp_path, IN_PROCESS)
    source = (tmp_path / "test_train.py").read_text()
    found = set(re.findall(r"def (test_\w+)", source))
    absent = {
        "test_out_of_memory",
        "test_out_of_memory_in_a_run",
        "test_kill_and_resume",
        "test_two_ranks",
    }
    if "--accumulate=2" not in flags:
        absent.add("test_accumulation")
    assert found == (IN_PROCESS | PROCESSES) - absent


def test_they_fit_batches_of_like_length(tmp_path):
    write_tested(tmp_path, "text", "--tests", "--token-budget", "--resume")
    assert not run_tests(tmp_path, {"test_kill_and_resume"})


@pytest.mark.slow
def test_they_fit_batches_of_like_length_on_two_ranks(tmp_path):
    flags = ("--tests", "--token-budget", "--distributed=ddp")
    write_tested(tmp_path, "text", *flags)
    assert not run_tests(tmp_path, {"test_two_ranks"})


@pytest.mark.parametrize("runner", [["test_train.py"], ["-m", "pytest", "-q"]])
def test_one_command_runs_them(runner, text):
    """As a script and by pytest; all of them, processes too, within two minutes."""
    words = runner if len(runner) == 1 else [*runner, "-p", "no:cacheprovider"]
    quick = ["TestTraining.test_forward_shape"] if len(runner) == 1 else []
    quick = quick or ["-k", "forward_shape", "test_train.py"]
    done = subprocess.run(
        [sys.executable, *words, *quick],
        cwd=text,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_all_of_them_pass_in_two_minutes_on_the_built_in_data(task, tmp_path):
    write_script(tmp_path, "--task", task, *FLAGS)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "test_train.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 120
