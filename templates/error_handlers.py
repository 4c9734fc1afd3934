"""Error handling: recover from out of memory, explain errors, stop cleanly.

Section 6 and "Error Handling" of the guide.

    with SafeTrainingContext(device) as ctx:
        for batch in loader:
            train_step(batch)
            if ctx.should_stop:
                save_checkpoint(...)
                break
"""

import contextlib
import gc
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# How allocators say that memory ran out, where they raise no OutOfMemoryError.
OUT_OF_MEMORY_PATTERN = re.compile(
    r"(CUDA|HIP|XPU|MPS backend) out of memory"
    r"|CUDA (driver )?error: out of memory"
    r"|Cuda failure (2 )?'out of memory'"  # from inside NCCL
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|Invalid buffer size: "  # MPS, for one tensor larger than it can ever hold
    r"|_ALLOC(ATION)?_FAILED"  # cuBLAS, cuDNN, cuSOLVER, cuFFT
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may get around this error.

    True for CUDA, MPS and CPU allocation failures of PyTorch and its libraries, and for
    Python's and NumPy's MemoryError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(
        OUT_OF_MEMORY_PATTERN.search(str(error))
    )


def clear_memory() -> None:
    """Collect garbage and give cached GPU memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


class InsufficientMemoryError(RuntimeError):
    """Out of memory whatever the batch size."""


def _call_or_free(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, str]:
    """Return (result, ""), or (None, why) where memory ran out; that is free again."""
    try:
        return function(*arguments, **options), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
    # Out of the except block: its traceback held the failed try's tensors.
    clear_memory()
    return None, reason


def _seconds_to_wait(waits: int) -> float:
    return 0.25 * 2 ** (waits - 1) if waits else 0.0


def train_with_oom_recovery(
    train_fn: Callable[[int], Any],
    initial_batch_size: int,
    min_batch_size: int = 1,
    max_retries: int = 5,
    on_retry: Callable[[int], None] | None = None,
    report: Callable[[str], None] = print,
    agree: Callable[[bool], bool] | None = None,
    patience: int = 0,
    repeat: int = 0,
) -> Any:
    """Call train_fn(batch_size), with half the size after each out of memory.

    The last try is exactly min_batch_size: 100, with the defaults, gives 100, 50, 25,
    12, 6, 1. What the failed try held is freed before the next one begins. Every other
    error passes through.

    With several ranks all halve together, if `agree` tells each whether any of them
    failed. Then train_fn may exchange nothing with the other ranks, since one that
    failed is not there any more: gradients are averaged after the try that succeeded.

    Args:
        train_fn: must be safe to call again after it failed half-way.
        initial_batch_size: samples in the first try.
        min_batch_size: samples in the last try.
        max_retries: tries after the first one.
        on_retry: called with the next size after memory was freed, to reset state.
        agree: called after every try with whether it failed here; returns whether it
            failed on any rank (`any_rank` of distributed.py). All ranks have to begin
            with the same sizes and retries.
        patience: further tries with min_batch_size, at once and after 0.25, 0.5, 1, ...
            seconds: what other processes hold of the GPU may be free by then.
        repeat: further tries with each larger size, at once: memory that was cached or
            in pieces is free then, and the same size rounds as if nothing had failed.

    Returns:
        What train_fn returned.

    Raises:
        ValueError: sizes or retries that cannot be.
        InsufficientMemoryError: out of memory at every size tried.
    """
    if not 1 <= min_batch_size <= initial_batch_size or max_retries < 0:
        raise ValueError(
            f"initial_batch_size={initial_batch_size}, "
            f"min_batch_size={min_batch_size}, max_retries={max_retries}: "
            "need 1 <= min_batch_size <= initial_batch_size and max_retries >= 0"
        )
    tried, repeats, waits = [initial_batch_size], 0, 0
    while True:
        result, reason = _call_or_free(train_fn, tried[-1])
        if not (agree(bool(reason)) if agree else reason):
            return result
        if not reason:
            result, reason = None, "on another rank"
            clear_memory()
        retries_left = max_retries - len(tried) + 1
        size = tried[-1]
        if size > min_batch_size and repeats < repeat:
            repeats += 1
        elif size > min_batch_size and retries_left:
            half = max(min_batch_size, size // 2)
            tried.append(half if retries_left > 1 else min_batch_size)
            repeats = 0
        elif waits < patience:
            time.sleep(_seconds_to_wait(waits))
            waits += 1
        else:
            break
        report(f"Out of memory at batch size {size}, trying {tried[-1]}: {reason}")
        if on_retry is not None:
            on_retry(tried[-1])
    cause = "not even one sample fits: " if tried[-1] == 1 else ""
    raise InsufficientMemoryError(
        f"{cause}out of memory at every batch size tried "
        f"({', '.join(map(str, tried))}; min_batch_size={min_batch_size}, "
        f"max_retries={max_retries}, patience={patience}): turn on "
        "gradient checkpointing, shorten the inputs or use a smaller model. "
        f"Last error: {reason}"
    )


def wait_for_memory(
    purpose: str,
    action: Callable[..., Any],
    *arguments: Any,
    patience: int = 6,
    report: Callable[[str], None] = print,
    **options: Any,
) -> Any:
    """Call action(*arguments, **options), again if memory runs out, with pauses.

    At once, and then after 0.25, 0.5, 1, ... seconds. For what has no batch that could
    be made smaller: other processes may hold the memory, and free it.

    Args:
        purpose: what the memory is for, in messages.
        action: must be safe to call again after it failed half-way.
        patience: tries after the first one; 6 take 8 seconds in all.

    Raises:
        InsufficientMemoryError: out of memory every time.
    """
    for waits in range(patience + 1):
        result, reason = _call_or_free(action, *arguments, **options)
        if not reason:
            return result
        if waits < patience:
            report(f"Out of memory for {purpose}, trying again: {reason}")
            time.sleep(_seconds_to_wait(waits))
    raise InsufficientMemoryError(
        f"out of memory for {purpose}, {patience + 1} times: use a smaller model, or a "
        f"GPU that nobody else fills. Last error: {reason}"
    )


def allocate_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimizer otherwise makes in its first step.

    Then all that training holds beside a batch is there from the start, and no step
    can run out of memory half-way for it. Takes a step on zero gradients at a rate and
    decay of zero, which leaves parameters as they are to the bit, and sets its count
    back to 0. Needs the memory of the gradients for the time being.

    Args:
        optimizer: Adam, AdamW, SGD, Muon, Adafactor, or one with state that is zeros at
            the beginning, which has not stepped yet.
    """
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"] if p.requires_grad]
    kept = [(group["lr"], group["weight_decay"]) for group in groups]
    optimizer.state.clear()  # of a try that failed half-way
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        optimizer.step()
    finally:
        for group, (rate, decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for parameter in parameters:
            parameter.grad = None
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))


def step_with_oom_recovery(
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    patience: int = 6,
    report: Callable[[str], None] = print,
) -> Any:
    """Call step(), which updates the parameters; again if memory runs out.

    Nothing can undo half an update. So a step is repeated only as long as it has not
    written to any parameter or state of the optimizer, which after
    `allocate_optimizer_state` is what to expect: what is large is there already. (A
    fused kernel's writes are not seen, but it takes no memory.)

    Raises:
        InsufficientMemoryError: out of memory every time, or half-way.
    """
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    before = [tensor._version for tensor in tensors]  # counts writes

    def attempt() -> Any:
        if [tensor._version for tensor in tensors] != before:
            raise InsufficientMemoryError(
                "memory ran out while the optimizer was updating the parameters, which "
                "cannot be undone: go on from the last state that was saved"
            )
        return step()

    return wait_for_memory(
        "the optimizer's step", attempt, patience=patience, report=report
    )


class ErrorCase(NamedTuple):
    """A text that an error may hold, and what to say then."""

    pattern: str
    cause: str
    remedy: str


# The first that matches counts. Texts as raised by PyTorch 2.6 to 2.13 and the CUDA
# libraries under it.
CUDA_ERROR_CASES = (
    ErrorCase(
        r"collective operation timeout|Timed out waiting \d+ms|wait timeout after",
        "One rank did not reach a collective operation that the others wait in: it "
        "crashed, took another number of steps, or was slow (loading, saving).",
        "Read the first error among all ranks' logs; give every rank the same number "
        "of steps; for honest long work raise init_process_group(timeout=...).",
    ),
    ErrorCase(
        r"Duplicate GPU detected",
        "Two ranks use the same GPU.",
        "Call torch.cuda.set_device(LOCAL_RANK) before the process group starts, and "
        "no more processes than GPUs.",
    ),
    ErrorCase(
        r"NCCL error|NCCL communicator|NCCL version|\bnccl[A-Z]",
        "NCCL failed between the GPUs: network interface, shared memory, or a peer "
        "that is already gone.",
        "Run with NCCL_DEBUG=INFO and read the first warning; in a container give "
        "--shm-size=8g; with several networks set NCCL_SOCKET_IFNAME.",
    ),
    ErrorCase(
        r"device-side assert",
        "A kernel checked its input and stopped, most often an index out of range: a "
        "label >= number of classes, or a token id >= vocabulary size.",
        "Run the same batch on the CPU (or with CUDA_LAUNCH_BLOCKING=1) to see the "
        "line. This process cannot use the GPU any more: start it again.",
    ),
    ErrorCase(
        r"illegal memory access|misaligned address|unspecified launch failure",
        "A kernel read or wrote outside its memory: a custom or compiled kernel, wrong "
        "indices, or failing hardware. The line shown may be a later one.",
        "Run with CUDA_LAUNCH_BLOCKING=1 (or compute-sanitizer) to find the kernel; "
        "try without torch.compile and custom kernels. Start the process again.",
    ),
    ErrorCase(
        r"no kernel image is available|is not compatible with the current PyTorch"
        r"|unsupported toolchain|invalid device function",
        "This PyTorch build (or an extension) has no code for this GPU's architecture.",
        "Compare torch.cuda.get_device_capability() with torch.cuda.get_arch_list(); "
        "install the PyTorch build for this GPU; build extensions again.",
    ),
    ErrorCase(
        r"driver on your system is too old|driver version is insufficient"
        r"|driver/library version mismatch|forward compatibility was attempted",
        "The NVIDIA driver does not fit this PyTorch build's CUDA version.",
        "Compare nvidia-smi's CUDA version with torch.version.cuda: update the driver "
        "(and reboot after an update) or install PyTorch for an older CUDA.",
    ),
    ErrorCase(
        r"Found no NVIDIA driver|no CUDA-capable device|No CUDA GPUs are available"
        r"|invalid device ordinal|busy or unavailable|system not yet initialized",
        "The GPU asked for is not there for this process: no driver, hidden by "
        "CUDA_VISIBLE_DEVICES, taken exclusively, or not passed into the container.",
        "Check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's --gpus; use a "
        "device index below torch.cuda.device_count().",
    ),
    ErrorCase(
        r"not compiled with CUDA enabled|not linked with support for cuda",
        "This PyTorch is a CPU build.",
        "Install a CUDA build of PyTorch, or train on the CPU.",
    ),
    ErrorCase(
        r"Cannot re-initialize CUDA in forked subprocess",
        "A forked process (a DataLoader worker) used CUDA after its parent had.",
        "Keep datasets and collate functions on the CPU and move batches in the loop, "
        'or use multiprocessing_context="spawn".',
    ),
    ErrorCase(
        r"(?i)cudnn",
        "cuDNN failed: GPU memory nearly full, two cuDNN versions on the library path, "
        "or an earlier error of the GPU that shows only now.",
        "Try a smaller batch; unset LD_LIBRARY_PATH; try "
        "torch.backends.cudnn.enabled = False to see whether cuDNN is the cause.",
    ),
    ErrorCase(
        r"CUBLAS_STATUS",
        "cuBLAS failed: GPU memory nearly full, shapes or dtypes it does not take, or "
        "an earlier error (often an index out of range) that shows only now.",
        "Run with CUDA_LAUNCH_BLOCKING=1, and the same batch on the CPU; try a smaller "
        "batch; unset LD_LIBRARY_PATH.",
    ),
    ErrorCase(
        r"Expected all tensors to be on the same device"
        r"|Input type \(.*\) and weight type",
        "Model and data are on different devices or have different dtypes.",
        "Move both: model.to(device), and every tensor of the batch .to(device).",
    ),
    ErrorCase(
        r"CUDA error|CUDA driver error|CUDA initialization",
        "CUDA failed in a way that has no entry here.",
        "Run with CUDA_LAUNCH_BLOCKING=1 to see the line that fails, check nvidia-smi "
        "and the system log (dmesg, Xid) for hardware errors.",
    ),
)

DATA_ERROR_CASES = (
    ErrorCase(
        r"DataLoader worker.*killed by signal: Bus error|out of shared memory"
        r"|shared memory object|shared memory\(shm\)|unable to (write to|resize) file"
        r"|No space left on device",
        "No room left in shared memory (/dev/shm), through which workers hand over "
        "batches, or on the disk.",
        "In a container give --shm-size=8g or --ipc=host; use fewer workers, a smaller "
        "prefetch_factor or smaller batches; check df -h.",
    ),
    ErrorCase(
        r"Too many open files|received \d+ items of ancdata",
        "Too many open files: workers keep one for every tensor that is under way.",
        "Raise ulimit -n, or call "
        'torch.multiprocessing.set_sharing_strategy("file_system").',
    ),
    ErrorCase(
        r"DataLoader worker.*killed by signal: Killed",
        "The system killed a worker, nearly always because main memory was full.",
        "Use fewer workers, a smaller prefetch_factor, or stream the data instead of "
        "holding it in every worker; the system log (dmesg) names the process.",
    ),
    ErrorCase(
        r"DataLoader worker.*(killed by signal|exited unexpectedly)",
        "A worker process died without a Python error (a crash in native code, or it "
        "was stopped from outside).",
        "Run with num_workers=0 to see the cause in the main process.",
    ),
    ErrorCase(
        r"DataLoader timed out",
        "No batch came within the timeout: slow storage, or a worker hangs.",
        "Run with num_workers=0 to see which sample is slow; raise timeout; set "
        "OMP_NUM_THREADS=1 where workers deadlock in native threads.",
    ),
    ErrorCase(
        r"(?i)can't (get local|pickle)|cannot (be )?pickle|PicklingError",
        "Workers are started by spawn or forkserver (macOS, Windows, Python 3.14) and "
        "cannot take lambdas, local functions or open files along.",
        "Move the function or class to the top level of a module and open files inside "
        'the worker, or use multiprocessing_context="fork" where there is one.',
    ),
    ErrorCase(
        r"Cannot re-initialize CUDA in forked subprocess",
        "A worker used CUDA.",
        "Keep datasets and collate functions on the CPU and move batches in the loop.",
    ),
    ErrorCase(
        r"Usecols do not match columns|No match for FieldRef|Field .* (not in|does not "
        r"exist in) schema|^KeyError\b",
        "A column (or key) that the code asks for is not in the data.",
        "Compare its spelling with the file's header: "
        "pandas.read_csv(path, nrows=0).columns or "
        "pyarrow.parquet.read_schema(path).names.",
    ),
    ErrorCase(
        r"Parquet magic bytes|Parquet file size is 0|deserialize thrift|Corrupt "
        r"|Codec failed|decompress|Unexpected end of stream|Invalid BYTE_ARRAY"
        r"|Invalid number of indices|CRC checksum",
        "The Parquet file is damaged or incomplete (an interrupted copy or download), "
        "or it is no Parquet file.",
        "Find the row group with pyarrow.parquet.ParquetFile(path).read_row_group(i), "
        "then copy or write the file again.",
    ),
    ErrorCase(
        r"cannot identify image file|image file is truncated|broken data stream"
        r"|DecompressionBomb",
        "An image cannot be read: damaged, incomplete, or no image.",
        'Replace it or leave it out (LazyImageDataset: on_error="skip").',
    ),
    ErrorCase(
        r"FileNotFoundError|NotADirectoryError|No such file or directory",
        "The file is not there.",
        "Check the spelling; a relative path starts at the folder that the command is "
        "run in.",
    ),
    ErrorCase(
        r"PermissionError|Permission denied",
        "This user may not read the file.",
        "Check its owner and mode: ls -l.",
    ),
    ErrorCase(
        r"UnicodeDecodeError|codec can't decode",
        "The text file is not in the encoding that it is read with (UTF-8).",
        "Convert it: iconv -f latin1 -t utf-8 FILE.",
    ),
    ErrorCase(
        r"Error tokenizing data|No columns to parse|JSONDecodeError",
        "A line of the text file is not what its format asks for, or it is empty.",
        "Look at the line that the message names: quotes, separators, a cut-off end.",
    ),
    ErrorCase(
        r"equal size|batch must contain tensors",
        "The samples of a batch cannot be stacked: different lengths, or not numbers.",
        "Pad them to one length or pass a collate_fn that does; turn images into "
        "tensors in the transform.",
    ),
    ErrorCase(
        r"ModuleNotFoundError|ImportError",
        "A package that reads this data is not installed.",
        "Install it with pip under the name in the message.",
    ),
)


def _explain_by_cases(text: str, cases: tuple[ErrorCase, ...]) -> str | None:
    """Return the error's first line with cause and remedy, None if no case matches."""
    for pattern, cause, remedy in cases:
        if re.search(pattern, text):
            return f"{text.splitlines()[0]}\nCause: {cause}\nRemedy: {remedy}"
    return None


def handle_cuda_error(error: BaseException) -> str:
    """Explain a GPU error: what happened, its likely cause, the remedy.

    Tells apart out of memory, device-side asserts, illegal accesses, missing
    architectures, drivers, cuDNN, cuBLAS, NCCL and wrong devices. Other errors come
    back as "not recognised" with the original text.
    """
    text = f"{type(error).__name__}: {str(error).strip()}"
    if is_out_of_memory(error):
        return (
            f"{text.splitlines()[0]}\n"
            "Cause: model, gradients, optimizer state and activations together did not "
            "fit in memory.\n"
            "Remedy: a smaller micro-batch with gradient accumulation, gradient "
            "checkpointing, bf16, shorter inputs; nvidia-smi shows who else uses the "
            "GPU; where much is reserved but unallocated set "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
        )
    return _explain_by_cases(text, CUDA_ERROR_CASES) or (
        f"Not recognised as a GPU error: {type(error).__name__}: {error}"
    )


def _unwrap_worker_error(error: BaseException) -> tuple[str, str, str]:
    """Return type, place and message as they were raised in a DataLoader worker."""
    name, place, message = type(error).__name__, "", str(error)
    while wrapped := re.match(r"Caught (\w+)( .*)\.\nOriginal Traceback", message):
        name, place = wrapped[1], wrapped[2]
        # The last line "Type: message" at the left edge begins the error itself.
        begin = rf"^(?:[\w.]*\.)?{name}(?:: |$)"
        message = re.split(begin, message, flags=re.MULTILINE)[-1].strip()
    return name, place, message


def handle_data_loading_error(error: BaseException) -> str:
    """Explain a data loading error: what happened, its likely cause, the remedy.

    An error from a DataLoader worker is unwrapped first. Tells apart missing files,
    columns and packages, damaged Parquet files and images, text that does not parse,
    batches that do not stack, killed workers, shared memory and pickling. Other errors
    come back as "not recognised" with the original text.
    """
    name, place, message = _unwrap_worker_error(error)
    if name == "DataError":  # says cause and remedy itself
        return message
    text = f"{name}{place}: {message}"
    if error.__cause__ is not None:  # "exited unexpectedly", caused by "killed by ..."
        text += f" ({error.__cause__})"
    if is_out_of_memory(error):
        return (
            f"{text.splitlines()[0]}\n"
            "Cause: main memory was full.\n"
            "Remedy: stream the data, use fewer workers, a smaller prefetch_factor or "
            "smaller batches."
        )
    return _explain_by_cases(text, DATA_ERROR_CASES) or (
        f"Not recognised as a data loading error: {text}"
    )


class SafeTrainingContext:
    """Turn SIGTERM and Ctrl-C into a clean stop, and free memory at the end.

    Inside `with SafeTrainingContext(device) as ctx:` the first signal only sets
    `ctx.should_stop`, for the loop to see after a step; a second Ctrl-C raises
    KeyboardInterrupt at once. Leaving restores the handlers and frees memory. An
    exception always passes through unchanged.

    Outside the main thread there are no signals to see. A signal that the process
    ignores (`nohup`, a shell's background job) stays ignored.

    Args:
        device: the device that training runs on.

    Attributes:
        signal_number: the signal that asked to stop, None before.
    """

    def __init__(
        self, device: torch.device | str, report: Callable[[str], None] = print
    ):
        self.device = torch.device(device)
        self.report = report
        self.signal_number: int | None = None
        self._reported = False
        self._previous: dict[int, Any] = {}

    @property
    def should_stop(self) -> bool:
        """Whether SIGTERM or SIGINT has arrived; reports it when first asked."""
        if self.signal_number is None:
            return False
        if not self._reported:  # not in the handler: printing there can fail
            self._reported = True
            name = signal.Signals(self.signal_number).name
            self.report(f"{name} received, stopping cleanly (Ctrl-C again: at once)")
        return True

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM and os.getpid() != self._pid:
            # A forked child (a DataLoader worker) must still die when it is told to.
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
            return
        # Ctrl-C reaches the children too: they go on, for the step that is finished.
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def __enter__(self):
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()
        if exc is None:
            clear_memory()  # waits for the GPU, so that a late error surfaces here
        else:
            with contextlib.suppress(RuntimeError):  # a dead GPU fails once more:
                clear_memory()  # the user's exception says more
