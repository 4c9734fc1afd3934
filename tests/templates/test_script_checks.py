"""What the tests of a training script are made of; in scripts: test_emitted_tests."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from templates.data_optimizer import StreamedRows, StreamingTextDataset
from templates.script_checks import (
    compare_values,
    cut_dataset,
    find_difference,
    find_unreached_parameters,
    out_of_memory_at_call,
    run_words,
    train_on_one_batch,
)


def test_each_kind_of_unreached_parameter_is_named():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcde"})
    model["e"].requires_grad_(False)
    x = torch.ones(1, 2)
    (model["a"](x) + 0 * model["b"](x)).sum().backward()
    model["c"].weight.grad = torch.full((2, 2), torch.inf)
    assert find_unreached_parameters(model) == {
        "b.weight": "all zeros",
        "c.weight": "not finite",
        "d.weight": "none",
    }


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"a": [1, 2]}, {"a": [1, 2]}, None),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "a/1/b: 2 and 3"),
        ({"a": 1}, {"b": 1}, "the whole: only one of them has a, b"),
        ([1], [1, 2], "the whole: 1 and 2 items"),
        (torch.ones(2), torch.ones(2), None),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), None),
        ([torch.zeros(2)], [torch.tensor([0, 0.5])], "0: differs by up to 0.5"),
        (
            torch.ones(2),
            torch.ones(2).double(),
            "the whole: torch.float32 [2] and torch.float64 [2]",
        ),
    ],
)
def test_the_first_difference_is_named(left, right, expected):
    assert find_difference(left, right) == expected


def test_differences_are_relative_to_the_tensor_but_not_to_rounding():
    left = {"large": torch.full((4,), 100.0), "noise": torch.full((4,), 1e-7)}
    right = {"large": torch.full((4,), 101.0), "noise": torch.full((4,), 2e-7)}
    difference, name = compare_values(left, right)
    assert (round(difference, 6), name) == (0.01, "large")
    assert compare_values(left, {"large": left["large"]})[0] == torch.inf


def test_out_of_memory_comes_once_and_the_hook_goes():
    model = nn.Linear(2, 2)
    with out_of_memory_at_call(model, 2) as sizes:
        model(torch.ones(4, 2))
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.ones(3, 2))
        model(torch.ones(1, 2))
    model(torch.ones(9, 2))
    assert sizes == [4, 3, 1]


def test_out_of_memory_in_a_backward_comes_when_some_gradients_are_there():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with out_of_memory_at_call(model, 2, backward=True) as sizes:
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.ones(4, 2)).sum().backward()
        model(torch.ones(3, 2)).sum().backward()
    assert sizes == [4, 3]
    reached = [p.grad is not None for p in model.parameters()]
    assert all(reached)
    fresh = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with (
        out_of_memory_at_call(fresh, 2, backward=True),
        pytest.raises(torch.OutOfMemoryError),
    ):
        fresh(torch.ones(4, 2)).sum().backward()
    assert {p.grad is None for p in fresh.parameters()} == {True, False}


def test_streamed_rows_are_cut_to_as_many(tmp_path):
    lines = "".join(f"{i},a\n" for i in range(500))
    (tmp_path / "a.csv").write_text("text,label\n" + lines)
    stream = StreamingTextDataset(tmp_path / "a.csv", shuffle=True)
    train = StreamedRows(stream.split(0.1)[0], lambda batch: batch["text"])
    few = cut_dataset(train, 40)
    loader = few.load(8)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch) for batch in batches] == [8] * 5
        epochs.append([text for batch in batches for text in batch])
    assert len(train) == 450
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1]) < {str(i) for i in range(500)}


def test_a_script_that_does_not_end_is_a_failure_that_says_what_to_do(tmp_path):
    words = [
        sys.executable,
        "-c",
        "import time; print('on', flush=True); time.sleep(9)",
    ]
    with pytest.raises(AssertionError, match=r"(?s)after 2 s: set OPTIONS.*on"):
        run_words(words, tmp_path, 2)


def test_a_dataset_is_cut_and_another_stream_is_not():
    assert list(cut_dataset([5, 6, 7], 2)) == [5, 6]
    assert len(cut_dataset([5, 6, 7], 9)) == 3

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([5, 6, 7])

    stream = Stream()
    assert cut_dataset(stream, 2) is stream


def test_training_on_one_batch_ends_when_it_is_enough():
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))

    def compute_loss(model, x, y):
        outputs = model(x)
        return nn.functional.mse_loss(outputs, y), outputs

    losses = train_on_one_batch(model, compute_loss, batch, 500, 0.05, enough=0.8)
    assert len(losses) < 500
    assert losses[-1] <= 0.8 * losses[0] < losses[-2]


def test_a_process_gives_its_code_and_both_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    source = "import os, sys; print(os.environ.get('RANK')); sys.exit('bad')"
    code, output = run_words([sys.executable, "-c", source], tmp_path, 60)
    assert code == 1
    assert "None" in output
    assert "bad" in output
