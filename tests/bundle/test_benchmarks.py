"""benchmarks/gpu.py where there is no GPU: real scripts and its timing, tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        "lm-smoke / generated: amp",
        "lm-smoke / generated: amp checkpointing=selective",
        "image-smoke / generated: tf32",
    ],
)
def test_a_row_of_the_gpu_benchmark_runs_on_a_cpu(row):
    words = [sys.executable, str(SCRIPT), "--smoke", "--row", row]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["row"] == row
    result = found["result"]
    assert result["step_ms"] > 0
    assert result["mfu"] is None  # a CPU's peak is not known
    if row.startswith("lm"):  # 4 x 32 tokens, 50304 outputs of width 32, 3 products
        assert result["flops_per_step"] > 3 * 2 * 4 * 32 * 50304 * 32


def test_the_rows_of_the_gpu_benchmark_are_listed_without_a_gpu():
    words = [sys.executable, str(SCRIPT), "--list"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert len(rows) == len(set(rows))
    for work in ("lm-124m", "lm-1b", "resnet50", "vit-b16"):
        assert f"{work} / nanoGPT-style loop" in rows
        assert f"{work} / generated: amp compile" in rows
