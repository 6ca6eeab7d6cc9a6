"""How far an update is from a multiple of BA, against least squares as a library solves them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from basisadapt.diagnostics.linear import linear_fit


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_least_squares(seed):
    product, update = drawn(7, 5, seed=seed), drawn(7, 5, seed=seed + 100)
    (c,), (residual,), *_ = np.linalg.lstsq(product.reshape(-1, 1).numpy(), update.flatten().numpy(), rcond=None)
    found = linear_fit(update, product)
    assert found == pytest.approx((c, math.sqrt(residual / (update.numpy() ** 2).sum())), rel=1e-13)


def test_a_multiple_has_no_rest():
    c, share = linear_fit(-1.65 * drawn(4, 6), drawn(4, 6))
    assert c == pytest.approx(-1.65, rel=1e-14)
    assert share < 1e-15


def test_what_is_orthogonal_is_all_rest():
    assert linear_fit(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]])) == (0.0, 1.0)


def test_the_share_does_not_depend_on_sizes():
    update, product = drawn(4, 6), drawn(4, 6, seed=1)
    c, share = linear_fit(update, product)
    assert linear_fit(1e-3 * update, 50 * product) == pytest.approx((c * 1e-3 / 50, share), rel=1e-13)


def test_without_an_update_or_a_product():
    zero, some = torch.zeros(2, 2), torch.ones(2, 2)
    assert linear_fit(some, zero)[1] == 1.0
    assert math.isnan(linear_fit(some, zero)[0])
    assert linear_fit(zero, some)[0] == 0.0
    assert math.isnan(linear_fit(1e-16 * some, some)[1]), "rounding is no update"
    assert all(map(math.isnan, linear_fit(zero, zero)))
