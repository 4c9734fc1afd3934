"""The command line: `generate-script [--task TASK] [sections] [-o FILE]`.

Exit codes: 0, 2 for a request that cannot be met, 3 for a file that it will not
overwrite. Everything that is wrong with a request is said at once.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .options import (
    CONFLICTS,
    PRESETS,
    REQUIREMENTS,
    SECTIONS,
    TASKS,
    Request,
    RequestError,
    check_request,
    find_conflicts,
    preset_sections,
    suggest,
)
from .stitch import GLUE, Library

WOULD_OVERWRITE = 3
ANSWERS = ("task", "model", "set", "output", "split", *SECTIONS)  # what makes a script


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
    parser.add_argument(
        "--model",
        metavar="hf:NAME|timm:NAME|module:Class",
        help="instead of the built-in one",
    )
    parser.add_argument(
        "--preset", metavar="{" + ",".join(PRESETS) + "}", help="sections by the dozen"
    )
    parser.add_argument(
        "--auto",
        nargs="?",
        metavar="SIZE",
        help="sections for this machine and a model of SIZE parameters (100M)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="defaults of the script's settings: --set epochs=20 log_every=0",
    )
    parser.add_argument(
        "--from", metavar="FILE.yaml", help="options from a file; these go over it"
    )
    parser.add_argument(
        "--save", metavar="FILE.yaml", help="write the options there, for --from"
    )
    group = parser.add_argument_group("sections (numbers: of the guide)")
    for section in SECTIONS.values():
        if section.takes_value:
            details = {
                "nargs": None if section.default is None else "?",
                "metavar": section.values,
            }
        else:
            details = {"action": "store_const", "const": None}
        group.add_argument(section.flag, help=section.description, **details)
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
    parser = make_parser()
    parsed, unknown = parser.parse_known_args(words)
    options = vars(parsed)
    known = [word for action in parser._actions for word in action.option_strings]
    problems = explain_unknown(unknown, known)
    given = {"--" + name.replace("_", "-") for name in options}
    given |= {"-o", f"-o {options['output']}"} if "output" in options else set()

    instead = {"list", "extract"} & options.keys()  # of a script
    if instead and not problems and not find_conflicts(given):
        if "list" in options:
            print(list_as_json() if "json" in options else list_as_text())
        else:
            extract(options)
    else:
        as_json = "json" in options
        answers, more = collect_answers(options, quiet=as_json)
        problems += more
        request, more = check_request(
            answers.get("task", "text"),
            {name: answers[name] for name in SECTIONS if name in answers},
            answers.get("output", "train.py"),
            "split" in answers,
            answers.get("model") or "",
            given,
            answers.get("set"),
        )
        if request is None or problems:
            raise RequestError(problems + more)
        write_script(request, "force" in options, as_json, options.get("save"))


def explain_unknown(words: Sequence[str], known: Sequence[str]) -> list[str]:
    """What is wrong with words that are no options; a script's settings have remedies.

    Args:
        words: as argparse leaves them, with values behind the options.
        known: options.
    """
    groups: list[list[str]] = []
    for word in words:
        if groups and not word.startswith("-"):
            groups[-1].append(word)
        else:
            groups.append([word])
    source = (GLUE / "config.py.j2").read_text(encoding="utf-8")
    settings = re.findall(r"^    (\w+):", source, re.MULTILINE)
    settings += [name for task in TASKS.values() for name in task.setting_names]
    problems = []
    for option, *values in groups:
        name, _, value = option.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if option.startswith("--") and name in settings:
            default = f"--set {name}={value or ' '.join(values) or 'true'}"
            problems.append(
                f"{' '.join([option, *values])} is for the script: pass it there, or"
                f" give the script another default with {default}"
            )
        else:
            problems.append(suggest(option, known))
    return problems


def collect_answers(
    options: dict[str, Any], quiet: bool
) -> tuple[dict[str, Any], list[str]]:
    """All that was asked for: the command line over --from over --preset or --auto.

    Returns:
        Name -> text, and what is wrong with those names and values.
    """
    problems: list[str] = []
    answers: dict[str, Any] = {}
    saved, more = read_answers(options["from"]) if "from" in options else ({}, [])
    problems += more
    if "preset" in options:
        preset, task = options["preset"], options.get("task") or saved.get("task")
        if preset in PRESETS:
            answers = preset_sections(preset, task or "text")
        else:
            problems.append(f"--preset {preset}: choose {' or '.join(PRESETS)}")
    if "auto" in options:
        from . import auto  # only here: it needs subprocess, which takes its time

        try:
            size = auto.parse_size(options["auto"] or "100M")
        except ValueError as error:
            problems.append(str(error))
        else:
            gpus = auto.find_gpus()
            choices = auto.choose_sections(size, gpus)
            answers = {choice.section: choice.value for choice in choices}
            lines = [f"--auto: {auto.describe_machine(gpus)}"]
            lines += [f"  {SECTIONS[c.section].flag}: {c.reason}" for c in choices]
            if not quiet:
                print("\n".join(lines), file=sys.stderr)
    defaults = dict(saved.pop("set", None) or {})
    for word in options.get("set", []):
        name, equals, value = word.partition("=")
        defaults[name.replace("-", "_")] = value
        if not equals:
            problems.append(f"--set {word}: write NAME=VALUE, such as epochs=20")
    answers |= saved
    answers |= {name: options[name] for name in ANSWERS if name in options}
    answers["set"] = defaults
    return {name: text for name, text in answers.items() if text is not False}, problems


def read_answers(path: str) -> tuple[dict[str, Any], list[str]]:
    """The options in a YAML file (False: switched off), and what is wrong with it."""
    import yaml  # only here: it takes a tenth of a second

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        return {}, [f"--from {path}: cannot be read ({error.strerror})"]
    except (ValueError, yaml.YAMLError) as error:
        return {}, [f"--from {path}: no YAML: {' '.join(str(error).split())}"]
    if not isinstance(loaded, dict):
        return {}, [f"--from {path}: write one `option: value` a line"]
    answers, problems = {}, []
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in ANSWERS:
            problems.append(f"--from {path}: {suggest(str(key), ANSWERS)}")
        elif name == "set":
            if isinstance(value, dict):
                answers[name] = {str(key): str(text) for key, text in value.items()}
            else:
                problems.append(f"--from {path}: set: write one `name: value` a line")
        elif value is False:  # switched off
            answers[name] = False
        else:
            answers[name] = None if value is True or value is None else str(value)
    return answers, problems


def save_answers(request: Request, path: str, force: bool) -> None:
    """Write the options of a request as YAML that --from reads."""
    import yaml

    answers: dict[str, Any] = {"task": request.task.name}
    if request.model.name:
        answers["model"] = str(request.model)
    answers |= request.sections
    answers |= {"set": dict(request.defaults)} if request.defaults else {}
    answers |= {"split": True} if request.split else {}
    answers["output"] = request.output
    write_files({path: yaml.safe_dump(answers, sort_keys=False)}, force)


def write_script(
    request: Request, force: bool, as_json: bool, answers_path: str | None = None
) -> None:
    """Render, write, and say what to do next."""
    script = import_render().render_script(request)
    files = {request.output: script.text}
    if request.split:
        path = Path(request.output)
        files[str(path.with_name(path.stem + "_tools.py"))] = script.tools
    for name, text in script.further.items():
        files[str(Path(request.output).with_name(name))] = text
    write_files(files, force)
    if answers_path:
        save_answers(request, answers_path, force)
    folder, name = os.path.split(request.output)
    enter = f"cd {shlex.quote(folder)} && " if folder else ""
    run_command, launch = (
        f"{enter}{program} {shlex.quote(name)}"
        for program in ("python", "torchrun --nproc-per-node=8")
    )
    starts = request.output != "-"
    report = {
        "files": {file: text.count("\n") for file, text in files.items()},
        "run": run_command if starts else "",
        "launch": launch if starts and "distributed" in request.sections else "",
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
        if report["launch"]:
            print(f"or:    {report['launch']}  # 8: the GPUs", file=sys.stderr)


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
            "presets": {name: list(preset) for name, preset in PRESETS.items()},
            "conflicts": [vars(conflict) for conflict in CONFLICTS],
            "requirements": [vars(requirement) for requirement in REQUIREMENTS],
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
        rows.append(f"  {section.usage:34} {section.description}")
    rows += ["", "Presets (--preset):"]
    for name, preset in PRESETS.items():
        flags = [SECTIONS[section].spell(value) for section, value in preset.items()]
        rows += wrap_row(f"{name:12} {' '.join(flags)}", indent=15)
    rows += ["", "Need another:"]
    rows += [f"  {item}" for item in REQUIREMENTS]
    rows += ["", "Do not go together:"]
    for first in dict.fromkeys(conflict.first for conflict in CONFLICTS):
        others = [c.second for c in CONFLICTS if c.first == first]
        rows += wrap_row(f"{first} with {', '.join(others)}", indent=6)
    return "\n".join(rows)


def wrap_row(text: str, indent: int) -> list[str]:
    """The lines of a row of --list; those after the first are indented further."""
    return textwrap.wrap(
        text,
        88,
        initial_indent="  ",
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
