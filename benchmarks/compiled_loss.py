"""What compiling the loss of a language model saves on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/compiled_loss.py [--rounds 5]

Output layer and cross-entropy of 2048 tokens over 32,000 words, forward and backward.
Each variant in a process of its own, in turn: median CPU time of a step, and the peak
of memory above that of the inputs. Writes results/compiled_loss.md.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from templates.training_utils import compile_model_if_available  # noqa: E402

TOKENS, WIDTH, WORDS = 2048, 256, 32_000
RESULT = ROOT / "benchmarks" / "results" / "compiled_loss.md"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(compiled: bool, half: bool) -> tuple[float, float]:
    """Milliseconds of a step, and MB above what the inputs take."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss_function = nn.CrossEntropyLoss()
    if compiled:
        compile_model_if_available(loss_function, mode="default", dynamic=None)
        small = torch.randn(8, WORDS, requires_grad=True)
        loss_function(small, torch.zeros(8, dtype=torch.int64)).backward()
    hidden_TD = torch.randn(TOKENS, WIDTH)
    weight_VD = nn.Parameter(torch.randn(WORDS, WIDTH) * 0.02)
    targets_T = torch.randint(0, WORDS, (TOKENS,))
    times = []
    base = peak_mb()
    for _ in range(6):
        start = time.process_time()
        weight_VD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_function(hidden_TD @ weight_VD.T, targets_T)
        loss.backward()
        times.append((time.process_time() - start) * 1000)
    return statistics.median(times[2:]), peak_mb() - base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(*map(bool, options.one)))
        return
    variants = [(half, compiled) for half in (0, 1) for compiled in (0, 1)]
    found: dict[tuple[int, int], list[list[float]]] = {v: [] for v in variants}
    for _ in range(options.rounds):
        for half, compiled in variants:
            words = [sys.executable, __file__, "--one", str(compiled), str(half)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[half, compiled].append([float(w) for w in done.stdout.split()[-2:]])
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, torch "
        f"{torch.__version__}; `OMP_NUM_THREADS=1 python benchmarks/compiled_loss.py`, "
        f"median of {options.rounds} processes each. {TOKENS} tokens, width {WIDTH}, "
        f"{WORDS} words.",
        "",
        "| | ms a step | MB above the inputs |",
        "|---|---|---|",
    ]
    for (half, compiled), values in found.items():
        name = f"{'bf16' if half else 'fp32'}, {'compiled' if compiled else 'eager'}"
        ms, mb = (statistics.median(column) for column in zip(*values, strict=True))
        lines.append(f"| {name} | {ms:.0f} | {mb:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
