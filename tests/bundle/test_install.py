"""The wheel, installed into an empty environment, generates the same script."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("generator", "templates")
FLAGS = ("--amp", "--checkpointing")


def run(*words: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, without our PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def source_files() -> set[str]:
    """The files that the wheel has to hold, as paths inside of it."""
    return {
        f"pytorch_optimization/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".j2")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools would pack what an old build left behind."""
    folder = tmp_path_factory.mktemp("build")
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "-q", "--no-deps", "-w", "dist", ".", cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_wheel_holds_glue_and_templates_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = {name for name in names if ".dist-info/" in name}
        assert names - metadata == source_files()
        assert any(name.endswith(".j2") for name in names)
        for name in source_files():
            source = ROOT / Path(name).relative_to("pytorch_optimization")
            assert file.read(name) == source.read_bytes()
        (license_file,) = (name for name in metadata if name.endswith("LICENSE"))
        assert file.read(license_file) == (ROOT / "LICENSE").read_bytes()


def test_installed_generator_equals_the_source_tree(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    here, there = tmp_path / "un related", tmp_path / "source"
    here.mkdir()
    there.mkdir()

    run(binaries / "generate-script", *FLAGS, cwd=here)
    run(sys.executable, ROOT / "generator", *FLAGS, cwd=there)
    assert (here / "train.py").read_bytes() == (there / "train.py").read_bytes()

    module = "pytorch_optimization.generator"
    listing = run(python, "-m", module, "--list", cwd=here)
    assert listing == run(sys.executable, ROOT / "generator", "--list", cwd=there)

    # The names that others may use as well stay free.
    code = "import importlib.util as u; print(u.find_spec('templates'))"
    assert run(python, "-c", code, cwd=here).strip() == "None"
