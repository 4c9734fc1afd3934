"""Stitching: from the names that a script uses to one script with their definitions.

Rendered glue is Python whose free names are the roots. From each of them `symtable`
gives the names that its definition needs in turn: functions, classes, constants and
imports of the same template. What is reached is emitted as verbatim slices of the
templates, comments included, with just the imports that are used. There is no table
of dependencies to keep.
"""

import ast
import builtins
import re
import symtable
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

GLUE = Path(__file__).resolve().parent / "glue"
TEMPLATES = GLUE.parent.parent / "templates"

# The order of the tools in a script.
MODULE_ORDER = (
    "config",
    "device_manager",
    "builtin_models",
    "builtin_data",
    "language_data",
    "pretrained",
    "contrastive",
    "data_optimizer",
    "training_utils",
    "optimizers",
    "error_handlers",
    "checkpoint_io",
    "distributed",
    "inference",
    "profiling",
    "loggers",
    "script_checks",
)

LINE_LENGTH = 88
ALWAYS_THERE = {*dir(builtins), "__name__", "__file__", "__doc__", "__class__"}


class StitchError(Exception):
    """Glue or templates that do not fit together: our mistake, never the user's."""


@dataclass(frozen=True)
class Import:
    """One imported name: `import module [as alias]`, `from module import name`."""

    module: str
    name: str = ""
    alias: str = ""

    @property
    def bound_name(self) -> str:
        """The name under which the code uses it."""
        return self.alias or self.name or self.module.partition(".")[0]


@dataclass(frozen=True)
class Definition:
    """One top-level statement that binds names, and its source with comments above."""

    names: tuple[str, ...]
    source: str
    is_block: bool  # a function or class: two blank lines around it

    @cached_property
    def free_names(self) -> set[str]:
        """What it takes from its module or from Python's builtins."""
        return find_free_names(self.source)


@dataclass(frozen=True)
class Module:
    """A Python source taken apart."""

    name: str
    imports: Mapping[str, Import]  # by bound name
    definitions: Sequence[Definition]
    body: str  # the source without docstring and imports

    @cached_property
    def by_name(self) -> dict[str, Definition]:
        """The definition of each top-level name."""
        return {name: item for item in self.definitions for name in item.names}


DOCSTRING = re.compile(r'\s*(?:r?"""(?:.|\n)*?"""\n)?')
BLOCK_NAME = re.compile(r"^(?:async def|def|class) (\w+)", re.MULTILINE)
CONTINUED = (" ", "\t", ")", "]", "}", "except", "else", "elif", "finally")


def split_statements(source: str, start: int) -> list[tuple[str, int]]:
    """The top-level statements of formatted code, each with the comments above it.

    By the beginning of each line: a statement starts at the left edge, and what
    continues it does not. A tenth of the time that `ast.parse` takes.

    Returns:
        Text and end of each statement, in `source` from position `start` on.
    """
    statements: list[tuple[str, int]] = []
    comments = blanks = ""
    decorated = False
    for line in source[start:].splitlines(keepends=True):
        start += len(line)
        if line.startswith("#"):
            comments += line
        elif line == "\n":
            comments = ""
            blanks += line
        elif line.startswith(CONTINUED) or decorated:
            decorated = decorated and not BLOCK_NAME.match(line)
            statements[-1] = (statements[-1][0] + blanks + line, start)
            blanks = ""
        else:
            decorated = line.startswith("@")
            statements.append((comments + line, start))
            comments = blanks = ""
    return statements


def parse_module(name: str, source: str) -> Module:
    """Take a template or rendered glue apart; the imports must come first."""
    imports: dict[str, Import] = {}
    definitions: list[Definition] = []
    body_start = DOCSTRING.match(source).end()
    for statement, end in split_statements(source, body_start):
        if statement.startswith(("import ", "from ")):
            if definitions:
                line = source.count("\n", 0, end)
                raise StitchError(f"{name}, line {line}: imports come first")
            (node,) = ast.parse(statement).body
            imports.update((item.bound_name, item) for item in read_import(node))
            body_start = end
        elif match := BLOCK_NAME.search(statement):
            definitions.append(Definition((match[1],), statement, is_block=True))
        else:
            names = tuple(bound_names(ast.parse(statement).body[0]))
            definitions.append(Definition(names, statement, is_block=False))
    return Module(name, imports, definitions, source[body_start:].strip("\n") + "\n")


def decorators_of(node: ast.stmt) -> list[ast.expr]:
    """The decorators of a function or class, which stand above its first line."""
    return getattr(node, "decorator_list", [])


def read_import(node: ast.Import | ast.ImportFrom) -> list[Import]:
    """The names of one import statement."""
    if isinstance(node, ast.Import):
        return [Import(item.name, alias=item.asname or "") for item in node.names]
    module = "." * node.level + (node.module or "")
    return [Import(module, item.name, item.asname or "") for item in node.names]


def bound_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement binds, those of a guarded import as well."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    names = []
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.append(child.id)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            names += [item.bound_name for item in read_import(child)]
    return names


def find_free_names(source: str) -> set[str]:
    """The names that `source` uses and does not bind at its top level."""
    top = symtable.symtable(source, "<source>", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned()}
    bound |= {s.get_name() for s in top.get_symbols() if s.is_imported()}
    used = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    tables = list(top.get_children())
    while tables:
        table = tables.pop()
        used |= {s.get_name() for s in table.get_symbols() if s.is_global()}
        tables += table.get_children()
    if sys.version_info >= (3, 14):
        used |= annotation_names(ast.parse(source))
    return used - bound


def annotation_names(tree: ast.AST) -> set[str]:
    """Names in annotations, which Python 3.14 keeps in scopes of their own."""
    annotations = []
    for node in ast.walk(tree):
        annotations.append(getattr(node, "annotation", None))
        annotations.append(getattr(node, "returns", None))
    return {
        name.id
        for annotation in annotations
        if isinstance(annotation, ast.AST)
        for name in ast.walk(annotation)
        if isinstance(name, ast.Name)
    }


def find_import_time_names(source: str) -> set[str]:
    """The names needed while `source` itself is being run: bases, defaults, decorators.

    The tools stand behind the glue in a script, so they may only be named in functions.
    """
    tree = ast.parse(source)
    needed: set[str] = set()
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += [*decorators_of(node), node.args]  # type: ignore[arg-type]
            nodes += [returns] if (returns := getattr(node, "returns", None)) else []
            continue
        if isinstance(node, ast.Name):
            needed.add(node.id)
        nodes += ast.iter_child_nodes(node)
    return needed


class Library:
    """The templates, as one flat namespace."""

    def __init__(self, modules: Iterable[Module]) -> None:
        self.modules = list(modules)
        self.owners: dict[str, Module] = {}
        for module in self.modules:
            for name in module.by_name:
                if name in self.owners:
                    raise StitchError(
                        f"{name} is defined in {self.owners[name].name} and in"
                        f" {module.name}: rename one"
                    )
                self.owners[name] = module

    @classmethod
    @cache
    def load(cls, folder: Path = TEMPLATES) -> "Library":
        """The templates of this bundle."""
        paths = (folder / f"{name}.py" for name in MODULE_ORDER)
        return cls(
            parse_module(path.stem, path.read_text(encoding="utf-8"))
            for path in paths
            if path.exists()
        )

    def close_over(
        self, roots: Iterable[str], there: Mapping[str, str] | None = None
    ) -> tuple[set[str], list[Import]]:
        """Every template name that `roots` need, and the imports needed for them.

        Args:
            there: name -> a module beside this file that has it: imported from there,
                and followed no further.
        """
        there = there or {}
        reached: set[str] = set()
        imports: set[Import] = set()
        queue = sorted(roots)
        while queue:
            name = queue.pop()
            if name in reached:
                continue
            if name in there:
                imports.add(Import(there[name], name))
                continue
            module = self.owners[name]
            definition = module.by_name[name]
            reached.update(definition.names)
            for free in definition.free_names - ALWAYS_THERE:
                if free in module.by_name:
                    queue.append(free)
                elif free in module.imports:
                    imports.add(module.imports[free])
                else:
                    raise StitchError(
                        f"{module.name}.py: {name} uses {free}, defined nowhere"
                    )
        return reached, merge_imports(imports)

    def emit(self, names: set[str]) -> str:
        """The definitions of `names`, verbatim, under one header line a template."""
        sections = []
        for module in self.modules:
            chosen = [d for d in module.definitions if names.intersection(d.names)]
            if chosen:
                title = f"# --- templates/{module.name}.py "
                header = title.ljust(LINE_LENGTH, "-") + "\n"
                sections.append(join_statements([header, *chosen]))
        return "\n\n".join(sections)


def join_statements(items: Sequence[str | Definition]) -> str:
    """Statements with two blank lines around functions and classes, one elsewhere."""
    text = ""
    after_block = False
    for item in items:
        source = item if isinstance(item, str) else item.source
        is_block = isinstance(item, Definition) and item.is_block
        if text:
            text += "\n\n" if is_block or after_block else "\n"
        text += source
        after_block = is_block
    return text


def merge_imports(*groups: Iterable[Import]) -> list[Import]:
    """All of them once, by bound name; one name for two things is an error."""
    merged: dict[str, Import] = {}
    for group in groups:
        for item in group:
            if merged.setdefault(item.bound_name, item) != item:
                raise StitchError(
                    f"{item.bound_name} means both {merged[item.bound_name]} and {item}"
                )
    return list(merged.values())


def format_imports(imports: Iterable[Import], own_modules: Sequence[str] = ()) -> str:
    """Import statements in the order and shape that ruff's isort and formatter give.

    Args:
        own_modules: modules beside the script, which come last.
    """
    sections: dict[int, list[Import]] = {}
    for item in imports:
        root = item.module.partition(".")[0]
        rank = 2 if root in own_modules else int(root not in sys.stdlib_module_names)
        sections.setdefault(rank, []).append(item)
    return "\n".join(format_import_section(sections[rank]) for rank in sorted(sections))


def format_import_section(imports: Iterable[Import]) -> str:
    """`import x` first, then `from x import y`, each sorted by module."""
    plain: set[str] = set()
    members: dict[str, list[str]] = {}
    for item in imports:
        alias = f" as {item.alias}" if item.alias else ""
        if item.name:
            members.setdefault(item.module, []).append(item.name + alias)
        else:
            plain.add(f"import {item.module}{alias}\n")
    text = "".join(sorted(plain, key=str.lower))
    for module in sorted(members, key=str.lower):
        names = sorted(set(members[module]), key=isort_key)
        line = f"from {module} import {', '.join(names)}\n"
        if len(line) > LINE_LENGTH + 1:
            rows = "".join(f"    {name},\n" for name in names)
            line = f"from {module} import (\n{rows})\n"
        text += line
    return text


def isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, each without regard to case."""
    is_constant = name.isupper() and len(name) > 1
    rank = 0 if is_constant else 1 if name[:1].isupper() else 2
    return rank, name.lower()


@dataclass(frozen=True)
class Script:
    """A stitched script; `tools` is "" unless they are in a file of their own."""

    text: str
    tools: str = ""
    own_names: frozenset[str] = frozenset()  # that its glue defines
    tool_names: frozenset[str] = frozenset()  # of the templates that it carries
    further: Mapping[str, str] = field(default_factory=dict)  # file name -> its text

    def homes(self, module: str, tools_module: str = "") -> dict[str, str]:
        """Where a file beside it finds each name: name -> module to import it from."""
        homes = dict.fromkeys(self.tool_names, tools_module or module)
        return homes | dict.fromkeys(self.own_names, module)


def stitch_script(
    header: str,
    glue: Mapping[str, str],
    guard: str,
    library: Library,
    tools_module: str = "",
    notice: str = "",
) -> Script:
    """One script from rendered glue and the templates that it uses.

    Args:
        header: the module docstring, without imports.
        glue: name of the glue file -> its rendered source, in reading order.
        guard: what the script runs when it is started; comes last.
        tools_module: put the tools into a module of this name, to be imported.
        notice: what that module says of its origin.

    Raises:
        StitchError: a name that nobody defines, with the glue line that uses it.
    """
    body, own_names, imports, roots = read_glue(glue, guard, library, {})
    names, tool_imports = library.close_over(roots)
    tools = library.emit(names)
    if not tools_module:
        imports = merge_imports(imports, tool_imports)
        text = join_parts(start_file(header, imports) + body, tools, guard)
        return Script(text, "", frozenset(own_names), frozenset(names))
    imports = merge_imports(imports, (Import(tools_module, name) for name in roots))
    start = start_file(header, imports, own_modules=[tools_module])
    title = f'"""Tools of the script that imports them.\n\n{notice}\n"""'
    return Script(
        join_parts(start + body, guard),
        join_parts(start_file(title, tool_imports) + tools),
        frozenset(own_names),
        frozenset(names),
    )


def stitch_companion(
    header: str,
    glue: Mapping[str, str],
    guard: str,
    library: Library,
    there: Mapping[str, str],
) -> str:
    """One file beside a script, which imports all that the script has.

    Only those tools come along that the script lacks. So there is one copy of each, and
    what its user edits in the script counts in this file as well.

    Args:
        there: name -> module beside this file that has it, see `Script.homes`.

    Raises:
        StitchError: as `stitch_script`.
    """
    body, _, imports, roots = read_glue(glue, guard, library, there)
    names, tool_imports = library.close_over(roots, there)
    imports = merge_imports(imports, tool_imports)
    start = start_file(header, imports, own_modules=sorted({*there.values()}))
    parts = (start + body, library.emit(names), guard)
    return join_parts(*(part for part in parts if part))


def read_glue(
    glue: Mapping[str, str],
    guard: str,
    library: Library,
    there: Mapping[str, str],
) -> tuple[str, set[str], list[Import], set[str]]:
    """Body, own names and imports of rendered glue, and the names that it lacks.

    Args:
        there: name -> module beside the file that has it, of which one is lacked too.

    Raises:
        StitchError: see `stitch_script`.
    """
    parts = [parse_module(name, source) for name, source in glue.items()]
    body = "\n\n".join(part.body for part in parts)
    own_names = {name for part in parts for name in part.by_name}
    if clash := own_names & library.owners.keys():
        raise StitchError(f"{min(clash)} is defined in the glue and in a template")

    used = find_free_names(body + guard) - own_names
    imports = [part.imports[name] for part in parts for name in used & {*part.imports}]
    imported = {item.bound_name for item in imports}
    roots = used & (library.owners.keys() | there.keys()) - imported
    if unknown := used - ALWAYS_THERE - roots - imported:
        raise StitchError(locate_name(min(unknown), glue))
    if too_early := roots & find_import_time_names(body) - there.keys():
        raise StitchError(f"{min(too_early)} is needed before the tools are defined")
    return body, own_names, imports, roots


def stitch_definitions(names: Iterable[str], header: str, library: Library) -> str:
    """The named definitions, with what they need and nothing else."""
    reached, imports = library.close_over(names)
    return join_parts(start_file(header, imports) + library.emit(reached))


def start_file(
    header: str, imports: Iterable[Import], own_modules: Sequence[str] = ()
) -> str:
    """Docstring and imports, with the blank lines that follow them."""
    parts = [header.strip("\n") + "\n", format_imports(imports, own_modules)]
    return "\n".join(part for part in parts if part) + "\n"


def join_parts(*parts: str) -> str:
    """Parts of a file, with two blank lines between them."""
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def locate_name(name: str, glue: Mapping[str, str]) -> str:
    """Where the glue uses a name that nobody defines."""
    for file, source in glue.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name) and node.id == name:
                line = source.splitlines()[node.lineno - 1].strip()
                return f"{file}: `{line}` uses {name}, which no template defines"
    return f"{name} is used by the glue and defined by no template"
