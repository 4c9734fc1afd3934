"""The data that generated scripts bring: real, the same every time, no download."""

import ast
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from templates.builtin_data import (
    STDLIB_PACKAGES,
    stdlib_docstrings,
    stdlib_functions,
    stdlib_sources,
    write_digit_images,
    write_digit_table,
)


@pytest.fixture(scope="module")
def docstrings():
    return stdlib_docstrings()


def test_each_text_comes_once_with_one_label_of_many(docstrings):
    texts, labels = docstrings
    assert len(texts) == len(labels) == len(set(texts))
    assert all(text.strip() for text in texts)
    counts = Counter(labels)
    assert set(counts) == set(STDLIB_PACKAGES)
    assert min(counts.values()) >= 30, counts  # 41 in Python 3.11
    if sys.version_info[:2] == (3, 11):  # another point release may differ a little
        assert 2200 < len(texts) < 2400


def test_each_text_is_a_docstring_of_its_package(docstrings):
    import concurrent.futures
    import inspect
    import logging

    label_of_text = dict(zip(*docstrings, strict=True))
    for documented in (logging, logging.Handler.emit, concurrent.futures.Future):
        package = inspect.getmodule(documented).__name__.partition(".")[0]
        assert label_of_text[inspect.getdoc(documented)] == package


def test_the_same_in_another_process_with_other_hashes(docstrings):
    code = (
        "from templates.builtin_data import stdlib_docstrings; import sys;"
        "before = set(sys.modules);"
        "result = ascii(stdlib_docstrings());"
        "assert 'asyncio' not in set(sys.modules) - before;"
        "print(result)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    words = [sys.executable, "-W", "error", "-c", code]
    output = subprocess.run(
        words, capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert ast.literal_eval(output) == docstrings


def test_a_text_in_two_packages_has_the_label_of_the_first():
    texts, labels = stdlib_docstrings(("logging", "logging"))
    assert len(texts) == len(set(texts))
    assert set(labels) == {"logging"}
    assert stdlib_docstrings(()) == ([], [])


# --- Digits --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("data") / "digits")


def test_the_images_are_scikit_learns(digits):
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    paths = sorted(digits.glob("*/*.png"), key=lambda path: path.name)
    assert len(paths) == len(source.images) == 1797
    for path, pixels, target in zip(paths, source.images, source.target, strict=True):
        with Image.open(path) as image:
            assert image.mode == "L"
            decoded = np.asarray(image)
        assert path.parent.name == str(target)
        assert np.abs(decoded / 255 * 16 - pixels).max() < 16 / 255
    assert (digits / "0/0000.png").exists()
    assert (digits / "9/1795.png").exists()


def test_a_second_call_writes_nothing(digits):
    def times():
        return {path: path.stat().st_mtime_ns for path in digits.rglob("*")}

    before = times()
    assert write_digit_images(digits) == digits
    assert times() == before


def test_an_interrupted_write_is_completed(digits, tmp_path, monkeypatch):
    from PIL import Image

    real_save, calls = Image.Image.save, []

    def save(image, path):
        calls.append(path)
        if len(calls) == 5:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        real_save(image, path)

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", save)
        with pytest.raises(KeyboardInterrupt):
            write_digit_images(tmp_path)
    write_digit_images(tmp_path)

    def contents(folder):
        files = folder.rglob("*.png")
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert contents(tmp_path) == contents(digits)


@pytest.mark.parametrize("package", ["sklearn.datasets", "PIL"])
def test_a_missing_package_is_named_with_its_remedy(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    remedy = r"pip install scikit-learn pillow,? or pass --data"
    with pytest.raises(ImportError, match=f"{package}: {remedy}"):
        write_digit_images(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()


# --- Source, functions, table --------------------------------------------------------


def test_sources_are_the_files_of_the_packages():
    import email.message
    from pathlib import Path

    sources = stdlib_sources()
    assert Path(email.message.__file__) in sources
    assert sources == sorted(set(sources))
    assert 500_000 < sum(path.stat().st_size for path in sources) < 2_000_000


@pytest.fixture(scope="module")
def functions():
    return stdlib_functions(("logging", "json"))


def test_each_pair_is_a_docstring_and_its_function(functions):
    import inspect
    import json
    import logging

    summaries, signatures = functions
    assert len(set(summaries)) == len(set(signatures)) == len(summaries)
    for summary, owner, function in (
        ("logging.Handler.emit", "Handler.", logging.Handler.emit),
        ("json.dumps", "", json.dumps),
    ):
        found = summaries.index(inspect.getdoc(function).partition("\n\n")[0])
        name, _, arguments = signatures[found].partition("(")
        assert name == owner + function.__name__, summary
        names = list(inspect.signature(function).parameters)
        assert all(name in arguments for name in names)


def test_modules_beside_the_packages_give_functions_too(functions):
    assert any(name.startswith("TarFile.") for name in functions[1])
    assert not any("\n\n" in summary or not summary.strip() for summary in functions[0])


def test_the_table_is_scikit_learns(tmp_path):
    from pyarrow import parquet
    from sklearn.datasets import load_digits

    path = write_digit_table(tmp_path / "data" / "digits.parquet")
    table, source = parquet.read_table(path), load_digits()
    assert table.column_names[8] == "pixel_1_0"
    columns = [table[name].to_numpy() for name in table.column_names]
    assert np.array_equal(np.stack(columns[:-1], 1), source.data)
    assert np.array_equal(columns[-1], source.target)
    assert parquet.ParquetFile(path).num_row_groups > 4
    before = path.stat().st_mtime_ns
    write_digit_table(path)
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in path.parent.iterdir()] == ["digits.parquet"]


def test_a_table_without_its_packages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn pyarrow, or pass"):
        write_digit_table(tmp_path / "digits.parquet")
