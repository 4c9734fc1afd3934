"""Stitching: the closure over names, verbatim slices, imports, and its errors."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from generator.options import SECTIONS, TASKS, check_request
from generator.render import render_script
from generator.stitch import (
    MODULE_ORDER,
    TEMPLATES,
    Definition,
    Library,
    StitchError,
    bound_names,
    decorators_of,
    find_free_names,
    parse_module,
    read_import,
    stitch_definitions,
    stitch_script,
)

ROOT = Path(__file__).resolve().parents[2]
MOST_ON = {
    name: section.choices[-1] if section.choices else ("2" if section.number else None)
    for name, section in SECTIONS.items()
    # Without what does not go with every task.
    if name not in ("stream", "token_budget", "oom_recovery")
} | {"ema": "0.9", "optimizer": "muon"}


def library_of(**sources: str) -> Library:
    return Library(
        parse_module(name, textwrap.dedent(source)) for name, source in sources.items()
    )


def request_of(task: str, sections: dict, split: bool = False):
    request, problems = check_request(task, sections, "train.py", split)
    assert not problems
    return request


def test_follows_names_through_functions_classes_constants_and_imports():
    library = library_of(
        a='''
        """Docstring."""

        import math
        import os
        from pathlib import Path as P

        # Why this constant.
        LIMIT = 3


        class Base:
            size = LIMIT


        class Child(Base):
            def area(self) -> float:
                return [math.pi * self.size for _ in range(2)][0]


        def unused() -> P:
            return P(os.sep)


        def make():
            return Child()
        '''
    )
    text = stitch_definitions(["make"], '"""Header."""', library)
    assert text == textwrap.dedent(
        '''\
        """Header."""

        import math

        {title}

        # Why this constant.
        LIMIT = 3


        class Base:
            size = LIMIT


        class Child(Base):
            def area(self) -> float:
                return [math.pi * self.size for _ in range(2)][0]


        def make():
            return Child()
        '''
    ).replace("{title}", "# --- templates/a.py ".ljust(88, "-"))


@pytest.mark.parametrize(
    ("source", "free"),
    [
        ("def f(a, b=c) -> d: return a + e", {"c", "d", "e"}),
        ("def f():\n x = 1\n def g(): return x + y\n return g", {"y"}),
        ("@deco\nclass A(Base, metaclass=M):\n z = q\n", {"deco", "Base", "M", "q"}),
        ("def f():\n global counter\n counter = 1", {"counter"}),
        ("f = lambda x: x + y", {"y"}),
        ("def f(x: 'Later', *, y: int | None = None): ...", {"int"}),
        ("class A:\n  x: Kind = 1\n  def m(self): return A", {"Kind"}),
        ("def f(p):\n  with open(p) as g: return [i for i in g if w]", {"open", "w"}),
        ("try:\n  import tqdm\nexcept ImportError:\n  tqdm = None", {"ImportError"}),
    ],
)
def test_free_names(source, free):
    assert find_free_names(source) == free


def test_guarded_import_is_followed():
    library = library_of(
        a="""
        try:
            import tqdm
        except ImportError:
            tqdm = None


        def bar():
            return tqdm
        """
    )
    assert "except ImportError:" in stitch_definitions(["bar"], '""""""', library)


def test_unknown_name_in_the_glue_names_the_line():
    glue = {"train": "import torch\n\n\ndef main():\n    return make_modle(torch)\n"}
    with pytest.raises(StitchError, match=r"train: `return make_modle\(torch\)`"):
        stitch_script('""""""', glue, "main()\n", library_of(a="X = 1\n"))


def test_unknown_name_in_a_template_names_both():
    library = library_of(a="def f():\n    return missing\n")
    with pytest.raises(StitchError, match=r"a.py: f uses missing"):
        library.close_over(["f"])


def test_a_template_may_not_use_another():
    library = library_of(a="def f():\n    return g()\n", b="def g():\n    return 1\n")
    with pytest.raises(StitchError, match=r"a.py: f uses g"):
        library.close_over(["f"])


def test_one_name_in_two_templates_is_an_error():
    with pytest.raises(StitchError, match="X is defined in a and in b"):
        library_of(a="X = 1\n", b="X = 2\n")


def test_glue_may_not_shadow_a_template():
    with pytest.raises(StitchError, match="helper is defined in the glue"):
        stitch_script(
            '""""""',
            {"g": "def helper():\n    return 1\n"},
            "helper()\n",
            library_of(a="def helper():\n    return 2\n"),
        )


def test_one_import_name_for_two_things_is_an_error():
    library = library_of(
        a="import json\n\n\ndef f():\n    return json\n",
        b="import simplejson as json\n\n\ndef g():\n    return json\n",
    )
    with pytest.raises(StitchError, match="json means both"):
        library.close_over(["f", "g"])


def test_tools_needed_at_import_time_are_an_error():
    with pytest.raises(StitchError, match="Base is needed before"):
        stitch_script(
            '""""""',
            {"g": "class Mine(Base):\n    pass\n"},
            "Mine()\n",
            library_of(a="class Base:\n    pass\n"),
        )


def test_templates_are_all_in_the_order_and_one_flat_namespace():
    files = {path.stem for path in TEMPLATES.glob("*.py")} - {"__init__"}
    assert files == set(MODULE_ORDER)
    library = Library.load()
    for name in library.owners:
        library.close_over([name])  # every name that it uses is in its own file


def parse_with_ast(source: str) -> tuple[dict, list[Definition], str]:
    """Imports, definitions and body of a module, as Python itself parses it."""
    lines = source.splitlines(keepends=True)
    imports, definitions, body_start = {}, [], 0
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.update((item.bound_name, item) for item in read_import(node))
            body_start = node.end_lineno
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            body_start = node.end_lineno
        else:
            start = min([node.lineno, *(d.lineno for d in decorators_of(node))]) - 1
            while start > 0 and lines[start - 1].startswith("#"):
                start -= 1
            text = "".join(lines[start : node.end_lineno]).rstrip() + "\n"
            names = tuple(bound_names(node))
            definitions.append(Definition(names, text, hasattr(node, "name")))
    return imports, definitions, "".join(lines[body_start:]).strip("\n") + "\n"


def assert_parsed_as_python_does(name: str, source: str) -> None:
    module = parse_module(name, source)
    parsed = (module.imports, list(module.definitions), module.body)
    assert parsed == parse_with_ast(source)


@pytest.mark.parametrize("name", MODULE_ORDER)
def test_templates_fall_apart_by_lines_as_python_parses_them(name):
    source = (TEMPLATES / f"{name}.py").read_text()
    assert_parsed_as_python_does(name, source)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sections", [{}, MOST_ON], ids=["none", "most"])
def test_so_do_scripts_and_what_stands_beside_them(task, sections):
    further = dict.fromkeys(("predict", "tests"))
    script = render_script(request_of(task, sections | further, split=True))
    for text in (script.text, script.tools, *script.further.values()):
        if not text.startswith("#!"):  # the Slurm job
            assert_parsed_as_python_does("script", text)


def test_an_import_behind_a_definition_is_an_error():
    with pytest.raises(StitchError, match="glue, line 4: imports come first"):
        parse_module("glue", "import os\n\nX = 1\nimport sys\n")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sections", [{}, MOST_ON], ids=["none", "all"])
def test_tools_are_verbatim_and_each_has_a_user(task, sections, split):
    script = render_script(request_of(task, sections, split))
    source = script.tools if split else script.text
    library = Library.load()
    tree = ast.parse(source)
    whole = script.text + script.tools
    used = {
        node.id for node in ast.walk(ast.parse(whole)) if isinstance(node, ast.Name)
    }
    used |= {
        node.value
        for node in ast.walk(ast.parse(whole))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # quoted annotations
    emitted = 0
    for node in tree.body:
        name = getattr(node, "name", None)
        if name in library.owners:
            definition = library.owners[name].by_name[name]
            assert definition.source in source
            assert name in used
            emitted += 1
    assert emitted > 20


@pytest.mark.parametrize("task", TASKS)
def test_an_unselected_section_leaves_no_trace(task):
    text = render_script(request_of(task, {})).text
    plain = text.split('"""', 2)[2].partition("# --- templates/")[0]
    for word in (
        "autocast",
        "scaler",
        "checkpointing",
        "compile_model",
        "micro_batch",
        "clip_",
        "scheduler",
        "ema.",
        "stopping",
        "resume_",
        "should_stop",
        "if False",
        "if True",
    ):
        assert word not in plain.lower(), word


def test_same_bytes_under_three_hash_seeds_and_other_pythons():
    words = ["--amp", "--checkpointing", "--resume", "--ema", "--scheduler=cosine"]
    texts = set()
    for seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "generator"), *words, "-o", "-"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        texts.add(done.stdout)
    import jinja2
    import markupsafe

    folders = {Path(m.__file__).parents[1] for m in (jinja2, markupsafe)}
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        python = shutil.which(f"python{version}")
        if not python or subprocess.run([python, "-V"], capture_output=True).returncode:
            continue
        done = subprocess.run(
            [python, str(ROOT / "generator"), *words, "-o", "-"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
            capture_output=True,
            check=True,
        )
        texts.add(done.stdout)
    assert len(texts) == 1
