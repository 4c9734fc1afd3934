"""Which columns of a table a model can use, and the mean and spread of each.

features = number_columns(stream.source.types, label="price")
mean_F, std_F = column_statistics(batch["features"] for batch in loader)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def number_columns(types: Mapping[str, Any], label: str) -> list[str]:
    """The columns whose Arrow type is a number or boolean, without the label."""
    from pyarrow.types import is_boolean, is_decimal, is_floating, is_integer

    kinds = (is_boolean, is_decimal, is_floating, is_integer)
    return [
        name
        for name, kind in types.items()
        if name != label and any(is_kind(kind) for is_kind in kinds)
    ]


def is_fraction(kind: Any) -> bool:
    """Whether an Arrow type holds numbers that need not be whole."""
    from pyarrow.types import is_decimal, is_floating

    return is_floating(kind) or is_decimal(kind)


def column_statistics(
    batches: Iterable[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column over all (B, F) batches, in fp32.

    In one pass and fp64, by Chan's update: no difference of large sums. Missing values
    (NaN) are left out; a column of nothing else has mean 0 and deviation 0.
    """
    count_F = mean_F = squares_F = torch.zeros((), dtype=torch.float64)
    for x_BF in batches:
        x_BF = x_BF.double()
        there_F = (~x_BF.isnan()).sum(0)
        batch_mean_F = x_BF.nanmean(0).nan_to_num()
        batch_squares_F = (x_BF - batch_mean_F).square().nansum(0)
        total_F = (count_F + there_F).clamp(min=1)
        delta_F = batch_mean_F - mean_F
        mean_F = mean_F + delta_F * there_F / total_F
        squares_F = squares_F + batch_squares_F
        squares_F = squares_F + delta_F.square() * count_F * there_F / total_F
        count_F = count_F + there_F
    return mean_F.float(), (squares_F / count_F.clamp(min=1)).sqrt().float()


def measure_scales(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], regress: bool
) -> dict[str, torch.Tensor]:
    """Mean and deviation of each feature; in a regression, of the labels as well.

    Args:
        batches: features (B, F) and labels (B,).

    Returns:
        mean and std, (F,); output_mean and output_std, 0-dimensional.
    """
    if not regress:
        mean_F, std_F = column_statistics(x_BF for x_BF, _ in batches)
        return {"mean": mean_F, "std": std_F}
    mean_F, std_F = column_statistics(
        torch.cat((x_BF, y_B[:, None]), dim=1) for x_BF, y_B in batches
    )
    names = ("mean", "output_mean", "std", "output_std")
    parts = (mean_F[:-1], mean_F[-1], std_F[:-1], std_F[-1])
    return {name: part.clone() for name, part in zip(names, parts, strict=True)}
