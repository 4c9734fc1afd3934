"""What can be asked for: tasks and sections, and the check of a request."""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    settings: tuple[str, ...]  # fields of the config, in the order of build_datasets
    edit: str  # the functions that a user makes his own
    legend: str  # of the shape suffixes
    packages: tuple[str, ...]  # to install, for the built-in data
    own_packages: tuple[str, ...]  # and for --data
    epochs: int
    batch_size: int
    learning_rate: float
    unit: str = "samples"  # what a batch is counted in
    collate: str = "collate"  # makes a batch of samples; "": those of a stream are one
    measure: str = "count_right"  # gives metrics beside the loss, if any does
    score: str = ""  # the metric, better when higher, that may choose the best weights

    @property
    def setting_names(self) -> list[str]:
        """The names of its own settings."""
        return [setting.partition(":")[0] for setting in self.settings]


TASKS = {
    task.name: task
    for task in (
        Task(
            name="text",
            subject="a text classifier",
            builtin="docstrings of the standard library, by package",
            own_data="a CSV, JSONL or Parquet file",
            example="--data reviews.csv --text-column review --label-column stars",
            settings=(
                'data: str = ""  # CSV, JSONL or Parquet file; empty: docstrings',
                'text_column: str = "text"  # column to read',
                'label_column: str = "label"  # column to predict',
            ),
            edit="build_model, build_datasets, collate and compute_loss",
            legend="T tokens, D width, C classes",
            packages=("torch",),
            own_packages=("torch", "pyarrow"),
            epochs=4,
            batch_size=32,
            learning_rate=1e-3,
            score="val_accuracy",
        ),
        Task(
            name="image",
            subject="an image classifier",
            builtin="scikit-learn's handwritten digits, written out as PNG",
            own_data="a folder with one folder of images a class",
            example="--data photos --image-size 128",
            settings=(
                'data: str = ""  # folder of class folders; empty: built-in digits',
                "image_size: Count | None = None  # pixels of a side; none: see below",
            ),
            edit="build_model, build_datasets, augment and compute_loss",
            legend="C channels or classes, H height, W width, D features",
            packages=("torch", "pillow", "scikit-learn"),
            own_packages=("torch", "pillow"),
            epochs=10,
            batch_size=32,
            learning_rate=2e-3,
            collate="collate_images",
            score="val_accuracy",
        ),
        Task(
            name="lm",
            subject="a language model",
            builtin="source code of the standard library, as bytes",
            own_data="text files, a folder or glob of them, Parquet or JSONL",
            example="--data 'corpus/**/*.txt' --max-tokens 512",
            settings=(
                'data: str = ""  # text files, Parquet, JSONL; empty: Python\'s source',
                'text_column: str = "text"  # column to read from Parquet or JSONL',
                "max_tokens: Count = 128  # of a sample, what the model sees at once",
            ),
            edit="build_model, encode, build_datasets and compute_loss",
            legend="T tokens, D width, H heads, V vocabulary",
            packages=("torch",),
            own_packages=("torch",),
            epochs=1,
            batch_size=16,
            learning_rate=2e-3,
            unit="tokens",
            collate="collate_windows",
        ),
        Task(
            name="tabular",
            subject="a model of a table's rows",
            builtin="scikit-learn's handwritten digits as a table",
            own_data="a Parquet file, or a folder or glob of them",
            example="--data 'houses/*.parquet' --label-column price",
            settings=(
                'data: str = ""  # Parquet file, folder or glob; empty: digits',
                'label_column: str = "label"  # what to predict',
                (
                    'objective: Literal["auto", "classify", "regress"] = "auto"'
                    "  # by its type"
                ),
            ),
            edit="build_model, build_datasets and compute_loss",
            legend="F features, C classes, D width",
            packages=("torch", "pyarrow", "scikit-learn"),
            own_packages=("torch", "pyarrow"),
            epochs=10,
            batch_size=64,
            learning_rate=1e-3,
            collate="",
            measure="measure_table",
        ),
        Task(
            name="embedding",
            subject="text embeddings",
            builtin="docstrings of the standard library, by function",
            own_data="a CSV, JSONL or Parquet file of pairs",
            example="--data faq.csv --query-column question --document-column answer",
            settings=(
                'data: str = ""  # CSV, JSONL or Parquet file; empty: docstrings',
                'query_column: str = "query"  # column to search with',
                'document_column: str = "document"  # column to be found',
            ),
            edit="build_model, build_datasets, collate and compute_loss",
            legend="T tokens, D width",
            packages=("torch",),
            own_packages=("torch", "pyarrow"),
            epochs=3,
            batch_size=128,
            learning_rate=1e-3,
            measure="",
            score="val_recall_at_1",
        ),
    )
}


@dataclass(frozen=True)
class Section:
    """One thing that a script can do, and the flag that asks for it."""

    name: str
    summary: str
    phrase: str  # in the header of a script, {} for the value
    guide: str = "-"  # its sections there
    choices: tuple[str, ...] = ()
    usual: str = ""  # the choice that a script has without the flag
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
    def values(self) -> str:
        """Its possible values, as usage shows them."""
        return "{" + ",".join(self.choices) + "}" if self.choices else "N"

    @property
    def usage(self) -> str:
        """The flag with its possible values."""
        if not self.takes_value:
            return self.flag
        if self.default is None:
            return f"{self.flag} {self.values}"
        return f"{self.flag}[={self.values}]"

    @property
    def description(self) -> str:
        """What it does, with the sections of the guide."""
        return self.summary if self.guide == "-" else f"{self.summary} ({self.guide})"

    def spell(self, value: Any) -> str:
        """The flag with a value; bare for True and None."""
        return self.flag if value is True or value is None else f"{self.flag}={value}"

    def convert(self, text: str | None) -> Any:
        """The value of the flag from its text, None for the bare flag.

        Raises:
            ValueError: the text is no possible value; says which are.
        """
        if text is None and self.default is not None:
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
        except (TypeError, ValueError):
            raise ValueError(expected) from None
        if not low <= value <= high:
            raise ValueError(expected)
        return value


SECTIONS = {
    section.name: section
    for section in (
        Section(
            "amp",
            "mixed precision: bf16, else fp16 with a scaler, else fp32",
            "mixed precision",
            "3",
        ),
        Section(
            "fp8",
            "matrix products in fp8 where the GPU has it (needs torchao)",
            "fp8 matrix products",
        ),
        Section(
            "checkpointing",
            "recompute activations in the backward pass to save memory",
            "{} activation checkpointing",
            "4",
            choices=("full", "selective", "offload"),
            default="full",
        ),
        Section(
            "compile",
            "torch.compile, falling back to eager if it fails",
            "torch.compile",
            "5",
        ),
        Section(
            "accumulate",
            "cut each batch into N micro-batches, with the same gradients",
            "gradient accumulation",
            "3, 6",
            number=int,
            bounds=(2, 1024),
            default=None,
        ),
        Section(
            "optimizer",
            "what takes the steps (adamw without this flag)",
            "the {} optimizer",
            choices=("adamw", "muon", "sgd", "adafactor"),
            usual="adamw",
            default=None,
        ),
        Section(
            "clip",
            "clip the gradient norm to N (1.0)",
            "gradient clipping",
            "11",
            number=float,
            bounds=(1e-6, 1e6),
            default=1.0,
        ),
        Section(
            "skip_nonfinite",
            "skip a step whose gradients are NaN or infinite instead of stopping",
            "skipping of non-finite steps",
        ),
        Section(
            "scheduler",
            "warm up the learning rate, then let it fall",
            "a {} schedule with warm-up",
            "9",
            choices=("cosine", "linear", "wsd", "onecycle"),
            default=None,
        ),
        Section(
            "ema",
            "evaluate and save averaged weights, with decay N (0.999)",
            "averaged weights (EMA)",
            "12",
            number=float,
            bounds=(1e-6, 0.999999),
            default=0.999,
        ),
        Section(
            "early_stopping",
            "stop after N epochs (3) without a better validation loss",
            "early stopping",
            "10",
            number=int,
            bounds=(1, 1_000_000),
            default=3,
        ),
        Section(
            "oom_recovery",
            "out of memory halves the micro-batch, not the batch",
            "recovery from out of memory",
            "6",
        ),
        Section(
            "resume",
            "run again to go on exactly where a killed run stood",
            "exact resume",
            "7",
        ),
        Section(
            "deterministic",
            "deterministic kernels or an error; exact resume on GPUs needs them",
            "deterministic kernels",
            "8",
        ),
        Section(
            "distributed",
            "several GPUs or machines by torchrun: replicas, or shards (FSDP2)",
            "{} over several processes",
            "15",
            choices=("ddp", "fsdp"),
            default=None,
        ),
        Section(
            "stream",
            "read text from disk batch by batch, for more than memory holds",
            "data streamed from disk",
            "2",
        ),
        Section(
            "token_budget",
            "texts of like length in batches of at most N (2048) padded tokens",
            "batches of texts of like length",
            number=int,
            bounds=(1, 1_000_000_000),
            default=2048,
        ),
        Section(
            "profile",
            "trace a few steps; step times, memory and MFU at the end",
            "profiling",
            "13",
        ),
        Section(
            "logger",
            "where metrics go besides metrics.jsonl",
            "{} logging",
            choices=("jsonl", "tensorboard", "wandb", "trackio"),
            usual="jsonl",
            default=None,
        ),
        Section(
            "plot",
            "loss, rate, throughput and memory as a picture (needs matplotlib)",
            "a plot of the run",
        ),
        Section(
            "predict",
            "also write predict.py: inference, int8, export",
            "inference beside it",
            "14",
            writes=("predict.py", "{stem}_predict.py"),
        ),
        Section(
            "tests",
            "also write test_train.py, which tests the script as you edit it",
            "tests beside it",
            "17",
            writes=("test_train.py", "test_{stem}.py"),
        ),
        Section(
            "slurm",
            "also write train.sbatch: torchrun, requeued when preempted",
            "a Slurm job beside it",
            writes=("train.sbatch", "{stem}.sbatch"),
        ),
    )
}

RECOMMENDED = {
    "amp": None,
    "clip": None,
    "scheduler": "cosine",
    "resume": None,
    "tests": None,
}
ROBUST = RECOMMENDED | {
    "skip_nonfinite": None,
    "ema": None,
    "early_stopping": None,
    "oom_recovery": None,
}
PRESETS: dict[str, dict[str, str | None]] = {
    "minimal": {"amp": None},
    "recommended": RECOMMENDED,
    "robust": ROBUST,
    "max": ROBUST
    | {
        "checkpointing": "selective",
        "compile": None,
        "accumulate": "2",
        "distributed": "ddp",
        "profile": None,
        "logger": "tensorboard",
        "plot": None,
        "predict": None,
        "slurm": None,
    },
}


@dataclass(frozen=True)
class Model:
    """What a script trains: ours, a library's, or a class of the user's."""

    kind: str = "builtin"  # or hf, timm, module
    name: str = ""  # of a module: `module:Class`

    def __str__(self) -> str:
        """As typed on the command line."""
        return self.name if self.kind == "module" else f"{self.kind}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> "Model":
        """`hf:NAME`, `timm:NAME` or `module:Class`.

        Raises:
            ValueError: it is none of these.
        """
        kind, _, name = text.partition(":")
        if text in ("", "builtin"):
            return cls()
        if kind in ("hf", "timm") and name and not set(name) & set("\"'\\\n"):
            return cls(kind, name)
        if name.isidentifier() and all(map(str.isidentifier, kind.split("."))):
            return cls("module", text)
        raise ValueError(
            f"--model {text}: give hf:NAME, timm:NAME or module:Class (your own)"
        )


@dataclass(frozen=True)
class Request:
    """A checked request for a script."""

    task: Task
    sections: Mapping[str, Any] = field(default_factory=dict)  # only what is asked for
    output: str = "train.py"
    split: bool = False
    model: Model = Model()
    defaults: Mapping[str, str] = field(default_factory=dict)  # of settings

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
        if self.model.name:
            words.append(f"--model={self.model}")
        words += [
            section.spell(self.sections[name])
            for name, section in SECTIONS.items()
            if name in self.sections
        ]
        if self.defaults:
            words.append("--set")
            words += [f"{name}={value}" for name, value in self.defaults.items()]
        return [*words, *["--split"][: self.split], "-o", self.output]


BAD_REQUEST = 2  # exit code


class RequestError(Exception):
    """A request that cannot be met: an exit code and one line for each problem."""

    def __init__(self, problems: Sequence[str], exit_code: int = BAD_REQUEST) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Conflict:
    """Two options that cannot go together, and what to do about it."""

    first: str
    second: str
    fix: str
    third: str = ""  # only where this is asked for as well

    def __str__(self) -> str:
        both = f"{self.second} and {self.third}" if self.third else self.second
        return f"{self.first} does not go with {both}: {self.fix}"

    def applies(self, given: set[str]) -> bool:
        """Whether all of its flags were given."""
        return {self.first, self.second, self.third or self.second} <= given


NOT_A_SCRIPT = (
    "--task",
    "--model",
    "--split",
    "--preset",
    "--auto",
    "--set",
    "--from",
    "--save",
    *(item.flag for item in SECTIONS.values()),
)
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
        for flag in (*NOT_A_SCRIPT, "--json")
    ),
    *(
        Conflict("--list", flag, "leave one of them out")
        for flag in ("--extract", "--force", "-o", *NOT_A_SCRIPT)
    ),
    Conflict("--preset", "--auto", "leave one of them out, both choose sections"),
    Conflict(
        "--oom-recovery",
        "--distributed=fsdp",
        "a rank that fails inside FSDP's collectives cannot go back: use --distributed"
        "=ddp, or --checkpointing and --accumulate",
    ),
    Conflict(
        "--optimizer=adafactor",
        "--distributed=fsdp",
        "PyTorch's takes no sharded tensors: use adamw or muon",
    ),
    Conflict(
        "--oom-recovery",
        "--task=embedding",
        "ranks exchange vectors within a step, so none can go back alone: use"
        " --accumulate",
        third="--distributed",
    ),
    *(
        Conflict("--stream", f"--task={task}", "leave it out, it streams anyway")
        for task in ("image", "lm", "tabular")
    ),
    *(
        Conflict(
            "--token-budget", f"--task={task}", "leave it out, it is for --task text"
        )
        for task in ("image", "lm", "tabular", "embedding")
    ),
    Conflict("--token-budget", "--stream", "a stream has its own order: leave one out"),
    *(
        Conflict("--token-budget", flag, "lower the token budget instead")
        for flag in ("--accumulate", "--oom-recovery")
    ),
    *(
        Conflict("--model=timm", f"--task={task}", "timm has models for --task image")
        for task in ("text", "lm", "tabular", "embedding")
    ),
    Conflict("--model=hf", "--task=tabular", "use the built-in one or module:Class"),
)


@dataclass(frozen=True)
class Requirement:
    """An option that is of no use without another."""

    first: str
    needed: str
    reason: str

    def __str__(self) -> str:
        return f"{self.first} needs {self.needed}: {self.reason}"


REQUIREMENTS = (
    Requirement("--fp8", "--amp", "add it, the rest of the model runs in bf16"),
    Requirement("--slurm", "--resume", "add it, a job that is preempted goes on then"),
)


def find_conflicts(given: set[str]) -> list[str]:
    """What is wrong with the combination of the flags that were given."""
    return [str(item) for item in CONFLICTS if item.applies(given)]


def find_lacking(given: set[str]) -> list[str]:
    """Which flags are of no use without another that was not given."""
    return [
        str(item)
        for item in REQUIREMENTS
        if item.first in given and item.needed not in given
    ]


def flags_of(task: str, sections: Mapping[str, Any], model: Model) -> set[str]:
    """The flags of a request, alone and with their values, for find_conflicts."""
    flags = {f"--task={task}", f"--model={model.kind}"}
    for name, value in sections.items():
        flags |= {SECTIONS[name].flag, f"{SECTIONS[name].flag}={value}"}
    return flags


def preset_sections(preset: str, task: str) -> dict[str, str | None]:
    """The sections of a preset, without those that do not go with the task."""
    chosen = dict(PRESETS[preset])
    for item in CONFLICTS:
        if item.applies(flags_of(task, chosen, Model())):
            del chosen[item.first.partition("=")[0][2:].replace("-", "_")]
    return chosen


def check_request(
    task: str,
    sections: Mapping[str, str | None],
    output: str,
    split: bool,
    model: str = "",
    given: Iterable[str] = (),
    defaults: Mapping[str, str] | None = None,
) -> tuple[Request | None, list[str]]:
    """A request from the words of a command line, or everything that is wrong with it.

    Args:
        sections: name of a section -> the text of its value, None for the bare flag.
        given: further flags that were given, which may not go with these.
        defaults: other ones for the script's settings; checked when it is rendered.
    """
    problems = []
    values = {}
    parsed_model = Model()
    if task not in TASKS:
        problems.append(f"--task {task}: choose {' or '.join(TASKS)}")
    try:
        parsed_model = Model.parse(model)
    except ValueError as error:
        problems.append(str(error))
    for name, text in sections.items():
        try:
            values[name] = SECTIONS[name].convert(text)
        except ValueError as error:
            problems.append(str(error))
    values = {n: v for n, v in values.items() if v != (SECTIONS[n].usual or None)}
    flags = flags_of(task, values, parsed_model) | {f"-o {output}", *given}
    problems += find_conflicts(flags | ({"--split"} if split else set()))
    problems += find_lacking(flags)
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
    request = Request(TASKS[task], values, output, split, parsed_model, defaults or {})
    return request, []


def suggest(
    unknown: str,
    known: Sequence[str],
    kind: str = "option",
    otherwise: str = "--list shows what there is",
) -> str:
    """The complaint about an unknown word, with the nearest known one."""
    match = difflib.get_close_matches(unknown.partition("=")[0], known, n=1)
    hint = f"did you mean {match[0]}?" if match else otherwise
    return f"unknown {kind} {unknown}: {hint}"
