"""Contrastive training of embeddings: loss, whole-batch gradients, recall.

Shapes: B samples in a batch, D embedding width, N samples in a set. Row r of the
queries and row r of the documents belong together; all other rows are negatives.

    loss = accumulate_contrastive_gradients(
        lambda pair: (model(pair[0]), model(pair[1])),
        list(split_batch((queries, documents), micro_batch=32)),
    )
    optimizer.step()
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

SCORES_AT_ONCE = 2**24  # 64 MB in fp32


def _as_unit_rows(x_BD: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1, in fp32 at least."""
    dtype = torch.promote_types(x_BD.dtype, torch.float32)
    return nn.functional.normalize(x_BD.to(dtype), dim=-1)


def contrastive_loss(
    queries_BD: torch.Tensor,
    documents_BD: torch.Tensor,
    temperature: float | torch.Tensor = 0.05,
) -> torch.Tensor:
    """InfoNCE over cosine similarities, mean of both directions, in fp32.

    Each query must find its document among all of the batch, and each document its
    query (symmetric as in CLIP, arXiv:2103.00020). Around log(B) for embeddings that
    say nothing. A document that is twice in the batch counts as a wrong answer.

    Args:
        queries_BD: of any length, not all zero.
        documents_BD: row r belongs to query r.
        temperature: similarities are divided by it; 0.05 (SimCSE, arXiv:2104.08821) to
            0.01 for large batches; a 0-dim tensor can be learned.

    Raises:
        ValueError: different shapes.
    """
    if queries_BD.shape != documents_BD.shape or queries_BD.ndim != 2:
        raise ValueError(
            f"queries have the shape {tuple(queries_BD.shape)} and documents "
            f"{tuple(documents_BD.shape)}: both must be (batch, width), row by row"
        )
    with torch.autocast(queries_BD.device.type, enabled=False):
        logits_BB = _as_unit_rows(queries_BD) @ _as_unit_rows(documents_BD).T
        logits_BB = logits_BB / temperature
        match_B = torch.arange(len(logits_BB), device=logits_BB.device)
        to_document = nn.functional.cross_entropy(logits_BB, match_B)
        to_query = nn.functional.cross_entropy(logits_BB.T, match_B)
    return (to_document + to_query) / 2


def _remember_generators() -> Callable[[], None]:
    """Return a function that sets the CPU's and the GPU's generator back."""
    modules: list[Any] = [torch]
    if torch.cuda.is_initialized():
        modules.append(torch.cuda)  # of the current device
    if torch.backends.mps.is_available():
        modules.append(torch.mps)
    states = [module.get_rng_state() for module in modules]

    def restore() -> None:
        for module, state in zip(modules, states, strict=True):
            module.set_rng_state(state)

    return restore


def _same_rows(x_BD: torch.Tensor) -> torch.Tensor:
    return x_BD


def accumulate_contrastive_gradients(
    encode: Callable[[Any], tuple[torch.Tensor, torch.Tensor]],
    micro_batches: Sequence[Any],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = contrastive_loss,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    gather: Callable[[torch.Tensor], torch.Tensor] = _same_rows,
    set_sync: Callable[[bool], None] | None = None,
) -> torch.Tensor:
    """Add the gradients of the whole batch's loss, one micro-batch's memory at a time.

    Accumulating would shrink the pool of negatives to the micro-batch. Gradient caching
    (arXiv:2101.06983) does not: it embeds all micro-batches without gradients, takes
    the loss's gradients with respect to the embeddings, and embeds each micro-batch
    again to carry them on to the weights. Costs one forward more. Dropout masks are the
    same in both passes. A BatchNorm sees each micro-batch alone, and twice.

    Keeps nothing between calls: after out of memory clear the gradients and call again
    with smaller micro-batches.

    Args:
        encode: makes (queries_bD, documents_bD) of one micro-batch, under autocast if
            it is used.
        micro_batches: pieces of the batch, such as `list(split_batch(batch, 32))`.
        loss_fn: makes a 0-dim loss of all queries_BD and documents_BD.
        backward: called once, with the loss; may weigh and scale it first:
            `lambda loss: scaler.scale(loss).backward()`.
        gather: collects the rows of all ranks, in the same order for both sides; its
            own backward must sum gradients over the ranks.
        set_sync: called before each second forward, with True for the last only: there
            DDP or FSDP2 should exchange gradients. All ranks need the same number of
            micro-batches.

    Returns:
        The loss, detached.
    """
    restores, queries, documents = [], [], []
    with torch.no_grad():
        for piece in micro_batches:
            restores.append(_remember_generators())
            queries_bD, documents_bD = encode(piece)
            queries.append(queries_bD.detach())
            documents.append(documents_bD.detach())
    # Autocast would go on using weights that it cast without gradients.
    torch.clear_autocast_cache()
    sizes = [len(piece) for piece in queries]
    queries_BD = torch.cat(queries).requires_grad_()
    documents_BD = torch.cat(documents).requires_grad_()
    loss = loss_fn(gather(queries_BD), gather(documents_BD))
    backward(loss)
    after_loss = _remember_generators()

    queries_grads, documents_grads = (
        x_BD.grad.split(sizes) for x_BD in (queries_BD, documents_BD)
    )
    for index, piece in enumerate(micro_batches):
        if set_sync is not None:
            set_sync(index == len(sizes) - 1)
        restores[index]()
        embedded = encode(piece)
        torch.autograd.backward(
            embedded, (queries_grads[index], documents_grads[index])
        )
    after_loss()
    return loss.detach()


@torch.no_grad()
def recall_at_k(
    queries_ND: torch.Tensor,
    documents_ND: torch.Tensor,
    ks: Iterable[int] = (1, 5, 10),
) -> dict[str, float]:
    """Share of queries whose own document is among the k most similar ones.

    By cosine similarity, over all N documents. Ties count as misses, so embeddings that
    are all alike, or NaN, find nothing. Takes 64 MB (or 4 N bytes, if that is more)
    beside the embeddings.

    Returns:
        `{"recall@1": 0.5, ...}`; one wait for the GPU.

    Raises:
        ValueError: different shapes, no rows, or k < 1.
    """
    ks = list(ks)
    if queries_ND.shape != documents_ND.shape or not len(queries_ND) or min(ks) < 1:
        raise ValueError(
            f"queries {tuple(queries_ND.shape)}, documents {tuple(documents_ND.shape)}"
            f", ks={ks}: the shapes must be equal, with a row at least, and each k >= 1"
        )
    queries_ND, documents_ND = _as_unit_rows(queries_ND), _as_unit_rows(documents_ND)
    count = len(documents_ND)
    rows = max(1, SCORES_AT_ONCE // count)
    hits = torch.zeros(len(ks), dtype=torch.long, device=queries_ND.device)
    for start in range(0, count, rows):
        scores_RN = queries_ND[start : start + rows] @ documents_ND.T
        own_R1 = scores_RN.diagonal(start).unsqueeze(1)
        rank_R = (~(scores_RN < own_R1)).sum(1)  # 1 is best; its own score counts too
        hits += torch.stack([(rank_R <= k).sum() for k in ks])
    return {
        f"recall@{k}": hit / count for k, hit in zip(ks, hits.tolist(), strict=True)
    }


class _InPieces:
    """A model that takes pieces of a batch one after another, and is itself else."""

    def __init__(self, model: nn.Module, split: Callable[[Any], Iterable[Any]]):
        self._model, self._split = model, split

    def __call__(self, inputs: Any) -> torch.Tensor:
        pieces = list(self._split(inputs)) or [inputs]  # a rank's share may be empty
        return torch.cat([self._model(piece) for piece in pieces])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@torch.inference_mode()
def evaluate_embeddings(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    compute_loss: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ks: Sequence[int] = (1, 10),
    split: Callable[[Any], Iterable[Any]] | None = None,
) -> dict[str, float]:
    """Mean loss of the batches, and how often a query finds its document among all.

    Args:
        batches: (queries, documents) on the model's device.
        compute_loss: (model, queries, documents) -> mean loss, (queries_BD,
            documents_BD); of several ranks it gathers the rows of all.
        split: cuts what the model is called with, for less memory at once; the loss is
            still that of whole batches.

    Returns:
        "val_loss", and "val_recall_at_1" and so on for each of `ks`.
    """
    model.eval()
    encoder = _InPieces(model, split) if split else model
    loss_sum, vectors = 0.0, []
    for queries, documents in batches:
        with autocast():
            loss, found = compute_loss(encoder, queries, documents)
        loss_sum += loss * len(found[0])
        vectors.append(found)
    queries_ND, documents_ND = (torch.cat(part) for part in zip(*vectors, strict=True))
    recall = recall_at_k(queries_ND, documents_ND, ks)
    return {
        "val_loss": float(loss_sum / len(queries_ND)),
        **{f"val_recall_at_{k}": recall[f"recall@{k}"] for k in ks},
    }
