"""Every fast path against the direct sum in float64: values and all gradients, wherever it may be used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer
from basisadapt.phi.basis import BASES, TransferBasis
from basisadapt.phi.choice import Choice, Work, evaluator
from basisadapt.phi.cubic_tables import Spline, Table
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Direct, Series
from basisadapt.phi.extent import SMALLEST, Extent, bounds
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.weight import Execution, adapted_linear

FIVE = ["sinc", "gaussian_rbf", "bspline", "fourier", "polynomial"]
NUMBERS = [1, 8, 50, 512]
DEVICES = [("cpu", "torch")]
if torch.cuda.is_available():
    DEVICES += [("cuda", "torch"), ("cuda", "triton")]


class Morlet(TransferBasis):
    """A basis that a user might write."""

    def forward(self, u):
        return torch.cos(5 * u) * torch.exp(-u.square() / 2)


def make(basis="sinc", num=50, omega=1.0, gain=1.0, centre=True, amplitude="random", grid="uniform", path=True):
    """A function with parameters that float32 holds exactly, in float64."""
    generator = torch.Generator().manual_seed(num)
    alpha = torch.randn(num, generator=generator, dtype=torch.float64)
    if amplitude == "alternating":
        alpha = 1.0 - 2.0 * (torch.arange(num, dtype=torch.float64) % 2)
    elif amplitude == "zero":
        alpha = 0 * alpha
    x = GRIDS[grid]().points(num, 3.0, generator)
    chosen = BASES[basis]() if isinstance(basis, str) else basis
    transfer = Transfer(chosen, alpha, torch.full_like(alpha, omega), x, torch.tensor(gain), centre, path, 1.5)
    return transfer.with_parameters(*(p.float().double() for p in transfer.parameters))


def factors(m, n, r, radius):
    generator = torch.Generator().manual_seed(m * n + r)
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    return A, B * (radius / (B @ A).abs().max())


def leaves(tensors, device, dtype):
    return [t.detach().to(device, dtype).requires_grad_() for t in tensors]


def evaluate(transfer, A, B, x, weight, upstream, device, backend, dtype, tolerance=1e-6):
    """The evaluator; y and its gradients to x, A, B, α, ω, the grid and g, float64 on the CPU; in an output of NaN."""
    inputs = leaves((x, A, B, *transfer.parameters), device, dtype)
    chosen = evaluator(transfer.with_parameters(*inputs[3:]), inputs[1], inputs[2], backend, tolerance)
    base = None if weight is None else weight.to(device, dtype)
    torch.full((4 * A.shape[1] * len(B),), float("nan"), device=device, dtype=dtype)  # what is not written is seen
    y = adapted_linear(inputs[0], base, None, inputs[1], inputs[2], chosen, Execution(backend))
    grads = torch.autograd.grad(y, inputs, upstream.to(device, y.dtype), allow_unused=True)
    found = [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))]
    return chosen, [part.double().cpu() for part in found]


def magnitudes(transfer, A, B, x, upstream):
    """What y and the gradients would be if F, F' and ∂F/∂p had their largest values on the range everywhere and nothing
    cancelled: float32 knows a function to an eps of its largest value, and all of these are sums over such values."""
    radius = bounds([(A, B)]).clamp_min(SMALLEST)
    z = (radius * torch.linspace(-1, 1, 401, dtype=torch.float64)).reshape(-1, 1).requires_grad_()
    each = [p.expand(len(z), *p.shape).clone().requires_grad_() for p in transfer.parameters]
    values = transfer.with_parameters(*each)(z)
    grads = torch.autograd.grad(values.sum(), [z, *each], allow_unused=True)
    value, slope, *rest = (torch.zeros(()) if g is None else g.abs().amax(0).norm() for g in (values, *grads))
    rest[-1] = (slope * radius.item() + value) / transfer.gain  # ∂F/∂g = (z F' − F) / g, but for the path
    dense, all_ones = upstream.T @ x, x.new_ones(len(B), A.shape[1])
    sizes = [value * (x.abs() @ all_ones.T).norm(), value * (upstream.abs() @ all_ones).norm()]
    sizes += [slope * (B.abs().T @ dense.abs()).norm(), slope * (dense.abs() @ A.abs().T).norm()]
    return sizes + [dense.abs().sum() * size for size in rest]


def check(transfer, A, B, x, device, backend, weight=None):
    upstream = 0.5 + torch.rand(len(x), len(B), generator=torch.Generator().manual_seed(5))
    chosen, found = evaluate(transfer, A, B, x, weight, upstream, device, backend, torch.float32)
    exactly = (x, weight, upstream.double(), "cpu", "direct", torch.float64)
    _, truth = evaluate(transfer, A, B, *exactly)
    # Every entry off by a unit in the last place, up or down.
    up = torch.rand(A.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    _, shaken = evaluate(transfer, A.double() * (1 + 2.0**-23 * (2.0 * up - 1)), B, *exactly)
    summed = magnitudes(transfer, A, B, x, upstream)
    names = ("y", "dx", "dA", "dB", "dalpha", "domega", "dgrid", "dgain")
    for name, part, expected, size, moved in zip(names, found, truth, summed, shaken, strict=True):
        bound = 1e-5 * expected.norm() + 1e-6 * size + 3 * (moved - expected).norm() + 1e-30
        error = (part - expected).norm()
        assert error <= bound, f"{name}, {type(chosen).__name__}: {error / bound:.2f} times the bound"
    return chosen


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("basis", [*FIVE, Morlet()], ids=[*FIVE, "morlet"])
@pytest.mark.parametrize("num", NUMBERS)
def test_float32_against_float64_direct(device, backend, basis, num):
    """Ranges, bandwidths, random and adversarial amplitudes: 1e-5; but not less than what rounding BA to float32 does,
    and what float32 leaves of a sum that cancels.
    """
    x = 0.5 + torch.rand(6, 23, generator=torch.Generator().manual_seed(0))
    # Both amplitudes with every pair of a range, a bandwidth, a basis and a number of functions: neighbours alternate.
    of_all = NUMBERS.index(num) + [*FIVE, "Morlet"].index(basis if isinstance(basis, str) else "Morlet")
    for i, radius in enumerate((0.05, 0.5, 3.0, 10.0)):
        A, B = factors(29, 23, 3, radius)
        for j, omega in enumerate((0.1, 1.0, 8.0)):
            amplitude = ("random", "alternating")[(i + j + of_all) % 2]
            check(make(basis, num, omega, amplitude=amplitude), A, B, x, device, backend)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_every_grid(device, backend, grid):
    A, B = factors(23, 19, 4, 2.0)
    x = 0.5 + torch.rand(6, 19, generator=torch.Generator().manual_seed(0))
    for basis in FIVE:
        check(make(basis, 12, 2.0, gain=1.7, grid=grid, path=False), A, B, x, device, backend)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_shape(device, backend, data):
    m, n = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    r = data.draw(st.integers(1, min(m, n, 80)))
    A, B = factors(m, n, r, data.draw(st.floats(0.01, 4.0)))
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + torch.rand(data.draw(st.integers(1, 5)), n, generator=generator)
    weight = torch.randn(m, n, generator=generator) if data.draw(st.booleans()) else None
    if weight is not None and data.draw(st.booleans()):
        weight = weight.T.contiguous().T  # the layout of a Conv1D
    transfer = make(data.draw(st.sampled_from(FIVE)), data.draw(st.integers(1, 20)), path=data.draw(st.booleans()))
    check(transfer, A, B, x, device, backend, weight)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_lose_what_rounding_loses(device, backend, dtype):
    A, B = factors(130, 70, 5, 0.5)
    A, B = A.to(device), B.to(device)
    transfer = make("sinc", 8)
    on_device = transfer.with_parameters(*leaves(transfer.parameters, device, torch.float32))
    weight = torch.randn(130, 70, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    eye = torch.eye(70, device=device, dtype=dtype)
    y = (
        adapted_linear(eye, weight, None, A, B, evaluator(on_device, A, B, backend), Execution(backend))
        .T.double()
        .cpu()
    )
    exact = weight.double().cpu() + transfer((B.double() @ A.double()).cpu())
    assert (y - exact).norm() <= 1.01 * (exact.to(dtype).double() - exact).norm()


@pytest.mark.parametrize(("device", "backend"), DEVICES)
def test_gradients_with_half_precision_weights(device, backend):
    """The dense gradient is rounded to bfloat16; A's and B's gradients may be off by as much, the moments too."""
    A, B = factors(130, 70, 5, 0.5)
    transfer = make("sinc", 8)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(40, 70, generator=generator), torch.randn(130, 70, generator=generator)
    upstream = torch.randn(40, 130, generator=generator)
    x, weight, upstream = (t.bfloat16().double() for t in (x, weight, upstream))
    _, truth = evaluate(transfer, A, B, x, weight, upstream, "cpu", "direct", torch.float64)
    inputs = leaves((A, B, *transfer.parameters), device, torch.float32)
    chosen = evaluator(transfer.with_parameters(*inputs[2:]), *inputs[:2], backend)
    y = adapted_linear(
        x.to(device).bfloat16(), weight.to(device).bfloat16(), None, *inputs[:2], chosen, Execution(backend)
    )
    found = torch.autograd.grad(y, inputs, upstream.to(device).bfloat16())
    for part, expected in zip(found, truth[2:], strict=True):
        assert part.dtype == torch.float32
        assert (part.double().cpu() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(("device", "backend"), DEVICES)
def test_repeats_bit_for_bit(device, backend):
    A, B = factors(300, 200, 4, 3.0)
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    for basis, omega, kind in (("sinc", 1.0, Series), ("gaussian_rbf", 30.0, Table), ("bspline", 3.0, Spline)):
        runs = [
            evaluate(make(basis, 9, omega), A, B, x, None, upstream, device, backend, torch.float32) for _ in range(2)
        ]
        made = Row if device == "cuda" and kind is not Series else kind
        assert all(isinstance(chosen, made) for chosen, _ in runs)
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_series_where_it_converges_a_table_where_not_direct_where_neither():
    A, B = factors(60, 150, 2, 0.2)
    parameters = {"A": A, "B": B, "backend": "torch"}
    assert isinstance(evaluator(make("sinc"), **parameters), Series)
    assert isinstance(evaluator(make("sinc"), A, B, "direct"), Direct)
    assert isinstance(evaluator(make("gaussian_rbf", omega=300.0), **parameters), Table)
    assert isinstance(evaluator(make("bspline", omega=30.0), **parameters), Spline)
    assert isinstance(evaluator(make("gaussian_rbf", omega=1e5), **parameters), Direct)


def value_at(transfer, A, B, z):
    chosen = evaluator(transfer, A, B, "torch")
    return chosen.value(z, chosen.scratch(len(z), z))


def test_a_narrow_peak_between_the_nodes_is_seen():
    # One Gaussian far narrower than the nodes' spacing: every low-degree interpolant is zero at every node.
    transfer = make("gaussian_rbf", 1, omega=400.0, path=False)
    A, B = (t.double() for t in factors(30, 30, 2, 3.0))
    z = torch.linspace(-0.01, 0.01, 9, dtype=torch.float64)
    torch.testing.assert_close(value_at(transfer, A, B, z), transfer(z), rtol=1e-8, atol=1e-8)


def test_one_narrow_peak_among_many_that_are_zero_is_seen():
    """512 Gaussians, one amplitude: neither the nodes nor the sampled grid points need lie on its peak."""
    wide = make("gaussian_rbf", 512, omega=300.0, path=False)
    A, B = (t.double() for t in factors(30, 30, 2, 3.0))
    for place in (100, 257, 311):
        alpha = torch.zeros(512, dtype=torch.float64)
        alpha[place] = 1.0
        transfer = wide.with_parameters(alpha, *wide.parameters[1:])
        z = wide.grid[place - 2 : place + 3]
        torch.testing.assert_close(value_at(transfer, A, B, z), transfer(z), rtol=1e-8, atol=1e-8)


def test_the_degree_follows_the_range_and_the_tolerance():
    degrees = []
    for radius, tolerance in ((0.1, 1e-3), (0.1, 1e-6), (1.0, 1e-6), (3.0, 1e-6), (10.0, 1e-6)):
        A, B = factors(30, 30, 2, radius)
        degrees.append(evaluator(make("sinc"), A, B, "torch", tolerance).width)
    assert degrees == sorted(degrees)
    assert degrees[0] < degrees[-1]


def test_the_range_is_never_too_small():
    for seed in range(20):
        A, B = factors(1 + seed, 40 - seed, 1 + seed % 5, 10.0 ** (seed % 4))
        (radius,) = bounds([(A, B)]).tolist()
        assert (B.double() @ A.double()).abs().max() <= radius


def test_a_choice_made_once_stays_right_while_range_and_function_move():
    """Compiled again and again with one memory, as in training; a kink that comes into range is seen at once."""
    choice = Choice()
    for step in range(40):
        transfer = make("bspline", 6, omega=0.2 * 1.1**step)
        A, B = (t.double() for t in factors(9, 8, 2, 0.05 * 1.12**step))
        tables, pairs = tuple(p.unsqueeze(0) for p in transfer.parameters), [(A.float(), B.float())]
        work = Work(transfer.with_parameters, tables, lambda _, t=transfer: t, pairs, torch.ones(1), (1e-6,))
        (chosen,) = choice.evaluators(work)
        z = (B @ A).float()
        truth = transfer(z.double())
        error = (chosen.value(z, chosen.scratch(z.numel(), z)).double() - truth).abs().max()
        assert error <= 3e-6 * truth.abs().max(), (step, type(chosen).__name__)


def test_functions_of_many_modules_are_compiled_as_each_alone():
    singles = [make("sinc", 7, 0.5 + i, gain=1.0 + i, amplitude="random") for i in range(3)]
    parameters = tuple(torch.stack(column) for column in zip(*(s.parameters for s in singles), strict=True))
    tables = dataclasses.replace(singles[0]).with_parameters
    radius = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    batch = series.compile_series(tables, parameters, Extent.of(radius), 64, 1e-8)
    for index, single in enumerate(singles):
        one = tuple(p.unsqueeze(0) for p in single.parameters)
        alone = series.compile_series(tables, one, Extent.of(radius[index : index + 1]), 64, 1e-8)
        torch.testing.assert_close(alone.coefficients[0, :64], batch.coefficients[index, :64], rtol=1e-12, atol=1e-14)
        assert alone.degree[0] == batch.degree[index]


def test_non_finite_factors_give_non_finite_weights():
    for bad in (float("nan"), float("inf")):
        A, B = torch.randn(2, 5), torch.zeros(4, 2)
        A[0, 0] = bad
        transfer = make("sinc", 4)
        transfer = transfer.with_parameters(*(p.float() for p in transfer.parameters))
        y = adapted_linear(torch.ones(1, 5), None, None, A, B, evaluator(transfer, A, B, "torch"), Execution("torch"))
        assert not y.isfinite().all()
