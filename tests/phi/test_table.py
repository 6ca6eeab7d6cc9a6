"""Tables by themselves: exact for cubics, in chunks as at once, and no larger than the tolerance asks."""

from __future__ import annotations

import pytest
import torch

from basisadapt.phi import evaluators
from basisadapt.phi.evaluators import Direct, Table
from tests.phi.test_evaluators import make

RADIUS = torch.tensor(2.0, dtype=torch.float64)
Z = torch.linspace(-2, 2, 77, dtype=torch.float64).reshape(7, 11)
UPSTREAM = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pulled(chosen):
    value, slope, sums = chosen.pullback(Z, UPSTREAM, chosen.scratch(Z.numel(), Z))
    assert torch.equal(value, chosen.value(Z, chosen.scratch(Z.numel(), Z)))
    return [value, slope, *chosen.gradients(sums)]


def test_a_table_of_a_cubic_is_exact():
    transfer = make("polynomial", 4, omega=0.5, gain=1.7)
    for cells in (1, 2, 7, 2048):
        table = Table(transfer, RADIUS, cells, torch.float64)
        torch.testing.assert_close(pulled(table), pulled(Direct(transfer)), rtol=1e-8, atol=1e-8)
        assert table.cells == cells
        assert table.accurate(1e-9)


@pytest.mark.parametrize("nodes", [8 * 30, 8 * 100, 8 * 64])
def test_a_table_in_chunks_is_that_made_at_once(monkeypatch, nodes):
    transfer = make("bspline", 8)
    whole = Table(transfer, RADIUS, 256, torch.float64)
    monkeypatch.setattr(evaluators, "NODES_AT_ONCE", nodes)
    chunked = Table(transfer, RADIUS, 256, torch.float64)
    assert max(len(chunk) for chunk in chunked._build(transfer)) == max(1, nodes // 8)
    torch.testing.assert_close(pulled(chunked), pulled(whole), rtol=1e-12, atol=1e-12)
    assert [chunked.accurate(t) for t in (1e-4, 1e-9)] == [whole.accurate(t) for t in (1e-4, 1e-9)] == [True, False]


def test_the_smallest_table_that_is_accurate():
    """The spline's third derivative jumps, so that the error of F' falls with the square of a cell's size."""
    found = [
        Table.fit(make("bspline", 8, omega), RADIUS, 1e-6, torch.float32, 10**6) for omega in (1.0, 3.0, 30.0, 1000.0)
    ]
    assert [table and table.cells for table in found] == [2048, 8192, 32768, None]
    assert Table.fit(make("bspline", 8, 3.0), RADIUS, 1e-6, torch.float32, 8191) is None  # it would have more cells


def test_accuracy_is_measured_in_every_chunk_and_of_value_and_slope(monkeypatch):
    monkeypatch.setattr(evaluators, "NODES_AT_ONCE", 16)
    for place in (-1.9, 0.0, 1.9):  # one narrow peak: nothing else is inaccurate
        parameters = [torch.tensor([number], dtype=torch.float64) for number in (1.0, 40.0, place)]
        any_peak = make("gaussian_rbf", 1, path=False, centre=False)
        narrow = any_peak.with_parameters(*parameters, any_peak.gain)
        assert not Table(narrow, RADIUS, 64, torch.float64).accurate(1e-3)
        assert Table(narrow, RADIUS, 4096, torch.float64).accurate(1e-3)


def test_a_value_may_be_wrong_where_its_slope_does_not_matter(monkeypatch):
    monkeypatch.setattr(evaluators, "SLOPE", float("inf"))
    table = Table(make("sinc", 8), RADIUS, 64, torch.float64)
    assert [table.accurate(tolerance) for tolerance in (1e-3, 1e-9)] == [True, False]


def test_what_is_not_finite_stays_so():
    table = Table(make("sinc", 8), RADIUS, 64, torch.float64)
    z = torch.tensor([float("nan"), float("inf"), 0.5], dtype=torch.float64)
    assert table.value(z, z).isfinite().tolist() == [False, False, True]
    value, slope, (sums,) = table.pullback(z, torch.ones_like(z), z)
    assert value.isfinite().tolist() == slope.isfinite().tolist() == [False, False, True]
    assert sums.shape == (64, 4)
