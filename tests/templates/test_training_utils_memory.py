"""Activation checkpointing and compilation."""

import contextlib
import copy
import functools
import io
import os
import subprocess
import sys
import textwrap
import types
import weakref

import pytest
import torch
from torch import nn

from templates import training_utils
from templates.training_utils import (
    CheckpointedModel,
    ModelEMA,
    compile_model_if_available,
    convert_to_fp8,
    enable_gradient_checkpointing,
)

MODES = ["full", "selective", "offload"]


class Block(nn.Module):
    """Attention, dropout, and an MLP; counts its forwards. x_BTD -> x_BTD."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.3, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.calls = 0

    def forward(self, x, *, scale=1.0, mask=None):
        if not torch.compiler.is_compiling():
            self.calls += 1
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + nn.functional.dropout(self.mlp(x), 0.3, self.training) * scale
        return x if mask is None else x * mask


class Stack(nn.Module):
    """Blocks in a list between an embedding and a head. tokens_BT -> logits_BC."""

    def __init__(self, blocks: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, scale=0.5, mask=torch.ones(x.shape[1], 1))
        return self.head(x.mean(1))


class ConvStack(nn.Module):
    """Residual blocks with BatchNorm. x_BCL -> y_BCL."""

    def __init__(self, momentum: float | None = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.stage = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(4, 4, 3, padding=1),
                    nn.BatchNorm1d(4, momentum=momentum),
                    nn.ReLU(),
                )
                for _ in range(3)
            )
        )

    def forward(self, x):
        return self.stage(x)


TOKENS = torch.arange(12).view(3, 4) % 11


def train_step(model, inputs=TOKENS, autocast=None):
    """Return loss, gradients, buffers and the next random number of one step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(inputs).square().mean()
    loss.backward()
    return (
        loss.detach(),
        {name: p.grad.clone() for name, p in model.named_parameters()},
        {name: b.clone() for name, b in model.named_buffers()},
        torch.rand(1),
    )


def assert_same_step(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **({"rtol": 0, "atol": 0} | tolerance))


def count_calls(blocks, run) -> list[int]:
    for block in blocks:
        block.calls = 0
    run()
    return [block.calls for block in blocks]


# --- CheckpointedModel ----------------------------------------------------------------


def count_backward_recomputes(layers, x) -> list[int]:
    calls = [0] * len(layers)

    def count(index, *_):
        calls[index] += 1

    handles = [
        layer.register_forward_pre_hook(functools.partial(count, index))
        for index, layer in enumerate(layers)
    ]
    train_step(x[0], x[1])
    for handle in handles:
        handle.remove()
    return calls


def dropout_layers(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4))
        for _ in range(count)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("segments", [1, 4, 20])
def test_checkpointed_model_equals_the_plain_run(count, segments):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    plain = CheckpointedModel(dropout_layers(count))
    checkpointed = CheckpointedModel(dropout_layers(count), True, segments)
    assert_same_step(train_step(checkpointed, x), train_step(plain, x))
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    checkpointed.eval()
    plain.eval()
    assert torch.equal(checkpointed(x), plain(x))


def test_checkpointed_model_without_layers_is_the_identity():
    x = torch.randn(2, 3)
    assert CheckpointedModel(nn.ModuleList(), use_checkpointing=True)(x) is x


def test_checkpointed_model_recomputes_all_but_the_last_segment():
    layers = dropout_layers(9)
    model = CheckpointedModel(layers, use_checkpointing=True, checkpoint_segments=4)
    calls = count_backward_recomputes(layers, (model, torch.randn(5, 6)))
    assert calls == [2] * 6 + [1] * 3
    model.use_checkpointing = False
    calls = count_backward_recomputes(layers, (model, torch.randn(5, 6)))
    assert calls == [1] * 9


def test_checkpointed_model_refuses_no_segments():
    with pytest.raises(ValueError, match="checkpoint_segments=0"):
        CheckpointedModel(nn.ModuleList(), checkpoint_segments=0)


# --- enable_gradient_checkpointing ----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_checkpointing_equals_the_plain_run(mode, autocast):
    model = enable_gradient_checkpointing(Stack(), mode)
    got = train_step(model, autocast=autocast)
    assert_same_step(got, train_step(Stack(), autocast=autocast))


def test_checkpointing_recomputes_in_training_only():
    model = Stack()
    assert enable_gradient_checkpointing(model) is model
    assert count_calls(model.blocks, lambda: train_step(model)) == [2, 2, 2]
    with torch.no_grad():
        assert count_calls(model.blocks, lambda: model(TOKENS)) == [1, 1, 1]
    model.eval()
    run = functools.partial(lambda: model(TOKENS).mean().backward())
    assert count_calls(model.blocks, run) == [1, 1, 1]


def test_checkpointing_keeps_fewer_tensors_for_backward():
    def kept_bytes(model):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(TOKENS)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = sum(
            t.untyped_storage().nbytes()
            for pointer, t in storages.items()
            if pointer not in weights
        )
        del output
        return kept

    full, plain = (
        kept_bytes(enable_gradient_checkpointing(Stack(6))),
        kept_bytes(Stack(6)),
    )
    assert full < plain / 4


def test_selective_checkpointing_does_not_repeat_matrix_products():
    def products(mode):
        model = Stack()
        if mode:
            enable_gradient_checkpointing(model, mode)
        counter = CountProducts()
        with counter:
            train_step(model)
        return counter.products

    plain, full, selective = products(None), products("full"), products("selective")
    assert selective == plain < full


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        )
        return func(*args, **(kwargs or {}))


def test_a_second_call_changes_the_mode_and_does_not_nest():
    model = Stack()
    blocks = list(model.blocks)
    enable_gradient_checkpointing(model)
    block_class = type(blocks[0])
    enable_gradient_checkpointing(model, "selective")
    enable_gradient_checkpointing(model, "full")
    assert type(blocks[0]) is block_class
    assert block_class.__mro__[1] is Block
    assert count_calls(blocks, lambda: train_step(model)) == [2, 2, 2]
    assert_same_step(train_step(model), train_step(Stack()))


def test_checkpointing_leaves_names_classes_and_copies_alone():
    plain, model = Stack(), enable_gradient_checkpointing(Stack())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]
    assert all(isinstance(block, Block) for block in model.blocks)
    twin = copy.deepcopy(model)
    expected = train_step(plain)
    assert_same_step(train_step(twin), expected)
    assert count_calls(twin.blocks, lambda: train_step(twin)) == [2, 2, 2]
    assert count_calls(model.blocks, lambda: train_step(twin)) == [0, 0, 0]
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert_same_step(train_step(loaded), expected)
    assert count_calls(loaded.blocks, lambda: train_step(loaded)) == [2, 2, 2]


def test_averages_of_a_checkpointed_model_follow_it():
    model = enable_gradient_checkpointing(Stack())
    ema = ModelEMA(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    average = dict(ema.ema_model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(average[name], p - 0.5)
    assert ema(TOKENS).shape == (3, 3)
    assert count_calls(model.blocks, lambda: ema(TOKENS)) == [0, 0, 0]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mode", MODES)
def test_batchnorm_statistics_count_a_batch_once(mode, momentum):
    x = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(2))
    plain = ConvStack(momentum)
    model = enable_gradient_checkpointing(ConvStack(momentum), mode)
    statistics = [id(b) for b in model.buffers()]
    for _ in range(3):
        assert_same_step(train_step(model, x), train_step(plain, x))
    assert model.stage[0][1].num_batches_tracked == 3
    assert [id(b) for b in model.buffers()] == statistics


def find(model: nn.Module) -> list[str]:
    enable_gradient_checkpointing(model)
    return [n for n, m in model.named_modules() if hasattr(m, "_checkpoint_mode")]


def test_blocks_are_found_in_the_usual_models():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert find(nn.TransformerEncoder(layer, 2)) == ["layers.0", "layers.1"]
    gpt = nn.Module()
    gpt.transformer = nn.ModuleDict({"h": nn.ModuleList([Block(), Block()])})
    assert find(gpt) == ["transformer.h.0", "transformer.h.1"]
    # The outer list counts; a block's own list stays as it is.
    assert find(ConvStack()) == ["stage.0", "stage.1", "stage.2"]
    # Two different halves are no repeated blocks, but each may have some.
    halves = nn.Sequential(ConvStack(), nn.TransformerEncoder(layer, 2))
    assert find(halves) == [
        "0.stage.0",
        "0.stage.1",
        "0.stage.2",
        "1.layers.0",
        "1.layers.1",
    ]


def test_without_blocks_the_error_says_what_to_pass():
    with pytest.raises(ValueError, match=r"Sequential has no .* blocks=\[model.layer1"):
        enable_gradient_checkpointing(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has no"):
        enable_gradient_checkpointing(Stack(), blocks=[])
    with pytest.raises(ValueError, match="mode='some'"):
        enable_gradient_checkpointing(Stack(), "some")


def test_blocks_can_be_chosen():
    model = Stack()
    enable_gradient_checkpointing(model, blocks=model.blocks[:2])
    assert count_calls(model.blocks, lambda: train_step(model)) == [2, 2, 1]
    assert_same_step(train_step(model), train_step(Stack()))


class HuggingFaceLike(nn.Module):
    """The part of transformers' PreTrainedModel that matters here."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.checkpoint = functools.partial(
            torch.utils.checkpoint.checkpoint, **gradient_checkpointing_kwargs
        )

    def forward(self, x):
        for layer in self.layers:
            x = self.checkpoint(layer.__call__, x)
        return x


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_hugging_face_models_checkpoint_themselves(mode):
    model = HuggingFaceLike()
    assert enable_gradient_checkpointing(model, mode) is model
    assert model.checkpoint.keywords["use_reentrant"] is False
    assert all(type(layer) is Block for layer in model.layers)
    x = torch.randn(2, 3, 8)  # needs no gradient: the reentrant kind would lose ours
    run = functools.partial(train_step, model, x)
    assert count_calls(model.layers, run) == [2, 2]


def test_a_transformers_model_offloads_its_own_blocks():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}

    def make():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))

    def step(model):
        return train_step(lambda_model(model))

    def lambda_model(model):
        wrapper = nn.Module()
        wrapper.model = model
        wrapper.forward = lambda tokens: model(tokens).logits
        return wrapper

    plain, model = make(), enable_gradient_checkpointing(make(), "offload")
    assert all(hasattr(block, "_checkpoint_mode") for block in model.transformer.h)
    assert_same_step(step(model), step(plain))


class FakeCuda:
    """Stands in for torch.cuda's streams; writes down what was asked of it."""

    def __init__(self, monkeypatch):
        self.calls = calls = []
        fake = self

        class Stream:
            def __init__(self, device):
                self.device = device

            def wait_stream(self, other):
                calls.append(f"copy stream waits for {other}")

            def record_event(self):
                calls.append("event")
                return "event"

        class Current:
            def wait_event(self, event):
                calls.append(f"wait for {event}")

            def __str__(self):
                return "current"

        real_empty = torch.empty_like

        def empty_like(tensor, device, pin_memory):
            assert (device, pin_memory) == ("cpu", True)
            return real_empty(tensor)

        monkeypatch.setattr(training_utils, "OFFLOADED_DEVICES", ("cpu",))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
        monkeypatch.setattr(torch.cuda, "stream", fake.entered)
        monkeypatch.setattr(torch, "empty_like", empty_like)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda t, s: calls.append("record stream")
        )
        training_utils._offload_stream.cache_clear()

    @contextlib.contextmanager
    def entered(self, stream):
        self.calls.append("copy")
        yield


def test_offloading_leaves_no_block_input_on_the_device(monkeypatch):
    """The fake device's memory is what still lives of the blocks' inputs."""

    def living_inputs(mode):
        model = enable_gradient_checkpointing(Stack(4), mode).train()
        inputs = []
        for block in model.blocks:
            block.register_forward_pre_hook(
                lambda block, args: inputs.append(weakref.ref(args[0]))
            )
        loss = model(TOKENS).square().mean()
        alive = sum(reference() is not None for reference in inputs)
        loss.backward()
        return alive

    assert living_inputs("full") == 4
    FakeCuda(monkeypatch)
    assert living_inputs("offload") == 0


def test_offloading_copies_beside_the_computing_and_equals_the_plain_run(monkeypatch):
    expected = train_step(Stack(2))
    fake = FakeCuda(monkeypatch)
    model = enable_gradient_checkpointing(Stack(2), "offload")
    got = train_step(model)
    assert_same_step(got, expected)
    there = ["copy stream waits for current", "copy", "record stream", "event"]
    assert fake.calls == there * 2 + ["wait for event"] * 2


def test_offloading_takes_activations_by_keyword_and_leaves_masks(monkeypatch):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

        def forward(self, mask, *, x, scale):
            return x + self.mlp(x) * mask * scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.input = nn.Linear(8, 8)
            self.blocks = nn.ModuleList([ByKeyword(), ByKeyword()])

        def forward(self, x):
            x, mask = self.input(x), torch.ones(8)
            for block in self.blocks:
                x = block(mask, scale=0.5, x=x)
            return x

    x = torch.randn(4, 8)
    expected = train_step(Model(), x)
    fake = FakeCuda(monkeypatch)
    model = enable_gradient_checkpointing(Model(), "offload")
    assert_same_step(train_step(model, x), expected)
    assert fake.calls.count("copy") == 2  # the masks are not copied


@pytest.mark.gpu
def test_offloading_frees_a_real_gpus_memory_and_equals_the_plain_run():
    x = torch.randn(256, 4, 512, device="cuda")

    def run(mode):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(512, 8, 1024, dropout=0.1)
        model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).cuda()
        model = nn.Sequential(nn.Linear(512, 512).cuda(), model).train()
        if mode:
            enable_gradient_checkpointing(model, mode)
        torch.manual_seed(5)
        before = torch.cuda.memory_allocated()
        loss = model(x).square().mean()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, [p.grad.clone() for p in model.parameters()]

    (_, expected), (full, _), (offload, got) = map(run, (None, "full", "offload"))
    assert offload < full - 5 * x.nbytes
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# --- fp8 ------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


class WideBlock(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.Linear(48, width))
        self.gate = nn.Linear(width, 3)


class WideStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 64)
        self.blocks = nn.ModuleList(WideBlock() for _ in range(2))


def fake_fp8_machine(monkeypatch, capability=(9, 0), installed=True) -> list:
    converted = []

    class Config:
        def __init__(self, **options):
            self.options = options

    def convert(model, module_filter_fn, config):
        assert config.options == {"pad_inner_dim": True}
        converted.extend(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module_filter_fn(module, name)
        )

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    float8 = types.ModuleType("torchao.float8")
    float8.Float8LinearConfig, float8.convert_to_float8_training = Config, convert
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)
    monkeypatch.setattr(
        training_utils, "find_spec", lambda name: object() if installed else None
    )
    return converted


@pytest.mark.parametrize(
    ("device", "capability", "installed", "reason"),
    [
        (torch.device("cpu"), (9, 0), True, "the device is cpu"),
        (torch.device("mps"), (9, 0), True, "the device is mps"),
        (GPU, (8, 6), True, "compute capability 8.6"),
        (GPU, (8, 9), False, "pip install torchao"),
    ],
)
def test_fp8_stays_off_with_one_line(
    monkeypatch, device, capability, installed, reason
):
    converted = fake_fp8_machine(monkeypatch, capability, installed)
    lines = []
    assert convert_to_fp8(WideStack(), device, lines.append) is False
    assert converted == []
    assert len(lines) == 1
    assert lines[0].startswith("fp8 is off: ")
    assert reason in lines[0]


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_fp8_takes_the_blocks_layers_of_fitting_width(monkeypatch, capability):
    converted = fake_fp8_machine(monkeypatch, capability)
    lines = []
    assert convert_to_fp8(WideStack(), GPU, lines.append) is True
    assert converted == [f"blocks.{i}.mlp.{j}" for i in (0, 1) for j in (0, 1)]
    assert lines == ["fp8: 4 Linear layers"]


def test_fp8_without_blocks_leaves_the_last_layer_alone(monkeypatch):
    converted = fake_fp8_machine(monkeypatch)
    layers = [nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 16)]
    assert convert_to_fp8(nn.Sequential(*layers), GPU, lambda line: None)
    assert converted == ["0"]


def test_fp8_without_fitting_layers_says_so(monkeypatch):
    converted = fake_fp8_machine(monkeypatch)
    lines = []
    assert not convert_to_fp8(Stack(), GPU, lines.append)  # its widths are 8
    assert converted == []
    assert "divisible by 16" in lines[0]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_dropout_repeats_on_a_real_gpu_when_tensors_come_by_keyword(mode):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

        def forward(self, *, x):
            return x + self.mlp(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([ByKeyword(), ByKeyword()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x=x)
            return x

    x = torch.randn(64, 8, device="cuda")
    model = enable_gradient_checkpointing(Model().cuda(), mode)
    got, expected = train_step(model, x), train_step(Model().cuda(), x)
    assert_same_step(got, expected)


# --- compile_model_if_available -------------------------------------------------------


def use_backend(monkeypatch, backend) -> None:
    real = torch.compile
    torch._dynamo.reset()

    def compile_with(function, mode, dynamic):
        return real(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_with)


def broken_backend(graph, inputs):
    raise ValueError("no such instruction")


class CountingBackend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


class Noisy(nn.Module):
    """Draws, updates a buffer and breaks the graph before it goes on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(nn.functional.dropout(x, 0.5, self.training))


def fails_from(call: int):
    """Return a backend that compiles until its call number `call`."""
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        if len(calls) >= call:
            raise ValueError("no such instruction")
        return graph.forward

    return backend


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_compilation_falls_back_for_good_within_the_call(monkeypatch, call):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    expected = train_step(Noisy(), x)
    use_backend(monkeypatch, fails_from(call))
    reports = []
    model = compile_model_if_available(Noisy(), report=reports.append)
    # The second backend call fails after half of the forward has run.
    assert_same_step(train_step(model, x), expected)
    assert_same_step(train_step(model, x)[1], train_step(Noisy(), x)[1], atol=1e-6)
    assert len(reports) == 1
    assert "staying eager" in reports[0]
    assert "no such instruction" in reports[0]
    assert "\n" not in reports[0]


def test_a_later_recompilation_that_fails_falls_back_too(monkeypatch):
    use_backend(monkeypatch, fails_from(2))
    model, reports = nn.Linear(4, 2), []
    compile_model_if_available(model, report=reports.append)
    model(torch.randn(3, 4))
    assert reports == []
    x = torch.randn(5, 4)  # another shape compiles anew
    torch.testing.assert_close(
        model(x), nn.functional.linear(x, model.weight, model.bias)
    )
    assert len(reports) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        lambda: nn.Linear(4, 4),
        lambda: Noisy().first,
    ],
)
def test_models_of_plain_torch_layers_are_really_compiled(monkeypatch, make):
    """`model.compile()` leaves a root that is a class of torch.nn eager."""
    backend = CountingBackend()
    use_backend(monkeypatch, backend)
    model = make()
    keys = list(model.state_dict())
    assert compile_model_if_available(model) is model
    model(torch.randn(2, 4))
    model(torch.randn(2, 4))
    assert backend.graphs == 1
    assert list(model.state_dict()) == keys


def test_each_model_has_its_own_recompile_limit(monkeypatch):
    backend = CountingBackend()
    use_backend(monkeypatch, backend)
    for width in range(1, 13):  # more models than the limit of 8
        compile_model_if_available(nn.Linear(width, width))(torch.randn(2, width))
    assert backend.graphs == 12


def test_the_users_own_error_is_not_swallowed(monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x, fail):
            if fail:
                raise KeyError("my own")
            return x + 1

    use_backend(monkeypatch, "eager")
    reports = []
    model = compile_model_if_available(Wrong(), report=reports.append)
    with pytest.raises(KeyError, match="my own"):
        model(torch.ones(2), True)
    shapes = compile_model_if_available(nn.Linear(4, 2), report=reports.append)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|must match"):
        shapes(torch.ones(2, 5))
    assert reports == []
    assert model._compiled_call_impl is not None
    assert shapes._compiled_call_impl is not None
    torch.testing.assert_close(model(torch.ones(2), False), torch.full((2,), 2.0))


@pytest.mark.parametrize("while_compiling", [True, False])
def test_out_of_memory_is_not_swallowed(monkeypatch, while_compiling):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def backend(graph, inputs):
        return out_of_memory() if while_compiling else out_of_memory

    use_backend(monkeypatch, backend)
    reports = []
    model = compile_model_if_available(nn.Linear(4, 2), report=reports.append)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        model(torch.ones(2, 4))
    assert reports == []
    assert model._compiled_call_impl is not None


def test_where_compiling_is_not_supported_the_model_stays_eager(monkeypatch):
    def refuse(function, mode, dynamic):
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", refuse)
    reports = []
    model = compile_model_if_available(nn.Linear(2, 2), report=reports.append)
    assert model(torch.ones(1, 2)).shape == (1, 2)
    assert "not supported on Python 3.99" in reports[0]


def test_an_unknown_mode_is_the_callers_mistake():
    with pytest.raises(RuntimeError, match="Unrecognized mode=fastest"):
        compile_model_if_available(nn.Linear(2, 2), mode="fastest")


def test_copies_of_a_compiled_model_run_eagerly(monkeypatch):
    backend = CountingBackend()
    use_backend(monkeypatch, backend)
    model = compile_model_if_available(nn.Linear(4, 4))
    ema = ModelEMA(model, decay=0.0)
    x = torch.randn(2, 4)
    ema.update(model)
    assert torch.equal(ema(x), model(x))
    assert backend.graphs == 1


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_and_compiling_together_equal_eager(monkeypatch, mode):
    use_backend(monkeypatch, "aot_eager_decomp_partition")
    reports = []
    model = enable_gradient_checkpointing(WithoutDropout(), mode)
    compile_model_if_available(model, report=reports.append)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    plain = WithoutDropout()
    for _ in range(2):
        got, expected = train_step(model, x), train_step(plain, x)
        assert_same_step(got, expected, rtol=1e-5, atol=1e-6)
    assert reports == []


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_blocks_with_keywords_compile_into_one_graph(monkeypatch, mode):
    backend = CountingBackend()
    use_backend(monkeypatch, backend)
    model = enable_gradient_checkpointing(Stack(), mode)
    compile_model_if_available(model)
    train_step(model)
    assert backend.graphs == 1
    model.eval()
    torch.testing.assert_close(model(TOKENS), Stack().eval()(TOKENS))


def test_checkpointed_model_compiles_into_one_graph(monkeypatch):
    backend = CountingBackend()
    use_backend(monkeypatch, backend)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
    x = torch.randn(5, 6)
    expected = train_step(CheckpointedModel(layers), x)[:2]
    model = CheckpointedModel(layers, use_checkpointing=True)
    compile_model_if_available(model)
    assert_same_step(train_step(model, x)[:2], expected)
    assert backend.graphs == 1


class WithoutDropout(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_without_a_compiler_the_first_call_falls_back(tmp_path):
    program = """
        import torch
        from torch import nn
        from templates.training_utils import compile_model_if_available

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        x = torch.randn(2, 4)
        torch.manual_seed(1)
        expected = model(x)
        reports = []
        compile_model_if_available(model, report=reports.append)
        torch.manual_seed(1)
        assert torch.equal(model(x), expected)
        after = torch.rand(1)
        torch.manual_seed(1)
        model(x)
        assert torch.equal(torch.rand(1), after)
        print(len(reports), reports[0])
    """
    environment = os.environ | {
        "CXX": "/nonexistent",
        "PATH": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 torch.compile failed, staying eager: ")


def has_compiler() -> bool:
    import shutil

    return bool(shutil.which(os.environ.get("CXX", "g++")))


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_real_compiled_model_gives_eagers_results():
    torch._dynamo.reset()
    model, reports = nn.Linear(3, 2), []
    x = torch.randn(2, 3)
    expected = model(x)
    compile_model_if_available(model, mode="default", report=reports.append)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert reports == []
    assert model._compiled_call_impl is not None


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compiled_loss_keeps_no_logits_in_fp32():
    torch._dynamo.reset()
    logits = torch.randn(64, 500).bfloat16().requires_grad_()
    targets = torch.randint(0, 500, (64,))
    targets[:5] = -100
    loss_function = nn.CrossEntropyLoss()

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        """The loss, the gradient, and the fp32 values that backward waits for."""
        kept = []
        logits.grad = None
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t) or t, lambda t: t
            ),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = loss_function(logits, targets)
        loss.backward()
        wide = sum(t.numel() for t in kept if t.dtype is torch.float32)
        return loss, logits.grad, wide

    eager_loss, eager_gradient, eager_wide = run()
    compile_model_if_available(loss_function, mode="default")
    loss, gradient, wide = run()
    assert wide < 500 < logits.numel() <= eager_wide
    torch.testing.assert_close(loss, eager_loss)
    torch.testing.assert_close(gradient, eager_gradient)


@pytest.mark.gpu
def test_a_real_compiled_training_step_on_a_gpu():
    torch._dynamo.reset()
    reports = []
    x = torch.randn(5, 6, device="cuda")
    expected = train_step(WithoutDropout().cuda(), x)
    model = enable_gradient_checkpointing(WithoutDropout().cuda())
    compile_model_if_available(model, report=reports.append)
    for _ in range(3):  # the third call replays a CUDA graph
        got = train_step(model, x)
        assert_same_step(got[:2], expected[:2], rtol=1e-3, atol=1e-4)
    assert reports == []


@pytest.mark.parametrize("mode", MODES[:1])
def test_backward_may_run_twice_through_a_checkpointed_block(mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
    )
    enable_gradient_checkpointing(model, mode)
    loss = model.train()(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
