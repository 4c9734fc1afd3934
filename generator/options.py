"""What can be asked for: tasks and sections, and the check of a request."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True)
class Task:
    """A kind of training script, with real data built in."""

    name: str
    subject: str  # "Train ..."
    builtin: str  # the data it has without --data
    own_data: str  # what --data takes
    example: str  # the options of a run on one's own data
    edit: str  # the functions that a user makes his own
    legend: str  # of the shape suffixes
    packages: tuple[str, ...]  # to install, for the built-in data
    own_packages: tuple[str, ...]  # and for --data
    epochs: int
    batch_size: int
    learning_rate: float


TASKS = {
    task.name: task
    for task in (
        Task(
            name="text",
            subject="a text classifier",
            builtin="docstrings of the standard library, by package",
            own_data="a CSV, JSONL or Parquet file",
            example="--data reviews.csv --text-column review --label-column stars",
            edit="build_model, build_datasets, collate and compute_loss",
            legend="T tokens, D width, C classes",
            packages=("torch",),
            own_packages=("torch", "pyarrow"),
            epochs=4,
            batch_size=32,
            learning_rate=1e-3,
        ),
        Task(
            name="image",
            subject="an image classifier",
            builtin="scikit-learn's handwritten digits, written out as PNG",
            own_data="a folder with one folder of images a class",
            example="--data photos --image-size 128",
            edit="build_model, build_datasets and compute_loss",
            legend="C channels or classes, H height, W width, D features",
            packages=("torch", "pillow", "scikit-learn"),
            own_packages=("torch", "pillow"),
            epochs=10,
            batch_size=32,
            learning_rate=2e-3,
        ),
    )
}


@dataclass(frozen=True)
class Section:
    """One thing that a script can do, and the flag that asks for it."""

    name: str
    summary: str
    guide: str  # sections of the guide
    choices: tuple[str, ...] = ()
    number: type | None = None  # of the flag's value, where it is a number
    bounds: tuple[float, float] = (0, float("inf"))
    default: Any = True  # the value of the bare flag; None: it needs one
    writes: tuple[str, str] = ("", "")  # a further file: beside train.py, STEM.py

    @property
    def flag(self) -> str:
        """As typed on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def takes_value(self) -> bool:
        """Whether `--flag VALUE` is possible."""
        return bool(self.choices or self.number)

    @property
    def usage(self) -> str:
        """The flag with its possible values."""
        value = "{" + ",".join(self.choices) + "}" if self.choices else "N"
        if not self.takes_value:
            return self.flag
        return (
            f"{self.flag} {value}" if self.default is None else f"{self.flag}[={value}]"
        )

    def convert(self, text: str | None) -> Any:
        """The value of the flag from its text, None for the bare flag.

        Raises:
            ValueError: the text is no possible value; says which are.
        """
        if text is None:
            return self.default
        if self.choices and text in self.choices:
            return text
        if self.choices:
            raise ValueError(f"{self.flag}={text}: choose {' or '.join(self.choices)}")
        low, high = self.bounds
        kind = "whole number" if self.number is int else "number"
        expected = f"{self.flag}={text}: give a {kind} from {low:g} to {high:g}"
        try:
            value = self.number(text)
        except ValueError:
            raise ValueError(expected) from None
        if not low <= value <= high:
            raise ValueError(expected)
        return value


SECTIONS = {
    section.name: section
    for section in (
        Section(
            "amp", "mixed precision: bf16, else fp16 with a scaler, else fp32", "3"
        ),
        Section(
            "checkpointing",
            "recompute activations in the backward pass to save memory",
            "4",
            choices=("full", "selective"),
            default="full",
        ),
        Section("compile", "torch.compile, falling back to eager if it fails", "5"),
        Section(
            "accumulate",
            "cut each batch into N micro-batches, with the same gradients",
            "3, 6",
            number=int,
            bounds=(2, 1024),
            default=None,
        ),
        Section(
            "clip",
            "clip the gradient norm to N (1.0)",
            "11",
            number=float,
            bounds=(1e-6, 1e6),
            default=1.0,
        ),
        Section(
            "scheduler",
            "warm up the learning rate, then let it fall to 0",
            "9",
            choices=("cosine", "linear"),
            default=None,
        ),
        Section(
            "ema",
            "evaluate and save averaged weights, with decay N (0.999)",
            "12",
            number=float,
            bounds=(1e-6, 0.999999),
            default=0.999,
        ),
        Section(
            "early_stopping",
            "stop after N epochs (3) without a better validation loss",
            "10",
            number=int,
            bounds=(1, 1_000_000),
            default=3,
        ),
        Section(
            "oom_recovery", "out of memory halves the micro-batch, not the batch", "6"
        ),
        Section("resume", "run again to go on exactly where a killed run stood", "7"),
        Section(
            "deterministic", "deterministic kernels wherever PyTorch has them", "8"
        ),
        Section(
            "predict",
            "predict.py beside it: labels for new data, int8, export of the weights",
            "14",
            writes=("predict.py", "{stem}_predict.py"),
        ),
        Section(
            "slurm",
            "train.sbatch beside it: a Slurm job that is requeued and goes on exactly",
            "7, 15",
            writes=("train.sbatch", "{stem}.sbatch"),
        ),
    )
}


@dataclass(frozen=True)
class Request:
    """A checked request for a script."""

    task: Task
    sections: Mapping[str, Any] = field(default_factory=dict)  # only what is asked for
    output: str = "train.py"
    split: bool = False

    @property
    def stem(self) -> str:
        """The name of the script as a module."""
        return "train" if self.output == "-" else PurePath(self.output).stem

    @property
    def further_files(self) -> dict[str, str]:
        """The sections that write a file beside the script, and the file's name."""
        return {
            name: section.writes[self.stem != "train"].format(stem=self.stem)
            for name, section in SECTIONS.items()
            if section.writes[0] and name in self.sections
        }

    @property
    def command(self) -> list[str]:
        """The command that makes this script, in its shortest canonical form."""
        words = ["generate-script", "--task", self.task.name]
        for name, section in SECTIONS.items():
            value = self.sections.get(name)
            if value is True:
                words.append(section.flag)
            elif value is not None:
                words.append(f"{section.flag}={value}")
        return [*words, *["--split"][: self.split], "-o", self.output]


@dataclass(frozen=True)
class Conflict:
    """Two options that cannot go together, and what to do about it."""

    first: str
    second: str
    fix: str

    def __str__(self) -> str:
        return f"{self.first} does not go with {self.second}: {self.fix}"


CONFLICTS = (
    Conflict("--split", "-o -", "it writes two files, so name the first with -o FILE"),
    *(
        Conflict(section.flag, "-o -", "it writes a file beside it: name it with -o")
        for section in SECTIONS.values()
        if section.writes[0]
    ),
    Conflict("--force", "-o -", "leave --force out, nothing is overwritten"),
    *(
        Conflict("--extract", flag, f"leave {flag} out, only the names count")
        for flag in (
            "--task",
            "--split",
            "--json",
            *(item.flag for item in SECTIONS.values()),
        )
    ),
    *(
        Conflict("--list", flag, "leave one of them out")
        for flag in ("--extract", "--task", "--split", "--force", "-o")
    ),
)


# (section, the section that it needs, why)
NEEDS = (("slurm", "resume", "a requeued job would begin at the first step again"),)


def find_conflicts(given: set[str]) -> list[str]:
    """What is wrong with the combination of the flags that were given."""
    return [
        str(item) for item in CONFLICTS if item.first in given and item.second in given
    ]


def find_lacking(sections: Mapping[str, Any]) -> list[str]:
    """What is wrong with the sections that were asked for, for want of another."""
    return [
        f"--{first} needs --{second} ({reason}): add --{second}"
        for first, second, reason in NEEDS
        if first in sections and second not in sections
    ]


def check_request(
    task: str, sections: Mapping[str, str | None], output: str, split: bool
) -> tuple[Request | None, list[str]]:
    """A request from the words of a command line, or everything that is wrong with it.

    Args:
        sections: name of a section -> the text of its value, None for the bare flag.
    """
    problems = []
    values = {}
    if task not in TASKS:
        problems.append(f"--task {task}: choose {' or '.join(TASKS)}")
    for name, text in sections.items():
        try:
            values[name] = SECTIONS[name].convert(text)
        except ValueError as error:
            problems.append(str(error))
    problems += find_lacking(sections)
    stem = PurePath(output).stem
    if stem in {*sys.stdlib_module_names, "torch"}:
        problems.append(f"-o {output}: would hide Python's {stem}: choose another name")
    if any(character in output for character in '"\\\n'):
        problems.append(f"-o {output!r}: leave out quotes, backslashes, line ends")
    importers = ["--split"] if split else []
    importers += [f"--{name}" for name in ("predict", "tests") if name in sections]
    if importers and output != "-" and not stem.isidentifier():
        problems.append(
            f"{' '.join(importers)} -o {output}: one file imports another by that name:"
            " use letters, digits and _, such as -o train.py"
        )
    if problems:
        return None, problems
    return Request(TASKS[task], values, output, split), []


def suggest(unknown: str, known: Sequence[str], kind: str = "option") -> str:
    """The complaint about an unknown word, with the nearest known one."""
    match = difflib.get_close_matches(unknown.partition("=")[0], known, n=1)
    hint = f"did you mean {match[0]}?" if match else "--list shows what there is"
    return f"unknown {kind} {unknown}: {hint}"
