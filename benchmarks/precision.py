"""What bf16 autocast gains or costs on this CPU, by the width of a Transformer layer.

    OMP_NUM_THREADS=1 python benchmarks/precision.py [--rounds 8]

A training step (forward, backward, fused AdamW) of one layer, fp32 and bf16 in turn;
the median CPU time of each. Writes results/precision.md.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

SIZES = ((32, 16, 64), (32, 64, 128), (16, 128, 256), (8, 256, 512))  # B, T, D
RESULT = Path(__file__).parent / "results" / "precision.md"


def time_steps(shape: tuple[int, int, int], rounds: int) -> tuple[float, float]:
    """Milliseconds of a step in fp32 and in bf16."""
    torch.manual_seed(0)
    width = shape[2]
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x_BTD = torch.randn(shape)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + 1):
        for half, taken in times.items():
            start = time.thread_time()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = layer(x_BTD).float().square().mean()
            loss.backward()
            optimizer.step()
            taken.append((time.thread_time() - start) * 1000)
    return tuple(statistics.median(values[1:]) for values in times.values())


def describe_units() -> str:
    """The units for bf16 that the kernel reports."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return ", ".join(sorted(words & {"avx512_bf16", "amx_bf16"})) or "no units for bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} with {describe_units()}, "
        f"one thread, torch {torch.__version__}; `OMP_NUM_THREADS=1 python "
        f"benchmarks/precision.py`, median of {options.rounds} training steps each",
        "",
        "| batch x tokens x width | fp32 ms | bf16 ms | bf16 is |",
        "|---|---|---|---|",
    ]
    for shape in SIZES:
        full_ms, half_ms = time_steps(shape, options.rounds)
        size = " x ".join(map(str, shape))
        ratio = full_ms / half_ms
        lines.append(f"| {size} | {full_ms:.1f} | {half_ms:.1f} | {ratio:.2f} x |")
    text = "\n".join(lines) + "\n"
    print(text)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
