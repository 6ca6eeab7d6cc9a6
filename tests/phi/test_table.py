"""Tables by themselves: exact for cubics, as accurate as asked for all else, and of a size that N does not set."""

from __future__ import annotations

import math

import pytest
import torch

from basisadapt.phi import cubic_tables, sums
from basisadapt.phi.bases import BSpline, GaussianRBF, Sinc
from basisadapt.phi.basis import BASES, TransferBasis
from basisadapt.phi.choice import Fitted, Work, evaluator
from basisadapt.phi.cubic_tables import FINE, SLOPE, Spline, Table, fit
from basisadapt.phi.evaluators import Direct, Series
from basisadapt.phi.grids import GRIDS
from tests.phi.test_evaluators import Morlet, factors, make

RADIUS = torch.tensor(2.0, dtype=torch.float64)
Z = torch.linspace(-2, 2, 77, dtype=torch.float64).reshape(7, 11)
UPSTREAM = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MOST = 1 << 20


def pulled(chosen, z=Z, upstream=UPSTREAM):
    value, slope, moments = chosen.pullback(z, upstream, chosen.scratch(z.numel(), z))
    assert torch.equal(value, chosen.value(z, chosen.scratch(z.numel(), z)))
    return [value, slope, *chosen.gradients(moments)]


def trained(basis, num, omega, gain, grid="uniform", spread=0.02):
    """A function whose bandwidths have moved apart, as training moves them."""
    transfer = make(basis, num, omega, gain=gain, grid=grid)
    apart = torch.exp(spread * torch.randn(num, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return transfer.with_parameters(transfer.alpha, transfer.omega * apart, *transfer.parameters[2:])


def test_a_table_of_a_cubic_is_exact():
    transfer = make("polynomial", 4, omega=0.5, gain=1.7)
    for half in (FINE, 2 * FINE, 7 * FINE, 100 * FINE):
        table = Table(transfer, RADIUS, half, torch.float64)
        torch.testing.assert_close(pulled(table), pulled(Direct(transfer)), rtol=1e-8, atol=1e-8)
        assert 2 * half <= table.cells <= 2 * half + FINE
        assert table.accurate(1e-9)


@pytest.mark.parametrize("basis", ["sinc", "gaussian_rbf"])
def test_a_table_in_chunks_is_that_made_at_once(monkeypatch, basis):
    transfer = trained(basis, 40, 6.0, 1.0)
    found = []
    for at_once in (1 << 30, 3000, 1):
        monkeypatch.setitem(sums.AT_ONCE, "cpu", at_once)
        table = Table(transfer, RADIUS, 25 * FINE, torch.float64)
        found.append([*pulled(table), torch.tensor([table.accurate(t) for t in (1e-2, 1e-9)])])
    for chunked in found[1:]:
        torch.testing.assert_close(chunked, found[0], rtol=1e-11, atol=1e-11)
    assert found[0][-1].tolist() == [True, False]


@pytest.mark.parametrize("gain", [1.0, 300.0])
@pytest.mark.parametrize("basis", [*sorted(BASES), Morlet()], ids=[*sorted(BASES), "morlet"])
def test_values_slopes_and_gradients_are_those_of_the_direct_sum(basis, gain):
    """In float64, so that nothing but the table's own error is left: value and slope within what is promised, and the
    gradients to α, ω, the grid and the gain within ten tolerances of what they were if nothing cancelled."""
    cases = [(1, 3.0, "uniform", 0.0), (20, 3.2, "random", 0.3), *((20, 3.2, grid, 0.02) for grid in sorted(GRIDS))]
    for num, omega, grid, spread in cases:
        transfer = trained(basis, num, omega, gain, grid, spread)
        radius = torch.tensor(0.15, dtype=torch.float64)
        z = 0.15 * (2 * torch.rand(40, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 1)
        upstream = torch.randn(40, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        table = fit(transfer, radius, 1e-6, torch.float64, MOST, 0)
        assert isinstance(table, Spline if basis == "bspline" else Table)
        value, slope, *gradients = pulled(table, z, upstream)
        true_value, true_slope, *truth = pulled(Direct(transfer), z, upstream)
        path = transfer.scaling
        line = radius * torch.linspace(-1, 1, 1001, dtype=torch.float64).requires_grad_()
        on_line = transfer(line) - path * line
        (slopes,) = torch.autograd.grad(on_line.sum(), line, retain_graph=True)
        assert (value - true_value).abs().max() <= 1.2e-6 * on_line.abs().max()
        assert ((slope - true_slope) / upstream).abs().max() <= 1.2 * SLOPE * 1e-6 * slopes.abs().max()
        each = [p.expand(len(line), *p.shape).clone().requires_grad_() for p in transfer.parameters]
        largest = torch.autograd.grad(
            (transfer.with_parameters(*each)(line.detach().unsqueeze(1))).sum(), each, allow_unused=True
        )
        for name, found, expected, size in zip(("alpha", "omega", "x", "g"), gradients, truth, largest, strict=True):
            allowed = 1e-13 if size is None else 1e-13 + 1e-5 * upstream.abs().sum() * size.abs().amax()
            assert (found - expected).abs().max() <= allowed, name


def test_the_first_table_that_is_accurate():
    """Narrower functions and less tolerance take more cells; more than there may be, and there is none."""
    for basis in ("sinc", "bspline"):
        halves = [
            fit(make(basis, 8, omega), RADIUS, tolerance, torch.float32, MOST, 0).half
            for omega, tolerance in ((1.0, 1e-4), (8.0, 1e-4), (8.0, 1e-6), (100.0, 1e-6))
        ]
        assert halves == sorted(set(halves))
        most = 2 * halves[-1]
        assert fit(make(basis, 8, 100.0), RADIUS, 1e-6, torch.float32, most - 2, 0) is None
        assert fit(make(basis, 8, 8.0), RADIUS, 1e-6, torch.float32, MOST, 2 * halves[2]).half >= 2 * halves[2]


def test_a_compact_function_takes_cells_where_it_is_not_constant():
    """Whatever the gain, and it is right beyond: F is its path and −c φ(0) there."""
    for basis in ("gaussian_rbf", "bspline"):
        tables = [fit(make(basis, 50, 8.0, gain=g), RADIUS, 1e-6, torch.float64, MOST, 0) for g in (10.0, 100.0, 1e4)]
        sizes = [table.cells for table in tables]
        assert max(sizes) <= 1.5 * min(sizes)
        far = torch.tensor([[-2.0, -1.7, 1.7, 2.0]], dtype=torch.float64)
        for table, gain in zip(tables, (10.0, 100.0, 1e4), strict=True):
            found, truth = (pulled(t, far, 1 + far) for t in (table, Direct(make(basis, 50, 8.0, gain=gain))))
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_what_a_table_takes_does_not_grow_with_the_number_of_compact_functions():
    """At the grid's own bandwidth: a fixed number of neighbours for a Gaussian, knots alone for a spline."""
    per_cell = []
    for num in (64, 512, 4096):
        gaussian = Table(make("gaussian_rbf", num, (num - 1) / 6), RADIUS, 8 * num * FINE, torch.float32)
        per_cell.append(gaussian.evaluations / gaussian.cells)
        assert Spline(make("bspline", num, (num - 1) / 6), RADIUS, 64, torch.float32).evaluations == 0
    assert max(per_cell) < 1.1 * min(per_cell)
    everywhere = Table(make("sinc", 64, 10.0), RADIUS, 8 * FINE, torch.float32)
    assert everywhere.evaluations >= 64 * everywhere.cells / FINE


def test_many_narrow_functions():
    """4,096 of them, at their grid's own bandwidth; 512 of the spline, whose sums have to be begun anew."""
    z = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(5, 8)
    for basis, num in (("gaussian_rbf", 4096), ("bspline", 512)):
        transfer = trained(basis, num, (num - 1) / 6, 1.0)
        table = fit(transfer, RADIUS, 1e-6, torch.float64, MOST, 0)
        upstream = UPSTREAM.flatten()[:40].view(5, 8)
        for found, truth in zip(pulled(table, z, upstream), pulled(Direct(transfer), z, upstream), strict=True):
            assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_knots_anywhere():
    """Outside the range, at its ends, at the ends of cells, at one place, and of functions wider than all."""
    far = torch.tensor([0.0, 0.0, -2.0, 2.0, 1.0, -1.0, 5.0, -40.0, 0.3], dtype=torch.float64)
    omega = torch.tensor([1.0, 1.0, 1.0, 2.0, 8.0, 8.0, 0.4, 0.05, 1e-3], dtype=torch.float64)
    start = make("bspline", 9)
    transfer = start.with_parameters(start.alpha, omega, far, start.gain)
    for half in (64, 1000, 4096, 4097):
        spline = Spline(transfer, RADIUS, half, torch.float64)
        found, truth = pulled(spline), pulled(Direct(transfer))
        if spline.accurate(1e-6):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    assert spline.accurate(1e-6)
    assert not Spline(transfer, RADIUS, 61, torch.float64).accurate(1e-6)


def test_a_splines_check_is_of_its_errors():
    """What it allows is what the direct sum finds, and not ten times less."""
    transfer = trained("bspline", 12, 2.0, 1.0)
    z = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
    truth = transfer(z)
    size = (truth - transfer.scaling * z).abs().max()
    for half in (64, 200, 700):
        spline = Spline(transfer, RADIUS, half, torch.float64)
        error = float((spline.value(z, z) - truth).abs().max() / size)
        reached = next(t for t in (2.0**-k for k in range(60, 0, -1)) if spline.accurate(t))
        assert error <= reached
    assert not spline.accurate(1e-12)


def test_accuracy_is_of_value_and_slope_everywhere():
    for place in (-1.9, 0.0, 1.9):  # one narrow peak: nothing else is inaccurate
        parameters = [torch.tensor([number], dtype=torch.float64) for number in (1.0, 40.0, place)]
        any_peak = make("sinc", 1, path=False, centre=False)
        narrow = any_peak.with_parameters(*parameters, any_peak.gain)
        assert not Table(narrow, RADIUS, 6 * FINE, torch.float64).accurate(1e-3)
        assert Table(narrow, RADIUS, 400 * FINE, torch.float64).accurate(1e-3)


@pytest.mark.parametrize("basis", ["sinc", "bspline"])
def test_a_value_may_be_wrong_where_its_slope_does_not_matter(monkeypatch, basis):
    monkeypatch.setattr(cubic_tables, "SLOPE", float("inf"))
    kind = Spline if basis == "bspline" else Table
    table = kind(make(basis, 8), RADIUS, 6 * FINE, torch.float64)
    assert [table.accurate(tolerance) for tolerance in (1e-3, 1e-9)] == [True, False]


@pytest.mark.parametrize("kind", [Table, Spline])
def test_what_is_not_finite_or_beyond_the_range_is_not_a_number(kind):
    table = kind(make("bspline", 8), RADIUS, 5 * FINE, torch.float64)
    z = torch.tensor([float("nan"), float("inf"), 2.1, -2.1, 0.5], dtype=torch.float64)
    assert table.value(z, z).isfinite().tolist() == [False] * 4 + [True]
    value, slope, (moments,) = table.pullback(z, torch.ones_like(z), z)
    assert value.isfinite().tolist() == slope.isfinite().tolist() == [False] * 4 + [True]
    assert moments.shape == (4, table.cells)


def test_a_place_near_zero_is_known_to_its_own_rounding():
    """At a range of 3,000 widths, float32 knows what lies near zero as well as BA itself is known there."""
    transfer = make("sinc", 8, 30.0, gain=100.0, path=False)
    table = fit(transfer, RADIUS, 1e-6, torch.float32, MOST, 0)
    z = torch.linspace(-1e-3, 1e-3, 101)
    truth = transfer(z.double())
    assert (table.value(z, z).double() - truth).abs().max() <= 3e-6 * truth.abs().max()


@pytest.mark.parametrize("name", sorted(BASES))
def test_quick_values_are_those_of_the_formula(name):
    for u in (torch.linspace(-9, 9, 2001), torch.tensor([0.0, 1e-300, -1e-9, 1e-6, 1e-4, 1e-2])):
        u = u.double()
        leaf = u.clone().requires_grad_()
        b = BASES[name]().forward(leaf)
        (slope,) = torch.autograd.grad(b.sum(), leaf)
        quick, quick_slope = BASES[name]().values(u.clone(), slopes=True)
        torch.testing.assert_close(quick, b.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(quick_slope, slope, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(BASES[name]().values(u.clone(), slopes=False)[0], quick, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", sorted(BASES))
def test_beyond_its_support_a_basis_is_zero_and_its_jumps_are_its_own(name):
    basis = BASES[name]()
    if math.isfinite(basis.support):
        far = torch.tensor([-1.0, 1.0, -5.0, 5.0], dtype=torch.float64) * basis.support
        assert basis.forward(far).abs().max() <= 1e-18
    if basis.jumps:
        u = torch.linspace(-4, 4, 801, dtype=torch.float64)
        powers = sum(jump * (u - knot).clamp_min(0).pow(3) / 6 for knot, jump in basis.jumps.items())
        torch.testing.assert_close(basis.forward(u), powers, rtol=0, atol=1e-13)


def test_another_function_inherits_nothing_that_is_known_of_the_first():
    class Wider(BSpline):
        def forward(self, u):
            return super().forward(u / 2)

    class Shifted(Sinc):
        def forward(self, u):
            return super().forward(u - 1)

    class Same(GaussianRBF):
        pass

    assert Wider.support == math.inf
    assert not Wider.jumps
    assert Shifted.values is TransferBasis.values
    assert Same.support == GaussianRBF.support


def work(transfer, shape, radius):
    A, B = factors(*shape, 2, radius)
    parameters = tuple(p.unsqueeze(0) for p in transfer.parameters)
    return Work(transfer.with_parameters, parameters, lambda _: transfer, [(A, B)], torch.ones(1), (1e-6,))


def test_the_direct_sum_where_a_table_would_take_longer():
    transfer, radius = make("gaussian_rbf", 3, 40.0), torch.tensor(3.0, dtype=torch.float64)
    assert Fitted.to(work(transfer, (400, 300), 3.0), 0, radius, None).kind is Table
    assert Fitted.to(work(transfer, (3, 4), 3.0), 0, radius, None).kind is None


def test_a_table_is_sought_from_about_the_size_that_it_had():
    transfer, radius = make("sinc", 50, 8.0), torch.tensor(3.0, dtype=torch.float64)
    of_work = work(transfer, (400, 300), 3.0)
    first = Fitted.to(of_work, 0, radius, None)
    larger = Fitted(Table, 4 * first.half, first.reach, first.price)
    assert Fitted.to(of_work, 0, radius, first).half == first.half
    assert 2 * first.half < Fitted.to(of_work, 0, radius, larger).half <= 4 * first.half
    assert Fitted.to(of_work, 0, torch.tensor(float("nan")), None).kind is None


def test_a_short_series_stays_and_a_long_one_gives_way_to_a_table():
    A, B = factors(384, 384, 4, 0.1)
    kinds = [evaluator(make("sinc", 50, gain=gain), A, B, "torch") for gain in (1.0, 100.0)]
    assert [type(kind) for kind in kinds] == [Series, Table]
