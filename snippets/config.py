"""Use when settings come from a YAML file and the command line.

Not when a framework of the project already does this: two sources are worse than one.
"""

import argparse
import dataclasses
import sys
from pathlib import Path


@dataclasses.dataclass
class Config:
    learning_rate: float = 3e-4
    batch_size: int = 32
    amp: bool = True
    out_dir: str = "runs"


def convert(name: str, kind: type, value: object) -> object:
    """YAML reads 2e-5 as a string, and 10 where a float is wanted as an int."""
    if kind is bool and isinstance(value, str):  # bool("false") is True
        value = {"true": True, "false": False}.get(value.lower(), value)
    if kind is float and type(value) in (int, str):
        value = float(value)
    if kind is int and isinstance(value, str):
        value = int(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r}: {kind.__name__} wanted")
    return value


def read_config(words: list[str]) -> Config:
    """Defaults, under --config FILE, under what the command line says."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Config)}
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path)
    for name in kinds:
        parser.add_argument("--" + name.replace("_", "-"))
    given = vars(parser.parse_args(words))
    if path := given.pop("config", None):
        import yaml  # pip install pyyaml

        given = {**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}), **given}
    if unknown := sorted(given.keys() - kinds.keys()):
        raise ValueError(f"{path}: no such setting: {', '.join(unknown)}")
    return Config(**{k: convert(k, kinds[k], value) for k, value in given.items()})


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.yaml")
        text = "learning_rate: 2e-5\nbatch_size: 64\namp: no\n"
        file.write_text(text, encoding="utf-8")
        config = read_config(["--config", str(file), "--batch-size", "8"])
        assert config == Config(learning_rate=2e-5, batch_size=8, amp=False)
        assert read_config(["--amp", "false"]).amp is False
        for bad in ("batch_sise: 8\n", "batch_size: 8.5\n", "amp: maybe\n"):
            file.write_text(bad, encoding="utf-8")
            try:
                read_config(["--config", str(file)])
            except ValueError as error:
                assert bad.partition(":")[0] in str(error)
            else:
                sys.exit(f"accepted: {bad}")
