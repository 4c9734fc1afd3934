"""Use when a scheduler may stop the job, or a CUDA error leaves you with a riddle.

Not when you would go on after a device-side assert: no call on that GPU works again
in this process; only out of memory can be retried (out_of_memory.py).
"""

import signal
import sys
from types import FrameType

import torch


class StopRequest:
    """SIGTERM and Ctrl-C set a flag; the loop ends the step it is in, saves, leaves."""

    def __enter__(self):
        self.signal = 0
        signals = (signal.SIGTERM, signal.SIGINT)
        self.old = {number: signal.signal(number, self.ask) for number in signals}
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self.old[number])  # a second one acts at once

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        return 128 + self.signal  # 143 after SIGTERM, as schedulers expect


def explain(error: BaseException) -> str:
    """What to do about an error. Kernels report late: the line shown may be wrong."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError):
        return "smaller micro-batch, bf16, checkpointing: can be retried"
    if "device-side assert" in text:
        return (
            "mostly a label or index out of range: run one batch on the CPU to see it"
        )
    if "illegal memory access" in text:
        return "run again with CUDA_LAUNCH_BLOCKING=1 to see the real line"
    if "expected all tensors to be on the same device" in text:
        return (
            "an input or buffer was left behind: register_buffer moves with the model"
        )
    if "no kernel image" in text:
        return "this build has no code for this GPU: another wheel of torch"
    return "unknown: raise it unchanged"


if __name__ == "__main__":
    steps, saved = 0, None
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        for steps in range(1, 6):
            if steps == 3:
                signal.raise_signal(signal.SIGTERM)
            if stop.signal:
                saved = steps
                break
    assert (steps, saved, stop.exit_code) == (3, 3, 143)
    assert signal.getsignal(signal.SIGINT) is before
    assert "retried" in explain(torch.OutOfMemoryError("CUDA out of memory"))
    try:
        torch.ones(2) @ torch.ones(3)
    except RuntimeError as error:
        assert "unchanged" in explain(error)
    else:
        sys.exit("the product of different lengths did not fail")
