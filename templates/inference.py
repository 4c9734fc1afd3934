"""Run a model over a dataset in batches, and shrink it to int8 for CPUs (section 14).

    scores = batch_inference(model, loader, device)
    for batch_scores in stream_inference(model, loader, device):
        ...  # bounded memory: write each batch's result out
    int8_model = quantize_model_dynamic(model.cpu())
    for result in predict_in_order(texts, predict_batches, 64, length=len):
        ...  # in the order of the texts, computed in batches of like length
    export_safetensors(model, Path("model.safetensors"), {"classes": classes})
    export_program(model, [inputs, other_inputs], Path("model.pt2"))

Mixed precision comes from outside: wrap the call in `torch.autocast`.
"""

import contextlib
import csv
import ctypes
import inspect
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


class PredictionError(ValueError):
    """What stands in the way of predictions or an export; names it and the remedy."""


def _map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Apply `function` to the tensors in nested mappings, tuples and lists."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_map_tensors(function, value) for value in tree)
    return tree


def _explain_misfit(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError where `model.forward` has no place for these arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # scripted modules have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        batch = f"the keys {sorted(kwargs)}" if kwargs else f"{len(args)} element(s)"
        raise ValueError(
            f"the batch has {batch}, which {type(model).__name__}.forward{signature} "
            f"does not take ({error}): say what goes to the model with prepare_batch, "
            "e.g. prepare_batch=lambda batch: batch[0] to leave out targets"
        ) from error


def _start_cpu_copy(tensor: torch.Tensor, events: list) -> torch.Tensor:
    """Return a CPU copy that is complete once all `events` have passed."""
    if not tensor.is_cuda:
        return tensor.cpu()
    # `.cpu()` would wait for the GPU; this lands in pinned memory and returns at once.
    copy = tensor.to("cpu", non_blocking=True)
    events.append(torch.cuda.current_stream(tensor.device).record_event())
    return copy


def _finish_cpu_copy(outputs: Any, events: list) -> Any:
    for event in events:
        event.synchronize()
    # Made outside inference_mode the clone may take part in autograd. It also lets go
    # of pinned memory, and of the whole tensor that a sliced output keeps alive.
    return _map_tensors(torch.clone, outputs)


@torch.inference_mode()
def _launch_inference(
    model: nn.Module,
    batch: Any,
    device: torch.device,
    process_output: Callable[[Any], Any] | None,
) -> tuple[Any, list]:
    # Only from pinned memory to CUDA: elsewhere it may read what is freed meanwhile.
    pinned = device.type == "cuda"
    batch = _map_tensors(lambda tensor: tensor.to(device, non_blocking=pinned), batch)
    args, kwargs = (batch,), {}
    if isinstance(batch, dict):
        args, kwargs = (), batch
    elif isinstance(batch, tuple):
        args = batch
    try:
        outputs = model(*args, **kwargs)
    except TypeError:
        _explain_misfit(model, args, kwargs)
        raise
    if process_output is not None:
        outputs = process_output(outputs)
    events = []
    return _map_tensors(lambda tensor: _start_cpu_copy(tensor, events), outputs), events


def stream_inference(
    model: nn.Module,
    dataloader: Iterable[Any],
    device: torch.device,
    prepare_batch: Callable[[Any], Any] | None = None,
    process_output: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """Yield the model's output for each batch, on the CPU, in order.

    Never more than two batches are in memory. On CUDA a batch is yielded after the
    next one has been launched, so that the GPU works while the caller does. The model
    is in eval mode until the generator ends or is closed; then every submodule gets
    its own mode back, after an error too.

    Args:
        model: Already on `device`.
        dataloader: Gives batches: a tensor is passed on as `model(batch)`, a tuple or
            list as `model(*batch)`, a mapping as `model(**batch)`.
        device: Where the batches' tensors are moved to.
        prepare_batch: Takes the loader's batch and returns what the model gets. A
            loader of (inputs, targets) needs `lambda batch: batch[0]`.
        process_output: Takes the model's output, still on `device`, and returns what
            to keep, e.g. `lambda logits: logits.argmax(dim=-1)`.

    Yields:
        The output with CPU tensors that share no memory with the model; mappings
        become dicts, lists and named tuples become tuples.

    Raises:
        ValueError: The model's forward does not take such a batch.
    """
    training_modes = [(module, module.training) for module in model.modules()]
    pending = []  # (outputs, events) of the last batch launched
    try:
        model.eval()
        for batch in dataloader:
            if prepare_batch is not None:
                batch = prepare_batch(batch)
            pending.append(_launch_inference(model, batch, device, process_output))
            # Off CUDA there are no events, so nothing is gained by staying behind.
            while len(pending) > 1 or (pending and not pending[0][1]):
                yield _finish_cpu_copy(*pending.pop(0))
        if pending:
            yield _finish_cpu_copy(*pending.pop())
    finally:
        for module, training in training_modes:
            module.training = training


def _concatenate_outputs(outputs: list[Any], name: str, totals: dict[str, int]) -> Any:
    """Join one output of all batches along dim 0; `totals` gets the joined sizes."""
    first = outputs[0]
    if all(output is None for output in outputs):
        return None
    if isinstance(first, dict):
        return {
            key: _concatenate_outputs(
                [output[key] for output in outputs], f"{name}[{key!r}]", totals
            )
            for key in first
        }
    if isinstance(first, tuple):
        return tuple(
            _concatenate_outputs(list(column), f"{name}[{index}]", totals)
            for index, column in enumerate(zip(*outputs, strict=True))
        )
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        kind = "one number a batch" if isinstance(first, torch.Tensor) else type(first)
        raise ValueError(
            f"{name} is {kind} and cannot be concatenated: choose the outputs to keep "
            "with process_output, or leave the targets out with prepare_batch"
        )
    try:
        joined = torch.cat(outputs)
    except RuntimeError as error:
        shapes = sorted({tuple(output.shape[1:]) for output in outputs})
        raise ValueError(
            f"{name} has another shape in other batches ({shapes} after the first "
            "dimension): pad the batches to one length, reduce the output with "
            "process_output, or take the batches one by one from stream_inference"
        ) from error
    totals[name] = len(joined)
    return joined


def batch_inference(
    model: nn.Module,
    dataloader: Iterable[Any],
    device: torch.device,
    prepare_batch: Callable[[Any], Any] | None = None,
    process_output: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the model's outputs for all batches, joined along dim 0, on the CPU.

    The batch must be the first dimension of inputs and outputs. All results are held
    in memory: for more than fits see `stream_inference`, which explains the arguments.

    Returns:
        What the model returns, a tensor, tuple or dict, for all samples at once. The
        tensors may be used in autograd.

    Raises:
        ValueError: No batches, a batch that the model does not take, or outputs that
            cannot be joined.
    """
    outputs = list(
        stream_inference(model, dataloader, device, prepare_batch, process_output)
    )
    if not outputs:
        dataset = getattr(dataloader, "dataset", None)
        samples = f"{len(dataset)} samples, " if hasattr(dataset, "__len__") else ""
        raise ValueError(
            f"the dataloader gave no batch ({samples}"
            f"drop_last={getattr(dataloader, 'drop_last', False)}): check the "
            "dataset's path or filter, and whether a generator was used up"
        )
    totals: dict[str, int] = {}
    joined = _concatenate_outputs(outputs, "output", totals)
    if len(set(totals.values())) > 1:
        raise ValueError(
            f"the outputs differ in their number of rows ({totals}), so that some are "
            "not batch-first (an LSTM's state?): choose with process_output"
        )
    return joined


def _quantization_obstacles(model: nn.Module) -> list[str]:
    """List what would crash or come to nothing after dynamic quantization."""
    found: dict[str, list[str]] = {}  # obstacle and remedy -> modules
    targets = 0
    for name, module in model.named_modules():
        obstacles = []
        if isinstance(module, (nn.Linear, nn.LSTM, nn.GRU)):
            targets += type(module) in (nn.Linear, nn.LSTM, nn.GRU)
            for tensor in module.parameters():
                if tensor.device.type != "cpu":
                    obstacles.append(f"is on {tensor.device}: call model.cpu() first")
                if tensor.dtype != torch.float32:
                    obstacles.append(f"holds {tensor.dtype}: call model.float() first")
            if parametrize.is_parametrized(module):
                obstacles.append(
                    "is parametrized: call "
                    "torch.nn.utils.parametrize.remove_parametrizations first"
                )
            if getattr(module, "proj_size", 0):
                obstacles.append(
                    "has proj_size, which crashes as int8: project with an nn.Linear"
                )
        # Its fused kernel reads linear1.weight, which is a method once quantized.
        # Unfused int8 was still 1.4 x as fast as fused fp32 (width 384, one thread).
        if (
            isinstance(module, nn.TransformerEncoderLayer)
            and torch.backends.mha.get_fastpath_enabled()
        ):
            obstacles.append(
                "crashes in its fused kernel: call "
                "torch.backends.mha.set_fastpath_enabled(False) first, and in every "
                "process that runs the int8 model"
            )
        for obstacle in dict.fromkeys(obstacles):
            found.setdefault(obstacle, []).append(name or "the model itself")
    if not targets:
        found["has no nn.Linear, nn.LSTM or nn.GRU that could become int8"] = ["it"]
    return [
        f"{names[0]} {f'(and {len(names) - 1} more) ' * (len(names) > 1)}{obstacle}"
        for obstacle, names in found.items()
    ]


def quantize_model_dynamic(model: nn.Module) -> nn.Module:
    """Return a copy for CPU inference whose Linear, LSTM and GRU weights are int8.

    A quarter of the size; activations are quantized batch by batch, no calibration
    data is needed. Measured at about 3 x the speed of fp32 for Linear layers on one
    CPU thread, with a signal-to-noise ratio near 33 dB: check your own metric.

    Raises:
        ValueError: The copy would crash or nothing would be quantized; the message
            lists every reason with its remedy.
        RuntimeError: This PyTorch has no int8 kernels for this CPU.
    """
    obstacles = _quantization_obstacles(model)
    if obstacles:
        raise ValueError(
            "the model cannot be quantized dynamically:\n- " + "\n- ".join(obstacles)
        )
    engine = torch.backends.quantized.engine
    usable = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if engine not in usable:
        remedy = (
            f"set torch.backends.quantized.engine = {usable[0]!r}"
            if usable
            else "this PyTorch build has none; keep fp32 or bf16 weights"
        )
        raise RuntimeError(f"no int8 kernels for engine {engine!r}: {remedy}")

    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        # Deprecated in favour of torchao, which is a package of its own and slower on
        # CPUs unless compiled; still there in 2.15.
        warnings.filterwarnings("ignore", message=".*deprecated")
        # Only submodules are replaced: wrapped, a model that is itself an nn.Linear
        # is one too. A new int8 Linear starts with training=True.
        wrapped = quantize_dynamic(
            nn.Sequential(model), {nn.Linear, nn.LSTM, nn.GRU}, dtype=torch.qint8
        )
    return wrapped[0].eval()


def _import_pyarrow(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
    return pyarrow


@contextlib.contextmanager
def _explain_unreadable(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise OSError and errors of these kinds as a PredictionError with the path."""
    try:
        yield
    except FileNotFoundError:
        raise PredictionError(f"{path}: no such file: check the path") from None
    except PredictionError:
        raise
    except (OSError, *kinds) as error:
        reason = " ".join(str(error).split())[:300]
        raise PredictionError(f"{path}: cannot be read: {reason}: mend it") from error


def stream_texts(path: str, column: str) -> Iterator[str]:
    """Yield a column of a CSV, JSONL or Parquet file, or the lines of a .txt file.

    Only a part of the file is in memory at a time.

    Raises:
        PredictionError: The file is missing, damaged or of another kind, it lacks the
            column, or a row of it is empty.
        ImportError: pyarrow is missing, for Parquet.
    """
    kinds = {
        ".csv": _csv_rows,
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".parquet": _parquet_rows,
        ".txt": _text_rows,
    }
    read = kinds.get(Path(path).suffix.lower())
    if read is None:
        raise PredictionError(f"{path}: give a file that ends with {', '.join(kinds)}")
    # Arrow's errors are ValueErrors, too.
    with _explain_unreadable(path, ValueError, csv.Error):
        for number, text in enumerate(read(path, column), start=1):
            if text is None or text == "":
                raise PredictionError(
                    f"{path}: {column} is empty in row {number}: fill it or leave the "
                    "row out"
                )
            yield str(text)


def _missing_column(path: str, column: str, names: Iterable[str]) -> PredictionError:
    return PredictionError(
        f"{path}: has no column {column}, only {', '.join(names)}: choose from these"
    )


def _csv_rows(path: str, column: str) -> Iterator[str | None]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
        reader = csv.DictReader(file, strict=True)
        if column not in (reader.fieldnames or []):
            raise _missing_column(path, column, reader.fieldnames or [])
        for row in reader:
            yield row[column]


def _jsonl_rows(path: str, column: str) -> Iterator[str | None]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            row = json.loads(line)
            names = list(row) if isinstance(row, dict) else []
            if column not in names:
                raise _missing_column(path, column, names)
            yield row[column]


def _parquet_rows(path: str, column: str) -> Iterator[str | None]:
    with _import_pyarrow(path).parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise _missing_column(path, column, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=4096, columns=[column]):
            yield from batch.column(0).to_pylist()


def _text_rows(path: str, column: str) -> Iterator[str | None]:
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            yield line.rstrip("\n")


def stream_features(
    path: str, columns: Sequence[str], batch_size: int
) -> Iterator[torch.Tensor]:
    """Yield columns of numbers of a Parquet file as float32, (batch_size, columns).

    A missing value is NaN. Only a part of the file is in memory at a time.

    Raises:
        PredictionError: The file is missing or damaged, it lacks a column, or one holds
            other things than numbers.
        ImportError: pyarrow is missing.
    """
    pyarrow = _import_pyarrow(path)
    with (
        _explain_unreadable(path, pyarrow.ArrowException),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        names = file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise PredictionError(
                f"{path}: has no column {', '.join(missing[:5])}, which the model "
                f"was trained with; it has {', '.join(names[:20])}"
            )
        for batch in file.iter_batches(batch_size, columns=list(columns)):
            rows = [batch.column(name).cast("float32") for name in columns]
            yield torch.stack(
                [torch.tensor(row.to_numpy(zero_copy_only=False)) for row in rows],
                dim=1,
            )


def tokenize_each(
    texts: Iterable[str],
    tokenize: Callable[[list[str]], torch.Tensor],
    padding: int,
    window: int = 1024,
) -> Iterator[torch.Tensor]:
    """Yield the token ids of each text, (T,), without padding on either side.

    Args:
        tokenize: Texts -> token ids (B, T); gets `window` of them at a time.
        padding: The token id that makes texts equally long.
    """
    texts = iter(texts)
    while block := list(itertools.islice(texts, window)):
        for tokens_T in tokenize(block):
            used = (tokens_T != padding).nonzero().flatten().tolist() or [0]
            yield tokens_T[used[0] : used[-1] + 1]


def predict_in_order(
    samples: Iterable[Any],
    predict_batches: Callable[[Iterator[list[Any]]], Iterable[Sequence[Any]]],
    batch_size: int,
    length: Callable[[Any], int],
    window: int = 8192,
    grow: bool = False,
) -> Iterator[Any]:
    """Yield the result of each sample, in order; batches hold samples of like length.

    Padding is what costs: measured at 1.9 times the speed of batches in the order of
    the samples, for texts of mixed lengths on a CPU, with `grow` 2.3 times. The longest
    come first, so that a batch too large for the memory fails at once.

    Args:
        samples: Read as they are needed, `window` at a time.
        predict_batches: Gets batches, lists of samples, and yields for each of them
            the results in its order. It may read one batch ahead.
        length: Of a sample, in any unit that grows with its share of a batch.
        window: Samples that are sorted together, and held in memory.
        grow: Batches of shorter samples have more of them, so that padded to its
            longest each is as large as the first (a token budget).
    """
    samples = iter(samples)
    while block := list(itertools.islice(samples, window)):
        lengths = [length(sample) for sample in block]
        order = sorted(range(len(block)), key=lengths.__getitem__, reverse=True)
        budget = batch_size * max(1, lengths[order[0]])
        batches, first = [], 0
        while first < len(order):
            longest = max(1, lengths[order[first]])
            size = budget // longest if grow else batch_size
            batches.append(order[first : first + size])
            first += size
        results: list[Any] = [None] * len(block)
        outputs = predict_batches([block[row] for row in rows] for rows in batches)
        for rows, output in zip(batches, outputs, strict=True):
            for row, result in zip(rows, output, strict=True):
                results[row] = result
        yield from results


@contextlib.contextmanager
def _appear_complete(path: Path) -> Iterator[Path]:
    """Give a temporary path, which takes the place of `path` if all goes well."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise PredictionError(
            f"{path}: cannot be written ({error.strerror}): free some space or choose "
            "another file"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, or never made
            temporary.unlink()


def write_predictions(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one line a record, as they come; return how many they were.

    Lines are of JSON, or in a .csv file of values below the names of the first record.
    The file appears when its last line is there.

    Raises:
        PredictionError: The disk refused.
    """
    count = 0
    with (
        _appear_complete(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file) if path.suffix == ".csv" else None
        for record in records:
            if rows and not count:
                rows.writerow(record)
            if rows:
                rows.writerow(record.values())
            else:
                file.write(json.dumps(record) + "\n")
            count += 1
    return count


def _npy_header(rows: int, width: int) -> bytes:
    """The first 128 bytes of a NumPy file of float32, see numpy.lib.format."""
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00v\x00" + shape.ljust(117).encode() + b"\n"


def _safetensors_header(rows: int, width: int) -> bytes:
    """The first 256 bytes of a safetensors file whose one tensor is `vectors`."""
    tensor = {
        "dtype": "F32",
        "shape": [rows, width],
        "data_offsets": [0, 4 * rows * width],
    }
    text = json.dumps({"vectors": tensor}).ljust(248).encode()
    return len(text).to_bytes(8, "little") + text


def write_vectors(path: Path, vectors: Iterable[torch.Tensor]) -> int:
    """Write vectors, as they come, as the rows of one array; return how many.

    Args:
        path: Ends with .npy, or with .safetensors, where the tensor is `vectors`.
        vectors: Of shape (D,), on the CPU; written as float32.

    Raises:
        PredictionError: The disk refused.
        ValueError: There are no vectors, or they are not of one length.
    """
    header = _npy_header if path.suffix == ".npy" else _safetensors_header
    rows, width = 0, 0
    with _appear_complete(path) as temporary, open(temporary, "wb") as file:
        file.write(header(0, 0))
        for vector in vectors:
            vector = vector.float().contiguous()
            if rows and len(vector) != width:
                raise ValueError(f"vector {rows} has length {len(vector)}, not {width}")
            rows, width = rows + 1, len(vector)
            file.write(ctypes.string_at(vector.data_ptr(), 4 * width))
        if not rows:
            raise ValueError(f"{path}: no vectors to write: is the input empty?")
        file.seek(0)
        file.write(header(rows, width))
    return rows


@torch.inference_mode()
def generate_tokens(
    model: nn.Module,
    tokens_T: torch.Tensor,
    count: int,
    vocab_size: int,
    context: int,
    temperature: float = 0.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> Iterator[int]:
    """Yield the tokens with which a causal language model goes on, one by one.

    Each step runs the model over the whole context again: no cache that a model would
    have to provide.

    Args:
        model: Tokens (1, T) to logits (1, T, V).
        tokens_T: The prompt, at least one token, on the model's device.
        count: Tokens at most.
        vocab_size: Logits after these are padding.
        context: How many of the last tokens the model sees, as in training.
        temperature: 0 takes the likeliest token; higher is more surprising.
        top_k: Draw from the k likeliest tokens only; 0 draws from all.
        generator: For drawing, on the CPU.
        end: The token after which nothing comes; it is not yielded.
    """
    tokens_T = tokens_T[-context:]
    for _ in range(count):
        logits_V = model(tokens_T[None])[0, -1, :vocab_size].float().cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            if 0 < top_k < len(logits_V):
                lowest = logits_V.topk(top_k).values[-1]
                logits_V = logits_V.masked_fill(logits_V < lowest, -torch.inf)
            shares_V = (logits_V / temperature).softmax(-1)
            token = int(torch.multinomial(shares_V, 1, generator=generator))
        if token == end:
            return
        yield token
        tokens_T = torch.cat([tokens_T, tokens_T.new_tensor([token])])[-context:]


def _to_json_value(value: Any) -> Any:
    """A tensor as nested lists under its dtype, for `json.dumps(default=...)`."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.tolist(), "dtype": dtype}
    raise TypeError(f"a {type(value).__name__} has no place in JSON: save plain values")


def _from_json_value(value: dict[str, Any]) -> Any:
    if value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install safetensors") from error
    return safetensors


def export_safetensors(
    model: nn.Module,
    path: Path,
    info: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> None:
    """Write the weights as safetensors, with `info` as JSON in the file's metadata.

    The format refuses tensors that share memory: of tied ones the first is written,
    and the metadata says under each other name which, as `safetensors.torch.save_model`
    does, so that `safetensors.torch.load_model` reads it. The file appears complete or
    not at all.

    Args:
        info: Plain values and small tensors that `read_safetensors` gives back.

    Raises:
        PredictionError: The disk refused.
        TypeError: A value that JSON has no place for.
    """
    safetensors = _import_safetensors()
    tensors: dict[str, torch.Tensor] = {}
    first_names: dict[tuple, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = first_names.setdefault(view, name) if tensor.numel() else name
        if first != name:
            tied[name] = first
        else:  # a clone shares no storage with another slice of the same one
            tensors[name] = tensor.detach().cpu().clone().contiguous()
    text = json.dumps(info, default=_to_json_value)
    metadata = {"format": "pt", **tied, "info": text}
    try:
        with _appear_complete(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise PredictionError(f"{path}: cannot be written: {error}") from error
    shared = f" ({len(tied)} tied)" if tied else ""
    report(f"{len(tensors)} tensors{shared} in {path}")


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights, tied ones under each name, and `info` of the export.

    Raises:
        PredictionError: The file is missing or damaged, or another program wrote it.
    """
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        info = json.loads(metadata.pop("info"), object_hook=_from_json_value)
    except (OSError, safetensors.SafetensorError) as error:
        raise PredictionError(f"{path}: cannot be read: {error}") from error
    except KeyError:
        raise PredictionError(
            f"{path}: has no `info` in its metadata: it was not written by "
            "export_safetensors"
        ) from None
    for name, first in metadata.items():
        if first in tensors:
            tensors[name] = tensors[first]
    return tensors, info


def _tensors_in(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map_tensors(found.append, tree)
    return found


def _dynamic_dimensions(first: Any, second: Any) -> Any:
    """The dimensions in which two inputs differ, in torch.export's own form."""
    if isinstance(first, torch.Tensor):
        differ = zip(first.shape, second.shape, strict=True)
        any_size = torch.export.Dim.DYNAMIC  # refuses what would fix it
        return {i: any_size for i, (one, other) in enumerate(differ) if one != other}
    if isinstance(first, Mapping):
        return {key: _dynamic_dimensions(first[key], second[key]) for key in first}
    if isinstance(first, (tuple, list)):
        pairs = zip(first, second, strict=True)
        return type(first)(_dynamic_dimensions(one, other) for one, other in pairs)
    return None


@torch.no_grad()
def _compare_outputs(
    model: nn.Module, program: nn.Module, inputs: Any, number: int
) -> None:
    try:
        expected, got = _tensors_in(model(inputs)), _tensors_in(program(inputs))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    except (AssertionError, RuntimeError) as error:
        raise PredictionError(
            f"the exported program differs from the model on sample {number}: "
            f"{' '.join(str(error).split())[:400]}: look for branches that depend on "
            "the values or sizes of the inputs"
        ) from error


def export_program(
    model: nn.Module,
    samples: Sequence[Any],
    path: Path,
    report: Callable[[str], None] = print,
) -> None:
    """Write the model as a `torch.export` program, which needs none of its code.

    `torch.export.load(path).module()(inputs)` runs it. The dimensions in which the
    first two samples differ (batch, length) may have any size. The program is read
    back and compared with the model on every sample before it is kept.

    Args:
        model: Called with one argument, of the samples' structure; on their device.
        samples: At least two inputs, with every size that may change different and
            above 1 in the first two.

    Raises:
        PredictionError: The model cannot be exported, or the program gives other
            results than the model.
    """
    model = model.eval()
    with _appear_complete(path) as temporary:
        try:
            with torch.no_grad():
                program = torch.export.export(
                    model,
                    (samples[0],),
                    dynamic_shapes=(_dynamic_dimensions(samples[0], samples[1]),),
                )
            torch.export.save(program, temporary)
            loaded = torch.export.load(temporary).module()
        except Exception as error:  # torch.export has dozens of kinds
            if isinstance(error, OSError):
                raise
            reason = " ".join(str(error).split())[:400]
            raise PredictionError(
                f"the model cannot be exported ({type(error).__name__}: {reason}): in "
                "its forward, take x.shape[0] for len(x), and no branch on values of "
                "tensors"
            ) from error
        for number, inputs in enumerate(samples):
            _compare_outputs(model, loaded, inputs, number)
    report(f"program in {path}, same results as the model on {len(samples)} samples")
