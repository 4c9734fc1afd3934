"""The command line: what it writes, what it says, how it refuses."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from generator.cli import main
from generator.options import CONFLICTS, REQUIREMENTS, SECTIONS, TASKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sample_flags(section) -> list[str]:
    """The flag with each of its values, bare where that is possible."""
    number = "4" if section.bounds[1] > 4 else "0.5"
    values = section.choices or ((number,) if section.number else ())
    bare = [section.flag] if section.default is not None else []
    return bare + [f"{section.flag}={value}" for value in values]


def generate(*words: str) -> str:
    assert main([*words, "-o", "out.py", "--force"]) == 0
    return Path("out.py").read_text()


def body(script: str) -> str:
    """The script without its docstring, which names the command."""
    return script.split('"""', 2)[2]


def test_writes_train_py_and_says_what_to_run_next(capsys):
    assert main(["--amp", "--checkpointing"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "wrote train.py" in err
    assert "python train.py" in err
    compile(Path("train.py").read_text(), "train.py", "exec")


def test_says_how_several_processes_are_started(capsys):
    assert main(["--distributed=ddp", "-o", "python 1/my run.py"]) == 0
    launch = "torchrun --nproc-per-node=8 'my run.py'"
    assert f"or:    cd 'python 1' && {launch}  #" in capsys.readouterr().err
    assert f"    {launch}  #" in Path("python 1/my run.py").read_text()
    assert main(["--distributed=ddp", "--json", "-o", "-"]) == 0
    report = json.loads(capsys.readouterr().err)
    assert report["run"] == report["launch"] == ""


def test_json_says_the_same(capsys):
    assert main(["--task", "image", "--json", "-o", "sub/my run.py"]) == 0
    report = json.loads(capsys.readouterr().out)
    lines = Path("sub/my run.py").read_text().count("\n")
    assert report["files"] == {"sub/my run.py": lines}
    assert report["run"] == "cd sub && python 'my run.py'"
    assert report["launch"] == ""
    assert "scikit-learn" in report["packages"]
    assert report["command"] == "generate-script --task image -o 'sub/my run.py'"


def test_dash_writes_the_script_alone_to_standard_output(capsys):
    assert main(["-o", "-"]) == 0
    compile(capsys.readouterr().out, "-", "exec")
    assert not list(Path().iterdir())


def test_does_not_overwrite_without_force(capsys):
    Path("train.py").write_text("mine")
    assert main([]) == 3
    assert "--force" in capsys.readouterr().err
    assert Path("train.py").read_text() == "mine"
    assert main(["--force"]) == 0
    assert Path("train.py").read_text() != "mine"


def test_split_writes_both_files_or_neither():
    Path("train_tools.py").write_text("mine")
    assert main(["--split"]) == 3
    assert not Path("train.py").exists()
    assert main(["--split", "--force"]) == 0
    script = Path("train.py").read_text()
    assert "from train_tools import" in script
    assert "def parse_config" not in script
    assert "def parse_config" in Path("train_tools.py").read_text()


def test_settings_of_the_script_are_told_apart_from_options(capsys):
    assert main(["--epochs", "5", "--cpu", "--amp", "--batch-size=8", "7", "--x"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is for")[0] for line in said] == [
        "error: --epochs 5",
        "error: --cpu",
        "error: --batch-size=8 7",
        "error: unknown option --x: --list shows what there is",
    ]
    assert [line.split("default with ")[1] for line in said[:3]] == [
        "--set epochs=5",
        "--set cpu=true",
        "--set batch_size=8",
    ]
    assert not list(Path().iterdir())


def test_all_that_is_wrong_is_said_at_once(capsys):
    words = ["--ampp", "--checkpointing=ful", "--accumulate=x", "--clip=0"]
    assert main([*words, "--task", "txt", "--split", "-o", "-"]) == 2
    err = capsys.readouterr().err
    for part in (
        "did you mean --amp?",
        "--checkpointing=ful: choose full or selective",
        "--accumulate=x: give a whole number from 2 to 1024",
        "--clip=0: give a number from 1e-06 to 1e+06",
        "--task txt: choose text or image",
        "--split does not go with -o -",
    ):
        assert part in err
    assert not list(Path().iterdir())


def test_a_missing_value_is_named(capsys):
    assert main(["--amp", "--scheduler"]) == 2
    assert "--scheduler: expected one argument" in capsys.readouterr().err


def test_errors_as_json(capsys):
    assert main(["--json", "--amp=1"]) == 2
    assert "--amp" in json.loads(capsys.readouterr().out)["errors"][0]


VALUES_OF_FLAGS = {
    "--extract": ["--extract", "set_seed"],
    "--task": ["--task=text"],
    "--model": ["--model=mine:Net"],
    "--model=hf": ["--model=hf:NAME"],
    "--model=timm": ["--model=timm:NAME"],
    "--preset": ["--preset=max"],
    "--set": ["--set", "epochs=2"],
    "--from": ["--from=answers.yaml"],
    "--save": ["--save=answers.yaml"],
    "-o": ["-o", "x.py"],
}


@pytest.mark.parametrize("conflict", CONFLICTS, ids=str)
def test_conflicts_name_all_flags_and_the_fix(conflict, capsys):
    Path("answers.yaml").write_text("task: text")
    words = []
    for flag in filter(None, (conflict.first, conflict.second, conflict.third)):
        section = next((s for s in SECTIONS.values() if s.flag == flag), None)
        section_words = [sample_flags(section)[0]] if section else flag.split()
        words += VALUES_OF_FLAGS.get(flag, section_words)
    assert main(words) == 2
    # As JSON on standard output if so asked.
    assert str(conflict) in "".join(capsys.readouterr())


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_flag_of_no_use_alone_names_the_other(requirement, capsys):
    assert main([requirement.first]) == 2
    assert str(requirement) in capsys.readouterr().err
    assert main([requirement.first, requirement.needed]) == 0


def test_list_shows_every_task_section_and_conflict(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["tasks"].keys() == TASKS.keys()
    assert listed["sections"].keys() == {s.flag for s in SECTIONS.values()}
    for name in [*TASKS, *(s.usage for s in SECTIONS.values())]:
        assert name in text
    assert all(c.first in text and c.second in text for c in CONFLICTS)


def test_extract_gives_definitions_that_run(capsys):
    assert main(["--extract", "EarlyStopping", "get_cosine_warmup_scheduler"]) == 0
    text = capsys.readouterr().out
    namespace = {}
    exec(compile(text, "extracted", "exec"), namespace)
    assert namespace["EarlyStopping"](patience=1)(0.5) is False
    assert "class ModelEMA" not in text


def test_extract_unknown_name(capsys):
    assert main(["--extract", "EarlyStoping"]) == 2
    assert "did you mean EarlyStopping?" in capsys.readouterr().err


def test_header_holds_the_command_that_makes_it_again():
    words = ["--task=image", "--amp", "--checkpointing=selective", "--clip=0.5"]
    first = generate(*words)
    lines = re.search(r"generate-script .*?(?=\n\"\"\")", first, re.S)[0]
    again = lines.replace("\\\n", " ").split()[1:]
    assert main([*again, "--force"]) == 0
    assert Path("out.py").read_text() == first


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "section",
    [section for section in SECTIONS.values() if not section.writes[0]],
    ids=lambda section: section.name,
)
def test_every_flag_and_value_changes_the_script(section, task):
    needed = [r.needed for r in REQUIREMENTS if r.first == section.flag]
    seen = {}
    for flag in sample_flags(section):
        start = ["--task", task, *needed]
        if main([*start, flag, "-o", "out.py", "--force"]) == 2:
            # Those that some tasks have no use for.
            assert flag.partition("=")[0] in ("--stream", "--token-budget")
            continue
        # Every other section that goes with it is on, so that a flag is not seen
        # through a missing partner.
        others = []
        for other in SECTIONS.values():
            more = [*others, sample_flags(other)[0]]
            if other is not section and not other.writes[0]:
                both = ([flag, *more], more)  # with the flag in question and without
                commands = ([*start, *f, "-o", "out.py", "--force"] for f in both)
                legal = not any(map(main, commands))
                others = more if legal else others
        alone, among = (body(generate(*start, flag, *o)) for o in ([], others))
        without = (body(generate(*start, *o)) for o in ([], others))
        if flag == f"{section.flag}={section.usual}":
            assert [alone, among] == list(without)
        else:
            assert [alone, among] != list(without)
            seen[flag] = alone
    # A bare flag is the same as one of its values where it has choices.
    doubles = 1 if section.choices and section.default is not None else 0
    assert len(set(seen.values())) >= len(seen) - doubles


def test_works_by_its_path_from_any_folder_and_as_a_module(tmp_path):
    by_path = [sys.executable, str(ROOT / "generator"), "--amp", "-o", "-"]
    first = subprocess.run(by_path, capture_output=True, text=True, check=True)
    module = [sys.executable, "-m", "generator", "--amp", "-o", "-"]
    second = subprocess.run(
        module, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert first.stdout == second.stdout
    assert first.stdout.startswith('"""Train a text classifier')


def test_without_jinja2_it_says_how_to_get_it():
    code = (
        "import sys; sys.modules['jinja2'] = None; sys.argv[1:] = ['--amp'];"
        f"sys.path.insert(0, {str(ROOT)!r});"
        "from generator.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: jinja2 is missing: pip install jinja2\n",
    )


def test_imports_neither_torch_nor_anything_else_that_is_heavy():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r});"
        "from generator.cli import main; main(['--amp', '-o', '-']);"
        "print(*{n.partition('.')[0] for n in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = done.stderr.splitlines()[-1].split()
    heavy = {
        "torch",
        "numpy",
        "pandas",
        "pyarrow",
        "yaml",
        "requests",
        "ssl",
        "asyncio",
    }
    assert "jinja2" in names
    assert not heavy.intersection(names)


def test_takes_less_than_three_times_the_import_of_jinja2():
    """In CPU time, which tells more than the clock while other tests run beside it."""

    def cpu_seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(after[:2]) - sum(before[:2])  # user and system time

    ours, theirs = [], []
    for count in range(1, 41):  # interleaved; what else runs can only add to the least
        theirs.append(cpu_seconds("-c", "import jinja2"))
        ours.append(cpu_seconds(str(ROOT / "generator"), "--amp", "-o", "-"))
        if count >= 5 and min(ours) < 3 * min(theirs):
            return
    raise AssertionError((min(ours), min(theirs)))


def test_unwritable_folder_is_a_clear_error(capsys):
    Path("file").write_text("")
    assert main(["-o", "file/train.py"]) == 2
    assert "file/train.py cannot be written" in capsys.readouterr().err
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("name", ["random.py", "torch.py", 'a"b.py'])
def test_names_that_would_break_the_script_are_refused(name, capsys):
    assert main(["-o", name]) == 2
    assert "-o" in capsys.readouterr().err
    assert not list(Path().iterdir())
