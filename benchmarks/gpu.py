"""Training on one GPU beside peers: throughput, share of the GPU's peak, memory.

    python benchmarks/gpu.py                  # every row; about 40 minutes
    python benchmarks/gpu.py --only lm-1b     # rows whose name contains one of these
    python benchmarks/gpu.py --list           # the rows
    python benchmarks/gpu.py --smoke          # tiny models on the CPU: does it run?

For one H100- or H200-class GPU with torch 2.11 or later; needs jinja2 and, for their
rows, transformers, accelerate, lightning, timm. A peer that is not installed is named.
Each row is a process of its own: the generated script, or a peer's loop, over the same
model, data, batch, clipping and fused AdamW; peers compiled and in bf16 by their own
means (model and loss in one, which suits them best).
The generated script is the real one, with build_model and build_datasets replaced.
A row is skipped where results/gpu.json has it already, so a run can be continued.

Steps are timed by CUDA events in the hook of `optimizer.step()`, which all loops call:
the median of the timed steps, after those that warm up and compile. Memory is the peak
of those steps. MFU is FLOPs of one forward and backward (matrix products, convolutions,
attention in full) by time and by the dense bf16 peak, for every row.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from templates.builtin_models import DecoderLM  # noqa: E402
from templates.profiling import (  # noqa: E402
    count_step_flops,
    peak_flops,
    peak_memory_gb,
)

RESULTS = Path(__file__).parent / "results" / "gpu.json"
VOCABULARY = 50304
CLASSES = 1000
CLIP = 1.0


@dataclass(frozen=True)
class Work:
    """What is trained: unit is tokens or images, of which a batch has `units`."""

    name: str
    kind: str  # "lm" or "image"
    batch: int
    length: int  # tokens of a row, pixels of a side
    build: Callable[[], nn.Module]

    @property
    def units(self) -> int:
        return self.batch * (self.length if self.kind == "lm" else 1)


def build_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES)


WORKS = [
    Work("lm-124m", "lm", 32, 1024, lambda: DecoderLM(VOCABULARY, 768, 12, 12)),
    Work("lm-1b", "lm", 8, 2048, lambda: DecoderLM(VOCABULARY, 2048, 18, 16)),
    Work("resnet50", "image", 256, 224, partial(build_timm, "resnet50")),
    Work("vit-b16", "image", 256, 224, partial(build_timm, "vit_base_patch16_224")),
]
SMOKE_WORKS = [
    Work("lm-smoke", "lm", 4, 32, lambda: DecoderLM(VOCABULARY, 32, 2, 2)),
    Work(
        "image-smoke",
        "image",
        4,
        32,
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.Sequential(nn.Sequential(nn.Flatten()), nn.Sequential(nn.ReLU())),
            nn.Linear(8 * 15 * 15, CLASSES),
        ),
    ),
]
# Of the generated script. The peers are compiled and in bf16.
VARIANTS = {
    "tf32": [],
    "amp": ["--amp"],
    "amp compile": ["--amp", "--compile"],
    "amp checkpointing=full": ["--amp", "--checkpointing", "full"],
    "amp checkpointing=selective": ["--amp", "--checkpointing", "selective"],
    "amp compile checkpointing=full": ["--amp", "--compile", "--checkpointing", "full"],
    "amp compile checkpointing=selective": [
        *["--amp", "--compile", "--checkpointing", "selective"]
    ],
    "amp compile fp8": ["--amp", "--compile", "--fp8"],
}


# --- data: random, in the CPU's memory, without a cost of its own


class Pool(Dataset):
    """As many batches as are asked for, all of them views into one small pool."""

    def __init__(self, work: Work, batches: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.length, self.work = batches * work.batch, work
        if work.kind == "lm":
            shape = (work.batch * 4, work.length + 1)
            tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
            self.inputs = tokens[:, :-1].contiguous()
            self.targets = tokens[:, 1:].contiguous()
        else:
            shape = (work.batch * 2, 3, work.length, work.length)
            pixels = torch.randint(0, 256, shape, generator=generator)
            self.inputs = pixels.to(torch.uint8)
            self.targets = torch.randint(
                0, CLASSES, (work.batch * 2,), generator=generator
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index %= len(self.inputs)
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        start = indices[0] % (len(self.inputs) - len(indices) + 1)
        rows = slice(start, start + len(indices))
        return self.inputs[rows], self.targets[rows]


class NamedPool(Pool):
    """The same for a peer whose batches are dicts."""

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        inputs, labels = super().__getitems__(indices)
        return {"inputs": inputs, "labels": labels}


def keep(batch: Any) -> Any:
    """The batch is one already."""
    return batch


def make_loader(work: Work, steps: int, device: torch.device) -> DataLoader:
    rows = Pool(work, steps)
    pin = device.type == "cuda"
    return DataLoader(rows, work.batch, shuffle=True, collate_fn=keep, pin_memory=pin)


# --- the same model for all


class Pixels(nn.Module):
    """An image model over bytes: they are scaled on the GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        images = pixels_BCHW.to(memory_format=torch.channels_last)
        return self.model(images / 255 - 0.5)


def make_model(work: Work) -> nn.Module:
    torch.manual_seed(0)
    model = work.build()
    if work.kind == "image":
        model = Pixels(model.to(memory_format=torch.channels_last))
    return model.train()


def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.reshape(targets.numel(), -1), targets.flatten())


class WithLoss(nn.Module):
    """Model and loss in one, so that the peers compile both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict:
        return {"loss": loss_of(self.model(inputs), labels)}


# --- the clock


class Done(Exception):
    """Enough steps were timed: ends the loop, whichever it is."""


class StepClock:
    """Marks every `optimizer.step()` of the process, and ends the loop after enough."""

    def __init__(self, device: torch.device, warmup: int, timed: int) -> None:
        self.device, self.warmup, self.timed = device, warmup, timed
        self.marks: list[Any] = []
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.count >= self.warmup:
            self.marks.append(self._now())
        if self.count == self.warmup + self.timed:
            raise Done

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_ms(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type != "cuda":
            return [(end - start) * 1000 for start, end in pairs]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]


# --- contenders: train until the clock ends it


def run_generated(work: Work, device: torch.device, steps: int, variant: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = generate(work, VARIANTS[variant], folder)
        model = make_model(work)
        if work.kind == "lm":
            spec: dict[str, Any] = {"vocab_size": VOCABULARY}
        else:
            spec = {"classes": [str(number) for number in range(CLASSES)]}
        script.build_model = lambda *args, **kwargs: model
        script.build_datasets = lambda *args, **kwargs: (
            Pool(work, steps),
            Pool(work, 1),
            spec,
        )
        for name in ("collate", "collate_windows", "collate_images"):
            if hasattr(script, name):
                setattr(script, name, keep)
        words = [f"--out-dir={folder}/run", f"--batch-size={work.batch}"]
        words += ["--num-workers=0", "--epochs=1"]
        if variant != "tf32":
            words += ["--dtype=bf16"]
        sys.argv = ["train.py", *words, *(["--cpu"] if device.type == "cpu" else [])]
        script.main()


def generate(work: Work, flags: list[str], folder: str) -> types.ModuleType:
    """The generated script as a module."""
    path = Path(folder) / "train.py"
    words = ["--task", work.kind, "--clip", str(CLIP), *flags, "-o", str(path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "generator"), *words],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_plain(work: Work, device: torch.device, steps: int) -> None:
    """The loop of a nanoGPT-style script: everything by hand."""
    model = torch.compile(WithLoss(make_model(work)).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    for inputs, labels in make_loader(work, steps, device):
        inputs = inputs.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(inputs, labels)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_accelerate(work: Work, device: torch.device, steps: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="bf16", dynamo_backend="inductor", cpu=device.type == "cpu"
    )
    model = WithLoss(make_model(work))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    loader = make_loader(work, steps, device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for inputs, labels in loader:
        loss = model(inputs, labels)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def run_lightning(work: Work, device: torch.device, steps: int) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(WithLoss(make_model(work)))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)

    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=None,  # clipping by norm and fused steps exclude each other
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), make_loader(work, steps, device))


def run_hf_trainer(work: Work, device: torch.device, steps: int) -> None:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=work.batch,
            bf16=True,
            torch_compile=True,
            optim="adamw_torch_fused",
            max_grad_norm=CLIP,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            label_names=["labels"],
        )
        Trainer(
            WithLoss(make_model(work)),
            settings,
            data_collator=keep,
            train_dataset=NamedPool(work, steps),
        ).train()


PEERS = {
    "nanoGPT-style loop": (None, run_plain),
    "Accelerate": ("accelerate", run_accelerate),
    "Lightning": ("lightning", run_lightning),
    "Hugging Face Trainer": ("transformers", run_hf_trainer),
}


# --- one row


def count_flops(work: Work, device: torch.device) -> int:
    """FLOPs of a step, from an eager forward and backward of one row."""
    model = make_model(work).to(device)
    inputs, labels = (part.to(device) for part in Pool(work, 1).__getitems__([0]))
    flops = count_step_flops(lambda: loss_of(model(inputs), labels).backward())
    return work.batch * flops


def measure_row(work: Work, contender: str, device: torch.device, smoke: bool) -> dict:
    """Run one row in this process."""
    warmup, timed = (3, 4) if smoke else (15, 40)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what every row may use
    clock = StepClock(device, warmup, timed)
    register_optimizer_step_post_hook(clock)
    steps = warmup + timed + 2
    try:
        if contender in PEERS:
            PEERS[contender][1](work, device, steps)
        else:
            run_generated(work, device, steps, contender.partition(": ")[2])
    except Done:
        pass
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    times_ms = clock.step_ms()
    if len(times_ms) != timed:
        return {"error": f"{len(times_ms)} steps of {timed} were timed"}
    ms = statistics.median(times_ms)
    memory_gb = peak_memory_gb() or 0.0
    flops = count_flops(work, device)
    peak = peak_flops(device, torch.bfloat16)
    return {
        "step_ms": round(ms, 3),
        "units_per_s": round(work.units / ms * 1000, 1),
        "flops_per_step": flops,
        "mfu": round(flops / ms * 1000 / peak, 4) if peak else None,
        "memory_gb": round(memory_gb, 2),
    }


def list_rows(works: list[Work]) -> list[tuple[Work, str]]:
    """All rows: those with the same model stand together."""
    rows = []
    for work in works:
        rows += [(work, f"generated: {variant}") for variant in VARIANTS]
        rows += [(work, name) for name in PEERS]
    return rows


def run_in_process(row: str, smoke: bool, limit_s: float) -> dict[str, Any]:
    """A row in a process of its own: memory and compiled code are not shared."""
    words = [sys.executable, __file__, "--row", row, *(["--smoke"] if smoke else [])]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"row"')]
    if lines:
        return json.loads(lines[-1])["result"]
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"error": reason[:300]}


def describe_machine(device: torch.device) -> dict[str, str]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {}
    for name in ("torch", "transformers", "accelerate", "lightning", "timm", "torchao"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    return {"gpu": gpu, "python": platform.python_version(), **versions}


def make_table(results: dict[str, Any]) -> str:
    """Markdown: one table a model, the fastest row in bold."""
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    text = (
        f"# Training on one GPU\n\n{results['date']}, {machine}\n\n"
        "`python benchmarks/gpu.py`; peers compiled and in bf16.\n"
    )
    for work in [*WORKS, *SMOKE_WORKS]:
        rows = results["rows"].get(work.name)
        if not rows:
            continue
        best = max(row.get("units_per_s", 0) for row in rows.values())
        unit = "tokens" if work.kind == "lm" else "images"
        text += f"\n## {work.name}, batch {work.batch} x {work.length}\n\n"
        text += f"| loop | {unit}/s | ms a step | MFU | peak GB |\n"
        text += "|---|---:|---:|---:|---:|\n"
        for name, row in rows.items():
            if "error" in row:
                text += f"| {name} | {row['error']} | | | |\n"
                continue
            per_s = f"{row['units_per_s']:,.0f}"
            per_s = f"**{per_s}**" if row["units_per_s"] == best else per_s
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            text += f"| {name} | {per_s} | {row['step_ms']:.1f} | {mfu} | "
            text += f"{row['memory_gb']:.1f} |\n"
    return text


def main() -> None:
    """Run the rows that are asked for and not there yet; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of row names")
    parser.add_argument("--list", action="store_true", help="print the rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument(
        "--budget-s", type=float, default=1e9, help="start no row after"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    works = SMOKE_WORKS if options.smoke else WORKS
    rows = {f"{work.name} / {name}": (work, name) for work, name in list_rows(works)}
    if options.list:
        print("\n".join(rows))
        return
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: --smoke runs tiny models on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda:0")
    if options.row:
        result = measure_row(*rows[options.row], device, options.smoke)
        print(json.dumps({"row": options.row, "result": result}))
        return

    start_s = time.monotonic()
    results: dict[str, Any] = {"rows": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    results["machine"] = describe_machine(device)
    results["date"] = time.strftime("%Y-%m-%d")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row, (work, name) in rows.items():
        done = results["rows"].setdefault(work.name, {})
        left_s = options.budget_s - (time.monotonic() - start_s)
        wanted = any(part in row for part in options.only)
        if not wanted or "step_ms" in done.get(name, {}) or left_s < 30:
            continue
        module = PEERS[name][0] if name in PEERS else None
        if module and importlib.util.find_spec(module) is None:
            print(f"{row}: {module} is not installed")
            continue
        done[name] = run_in_process(row, options.smoke, min(600.0, left_s))
        print(f"{row}: {done[name]}", flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = make_table(results)
    options.out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
