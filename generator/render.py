"""Rendering: from a checked request to glue, and from glue to the finished script."""

import re
import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import PurePath

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import __version__
from .options import SECTIONS, Request
from .stitch import (
    GLUE,
    LINE_LENGTH,
    Library,
    Script,
    stitch_companion,
    stitch_definitions,
    stitch_script,
)


def fit(head: str, items: Iterable[str], tail: str, is_call: bool = True) -> str:
    """A bracket and its items as `ruff format` lays them out; "" is no item.

    On one line; else, in calls, the items on a line of their own; else one a line.
    """
    items = [item for item in items if item]
    indent = " " * (len(head) - len(head.lstrip()))
    line = ", ".join(items)
    if len(head + line + tail) <= LINE_LENGTH:
        return head + line + tail
    if is_call and head.endswith("(") and len(indent) + 4 + len(line) <= LINE_LENGTH:
        return f"{head}\n{indent}    {line}\n{indent}{tail}"
    rows = "".join(f"{indent}    {item},\n" for item in items)
    return f"{head}\n{rows}{indent}{tail}"


@cache
def make_environment() -> Environment:
    """Jinja for Python source: an unknown name is an error, whole lines vanish."""
    environment = Environment(
        loader=FileSystemLoader(GLUE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Python source, not HTML
        optimized=False,  # each template is rendered once: folding constants costs more
    )
    environment.globals["fit"] = fit
    return environment


def wrap_command(words: list[str], width: int = 88) -> str:
    """A shell command, indented by four, on as many lines as it needs."""
    rows = textwrap.wrap(
        shlex.join(words),
        width=width - 2,  # the backslash
        initial_indent="    ",
        subsequent_indent="        ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return " \\\n".join(rows)


def describe_sections(request: Request) -> str:
    """The chosen sections in words, in the order of the guide."""
    phrases = [
        SECTIONS[name].phrase.format(request.sections[name])
        for name in SECTIONS
        if name in request.sections
    ]
    if not phrases:
        return "a plain loop"
    last = phrases.pop()
    return f"{', '.join(phrases)} and {last}" if phrases else last


def render_script(request: Request, library: Library | None = None) -> Script:
    """The script that was asked for.

    Raises:
        RequestError: --set does not fit the script's settings.
        jinja2.TemplateError, StitchError: a mistake in our glue or templates.
    """
    environment = make_environment()
    library = library or Library.load()
    script_name = "train.py" if request.output == "-" else PurePath(request.output).name
    name = request.task.name
    context = {
        **dict.fromkeys(SECTIONS, False),
        **request.sections,
        "task": request.task,
        "model": request.model,
        "skips": "stream" in request.sections or name in ("image", "tabular"),
        "version": __version__,
        "script": shlex.quote(script_name),
        "module": request.stem,
        "summary": textwrap.fill(
            f"Train {request.task.subject} with {describe_sections(request)}.", 80
        ),
        "command": wrap_command(request.command),
    }

    def render(template: str, **more: str) -> str:
        return environment.get_template(template).render(context, **more)

    names = ("config", request.task.name, "train")
    tools_module = request.stem + "_tools" if request.split else ""
    glue = {name: render(f"{name}.py.j2") for name in names}
    if request.defaults:
        from .defaults import put_defaults  # only here: most requests have none

        glue["config"] = put_defaults(glue["config"], request.defaults)
    script = stitch_script(
        header=render("header.py.j2"),
        glue=glue,
        guard=render("guard.py.j2"),
        library=library,
        tools_module=tools_module,
        notice=f"Stitched by pytorch-optimization {__version__}.",
    )
    homes = script.homes(request.stem, tools_module)
    further = {
        file: render_companion(name, file, render, library, homes)
        for name, file in request.further_files.items()
    }
    return replace(script, further=further)


def render_companion(
    name: str,
    file: str,
    render: Callable[..., str],
    library: Library,
    homes: Mapping[str, str],
) -> str:
    """One further file: a shell script as it is rendered, Python stitched.

    A Python file's glue has its header first and its guard last, apart from the rest by
    a line that begins with `# ===`.
    """
    if name == "slurm":
        return render("slurm.sh.j2", file=file)
    header, glue, guard = re.split(
        r"^# ===.*\n", render(f"{name}.py.j2", file=file), flags=re.MULTILINE
    )
    return stitch_companion(header, {file: glue}, guard, library, homes)


def render_definitions(names: list[str], library: Library) -> str:
    """The named template definitions and what they need, as one Python file."""
    command = wrap_command(["generate-script", "--extract", *names])
    title = f"{', '.join(names)}: stitched by pytorch-optimization {__version__}."
    raw = "r" * ("\\" in command)  # a command of several lines
    header = f'{raw}"""{textwrap.fill(title, 80)}\n\nThe same again:\n{command}\n"""'
    return stitch_definitions(names, header, library)
