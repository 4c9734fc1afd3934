"""loggers: a restart goes on where it was, and nothing ends the training."""

import contextlib
import json
import sys
import types

import pytest

from templates.loggers import (
    LoggerPosition,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
    plot_run,
    read_jsonl,
)

CONFIG = {"learning_rate": 0.1, "data": "a.csv"}


class FakeRun:
    def __init__(self, tracker, settings):
        self.tracker, self.settings = tracker, settings
        self.resumed = bool(tracker.online and tracker.rows)
        self.step = max((step for step, _ in tracker.rows), default=-1) + 1
        self.finished = False

    def log(self, values, step):
        if self.tracker.error:
            raise self.tracker.error
        self.tracker.rows += [(step, name) for name in values]

    def finish(self):
        self.finished = True


class FakeTracker(types.ModuleType):
    """wandb or trackio: keeps (step, name) rows over restarts, as their stores do."""

    def __init__(self, name, online):
        super().__init__(name)
        self.rows, self.runs, self.error, self.online = [], [], None, online

    def init(self, **settings):
        if self.error:
            raise self.error
        self.runs.append(FakeRun(self, settings))
        return self.runs[-1]


TRACKERS = {
    "wandb": (WandbLogger, False),
    "wandb online": (WandbLogger, True),
    "trackio": (TrackioLogger, False),
}


@pytest.fixture(params=TRACKERS)
def tracker(request, monkeypatch):
    logger_class, online = TRACKERS[request.param]
    name = request.param.partition(" ")[0]
    fake = FakeTracker(name, online)
    monkeypatch.setitem(sys.modules, name, fake)
    return logger_class, fake


def train(logger, start, stop):
    """A loop that logs at every tenth step, and an evaluation at every twentieth."""
    for step in range(start + 10, stop + 1, 10):
        logger.log(step, {"loss": 1 / step})
        if step % 20 == 0:
            logger.log(step, {"epoch": step // 20, "val_loss": 2 / step})


def expected_rows(stop):
    class Collector:
        rows = ()

        def log(self, step, values):
            self.rows = [*self.rows, *((step, name) for name in values)]

    collector = Collector()
    train(collector, 0, stop)
    return collector.rows


@pytest.mark.parametrize("resumed_at", [30, None])
def test_a_killed_run_goes_on_as_the_same_run_with_every_value_once(
    tracker, tmp_path, resumed_at
):
    logger_class, fake = tracker
    train(logger_class(tmp_path / "run", CONFIG, 0), 0, 50)  # killed: no close
    logger = logger_class(tmp_path / "run", CONFIG, resumed_at)
    train(logger, 30, 80)
    logger.close()
    assert fake.rows == expected_rows(80)
    first, second = (run.settings for run in fake.runs)
    assert first == second
    assert first["resume"] == "allow"
    assert first["config"] == CONFIG
    assert fake.runs[1].finished


def test_a_kill_between_two_values_of_a_step_loses_neither(tmp_path, monkeypatch):
    fake = FakeTracker("trackio", online=False)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    first = TrackioLogger(tmp_path, CONFIG, 0)
    train(first, 0, 30)
    first.log(40, {"loss": 1 / 40})
    train(TrackioLogger(tmp_path, CONFIG, 20), 20, 60)
    assert fake.rows == expected_rows(60)


def test_a_new_run_in_the_same_folder_is_another_run(tracker, tmp_path):
    logger_class, fake = tracker
    fake.online = False
    train(logger_class(tmp_path, CONFIG, 0), 0, 50)
    train(logger_class(tmp_path, CONFIG, 0), 0, 50)
    assert fake.rows == expected_rows(50) * 2
    key = "id" if logger_class is WandbLogger else "name"
    assert fake.runs[0].settings[key] != fake.runs[1].settings[key]


def test_a_damaged_position_is_reported_and_does_not_end_the_training(
    tracker, tmp_path
):
    logger_class, fake = tracker
    (tmp_path / f"{fake.__name__}.json").write_text('{"run_')
    lines = []
    logger = logger_class(tmp_path, CONFIG, 30, report=lines.append)
    train(logger, 30, 50)
    logger.close()
    assert len(lines) == 1


def test_a_failing_tracker_is_reported_once_and_the_training_goes_on(tracker, tmp_path):
    logger_class, fake = tracker
    lines = []
    logger = logger_class(tmp_path, CONFIG, 0, report=lines.append)
    fake.error = ConnectionError("no route to host")
    train(logger, 0, 40)
    fake.error = None
    train(logger, 40, 60)
    assert len(lines) == 1
    assert f"{fake.__name__} failed (ConnectionError: no route to host)" in lines[0]
    assert [step for step, name in fake.rows if name == "loss"] == [50, 60]

    fake.error = ConnectionError("not at the start either")
    logger = logger_class(tmp_path, CONFIG, 60, report=lines.append)
    train(logger, 60, 80)
    logger.close()
    assert len(lines) == 2


@pytest.mark.parametrize("error", [None, KeyError("boom")])
def test_leaving_the_context_closes_the_tracker(tracker, tmp_path, error):
    logger_class, fake = tracker
    with contextlib.suppress(KeyError), logger_class(tmp_path, CONFIG, 0) as logger:
        logger.log(10, {"loss": 1.0})
        if error:
            raise error
    assert fake.runs[0].finished
    assert fake.rows == [(10, "loss")]


@pytest.mark.parametrize(
    "logger_class", [TensorBoardLogger, WandbLogger, TrackioLogger]
)
def test_other_ranks_need_no_tracker_and_write_nothing(
    logger_class, tmp_path, monkeypatch
):
    for name in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    with logger_class(tmp_path, CONFIG, 0, active=False) as logger:
        train(logger, 0, 40)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_tracker_gets_through(tracker, tmp_path):
    logger_class, fake = tracker
    logger = logger_class(tmp_path, CONFIG, 0)
    fake.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        logger.log(10, {"loss": 1.0})


@pytest.mark.parametrize(
    ("name", "logger_class"), [("wandb", WandbLogger), ("trackio", TrackioLogger)]
)
def test_what_is_not_installed_is_named_with_the_command(
    name, logger_class, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {name}"):
        logger_class(tmp_path, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_positions_survive_a_kill_while_one_is_written(tmp_path, monkeypatch):
    path = tmp_path / "wandb.json"
    position = LoggerPosition(path, 0)
    position.advance(10, {"loss": 1})

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("templates.loggers.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        position.advance(20, {"loss": 1})
    after = LoggerPosition(path, None)
    assert (after.run_id, after.step) == (position.run_id, 10)


# --- TensorBoard


def read_scalars(folder):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    accumulator = accumulators.EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator, {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


@pytest.fixture
def later_files(monkeypatch):
    """Event files are named by the second: let each writer have its own."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    clock = iter(range(1_000_000_000, 1_000_001_000))
    fake_time = types.SimpleNamespace(time=lambda: next(clock))
    monkeypatch.setattr(writer, "time", fake_time)


@pytest.mark.parametrize("resumed_at", [30, None])
def test_tensorboard_shows_every_step_once_after_a_kill(
    tmp_path, resumed_at, later_files
):
    killed = TensorBoardLogger(tmp_path, CONFIG, 0)
    train(killed, 0, 50)
    killed.close()  # what is on the disk; the loop goes back to step 30 all the same
    resumed = TensorBoardLogger(tmp_path, CONFIG, resumed_at)
    train(resumed, 30, 80)
    resumed.close()
    accumulator, scalars = read_scalars(tmp_path)
    assert [step for step, _ in scalars["loss"]] == list(range(10, 81, 10))
    assert [step for step, _ in scalars["val_loss"]] == [20, 40, 60, 80]
    assert dict(scalars["loss"])[40] == pytest.approx(1 / 40)
    (text,) = accumulator.Tensors("config/text_summary")
    assert b"| learning_rate | 0.1 |" in text.tensor_proto.string_val[0]


def test_tensorboard_failures_are_reported_once(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder belongs")
    lines = []
    logger = TensorBoardLogger(tmp_path, CONFIG, 0, report=lines.append)
    train(logger, 0, 40)
    logger.close()
    assert len(lines) == 1
    assert "TensorBoard failed" in lines[0]


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path, CONFIG)


# --- plot_run


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def drawn(monkeypatch):
    """What `plot_run` draws: {title: {label: (steps, values)}}."""
    figures = pytest.importorskip("matplotlib.figure")
    panels = {}
    savefig = figures.Figure.savefig

    def spy(figure, path, **settings):
        for axes in figure.axes:
            panels[axes.get_title("left")] = {
                line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
                for line in axes.lines
            }
        savefig(figure, path, **settings)

    monkeypatch.setattr(figures.Figure, "savefig", spy)
    return panels


def test_the_plot_has_what_the_logs_have(tmp_path, drawn):
    steps = range(10, 101, 10)
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            *({"step": s, "loss": 1 / s, "learning_rate": s / 1000} for s in steps),
            {"step": 100, "epoch": 1, "val_loss": 0.5},
        ],
    )
    write_lines(
        tmp_path / "speed.jsonl",
        [{"step": s, "tokens_per_s": 10 * s, "memory_gb": 1.5} for s in steps],
    )
    path = plot_run(tmp_path)
    assert path == tmp_path / "run.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(drawn) == [
        "Loss",
        "Learning rate",
        "Throughput (tokens/s)",
        "Peak memory (GB)",
    ]
    assert drawn["Loss"]["training"] == (list(steps), [1 / s for s in steps])
    assert drawn["Loss"]["validation"] == ([100], [0.5])
    (throughput,) = drawn["Throughput (tokens/s)"].values()
    assert throughput == (list(steps), [10 * s for s in steps])
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_killed_run_and_what_is_not_finite_can_be_drawn(tmp_path, drawn):
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 10, "loss": 3.0},
            {"step": 20, "loss": None},
            {"step": 30, "loss": 1},
        ],
    )
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    # speed.jsonl is not cut back on resume: steps 20 and 30 came twice
    speeds = [(10, 1), (20, 2), (30, 3), (20, 5), (30, 6), (40, 7)]
    write_lines(
        tmp_path / "speed.jsonl", [{"step": s, "samples_per_s": v} for s, v in speeds]
    )
    plot_run(tmp_path)
    assert list(drawn) == ["Loss", "Throughput (samples/s)"]
    ((steps, values),) = drawn["Loss"].values()
    assert steps == [10, 20, 30]
    assert values[0] == 3
    assert values[1] != values[1]
    ((steps, values),) = drawn["Throughput (samples/s)"].values()
    assert dict(zip(steps, values, strict=True)) == {10: 1, 20: 5, 30: 6, 40: 7}


def test_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_run(tmp_path)


def test_matplotlib_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_run(tmp_path)


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2}\n[1]\n\xff\xfe\n{"b": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1, "a": 2}, {"step": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == []
