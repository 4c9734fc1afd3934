"""inference: outputs equal a plain loop, modes come back, int8 is close or refused."""

import collections
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from templates import inference
from templates.inference import (
    batch_inference,
    quantize_model_dynamic,
    stream_inference,
)

CPU = torch.device("cpu")
Output = collections.namedtuple("Output", ["logits", "hidden"])


def first(batch):
    return batch[0]


def rows(count: int = 10, width: int = 4) -> torch.Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(count + width)
    )


class Calls(nn.Module):
    """Calls a function as its forward, beside dropout and a frozen submodule."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def head(model, x):
    return model.frozen(model.dropout(model.layer(x)))


def reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    with torch.no_grad():
        expected = head(model, x)
    for name, module in model.named_modules():
        module.training = modes[name]
    return expected


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("drop_last", [False, True])
def test_tensor_batches(drop_last):
    x = rows()
    model = Calls(head)
    loader = DataLoader(x, batch_size=4, drop_last=drop_last)
    result = batch_inference(model, loader, CPU)
    torch.testing.assert_close(result, reference(model, x)[: 8 if drop_last else 10])


def test_tuple_batches_are_positional_arguments():
    x, scale = rows(), rows(width=3)
    model = Calls(lambda model, x, scale: head(model, x) * scale)
    loader = DataLoader(TensorDataset(x, scale), batch_size=4)
    torch.testing.assert_close(
        batch_inference(model, loader, CPU), reference(model, x) * scale
    )


def test_batches_of_one_column():
    x = rows()
    model = Calls(head)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    torch.testing.assert_close(batch_inference(model, loader, CPU), reference(model, x))


def test_dict_batches_are_keyword_arguments_and_dicts_come_back():
    x = rows()
    model = Calls(lambda model, x, **rest: {"y": head(model, x), "extra": rest["z"]})
    loader = [{"x": x[:6], "z": x[:6, :1]}, collections.UserDict(x=x[6:], z=x[6:, :1])]
    result = batch_inference(model, loader, CPU)
    assert list(result) == ["y", "extra"]
    torch.testing.assert_close(result["y"], reference(model, x))
    torch.testing.assert_close(result["extra"], x[:, :1])


@pytest.mark.parametrize("kind", [tuple, list, Output._make])
def test_tuple_outputs(kind):
    x = rows()
    model = Calls(lambda model, x: kind([head(model, x), {"in": x, "none": None}]))
    scores, rest = batch_inference(model, DataLoader(x, batch_size=4), CPU)
    torch.testing.assert_close(scores, reference(model, x))
    torch.testing.assert_close(rest["in"], x)
    assert rest["none"] is None


def test_prepare_and_process():
    x = rows()
    model = Calls(head)
    loader = DataLoader(TensorDataset(x, torch.arange(10)), batch_size=4)
    result = batch_inference(
        model, loader, CPU, prepare_batch=first, process_output=lambda y: y.argmax(-1)
    )
    assert torch.equal(result, reference(model, x).argmax(-1))


class Classifier(nn.Linear):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("batch", [[rows(), rows()], {"x": rows(), "labels": rows()}])
def test_targets_in_the_batch_are_explained(batch):
    with pytest.raises(ValueError, match=r"Classifier\.forward\(x\).*prepare_batch"):
        batch_inference(Classifier(4, 3), [batch], CPU)


def test_a_type_error_inside_the_model_is_left_alone():
    def fails(model, x):
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        batch_inference(Calls(fails), [rows()], CPU)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(rows(3), batch_size=4, drop_last=True), "3 samples, drop_last=Tr"),
        ([], "gave no batch"),
        (iter(()), "generator was used up"),
    ],
)
def test_an_empty_loader_is_an_error(loader, message):
    model = Calls(head)
    before = modes_of(model)
    with pytest.raises(ValueError, match=message):
        batch_inference(model, loader, CPU)
    assert modes_of(model) == before


def test_every_submodule_gets_its_mode_back():
    model = Calls(head).train()
    model.frozen.eval()
    before = modes_of(model)
    assert set(before) == {True, False}
    seen = []
    model.function = lambda model, x: seen.append(modes_of(model)) or head(model, x)
    batch_inference(model, [rows()], CPU)
    assert not any(seen[0])
    assert modes_of(model) == before


def test_modes_come_back_after_an_error_and_after_an_abandoned_stream():
    def fails(model, x):
        raise RuntimeError("boom")

    model = Calls(fails).train()
    model.frozen.eval()
    before = modes_of(model)
    with pytest.raises(RuntimeError, match="boom"):
        batch_inference(model, [rows()], CPU)
    assert modes_of(model) == before

    model.function = head
    stream = stream_inference(model, [rows(), rows()], CPU)
    assert modes_of(model) == before
    next(stream)
    assert not any(modes_of(model))
    stream.close()
    assert modes_of(model) == before


def test_results_can_be_trained_on():
    model = Calls(head)
    for result in (
        batch_inference(model, [rows()], CPU),
        next(stream_inference(model, [rows()], CPU)),
    ):
        assert not result.requires_grad
        nn.Linear(3, 1)(result).sum().backward()  # an inference tensor raises here


def test_a_stream_gives_each_batch_at_once_and_keeps_none():
    batches_given = 0
    alive = []

    def loader():
        nonlocal batches_given
        for _ in range(6):
            batches_given += 1
            yield rows()

    stream = stream_inference(Calls(head), loader(), CPU)
    for count, output in enumerate(stream, start=1):
        assert batches_given == count
        assert torch.is_inference_mode_enabled() is False
        assert torch.is_grad_enabled()
        alive.append(weakref.ref(output))
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2


def test_streamed_results_do_not_hold_the_whole_output():
    wide = Calls(lambda model, x: x.expand(10, 4).repeat(1, 1000)[:, :1])
    (output,) = stream_inference(wide, [rows()], CPU)
    assert output.untyped_storage().nbytes() == output.numel() * 4


def test_outputs_are_copies_of_a_reused_buffer():
    buffer = torch.zeros(2, 1)
    model = Calls(lambda model, x: buffer.copy_(x))
    first_out, second_out = stream_inference(
        model, [torch.ones(2, 1), torch.full((2, 1), 2.0)], CPU
    )
    assert first_out.tolist() == [[1.0], [1.0]]
    assert second_out.tolist() == [[2.0], [2.0]]


def test_the_gpu_is_not_waited_for_before_the_next_launch(monkeypatch):
    """A fake device whose copies arrive only when their event is waited for."""
    order = []

    class FakeEvent:
        def __init__(self, copy, source):
            self.copy, self.source = copy, source.clone()

        def synchronize(self):
            order.append("wait")
            with torch.inference_mode():
                self.copy.copy_(self.source)

    def start_copy(tensor, events):
        copy = torch.full_like(tensor, float("nan"))
        events.append(FakeEvent(copy, tensor))
        return copy

    monkeypatch.setattr(inference, "_start_cpu_copy", start_copy)
    x = rows()
    model = Calls(lambda model, x: order.append("launch") or head(model, x))
    result = batch_inference(model, DataLoader(x, batch_size=4), CPU)
    torch.testing.assert_close(result, reference(model, x))
    assert order == ["launch", "launch", "wait", "launch", "wait", "wait"]


def test_a_copy_from_the_gpu_is_asynchronous_and_has_an_event(monkeypatch):
    calls = []

    class FakeCudaTensor:
        is_cuda = True
        device = torch.device("cuda:1")

        def to(self, *args, **kwargs):
            calls.append((args, kwargs))
            return "copy"

    class FakeStream:
        def __init__(self, device):
            self.device = device

        def record_event(self):
            return f"event on {self.device} after {len(calls)} copy"

    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    events = []
    assert inference._start_cpu_copy(FakeCudaTensor(), events) == "copy"
    assert calls == [(("cpu",), {"non_blocking": True})]
    assert events == ["event on cuda:1 after 1 copy"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, x: x.sum(), "output is one number a batch"),
        (lambda model, x: (x, x.sum()), r"output\[1\] is one number a batch"),
        (
            lambda model, x: {"cache": object()},
            r"output\['cache'\] is <class 'object'>",
        ),
        (lambda model, x: x[:, : len(x)], "another shape in other batches"),
        (lambda model, x: (x, x[:2]), "differ in their number of rows"),
    ],
)
def test_outputs_that_cannot_be_joined_are_named(function, message):
    loader = DataLoader(rows(7), batch_size=4)
    with pytest.raises(ValueError, match=message):
        batch_inference(Calls(function), loader, CPU)


def test_lstm_states_are_not_joined_along_their_layers():
    with pytest.raises(ValueError, match="batch-first"):
        batch_inference(
            nn.LSTM(4, 3, batch_first=True), [torch.randn(8, 5, 4)] * 2, CPU
        )


# Quantization


def signal_to_noise_db(expected: torch.Tensor, actual: torch.Tensor) -> float:
    noise = (expected - actual).pow(2).sum()
    return float(10 * torch.log10(expected.pow(2).sum() / noise))


def quantized_types(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if "quantized" in str(type(m))}


class LastState(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(8, 4), {"Linear"}),
        (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), {"Linear"}),
        (LastState(nn.LSTM(8, 16, batch_first=True)), {"LSTM", "Linear"}),
        (LastState(nn.GRU(8, 8, bidirectional=True)), {"GRU", "Linear"}),
    ],
    ids=["bare Linear", "MLP", "LSTM", "GRU"],
)
def test_quantized_models_stay_close_and_leave_the_original_alone(model, expected):
    x = torch.randn(3, 5, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    quantized = quantize_model_dynamic(model)
    assert expected <= quantized_types(quantized)
    assert not any(module.training for module in quantized.modules())
    with torch.no_grad():
        assert signal_to_noise_db(model(x), quantized(x)) > 20
    assert model.training
    assert not quantized_types(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_no_warning_escapes():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model_dynamic(nn.Sequential(nn.Linear(4, 4)))
    assert [str(w.message) for w in caught] == []


def encoder(layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


def test_a_transformer_encoder_is_refused_with_a_remedy_that_works():
    model = encoder()
    with pytest.raises(ValueError, match=r"layers\.0 .and 1 more.*set_fastpath_enab"):
        quantize_model_dynamic(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        quantized = quantize_model_dynamic(model)
        x = torch.randn(2, 5, 16)
        with torch.inference_mode():
            assert signal_to_noise_db(model(x), quantized(x)) > 20
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)).bfloat16(), r"0 holds torch.bfloat16: .*float"),
        (nn.Linear(4, 4, device="meta"), r"model itself is on meta: .*\.cpu\(\)"),
        (nn.LSTM(4, 4, proj_size=2), "proj_size"),
        (
            torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "remove_parametrizations",
        ),
        (nn.Conv1d(4, 4, 3), "no nn.Linear, nn.LSTM or nn.GRU"),
    ],
    ids=["bf16", "device", "projection", "parametrized", "nothing to do"],
)
def test_what_would_break_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        quantize_model_dynamic(model)


def test_all_obstacles_are_listed_together():
    model = nn.Sequential(encoder(), nn.LSTM(4, 4, proj_size=2)).double()
    with pytest.raises(ValueError, match="cannot be quantized") as caught:
        quantize_model_dynamic(model)
    assert str(caught.value).count("\n- ") == 3


def test_a_cpu_without_int8_kernels_is_named(monkeypatch):
    class Backend:
        engine = "none"
        supported_engines = ("qnnpack", "none")

    monkeypatch.setattr(torch.backends, "quantized", Backend)
    with pytest.raises(RuntimeError, match="engine = 'qnnpack'"):
        quantize_model_dynamic(nn.Linear(4, 4))
    Backend.supported_engines = ("none",)
    with pytest.raises(RuntimeError, match="has none"):
        quantize_model_dynamic(nn.Linear(4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_on_a_real_gpu_results_equal_the_cpu(pinned):
    torch.manual_seed(0)
    x = torch.randn(1000, 64)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    loader = DataLoader(x, batch_size=7, pin_memory=pinned)
    expected = batch_inference(model, loader, CPU)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    result = batch_inference(model.to(device), loader, device)
    assert result.device == CPU
    assert not result.is_pinned()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_on_a_real_gpu_streaming_is_bounded_and_quantization_refused():
    device = torch.device("cuda")
    model = nn.Linear(1000, 1000, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch = torch.randn(1000, 1000)
    for _ in stream_inference(model, (batch for _ in range(20)), device):
        pass
    assert torch.cuda.max_memory_allocated() - before < 8 * batch.nbytes
    with pytest.raises(ValueError, match="cuda"):
        quantize_model_dynamic(model)
