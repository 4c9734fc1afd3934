"""For each eval a right answer and a plausible wrong one, to test the verifiers with.

Keep this file away from the assistant that is being tried.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Answer = Callable[[Path], None]


def generate(*options: str) -> Answer:
    """What the generator writes."""

    def answer(folder: Path) -> None:
        words = [sys.executable, str(ROOT / "generator"), *options, "--force"]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)

    return answer


def write(name: str, text: str) -> Answer:
    def answer(folder: Path) -> None:
        (folder / name).write_text(text.lstrip("\n"), encoding="utf-8")

    return answer


def edit(name: str, *changes: tuple[str, str]) -> Answer:
    """The input file with each first text replaced by the second."""

    def answer(folder: Path) -> None:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, f"{name}: {text.count(old)} of {old!r}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")

    return answer


def in_turn(*answers: Answer) -> Answer:
    def answer(folder: Path) -> None:
        for each in answers:
            each(folder)

    return answer


# The shuffled order as it was when the epoch began, and what of it is done.
RESUMED = edit(
    "train.py",
    (
        "    loader = DataLoader(dataset, batch_size=8, shuffle=True)",
        "    order = torch.Generator().manual_seed(0)\n"
        "    loader = DataLoader(dataset, 8, shuffle=True, generator=order)",
    ),
    (
        '        step = checkpoint["step"]\n',
        """        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["rng"])
        random.setstate(checkpoint["python"])
        step, skip = checkpoint["step"], checkpoint["batch"]
""",
    ),
    ("    step = 0\n", "    step, skip = 0, 0\n"),
    (
        "        for x, y in loader:\n",
        """        start = order.get_state()
        for batch, (x, y) in enumerate(loader):
            if batch < skip:
                continue
""",
    ),
    (
        "torch.save({",
        """torch.save({
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "order": start,
                    "batch": batch + 1,
                    "rng": torch.get_rng_state(),
                    "python": random.getstate(),
""",
    ),
    (
        "            if step == STEPS:\n                break\n",
        "            if step == STEPS:\n                break\n        skip = 0\n",
    ),
)

LOADER = """
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

FEATURES = [f"f{i}" for i in range(8)]


class Events(IterableDataset):
    def __init__(self, path, batch_size):
        self.path = path
        self.batch_size = batch_size

    def __iter__(self):
        table = pyarrow.parquet.read_table(self.path)
        columns = [torch.from_numpy(table[n].to_numpy().copy()) for n in FEATURES]
        features = torch.stack(columns, 1)
        labels = torch.from_numpy(table["label"].to_numpy().copy())
        info = get_worker_info()
        pairs = zip(features.split(self.batch_size), labels.split(self.batch_size))
        for number, pair in enumerate(pairs):
            if info is None or number % info.num_workers == info.id:
                yield pair


def make_loader(path, batch_size=256, workers=0):
    return DataLoader(Events(path, batch_size), batch_size=None, num_workers=workers)
"""

CHECKPOINTS = """
import os
from pathlib import Path

import torch


def save(state, folder, step):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"saving_{step}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"step_{step}.pt")


def load_latest(folder):
    paths = Path(folder).glob("step_*.pt")
    by_step = {int(path.stem.partition("_")[2]): path for path in paths}
    for step in sorted(by_step, reverse=True):
        try:
            return torch.load(by_step[step], weights_only=True), step
        except Exception as error:
            print(f"{by_step[step]} is damaged, trying the one before: {error}")
    return None, 0
"""

DDP = edit(
    "train.py",
    ("import torch\n", "import os\n\nimport torch\nimport torch.distributed as dist\n"),
    (
        '    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")\n',
        """    rank, ranks = 0, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group()
        rank, ranks = dist.get_rank(), dist.get_world_size()
""",
    ),
    (
        "x, y = inputs[rows].to(device), targets[rows].to(device)",
        "own = rows[rank::ranks]\n"
        "            x, y = inputs[own].to(device), targets[own].to(device)",
    ),
    (
        "loss = nn.functional.mse_loss(model(x), y)",
        'loss = nn.functional.mse_loss(model(x), y, reduction="sum") / len(rows)',
    ),
    (
        "            optimizer.step()\n",
        """            if ranks > 1:
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
            optimizer.step()
""",
    ),
    (
        "    torch.save(",
        """    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        torch.save(""",
    ),
)

# As tutorials do it: each rank's mean counts the same, and the order is another.
NAIVE_DDP = edit(
    "train.py",
    ("import torch\n", "import os\n\nimport torch\nimport torch.distributed as dist\n"),
    (
        "    optimizer = torch",
        """    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), 0
    if ranks > 1:
        dist.init_process_group()
        rank = dist.get_rank()
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch""",
    ),
    ("inputs[rows]", "inputs[rows[rank::ranks]]"),
    ("targets[rows]", "targets[rows[rank::ranks]]"),
    ("in model.state_dict()", "in getattr(model, 'module', model).state_dict()"),
)

ADAM = """
import jax.numpy as jnp


def init(params):
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    return {"m": zeros, "v": dict(zeros), "t": 0}


def update(params, grads, state, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    t = state["t"] + 1
    m = {k: b1 * state["m"][k] + (1 - b1) * grads[k] for k in params}
    v = {k: b2 * state["v"][k] + (1 - b2) * grads[k] ** 2 for k in params}
    m_hat = {k: m[k] / (1 - b1**t) for k in params}
    v_hat = {k: v[k] / (1 - b2**t) for k in params}
    new = {k: params[k] - lr * m_hat[k] / (jnp.sqrt(v_hat[k]) + eps) for k in params}
    return new, {"m": m, "v": v, "t": t}
"""

SERVE = """
#!/usr/bin/env bash
exec vllm serve meta-llama/Llama-3.1-8B-Instruct \\
    --tensor-parallel-size 2 --max-model-len 8192 --port 8001 \\
    --gpu-memory-utilization 0.9
"""

PAGE = """
# Scaled dot-product attention

Attention lets each position look up information at all positions. A position asks with
a query vector q; every position offers a key k to be compared with, and a value v that
is handed over when the comparison is good. The comparison is the dot product, which is
large where query and key point the same way.

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V

The division by sqrt(d) keeps the scores in a range in which the softmax is not yet
saturated: the dot product of two random vectors of dimension d has a variance of d. The
softmax turns the scores into weights that are positive and add up to 1, and the result
is the mean of the values under these weights.

Example: q = [2, 0], k1 = [1, 1], k2 = [0, 2], d = 2. The dot products are 2 and 0;
divided by sqrt(2) they are 1.414 and 0. Their exponentials are 4.113 and 1, and so the
weights are FIRST and SECOND: nearly all that is returned comes from the first value.
"""
RIGHT_PAGE = PAGE.replace("FIRST", "0.804").replace("SECOND", "0.196")
WRONG_PAGE = PAGE.replace("FIRST", "0.881").replace("SECOND", "0.119")

# As SKILL.md says; the wrong ones leave out what was asked for.
TEXT = ("--task", "text", "-o", "train.py")
IMAGE = ("--task", "image", "-o", "train.py")
TABLE = ("--task", "tabular", "-o", "train.py")
PAIRS = ("--task", "embedding", "-o", "train.py")
LM = ("--task", "lm", "--distributed", "ddp", "-o", "train.py")
RECOMMENDED = ("--preset", "recommended")
RECOVERY = (*TEXT, *RECOMMENDED, "--oom-recovery")
NO_DROPOUT = edit("train.py", ("heads=4, dropout=0.1", "heads=4, dropout=0.0"))
# What was cut off a micro-batch that did not fit is never trained on.
SAMPLES_LOST = edit(
    "train.py", ("        start += done\n", "        start += wanted\n")
)

HELD_IN_MEMORY = edit(
    "train.py",
    (
        "    return open_table(path, label_column, objective, val_fraction, "
        "seed, on_error)\n",
        """    from pyarrow import parquet

    table = parquet.read_table(path)
    names = [name for name in table.column_names if name != label_column]
    x = torch.stack([torch.from_numpy(table[name].to_numpy()) for name in names], 1)
    labels = torch.tensor(table[label_column].to_numpy())
    samples = list(zip(x, labels, strict=True))
    scales = {"mean": x.mean(0), "std": x.std(0)}
    spec = {"features": names, "classes": [0, 1, 2], "scales": scales}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out = int(val_fraction * len(x))
    train_set = [samples[i] for i in order[held_out:].tolist()]
    return train_set, [samples[i] for i in order[:held_out].tolist()], spec
""",
    ),
)

# eval -> (right, plausible but wrong)
ANSWERS: dict[int, tuple[Answer, Answer]] = {
    1: (generate(*TEXT, *RECOMMENDED), generate(*TEXT, "--amp")),
    2: (
        edit(
            "train.py",
            (
                "            x = block(x)\n",
                "            x = checkpoint(block, x, use_reentrant=False)\n",
            ),
            (
                "from torch import nn\n",
                "from torch import nn\nfrom torch.utils.checkpoint import checkpoint\n",
            ),
        ),
        edit(
            "train.py",
            ("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=True)"),
            (
                "        loss.backward()\n",
                "        loss.backward()\n        torch.cuda.empty_cache()\n",
            ),
            ("BATCH, WIDTH, DEPTH,", "MICRO = 1024\nBATCH, WIDTH, DEPTH,"),
            (
                "        loss = nn.functional.mse_loss(model(x), y)\n",
                "        parts = zip(x.split(MICRO), y.split(MICRO))\n"
                "        losses = [(model(a) - b).square().mean() for a, b in parts]\n"
                "        loss = sum(losses) / len(losses)\n",
            ),
        ),
    ),
    3: (
        write("loader.py", LOADER),
        write("loader.py", LOADER.replace("info is None or", "True or")),
    ),
    4: (
        RESUMED,
        edit(
            "train.py",
            (
                '        model.load_state_dict(checkpoint["model"])\n',
                '        model.load_state_dict(checkpoint["model"])\n'
                '        optimizer.load_state_dict(checkpoint["optimizer"])\n'
                '        scheduler.load_state_dict(checkpoint["scheduler"])\n'
                '        torch.set_rng_state(checkpoint["rng"])\n'
                '        random.setstate(checkpoint["python"])\n',
            ),
            (
                "torch.save({",
                'torch.save({"optimizer": optimizer.state_dict(),'
                ' "scheduler": scheduler.state_dict(),'
                ' "rng": torch.get_rng_state(), "python": random.getstate(),',
            ),
        ),
    ),
    5: (generate(*IMAGE, *RECOMMENDED), generate(*IMAGE, "--resume")),
    6: (
        edit(
            "train.py",
            (
                "        nn.utils.clip",
                "        scaler.unscale_(optimizer)\n        nn.utils.clip",
            ),
        ),
        edit(
            "train.py",
            (
                "        nn.utils.clip",
                "        if not half:\n            nn.utils.clip",
            ),
        ),
    ),
    7: (
        edit(
            "accumulate.py",
            (
                "    total = 0.0\n",
                "    total = 0.0\n    count = (targets != IGNORE).sum()\n",
            ),
            ("ignore_index=IGNORE\n", 'ignore_index=IGNORE, reduction="sum"\n'),
            ("(loss / micro_batches).backward()", "(loss / count).backward()"),
            ("loss.item() / micro_batches", "loss.item() / count.item()"),
        ),
        edit(
            "accumulate.py",
            (
                "(loss / micro_batches).backward()",
                "(loss * len(part) / len(tokens)).backward()",
            ),
            ("loss.item() / micro_batches", "loss.item() * len(part) / len(tokens)"),
        ),
    ),
    8: (DDP, NAIVE_DDP),
    9: (
        write("checkpoints.py", CHECKPOINTS),
        edit(
            "checkpoints.py",
            (
                '    torch.save(state, folder / f"step_{step}.pt")\n',
                '    torch.save(state, folder / "new.tmp")\n'
                '    (folder / "new.tmp").replace(folder / f"step_{step}.pt")\n',
            ),
            ("weights_only=False", "weights_only=True"),
        ),
    ),
    10: (
        write("adam.py", ADAM),
        write("adam.py", ADAM.replace("m[k] / (1 - b1**t)", "m[k]")),
    ),
    11: (
        write("serve.sh", SERVE),
        write("serve.sh", SERVE.replace("--max-model-len", "--max-length")),
    ),
    12: (write("attention.md", RIGHT_PAGE), write("attention.md", WRONG_PAGE)),
    # Ranks draw different dropout.
    13: (in_turn(generate(*LM, *RECOMMENDED), NO_DROPOUT), generate(*LM, *RECOMMENDED)),
    14: (
        generate(*TABLE, *RECOMMENDED),
        in_turn(generate(*TABLE, *RECOMMENDED), HELD_IN_MEMORY),
    ),
    # The wrong one keeps the epoch with the lowest loss.
    15: (
        in_turn(
            generate(*PAIRS, *RECOMMENDED),
            edit("train.py", ('at_1"] = "val_loss"', 'at_1"] = "val_recall_at_1"')),
        ),
        generate(*PAIRS, *RECOMMENDED),
    ),
    16: (
        in_turn(generate(*RECOVERY), NO_DROPOUT),
        in_turn(generate(*RECOVERY), NO_DROPOUT, SAMPLES_LOST),
    ),
}
