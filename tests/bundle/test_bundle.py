"""SKILL.md and references: quoted code, links, limits, names of torch, unsafe calls.

`python tests/bundle/test_bundle.py --update` writes the quoted code again. A quotation
is a Python block under `<!-- snippets/FILE.py -->` (what precedes its proof) or under
`<!-- snippets/FILE.py: NAME NAME -->` (these definitions).
"""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from generator.cli import make_parser
from tests.bundle.test_docs import (
    REFERENCES,
    ROOT,
    SKILL_PAGES,
    read,
    unsafe_calls,
)

FOLDERS = ("templates", "snippets")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))

MAX_SKILL_LINES = 200
MAX_SKILL_TOKENS = 3500
MAX_REFERENCE_TOKENS = 2500

QUOTATION = re.compile(
    r"(?<=^<!-- )(snippets/\w+\.py)(?:: ([\w ]+))?( -->\n```python\n)(.*?)(?=^```$)",
    re.DOTALL | re.M,
)

# Newer than the torch that is installed here, or only there with CUDA; used guarded.
GUARDED = {
    "torch.optim.Muon",  # 2.9
    "torch.accelerator.empty_cache",  # 2.9
    "torch.accelerator.memory_stats",  # 2.9
    "torch.accelerator.get_memory_info",
    "torch._C._cuda_clearCublasWorkspaces",
}


def count_tokens(text: str) -> int:
    """About one for 3.6 characters, and for each Hangul syllable.

    o200k_base and cl100k_base needed one for 3.7 characters of SKILL.md.
    """
    wide = sum(ord(character) > 0x2FFF for character in text)
    return round((len(text) - wide) / 3.6) + wide


# --- Quoted code ----------------------------------------------------------------------


def quote(path: str, names: str | None) -> str:
    """The idiom of a snippet, or definitions of it, as it is to stand in a page."""
    text = read(path).partition('\nif __name__ == "__main__":')[0].rstrip("\n")
    if not names:
        docstring = ast.parse(text).body[0]
        return "\n".join(text.splitlines()[docstring.end_lineno :]).lstrip("\n") + "\n"
    lines = text.splitlines()
    nodes = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    parts = []
    for name in names.split():
        node = nodes[name]
        parts.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return "\n\n".join(parts) + "\n"


def with_quotations(text: str) -> str:
    return QUOTATION.sub(
        lambda m: f"{m[1]}{': ' + m[2] if m[2] else ''}{m[3]}{quote(m[1], m[2])}",
        text,
    )


@pytest.mark.parametrize("page", SKILL_PAGES)
def test_quoted_code_is_that_of_the_snippets(page):
    text = read(page)
    hint = "run: python tests/bundle/test_bundle.py --update"
    assert text == with_quotations(text), hint
    # No code but quoted code.
    assert len(QUOTATION.findall(text)) == text.count("```python")


def test_quotations_are_found_and_checked():
    page = "<!-- snippets/ema.py: WeightAverage -->\n```python\nold\n```\n"
    new = with_quotations(page)
    assert "torch._foreach_lerp_" in new
    assert "old" not in new
    assert with_quotations(new) == new
    assert any(QUOTATION.search(read(page)) for page in SKILL_PAGES)


# --- Form -----------------------------------------------------------------------------


def test_skill_is_within_its_limits():
    text = read("SKILL.md")
    assert text.count("\n") <= MAX_SKILL_LINES
    assert count_tokens(text) <= MAX_SKILL_TOKENS


def test_references_are_few_short_and_say_when_to_read_them():
    assert 0 < len(REFERENCES) <= 4
    for name in REFERENCES:
        text = read(name)
        assert re.match(r"# [A-Z]\w+\n\nRead when ", text), name
        assert count_tokens(text) <= MAX_REFERENCE_TOKENS, name
        assert name in read("SKILL.md"), f"{name}: SKILL.md has no link"


@pytest.mark.parametrize("page", SKILL_PAGES)
def test_pages_link_only_to_what_is_in_the_bundle(page):
    """README, tests and evals are not where a skill has been copied."""
    links = re.findall(r"\]\(([^)#:]+)\)", read(page))
    here = (ROOT / page).parent
    for link in links:
        top = (here / link).resolve().relative_to(ROOT).parts[0]
        assert top in ("SKILL.md", "references", "snippets", "templates", "bin"), link


@pytest.mark.parametrize("page", SKILL_PAGES)
def test_names_of_templates_and_snippets_exist(page):
    """`name` of `templates/file.py`: it is defined there."""
    text = " ".join(read(page).split())
    pattern = r"`(\w+)`(?:, `(\w+)`)? (?:of|in) `((?:templates|snippets)/\w+\.py)`"
    for *names, path in re.findall(pattern, text):
        defined = {n.name for n in ast.parse(read(path)).body if hasattr(n, "name")}
        assert {name for name in names if name} <= defined, path


# Options of generated scripts, of torchrun, npx and pip: all else is the generator's.
OTHERS = {
    *("--data", "--config", "--help", "--epochs", "--out-dir", "--dtype", "--cpu"),
    *(
        "--replicas",
        "--batch-size",
        "--image-size",
        "--log-every",
        "--best-by",
        "--cache-dir",
        "--on-error",
        "--text-column",
        "--label-column",
    ),
    *("--query-column", "--document-column"),
    *("--num-workers", "--nproc-per-node", "--standalone", "--nnodes"),
}


@pytest.mark.parametrize("page", SKILL_PAGES)
def test_flags_are_those_of_the_generator(page):
    known = {
        word for action in make_parser()._actions for word in action.option_strings
    }
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", read(page)))
    assert shown - known - OTHERS == set()


# --- Code -----------------------------------------------------------------------------


def torch_names(tree: ast.AST) -> set[str]:
    """Dotted names under torch that a module uses, its aliases resolved."""
    aliases = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name, alias in ((item.name, item.asname) for item in node.names):
                if name.partition(".")[0] == "torch":
                    found.add(name)
                    aliases[alias or "torch"] = name if alias else "torch"
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            for item in node.names if module.partition(".")[0] == "torch" else ():
                found.add(f"{module}.{item.name}")
                aliases[item.asname or item.name] = f"{module}.{item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in aliases:
                found.add(".".join([aliases[inner.id], *reversed(parts)]))
    return found


def missing_name(name: str) -> str:
    """The first part of a dotted name that does not exist here, or nothing."""
    target = importlib.import_module("torch")
    done = "torch"
    for part in name.split(".")[1:]:
        if not (inspect.ismodule(target) or inspect.isclass(target)):
            return ""  # an attribute of an object: not decided by the version
        done += f".{part}"
        if done in GUARDED:
            return ""
        try:
            target = getattr(target, part)
        except AttributeError:
            if not importlib.util.find_spec(done):
                return done
            target = importlib.import_module(done)
    return ""


def test_names_of_torch_exist():
    """Those of templates, snippets and pages, on the torch that is installed."""
    assert missing_name("torch.cuda.amp.GradScalar")
    assert not missing_name("torch.amp.GradScaler")
    tree = ast.parse("from torch import nn\nnn.functional.foo(nn.Linear)")
    assert torch_names(tree) == {
        "torch.nn",
        "torch.nn.functional.foo",
        "torch.nn.functional",
        "torch.nn.Linear",
    }
    missing = {}
    for path in SOURCES:
        for name in torch_names(ast.parse(path.read_text(encoding="utf-8"))):
            if bad := missing_name(name):
                missing[f"{path.name}: {bad}"] = name
    for page in SKILL_PAGES:
        for name in re.findall(r"\btorch(?:\.\w+)+", read(page)):
            if bad := missing_name(name):
                missing[f"{page}: {bad}"] = name
    assert not missing


PICKLE = re.compile(r"(pickle|marshal|shelve|dill)\.(?!UnpicklingError)")
DEPRECATED = re.compile(
    r"torch\.cuda\.amp|torch\.cpu\.amp|torch\.ao\.quantization"
    r"|_use_new_zipfile_serialization|use_reentrant=True|use_cuda="
)


def test_no_unsafe_and_no_deprecated_call():
    """In the code of snippets and of pages; test_docs.py looks at templates."""
    texts = {str(path): path.read_text(encoding="utf-8") for path in SOURCES}
    for page in SKILL_PAGES:
        texts[page] = "\n".join(match[3] for match in QUOTATION.findall(read(page)))
    for name, text in texts.items():
        tree = ast.parse(text)
        assert not unsafe_calls(text), name
        called = {
            ast.unparse(node.func)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
        }
        assert not [call for call in called if PICKLE.match(call)], name
    for path in (ROOT / "snippets").glob("*.py"):
        code = "\n".join(
            line.partition("#")[0] for line in texts[str(path)].splitlines()
        )
        assert not DEPRECATED.search(code), path.name


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/bundle/test_bundle.py --update")
    for page in SKILL_PAGES:
        (ROOT / page).write_text(with_quotations(read(page)), encoding="utf-8")
