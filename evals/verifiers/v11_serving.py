"""serve.sh, run against a vllm that only writes down how it was called."""

import itertools
import os
import subprocess
from pathlib import Path

from evals.common import clean_environment, copy_of, expect, need, no_pytorch

FAKE = '#!/bin/sh\nfor word in "$@"; do echo "$word"; done > "$CALL_FILE"\n'


def called(answer: Path) -> list[str]:
    need(answer, "serve.sh")
    with copy_of(answer) as folder:
        tools = folder / "fake-tools"
        tools.mkdir()
        for name in ("vllm", "python", "python3"):
            (tools / name).write_text(FAKE, encoding="utf-8")
            (tools / name).chmod(0o755)
        call = folder / "call"
        path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = clean_environment(PATH=path, CALL_FILE=str(call))
        words = ["bash", "serve.sh"]
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, timeout=20
        )
        expect(done.returncode == 0, f"serve.sh: exit code {done.returncode}")
        expect(call.exists(), "serve.sh did not start vllm")
        text = call.read_text(encoding="utf-8").replace("=", "\n")
        return text.split()


def check_options(answer: Path) -> None:
    """vllm is started with model, two GPUs, 8192 tokens, port 8001, 0.9 of memory."""
    words = called(answer)
    expect("meta-llama/Llama-3.1-8B-Instruct" in words, f"no such model in {words}")
    values = dict(itertools.pairwise(words))
    wanted = {
        ("--tensor-parallel-size", "-tp"): 2,
        ("--max-model-len",): 8192,
        ("--port",): 8001,
        ("--gpu-memory-utilization",): 0.9,
    }
    for names, value in wanted.items():
        got = next((values[name] for name in names if name in values), None)
        expect(got is not None, f"{names[0]} is missing in {words}")
        expect(float(got) == value, f"{names[0]} {got}")


def check_no_pytorch(answer: Path) -> None:
    """Nothing of PyTorch and nothing of the generator is in the answer."""
    need(answer, "serve.sh")
    no_pytorch(answer)
