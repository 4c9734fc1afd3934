"""Each task with models that are not ours, run as scripts in this process: --model."""

import json
import sys

import pytest
import torch

from generator.cli import main
from templates.builtin_data import stdlib_docstrings

from .scripts import (
    import_file,
    write_image_data,
    write_script,
    write_text_data,
)

MODULE = """
from torch import nn


class Text(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed = nn.EmbeddingBag(8192, 8, padding_idx=0)
        self.head = nn.Linear(8, len(classes))

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Embed(nn.EmbeddingBag):
    def __init__(self):
        super().__init__(8192, 8, padding_idx=0)


class Lm(nn.Sequential):
    def __init__(self, vocab_size):
        super().__init__(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))


class Image(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, len(classes)))


class Tabular(nn.Linear):
    def __init__(self, features, classes, scales):
        super().__init__(len(features), len(classes) or 1)
"""

# The same calls as of timm 1.0, which needs torchvision; that has no CPU build here.
TIMM = """
from torch import nn


def is_model(name):
    return name == "tiny"


def is_model_pretrained(name):
    return False


def create_model(model_name, pretrained=False, num_classes=1000):
    assert not pretrained
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
"""

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a run, with the user's module and the stand-in for timm."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "timm.py").write_text(TIMM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    for name in ("mine", "timm", "train"):
        sys.modules.pop(name, None)


def save_hf_model(folder, kind):
    """A folder `hf` with the configuration of a small model, and a tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[SEP]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(stdlib_docstrings(("wsgiref",))[0], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", sep_token="[SEP]"
    ).save_pretrained(folder / "hf")
    settings = {"vocab_size": tokenizer.get_vocab_size(), **SIZES}
    if kind == "vit":
        config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
    elif kind == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, **settings)
    else:
        config = transformers.BertConfig(**settings)
    config.save_pretrained(folder / "hf")


def write_data(task, folder):
    """The options for a little data of one's own."""
    if task == "text":
        return ["--data", str(write_text_data(folder)), "--batch-size", "16"]
    if task == "image":
        path = str(write_image_data(folder))
        return ["--data", path, "--image-size", "8", "--batch-size", "16"]
    if task == "lm":
        (folder / "text.txt").write_text(
            "".join(stdlib_docstrings(("http",))[0])[:9000]
        )
        return ["--data", "text.txt", "--max-tokens", "32"]
    if task == "embedding":
        texts = stdlib_docstrings(("http",))[0][:60]
        rows = [{"query": t.split(".")[0], "document": t} for t in texts]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return ["--data", "pairs.jsonl", "--batch-size", "16"]
    return []


def run(folder, *words, options=()):
    """Write a script, run its main() and return it as a module."""
    path = folder / "train.py"
    assert main([*words, "-o", str(path), "--force"]) == 0
    script = import_file(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *options])
        assert script.main() == 0
    return script


def check_run(task, folder, script):
    """The best weights fit the model that the script builds from what was saved."""
    best = torch.load(folder / "runs" / task / "best.pt", weights_only=True)
    model = script.build_model(**best["spec"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best["model_state_dict"])
    after = model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("task", ["text", "image", "lm", "tabular", "embedding"])
def test_a_class_of_the_users_own(task, folder):
    flag = f"--model=mine:{task.capitalize().replace('Embedding', 'Embed')}"
    options = [*write_data(task, folder), "--epochs", "1", "--num-workers", "0"]
    check_run(task, folder, run(folder, "--task", task, flag, options=options))


@pytest.mark.parametrize(
    ("task", "kind"),
    [("text", "bert"), ("image", "vit"), ("lm", "llama"), ("embedding", "bert")],
)
def test_a_model_of_transformers(task, kind, folder, capsys):
    save_hf_model(folder, kind)
    options = [*write_data(task, folder), "--epochs", "1", "--num-workers", "0"]
    script = run(folder, "--task", task, "--model=hf:hf", options=options)
    assert "hf has no weights: the model starts untrained" in capsys.readouterr().out
    check_run(task, folder, script)


def test_a_model_of_timm(folder, capsys):
    options = [*write_data("image", folder), "--epochs", "1", "--num-workers", "0"]
    script = run(folder, "--task", "image", "--model=timm:tiny", options=options)
    assert "timm has no weights for tiny" in capsys.readouterr().out
    check_run("image", folder, script)


@pytest.mark.parametrize(
    "task", ["text", pytest.param("embedding", marks=pytest.mark.slow)]
)
def test_streams_hold_the_rows_that_memory_does(task, folder):
    model = f"--model=mine:{'Text' if task == 'text' else 'Embed'}"
    options = [*write_data(task, folder), "--epochs", "1", "--num-workers", "0"]
    names = ["text", "label"] if task == "text" else ["query", "document"]
    found = []
    kept = str(folder / "kept")
    for words, cache in (((), []), (("--stream",), [""]), (("--stream",), [kept])):
        on_error = ["raise"] if words else []
        more = [f"--cache-dir={path}" for path in cache]
        script = run(folder, "--task", task, model, *words, options=options + more)
        check_run(task, folder, script)
        *sets, spec = script.build_datasets(
            options[1], *names, *cache, *on_error, 0.2, 42
        )
        collate = [] if words else [script.collate]
        device = torch.device("cpu")
        loaders = script.make_loaders(*sets, 16, device, 0, 42, *collate)
        rows = [
            (tuple(x[x != 0].tolist()), tuple(y[y != 0].tolist()))
            for loader in loaders
            for inputs, targets in loader
            for x, y in zip(inputs, targets.view(len(inputs), -1), strict=True)
        ]
        found.append((sorted(rows), [len(s) for s in sets], spec))
    assert found[0] == found[1] == found[2]
    assert (
        len(list((folder / "kept").iterdir())) == 1
    )  # the second use has made no other


# --- Bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("lm", ["--data", "nowhere/*.txt"], r"nowhere/\*.txt: no such file"),
        ("lm", ["--data", "tiny.txt"], "0 samples to train on and 0 to"),
        ("lm", ["--data", "rows.csv"], "no column 'text' in rows.csv: it has a, b"),
        ("tabular", ["--data", "one.parquet"], "all labels are .*needs two classes"),
        (
            "tabular",
            ["--data", "one.parquet", "--label-column", "x"],
            "no column but x",
        ),
        ("embedding", ["--data", "rows.csv"], "rows.csv: has no column query or"),
    ],
)
def test_bad_data_is_named(task, options, message, folder):
    import pyarrow
    from pyarrow import parquet

    (folder / "tiny.txt").write_text("")
    (folder / "rows.csv").write_text("a,b\n1,2\n")
    table = pyarrow.table({"x": [1, 2, 3], "label": ["a"] * 3})
    parquet.write_table(table, folder / "one.parquet")
    with pytest.raises(ValueError, match=message) as error:
        run(folder, "--task", task, options=options)
    assert type(error.value).__name__ == "DataError"


def test_text_of_another_type_and_empty_ones_are_read(folder):
    import pyarrow
    from pyarrow import parquet

    rows = [*range(1000, 1200), None]
    parquet.write_table(pyarrow.table({"text": rows}), folder / "t.parquet")
    options = ["--data", "t.parquet", "--max-tokens", "8", "--num-workers", "0"]
    script = run(folder, "--task", "lm", "--model=mine:Lm", options=options)
    train_set, val_set, _ = script.build_datasets("t.parquet", "text", 8, 0.1, 42)
    sizes = [s.offsets[-1] for s in (train_set, val_set)]
    assert sum(sizes) == 200 * 5  # four digits and the end of the text


@pytest.mark.parametrize(
    ("model", "sizes"), [([], (16, 64)), (["--model=hf:name"], (224, 224))]
)
def test_image_size_fits_the_data_and_the_model(model, sizes, tmp_path):
    config = import_file(write_script(tmp_path, "--task=image", *model)).Config
    assert (config().image_size, config(data="photos").image_size) == sizes
    assert config(data="photos", image_size=8).image_size == 8
