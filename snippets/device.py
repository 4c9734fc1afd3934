"""Use when a script has to pick device and precision by itself, on any machine.

Not when torchrun starts it: each rank takes the GPU of its LOCAL_RANK (distributed.py).
"""

import torch


def pick_device(force_cpu: bool = False) -> torch.device:
    """The CUDA device with the most memory, else MPS, else the CPU."""
    if torch.cuda.is_available() and not force_cpu:
        devices = range(torch.cuda.device_count())
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in devices]
        return torch.device("cuda", sizes.index(max(sizes)))
    if torch.backends.mps.is_available() and not force_cpu:
        return torch.device("mps")
    return torch.device("cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """What autocast should compute in; float32 means: leave autocast off."""
    if device.type != "cuda":
        return torch.float32  # bf16 on CPUs: 0.5 to 1.9 x, slower for small models
    with torch.cuda.device(device):  # the question is about the current device
        # Without the argument the answer is yes for cards that only emulate bf16.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
    # Tensor cores came with 7.0; before them fp16 is no faster than fp32.
    fast_fp16 = torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if fast_fp16 else torch.float32


if __name__ == "__main__":
    device = pick_device()
    dtype = pick_dtype(device)
    print(f"{device}, {dtype}")
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        result = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    assert result.dtype is dtype and (result == 2).all()
    assert pick_device(force_cpu=True).type == "cpu"
    assert pick_dtype(torch.device("cpu")) is torch.float32
