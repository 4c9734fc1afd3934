"""predict.py, run as a script: its predictions are those of the model, whatever helps.

Each is compared with a direct call of the trained model, one sample at a time.
"""

import contextlib
import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from templates.checkpoint_io import read_checkpoint_file

from .scripts import (
    STRICT,
    data_words,
    docstrings,
    environment,
    import_file,
    run,
    write_script,
)


def predict(folder: Path, *words: str, expect: int = 0) -> str:
    """Run predict.py as a script, in this process: torch takes long to import."""
    output = io.StringIO()
    cwd, argv, path = os.getcwd(), sys.argv, list(sys.path)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        os.chdir(folder)
        sys.argv = ["predict.py", *words]
        sys.path.insert(0, str(folder))
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            pytest.raises(SystemExit) as end,
        ):
            runpy.run_path("predict.py", run_name="__main__")
    finally:
        os.chdir(cwd)
        sys.argv, sys.path[:] = argv, path
        sys.modules.pop("train", None)
        torch.backends.mha.set_fastpath_enabled(fused)
    assert end.value.code == expect, output.getvalue()
    return output.getvalue()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder: Path, task: str) -> Path:
    """A folder with a script, its predict.py and the weights of a short training."""
    script = write_script(folder, "--task", task, "--predict")
    run(script, *data_words(task, folder), f"--out-dir=runs/{task}", "--epochs=1")
    return folder


def load_best(folder: Path, task: str):
    """A module of a trained script, its best model in eval mode, and its spec."""
    train = import_file(folder / "train.py")
    best = read_checkpoint_file(folder / f"runs/{task}/best.pt")
    model = train.build_model(**best["spec"])
    model.load_state_dict(best["model_state_dict"])
    return train, model.eval(), best["spec"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = trained(tmp_path_factory.mktemp("text"), "text")
    with open(folder / "new.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text"])
        rows.writerows([docstring] for docstring, _ in docstrings()[1::3][:150])
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(scope="module")
def text_truth(text) -> list[tuple[str, float]]:
    """Label and probability of each new text, from the model itself, one by one."""
    train, model, spec = load_best(text, "text")
    with open(text / "new.csv", newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    found = []
    with torch.inference_mode():
        for words in texts:
            logits = model(train.tokenize([words]))[0]
            number = int(logits.argmax())
            found.append((spec["classes"][number], logits.softmax(-1)[number]))
    return found


def assert_truth(found: list[dict], truth: list, tolerance: float) -> None:
    assert len(found) == len(truth)
    for record, (label, probability) in zip(found, truth, strict=True):
        assert abs(record["probability"] - probability) < tolerance
        assert record["label"] == label or tolerance > 1e-3


def test_as_a_process_it_warns_of_nothing(text, text_truth):
    words = ["--data=new.csv", "--quantize", "--out=process.jsonl"]
    done = subprocess.run(
        [sys.executable, *STRICT, "predict.py", *words],
        cwd=text,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_truth(records(text / "process.jsonl"), text_truth, 0.1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_text_in_any_batches_equals_the_model(batch_size, text, text_truth):
    words = [f"--batch-size={batch_size}", f"--out={batch_size}.jsonl"]
    assert "150 samples" in predict(text, "--data=new.csv", *words)
    assert_truth(records(text / f"{batch_size}.jsonl"), text_truth, 1e-6)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_other_kinds_of_files_give_the_same_as_csv(kind, text):
    import pandas

    table = pandas.read_csv(text / "new.csv")
    table["text"] = table["text"].str.replace("\n", " ")  # a line of .txt is a text
    if kind == "jsonl":
        table.to_json(text / "new.jsonl", orient="records", lines=True)
    elif kind == "parquet":
        table.to_parquet(text / "new.parquet")
    else:
        (text / "new.txt").write_text("\n".join(table["text"]) + "\n")
    predict(text, f"--data=new.{kind}", "--out=this.jsonl")
    predict(text, "--data=new.csv", "--out=csv.jsonl")
    assert (text / "this.jsonl").read_bytes() == (text / "csv.jsonl").read_bytes()


def test_image_equals_the_model_and_names_the_files(image):
    shown = sorted((image / "digits").rglob("*.png"))
    hidden = shown[0].with_name(f"._{shown[0].name}")  # a file of macOS, no image
    hidden.write_bytes(b"metadata")
    predict(image, "--data=digits", "--batch-size=7", "--num-workers=0")
    hidden.unlink()
    train, model, spec = load_best(image, "image")
    found = records(image / "predictions.jsonl")
    assert [r["path"] for r in found] == [str(p.relative_to(image)) for p in shown]
    paths = [str(image / record["path"]) for record in found]
    samples = train.LazyImageDataset(paths, labels=[0] * len(paths), size=16)
    with torch.inference_mode():
        for record, sample in zip(found, samples, strict=True):
            batch = train.collate_images([sample])
            probabilities = train.compute_loss(model, *batch)[1][0].softmax(-1)
            number = int(probabilities.argmax())
            assert record["label"] == spec["classes"][number]
            assert abs(record["probability"] - probabilities[number]) < 1e-5


def test_images_that_cannot_be_read_are_left_out_on_request(image, tmp_path):
    for path in sorted((image / "digits").glob("*/*.png"))[:5]:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "empty.jpg").touch()
    line = predict(image, f"--data={tmp_path}", "--out=new.csv", expect=2)
    assert f"{tmp_path}/0.png" in line
    assert "--on-error skip" in line
    words = [f"--data={tmp_path}", "--on-error=skip"]
    output = predict(image, *words, "--out=new.csv")
    assert "5 samples" in output
    assert "2 left out" in output
    assert "0.png" in output
    named = (image / "new.csv.left_out.txt").read_text()
    assert [name in named for name in ("0.png", "empty.jpg")] == [True, True]
    predict(image, *words, "--out=new.jsonl")
    with open(image / "new.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {name: str(value) for name, value in record.items()}
        for record in records(image / "new.jsonl")
    ]


def test_int8_is_near_and_a_model_without_linear_layers_is_refused(text, text_truth):
    assert "int8" in predict(text, "--data=new.csv", "--quantize", "--out=int8.jsonl")
    found = records(text / "int8.jsonl")
    assert_truth(found, text_truth, 0.1)
    assert [r["probability"] for r in found] != [float(p) for _, p in text_truth]


def test_safetensors_predicts_the_same_without_the_run(text, text_truth, tmp_path):
    predict(text, f"--export={tmp_path / 'model.safetensors'}")
    words = [f"--weights={tmp_path / 'model.safetensors'}", "--out=st.jsonl"]
    predict(text, "--data=new.csv", *words)
    assert_truth(records(text / "st.jsonl"), text_truth, 1e-6)


@pytest.mark.parametrize("task", ["text", "image"])
def test_an_exported_program_runs_without_the_script(task, request, tmp_path):
    folder = request.getfixturevalue(task)
    predict(folder, f"--export={tmp_path / 'model.pt2'}")
    program = torch.export.load(tmp_path / "model.pt2").module()
    train, model, _ = load_best(folder, task)
    for count, length in ((1, 3), (5, 1), (9, 40)):
        inputs = torch.randint(1, 8000, (count, length))
        if task == "image":
            inputs = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)
        with torch.inference_mode():
            labels = torch.zeros(count, dtype=torch.long)
            expected = train.compute_loss(model, inputs, labels)[1]
            torch.testing.assert_close(program(inputs), expected, rtol=1e-4, atol=1e-5)


CSV = "text,label\nfirst,a\nsecond,b\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["nothing to do", "--data", "--export"]),
        (["--data=none.csv"], ["none.csv", "no such file"]),
        (["--data=a.xlsx"], ["a.xlsx", ".csv", ".parquet", ".txt"]),
        (["--data=a.csv", "--text-column=body"], ["a.csv", "body", "text, label"]),
        (["--data=holes.csv"], ["holes.csv", "text is empty in row 3"]),
        (["--data=bad.jsonl"], ["bad.jsonl", "cannot be read"]),
        (["--data=cut.parquet"], ["cut.parquet", "cannot be read"]),
        (["--data=a.csv", "--weights=none.pt"], ["none.pt", "cannot be read"]),
        (["--data=a.csv", "--weights=cut.pt"], ["cut.pt", "not a complete"]),
        (["--data=a.csv", "--device=warp"], ["--device warp", "--device cpu"]),
        (["--data=a.csv", "--device=cuda:7"], ["--device cuda:7", "--device cpu"]),
        (["--data=a.csv", "--batchsize=3"], ["did you mean --batch-size?"]),
        (["--data=a.csv", "--out=a.csv/x.csv"], ["a.csv/x.csv", "cannot be written"]),
        (["--data=a.csv", "--out=x.txt"], ["--out x.txt", ".jsonl or .csv"]),
        (["--export=model.onnx"], ["model.onnx", ".safetensors or .pt2"]),
        (["--export=m.pt2", "--quantize"], ["--export", "--quantize"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_code_2(words, parts, text):
    (text / "a.csv").write_text(CSV)
    (text / "a.xlsx").write_text("")
    (text / "holes.csv").write_text(CSV + ",b\n")
    (text / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (text / "cut.parquet").write_bytes(b"PAR1 and no more")
    (text / "cut.pt").write_bytes((text / "runs/text/best.pt").read_bytes()[:999])
    output = predict(text, *words, expect=2)
    assert "Traceback" not in output
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not (text / "predictions.jsonl").exists()
    assert not list(text.glob(".*.tmp*"))


def test_weights_of_another_model_are_refused_by_name(text, tmp_path):
    source = (text / "train.py").read_text().replace("width=32", "width=64")
    (tmp_path / "train.py").write_text(source)
    (tmp_path / "predict.py").write_text((text / "predict.py").read_text())
    weights = text / "runs/text/best.pt"
    words = [f"--weights={weights}", f"--data={text / 'new.csv'}"]
    line = predict(tmp_path, *words, expect=2).strip().splitlines()[-1]
    assert "embed.weight (8192, 32) in the file, (8192, 64) here" in line


def test_an_unreadable_image_is_named(image):
    (image / "photos").mkdir()
    (image / "photos/bad.png").write_bytes(b"\x89PNG and no more")
    words = ["--data=photos", "--out=bad.jsonl", "--num-workers=0"]
    output = predict(image, *words, expect=2)
    assert "bad.png" in output.strip().splitlines()[-1]
    assert not (image / "bad.jsonl").exists()


def trained_on(folder: Path, task: str, data: str, *words: str):
    """What `load_best` gives of a script trained on this data."""
    script = write_script(folder, "--task", task, "--predict")
    settings = ["--epochs=1", "--batch-size=8", "--num-workers=0", *words]
    run(script, f"--data={data}", *settings)
    return load_best(folder, task)


def test_lm_scores_are_those_of_one_text_at_a_time_and_it_continues(tmp_path):
    texts = [text for text, _ in docstrings()[:60]]
    (tmp_path / "all.txt").write_text("\n".join(texts))
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    words = ["--max-tokens=48", "--val-fraction=0.3"]
    train, model, spec = trained_on(tmp_path, "lm", "all.txt", *words)
    predict(tmp_path, "--data=new.jsonl", "--batch-size=7")
    for record, text in zip(
        records(tmp_path / "predictions.jsonl"), texts, strict=True
    ):
        tokens = torch.tensor([train.END_OF_TEXT, *train.encode(text)])
        losses = []
        for start in range(0, len(tokens) - 1, 48):
            window = tokens[start : start + 49]
            with torch.no_grad():
                logits = model(window[None, :-1])[0]
            losses += nn.functional.cross_entropy(
                logits, window[1:], reduction="none"
            ).tolist()
        assert record["tokens"] == len(tokens) - 1
        assert abs(record["loss"] - sum(losses) / len(losses)) < 1e-4
    greedy = ["--prompt=The ", "--temperature=0", "--max-new-tokens=5"]
    found = predict(tmp_path, *greedy)
    tokens = [train.END_OF_TEXT, *b"The "]
    for _ in range(5):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1, : spec["vocab_size"]]
        tokens.append(int(logits.argmax()))
    assert bytes(tokens[1:]).decode(errors="replace") in found
    drawn = ["--prompt=The ", "--temperature=1", "--seed=7", "--max-new-tokens=9"]
    assert predict(tmp_path, *drawn) == predict(tmp_path, *drawn)


def test_embedding_vectors_equal_the_model(tmp_path):
    import numpy
    import safetensors.torch

    texts = [text for text, _ in docstrings()[:90]]
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "document"])
        rows.writerows([text[:50], text] for text in texts)
    train, model, _ = trained_on(tmp_path, "embedding", "pairs.csv")
    words = ["--data=pairs.csv", "--text-column=document", "--batch-size=7"]
    predict(tmp_path, *words)
    predict(tmp_path, *words, "--out=v.npy")
    found = safetensors.torch.load_file(tmp_path / "vectors.safetensors")["vectors"]
    assert found.equal(torch.from_numpy(numpy.load(tmp_path / "v.npy")))
    with torch.no_grad():
        expected = torch.cat([model(train.tokenize([text])) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "end it with" in predict(tmp_path, *words, "--out=v.txt", expect=2)


@pytest.mark.parametrize("label", ["digit", "share"])
def test_tabular_rows_equal_the_model(label, tmp_path):
    import pandas

    table = pandas.DataFrame(torch.randn(90, 4).numpy(), columns=list("abcd"))
    table["label"] = [
        "xyz"[int(a > 0) + int(b > 0)] for a, b in table[["a", "b"]].values
    ]
    if label == "share":
        table["label"] = table["a"] + 0.5
    table.to_parquet(tmp_path / "rows.parquet")
    _, model, spec = trained_on(tmp_path, "tabular", "rows.parquet")
    table[["c", "a", "d", "b"]].to_parquet(tmp_path / "new.parquet")
    predict(tmp_path, "--data=new.parquet", "--batch-size=7")
    features = torch.tensor(table[spec["features"]].to_numpy(), dtype=torch.float32)
    with torch.no_grad():
        outputs = model(features)
    found = records(tmp_path / "predictions.jsonl")
    for record, output in zip(found, outputs, strict=True):
        if label == "share":
            assert abs(record["prediction"] - output) < 1e-4
        else:
            assert record["label"] == spec["classes"][output.argmax()]
            assert abs(record["probability"] - output.softmax(0).max()) < 1e-5
    predict(tmp_path, "--export=m.safetensors")
    words = ["--weights=m.safetensors", "--data=new.parquet", "--out=again.jsonl"]
    predict(tmp_path, *words, "--batch-size=7")
    assert records(tmp_path / "again.jsonl") == found
    predict(tmp_path, "--export=m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(features), outputs, rtol=1e-4, atol=1e-5)
    table[["c", "a"]].to_parquet(tmp_path / "few.parquet")
    assert "no column b, d" in predict(tmp_path, "--data=few.parquet", expect=2)
