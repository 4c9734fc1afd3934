"""Real data that needs no download: what a generated script trains on without --data.

texts, labels = stdlib_docstrings()
folder = write_digit_images(Path("digits"))
"""

import ast
import contextlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# In every Python from 3.10 to 3.14; with 41 (concurrent) to 346 (asyncio) docstrings
# each, 2,293 in all, in 3.11.
STDLIB_PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)


def stdlib_docstrings(
    packages: tuple[str, ...] = STDLIB_PACKAGES,
) -> tuple[list[str], list[str]]:
    """Docstrings of the standard library and the package that each comes from.

    Parsed, never imported; a docstring that stands in two places is taken once.

    Returns:
        texts and labels, of the same length, in an order that depends only on the
        Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    label_of_text: dict[str, str] = {}
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, documented) and (text := ast.get_docstring(node)):
                    label_of_text.setdefault(text, package)
    return list(label_of_text), list(label_of_text.values())


def stdlib_functions(
    packages: tuple[str, ...] = (*STDLIB_PACKAGES, "collections", "json"),
) -> tuple[list[str], list[str]]:
    """What functions of the standard library do, and how they are called.

    Parsed, never imported. The modules beside the packages are taken too. A docstring
    or a signature that stands in two places is taken once.

    Returns:
        first paragraphs of docstrings, and signatures such as
        `Handler.emit(self, record)`, of the same length, in an order that depends only
        on the Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [*root.glob("*.py")]
    paths += [path for name in packages for path in (root / name).rglob("*.py")]
    signature_of: dict[str, str] = {}
    for path in sorted(paths):
        if path.parent.name == "encodings":  # long tables, few functions
            continue
        tree = ast.parse(path.read_bytes())
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for owner in (tree, *classes):
            prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
            for node in owner.body:
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    continue
                summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
                if summary.strip():
                    signature = f"{prefix}{node.name}({ast.unparse(node.args)})"
                    signature_of.setdefault(summary, signature)
    unique = {signature: summary for summary, signature in signature_of.items()}
    return list(unique.values()), list(unique)


def stdlib_sources(packages: tuple[str, ...] = ("asyncio", "email")) -> list[Path]:
    """The source files of some packages of the standard library, about 0.9 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for name in packages for path in (root / name).rglob("*.py"))


@contextlib.contextmanager
def _write_in_one_step(path: Path) -> Iterator[Path]:
    """Give a file beside `path`, which takes its place once all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    yield partial
    os.replace(partial, path)


def write_jsonl(path: Path, columns: dict[str, list[str]]) -> Path:
    """Write texts as a JSONL file, a row a line; it appears in one step.

    Returns:
        `path`.
    """
    with (
        _write_in_one_step(path) as partial,
        open(partial, "w", encoding="utf-8") as file,
    ):
        file.writelines(
            json.dumps(dict(zip(columns, row, strict=True))) + "\n"
            for row in zip(*columns.values(), strict=True)
        )
    return path


def write_digit_images(folder: Path) -> Path:
    """Write scikit-learn's 1,797 handwritten digits as PNG files, one folder a class.

    The images are 8x8 and grey. Does nothing where they are already there.

    Returns:
        `folder`, which then holds `0/0000.png` ... `9/1795.png`.

    Raises:
        ImportError: scikit-learn or Pillow is missing; says how to install them.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the built-in images need {error.name}: pip install scikit-learn pillow,"
            " or pass --data FOLDER with your own"
        ) from error
    complete = folder / "complete"  # written last: a killed run starts over
    if not complete.exists():
        digits = load_digits()
        for index, image in enumerate(digits.images):
            path = folder / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (image * (255 / 16)).astype("uint8")  # the source counts to 16
            Image.fromarray(pixels).save(path)
        complete.touch()
    return folder


def write_digit_table(path: Path) -> Path:
    """Write scikit-learn's handwritten digits as a Parquet file, a row an image.

    64 columns `pixel_0_0` ... `pixel_7_7` (0 to 16) and `label`; 1,797 rows. Does
    nothing where the file is already there.

    Returns:
        `path`.

    Raises:
        ImportError: scikit-learn or pyarrow is missing; says how to install them.
    """
    try:
        import pyarrow
        from pyarrow import parquet
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the built-in table needs {error.name}: pip install scikit-learn pyarrow,"
            " or pass --data FILE with your own"
        ) from error
    if not path.exists():
        digits = load_digits()
        columns = {f"pixel_{i // 8}_{i % 8}": digits.data[:, i] for i in range(64)}
        table = pyarrow.table({**columns, "label": digits.target})
        with _write_in_one_step(path) as partial:
            parquet.write_table(table, partial, row_group_size=256)
    return path
