"""Section 16, hyperparameters: one typed dataclass, from a file and the command line.

The command line goes over the file, the file over the defaults; an unknown key or a
value of the wrong type is an error that names it.

    config = TrainingConfig.load("run.yaml")
    config = parse_config(TrainingConfig)  # --config run.yaml --batch-size 64
"""

import argparse
import contextlib
import difflib
import inspect
import json
import math
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
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
        """Write every field to a YAML or .json file that `load` reads back."""
        if Path(path).suffix == ".json":
            write_settings(Path(path), asdict(self))
        else:
            yaml = _import_yaml()
            text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
            Path(path).write_text(text, encoding="utf-8")

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
    load, parse_errors = json.loads, (ValueError,)
    if Path(path).suffix != ".json":
        yaml = _import_yaml()
        load, parse_errors = yaml.safe_load, (ValueError, yaml.YAMLError)
    try:
        values = load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}): check --config"
        ) from None
    except parse_errors as error:
        reason = " ".join(str(error).split())  # PyYAML's goes over several lines
        raise ConfigError(f"{path}: cannot be parsed ({reason}): mend it") from None
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}: write one `name: value` a line"
        )
    return values


def _read_number(value: Any) -> int | float:
    """A number, also one that is spelled as a string: YAML reads `2e-5` as one."""
    try:
        return int(str(value))
    except ValueError:
        return float(str(value))


def convert_setting(value: Any, wanted: Any) -> Any:
    """`value` as the annotated type `wanted`; a string may spell a number or true.

    Understands bool, int, float, str, Literal, `T | None`, and bounds on a number:
    `Annotated[int, (1, None)]` is at least 1.

    Raises:
        ValueError: its message is what was expected.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        wanted, (low, high) = arguments
        value = convert_setting(value, wanted)
        if None not in (value, low) and value < low:
            raise ValueError(f"at least {low}")
        if None not in (value, high) and value > high:
            raise ValueError(f"at most {high}")
        return value
    if origin in (Union, types.UnionType):
        if str(value).lower() in ("none", "null"):
            return None
        (wanted,) = (kind for kind in arguments if kind is not types.NoneType)
        return convert_setting(value, wanted)
    if origin is Literal:
        choices = {str(choice): choice for choice in arguments}
        if str(value) not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return choices[str(value)]
    if wanted is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if wanted in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            number = _read_number(value)
            if math.isfinite(number) and (wanted is float or number == int(number)):
                return wanted(number)
    if wanted is str and isinstance(value, str):
        return value
    expected = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text (in quotes)",
    }
    raise ValueError(expected.get(wanted, f"a field of another type than {wanted}"))


def _close_match(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {matches[0]}?" if matches else ""


def build_config(
    config_class: type[ConfigT],
    values: Mapping[str, Any],
    source: str,
    problems: Iterable[str] = (),
) -> ConfigT:
    """An instance of a dataclass from a mapping, every value converted and checked.

    Args:
        source: where the values came from, for the message: a file, `command line`.
        problems: what was found before, for the same message.

    Raises:
        ConfigError: unknown keys, wrong types, missing values; all in one message.
    """
    known = {field.name: field for field in fields(config_class)}
    wanted = get_type_hints(config_class, include_extras=True)
    converted: dict[str, Any] = {}
    problems = list(problems)
    for name, value in values.items():
        if name not in known:
            near = _close_match(str(name), known)
            problems.append(f"unknown setting {name!r}{near}")
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
    found = (re.match(r"\s+(\w+): .*?\s#\s*(.+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


class ConfigArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


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
    flags = {f.name: "--" + f.name.replace("_", "-") for f in fields(config_class)}
    for field in fields(config_class):
        text = comments.get(field.name, "")
        if field.default is not MISSING:
            text += f" (default: {field.default})"
        details: dict[str, Any] = {"help": text.replace("%", "%%")}
        if wanted[field.name] is bool:
            details["action"] = argparse.BooleanOptionalAction
        elif get_origin(wanted[field.name]) is Literal:
            choices = ",".join(map(str, get_args(wanted[field.name])))
            details["metavar"] = f"{{{choices}}}"
        parser.add_argument(flags[field.name], **details)
    given, unknown = parser.parse_known_args(argv)
    options = vars(given)
    path = options.pop("config", None)
    names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    return build_config(
        config_class,
        {**(read_config_file(path) if path else {}), **options},
        source=f"{path}, command line" if path else "command line",
        problems=[
            f"unknown option {name}{_close_match(name, flags.values())} (see --help)"
            for name in names or unknown
        ],
    )


def start_run(config: Any, out_dir: str) -> Path:
    """A new folder for a run, with its settings in config.json.

    Nothing is overwritten: where `out_dir` holds a run already, `out_dir-2` is taken.
    """
    folder, number = Path(out_dir), 1
    while (folder / "config.json").exists():
        number += 1
        folder = Path(f"{Path(out_dir)}-{number}")  # "run/" would be "run/-2"
    write_settings(folder / "config.json", asdict(config))
    return folder


def continue_run(
    config: Any,
    out_dir: str,
    facts: Mapping[str, Any] | None = None,
    may_change: Collection[str] = ("out_dir", "save_every", "num_workers", "cpu"),
) -> Path:
    """The folder of a run that is started or goes on, with its settings in config.json.

    Args:
        config: a dataclass.
        facts: what else has to be as it was, such as the number of samples; kept in
            facts.json. If "machine" (device, precision, version) differs, a line says
            that the result may no longer be the same to the bit.
        may_change: settings that do not alter the result of a run.

    Raises:
        ConfigError: another setting or fact differs from what the run began with.
    """
    folder = Path(out_dir)
    kept = {"config.json": asdict(config), "facts.json": facts or {}}
    changed = []
    for name, values in kept.items():
        if not (folder / name).exists():
            continue
        began = read_config_file(str(folder / name))
        if "machine" in values and began.get("machine") != values["machine"]:
            print(
                f"warning: this run was on {began.get('machine')}; here its result may "
                "differ in the last digits"
            )
        changed += [
            f"{key} was {began.get(key)!r} and is {value!r}"
            for key, value in values.items()
            if key not in {*may_change, "machine"} and began.get(key) != value
        ]
    if changed:
        raise ConfigError(
            f"{out_dir} holds a run with other settings ({'; '.join(changed)}):"
            " put them back, or start another run with --out-dir"
        )
    for name, values in kept.items():
        write_settings(folder / name, values)
    return folder


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Settings as JSON, which `--config` reads; nothing where they stand there."""
    temporary = path.with_suffix(".tmp")
    text = json.dumps(values, indent=2) + "\n"
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}): choose another folder"
        ) from error
