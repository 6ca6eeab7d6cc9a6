"""Diagnostics against closed forms."""

from __future__ import annotations

import pytest
import torch

from basisadapt.diagnostics.spectrum import dc_share, stable_rank


def test_stable_rank():
    assert stable_rank(torch.eye(7)) == pytest.approx(7)
    assert stable_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 9))) == pytest.approx(1)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(1.25)
    assert stable_rank(torch.zeros(3, 4)) == 0
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    assert stable_rank(matrix) == pytest.approx((singular.square().sum() / singular[0] ** 2).item())
    assert stable_rank(3 * matrix.T) == pytest.approx(stable_rank(matrix))


def test_dc_share():
    assert dc_share(torch.full((3, 5), -2.0)) == pytest.approx(1)
    assert dc_share(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx(0)
    assert dc_share(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.25)
    assert dc_share(torch.zeros(2, 2)) == 0
