"""One optimizer step over a batch that is cut into micro-batches."""

from torch import nn

IGNORE = -100  # a target that does not count: padding


def train_step(model, optimizer, tokens, targets, micro_batches):
    """tokens, targets: (B, T) int64, targets IGNORE at padding. Returns the mean loss.

    model(tokens) gives logits of shape (B, T, V).
    """
    optimizer.zero_grad()
    total = 0.0
    parts = zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
    for part, wanted in parts:
        logits = model(part)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE
        )
        (loss / micro_batches).backward()
        total += loss.item() / micro_batches
    optimizer.step()
    return total
