"""The command line: `generate-script [--task TASK] [sections] [-o FILE]`.

Exit codes: 0, 2 for a request that cannot be met, 3 for a file that it will not
overwrite. Everything that is wrong with a request is said at once.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .options import (
    CONFLICTS,
    SECTIONS,
    TASKS,
    Request,
    check_request,
    find_conflicts,
    suggest,
)
from .stitch import Library

BAD_REQUEST = 2
WOULD_OVERWRITE = 3


class RequestError(Exception):
    """A request that cannot be met: an exit code and one line for each problem."""

    def __init__(self, problems: Sequence[str], exit_code: int = BAD_REQUEST) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)
        self.exit_code = exit_code


class RequestParser(argparse.ArgumentParser):
    """Raises RequestError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise RequestError([f"{message}: see --help"])


def make_parser() -> RequestParser:
    """The options, those of the sections from SECTIONS."""
    parser = RequestParser(
        prog="generate-script",
        description="Write one ready-to-run PyTorch training script.",
        epilog="example: generate-script --amp --checkpointing -o train.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--task", metavar="{" + ",".join(TASKS) + "}", help="default: text"
    )
    group = parser.add_argument_group("sections (numbers: of the guide)")
    for section in SECTIONS.values():
        text = f"{section.summary} ({section.guide})"
        if section.takes_value:
            metavar = "|".join(section.choices) or "N"
            nargs = None if section.default is None else "?"
            group.add_argument(section.flag, nargs=nargs, metavar=metavar, help=text)
        else:
            group.add_argument(
                section.flag, action="store_const", const=None, help=text
            )
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", metavar="FILE", help="default: train.py; - prints"
    )
    group.add_argument("--split", action="store_true", help="tools in FILE_tools.py")
    group.add_argument("--force", action="store_true", help="overwrite FILE")
    group.add_argument("--json", action="store_true", help="report as JSON")
    group = parser.add_argument_group("instead of a script")
    group.add_argument("--list", action="store_true", help="tasks, sections, conflicts")
    group.add_argument(
        "--extract",
        nargs="+",
        metavar="NAME",
        help="these functions or classes of the templates, with all that they need",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` asks for; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        run(words)
    except RequestError as error:
        if "--json" in words:
            print(json.dumps({"errors": error.problems}))
        else:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    return 0


def run(words: Sequence[str]) -> None:
    """List, extract or write a script.

    Raises:
        RequestError: for everything that is wrong with the request.
    """
    parsed, unknown = make_parser().parse_known_args(words)
    options = vars(parsed)
    known = [
        word for action in make_parser()._actions for word in action.option_strings
    ]
    problems = [suggest(word, known) for word in unknown]
    given = {"--" + name.replace("_", "-") for name in options}
    given |= {"-o", f"-o {options['output']}"} if "output" in options else set()
    problems += find_conflicts(given)

    if "list" in options and not problems:
        print(list_as_json() if "json" in options else list_as_text())
    elif "extract" in options and not problems:
        extract(options)
    else:
        request, more = check_request(
            options.get("task", "text"),
            {name: options[name] for name in SECTIONS if name in options},
            options.get("output", "train.py"),
            "split" in options,
        )
        if request is None or problems:
            raise RequestError(problems + more)
        write_script(request, "force" in options, "json" in options)


def write_script(request: Request, force: bool, as_json: bool) -> None:
    """Render, write, and say what to do next."""
    script = import_render().render_script(request)
    files = {request.output: script.text}
    if request.split:
        path = Path(request.output)
        files[str(path.with_name(path.stem + "_tools.py"))] = script.tools
    for name, text in script.further.items():
        files[str(Path(request.output).with_name(name))] = text
    write_files(files, force)
    folder, name = os.path.split(request.output)
    run_command = f"python {shlex.quote(name)}"
    if folder:
        run_command = f"cd {shlex.quote(folder)} && {run_command}"
    report = {
        "files": {file: text.count("\n") for file, text in files.items()},
        "run": "" if request.output == "-" else run_command,
        "packages": list(request.task.packages),
        "packages_for_own_data": list(request.task.own_packages),
        "own_data": f"--data takes {request.task.own_data}",
        "command": shlex.join(request.command),
    }
    if as_json:
        stream = sys.stderr if request.output == "-" else sys.stdout
        print(json.dumps(report), file=stream)
    elif request.output != "-":
        for file, lines in report["files"].items():
            print(f"wrote {file} ({lines} lines)", file=sys.stderr)
        packages = " ".join(request.task.packages)
        own = " ".join(request.task.own_packages)
        print(f"needs: {packages}; for --data: {own}", file=sys.stderr)
        print(f"run:   {run_command}", file=sys.stderr)


def extract(options: dict[str, Any]) -> None:
    """Write the named definitions; to standard output without -o."""
    library = Library.load()
    names = options["extract"]
    if unknown := [name for name in names if name not in library.owners]:
        raise RequestError(
            [suggest(name, list(library.owners), "name") for name in unknown]
        )
    output = options.get("output", "-")
    text = import_render().render_definitions(names, library)
    write_files({output: text}, "force" in options)
    if output != "-":
        print(f"wrote {output} ({text.count(chr(10))} lines)", file=sys.stderr)


def import_render() -> Any:
    """The renderer, which needs jinja2.

    Raises:
        RequestError: jinja2 is not installed.
    """
    try:
        from . import render
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        raise RequestError(["jinja2 is missing: pip install jinja2"]) from None
    return render


def write_files(files: dict[str, str], force: bool) -> None:
    """Write all of the files or, if one is there already, none.

    Raises:
        RequestError: a file exists (exit code 3), or cannot be written.
    """
    if files.keys() == {"-"}:
        sys.stdout.write(files["-"])
        return
    hint = "choose another name with -o, or overwrite it with --force"
    present = [f"{file} exists: {hint}" for file in files if os.path.lexists(file)]
    if present and not force:
        raise RequestError(present, WOULD_OVERWRITE)
    for file, text in files.items():
        path = Path(file)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise RequestError(
                [f"{file} cannot be written: {error.strerror}"]
            ) from None


def list_as_json() -> str:
    """Tasks, sections and conflicts for a program to read."""
    return json.dumps(
        {
            "version": __version__,
            "tasks": {
                task.name: {
                    "trains": task.subject,
                    "built_in_data": task.builtin,
                    "own_data": task.own_data,
                    "packages": task.packages,
                    "packages_for_own_data": task.own_packages,
                }
                for task in TASKS.values()
            },
            "sections": {
                section.flag: {
                    "usage": section.usage,
                    "does": section.summary,
                    "guide_sections": section.guide,
                }
                for section in SECTIONS.values()
            },
            "conflicts": [vars(conflict) for conflict in CONFLICTS],
        },
        indent=2,
    )


def list_as_text() -> str:
    """Tasks, sections and conflicts for a person to read."""
    rows = ["Tasks (--task):"]
    for task in TASKS.values():
        rows.append(f"  {task.name:8} {task.subject}; built in: {task.builtin}")
        rows.append(f"           --data of the script takes {task.own_data}")
    rows += ["", "Sections (the numbers are those of the guide):"]
    for section in SECTIONS.values():
        rows.append(f"  {section.usage:34} {section.summary} ({section.guide})")
    rows += ["", "Do not go together:"]
    for first in dict.fromkeys(conflict.first for conflict in CONFLICTS):
        others = [c.second for c in CONFLICTS if c.first == first]
        rows.append(f"  {first} with {', '.join(others)}")
    return "\n".join(rows)
