"""Use when a long run meets a batch now and then that does not fit.

Not when no batch fits (checkpointing, bf16 first), nor inside DDP as it stands: all
ranks have to retry together.
"""

import gc
from collections.abc import Callable

import torch
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def backward_in_pieces(
    model: nn.Module, loss_of: Loss, x: torch.Tensor, y: torch.Tensor, micro_batch: int
) -> int:
    """Gradients of the batch's mean loss; the micro-batch that fitted for next time."""
    while True:
        model.zero_grad(set_to_none=True)  # what a failed try has left behind
        pieces = zip(x.split(micro_batch), y.split(micro_batch), strict=True)
        try:
            for part, target in pieces:
                share = len(part) / len(x)  # not 1 / pieces: the last may be smaller
                (loss_of(part, target) * share).backward()
            return micro_batch
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        # Only out here: inside `except` the traceback holds the failed step's tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        micro_batch //= 2


if __name__ == "__main__":
    import weakref

    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    x, y = torch.randn(11, 4), torch.randn(11, 1)
    nn.functional.mse_loss(model(x), y).backward()
    whole = model.weight.grad.clone()
    failed: list[weakref.ref] = []

    def loss_of(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert all(ref() is None for ref in failed), "the failed step is still alive"
        output = model(part)
        if len(part) > 4:
            failed.append(weakref.ref(output))
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return nn.functional.mse_loss(output, target)

    fitted = backward_in_pieces(model, loss_of, x, y, micro_batch=11)
    assert fitted == 2 and len(failed) == 2, (fitted, failed)
    torch.testing.assert_close(model.weight.grad, whole)  # pieces 2 2 2 2 2 1
