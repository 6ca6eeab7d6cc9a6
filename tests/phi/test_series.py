"""Series by themselves: how they are packed, where they are cut, what is verified, what autograd may do with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev

from basisadapt.phi import series
from basisadapt.phi.extent import Extent
from tests.phi.test_evaluators import make

CPU = torch.device("cpu")


def tables(transfer):
    """What the compilation takes of one function: the functions of a bank of one module, and its tables."""
    return transfer.with_parameters, tuple(p.unsqueeze(0) for p in transfer.parameters)


def extent(*radius):
    return Extent.of(torch.tensor(radius, dtype=torch.float64))


def padded(values, length):
    return np.pad(values, (0, length - len(values)))


@pytest.mark.parametrize("points", series.POINTS)
def test_a_packed_series_is_numpys(points):
    drawn = torch.randn(2, points, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    degree, radius = torch.tensor([5, 20], dtype=torch.int32), torch.tensor([0.5, 3.0], dtype=torch.float64)
    together = (drawn @ series.with_powers(points, CPU)).requires_grad_()
    packed = series.pack(series.SeriesBatch(together, degree, radius, torch.zeros(2) > 0, torch.ones(2) > 0))
    assert not packed.requires_grad
    for row, c, D, R in zip(packed.numpy(), drawn.numpy(), (5, 20), (0.5, 3.0), strict=True):
        inside = np.arange(points) < D
        parts = values, slopes = c * inside, padded(chebyshev.chebder(c) / R, points) * inside
        short = [padded(chebyshev.cheb2poly(part[: series.POWER_COUNT]), series.POWER_COUNT) for part in parts]
        beyond = np.zeros(series.POINTS[-1] - points)
        expected = np.concatenate([[D, 1 / R], *short, values, beyond, slopes, beyond])
        np.testing.assert_allclose(row, expected, rtol=1e-11, atol=1e-9)


def cut(*columns, radius=1.0, tolerance=1e-6):
    """The degree of functions by their coefficients of T_0, T_1, ..., of 32; and whether it is enough."""
    rows = np.stack([padded(np.array(column, dtype=float), 32) for column in columns])
    coefficients = torch.from_numpy(rows).T.unsqueeze(0)
    degree, resolved = series._degree(coefficients, extent(radius), tolerance)
    assert degree.dtype == torch.int32
    return degree.item(), resolved.item()


def test_a_series_is_cut_one_behind_what_is_needed():
    assert cut([1, 1, 1, 1], [1]) == cut([1], [1, 1, 1, 1]) == (5, True)  # the longer of the function and its probe
    assert cut([1], [2]) == (2, True)  # never less than two
    assert cut([1] * 24, [1]) == (25, True)


def by_definition(columns, tolerance):
    """The same, coefficient by coefficient."""
    for D in range(32):
        for c, is_slope in [(c, False) for c in columns] + [(padded(chebyshev.chebder(c), 32), True) for c in columns]:
            on_nodes = chebyshev.chebval(chebyshev.chebpts1(32), c)
            size = max(np.ptp(on_nodes), 1e-3 * abs(on_nodes).max()) if is_slope else abs(on_nodes).max()
            if abs(c[D:]).sum() + abs(c[24:]).sum() > tolerance * size:
                break
        else:
            return max(D + 1, 2), True
    return 32, False


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-11])
def test_series_are_cut_by_definition(tolerance):
    rng = np.random.default_rng(0)
    found = set()
    for decay in np.linspace(0.05, 0.8, 25):
        columns = rng.normal(size=(2, 32)) * np.array([[decay], [0.8 * decay]]) ** np.arange(32)
        columns[:, 1] *= rng.choice([1, 1e4])  # steep, so that the slope's variation is small beside it
        assert cut(*columns, tolerance=tolerance) == by_definition(columns, tolerance)
        found.add(cut(*columns, tolerance=tolerance))
    assert len(found) >= 6


def test_coefficients_in_the_last_quarter_tell_of_those_beyond():
    assert cut([1, *[0] * 23, 1], [1]) == (32, False)
    assert cut([1, *[0] * 30, 1], [1]) == (32, False)
    assert cut([1, *[0] * 22, 1], [1]) == (25, True)


def test_of_a_range_that_is_not_finite_nothing_is_asked():
    assert cut([1] * 32, [1], radius=float("nan")) == (32, True)
    assert cut([1] * 32, [1], radius=float("inf")) == (32, True)
    assert cut([1] * 32, [1]) == (32, False)


def verified(transfer, radius, tolerance=1e-6, points=32):
    of_bank, parameters = tables(transfer)
    return series.verify(of_bank, parameters, torch.tensor([radius], dtype=torch.float64), points, tolerance).tolist()


def test_verification_looks_between_the_nodes_and_at_grid_points():
    assert verified(make("sinc", 8), 1.0) == [True]
    assert verified(make("sinc", 8), 30.0) == [False]
    assert verified(make("gaussian_rbf", 1, omega=400.0), 3.0) == [False]  # its peak, at zero, is no node
    assert verified(make("gaussian_rbf", 200, omega=400.0, amplitude="zero"), 3.0) == [False]  # the probe's are
    assert verified(make("gaussian_rbf", 8, omega=1e6, gain=0.5), 2.0) == [False]  # and a gain moves them
    assert verified(make("sinc", 8), float("nan")) == [True]


def test_every_module_is_verified_on_its_own_range():
    single = make("sinc", 8)
    together = tuple(p.expand(3, *p.shape) for p in single.parameters)
    radius = torch.tensor([1.0, 30.0, 2.0], dtype=torch.float64)
    assert series.verify(single.with_parameters, together, radius, 32, 1e-6).tolist() == [True, False, True]


def test_the_path_is_added_to_the_second_coefficient():
    radius = torch.tensor([0.7], dtype=torch.float64)
    found = []
    for path in (True, False):
        of_bank, parameters = tables(make("sinc", 5, path=path))
        batch = series.compile_series(of_bank, parameters, Extent.of(radius), 32, 1e-6)
        assert batch.radius is radius
        found.append(batch.coefficients[0, :32])
    expected = torch.zeros(32, dtype=torch.float64)
    expected[1] = 1.5 * 0.7  # s p R
    torch.testing.assert_close(found[0] - found[1], expected)


def test_gradients_may_be_asked_for_again_but_not_for_themselves():
    transfer = make("sinc", 5)
    of_bank, parameters = tables(transfer)
    parameters = tuple(p.float().requires_grad_() for p in parameters)
    batch = series.compile_series(of_bank, parameters, extent(1.0), 32, 1e-6)
    first, again = (torch.autograd.grad(batch.coefficients.sum(), parameters, retain_graph=True) for _ in range(2))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(first, again, strict=True))
    twice = torch.autograd.grad(batch.coefficients.square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice[0].sum().backward()


@pytest.mark.parametrize("made", [series._nodes, series._polynomials, series._differentiation, series.with_powers])
def test_tables_are_made_once_and_can_be_used_in_training(made):
    with torch.inference_mode():
        table = made(40, CPU)
    assert not table.is_inference()
    assert made(40, CPU) is table
