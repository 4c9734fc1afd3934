"""Send metrics to a tracker, and draw a run's curves.

    logger = TensorBoardLogger(out_dir, config)
    logger.log(step, {"loss": 0.31})
    logger.close()
    plot_run(out_dir)

A tracker never ends a training: what fails in it is reported once. The log of record
is metrics.jsonl.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class LoggerPosition:
    """What a tracker has been given already, in a file beside it.

    An exact resume starts at the last checkpoint and takes the steps after it once
    more, with the same values to the bit. A tracker cannot be cut back as a file can,
    so those values are not sent again.
    """

    def __init__(self, path: Path, step: int | None) -> None:
        self.path = path
        self.run_id, self.step, self.names = uuid.uuid4().hex[:8], -1, set()
        if step != 0 and path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.run_id, self.step = saved["run_id"], saved["step"]
            self.names = set(saved["names"])
        else:
            self._save()

    def select_new(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that were not given at this step yet."""
        if step < self.step:
            return {}
        given = self.names if step == self.step else set()
        return {name: value for name, value in values.items() if name not in given}

    def advance(self, step: int, values: Mapping[str, Any]) -> None:
        """Remember, also for the next process, that these values were given."""
        self.names = {*(self.names if step == self.step else ()), *values}
        self.step = step
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"run_id": self.run_id, "step": self.step, "names": sorted(self.names)}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)  # a kill leaves the old one or the new one


class FirstFailure:
    """A context that swallows exceptions, and reports the first of them."""

    def __init__(self, name: str, report: Callable[[str], None]) -> None:
        self.name, self.report, self.reported = name, report, False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> bool:
        if error is None or not isinstance(error, Exception):  # Ctrl-C must get through
            return False
        if not self.reported:
            self.reported = True
            self.report(
                f"{self.name} failed ({type(error).__name__}: {error}); the training "
                "goes on, metrics.jsonl has everything"
            )
        return True


class MetricsLogger:
    """What all trackers share: closed when the run leaves their context."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still in memory."""


class TensorBoardLogger(MetricsLogger):
    """Write scalars that `tensorboard --logdir OUT_DIR` shows.

    After a resume TensorBoard hides what was written of steps that come again.

    Args:
        out_dir: of the run; the event files go to its folder "tensorboard".
        config: settings, shown as a text.
        step: the step at which this process takes the run up: 0 for a new run, None
            for whatever comes first in `log`.
        active: False does nothing at all, as on all ranks but the first.
        report: gets the one line if writing fails.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(
        self,
        out_dir: str | Path,
        config: Mapping[str, Any],
        step: int | None = None,
        active: bool = True,
        report: Callable[[str], None] = print,
    ) -> None:
        self._active, self._writer = active, None
        if not active:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "--logger tensorboard needs tensorboard: pip install tensorboard"
            ) from error
        self._writer_class = SummaryWriter
        self._folder = Path(out_dir) / "tensorboard"
        self._config, self._step = config, step
        self._guard = FirstFailure("TensorBoard", report)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers of one step; other values are left out."""
        if not self._active:
            return
        with self._guard:
            if self._writer is None:
                self._open(step if self._step is None else self._step + 1)
            for name, value in _select_numbers(values).items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            with self._guard:
                self._writer.close()

    def _open(self, first_step: int) -> None:
        is_new = self._step == 0 or not self._folder.exists()
        self._writer = self._writer_class(
            str(self._folder), purge_step=None if is_new else first_step
        )
        if is_new:
            lines = [f"| {name} | {value} |" for name, value in self._config.items()]
            table = "\n".join(["| setting | value |", "|---|---|", *lines])
            self._writer.add_text("config", table, 0)


class RunLogger(MetricsLogger):
    """What wandb and trackio share: a run of theirs that gets each value once.

    Their constructors set `_guard`, `_position` and `_run`, which stays None where the
    run cannot begin or is not wanted.
    """

    _guard: FirstFailure
    _position: LoggerPosition
    _run: Any = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        if self._run is None:
            return
        with self._guard:
            if new := self._position.select_new(step, values):
                self._run.log(new, step=step)
                self._position.advance(step, new)

    def close(self) -> None:
        """Send or write what is still under way."""
        if self._run is not None:
            with self._guard:
                self._run.finish()


class WandbLogger(RunLogger):
    """Log to Weights & Biases; `WANDB_MODE=offline` keeps all of it in `out_dir`.

    A restart goes on with the same run: its id is kept in wandb.json. Offline a process
    that is killed loses the last seconds of what it logged, and its successor writes a
    folder of its own (same id): `wandb sync OUT_DIR/wandb/offline-run-*` sends all.

    Args:
        out_dir: of the run; its name is the run's name.
        config: settings, shown with the run.
        step: the step at which this process takes the run up: 0 begins a new run, None
            goes on with the one that `out_dir` holds, if any.
        project: in which the run shows; None leaves it to WANDB_PROJECT.
        active: False does nothing at all, as on all ranks but the first.
        report: gets the one line if wandb fails.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self,
        out_dir: str | Path,
        config: Mapping[str, Any],
        step: int | None = None,
        project: str | None = None,
        active: bool = True,
        report: Callable[[str], None] = print,
    ) -> None:
        if not active:
            return
        try:
            import wandb
        except ImportError as error:
            raise ModuleNotFoundError(
                "--logger wandb needs wandb: pip install wandb"
            ) from error
        self._guard = FirstFailure("wandb", report)
        with self._guard:
            out_dir = Path(out_dir)
            self._position = LoggerPosition(out_dir / "wandb.json", step)
            self._run = wandb.init(
                project=project,
                id=self._position.run_id,
                name=out_dir.name,
                config=dict(config),
                dir=str(out_dir),
                resume="allow",
            )
            if self._run.resumed:  # online: the server knows what has arrived
                self._position.step, self._position.names = self._run.step, set()


class TrackioLogger(RunLogger):
    """Log to trackio, which keeps everything on this machine (`trackio show`).

    A restart goes on with the same run: its name is kept in trackio.json.

    Args:
        out_dir: of the run; its name begins the run's name.
        config: settings, shown with the run.
        step: the step at which this process takes the run up: 0 begins a new run, None
            goes on with the one that `out_dir` holds, if any.
        project: in which the run shows.
        active: False does nothing at all, as on all ranks but the first.
        report: gets the one line if trackio fails.

    Raises:
        ModuleNotFoundError: trackio is not installed.
    """

    def __init__(
        self,
        out_dir: str | Path,
        config: Mapping[str, Any],
        step: int | None = None,
        project: str = "pytorch-optimization",
        active: bool = True,
        report: Callable[[str], None] = print,
    ) -> None:
        if not active:
            return
        try:
            import trackio
        except ImportError as error:
            raise ModuleNotFoundError(
                "--logger trackio needs trackio: pip install trackio"
            ) from error
        self._guard = FirstFailure("trackio", report)
        with self._guard:
            out_dir = Path(out_dir)
            self._position = LoggerPosition(out_dir / "trackio.json", step)
            self._run = trackio.init(
                project=project,
                name=f"{out_dir.name}-{self._position.run_id}",
                config=dict(config),
                resume="allow",
            )


def _select_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log, as far as they are whole; none where there is no file.

    Where steps begin again after a kill, the later records replace the earlier ones.
    """
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if not isinstance(record, dict) or "step" not in record:
                continue
            while records and records[-1]["step"] > record["step"]:
                records.pop()
            records.append(record)
    return records


def _select_curve(
    records: list[dict[str, Any]], name: str
) -> tuple[list[int], list[float]]:
    """The steps and the values of one name; gaps where it was not finite."""
    points = {r["step"]: r[name] for r in records if name in r}
    return list(points), [math.nan if v is None else v for v in points.values()]


def _collect_panels(out_dir: Path) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Title with unit, and (label, curve) pairs, of every panel that has data."""
    metrics = read_jsonl(out_dir / "metrics.jsonl")
    speeds = read_jsonl(out_dir / "speed.jsonl")
    rates = sorted({name for r in speeds for name in r if name.endswith("_per_s")})
    panels = [
        ("Loss", metrics, {"loss": "training", "val_loss": "validation"}),
        ("Learning rate", metrics, {"learning_rate": ""}),
        *(
            (f"Throughput ({name.removesuffix('_per_s')}/s)", speeds, {name: ""})
            for name in rates
        ),
        ("Peak memory (GB)", speeds, {"memory_gb": ""}),
    ]
    collected = []
    for title, records, labels in panels:
        curves = [
            (label, _select_curve(records, name)) for name, label in labels.items()
        ]
        curves = [(label, curve) for label, curve in curves if curve[0]]
        if curves:
            collected.append((title, curves))
    return collected


def plot_run(out_dir: str | Path) -> Path:
    """Draw loss, learning rate, throughput and memory of a run over its steps.

    Reads metrics.jsonl and speed.jsonl, writes run.png. Panels without data are left
    out, and so is a last line that was cut off.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ModuleNotFoundError(
            "--plot needs matplotlib: pip install matplotlib"
        ) from error
    out_dir = Path(out_dir)
    panels = _collect_panels(out_dir)
    if not panels:
        raise ValueError(
            f"{out_dir}: metrics.jsonl and speed.jsonl hold nothing to draw: train "
            "first, or name the folder of a run"
        )
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    # A figure of its own: pyplot would keep it, and ask for a window system.
    figure = Figure(figsize=(6.4 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    styles = [  # Okabe and Ito: told apart by the colour-blind, and in grey
        {"color": "#0072B2", "linewidth": 1.4},
        {"color": "#D55E00", "linewidth": 1.8, "linestyle": "--", "marker": "o"},
    ]
    for number, (title, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for (label, (steps, values)), style in zip(curves, styles, strict=False):
            if len(steps) < 30:  # a line through one point shows nothing
                style = {"marker": ".", **style}
            axes.plot(steps, values, label=label, **style)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        if not title.startswith("Loss"):
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(frameon=False)
    figure.suptitle(out_dir.resolve().name, fontsize=12)
    path = out_dir / "run.png"
    figure.savefig(path, dpi=120)
    return path
