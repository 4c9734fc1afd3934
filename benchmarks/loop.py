"""What a training loop costs beside its peers: time a step, same model and data.

    make bench-loop        # or: OMP_NUM_THREADS=1 python benchmarks/loop.py [--quick]
    python benchmarks/loop.py --explain    # which lines of the generated loop cost what

Peers live in an environment of their own (requirements/bench-loop.txt); one that is not
installed is left out and named. All run at once, each in a thread, and take turns of a
few steps, so that whatever else the machine does slows all alike: compare the shares of
the bare loop, which does nothing but load, zero_grad, forward, backward and step.
Steps are timed in the model itself, from one forward to another, so start, evaluation
and the last save are left out; what a loop does every so many steps, such as a line of
its log, is not.

The generated script is the real one: made by the generator, imported, its model and
data replaced, its main() run. Writes results/loop.md and loop.json.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from templates.optimizers import parameter_groups  # noqa: E402

torch.set_num_threads(1)
RESULTS = Path(__file__).parent / "results"
TURN = 25  # steps of one loop before the next one has its turn
SKIPPED = 5  # of them, while the caches fill again
BATCH = 32
CLASSES = 10
# Of all loops, as generated scripts have it: weight decay for matrices alone.
DECAY_GROUPS = partial(parameter_groups, weight_decay=0.01)


# --- turns


class Turns:
    """Lets one of several threads run at a time, and times the steps of each."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiting: list[str] = []  # in this order; the first one runs
        self.counts: dict[str, int] = {}
        self.start_s: dict[str, float] = {}
        self.block_ms: dict[str, list[float]] = {}
        self.errors: dict[str, BaseException] = {}

    def tick(self) -> None:
        """A loop has come to the forward of its next step."""
        now_s = time.perf_counter()
        name = threading.current_thread().name
        if name not in self.counts:  # a run outside of the benchmark
            return
        count = self.counts[name] = self.counts[name] + 1
        if count % TURN == SKIPPED:
            self.start_s[name] = now_s
        elif count % TURN == 0:
            kept = TURN - SKIPPED
            self.block_ms[name].append((now_s - self.start_s[name]) / kept * 1000)
            with self.condition:
                self.waiting.append(self.waiting.pop(0))
                self.condition.notify_all()
                self.condition.wait_for(lambda: self.waiting[0] == name)

    def run(self, contenders: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        """Milliseconds a step in each turn, by contender."""

        def work(name: str, contender: Callable[[], None]) -> None:
            with self.condition:
                self.condition.wait_for(lambda: self.waiting[0] == name)
            try:
                contender()
            except BaseException as error:
                self.errors[name] = error
            with self.condition:
                self.waiting.remove(name)
                self.condition.notify_all()

        self.waiting = list(contenders)
        self.counts = dict.fromkeys(contenders, 0)
        self.block_ms = {name: [] for name in contenders}
        threads = [
            threading.Thread(target=work, args=item, name=item[0])
            for item in contenders.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, error in self.errors.items():
            raise RuntimeError(f"{name} failed: {error}") from error
        return self.block_ms


current_turns = Turns()


# --- the same model and data for all


class Tiny(nn.Module):
    """A perceptron that takes so little that the loop's own cost shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        if self.training:
            current_turns.tick()
        return self.layers(x_BD)


class Small(nn.Module):
    """A Transformer encoder of 0.1 M parameters over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        if self.training:
            current_turns.tick()
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD.mean(1))


class Rows(Dataset):
    """Tensors in memory; a batch is taken by one indexing, as cheap as can be."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[indices], self.targets[indices]


class NamedRows(Rows):
    """The same for peers whose batches are dicts."""

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[indices], "labels": self.targets[indices]}


def keep(batch: Any) -> Any:
    """The batch is one already."""
    return batch


def make_rows(kind: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "tiny":
        inputs = torch.randn(rows, 32, generator=generator)
    else:
        inputs = torch.randint(0, 512, (rows, 16), generator=generator)
    return inputs, torch.randint(0, CLASSES, (rows,), generator=generator)


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Tiny() if kind == "tiny" else Small()


def make_parts(
    kind: str, steps: int, groups: Callable[[nn.Module], Any] = DECAY_GROUPS
) -> tuple[nn.Module, Any, DataLoader]:
    model = make_model(kind).train()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3, fused=True)
    rows = Rows(*make_rows(kind, steps * BATCH))
    return model, optimizer, DataLoader(rows, BATCH, shuffle=True, collate_fn=keep)


# --- contenders: train so many steps


def bare(
    kind: str, steps: int, groups: Callable[[nn.Module], Any] = DECAY_GROUPS
) -> None:
    model, optimizer, loader = make_parts(kind, steps, groups)
    for inputs, targets in loader:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()


def bare_full(kind: str, steps: int) -> None:
    """By hand what --clip --scheduler --ema do: the work that they are asked for."""
    model, optimizer, loader = make_parts(kind, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / steps)
    average = [p.detach().clone() for p in model.parameters()]
    parameters = [p.detach() for p in model.parameters()]
    for inputs, targets in loader:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        torch._foreach_lerp_(average, parameters, 0.001)


def generated(script: types.ModuleType, kind: str, steps: int) -> None:
    """The main() of a generated script over our model and data."""
    model = make_model(kind)
    rows = Rows(*make_rows(kind, steps * BATCH))
    spec = {"classes": [str(number) for number in range(CLASSES)]}
    script.build_model = lambda *args, **kwargs: model
    script.build_datasets = lambda *args, **kwargs: (
        rows,
        Rows(*make_rows(kind, BATCH)),
        spec,
    )
    script.collate = keep
    with tempfile.TemporaryDirectory() as folder:
        # No save falls into the steps: it takes as long as the disk.
        options = {
            "out-dir": f"{folder}/run",
            "epochs": 1,
            "batch-size": BATCH,
            "num-workers": 0,
            **({"save-every": 10**6} if "save_every" in vars(script.Config) else {}),
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        sys.argv = ["train.py", "--cpu", *words]
        code = script.main()
    if code != 0:
        raise RuntimeError(f"the generated script ended with code {code}")


def with_accelerate(kind: str, steps: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    own, optimizer, loader = make_parts(kind, steps)
    model, optimizer, loader = accelerator.prepare(own, optimizer, loader)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()


def with_fabric(kind: str, steps: int) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    own, optimizer, loader = make_parts(kind, steps)
    model, optimizer = fabric.setup(own, optimizer)
    loader = fabric.setup_dataloaders(loader)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()


def with_lightning(kind: str, steps: int) -> None:
    from lightning.pytorch import LightningModule, Trainer

    own, optimizer, loader = make_parts(kind, steps)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = own

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            return F.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self) -> Any:
            return optimizer

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader)


def with_ignite(kind: str, steps: int) -> None:
    from ignite.engine import create_supervised_trainer

    model, optimizer, loader = make_parts(kind, steps)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)
    trainer.run(loader, max_epochs=1)


def with_hf_trainer(kind: str, steps: int) -> None:
    from transformers import Trainer, TrainingArguments

    own = make_model(kind)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = own

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict:
            logits = self.model(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            optim="adamw_torch_fused",
            max_grad_norm=0.0,  # no clipping, as the others
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        rows = NamedRows(*make_rows(kind, steps * BATCH))
        Trainer(WithLoss(), settings, data_collator=keep, train_dataset=rows).train()


PEERS = {
    "Fabric": ("lightning", with_fabric),
    "Ignite": ("ignite", with_ignite),
    "Accelerate": ("accelerate", with_accelerate),
    "Lightning": ("lightning", with_lightning),
    # Its Trainer needs accelerate.
    "Hugging Face Trainer": ("transformers accelerate", with_hf_trainer),
}
PLAIN = "generated script"
FULL = "generated, --amp --clip --scheduler --ema --resume"
FLAGS = {
    PLAIN: [],
    FULL: ["--amp", "--clip", "--scheduler", "cosine", "--ema", "--resume"],
}
BARE, BARE_FULL = "bare loop, fused AdamW", "bare loop with clip, schedule, average"
ONE_GROUP = "bare loop, one parameter group"  # decays biases as well


def generate(flags: list[str], folder: str) -> types.ModuleType:
    """The generated script as a module."""
    path = Path(folder) / f"script{len(os.listdir(folder))}.py"
    words = [sys.executable, str(ROOT / "generator"), "--task", "text", *flags]
    subprocess.run([*words, "-o", str(path)], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def find_contenders(folder: str) -> dict[str, Callable[[str, int], None]]:
    contenders: dict[str, Callable[[str, int], None]] = {
        BARE: bare,
        ONE_GROUP: partial(bare, groups=nn.Module.parameters),
    }
    contenders[PLAIN] = partial(generated, generate(FLAGS[PLAIN], folder))
    for name, (modules, contender) in PEERS.items():
        if not all(map(importlib.util.find_spec, modules.split())):
            print(f"{name} is left out: not installed (requirements/bench-loop.txt)")
        else:
            contenders[name] = contender
    contenders[BARE_FULL] = bare_full
    contenders[FULL] = partial(generated, generate(FLAGS[FULL], folder))
    return contenders


@contextlib.contextmanager
def silence() -> Any:
    """Nothing of what the loops print; their calls are still paid for."""
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        warnings.simplefilter("ignore")
        yield


def time_steps(
    contenders: dict[str, Callable[[str, int], None]], kind: str, turns: int
) -> dict[str, list[float]]:
    """Milliseconds a step, for each contender in every turn; the first one warms up."""
    global current_turns
    current_turns = Turns()
    calls = {
        name: partial(contender, kind, (turns + 1) * TURN)
        for name, contender in contenders.items()
    }
    with silence():
        times = current_turns.run(calls)
    return {name: values[1:] for name, values in times.items()}


def table_of_steps(kind: str, times: dict[str, list[float]]) -> list[list[str]]:
    """Rows: quiet turns, and the bare loop's time in the same turns as a share."""
    rows = []
    for name, values in times.items():
        reference = times[BARE_FULL if name in (BARE_FULL, FULL) else BARE]
        shares = [bare_ms / ms for bare_ms, ms in zip(reference, values, strict=True)]
        # Whatever else the machine does only adds time.
        quiet_ms, bare_ms = (
            statistics.quantiles(v, n=10)[0] for v in (values, reference)
        )
        rows.append(
            [
                name,
                f"{quiet_ms:.3f}",
                f"{(quiet_ms - bare_ms) * 1000:.0f}",
                f"{bare_ms / quiet_ms:.3f}",
                f"{statistics.median(shares):.3f}",
            ]
        )
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def explain(folder: str) -> None:
    """Print where a generated script's time goes, by function, over bare's."""
    import cProfile
    import pstats

    script = generate(FLAGS[PLAIN], folder)
    for name, run in {BARE: bare, PLAIN: partial(generated, script)}.items():
        with silence():
            run("tiny", 200)
            profile = cProfile.Profile()
            profile.enable()
            run("tiny", 3000)
            profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(30)
        print(f"== {name}\n{text.getvalue()}")


def describe_versions() -> str:
    names = ["torch", "accelerate", "lightning", "ignite", "transformers"]
    found = []
    for name in names:
        with contextlib.suppress(ImportError):
            found.append(f"{name} {importlib.import_module(name).__version__}")
    return ", ".join(found)


def main() -> None:
    """Run, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, no files")
    parser.add_argument("--explain", action="store_true", help="profile the loop only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.explain:
            explain(folder)
            return
        contenders = find_contenders(folder)
        turns = 10 if options.quick else 100
        results = {
            "tiny": time_steps(contenders, "tiny", turns),
            "small": time_steps(contenders, "small", max(4, turns // 4)),
        }
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    titles = {
        "tiny": "A tiny model: perceptron of 7 000 parameters, batch 32",
        "small": "A small Transformer: 0.1 M parameters, 16 tokens, batch 32",
    }
    text = (
        f"# A training loop's own cost\n\n{time.strftime('%Y-%m-%d')}, {cpu}, one "
        f"thread, Python {platform.python_version()}, {describe_versions()}\n\n"
        f"`make bench-loop`; {TURN} steps of each loop in turn, many times. Time of "
        "the quietest tenth of the turns (what else runs only adds to it) and the bare "
        "loop's by it, 1 is as fast; and the median of that share over pairs of "
        "neighbouring turns. The last two rows do more work than the others, by hand "
        "and generated, and are compared with each other.\n"
    )
    header = ["loop", "ms a step", "µs over bare", "share of bare", "median share"]
    for kind, times in results.items():
        text += f"\n## {titles[kind]}\n\n"
        text += markdown(header, table_of_steps(kind, times))
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "loop.md").write_text(text, encoding="utf-8")
        (RESULTS / "loop.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
