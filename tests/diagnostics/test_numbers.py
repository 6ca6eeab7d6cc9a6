"""Diagnostics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basisadapt.diagnostics.convergence import fit_power_law
from basisadapt.diagnostics.landscape import landscape
from basisadapt.diagnostics.path import UpdatePath
from basisadapt.diagnostics.sharpness import largest_eigenvalue
from basisadapt.diagnostics.spectrum import (
    captured,
    dc_share,
    largest_singular_value,
    normalised,
    power_exponent,
    singular_values,
    stable_rank,
)
from basisadapt.diagnostics.transfer import active_count


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- spectrum ---


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 7), (7, 1), (5, 5)])
def test_singular_values(shape):
    matrix = drawn(*shape)
    torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix), rtol=1e-10, atol=1e-12)


def test_singular_values_of_known_matrices():
    u, v = torch.linalg.qr(drawn(40, 5))[0], torch.linalg.qr(drawn(25, 5, seed=1))[0]
    planted = torch.tensor([3.0, 2.0, 1.0, 0.1, 1e-4], dtype=torch.float64)
    sigma = singular_values(u @ planted.diag() @ v.T)
    torch.testing.assert_close(sigma[:5], planted, rtol=1e-8, atol=0)
    assert sigma[5:].max() < 1e-7
    assert normalised(sigma, 4) == pytest.approx([1, 2 / 3, 1 / 3, 0.1 / 3])
    assert singular_values(torch.zeros(3, 4)).tolist() == [0, 0, 0]
    assert normalised(torch.zeros(3), 2) == []


def test_what_a_rank_captures():
    """By the truncated decomposition itself."""
    matrix = drawn(12, 9)
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    left = [(matrix - U[:, :k] * sigma[:k] @ Vt[:k]).square().sum() / matrix.square().sum() for k in range(1, 10)]
    torch.testing.assert_close(captured(singular_values(matrix)), 1 - torch.stack(left), rtol=0, atol=1e-12)
    assert captured(torch.zeros(3, dtype=torch.float64)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("count", [5, 64, 1000])
def test_the_exponent_of_a_power_law(exponent, count):
    sigma = 7 * torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    assert power_exponent(sigma) == pytest.approx(exponent, abs=1e-12)
    sigma[count // 2 + 1 :] /= 1e3  # the end has no say
    assert power_exponent(sigma) == pytest.approx(exponent, abs=1e-12)


def test_the_exponent_of_a_real_spectrum():
    """Least squares, as numpy has it; NaN where one value, or none, is told from rounding."""
    sigma = singular_values(drawn(100, 60))
    at = np.array([1, 2, 4, 8, 16])
    slope = np.polyfit(np.log(at), np.log(sigma.numpy()[at - 1]), 1)[0]
    assert power_exponent(sigma) == pytest.approx(-slope, rel=1e-9)
    for few in (torch.tensor([2.0, 1e-9, 0, 0, 0]).double(), torch.zeros(8).double(), torch.ones(1).double()):
        assert math.isnan(power_exponent(few))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_singular_values_neither_vanish_nor_overflow(size):
    assert stable_rank(singular_values(size * torch.eye(7))) == pytest.approx(7)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("second", [0.0, 0.5, 0.999999, 1.0])
def test_the_largest_singular_value_by_products(shape, second):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 8, dtype=torch.float64))[0] for side in shape)
    sigma = torch.tensor([1.0, second, *[0.3] * 6], dtype=torch.float64)
    matrix = 1e-30 * (left * sigma) @ right.T
    assert largest_singular_value(matrix).item() == pytest.approx(singular_values(matrix)[0].item(), rel=1e-8)
    assert largest_singular_value(torch.zeros(shape)).item() == 0


def test_stable_rank():
    def of(matrix):
        return stable_rank(singular_values(matrix))

    assert of(torch.eye(7)) == pytest.approx(7)
    assert of(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 9))) == pytest.approx(1)
    assert of(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(1.25)
    assert of(torch.zeros(3, 4)) == 0
    matrix = drawn(20, 30)
    singular = torch.linalg.svdvals(matrix)
    assert of(matrix) == pytest.approx((singular.square().sum() / singular[0] ** 2).item())
    assert of(3 * matrix.T) == pytest.approx(of(matrix))


def test_dc_share():
    assert dc_share(torch.full((3, 5), -2.0)) == pytest.approx(1)
    assert dc_share(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx(0)
    assert dc_share(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.25)
    assert dc_share(torch.zeros(2, 2)) == 0


# --- active N ---


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(0.1, 100))
def test_active_amplitudes(amplitudes, size):
    """Terms that reach ±1 each: active are the amplitudes above a tenth of the largest, whatever the scale."""
    alpha = torch.tensor(amplitudes, dtype=torch.float64)
    shapes = drawn(9, len(alpha)).sign()
    planted = sum(abs(a) > 0.1 * max(map(abs, amplitudes)) for a in amplitudes)
    assert active_count(shapes * alpha) == planted
    assert active_count(size * 2.0 ** -round(math.log2(size)) * shapes * alpha) == planted


def test_a_term_is_active_where_the_range_reaches_it():
    assert active_count(torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.01, -0.9]])) == 2
    assert active_count(torch.zeros(5, 8)) == 0


# --- the path ---


def walk(points):
    path = UpdatePath(points[0])
    for point in points[1:]:
        path.move(point)
    return path.smoothness().item()


def test_smoothness_of_known_paths():
    direction = drawn(50)
    assert walk([s * direction for s in (0, 0.1, 2, 3.5)]) == pytest.approx(1)
    zigzag = [torch.tensor([float(i), float(i % 2)]) for i in range(9)]  # each step at 45 degrees
    assert walk(zigzag) == pytest.approx(1 / math.sqrt(2))
    assert walk([direction, 2 * direction, direction]) == 0
    assert math.isnan(walk([direction, direction]))


def test_smoothness_of_a_random_walk():
    steps = drawn(400, 2000)
    assert walk(list(steps.cumsum(0))) == pytest.approx(399**-0.5, rel=0.05)


# --- convergence ---


def power_law(exponent, floor=0.5, drop=2.0, noise=0.0, count=200):
    t = np.arange(1, count + 1)
    return t, floor + drop * t**exponent + noise * np.random.default_rng(0).standard_normal(count)


def fitted(t, loss):
    return fit_power_law(list(zip(t.tolist(), loss.tolist(), strict=True)))


@settings(max_examples=15, deadline=None)
@given(st.floats(-2.0, -0.3), st.sampled_from([0.0, 0.5, 3.0]))
def test_an_exact_power_law_is_found(exponent, floor):
    law = fitted(*power_law(exponent, floor))
    assert law.exponent == pytest.approx(exponent, rel=1e-3)
    assert law.floor == pytest.approx(floor, abs=1e-2)
    assert law(10) == pytest.approx(floor + 2 * 10**exponent, rel=1e-3)


@pytest.mark.parametrize("exponent", [-0.6, -1.1, -1.4])
def test_a_power_law_under_noise_and_with_bad_batches(exponent):
    t, loss = power_law(exponent, noise=0.02)
    assert fitted(t, loss).exponent == pytest.approx(exponent, rel=0.05)
    loss[20::17] += 1.0
    assert fitted(t, loss).exponent == pytest.approx(exponent, rel=0.05)


def test_a_logged_mean_stands_for_the_middle_of_its_steps():
    t, loss = power_law(-1.0, count=1000)
    assert fitted(t[9::10], loss.reshape(-1, 10).mean(1)).exponent == pytest.approx(-1, rel=0.1)


def test_no_exponent_where_the_data_tell_none():
    t, loss = power_law(-1.0, noise=0.02)
    assert fitted(t[:7], loss[:7]) is None
    assert fitted(t, np.ones(200)) is None
    assert fitted(t, 1 + 0.1 * np.random.default_rng(1).standard_normal(200)) is None
    assert fitted(t, 1 + 0.01 * t) is None, "it rises"
    assert fitted(t[:50], loss[:50].cumsum()) is None
    loss[3] = np.nan
    assert fitted(t, loss).exponent == pytest.approx(-1, rel=0.05)


def test_a_loss_that_has_hardly_begun_to_fall_shows_no_floor():
    t, noise = power_law(-1.0, floor=0, drop=0, noise=0.02, count=50)
    law = fitted(t, 2 - 0.005 * t + noise)
    assert law.floor == pytest.approx(0, abs=1e-6)
    assert -0.1 < law.exponent < 0


# --- sharpness ---


@pytest.mark.parametrize("eigenvalues", [[7.0, 2.0, -1.0], [-5.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
def test_the_sharpness_of_a_quadratic(eigenvalues):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    hessian = basis @ torch.diag(torch.tensor([*eigenvalues, 0.1, 0.2, 0.0], dtype=torch.float64)) @ basis.T
    parameters = [torch.randn(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    before, state = [p.clone() for p in parameters], torch.get_rng_state()

    def gradients():
        flat = hessian @ torch.cat([p.flatten() for p in parameters])
        return [flat[:2], flat[2:].view(2, 2)]

    found = largest_eigenvalue(parameters, gradients, 60, seed=1)
    assert found == pytest.approx(eigenvalues[0] or 0.2, rel=1e-5)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sharpness_where_the_loss_is_not_a_number():
    assert math.isnan(largest_eigenvalue([torch.ones(2)], lambda: [torch.full((2,), math.nan)], 3, seed=1))


# --- landscape ---


def test_the_landscape_of_a_quadratic():
    """loss = ‖θ − θ*‖² is ‖a d₁ + b d₂‖², with ‖d‖ = ‖θ*‖ for directions of the same row norms."""
    solution = [drawn(4, 3), drawn(2, 5, seed=1)]
    parameters = [s.clone() for s in solution]

    def loss():
        return sum((p - s).square().sum().item() for p, s in zip(parameters, solution, strict=True))

    state = torch.get_rng_state()
    found = landscape(parameters, loss, 5, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, s) for p, s in zip(parameters, solution, strict=True))
    a = np.array(found["axis"])
    assert a.tolist() == [-1, -0.5, 0, 0.5, 1]
    values, size = np.array(found["loss"]), sum(s.square().sum().item() for s in solution)
    product = (values[4, 4] - values[4, 0]) / 4  # d₁ · d₂
    expected = size * (a[:, None] ** 2 + a[None, :] ** 2) + 2 * product * a[:, None] * a[None, :]
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
    assert abs(product) < size
    assert found == landscape(parameters, loss, 5, seed=3)
    assert found != landscape(parameters, loss, 5, seed=4)


def test_directions_are_normalised_row_by_row():
    parameter = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    start, seen = parameter.clone(), []

    def loss():
        seen.append((parameter - start).norm(dim=1).tolist())
        return math.inf

    found = landscape([parameter], loss, 3, seed=0)
    assert found["loss"] == [[None] * 3] * 3
    assert seen[1] == pytest.approx([5, 0, 1]), "at a = −1, b = 0"
    assert torch.equal(parameter, start)
