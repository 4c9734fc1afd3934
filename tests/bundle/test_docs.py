"""The pages for readers are true: excerpts, table, commands, links, limits.

`python tests/bundle/test_docs.py --update` writes the excerpts and the table of
sections into README.md and README.ko.md again.
"""

import ast
import functools
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from generator import __version__  # noqa: E402
from generator.cli import main, make_parser  # noqa: E402
from generator.options import SECTIONS, TASKS, check_request  # noqa: E402
from generator.render import render_script  # noqa: E402
from generator.stitch import Library  # noqa: E402
from tests.generator.scripts import run, write_script, write_text_data  # noqa: E402

READMES = ("README.md", "README.ko.md")
REFERENCES = sorted(f"references/{p.name}" for p in (ROOT / "references").glob("*.md"))
SKILL_PAGES = ("SKILL.md", *REFERENCES)  # what an assistant reads
PAGES = (*READMES, "CONTRIBUTING.md", *SKILL_PAGES)
EXCERPT_LINES = 40

# What of the templates does the work of a section.
NAMES = {
    "amp": ["resolve_dtype", "step_optimizer"],
    "fp8": ["convert_to_fp8"],
    "checkpointing": ["enable_gradient_checkpointing"],
    "compile": ["compile_model_if_available"],
    "accumulate": ["split_batch", "accumulate_contrastive_gradients"],
    "optimizer": ["build_adamw", "build_muon"],
    "clip": ["train_step_with_clipping"],
    "skip_nonfinite": ["step_if_finite", "check_finite"],
    "scheduler": ["get_cosine_warmup_scheduler", "get_wsd_warmup_scheduler"],
    "ema": ["ModelEMA"],
    "early_stopping": ["EarlyStopping"],
    "oom_recovery": ["train_with_oom_recovery"],
    "resume": ["StateSaver", "SafeTrainingContext"],
    "deterministic": ["set_seed"],
    "distributed": ["wrap_ddp", "shard_model", "RankStateSaver", "ShardedStateSaver"],
    "stream": ["StreamingTextDataset", "StreamingParquetDataset"],
    "token_budget": ["TokenBudgetBatchSampler"],
    "profile": ["StepProfiler"],
    "logger": ["TensorBoardLogger", "WandbLogger", "TrackioLogger"],
    "plot": ["plot_run"],
    "predict": ["batch_inference", "quantize_model_dynamic"],
    "tests": ["find_unreached_parameters", "train_on_one_batch"],
    "slurm": ["SafeTrainingContext"],
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def make_excerpts() -> dict[str, str]:
    """Parts of a generated script by their markers: its first lines, and its loop."""
    request, _ = check_request(
        "text", {"amp": None, "checkpointing": None}, "train.py", split=False
    )
    text = render_script(request).text
    start = text.index("        while run.epoch < ")
    loop = text[start : text.index("            run.epoch += 1", start)].rstrip()
    parts = {
        "excerpt": text.splitlines()[:EXCERPT_LINES],
        "loop": textwrap.dedent(loop).splitlines(),
    }
    return {
        marker: "\n".join(["```python", *lines, "```"])
        for marker, lines in parts.items()
    }


def template_cell(section: str) -> str:
    """Links to the templates of a section, each with the names to look for."""
    owners = Library.load().owners
    files: dict[str, list[str]] = {}
    for name in NAMES[section]:
        files.setdefault(owners[name].name, []).append(f"`{name}`")
    return "; ".join(
        f"[{file}.py](templates/{file}.py): {', '.join(names)}"
        for file, names in files.items()
    )


def make_row(section: str, summary: str) -> str:
    item = SECTIONS[section]
    usage = item.usage.replace("|", "\\|")
    return f"| `{usage}` | {summary} | {item.guide} | {template_cell(section)} |"


def marked(page: str, marker: str) -> str:
    """What stands between `<!-- marker -->` and `<!-- /marker -->`."""
    text = read(page)
    assert text.count(f"<!-- {marker} -->") == 1, f"{page}: {marker}"
    rest = text.partition(f"<!-- {marker} -->\n")[2]
    return rest.partition(f"<!-- /{marker} -->")[0].strip("\n")


def table_rows(page: str) -> list[list[str]]:
    """The cells of the table of sections, without its two header lines."""
    rows = marked(page, "sections").splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_excerpts_are_what_the_generator_writes():
    hint = "run: python tests/bundle/test_docs.py --update"
    for page in READMES:
        for marker, excerpt in make_excerpts().items():
            assert marked(page, marker) == excerpt, hint


def test_table_of_sections_is_that_of_the_generator():
    assert NAMES.keys() == SECTIONS.keys()
    expected = [make_row(name, item.summary) for name, item in SECTIONS.items()]
    assert marked("README.md", "sections").splitlines()[2:] == expected


def test_readmes_have_the_same_rows_and_commands():
    english, korean = (table_rows(page) for page in READMES)
    for row in (*english, *korean):
        assert len(row) == 4
    assert [[r[0], *r[2:]] for r in english] == [[r[0], *r[2:]] for r in korean]
    for row in korean:
        assert re.search("[가-힣]", row[1]), row
    assert code_blocks("README.md") == code_blocks("README.ko.md")
    links = [re.findall(r"\]\(([^)]+)\)", read(page)) for page in READMES]
    for of_page, own in zip(links, ("README.ko.md", "README.md"), strict=True):
        of_page.remove(own)
    assert sorted(links[0]) == sorted(links[1])


def code_blocks(page: str) -> list[str]:
    """The lines of all fenced blocks, without their indentation."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", read(page), re.DOTALL | re.M)
    return [line.strip() for block in blocks for line in block.splitlines()]


def shown_code(page: str) -> list[str]:
    """All code of a page: the lines of its fenced blocks, and its inline code."""
    without_blocks = re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.DOTALL | re.M)
    inline = re.findall(r"`([^`]+)`", without_blocks)
    return [*code_blocks(page), *(" ".join(code.split()) for code in inline)]


def commands(*starts: str) -> list[str]:
    """What follows one of `starts` in the pages' code, up to a comment, `&&` or `|`."""
    found = set()
    for page in PAGES:
        for code in shown_code(page):
            for start in starts:
                if match := re.fullmatch(rf"(?:\w+=\S+ )*{start}(\s.*)?", code):
                    found.add(re.split(r"\s(?:&&|\||#)", match[1] or "")[0].strip())
    return sorted(found)


GENERATOR_COMMANDS = commands(
    "generate-script", r"python \S*generator", r"python -m \S*generator"
)


@pytest.mark.parametrize("command", GENERATOR_COMMANDS)
def test_command_is_accepted(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--from" in command:  # as an earlier --save has left it
        Path("answers.yaml").write_text("task: image\n")
    output = vars(make_parser().parse_args(shlex.split(command))).get("output", "")
    assert not Path(output).is_absolute()
    assert ".." not in Path(output).parts
    assert main(shlex.split(command)) == 0, capsys.readouterr().err


def test_commands_were_found():
    assert len(GENERATOR_COMMANDS) > 8
    assert "--amp --checkpointing -o train.py" in GENERATOR_COMMANDS


@functools.cache
def script_options() -> set[str]:
    """The options of the generated scripts, over all tasks and sections."""
    options = {"--config", "--help"}
    for task in TASKS:
        values = {"accumulate": "2", "ema": "0.9", "scheduler": "cosine"}
        values |= dict.fromkeys(("amp", "clip", "early_stopping", "resume"))
        values |= {"distributed": "fsdp"}
        values |= {"stream": None} if task in ("text", "embedding") else {}
        request, problems = check_request(task, values, "train.py", split=False)
        assert not problems
        config = render_script(request).text.partition("class Config:")[2]
        config = config.partition("# --- ")[0]
        fields = re.findall(r"^    (\w+): ", config, re.M)
        options |= {"--" + field.replace("_", "-") for field in fields}
    return options


def test_options_of_scripts_exist():
    shown = commands(r"python train\w*\.py", r"torchrun \S+ train\.py")
    given = {w for c in shown for w in re.findall(r"--[a-z-]+", c)}
    assert "--text-column" in given
    assert given <= script_options()


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_the_best_weights_are_used_as_readme_says(tmp_path, stream):
    block = re.search(
        r"```python\n(import torch\nfrom train .*?)```", read("README.md"), re.S
    )
    script = write_script(tmp_path, "--amp", "--checkpointing", *stream)
    run(script, "--data", str(write_text_data(tmp_path)), "--epochs=1")
    command = [sys.executable, "-c", block[1]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() in ("http", "logging", "xml"), done.stderr


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "evals/README.md"])
def test_links_files_and_make_targets_exist(page):
    """Links from the page's folder; names of files from the bundle's."""
    text, here = read(page), (ROOT / page).parent
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path = link.partition("#")[0]
        if not re.match(r"https?://", link) and path and not (here / path).exists():
            missing.append(link)
    folders = "templates|generator|tests|benchmarks|requirements|snippets|references"
    folders += "|bin|evals"
    pattern = rf"(?<![\w/.-])(?:(?:{folders}|\.github)/[\w./*-]*|[A-Z]+(?:\.ko)?\.md)"
    for path in re.findall(pattern, text):
        if not any(ROOT.glob(path.rstrip("."))):
            missing.append(path)
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.M)
    for code in shown_code(page):
        if (match := re.match(r"make ([a-z-]+)", code)) and match[1] not in targets:
            missing.append(code)
    assert not missing


def test_skill_is_valid():
    text = read("SKILL.md")
    _, frontmatter, body = text.split("---\n", 2)
    fields = yaml.safe_load(frontmatter)
    assert list(fields) == ["name", "description", "license"]
    assert fields["name"] == "pytorch-optimization"
    assert 0 < len(fields["description"]) <= 500
    assert fields["description"].startswith("Use when")
    assert re.search("[가-힣]", fields["description"])
    assert not re.search("[<>]", fields["description"])
    assert fields["license"] == "MIT"
    assert body.lstrip().startswith("# ")


def test_names_in_the_skill_are_in_the_templates():
    """Names that look like ours: with an underscore or in camel case, as code."""
    owners = Library.load().owners
    table = read("SKILL.md").partition("## Situation")[2].partition("## A minimal")[0]
    names = re.findall(r"`([A-Za-z_]+)(?:\(\w*\))?`", table)
    assert len(names) > 20
    choices = {choice for s in SECTIONS.values() for choice in s.choices}
    assert not [name for name in names if name not in {*owners, *choices}]


def unsafe_calls(source: str) -> list[str]:
    """Calls through which a file that is read could run code of its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {item.arg: ast.unparse(item.value) for item in node.keywords}
        unsafe = ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads")
        if (
            name in unsafe
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("shell") == "True"
        ):
            found.append(ast.unparse(node))
    return found


def test_no_code_from_data():
    for bad in ("eval(x)", "yaml.load(f)", "torch.load(f)", "run(x, shell=True)"):
        assert unsafe_calls(bad) == [bad]
    for folder in ("templates", "generator", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not unsafe_calls(path.read_text(encoding="utf-8")), path
    names = ("resume", "predict", "tests", "slurm")
    for task in TASKS:  # what only the glue holds
        request, _ = check_request(task, dict.fromkeys(names), "train.py", split=False)
        script = render_script(request)
        for text in (script.text, *script.further.values()):
            if text.startswith('"""'):
                assert not unsafe_calls(text)


def test_changelog_begins_with_this_version():
    newest = re.search(
        r"^## \[?(\d\S*?)\]? - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.M
    )
    assert newest
    assert newest[1] == __version__


def tracked_files() -> list[Path]:
    """All files of the repository; of a copy without git, all but what is built."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        built = {".venv", ".git", "build", "dist", "demo", "runs", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not built & {*p.relative_to(ROOT).parts}]
    return [path for path in paths if path.is_file()]


# Written so that this file does not hold what it looks for.
HOSTS = (
    "pypi[.]org",
    "pythonhoste[d][.]org",
    "download[.]pytorch[.]org",
    "anaconda[.]",
)
FOLDERS = "work|home|root|Users|opt|mnt|private"
MACHINE_PATHS = (rf"(?<![\w.)}}\]-])/(?:{FOLDERS})/\w", r"\b[A-Z]:\\Users")
UNWANTED = re.compile("|".join([*HOSTS, *MACHINE_PATHS]))


def test_no_package_host_and_no_path_of_a_machine():
    assert UNWANTED.search("see " + "/" + "home/me/x")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}: {match[0]}" for match in UNWANTED.finditer(text)]
    assert not found


def update() -> None:
    """Write excerpts and table into both READMEs; Korean summaries stay."""
    for page in READMES:
        # Without a row there yet, the English summary shows what to translate.
        summaries = {name: item.summary for name, item in SECTIONS.items()}
        old = marked(page, "sections").splitlines()
        if page != "README.md":
            flags = {f"`{item.usage}`": name for name, item in SECTIONS.items()}
            summaries |= {
                flags[row[0]]: row[1] for row in table_rows(page) if row[0] in flags
            }
        table = [*old[:2], *(make_row(name, summaries[name]) for name in SECTIONS)]
        text = read(page)
        parts = {**make_excerpts(), "sections": "\n".join(table)}
        for marker, new in parts.items():
            before, _, rest = text.partition(f"<!-- {marker} -->\n")
            after = rest.partition(f"<!-- /{marker} -->")[2]
            text = f"{before}<!-- {marker} -->\n\n{new}\n\n<!-- /{marker} -->{after}"
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/bundle/test_docs.py --update")
    update()
