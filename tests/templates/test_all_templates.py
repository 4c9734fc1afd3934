"""What holds for each template alone: it can be copied, and it hides nothing."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "templates"
FILES = sorted(
    path
    for path in FOLDER.glob("*.py")
    if path.name not in ("__init__.py", "pending.py")  # pending.py will be dissolved
)

# Refuses what is neither in the standard library nor torch or one of its dependencies.
# Each template is imported in a process of its own, forked after the import of torch,
# which takes seconds.
IMPORT_ALONE = """
import importlib, importlib.abc, os, sys, traceback, warnings

ALLOWED = {
    *sys.stdlib_module_names, *sys.argv[1:],
    "torch", "torchgen", "functorch", "triton", "nvidia", "cuda",
    "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools",
    "pkg_resources", "_distutils_hack", "sympy", "typing_extensions",
}


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def import_alone(name):
    os.chdir(name)
    sys.path.insert(0, os.getcwd())
    before = torch.is_grad_enabled(), torch.initial_seed()
    importlib.import_module(name)
    after = torch.is_grad_enabled(), torch.initial_seed()
    assert before == after, "the import changes the state of torch"


sys.meta_path.insert(0, Refuse())
import torch
assert "numpy" not in sys.modules
for name in sys.argv[1:]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork, from Python 3.12
        child = os.fork()
    if child == 0:
        with open(f"{name}.txt", "w") as sys.stderr:
            sys.stdout = sys.stderr
            try:
                import_alone(name)
            except BaseException:
                traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory) -> Path:
    """A folder with a copy of each template in its own, and what its import printed."""
    folder = tmp_path_factory.mktemp("imports")
    for path in FILES:
        (folder / path.stem).mkdir()
        (folder / path.stem / path.name).write_bytes(path.read_bytes())
    errors = ["-W", "error::FutureWarning", "-W", "error::DeprecationWarning"]
    names = [path.stem for path in FILES]
    words = [sys.executable, "-B", *errors, "-c", IMPORT_ALONE, *names]
    subprocess.run(words, cwd=folder, check=True)
    return folder


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def template(request) -> Path:
    return request.param


def test_it_imports_alone_with_torch_and_nothing_else(template, imports):
    assert (imports / f"{template.stem}.txt").read_text() == ""
    assert [path.name for path in (imports / template.stem).iterdir()] == [
        template.name
    ]


def test_no_template_imports_another(template):
    stems = {path.stem for path in FOLDER.glob("*.py")} | {"templates"}
    for node in ast.walk(ast.parse(template.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            roots = {(node.module or "").partition(".")[0]}
            assert roots != {"__future__"}, f"line {node.lineno}"
        else:
            continue
        assert not roots & stems, f"line {node.lineno}"


def is_import_guard(node: ast.stmt) -> bool:
    """`try: import x` with an `except ImportError`, or an `if` around definitions."""
    if isinstance(node, ast.Try):
        parts = [*node.body, *node.orelse, *node.finalbody]
        parts += [line for handler in node.handlers for line in handler.body]
    elif isinstance(node, ast.If):
        parts = [*node.body, *node.orelse]
    else:
        return False
    return all(isinstance(part, TOP_LEVEL) or is_import_guard(part) for part in parts)


TOP_LEVEL = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)


def test_only_docstring_imports_constants_and_definitions_at_top_level(template):
    tree = ast.parse(template.read_text("utf-8"))
    assert ast.get_docstring(tree), "a module docstring"
    for node in tree.body[1:]:
        allowed = isinstance(node, TOP_LEVEL) or is_import_guard(node)
        assert allowed, f"line {node.lineno}: {ast.unparse(node)[:60]}"


def test_all_that_is_public_has_a_docstring(template):
    def check(body, owner):
        for node in body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if not isinstance(node, kinds) or node.name.startswith("_"):
                continue
            name = f"{owner}{node.name}"
            overloads = owner and node.name in PROTOCOL_METHODS
            assert ast.get_docstring(node) or overloads, f"{name}: no docstring"
            if isinstance(node, ast.ClassDef):
                check(node.body, f"{name}.")

    check(ast.parse(template.read_text("utf-8")).body, "")


# Of interfaces that everyone knows; what they do here is said by the class.
PROTOCOL_METHODS = {
    "forward",
    "error",
    "write",
    "flush",
    "read",
    "close",
    "seek",
    "tell",
}

DANGEROUS = {
    "weights_only off": r"weights_only\s*=\s*(False|None)",
    "eval": r"(?<![\w.])eval\s*\(",  # model.eval() is another matter
    "exec": r"(?<![\w.])exec\s*\(",
    "pickle": r"\b(c?[Pp]ickle|dill|joblib|marshal|shelve)\s*\.\s*(loads?|Unpickler)\b",
    "pickle by name": r"from\s+(c?[Pp]ickle|dill|joblib|marshal)\s+import.*\bloads?\b",
    "arrays of pickles": r"allow_pickle\s*=\s*True",
    "shell": r"shell\s*=\s*True|\bos\s*\.\s*(system|popen)\s*\(",
    "unsafe YAML": r"yaml\s*\.\s*(unsafe_|full_)?load\b",
}


def without_comments_and_texts(source: str) -> str:
    """The code alone; a docstring may warn of what it must not use."""
    kept = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING):
            kept.append(token.string)
    return " ".join(kept).replace(" . ", ".")


def dangers(source: str) -> list[str]:
    code = without_comments_and_texts(source)
    return [name for name, pattern in DANGEROUS.items() if re.search(pattern, code)]


def test_nothing_runs_code_from_data(template):
    assert dangers(template.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(p, weights_only = False)", ["weights_only off"]),
        ("x = eval(text)", ["eval"]),
        ("exec(text)", ["exec"]),
        ("pickle.load(file)", ["pickle"]),
        ("from pickle import loads", ["pickle by name"]),
        ("run(words, shell=True)", ["shell"]),
        ("os.system(words)", ["shell"]),
        ("yaml.load(text)", ["unsafe YAML"]),
        ("model.eval()\npickle.UnpicklingError\nyaml.safe_load(t)  # eval(", []),
        ("'''weights_only=False runs code'''", []),
    ],
)
def test_the_search_finds_what_it_is_for(source, found):
    assert dangers(source) == found
