"""Ways to choose sections: --preset, --auto, --from and --save."""

import ast
import json
import os
import shlex
import stat
from pathlib import Path

import pytest
import yaml

from generator.auto import choose_sections, find_gpus, parse_size
from generator.cli import main
from generator.options import (
    PRESETS,
    SECTIONS,
    TASKS,
    check_request,
    preset_sections,
)

from .scripts import assert_clean_to_ruff


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command_of(capsys, *words: str) -> str:
    """The canonical command of a request."""
    assert main([*words, "--json", "--force"]) == 0
    return json.loads(capsys.readouterr().out)["command"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_sections(preset, task, capsys):
    flags = [
        SECTIONS[name].spell(value)
        for name, value in preset_sections(preset, task).items()
    ]
    words = ("--task", task)
    assert command_of(capsys, *words, "--preset", preset) == command_of(
        capsys, *words, *flags
    )


def test_the_command_line_goes_over_a_preset(capsys):
    command = command_of(capsys, "--preset=recommended", "--clip=0.5", "--plot")
    assert "--clip=0.5" in command
    assert "--plot" in command
    assert main(["--preset=best"]) == 2
    assert "--preset best: choose minimal or" in capsys.readouterr().err


def test_saved_answers_make_the_same_script_again(capsys):
    words = ["--task=image", "--model=mine.nets:Net", "--amp", "--clip=0.5", "--split"]
    words += ["--checkpointing=offload", "-o", "a b.py".replace(" ", "_")]
    assert main([*words, "--save", "answers.yaml"]) == 0
    first = Path("a_b.py").read_text()
    assert yaml.safe_load(Path("answers.yaml").read_text())["clip"] == 0.5
    assert main(["--from", "answers.yaml"]) == 3  # it is there already
    assert main(["--from", "answers.yaml", "--force"]) == 0
    assert Path("a_b.py").read_text() == first
    assert main(["--from", "answers.yaml", "--clip=2", "--force"]) == 0
    assert "--clip=2.0" in Path("a_b.py").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tsak: text", "unknown option tsak: did you mean task?"),
        ("- amp", "write one `option: value` a line"),
        ("amp: [", "no YAML"),
        ("clip: much", "--clip=much: give a number"),
        ("scheduler: true", "--scheduler=None: choose cosine"),
    ],
)
def test_bad_answers_are_named(text, complaint, capsys):
    Path("answers.yaml").write_text(text)
    assert main(["--from", "answers.yaml"]) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("train.py").exists()


def test_answers_that_are_not_there(capsys):
    assert main(["--from", "none.yaml"]) == 2
    assert "--from none.yaml: cannot be read" in capsys.readouterr().err


def test_a_section_can_be_switched_off_in_a_file(capsys):
    Path("answers.yaml").write_text("resume: false\nplot: true\n")
    command = command_of(capsys, "--preset=recommended", "--from=answers.yaml")
    assert "--plot" in command
    assert "--resume" not in command


def fake_nvidia_smi(monkeypatch, *rows: str) -> None:
    """An nvidia-smi on PATH that prints these rows."""
    path = Path("bin/nvidia-smi")
    path.parent.mkdir(exist_ok=True)
    lines = "\n".join(f"echo '{row}'" for row in rows)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent.resolve()}{os.pathsep}/usr/bin:/bin")


H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0"
T4 = "Tesla T4, 15360, 7.5"


@pytest.mark.parametrize(
    ("rows", "size", "wanted", "unwanted"),
    [
        ([], "1B", {"clip", "resume"}, {"amp", "compile", "distributed"}),
        ([H100], "100M", {"amp", "compile"}, {"checkpointing", "fp8", "distributed"}),
        ([H100], "4B", {"fp8", "checkpointing=full", "oom_recovery"}, {"distributed"}),
        ([H100] * 8, "100M", {"distributed=ddp", "oom_recovery"}, {"checkpointing"}),
        ([H100] * 8, "7B", {"distributed=fsdp"}, {"oom_recovery", "checkpointing"}),
        ([T4], "400M", {"amp", "checkpointing=selective"}, {"fp8"}),
        (["Tesla K80, 11441, 3.7"], "1M", {"clip"}, {"amp", "compile"}),
    ],
)
def test_auto_chooses_what_the_machine_can_run(
    rows, size, wanted, unwanted, monkeypatch
):
    fake_nvidia_smi(monkeypatch, *rows)
    choices = choose_sections(parse_size(size), find_gpus())
    chosen = {c.section + (f"={c.value}" if c.value else "") for c in choices}
    assert wanted <= chosen
    assert not unwanted & {name.partition("=")[0] for name in chosen}
    request, problems = check_request(
        "text", {c.section: c.value for c in choices}, "train.py", False
    )
    assert request, problems


def test_auto_says_what_it_chose_and_why_and_can_be_overruled(monkeypatch, capsys):
    fake_nvidia_smi(monkeypatch, H100)
    assert main(["--auto=4B", "--clip=0.5", "-o", "train.py"]) == 0
    said = capsys.readouterr().err
    assert "--auto: 1 x NVIDIA H100 80GB HBM3, 86 GB" in said
    assert "--checkpointing: 21.5 GB are left on a GPU for activations" in said
    text = Path("train.py").read_text()
    assert "--clip=0.5" in text
    assert "--checkpointing=full" in text


def test_auto_refuses_what_is_no_size(capsys):
    assert main(["--auto=big"]) == 2
    assert "--auto=big: give a number of parameters" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["hf:", "net", "a b:C", "module:Class:x", "timm:"])
def test_a_model_that_cannot_be_is_refused(text, capsys):
    assert main([f"--model={text}"]) == 2
    assert f"--model {text}: give hf:NAME" in capsys.readouterr().err


def settings_of(path: str) -> dict:
    """The defaults of a script's settings, by the source of their values."""
    (node,) = (
        node
        for node in ast.parse(Path(path).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    fields = (field for field in node.body if isinstance(field, ast.AnnAssign))
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


def test_set_changes_defaults_of_the_script_and_nothing_else(capsys):
    words = ["--amp", "--force"]
    assert main(words) == 0
    plain, before = settings_of("train.py"), Path("train.py").read_text()
    wanted = {"best_by": "val_accuracy", "log_every": 0, "learning_rate": 3e-4}
    wanted |= {"cpu": True, "num_workers": 2, "data": "a b.csv"}
    pairs = [f"{name}={value}" for name, value in wanted.items()]
    pairs[1] = "log-every=0"  # as its option is spelled
    command = command_of(capsys, *words[:1], "--set", *pairs[:2], "--set", *pairs[2:])
    assert settings_of("train.py") == plain | wanted
    after = Path("train.py").read_text()
    changed = set(before.splitlines()) ^ set(after.splitlines())
    in_code = [line for line in changed if " = " in line]
    assert len(in_code) == 2 * len(wanted)  # the rest is the command in the header
    assert_clean_to_ruff(Path())
    # The header's command makes it again, and so does a file.
    assert main([*shlex.split(command)[1:], "--force", "--save", "a.yaml"]) == 0
    assert Path("train.py").read_text() == after
    assert main(["--from", "a.yaml", "--force"]) == 0
    assert Path("train.py").read_text() == after
    assert main(["--from", "a.yaml", "--set", "log_every=7", "--force"]) == 0
    assert settings_of("train.py") == plain | wanted | {"log_every": 7}


def test_defaults_that_cannot_be_are_named_together(capsys):
    wrong = ["epoch=3", "epochs=0", "log_every=x", "best_by=f1", "cpu=maybe"]
    wrong += ['data="', f"out_dir={'long' * 20}", "clip_norm=1"]
    assert main(["--set", *wrong]) == 2
    said = capsys.readouterr().err
    for complaint in (
        "unknown setting epoch: did you mean epochs?",
        "--set epochs=0: expected at least 1",
        "--set log_every=x: expected a whole number",
        "--set best_by=f1: expected one of val_loss, val_accuracy",
        "--set cpu=maybe: expected true or false",
        '--set data=": expected no quotes, backslashes or line ends',
        "too long for a default: pass it to the script",
        "unknown setting clip_norm: with these sections there are data, ",
    ):
        assert complaint in said
    assert not Path("train.py").exists()
    assert main(["--set", "epochs", "--clip=x"]) == 2
    said = capsys.readouterr().err
    assert "--set epochs: write NAME=VALUE, such as epochs=20" in said
    assert "--clip=x" in said
