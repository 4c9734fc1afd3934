"""Bad input to a generated script: one clear line, exit code 2, nothing is lost."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from pyarrow import parquet

from .scripts import data_words, run, write_image_data, write_script, write_text_data


@pytest.fixture(scope="module")
def text_script(tmp_path_factory):
    return write_script(tmp_path_factory.mktemp("text"), "--resume", "--amp")


def refusal(script, *words: str) -> str:
    """The line with which a script refuses its input."""
    output = run(script, *words, expect=2)
    assert "Traceback" not in output
    return output.strip().splitlines()[-1]


CSV = "text,label\nfirst,a\nsecond,b\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--data", "none.csv"], ["none.csv", "no such file", "--data"]),
        (["--data", "a.xlsx"], ["a.xlsx", ".csv", ".parquet"]),
        (
            ["--data", "a.csv", "--text-column", "body"],
            ["a.csv", "body", "text, label"],
        ),
        (["--data", "a.csv"], ["samples", "val_fraction"]),
        (["--data", "holes.csv"], ["holes.csv", "label", "1 row"]),
        (["--data", "one.csv"], ["two classes", "a"]),
        (["--data", "cut.parquet"], ["cut.parquet", "cannot be read"]),
        (["--batchsize", "4"], ["--batchsize", "did you mean --batch-size?"]),
        (["--batch-size", "0"], ["batch_size", "0", "at least 1"]),
        (["--learning-rate", "fast"], ["learning_rate", "fast", "number"]),
        (["--dtype", "fp8"], ["dtype", "fp8", "fp32, fp16, bf16"]),
        (["--seed", "99999999999999999999"], ["seed", "at most"]),
        (["--weight-decay", "-1"], ["weight_decay", "at least 0"]),
        (["--num-workers", "100000"], ["num_workers", "100000", "at most 256"]),
        (["--val-fraction", "1.5"], ["val_fraction", "1.5", "at most 1"]),
        (["--config", "none.yaml"], ["none.yaml", "--config"]),
        (["--config", "bad.yaml"], ["bad.yaml", "batchsize", "batch_size", "epochs"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_text(words, parts, text_script):
    folder = text_script.parent
    (folder / "a.csv").write_text(CSV)
    (folder / "a.xlsx").write_text("")
    (folder / "holes.csv").write_text(CSV + "third,\n" * 1)
    (folder / "one.csv").write_text("text,label\n" + "words,a\n" * 40)
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "bad.yaml").write_text("batchsize: 4\nepochs: many\n")
    line = refusal(text_script, *words, "--out-dir=unused")
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not (folder / "unused/best.pt").exists()


def test_torchrun_is_refused(text_script):
    output = run(text_script, expect=2, WORLD_SIZE="2")
    assert "start it with python, or generate it with --distributed" in output


def test_resuming_with_other_data_is_refused(tmp_path):
    script = write_script(tmp_path, "--resume")
    words = data_words("text", tmp_path)
    run(script, *words, "--out-dir=run")
    write_text_data(tmp_path, rows=110)
    line = refusal(script, *words, "--out-dir=run")
    assert "samples was 108 and is 99" in line


def test_config_file_and_command_line(text_script):
    folder = text_script.parent
    (folder / "run.yaml").write_text("learning_rate: 2e-3\nepochs: 1\nlog_every: 3\n")
    words = data_words("text", folder)
    run(text_script, *words, "--config=run.yaml", "--epochs=1", "--out-dir=config")
    config = json.loads((folder / "config/config.json").read_text())
    assert (config["learning_rate"], config["log_every"]) == (2e-3, 2)


def test_an_unreadable_image_is_named_in_the_main_process_and_in_a_worker(tmp_path):
    script = write_script(tmp_path, "--task=image", "--resume")
    data = write_image_data(tmp_path)
    bad = sorted(data.glob("*/*.png"))[5]
    bad.write_bytes(bad.read_bytes()[:60])
    for workers in ("0", "1"):
        words = ["--data", str(data), "--num-workers", workers, "--save-every=1"]
        line = refusal(script, *words, f"--out-dir=run{workers}")
        assert line.startswith("error: ")
        assert str(bad) in line
        assert list((tmp_path / f"run{workers}/checkpoints").glob("step-*.pt"))


@pytest.mark.parametrize("words", [["--data", "none"], ["--data", "empty"]])
def test_no_images(words, tmp_path):
    script = write_script(tmp_path, "--task=image")
    (tmp_path / "empty").mkdir()
    line = refusal(script, *words)
    assert words[1] in line
    assert "FOLDER/CLASS/IMAGE" in line


def test_a_second_run_without_resume_overwrites_nothing(tmp_path):
    script = write_script(tmp_path)
    words = [*data_words("text", tmp_path), "--epochs=1"]
    run(script, *words, "--out-dir=run")
    first = (tmp_path / "run/best.pt").read_bytes()
    assert "run-2" in run(script, *words, "--out-dir=run")
    assert (tmp_path / "run/best.pt").read_bytes() == first
    assert (tmp_path / "run-2/best.pt").exists()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_other_kinds_of_files_give_the_same_as_csv(kind, tmp_path):
    import pandas

    script = write_script(tmp_path)
    csv = write_text_data(tmp_path)
    table = pandas.read_csv(csv)
    other = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        table.to_parquet(other)
    else:
        table.to_json(other, orient="records", lines=True)
    logs = []
    for path in (csv, other):
        words = ["--epochs=1", "--num-workers=0", f"--data={path}"]
        run(script, *words, f"--out-dir={path.suffix}")
        logs.append((tmp_path / path.suffix / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]


def left_out(output: str, count: int, *names: str) -> None:
    """Check that a run counts and names what it has left out when it ends."""
    _, found, tail = output.rpartition(f"{count} left out, which cannot be used:\n")
    assert found, output
    lines = list(itertools.takewhile(lambda x: x[:2] == "  ", tail.splitlines()))
    assert len(lines) == count
    for name in names:
        assert sum(name in line for line in lines) == 1, (name, lines)


@pytest.mark.parametrize("task", ["tabular", "text"])
def test_on_error_skip_trains_on_the_rest_and_names_what_it_left_out(task, tmp_path):
    script = write_script(tmp_path, f"--task={task}", *["--stream"] * (task == "text"))
    words = data_words(task, tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    good = Path(words[1])
    # Of text one line is lost, of a table a row group.
    for number in (1, 3, 4) if task == "text" else (1, 3):
        shutil.copy(good, data / f"{number}{good.suffix}")
    words[1] = str(data)
    run(script, *words, "--out-dir=whole")
    # In the order of their names: torn between the two, damaged in its rows.
    torn, damaged = data / f"2{good.suffix}", data / f"4{good.suffix}"
    raw = good.read_bytes()
    torn.write_bytes(b"" if task == "text" else raw[:-20])
    middle = len(raw) if task == "text" else 40
    damaged.write_bytes(raw[:middle] + b"\xff" * 20 + b"\n" + raw[middle + 21 :])
    line = refusal(script, *words, "--out-dir=unused")
    assert str(torn) in line
    assert "--on-error skip" in line
    output = run(script, *words, "--on-error=skip", "--out-dir=rest")
    left_out(output, 2, str(torn), str(damaged))
    assert len((tmp_path / "rest/left_out.txt").read_text().splitlines()) == 2
    assert output.count("samples to train on") == 1
    assert output.count("2 left out") == 2  # before and after the training
    logs = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("whole", "rest")]
    assert logs[0] == logs[1]


def test_a_run_does_not_go_on_with_other_rows(tmp_path):
    """As many as before: another row group cannot be read now."""
    script = write_script(tmp_path, "--task=tabular", "--resume")
    words = [*data_words("tabular", tmp_path), "--on-error=skip", "--out-dir=run"]
    table = parquet.read_table(words[1])
    for bad in (1, 2):
        parquet.write_table(table, words[1], row_group_size=30, compression="none")
        group = parquet.ParquetFile(words[1]).metadata.row_group(bad)
        raw = bytearray(Path(words[1]).read_bytes())
        start = group.column(0).dictionary_page_offset
        raw[start : start + 20] = b"\xff" * 20
        Path(words[1]).write_bytes(raw)
        if bad == 1:
            output = run(script, *words)
            left_out(output, 1, f"{words[1]}, row group 1")
    assert "order was" in refusal(script, *words)


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_on_error_skip_names_images_of_all_ranks(ranks, tmp_path):
    kind = ["--distributed=ddp"] if ranks else []
    script = write_script(tmp_path, "--task=image", *kind)
    words = data_words("image", tmp_path)
    bad = sorted(Path(words[1]).glob("*/*.png"))[3::40]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    output = run(script, *words, "--on-error=skip", ranks=ranks)
    left_out(output, len(bad), *map(str, bad))
    good = sum(1 for _ in Path(words[1]).glob("*/*.png")) - len(bad)
    counts = re.search(r"(\d+) samples to train on, (\d+) to validate on", output)
    assert sum(map(int, counts.groups())) == good
