"""Section 16, hyperparameters: one typed dataclass, from a file and the command line.

The command line goes over the file, the file over the defaults; an unknown key or a
value of the wrong type is an error that names it.

    config = TrainingConfig.load("run.yaml")
    config = parse_config(TrainingConfig)  # --config run.yaml --batch-size 64
"""

import argparse
import difflib
import inspect
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and the remedy."""


@dataclass
class TrainingConfig:
    """The guide's hyperparameters; a dataclass of your own works the same way."""

    model_name: str = "bert-base-uncased"  # name or path of the model
    hidden_size: int = 768  # width of the model

    batch_size: int = 32  # samples per optimizer step
    learning_rate: float = 2e-5  # peak rate, reached after the warm-up
    num_epochs: int = 10  # passes over the training data
    warmup_ratio: float = 0.1  # share of all steps in which the rate rises
    weight_decay: float = 0.01  # AdamW's decoupled decay

    use_amp: bool = True  # mixed precision where the device runs it faster
    gradient_checkpointing: bool = False  # recompute activations to save memory
    max_grad_norm: float = 1.0  # clip the gradient norm to this; 0 turns it off

    seed: int = 42  # for every random number generator

    def save(self, path: str) -> None:
        """Write every field to a YAML file that `load` reads back."""
        Path(path).write_text(_import_yaml().safe_dump(asdict(self), sort_keys=False))

    @classmethod
    def load(cls, path: str) -> "TrainingConfig":
        """Read a YAML or JSON file; `2e-5` is a number, unknown keys are refused.

        Raises:
            ConfigError: unreadable file, unknown keys, values of the wrong type; all
                of them in one message.
        """
        return build_config(cls, read_config_file(path), source=str(path))


def _import_yaml() -> types.ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "YAML files need PyYAML: pip install pyyaml (or use a .json file)"
        ) from error
    return yaml


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file (which needs no PyYAML).

    Raises:
        ConfigError: the file is missing, cannot be parsed or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): check --config") from None
    if path.endswith(".json"):
        load, parse_error = json.loads, ValueError
    else:
        yaml = _import_yaml()
        load, parse_error = yaml.safe_load, yaml.YAMLError
    try:
        values = load(text)
    except parse_error as error:
        raise ConfigError(f"{path}: cannot be parsed: {error}") from None
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}: write one `name: value` a line"
        )
    return values


def _read_number(value: Any) -> int | float | None:
    """A finite number, also one spelled as a string (YAML reads `2e-5` as one)."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return _read_number(kind(value))
            except ValueError:
                continue
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def convert_setting(value: Any, wanted: Any) -> Any:
    """`value` as the annotated type `wanted`; a string may spell a number or true.

    Understands bool, int, float, str, Literal, `T | None`, and bounds on a number:
    `Annotated[int, (1, None)]` is at least 1.

    Raises:
        ValueError: its message is what was expected.
    """
    if get_origin(wanted) is Annotated:
        wanted, (low, high) = get_args(wanted)
        value = convert_setting(value, wanted)
        if low is not None and value < low:
            raise ValueError(f"at least {low}")
        if high is not None and value > high:
            raise ValueError(f"at most {high}")
        return value
    if get_origin(wanted) in (Union, types.UnionType):
        if value in (None, "none", "null"):
            return None
        (wanted,) = (kind for kind in get_args(wanted) if kind is not types.NoneType)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ValueError("one of " + ", ".join(map(str, get_args(wanted))))
        return value
    number = _read_number(value)
    if wanted is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if wanted is int and number is not None and number == int(number):
        return int(number)
    if wanted is float and number is not None:
        return float(number)
    if wanted is str and isinstance(value, str):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a finite number"}
    raise ValueError(expected.get(wanted, "a text (in quotes)"))


def _close_match(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {matches[0]}?" if matches else ""


def build_config(
    config_class: type[ConfigT], values: Mapping[str, Any], source: str
) -> ConfigT:
    """An instance of a dataclass from a mapping, every value converted and checked.

    Args:
        source: where the values came from, for the message: a file, `command line`.

    Raises:
        ConfigError: unknown keys, wrong types, missing values; all in one message.
    """
    known = {field.name: field for field in fields(config_class)}
    wanted = get_type_hints(config_class, include_extras=True)
    converted: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in known:
            problems.append(f"unknown setting {name!r}{_close_match(name, known)}")
            continue
        try:
            converted[name] = convert_setting(value, wanted[name])
        except ValueError as error:
            problems.append(
                f"{name} is {value!r} ({type(value).__name__}), expected {error}"
            )
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if required and name not in values:
            problems.append(f"{name} is missing and has no default")
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config_class(**converted)


def describe_fields(config_class: type) -> dict[str, str]:
    """The comment behind each field of a dataclass; {} where there is no source."""
    try:
        lines = inspect.getsource(config_class).splitlines()
    except (OSError, TypeError):
        return {}
    found = (re.match(r"\s+(\w+): [^#]*#\s*(.+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


class ConfigArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help shows every option)")


def parse_config(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> ConfigT:
    """A config dataclass from `--config FILE` and one option for each of its fields.

    The command line goes over the file, the file over the defaults; the comments behind
    the fields are the help text.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        ConfigError: unknown options (with the nearest known one), unreadable files,
            values of the wrong type.
    """
    parser = ConfigArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was really given is set
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with settings")
    wanted = get_type_hints(config_class, include_extras=True)
    comments = describe_fields(config_class)
    for field in fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        text = comments.get(field.name, "").replace("%", "%%")
        if field.default is not MISSING:
            text += f" (default: {field.default})".replace("%", "%%")
        if wanted[field.name] is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, help=text)
        else:
            choices = get_args(wanted[field.name])
            literal = get_origin(wanted[field.name]) is Literal
            metavar = "{" + ",".join(map(str, choices)) + "}" if literal else None
            parser.add_argument(flag, metavar=metavar, help=text)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + field.name.replace("_", "-") for field in fields(config_class)]
        raise ConfigError(
            f"unknown option {unknown[0]}{_close_match(unknown[0], flags)}"
            " (--help shows every option)"
        )
    options = vars(given)
    path = options.pop("config", None)
    # The file is checked by itself, so that the message says where a value is from.
    values = read_config_file(path) if path else {}
    if values:
        build_config(config_class, values, source=path)
    return build_config(config_class, {**values, **options}, source="command line")


def start_run(config: Any, out_dir: str) -> Path:
    """A new folder for a run, with its settings in config.json.

    Nothing is overwritten: where `out_dir` holds a run already, `out_dir-2` is taken.
    """
    folder, number = Path(out_dir), 1
    while (folder / "config.json").exists():
        number += 1
        folder = Path(f"{out_dir}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder / "config.json", config)
    return folder


def continue_run(config: Any, out_dir: str, may_change: Iterable[str]) -> Path:
    """The folder of a run that is started or goes on, with its settings in config.json.

    Args:
        config: a dataclass.
        may_change: settings that do not alter the result of a run.

    Raises:
        ConfigError: another setting differs from the one that the run began with.
    """
    path = Path(out_dir) / "config.json"
    if path.exists():
        began = read_config_file(str(path))
        changed = [
            f"{name} was {began.get(name)!r} and is {value!r}"
            for name, value in asdict(config).items()
            if name not in may_change and began.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"{out_dir} holds a run with other settings ({'; '.join(changed)}):"
                " put them back, or start another run with --out-dir"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_settings(path, config)
    return path.parent


def write_settings(path: Path, config: Any) -> None:
    """The fields of a dataclass as JSON, which `--config` reads."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
