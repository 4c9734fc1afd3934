"""What predictions are read from and written to; sorted batches, exports, tokens."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from pyarrow import parquet
from torch import nn

from templates import inference
from templates.inference import (
    PredictionError,
    export_program,
    export_safetensors,
    generate_tokens,
    predict_in_order,
    read_safetensors,
    stream_features,
    stream_texts,
    tokenize_each,
    write_predictions,
    write_vectors,
)

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "  spaces ", "ünï → 日本"]


def write_kind(path, texts):
    if path.suffix == ".csv":
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "body"], *enumerate(texts)])
    elif path.suffix == ".parquet":
        ids = list(range(len(texts)))
        parquet.write_table(pa.table({"id": ids, "body": texts}), path)
    else:
        rows = (json.dumps({"id": 1, "body": text}) + "\n" for text in texts)
        path.write_text("".join(rows), encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "ndjson", "parquet"])
def test_texts_come_as_they_were_written(kind, tmp_path):
    write_kind(tmp_path / f"a.{kind}", TEXTS)
    assert list(stream_texts(str(tmp_path / f"a.{kind}"), "body")) == TEXTS


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_texts_are_read_as_they_are_asked_for(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    write_kind(path, ["good"] * 9000 + [""])
    texts = stream_texts(str(path), "body")
    assert next(texts) == "good"  # the bad row is far behind
    with pytest.raises(PredictionError, match=r"body is empty in row 9001"):
        list(texts)


def test_a_long_text_and_a_byte_order_mark(tmp_path):
    long = "x" * 500_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("first\nsecond", encoding="utf-8-sig")
    assert list(stream_texts(str(tmp_path / "a.csv"), "text")) == [long]
    assert list(stream_texts(str(tmp_path / "a.txt"), "")) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"id,title\n1,x\n", "no column body, only id, title"),
        ("a.csv", b"body\n\xff\xfe\n", "cannot be read"),
        ("a.jsonl", b'{"body": "x"}\n[1]\n', "no column body"),
        ("a.jsonl", b'{"body": \n', "cannot be read"),
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("a.doc", b"", "ends with .csv"),
        ("none.csv", None, "no such file"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, part, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PredictionError, match=part) as error:
        list(stream_texts(str(tmp_path / name), "body"))
    assert name in str(error.value)


def test_features_are_those_of_the_file_in_the_order_asked_for(tmp_path):
    table = pa.table(
        {"a": [1, 2, None], "b": [0.5, None, 2.5], "c": [True, False, True]}
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    batches = list(stream_features(str(tmp_path / "t.parquet"), ["b", "c", "a"], 2))
    assert [len(batch) for batch in batches] == [2, 1]
    nan = float("nan")
    expected = torch.tensor([[0.5, 1, 1], [nan, 0, 2], [2.5, 1, nan]])
    torch.testing.assert_close(torch.cat(batches), expected, equal_nan=True)


def test_features_that_are_missing_or_no_numbers_are_named(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"a": [1], "word": ["x"]}), path)
    with pytest.raises(PredictionError, match="no column b, which the model"):
        list(stream_features(str(path), ["a", "b"], 2))
    with pytest.raises(PredictionError, match="cannot be read"):
        list(stream_features(str(path), ["word"], 2))
    with pytest.raises(PredictionError, match="no such file"):
        list(stream_features(str(tmp_path / "no.parquet"), ["a"], 2))


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_results_keep_the_order_while_batches_are_sorted(batch_size, read_ahead):
    dice = random.Random(1)
    samples = [(number, dice.randint(1, 50)) for number in range(103)]
    seen = []

    def predict(batches):
        if read_ahead:
            batches = iter(list(batches))
        for batch in batches:
            seen.append([length for _, length in batch])
            yield [number * 2 for number, _ in batch]

    found = predict_in_order(
        samples, predict, batch_size, length=lambda s: s[1], window=40
    )
    assert list(found) == [number * 2 for number, _ in samples]
    windows = [samples[i : i + 40] for i in range(0, 103, 40)]
    for window in windows:  # within each, from the longest to the shortest
        lengths = sorted((length for _, length in window), reverse=True)
        count = -(-len(window) // batch_size)
        assert [n for batch in seen[:count] for n in batch] == lengths
        assert all(len(batch) <= batch_size for batch in seen[:count])
        del seen[:count]
    assert not seen


def test_samples_are_read_a_window_at_a_time():
    taken = []

    def samples():
        for number in range(100):
            taken.append(number)
            yield number

    results = predict_in_order(
        samples(), lambda batches: batches, 4, length=lambda _: 1, window=10
    )
    assert next(results) == 0
    assert len(taken) == 10


def test_sorting_cuts_the_padding():
    """What costs is padded tokens; sorted batches of mixed lengths have few."""
    dice = random.Random(0)
    lengths = [min(400, int(dice.lognormvariate(3.5, 1)) + 1) for _ in range(4000)]

    def padded(rows):
        return sum(len(batch) * max(batch) for batch in rows)

    as_they_come = padded(lengths[i : i + 32] for i in range(0, 4000, 32))
    batches = []

    def predict(rows):
        for batch in rows:
            batches.append(batch)
            yield batch

    list(predict_in_order(lengths, predict, 32, length=lambda n: n))
    assert padded(batches) < 1.05 * sum(lengths)
    assert as_they_come > 2 * padded(batches)


def test_batches_that_grow_are_padded_to_the_size_of_the_first():
    dice = random.Random(0)
    samples = [(i, dice.randint(0, 64)) for i in range(1000)]
    seen = []

    def predict(batches):
        for batch in batches:
            seen.append([length for _, length in batch])
            yield [number for number, _ in batch]

    found = predict_in_order(samples, predict, 8, lambda s: s[1], 400, grow=True)
    assert list(found) == list(range(1000))
    assert sorted(n for batch in seen for n in batch) == sorted(n for _, n in samples)
    padded = [len(batch) * max(batch) for batch in seen]
    assert max(padded) <= 8 * 64
    assert len(seen[0]) == 8 < max(map(len, seen))
    assert sum(map(len, seen)) / len(seen) > 12
    nothing = predict_in_order([0] * 5, iter, 2, lambda n: n, grow=True)
    assert list(nothing) == [0] * 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_tokenized_together_and_lose_their_padding(side):
    calls = []

    def tokenize(texts):
        calls.append(len(texts))
        rows = [torch.tensor([len(word) for word in t.split()]) for t in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)

    texts = ["a bb", "", "ccc a a a", "bb"]
    found = [t.tolist() for t in tokenize_each(texts, tokenize, 0, window=3)]
    assert found == [[1, 2], [0], [3, 1, 1, 1], [2]]
    assert calls == [3, 1]


def test_predictions_appear_when_complete(tmp_path):
    path = tmp_path / "sub/p.jsonl"

    def records():
        yield {"label": "ä"}
        assert not path.exists()
        yield {"label": "b"}

    assert write_predictions(path, records()) == 2
    assert [json.loads(line)["label"] for line in path.open()] == ["ä", "b"]

    def failing():
        yield {"label": "c"}
        raise ValueError("stop")

    before = path.read_bytes()
    with pytest.raises(ValueError, match="stop"):
        write_predictions(path, failing())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1000, 33)])
def test_vectors_are_what_other_programs_read(kind, shape, tmp_path):
    path = tmp_path / f"v.{kind}"
    vectors = torch.randn(shape, dtype=torch.float64)
    assert write_vectors(path, iter(vectors)) == shape[0]
    if kind == "npy":
        found = torch.from_numpy(np.load(path))
    else:
        found = safetensors.torch.load_file(path)["vectors"]
    assert found.equal(vectors.float())


def test_vectors_of_other_lengths_and_none_are_refused(tmp_path):
    for vectors in ([torch.ones(2), torch.ones(3)], []):
        with pytest.raises(ValueError, match=r"length|no vectors"):
            write_vectors(tmp_path / "v.npy", vectors)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_safetensors_hold_ties_slices_and_facts(tmp_path):
    model = Tied()
    model.register_buffer("left", torch.arange(6.0)[:3])
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    path = tmp_path / "m.safetensors"
    info = {"classes": ["a", 3], "mean": torch.tensor([0.1, 2.5]), "more": {"x": None}}
    said = []
    export_safetensors(model, path, info, report=said.append)
    assert "(1 tied)" in said[0]
    weights, found = read_safetensors(path)
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert weights[name].equal(tensor)
    assert found["classes"] == ["a", 3]
    assert found["mean"].equal(info["mean"])
    assert found["mean"].dtype == torch.float32


def test_safetensors_of_a_tied_model_load_without_us(tmp_path):
    model, other = Tied(), Tied()
    export_safetensors(model, tmp_path / "m.safetensors", {})
    safetensors.torch.load_model(other, tmp_path / "m.safetensors")
    assert other.head.weight.equal(model.embed.weight)


def test_safetensors_errors(tmp_path):
    with pytest.raises(TypeError, match="save plain values"):
        export_safetensors(nn.Linear(1, 1), tmp_path / "m.safetensors", {"x": object()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name in ("cut", "other", "none"):
        with pytest.raises(PredictionError, match=name):
            read_safetensors(tmp_path / f"{name}.safetensors")


class Pooled(nn.Module):
    """Mean over real tokens: batch and length may have any size."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens_BT):
        real = (tokens_BT != 0).unsqueeze(-1)
        x = self.embed(tokens_BT) * real
        return self.head(x.sum(1) / real.sum(1).clamp(min=1))


def tokens(*shape):
    return torch.randint(0, 50, shape)


def test_a_program_takes_any_batch_and_length(tmp_path):
    model = Pooled()
    path = tmp_path / "m.pt2"
    said = []
    export_program(model, [tokens(2, 5), tokens(3, 7)], path, report=said.append)
    assert "same results as the model on 2 samples" in said[0]
    program = torch.export.load(path).module()
    for shape in ((1, 1), (2, 30), (17, 2)):
        inputs = tokens(*shape)
        torch.testing.assert_close(program(inputs), model(inputs))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_a_program_of_nested_inputs(tmp_path):
    class Two(nn.Module):
        def forward(self, inputs):
            return {"sum": inputs["a"] + inputs["b"][0]}

    def sample(size):
        return {"a": torch.randn(size, 3), "b": (torch.randn(size, 3),)}

    export_program(Two(), [sample(2), sample(4)], tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    inputs = sample(7)
    assert program(inputs)["sum"].equal(inputs["a"] + inputs["b"][0])


def test_what_cannot_be_exported_says_what_to_change(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Fixed(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 2)

    for model in (Branch(), Fixed()):
        with pytest.raises(PredictionError, match="no branch on values"):
            export_program(
                model, [torch.ones(2, 3), torch.ones(3, 3)], tmp_path / "m.pt2"
            )
    assert not list(tmp_path.iterdir())


def test_a_program_that_differs_is_not_kept(tmp_path, monkeypatch):
    real = torch.export.load

    def load(path):
        program = real(path)
        program.state_dict["head.bias"].data += 0.01
        return program

    monkeypatch.setattr(torch.export, "load", load)
    with pytest.raises(PredictionError, match="differs from the model on sample 0"):
        export_program(Pooled(), [tokens(2, 5), tokens(3, 7)], tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


class Counter(nn.Module):
    """The next token is the last one and one; 20 to 23 pad the vocabulary."""

    def forward(self, tokens_BT):
        self.seen = tokens_BT.shape[1]
        logits_BTV = torch.zeros(*tokens_BT.shape, 24)
        logits_BTV[..., 20:] = 100
        return logits_BTV.scatter(-1, (tokens_BT[..., None] + 1) % 20, 5.0)


def test_the_likeliest_tokens_follow_each_other():
    model = Counter()
    start = torch.tensor([3, 4])
    assert list(generate_tokens(model, start, 4, 20, context=3)) == [5, 6, 7, 8]
    assert model.seen == 3  # no more than the context
    assert list(generate_tokens(model, start, 9, 20, context=9, end=7)) == [5, 6]


def test_drawn_tokens_follow_the_logits_and_the_seed():
    def draw(seed, count=400, **options):
        generator = torch.Generator().manual_seed(seed)
        return [
            next(generate_tokens(Counter(), torch.tensor([3]), 1, 20, 9, **options))
            for _ in range(count)
            if options.setdefault("generator", generator)
        ]

    found = draw(0, temperature=1.0)
    assert found == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    share = 2.718281828**5 / (2.718281828**5 + 19)
    assert abs(found.count(4) / 400 - share) < 0.06
    assert max(found) < 20
    assert set(draw(0, temperature=1.0, top_k=1)) == {4}
    hot = draw(0, temperature=100.0)
    assert len(set(hot)) > 15


def test_without_safetensors_it_says_how_to_get_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        inference.export_safetensors(nn.Linear(1, 1), tmp_path / "m", {})
