"""Every way in generates the same script, from an unrelated folder with a space."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from generator import __version__

ROOT = Path(__file__).resolve().parents[2]
NAME = "pytorch-optimization"
FLAGS = ("--amp", "--checkpointing")
# Where assistants look for skills, seen from the folder of the user's project.
HOMES = (".claude/skills", ".agents/skills", ".codex/skills", ".cursor/skills")
SKILLS_CLI = "skills@1.5.15"  # the last that runs on Node 18 and 20
CLAUDE_CODE = "@anthropic-ai/claude-code@2.1.197"

spec = importlib.util.spec_from_file_location("make_skill", ROOT / ".ci/make_skill.py")
packer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(packer)

posix = pytest.mark.skipif(os.name == "nt", reason="a shell script")


def run(*words: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess:
    """A command without our PYTHONPATH and VIRTUAL_ENV."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    environment |= options.pop("env", {})
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def must(*words: str | Path, cwd: Path, **options) -> str:
    done = run(*words, cwd=cwd, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def skill(tmp_path_factory) -> Path:
    """The unpacked bundle, without the repository around it."""
    out = tmp_path_factory.mktemp("skill")
    packer.make_skill(ROOT, out)
    return out / NAME


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    must(sys.executable, ROOT / "generator", *FLAGS, cwd=folder)
    return (folder / "train.py").read_bytes()


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's project: nothing of ours is near, and its path has a space."""
    folder = tmp_path / "my project"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("home", HOMES)
def test_copied_into_the_folder_of_an_assistant(home, skill, project, expected):
    copy = project / home / NAME
    shutil.copytree(skill, copy)
    must(sys.executable, f"{home}/{NAME}/generator", *FLAGS, cwd=project)
    assert (project / "train.py").read_bytes() == expected
    listing = must(sys.executable, copy / "snippets/device.py", cwd=project)
    assert "torch." in listing


@posix
def test_works_on_a_read_only_copy(skill, project, tmp_path, expected):
    start: list[str | Path] = [sys.executable]
    if os.geteuid() == 0:  # root may write anywhere, unless that right is dropped
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv, or a user other than root")
        start = ["setpriv", "--bounding-set=-dac_override", sys.executable]
    copy = tmp_path / NAME
    shutil.copytree(skill, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        writing = run(*start, "-c", "open('x', 'w')", cwd=copy)
        assert "PermissionError" in writing.stderr
        must(*start, copy / "generator", *FLAGS, cwd=project)
        assert (project / "train.py").read_bytes() == expected
        must(*start, copy / "snippets/save_load.py", cwd=project)
        assert not list(copy.rglob("__pycache__"))
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


# --- Claude Code plugin ---------------------------------------------------------------


def read_manifest(name: str) -> dict:
    text = (ROOT / ".claude-plugin" / name).read_text(encoding="utf-8")
    return json.loads(text)


def test_plugin_is_the_root_and_has_this_version():
    plugin, market = read_manifest("plugin.json"), read_manifest("marketplace.json")
    assert plugin["name"] == market["name"] == NAME
    assert plugin["version"] == __version__
    # With a SKILL.md at the root there must be neither: they would replace it.
    assert "skills" not in plugin
    assert not (ROOT / "skills").exists()
    (entry,) = market["plugins"]
    assert (entry["name"], entry["source"]) == (NAME, "./")
    assert "version" not in entry  # that of plugin.json counts
    assert market["owner"]["name"]
    assert plugin["author"]["name"]


def make_python(folder: Path, has_jinja2: bool) -> Path:
    """A python3 like one on PATH; without jinja2 it is this one, with site left out."""
    folder.mkdir()
    path = folder / "python3"
    options = "" if has_jinja2 else "-S -I "
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {options}"$@"\n')
    path.chmod(0o755)
    return path


@posix
def test_command_of_the_plugin_runs_from_anywhere(skill, project, tmp_path, expected):
    good = make_python(tmp_path / "good", has_jinja2=True)
    copy = tmp_path / "plug in"
    shutil.copytree(skill, copy)
    link = tmp_path / "generate-script"
    link.symlink_to("plug in/bin/generate-script")
    path = f"{good.parent}:/usr/bin:/bin"
    for number, start in enumerate((copy / "bin/generate-script", link)):
        out = f"train{number}.py"
        must(start, *FLAGS, "-o", out, cwd=project, env={"PATH": path})
        text = (project / out).read_bytes()
        assert text.replace(out.encode(), b"train.py") == expected


@posix
def test_command_of_the_plugin_finds_another_python(skill, project, tmp_path, expected):
    bad = make_python(tmp_path / "bad", has_jinja2=False)
    good = make_python(tmp_path / "good", has_jinja2=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname", "readlink"):
        (tools / tool).symlink_to(shutil.which(tool))
    start, path = skill / "bin/generate-script", f"{bad.parent}:{tools}"

    done = run(start, *FLAGS, cwd=project, env={"PATH": path})
    assert done.returncode == 2
    assert "pip install jinja2" in done.stderr
    assert done.stderr.count("\n") == 1

    environment = {"PATH": path, "PYTHON": str(good)}
    must(start, *FLAGS, cwd=project, env=environment)
    assert (project / "train.py").read_bytes() == expected

    # That of the project, where it has one.
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").symlink_to(good)
    must(start, *FLAGS, "--force", cwd=project, env={"PATH": path})


# --- The .skill archive, and the specification ----------------------------------------


def test_archive_has_the_same_bytes_again(tmp_path):
    copy = tmp_path / "elsewhere"
    names = packer.list_files(ROOT)
    for name in reversed(names):  # other order, other dates, other modes
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        os.utime(target, (1, 1))
    (copy / "generator/__pycache__").mkdir()
    (copy / "generator/__pycache__/cli.cpython-311.pyc").write_bytes(b"x")
    (copy / ".git").mkdir()
    first = packer.make_skill(ROOT, tmp_path / "a").read_bytes()
    assert packer.make_skill(copy, tmp_path / "b").read_bytes() == first


def test_archive_holds_what_is_needed_and_nothing_else(tmp_path):
    archive = packer.make_skill(ROOT, tmp_path)
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        mode = file.getinfo(f"{NAME}/bin/generate-script").external_attr >> 16
    assert {name.partition("/")[0] for name in names} == {NAME}
    assert mode & 0o111
    inner = [name.partition("/")[2] for name in names]
    tops = {name.partition("/")[0] for name in inner}
    assert tops == {*packer.FILES, *packer.FOLDERS}
    assert not [name for name in inner if "__pycache__" in name or "/." in name]
    assert [n for n in inner if n.lower().endswith("skill.md")] == ["SKILL.md"]
    assert archive.stat().st_size < 1_000_000
    listing = run("git", "ls-files", cwd=ROOT)
    if listing.returncode == 0:  # not in a copy without git
        assert set(inner) <= set(listing.stdout.splitlines()), "git ignores one"


def test_only_one_skill_file():
    found = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*")
        if path.name.lower() == "skill.md"
        and not {"dist", ".venv", ".venv-bench", "build"}
        & set(path.relative_to(ROOT).parts)
    ]
    assert found == ["SKILL.md"]


def test_valid_by_the_specification(skill, tmp_path):
    """The folder's name has to be that of the skill, so a checkout may not be valid."""
    validator = pytest.importorskip("skills_ref", reason="needs Python 3.11")
    assert validator.validate(skill) == []
    other = tmp_path / "other-name"
    shutil.copytree(skill, other)
    assert validator.validate(other)  # it does look


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npx"), reason="needs Node")
def test_installed_by_npx_skills(skill, project, expected):
    words = ["npx", "--yes", SKILLS_CLI, "add", skill, "--copy", "--yes"]
    words += ["--agent", "claude-code", "codex", "cursor"]
    done = run(*words, cwd=project, env={"DO_NOT_TRACK": "1"})
    if done.returncode and "ENOTFOUND" in done.stderr + done.stdout:
        pytest.skip("the npm registry is out of reach")
    assert done.returncode == 0, done.stderr[-2000:]
    homes = sorted(project.glob(f".*/skills/{NAME}"))
    assert [home.parts[-3] for home in homes] == [".agents", ".claude"]
    for home in homes:
        must(sys.executable, home / "generator", *FLAGS, "--force", cwd=project)
        assert (project / "train.py").read_bytes() == expected


@posix
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npx"), reason="needs Node")
def test_installed_as_a_plugin_by_claude_code(skill, project, tmp_path, expected):
    clone = tmp_path / "a clone"
    shutil.copytree(skill, clone)
    shutil.copytree(ROOT / ".claude-plugin", clone / ".claude-plugin")
    home = tmp_path / "home"
    env = {"CLAUDE_CONFIG_DIR": str(home)}
    claude = ("npx", "--yes", CLAUDE_CODE, "plugin")
    done = run(*claude, "validate", "--strict", clone, cwd=project, env=env)
    if done.returncode and "npm error network" in done.stderr:
        pytest.skip("the npm registry is out of reach")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    must(*claude, "marketplace", "add", clone, cwd=project, env=env)
    must(*claude, "install", NAME, cwd=project, env=env)
    inventory = must(*claude, "details", NAME, cwd=project, env=env)
    assert f"Skills (1)  {NAME}" in inventory
    (command,) = (home / "plugins/cache").glob("*/*/*/bin/generate-script")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    must(command, *FLAGS, cwd=project, env={"PATH": path})
    assert (project / "train.py").read_bytes() == expected
