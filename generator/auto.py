"""`--auto`: which sections suit this machine and the size of the model, and why.

Looks at the GPUs through `nvidia-smi` and at the platform; never imports torch.
"""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

# Bytes a parameter takes in training: weights, gradients and AdamW's two moments, fp32.
BYTES_PER_PARAMETER = 16
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of a GPU."""

    name: str
    memory_gb: float
    capability: float  # 9.0 on Hopper


@dataclass(frozen=True)
class Choice:
    """A section that was chosen, with the text of its value, and the reason."""

    section: str
    value: str | None
    reason: str


def parse_size(text: str) -> float:
    """A number of parameters: 350M, 1.3B, 20000000.

    Raises:
        ValueError: it is none.
    """
    number, unit = text, 1.0
    if text and text[-1].upper() in UNITS:
        number, unit = text[:-1], UNITS[text[-1].upper()]
    try:
        size = float(number) * unit
    except ValueError:
        size = 0.0
    if not 1 <= size < 1e15:
        raise ValueError(f"--auto={text}: give a number of parameters, such as 350M")
    return size


def find_gpus() -> list[Gpu]:
    """The GPUs of this machine; none where nvidia-smi is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = "--query-gpu=name,memory.total,compute_cap"
    try:
        done = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
        return [Gpu(n, float(mib) * 2**20 / 1e9, float(cap)) for n, mib, cap in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def choose_sections(parameters: float, gpus: Sequence[Gpu]) -> list[Choice]:
    """The sections for a model of that many parameters on these GPUs.

    Only the state of the training is counted against the memory, 16 bytes a parameter;
    activations depend on the batch: recovery from out of memory takes care of those.
    """
    chosen = [
        Choice("clip", None, "one bad batch cannot throw the weights far"),
        Choice("scheduler", "cosine", "warm-up and decay help nearly every training"),
        Choice("resume", None, "a killed run goes on where it stood"),
    ]
    if not gpus:
        return chosen
    weakest = min(gpus, key=lambda gpu: (gpu.capability, gpu.memory_gb))
    state_gb = parameters * BYTES_PER_PARAMETER / 1e9
    if weakest.capability >= 7:
        kind = "bf16" if weakest.capability >= 8 else "fp16"
        chosen.append(Choice("amp", None, f"{weakest.name} runs {kind} faster"))
        chosen.append(Choice("compile", None, f"{weakest.name} can run what it makes"))
    if weakest.capability >= 8.9 and parameters >= 1e9:
        reason = f"{weakest.name} has fp8, and the matrices are large enough to gain"
        chosen.append(Choice("fp8", None, reason))
    share = state_gb / weakest.memory_gb
    sharded = len(gpus) > 1 and share > 0.5
    if len(gpus) > 1:
        kind = "fsdp" if sharded else "ddp"
        fits = "does not fit well" if sharded else "fits"
        reason = f"{len(gpus)} GPUs; {state_gb:.1f} GB of state {fits} on each"
        chosen.append(Choice("distributed", kind, reason))
        share = share / len(gpus) if sharded else share
    left_gb = max(0.0, (1 - share) * weakest.memory_gb)
    for limit, kind in ((0.8, "offload"), (0.5, "full"), (0.3, "selective")):
        if share > limit:
            reason = f"{left_gb:.1f} GB are left on a GPU for activations"
            chosen.append(Choice("checkpointing", kind, reason))
            break
    if not sharded:
        reason = "a batch that does not fit is cut, not lost"
        chosen.append(Choice("oom_recovery", None, reason))
    return chosen


def describe_machine(gpus: Sequence[Gpu]) -> str:
    """One line on what was found."""
    if not gpus:
        apple = platform.system() == "Darwin" and platform.machine() == "arm64"
        name = "an Apple GPU" if apple else "no NVIDIA GPU"
        return f"{name}: fp32, since mixed precision is rarely faster there"
    return f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory_gb:.0f} GB"
