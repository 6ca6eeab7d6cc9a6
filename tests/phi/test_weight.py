"""The series against the direct sum, and the autograd function against plain autograd, in float64 where it counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basisadapt.phi import series, weight
from basisadapt.phi.bank import Transfer
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.weight import Direct, Series, Update, adapted_linear, delta_weight, evaluator


def make(basis="sinc", num=50, omega=1.0, gain=1.0, centre=True, amplitude=1.0, grid="uniform", dtype=torch.float64):
    generator = torch.Generator().manual_seed(num)
    alpha = amplitude * torch.randn(num, generator=generator, dtype=torch.float64)
    x = GRIDS[grid]().points(num, 3.0, generator)
    transfer = Transfer(BASES[basis](), alpha, torch.full_like(alpha, omega), x, gain, centre)
    return transfer.with_parameters(*(p.to(dtype).requires_grad_() for p in transfer.parameters))


def factors(m, n, r, radius, dtype=torch.float64):
    generator = torch.Generator().manual_seed(m * n + r)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    B *= radius / (B @ A).abs().max()
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def gradients(transfer, A, B, backend, x, path=True):
    update = Update(evaluator(transfer, A, B, backend, 2e-7), path, 1.5)
    y = adapted_linear(x, None, None, A, B, update)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    inputs = [t for t in (x, A, B, *transfer.parameters) if t.requires_grad]
    grads = torch.autograd.grad(y, inputs, upstream, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))]


@pytest.mark.parametrize("basis", sorted(FIVE := ["sinc", "gaussian_rbf", "bspline", "fourier", "polynomial"]))
@pytest.mark.parametrize("radius", [0.05, 0.5, 3.0, 10.0])
@pytest.mark.parametrize("omega", [0.1, 1.0, 8.0])
def test_float32_against_float64_direct(basis, radius, omega):
    num = 50
    A, B = factors(13, 11, 3, radius, torch.float32)
    x = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = gradients(make(basis, num, omega, dtype=torch.float32), A, B, "auto", x)
    exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
    truth = gradients(make(basis, num, omega), exact[1], exact[2], "direct", exact[0])
    for part, expected in zip(found, truth, strict=True):
        error = (part.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error < 1e-4


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 4),
    rows=st.integers(1, 5),
    basis=st.sampled_from(FIVE),
    path=st.booleans(),
    piece=st.integers(1, 5000),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_and_piece(m, n, r, rows, basis, path, piece):
    A, B = factors(m, n, r, 0.4)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    transfer = make(basis, 6)
    whole = gradients(transfer, A, B, "direct", x, path)
    original, weight.PIECE = weight.PIECE, piece
    try:
        pieces = gradients(transfer, A, B, "auto", x, path)
    finally:
        weight.PIECE = original
    for part, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-7, atol=1e-9)


def test_a_narrow_peak_between_the_nodes_is_seen():
    # One Gaussian far narrower than the nodes' spacing: every low-degree interpolant is zero at every node.
    transfer = make("gaussian_rbf", 1, omega=40.0)
    A, B = factors(30, 30, 2, 3.0)
    chosen = evaluator(transfer, A, B, "auto")
    z = torch.linspace(-0.1, 0.1, 9, dtype=torch.float64)
    torch.testing.assert_close(chosen.value(z, chosen.scratch(len(z), z)), transfer(z).detach(), rtol=1e-9, atol=1e-9)


def test_one_narrow_peak_among_many_that_are_zero_is_seen():
    """512 Gaussians, one amplitude: neither the nodes nor the sampled grid points need lie on its peak."""
    wide = make("gaussian_rbf", 512, omega=300.0)
    for place in (100, 257, 311):
        alpha = torch.zeros(512, dtype=torch.float64)
        alpha[place] = 1.0
        transfer = wide.with_parameters(alpha, wide.omega, wide.grid)
        A, B = factors(30, 30, 2, 3.0)
        chosen = evaluator(transfer, A, B, "auto")
        z = wide.grid[place - 2 : place + 3].detach() / transfer.gain
        torch.testing.assert_close(
            chosen.value(z, chosen.scratch(len(z), z)), transfer(z).detach(), rtol=1e-9, atol=1e-9
        )


def test_series_is_used_where_it_converges_and_only_there():
    A, B = factors(30, 30, 2, 0.2)
    assert isinstance(evaluator(make("sinc"), A, B, "auto"), Series)
    assert isinstance(evaluator(make("sinc"), A, B, "direct"), Direct)
    assert isinstance(evaluator(make("bspline", omega=30.0), A, B, "auto"), Direct)
    assert series.coefficients(make("sinc", amplitude=0.0), 1.0, 1e-13).abs().max() == 0


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_dtypes_and_strides(weight_dtype):
    A, B = factors(9, 7, 2, 0.3, torch.float32)
    base = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(weight_dtype)
    x = torch.randn(3, 7).to(weight_dtype)
    update = Update(evaluator(make(dtype=torch.float32), A, B, "auto"), True, 1.0)
    y = adapted_linear(x, base.T, None, A, B, update)
    assert y.dtype == weight_dtype
    dense = (base.T.double() + delta_weight(A, B, update).double()).to(weight_dtype)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense))


def test_autocast():
    A, B = factors(9, 7, 2, 0.3, torch.float32)
    generator = torch.Generator().manual_seed(0)
    base, x = torch.randn(9, 7, generator=generator), torch.randn(3, 7, generator=generator).requires_grad_()
    update = Update(evaluator(make(dtype=torch.float32), A, B, "auto"), True, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted_linear(x, base, torch.zeros(9), A, B, update)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32
    effective = base + delta_weight(A, B, update)
    assert torch.equal(y, torch.nn.functional.linear(x.bfloat16(), effective.bfloat16(), torch.zeros(9).bfloat16()))


def test_zero_b_and_non_finite_factors():
    transfer = make(dtype=torch.float32)
    A, B = torch.randn(2, 5), torch.zeros(4, 2)
    update = Update(evaluator(transfer, A, B, "auto"), True, 1.0)
    assert delta_weight(A, B, update).abs().max() < 1e-6
    A[0, 0] = float("nan")
    update = Update(evaluator(transfer, A, B, "auto"), True, 1.0)
    assert delta_weight(A, B, update).isnan().any()
