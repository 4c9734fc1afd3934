"""Pack the bundle: dist/pytorch-optimization.skill, and the same unpacked beside it.

    python .ci/make_skill.py [FOLDER]

The same files give the same bytes: sorted, one date, stored rather than compressed
(versions of zlib differ). Evals stay out: they hold the answers.
"""

import shutil
import sys
import zipfile
from pathlib import Path

NAME = "pytorch-optimization"
FILES = ("SKILL.md", "LICENSE")
FOLDERS = ("bin", "generator", "references", "snippets", "templates")
SUFFIXES = ("", ".py", ".j2", ".md")
EXECUTABLE = "bin/generate-script"
ROOT = Path(__file__).resolve().parents[1]


def list_files(root: Path) -> list[str]:
    """What goes in, as paths relative to `root`, in the order of the archive."""
    found = [
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix in SUFFIXES and path.name[0] != "."
    ]
    return sorted([*FILES, *(p for p in found if "__pycache__" not in p)])


def make_skill(root: Path, out: Path) -> Path:
    """Write the archive and the unpacked folder into `out`; the archive's path."""
    folder = out / NAME
    shutil.rmtree(folder, ignore_errors=True)
    archive = out / f"{NAME}.skill"
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name in list_files(root):
            mode = 0o755 if name == EXECUTABLE else 0o644
            info = zipfile.ZipInfo(f"{NAME}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, wherever this runs: for the mode
            info.external_attr = (0o100000 | mode) << 16
            data = (root / name).read_bytes()
            file.writestr(info, data)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(mode)
    return archive


if __name__ == "__main__":
    path = make_skill(ROOT, Path(*sys.argv[1:2]) if sys.argv[1:] else ROOT / "dist")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
