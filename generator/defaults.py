"""Other defaults for a script's settings (--set), checked as the script checks them."""

import ast
import importlib.util
import json
import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from .options import RequestError, suggest
from .stitch import LINE_LENGTH, TEMPLATES


def read_annotation(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The type that an annotation of our own glue stands for."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.Tuple(elts=parts):
            return tuple(read_annotation(part, names) for part in parts)
        case ast.Subscript(value=kind, slice=arguments):
            return read_annotation(kind, names)[read_annotation(arguments, names)]
        case ast.BinOp(left=left, op=sign, right=right):
            signs = {ast.Pow: pow, ast.Sub: operator.sub, ast.BitOr: operator.or_}
            sides = (read_annotation(side, names) for side in (left, right))
            return signs[type(sign)](*sides)
    raise TypeError(f"no annotation: {ast.unparse(node)}")


def put_defaults(glue: str, defaults: Mapping[str, str]) -> str:
    """The settings with other defaults, converted and checked as the script does.

    Raises:
        RequestError: unknown settings, and values that they cannot have.
    """
    path = TEMPLATES / "config.py"  # imports the standard library alone
    spec = importlib.util.spec_from_file_location("_config_template", path)
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    types: dict[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str)}
    types |= {"Annotated": Annotated, "Literal": Literal}
    settings: dict[str, ast.AnnAssign] = {}
    for node in ast.parse(glue).body:
        if isinstance(node, ast.Assign):  # Count = Annotated[...]
            types[node.targets[0].id] = read_annotation(node.value, types)
        elif isinstance(node, ast.ClassDef):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            settings = {item.target.id: item for item in fields}
    lines, problems = glue.splitlines(), []
    for name, text in defaults.items():
        if name not in settings:
            known = f"with these sections there are {', '.join(settings)}"
            problems.append(suggest(name, list(settings), "setting", known))
            continue
        node = settings[name]
        try:
            kind = read_annotation(node.annotation, types)
            value = tools.convert_setting(text, kind)
            if isinstance(value, str) and set(value) & set('"\\\n'):
                raise ValueError("no quotes, backslashes or line ends")
        except ValueError as error:
            problems.append(f"--set {name}={text}: expected {error}")
            continue
        row, old = node.value.lineno - 1, node.value
        source = json.dumps(value) if isinstance(value, str) else repr(value)
        line = lines[row]
        line = line[: old.col_offset] + source + line[old.end_col_offset :]
        if len(line) > LINE_LENGTH:
            reason = "too long for a default: pass it to the script"
            problems.append(f"--set {name}={text}: {reason}")
        lines[row] = line
    if problems:
        raise RequestError(problems)
    return "\n".join(lines) + "\n"
