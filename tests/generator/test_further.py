"""Files beside the script (--predict, --tests, --slurm): written together, one copy."""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from generator.cli import main
from generator.options import SECTIONS, TASKS, check_request
from generator.render import render_script
from generator.stitch import (
    Library,
    StitchError,
    parse_module,
    stitch_companion,
    stitch_script,
)

from .scripts import assert_clean_to_ruff

ROOT = Path(__file__).resolve().parents[2]
WRITERS = [section for section in SECTIONS.values() if section.writes[0]]
FLAGS = [section.flag for section in WRITERS]
FILES = [section.writes[0] for section in WRITERS]
LIBRARY = Library.load()


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def render(task: str, flags: list[str], output: str = "train.py", split: bool = False):
    values = {}
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        values[name.replace("-", "_")] = value or None
    request, problems = check_request(task, values, output, split)
    assert not problems
    return render_script(request, LIBRARY)


def test_they_are_written_beside_the_script_and_reported(capsys):
    assert main([*FLAGS, "--resume", "--json", "-o", "sub/train.py"]) == 0
    report = json.loads(capsys.readouterr().out)
    files = ["sub/train.py", *(f"sub/{name}" for name in FILES)]
    assert list(report["files"]) == files
    for file, lines in report["files"].items():
        assert Path(file).read_text().count("\n") == lines


def test_another_stem_gives_other_names():
    assert main([*FLAGS, "--resume", "-o", "my_run.py"]) == 0
    expected = {s.writes[1].format(stem="my_run") for s in WRITERS} | {"my_run.py"}
    assert {path.name for path in Path().iterdir()} == expected
    for name in expected - {"my_run.py"}:
        text = Path(name).read_text()
        assert "my_run" in text
        assert not re.search(r"\b(from|import) train\b", text)


@pytest.mark.parametrize("file", FILES)
def test_all_or_none_are_written(file, capsys):
    Path(file).write_text("mine")
    assert main([*FLAGS, "--resume"]) == 3
    assert f"{file} exists" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == [file]
    assert Path(file).read_text() == "mine"
    assert main([*FLAGS, "--resume", "--force"]) == 0
    assert Path(file).read_text() != "mine"


@pytest.mark.parametrize("flag", FLAGS)
def test_printing_the_script_leaves_no_place_for_them(flag, capsys):
    assert main([flag, "--resume", "-o", "-"]) == 2
    assert f"{flag} does not go with -o -" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [f for f in FLAGS if f != "--slurm"])
def test_a_script_that_cannot_be_imported_is_refused(flag, capsys):
    assert main([flag, "-o", "my-run.py"]) == 2
    assert "letters, digits and _" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_the_script_itself_does_not_change(task):
    def body(script):
        return script.text.split('"""', 2)[2]

    assert body(render(task, ["--resume", *FLAGS])) == body(render(task, ["--resume"]))


def test_the_header_holds_the_command_that_makes_them_again():
    words = ["--task=image", "--amp", "--resume", "--clip=0.5", *FLAGS]
    assert main(words) == 0
    first = {file: Path(file).read_text() for file in FILES}
    for file, text in first.items():
        lines = re.search(r"generate-script .*?(?=\n(?:\"\"\"|#\n))", text, re.S)[0]
        again = lines.replace("\\\n", " ").replace("#", " ").split()[1:]
        for name in FILES:
            Path(name).unlink()
        assert main([*again, "--force"]) == 0
        assert Path(file).read_text() == text


def defined(source: str) -> dict[str, ast.stmt]:
    return {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_what_the_script_has_is_imported_and_what_it_lacks_is_carried(task, split):
    for flags in ([], ["--amp", "--resume", "--oom-recovery", "--ema"]):
        script = render(
            task, [*flags, *(f for f in FLAGS if f != "--slurm")], split=split
        )
        there = defined(script.text) | defined(script.tools)
        for file, source in script.further.items():
            compile(source, file, "exec")
            own = defined(source)
            carried = {name for name in own if name in LIBRARY.owners}
            assert not carried & there.keys()
            used = {
                node.id
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Name)
            }
            for name in carried:
                definition = LIBRARY.owners[name].by_name[name]
                assert definition.source in source
                assert name in used
            modules = {
                node.module: {item.name for item in node.names}
                for node in ast.parse(source).body
                if isinstance(node, ast.ImportFrom)
            }
            assert "build_model" in modules["train"]
            if split:  # each name comes from the file that has it
                assert not modules["train"] & LIBRARY.owners.keys()
                assert modules["train_tools"] <= LIBRARY.owners.keys()


def test_they_are_clean_to_ruff(tmp_path):
    many = ["--amp", "--checkpointing", "--accumulate=2", "--clip", "--scheduler=wsd"]
    many += ["--ema", "--skip-nonfinite", "--resume", "--profile", "--plot"]
    sets = [
        [],
        many,
        [*many, "--distributed=ddp"],
        ["--resume", "--distributed=fsdp"],
        ["--resume", "--oom-recovery"],
        ["--amp", "--oom-recovery"],
    ]
    rows = itertools.product(TASKS, sets, (False, True))
    for number, (task, chosen, split) in enumerate(rows):
        lacks = {"--slurm"} if "--resume" not in chosen else set()
        name = ("train", "run7")[number % 2]
        folder = tmp_path / str(number)
        folder.mkdir()
        more = [flag for flag in FLAGS if flag not in lacks]
        script = render(task, [*chosen, *more], f"{name}.py", split)
        (folder / f"{name}.py").write_text(script.text)
        if script.tools:
            (folder / f"{name}_tools.py").write_text(script.tools)
        for file, text in script.further.items():
            (folder / file).write_text(text)
    assert_clean_to_ruff(tmp_path)


def test_same_bytes_under_other_hash_seeds(tmp_path):
    found = set()
    for seed in ("0", "1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, str(ROOT / "generator"), *FLAGS, "--resume", "--force"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        found.add(tuple((tmp_path / file).read_bytes() for file in FILES))
        assert not folder.exists()
    assert len(found) == 1


def library_of(**sources: str) -> Library:
    return Library(parse_module(name, source) for name, source in sources.items())


def test_the_closure_stops_at_what_the_script_has():
    library = library_of(
        a="import json\nimport os\n\n\ndef base():\n    return os.sep\n\n\n"
        "def has():\n    return base()\n\n\n"
        "def lacks():\n    return json.dumps(has())\n"
    )
    script = stitch_script('"""S."""', {"g": "def mine():\n    has()\n"}, "", library)
    glue = {"g": "def main():\n    mine()\n    lacks()\n"}
    text = stitch_companion('"""C."""', glue, "", library, script.homes("train"))
    assert text.startswith('"""C."""\n\nimport json\n\nfrom train import has, mine\n')
    assert "def lacks" in text
    assert "def has" not in text
    assert "base" not in text
    assert "import os" not in text


def test_a_base_class_may_be_the_scripts_but_not_a_carried_one():
    library = library_of(a="class Base:\n    pass\n")
    glue = {"g": "class Mine(Base):\n    pass\n"}
    text = stitch_companion('"""C."""', glue, "", library, {"Base": "train"})
    assert "from train import Base" in text
    with pytest.raises(StitchError, match="Base is needed before"):
        stitch_companion('"""C."""', glue, "", library, {})
