"""Recovery from out of memory, explanations of errors, and clean stops."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from templates.error_handlers import (
    InsufficientMemoryError,
    SafeTrainingContext,
    allocate_optimizer_state,
    clear_memory,
    handle_cuda_error,
    handle_data_loading_error,
    is_out_of_memory,
    step_with_oom_recovery,
    train_with_oom_recovery,
    wait_for_memory,
)
from templates.optimizers import build_adafactor, build_adamw, build_muon, build_sgd

CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "8.00 GiB of which 1.00 GiB is free."
)


def silent(message: str) -> None:
    pass


# --- is_out_of_memory -----------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_OOM),
        torch.cuda.OutOfMemoryError(CUDA_OOM),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: "
            "1.00 GiB, max allowed: 9.07 GiB). Tried to allocate 1 GiB on private pool."
        ),
        RuntimeError("Invalid buffer size: 58.07 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough "
            "memory: you tried to allocate 40000000000 bytes."
        ),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
        ),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_allocation_failures_are_recognised(error):
    assert is_out_of_memory(error)


def test_real_cpu_allocation_failures_are_recognised():
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(10**15)
    assert is_out_of_memory(torch_error.value)
    np = pytest.importorskip("numpy")
    with pytest.raises(MemoryError) as numpy_error:
        np.zeros(10**15)
    assert is_out_of_memory(numpy_error.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("column 'CUDA out of memory' is missing"),
        KeyError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


# --- clear_memory ---------------------------------------------------------------------


def test_clear_memory_collects_cycles():
    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.tensor, node.itself = torch.zeros(1), node
        tensor = weakref.ref(node.tensor)
        del node
        assert tensor() is not None
        clear_memory()
        assert tensor() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("used", [True, False])
def test_clear_memory_empties_the_cache_of_a_gpu_in_use_only(monkeypatch, used):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    clear_memory()
    assert calls == (["synchronize", "empty_cache"] if used else [])


# --- train_with_oom_recovery ----------------------------------------------------------


def fails_above(limit: int, tried: list[int]):
    def train(batch_size: int) -> str:
        tried.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return f"trained with {batch_size}"

    return train


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((100,), [100, 50, 25, 12, 6, 1]),
        ((100, 10), [100, 50, 25, 12, 10]),
        ((12, 8), [12, 8]),
        ((64, 1, 1), [64, 1]),
        ((64, 1, 0), [64]),
        ((3,), [3, 1]),
        ((5, 5), [5]),
        ((4096, 3, 3), [4096, 2048, 1024, 3]),
    ],
)
def test_recovery_ends_at_exactly_the_smallest_size(arguments, sizes):
    tried, reports, resets = [], [], []
    with pytest.raises(InsufficientMemoryError, match="at every batch size") as raised:
        train_with_oom_recovery(
            fails_above(0, tried),
            *arguments,
            on_retry=resets.append,
            report=reports.append,
        )
    assert tried == sizes
    assert resets == sizes[1:]
    assert len(reports) == len(sizes) - 1
    assert f"({', '.join(map(str, sizes))};" in str(raised.value)
    assert "Tried to allocate 2.00 GiB" in str(raised.value)
    assert "gradient checkpointing" in str(raised.value)


def test_recovery_waits_with_the_smallest_size_for_others_to_free_memory(monkeypatch):
    pauses, tried, reports, resets = [], [], [], []
    monkeypatch.setattr("time.sleep", pauses.append)

    def fit_after_three_pauses(size):
        tried.append(size)
        if len(pauses) < 3:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return "trained"

    options = {"patience": 3, "on_retry": resets.append, "report": reports.append}
    assert train_with_oom_recovery(fit_after_three_pauses, 4, **options) == "trained"
    assert tried == [4, 2, 1, 1, 1, 1]
    assert pauses == [0, 0.25, 0.5]
    assert resets == tried[1:]
    assert reports[-1].startswith("Out of memory at batch size 1, trying 1: CUDA out")
    pauses.clear()
    with pytest.raises(InsufficientMemoryError, match=r"\(1; min_batch_size=1"):
        train_with_oom_recovery(
            fit_after_three_pauses, 1, patience=2, report=reports.append
        )
    assert pauses == [0, 0.25]


def test_recovery_tries_each_larger_size_again_where_asked():
    tried, resets = [], []

    def fit_at_the_second_call_with_two(size):
        tried.append(size)
        if tried.count(2) < 2:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return size

    options = {"repeat": 1, "on_retry": resets.append, "report": lambda line: None}
    assert train_with_oom_recovery(fit_at_the_second_call_with_two, 8, **options) == 2
    assert tried == [8, 8, 4, 4, 2, 2]
    assert resets == tried[1:]
    tried.clear()
    with pytest.raises(InsufficientMemoryError, match=r"\(3, 1; min_batch_size=1"):
        train_with_oom_recovery(fit_at_the_second_call_with_two, 3, **options)
    assert tried == [3, 3, 1]


def test_waiting_for_memory_repeats_what_failed_and_gives_up(monkeypatch):
    pauses, reports = [], []
    monkeypatch.setattr("time.sleep", pauses.append)

    def fit_after_two_pauses():
        if len(pauses) < 2:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return "there"

    options = {"patience": 2, "report": reports.append}
    assert wait_for_memory("it", fit_after_two_pauses, **options) == "there"
    assert pauses == [0, 0.25]
    assert all(r.startswith("Out of memory for it, trying again") for r in reports)
    pauses.clear()
    with pytest.raises(InsufficientMemoryError, match=r"for it, 2 times: .*2\.00 GiB"):
        wait_for_memory("it", fit_after_two_pauses, **(options | {"patience": 1}))
    with pytest.raises(ZeroDivisionError):
        wait_for_memory("it", lambda: 1 / 0)


OPTIMIZERS = {
    "adamw": partial(build_adamw, learning_rate=1e-2, weight_decay=0.1),
    "sgd": partial(build_sgd, learning_rate=1e-2, weight_decay=0.1),
    "muon": partial(build_muon, learning_rate=1e-2, weight_decay=0.1),
    "adafactor": partial(build_adafactor, learning_rate=1e-2, weight_decay=0.1),
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
    "loop": lambda model: torch.optim.SGD(
        model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=False
    ),
}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    )


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (32,), generator=generator)
    nn.functional.cross_entropy(model(ids), ids % 4).backward()


def train_a_little(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    for seed in range(5):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_beforehand_is_what_the_first_step_would_make(name):
    lazy, eager = small_model(), small_model()
    optimizer = OPTIMIZERS[name](eager)
    parameters = list(eager.parameters())
    before = [parameter.clone() for parameter in parameters]
    settings = [
        {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    real = optimizer.step
    optimizer.state[parameters[0]]["step"] = torch.tensor(3.0)  # of a try that failed

    def fail_after_a_step():
        real()
        raise torch.OutOfMemoryError(CUDA_OOM)

    optimizer.step = fail_after_a_step
    with pytest.raises(torch.OutOfMemoryError):
        allocate_optimizer_state(optimizer)
    optimizer.step = real
    allocate_optimizer_state(optimizer)
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
    assert settings == [
        {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    held = {
        value.data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    }
    trained = train_a_little(eager, optimizer)
    wanted = train_a_little(lazy, OPTIMIZERS[name](lazy))
    for key, value in wanted.items():
        assert torch.equal(value, trained[key]), key
    assert held == {
        value.data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    }  # the steps have made nothing more


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_repeated_only_if_it_has_written_nothing(name, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model, undisturbed = small_model(), small_model()
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](undisturbed)
    for pair in ((model, optimizer), (undisturbed, other)):
        allocate_optimizer_state(pair[1])
        backward(pair[0], seed=0)
    real, calls = optimizer.step, []

    def fail_before_the_second_call():
        calls.append(1)
        if len(calls) < 3:
            raise torch.OutOfMemoryError(CUDA_OOM)
        real()

    step_with_oom_recovery(optimizer, fail_before_the_second_call, report=silent)
    other.step()
    for one, two in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(one, two)

    def fail_after_the_update():
        real()
        raise torch.OutOfMemoryError(CUDA_OOM)

    if name == "sgd":  # one fused kernel, which takes no memory
        return
    with pytest.raises(InsufficientMemoryError, match="the last state that was saved"):
        step_with_oom_recovery(optimizer, fail_after_the_update, report=silent)


def test_recovery_returns_the_result_of_the_first_size_that_fits():
    tried, reports = [], []
    result = train_with_oom_recovery(fails_above(30, tried), 100, report=reports.append)
    assert result == "trained with 25"
    assert tried == [100, 50, 25]
    assert reports[0].startswith("Out of memory at batch size 100, trying 50: CUDA out")


def test_recovery_reaches_a_smallest_size_that_halving_would_jump_over():
    tried = []
    train_with_oom_recovery(fails_above(3, tried), 10, min_batch_size=3, report=silent)
    assert tried == [10, 5, 3]


@pytest.mark.parametrize("make_cycle", [False, True])
def test_what_the_failed_try_held_is_freed_before_the_next(make_cycle):
    held: list[weakref.ref] = []
    alive: list[list[bool]] = []

    def look():
        alive.append([tensor() is not None for tensor in held])

    def forward(batch):
        activations = batch * 2
        held.append(weakref.ref(activations))
        if make_cycle:
            holder = {"tensor": activations}
            holder["itself"] = holder
        if len(activations) > 2:
            raise torch.OutOfMemoryError(CUDA_OOM)

    def train(batch_size):
        look()
        batch = torch.zeros(batch_size)
        held.append(weakref.ref(batch))
        try:
            forward(batch)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                CUDA_OOM
            ) from error  # a chain holds frames as well

    gc.disable()  # so that only the recovery itself collects
    try:
        train_with_oom_recovery(
            train, 8, on_retry=lambda size: look(), report=lambda message: look()
        )
    finally:
        gc.enable()
    # Looks: first try; then report, on_retry and the next try, twice.
    assert [any(states) for states in alive] == [False] * 7
    assert [len(states) for states in alive] == [0, 2, 2, 2, 4, 4, 4]


def test_on_retry_runs_after_memory_was_cleared(monkeypatch):
    order = []
    monkeypatch.setattr(
        "templates.error_handlers.clear_memory", lambda: order.append("cleared")
    )
    train_with_oom_recovery(
        fails_above(2, []),
        4,
        on_retry=lambda size: order.append(f"retry {size}"),
        report=silent,
    )
    assert order == ["cleared", "retry 2"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_every_other_error_passes_with_its_traceback(error):
    def broken_step(batch_size):
        raise error

    with pytest.raises(type(error)) as raised:
        train_with_oom_recovery(broken_step, 8, report=silent)
    assert raised.value is error
    assert raised.value.__cause__ is None
    frames = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert frames[-1] == "broken_step"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0,), "initial_batch_size=0"),
        ((4, 0), "min_batch_size=0"),
        ((4, 8), "min_batch_size=8"),
        ((4, 1, -1), "max_retries=-1"),
    ],
)
def test_recovery_refuses_what_cannot_be(arguments, named):
    with pytest.raises(ValueError, match=named):
        train_with_oom_recovery(fails_above(9, []), *arguments)


@pytest.mark.gpu
def test_recovery_from_a_real_gpu_running_out_of_memory():
    total = torch.cuda.get_device_properties(0).total_memory
    seen = []

    def train(batch_size):
        seen.append(torch.cuda.memory_allocated())
        keep = torch.empty(2**20, device="cuda")
        block = torch.empty(total // 2 * batch_size, dtype=torch.uint8, device="cuda")
        return keep.numel() + block.numel()

    train_with_oom_recovery(train, 4, report=silent)
    assert seen == [seen[0]] * 3


# --- handle_cuda_error ----------------------------------------------------------------

ASYNC = "\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.mark.parametrize(
    ("message", "cause", "remedy"),
    [
        (CUDA_OOM, "did not fit in memory", "micro-batch"),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
            "did not fit in memory",
            "checkpointing",
        ),
        (
            "CUDA error: device-side assert triggered" + ASYNC,
            "label >= number of classes",
            "start it again",
        ),
        (
            "CUDA error: an illegal memory access was encountered" + ASYNC,
            "outside its memory",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (
            "CUDA error: misaligned address" + ASYNC,
            "outside its memory",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (
            "CUDA error: no kernel image is available for execution on the device"
            + ASYNC,
            "architecture",
            "get_arch_list",
        ),
        (
            "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
            "cuDNN failed",
            "LD_LIBRARY_PATH",
        ),
        ("GET was unable to find an engine: cuDNN", "cuDNN failed", "smaller batch"),
        (
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
            "cuBLAS failed",
            "on the CPU",
        ),
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please "
            "update your GPU driver",
            "driver does not fit",
            "nvidia-smi",
        ),
        (
            "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
            "driver does not fit",
            "torch.version.cuda",
        ),
        (
            "Found no NVIDIA driver on your system. Please check that you have a GPU",
            "not there",
            "CUDA_VISIBLE_DEVICES",
        ),
        ("CUDA error: invalid device ordinal" + ASYNC, "not there", "device_count"),
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, "
            "OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600013 milliseconds before "
            "timing out.",
            "did not reach a collective",
            "same number of steps",
        ),
        (
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for "
            "recv operation to complete",
            "did not reach a collective",
            "same number of steps",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1970, invalid usage, NCCL version "
            "2.20.5\nncclInvalidUsage: ...\nDuplicate GPU detected : rank 1 and rank 0",
            "same GPU",
            "LOCAL_RANK",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error (run "
            "with NCCL_DEBUG=INFO for details), NCCL version 2.20\nncclSystemError",
            "NCCL failed",
            "NCCL_DEBUG=INFO",
        ),
        (
            "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.26\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'",
            "did not fit in memory",
            "micro-batch",
        ),
        (
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with "
            "multiprocessing, you must use the 'spawn' start method",
            "forked process",
            "spawn",
        ),
        (
            "Expected all tensors to be on the same device, but found at least two "
            "devices, cuda:0 and cpu!",
            "different devices",
            "model.to(device)",
        ),
        ("CUDA error: unknown error" + ASYNC, "no entry", "nvidia-smi"),
    ],
    ids=lambda text: text[:35],
)
def test_cuda_errors_are_told_apart(message, cause, remedy):
    explained = handle_cuda_error(RuntimeError(message))
    observed, cause_line, remedy_line = explained.split("\n")
    assert observed == f"RuntimeError: {message.splitlines()[0]}"
    assert cause_line.startswith("Cause: ")
    assert cause in cause_line
    assert remedy_line.startswith("Remedy: ")
    assert remedy in remedy_line


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build")
def test_the_real_error_of_a_cpu_build_is_explained():
    with pytest.raises(AssertionError) as raised:
        torch.zeros(1, device="cuda")
    assert "CPU build" in handle_cuda_error(raised.value)


def test_a_real_shape_error_is_honestly_not_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 3) @ torch.ones(2, 3)
    explained = handle_cuda_error(raised.value)
    assert explained.startswith("Not recognised as a GPU error: RuntimeError: mat1")
    assert str(raised.value) in explained


@pytest.mark.gpu
def test_a_real_device_side_assert_is_explained_and_not_hidden():
    program = """
        import torch
        from templates.error_handlers import SafeTrainingContext
        try:
            with SafeTrainingContext("cuda"):
                weights = torch.zeros(4, 4, device="cuda")
                torch.nn.functional.embedding(torch.tensor([9], device="cuda"), weights)
                torch.cuda.synchronize()
        except RuntimeError as error:
            print("seen:", str(error).splitlines()[0])
    """
    done = run_program(program)
    assert "label >= number of classes" in done.stdout
    assert "device-side assert" in done.stdout.split("seen:")[1]


# --- handle_data_loading_error --------------------------------------------------------


class Failing(Dataset):
    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.fail()


class DataError(ValueError):
    """Stands for the one of data_optimizer, which names cause and remedy itself."""


def load_with_worker(fail) -> Exception:
    loader = DataLoader(Failing(fail), num_workers=1, multiprocessing_context="fork")
    try:
        list(loader)
    except Exception as error:
        # Its frames hold the workers, which would be waited for at the next collection.
        return error.with_traceback(None)
    raise AssertionError("the worker did not fail")


def open_missing_file():
    with open("/no/such/file.csv"):
        pass


def chained_key_error():
    try:
        {}["inner"]
    except KeyError:
        raise ValueError("two\nlines") from None


def parse_bad_name():
    raise DataError("train.csv has no column 'txt': pass text_column='text'")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fail", "first_line", "said"),
    [
        (
            open_missing_file,
            "FileNotFoundError in DataLoader worker process 0: [Errno 2] No such file "
            "or directory: '/no/such/file.csv'",
            "relative path",
        ),
        (
            lambda: {}["text"],
            "KeyError in DataLoader worker process 0: 'text'",
            "read_schema",
        ),
        (
            chained_key_error,
            None,
            "ValueError in DataLoader worker process 0: two\nlines",
        ),
        (
            parse_bad_name,
            None,
            "train.csv has no column 'txt': pass text_column='text'",
        ),
        (killed, None, "main memory was full"),
        (lambda: torch.empty(10**15), None, "Cause: main memory was full"),
    ],
    ids=["file", "column", "unknown", "data error", "killed", "memory"],
)
def test_errors_of_real_workers_are_unwrapped(fail, first_line, said):
    error = load_with_worker(fail)
    explained = handle_data_loading_error(error)
    assert said in explained
    assert "Traceback" not in explained
    if first_line is not None:
        assert explained.splitlines()[0] == first_line
    if fail is parse_bad_name:
        assert explained == said
    if fail is chained_key_error:
        assert explained.startswith("Not recognised as a data loading error: ")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is "
                "possible that dataloader's workers are out of shared memory. Please "
                "try to raise your shared memory limit."
            ),
            "shared memory (/dev/shm)",
        ),
        (
            RuntimeError("unable to write to file </torch_12_345_0>: No space left"),
            "shared memory (/dev/shm)",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "main memory was full",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Segmentation fault. "
            ),
            "died without a Python error",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "died without a Python error",
        ),
        (RuntimeError("DataLoader timed out after 5 seconds"), "within the timeout"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (RuntimeError("received 0 items of ancdata"), "Too many open files"),
        (AttributeError("Can't pickle local object 'f.<locals>.<lambda>'"), "lambdas"),
        (AttributeError("Can't get local object 'f.<locals>.g'"), "lambdas"),
        (pickle.PicklingError("Can't pickle <function>"), "lambdas"),
        (
            ValueError(
                "Usecols do not match columns, columns expected but not found: ['t']"
            ),
            "A column",
        ),
        (ValueError("No match for FieldRef.Name(text) in a: int64"), "A column"),
        (KeyError('Field "text" does not exist in schema'), "A column"),
        (OSError("Corrupt snappy compressed data."), "damaged"),
        (
            OSError(
                "Couldn't deserialize thrift: don't know what type: \n"
                "Deserializing page header failed."
            ),
            "damaged",
        ),
        (
            ValueError(
                "Parquet magic bytes not found in footer. Either the file is corrupted "
                "or this is not a parquet file."
            ),
            "damaged",
        ),
        (PermissionError(13, "Permission denied"), "may not read"),
        (ModuleNotFoundError("No module named 'pyarrow'"), "not installed"),
    ],
    ids=lambda value: str(value)[:35],
)
def test_data_loading_errors_are_told_apart(error, cause):
    observed, cause_line, remedy_line = handle_data_loading_error(error).split("\n")
    assert observed.startswith(f"{type(error).__name__}: ")
    assert cause in cause_line
    assert remedy_line.startswith("Remedy: ")


def test_real_errors_of_the_file_readers_are_explained(tmp_path):
    pd = pytest.importorskip("pandas")
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    csv, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"

    def explain(read, *args, **kwargs):
        with pytest.raises(Exception) as raised:  # noqa: PT011
            read(*args, **kwargs)
        return handle_data_loading_error(raised.value)

    csv.write_text("a,b\n1,2\n1,2,3,4\n")
    assert "not what its format asks" in explain(pd.read_csv, csv)
    assert "A column" in explain(pd.read_csv, csv, usecols=["text"])
    assert "is not there" in explain(pd.read_csv, tmp_path / "no.csv")
    assert "no image" in explain(image.open, csv)
    csv.write_bytes(b"a,b\n\xff\xfe,2\n")
    assert "encoding" in explain(pd.read_csv, csv)
    for codec in ("snappy", "gzip", "lz4", "none"):
        table = pa.table({"s": [f"text {i * i}" for i in range(5000)]})
        pq.write_table(table, parquet, compression=codec)
        content = parquet.read_bytes()
        middle = len(content) // 3
        damaged = content[:middle] + b"\xff" * 400 + content[middle + 400 :]
        parquet.write_bytes(damaged)
        assert "damaged" in explain(lambda: pq.ParquetFile(parquet).read()), codec
        parquet.write_bytes(content[:middle])
        assert "damaged" in explain(pq.ParquetFile, parquet)
    assert "is not there" in explain(pq.ParquetFile, tmp_path / "no.parquet")
    assert "stacked" in explain(
        torch.utils.data.default_collate, [torch.zeros(2), torch.zeros(3)]
    )


# --- SafeTrainingContext --------------------------------------------------------------


def run_program(program: str, timeout_s: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def fail_within(context: SafeTrainingContext, error: Exception) -> None:
    with context:
        raise error


@pytest.fixture
def default_handlers():
    """Handlers as a shell's foreground job has them, whatever the test runner has."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_clean_stop(number):
    reports, steps = [], []
    with SafeTrainingContext("cpu", reports.append) as ctx:
        assert ctx.signal_number is None
        for step in range(10):
            steps.append(step)
            if step == 2:
                signal.raise_signal(number)
                assert reports == []  # the handler itself says nothing
            if ctx.should_stop:
                break
        assert ctx.should_stop
    assert steps == [0, 1, 2]
    assert ctx.signal_number == number
    assert ctx.should_stop  # still known after the block
    assert len(reports) == 1
    assert reports[0].startswith(number.name)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handlers")
def test_the_second_ctrl_c_interrupts_at_once_a_second_sigterm_does_not():
    def run():
        with SafeTrainingContext("cpu", silent) as ctx:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert ctx.should_stop
            signal.raise_signal(signal.SIGINT)
            pytest.fail("not reached")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handlers")
def test_previous_handlers_come_back_after_an_error():
    def mine(number, frame):
        pass

    signal.signal(signal.SIGTERM, mine)
    error, reports = ValueError("my own"), []
    with pytest.raises(ValueError, match="my own") as raised:
        fail_within(SafeTrainingContext("cpu", reports.append), error)
    assert raised.value is error
    assert error.__cause__ is error.__context__ is None
    assert reports == []
    assert signal.getsignal(signal.SIGTERM) is mine


@pytest.mark.usefixtures("default_handlers")
def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with SafeTrainingContext("cpu", silent) as ctx:
        signal.raise_signal(signal.SIGINT)
        assert not ctx.should_stop
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_context_can_be_entered_again_after_a_stop_of_another():
    for _ in range(2):
        with SafeTrainingContext("cpu", silent) as ctx:
            assert not ctx.should_stop


def test_outside_the_main_thread_it_works_without_signals():
    results = []

    def work():
        with SafeTrainingContext("cpu", silent) as ctx:
            results.append(ctx.should_stop)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_exception_passes_unchanged_though_the_gpu_is_dead(monkeypatch):
    def dead_gpu():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("templates.error_handlers.clear_memory", dead_gpu)
    error = RuntimeError("CUDA error: device-side assert triggered" + ASYNC)
    with pytest.raises(RuntimeError) as raised:
        fail_within(SafeTrainingContext("cuda"), error)
    assert raised.value is error


def test_an_error_that_surfaces_at_the_end_is_not_lost(monkeypatch):
    def dead_gpu():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("templates.error_handlers.clear_memory", dead_gpu)
    with (
        pytest.raises(RuntimeError, match="illegal memory access"),
        SafeTrainingContext("cuda"),
    ):
        pass


def test_memory_is_freed_at_the_end(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "templates.error_handlers.clear_memory", lambda: calls.append("cleared")
    )
    with SafeTrainingContext("cpu"):
        assert calls == []
    with pytest.raises(KeyError), SafeTrainingContext("cpu"):
        raise KeyError("x")
    assert calls == ["cleared"] * 2


WORKERS = """
    import os, signal, sys, time
    import multiprocessing
    import torch
    from torch.utils.data import DataLoader, Dataset
    from templates.error_handlers import SafeTrainingContext

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    class Pids(Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return os.getpid()

    with SafeTrainingContext("cpu", lambda message: print(message, flush=True)) as ctx:
"""


def start_program(program: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a shell's job has
    )


@pytest.mark.parametrize("to_group", [False, True])
def test_a_real_stop_with_workers_lets_the_step_finish(to_group):
    """Ctrl-C goes to the whole group: the workers must go on feeding the loop."""
    program = start_program(
        WORKERS
        + """
        loader = DataLoader(Pids(), num_workers=1, multiprocessing_context="fork")
        batches = iter(loader)
        print("pid", next(batches).item(), flush=True)
        while not ctx.should_stop:
            time.sleep(0.01)
        for _ in range(20):  # more than was fetched ahead: the worker still works
            next(batches)
    print("saved", ctx.signal_number, flush=True)
    """
    )
    try:
        worker = int(program.stdout.readline().split()[1])
        if to_group:
            os.killpg(program.pid, signal.SIGINT)
        else:
            program.send_signal(signal.SIGTERM)
        out, err = program.communicate(timeout=60)
    finally:
        program.kill()
    number = signal.SIGINT if to_group else signal.SIGTERM
    assert program.returncode == 0, err
    assert out.splitlines()[-1] == f"saved {int(number)}"
    assert out.startswith(number.name)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_children_still_die_when_they_are_told_to():
    program = """
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.2)
        child.terminate()
        child.join(20)
        print("child", child.exitcode)
        batches = iter(DataLoader(Pids(), num_workers=1, multiprocessing_context=fork))
        worker = next(batches).item()
        os.kill(worker, signal.SIGTERM)
        batches._workers[0].join(20)
        print("worker", batches._workers[0].is_alive())
        print("stopping", ctx.should_stop)
    """
    done = run_program(WORKERS + program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"child {-signal.SIGTERM}",
        "worker False",
        "stopping False",
    ]
