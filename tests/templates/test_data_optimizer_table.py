"""Columns of tables: which are used, their mean and spread, labels as numbers."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from templates.data_optimizer import (
    column_statistics,
    is_fraction,
    measure_scales,
    number_columns,
    number_labels,
)


def test_numbers_are_features_and_nothing_else():
    types = {
        "id": pa.string(),
        "age": pa.int8(),
        "price": pa.decimal128(8, 2),
        "on": pa.bool_(),
        "when": pa.timestamp("s"),
        "height": pa.float32(),
        "label": pa.int64(),
        "tags": pa.list_(pa.int64()),
    }
    assert number_columns(types, "label") == ["age", "price", "on", "height"]
    assert "label" in number_columns(types, "age")


def test_what_need_not_be_whole_is_a_fraction():
    for kind in (pa.float16(), pa.float64(), pa.decimal128(8, 2)):
        assert is_fraction(kind)
    for kind in (
        pa.int64(),
        pa.bool_(),
        pa.string(),
        pa.dictionary(pa.int8(), pa.string()),
    ):
        assert not is_fraction(kind)


@pytest.mark.parametrize("cuts", [[50], [1, 1, 48], [10] * 5])
def test_statistics_are_numpys_however_the_rows_are_cut(cuts):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 5)) * [1, 1e-3, 1e6, 1, 1] + [0, 1e4, 1e8, 3, 0]
    rows[::3, 3] = np.nan
    rows[:, 4] = np.nan
    parts = torch.from_numpy(rows).split(cuts)
    mean, std = column_statistics(parts)
    assert mean.dtype is std.dtype is torch.float32
    np.testing.assert_allclose(mean[:4], np.nanmean(rows[:, :4], 0), rtol=1e-6)
    np.testing.assert_allclose(std[:4], np.nanstd(rows[:, :4], 0), rtol=1e-6)
    assert mean[4] == std[4] == 0


def test_a_constant_column_far_from_zero_has_no_spread():
    _, std = column_statistics(torch.full((40, 1), 1e7 + 0.1).split(7))
    assert std.item() == 0


def test_scales_of_a_regression_hold_those_of_its_labels():
    x, y = torch.randn(30, 2), torch.randn(30) * 4 + 100
    batches = list(zip(x.split(8), y.split(8), strict=True))
    scales = measure_scales(batches, regress=True)
    assert torch.allclose(scales["output_mean"], y.mean(), atol=1e-4)
    assert torch.allclose(scales["output_std"], y.std(correction=0), atol=1e-4)
    plain = measure_scales(batches, regress=False)
    assert set(plain) == {"mean", "std"}
    for name in plain:
        assert torch.equal(plain[name], scales[name])
        assert (
            scales[name].untyped_storage().nbytes() == 8
        )  # not a part of a larger one


def test_labels_of_any_kind_are_numbered():
    assert number_labels(["b", "a"], ["a", "b"]).tolist() == [1, 0]
    numbers = number_labels(torch.tensor([30, 10, 30]), [10, 20, 30])
    assert numbers.tolist() == [2, 0, 2]
    assert numbers.dtype is torch.int64
    assert number_labels(torch.tensor([True, False]), [False, True]).tolist() == [1, 0]
    assert number_labels([], ["a"]).shape == (0,)
