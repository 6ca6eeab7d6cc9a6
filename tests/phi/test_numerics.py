"""Extreme parameters, in every basis: finite values and gradients; and the matrices behind a series against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer, inverse_softplus
from basisadapt.phi.basis import BASES
from basisadapt.phi.choice import evaluator
from basisadapt.phi.settings import PhiSettings
from basisadapt.phi.weight import Execution, adapted_linear

SIZES = (0.0, 5e-324, 1e-308, 1e-160, 1e-45, 1e-38, 1e-20, 1e-8, 1e-3, 0.5, 1.0, 2.0, 3.0, 1e3, 1e6)
sizes = st.one_of(st.sampled_from(SIZES), st.floats(0, 1e6))
signed = st.one_of(sizes, sizes.map(lambda size: -size))
bandwidths = st.one_of(st.sampled_from(SIZES[1:]), st.floats(5e-324, 1e6))
bases = pytest.mark.parametrize("name", sorted(BASES))


def finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors)


@bases
@given(x=signed, omega=bandwidths, grid=signed)
@settings(deadline=None)
def test_a_basis_is_finite_in_float32_and_float64(name, x, omega, grid):
    for dtype in (torch.float32, torch.float64):
        inputs = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (x, omega, grid)]
        value = BASES[name]()(*inputs)
        grads = torch.autograd.grad(value, inputs, allow_unused=True)
        assert finite([value, *(gradient for gradient in grads if gradient is not None)])


@bases
@given(data=st.data(), gain=st.sampled_from([1e-6, 1.0, 30.0, 1e6]))
@settings(deadline=None, max_examples=50)
def test_phi_is_finite(name, data, gain):
    """α, ω, grid points and z at once; (1 + u)³ reaches 1e54 there, within float64."""
    draw = [data.draw(st.lists(kind, min_size=3, max_size=3)) for kind in (signed, bandwidths, signed, signed)]
    alpha, omega, grid, z = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in draw)
    g = torch.tensor(gain, dtype=torch.float64, requires_grad=True)
    value = Transfer(BASES[name](), alpha, omega, grid, g, centre=True, path=True)(z)
    grads = torch.autograd.grad(value.sum(), (alpha, omega, grid, z, g), allow_unused=True)
    assert finite([value, *(gradient for gradient in grads if gradient is not None)])


@pytest.mark.parametrize("name", sorted(set(BASES) - {"polynomial"}))  # whose values float32 does not hold
@pytest.mark.parametrize(
    ("alpha", "omega", "size"), [(1e6, 1e6, 1e3), (1e6, 1e-6, 1e3), (1e-30, 1e6, 1e-20), (1.0, 1.0, 0.0)]
)
@pytest.mark.parametrize("backend", ["direct", "torch"])
def test_an_adapted_layer_is_finite(name, alpha, omega, size, backend):
    generator = torch.Generator().manual_seed(0)
    A, B = (size * torch.randn(shape, generator=generator) for shape in ((2, 6), (5, 2)))
    x, weight = torch.randn(3, 6, generator=generator), torch.randn(5, 6, generator=generator)
    table = [torch.full((8,), alpha), torch.full((8,), omega), torch.linspace(-3, 3, 8)]
    inputs = [tensor.requires_grad_() for tensor in (x, A, B, *table)]
    transfer = Transfer(BASES[name](), *table, gain=torch.tensor(30.0), centre=True, path=True)
    y = adapted_linear(x, weight, None, A, B, evaluator(transfer, A, B, backend), Execution(backend))
    grads = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    assert finite([y, *(gradient for gradient in grads if gradient is not None)])


@given(omega=st.floats(1e-6, 1e6))
def test_omega_comes_back_from_its_raw_value(omega):
    raw = torch.tensor(inverse_softplus(omega), dtype=torch.float64)
    assert torch.nn.functional.softplus(raw).item() == pytest.approx(omega, rel=1e-9)


@pytest.mark.parametrize(("num", "interval"), [(2, 1.0), (50, 3.0), (512, 0.5)])
def test_nyquist_is_one_over_the_spacing(num, interval):
    points = np.linspace(-interval, interval, num)
    settings = PhiSettings(omega_init="nyquist", num_basis=num, interval=interval)
    assert settings.bandwidth.at(0.0) == pytest.approx(1 / (points[1] - points[0]))


@pytest.mark.parametrize("points", series.POINTS)
def test_the_matrices_of_a_series_are_numpys(points):
    cpu = torch.device("cpu")
    c = np.random.default_rng(0).normal(size=points)
    nodes = series._nodes(points, cpu).numpy()
    np.testing.assert_allclose(np.sort(nodes), np.sort(chebyshev.chebpts1(points)), atol=1e-15)
    np.testing.assert_allclose(series._polynomials(points, cpu).numpy().T @ c, chebyshev.chebval(nodes, c), atol=1e-9)
    np.testing.assert_allclose(
        series._cosine_transform(points, cpu).numpy() @ chebyshev.chebval(nodes, c), c, atol=1e-12
    )
    slopes = series._differentiation(points, cpu).numpy() @ c
    np.testing.assert_allclose(slopes[:-1], chebyshev.chebder(c), rtol=1e-12, atol=1e-9)
    short = c[: series.POWER_COUNT]
    powers = series._monomials(series.POWER_COUNT, cpu).numpy() @ short
    np.testing.assert_allclose(powers, chebyshev.cheb2poly(short), rtol=1e-12)
    behind = np.pad(short, (0, points - len(short))) @ series.with_powers(points, cpu).numpy()
    np.testing.assert_allclose(behind[points:], powers, rtol=1e-12)
