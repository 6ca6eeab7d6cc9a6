"""The kernels of tables: on a GPU; or, with TRITON_INTERPRET=1, by Triton's interpreter of their source on a CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from basisadapt.phi import together
from basisadapt.phi.choice import evaluator
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Direct
from basisadapt.phi.kernels import effective_weight, pull_back
from tests.phi.test_evaluators import DEVICES, evaluate, factors, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or triton and TRITON_INTERPRET=1"
)
# Many cells, and cells that the spline's few share; sides that fill no tile, and more columns of B than one block.
CASES = [
    ("sinc", 20.0, (37, 150, 3)),
    ("bspline", 2.0, (70, 66, 5)),
    ("gaussian_rbf", 40.0, (17, 129, 16)),
    ("fourier", 25.0, (130, 33, 30)),
]
if not INTERPRETED:  # the interpreter cannot loop up to a number that it was passed
    CASES += [("sinc", 20.0, (90, 100, 80)), ("bspline", 8.0, (300, 500, 130)), ("sinc", 60.0, (1, 1, 1))]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """The interpreter has no warps and no registers, and one way to multiply."""
    if INTERPRETED:
        from basisadapt.phi import kernels_triton

        monkeypatch.setattr(
            kernels_triton, "launch", lambda kernel, grid, _, tensors, *rest: kernel[grid](*tensors, *rest)
        )
        monkeypatch.setattr(kernels_triton, "product_constants", lambda r, *_: (64 if r > 32 else 32, r <= 64, "ieee"))


def made(basis, omega, shape, radius=1.5, num=12):
    """A function, A and B, and the function's table, with leaves for its gradients."""
    transfer = make(basis, num, omega, gain=1.7)
    A, B = (t.to(DEVICE) for t in factors(*shape, radius))
    parameters = tuple(p.to(DEVICE).unsqueeze(0).requires_grad_() for p in transfer.parameters)
    ends = torch.tensor([1.001 * radius], dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        (found,) = together.fit(transfer.with_parameters(*parameters), ends, [1e-6], [1 << 20], [0])
    row = together.rows(transfer.with_parameters, parameters, ends, {0: (*found, torch.float32)})[0]
    return transfer, A, B, row, parameters


@pytest.mark.parametrize(("basis", "omega", "shape"), CASES)
def test_values_and_gradients_are_those_of_the_direct_sum(basis, omega, shape):
    transfer, A, B, row, parameters = made(basis, omega, shape)
    generator = torch.Generator().manual_seed(3)
    m, n, _ = shape
    weight, upstream = (torch.randn(m, n, generator=generator).to(DEVICE) for _ in range(2))
    z = (B.double() @ A.double()).cpu()
    direct = Direct(transfer)
    exact, slope, truth = direct.pullback(z, upstream.double().cpu(), z)
    on_range = torch.linspace(-1.5, 1.5, 1001, dtype=torch.float64).requires_grad_()
    (steep,) = torch.autograd.grad(transfer(on_range).sum(), on_range, create_graph=True)
    (curved,) = torch.autograd.grad(steep.sum(), on_range)
    size = exact.abs().max() + 1.5 * steep.abs().max()  # and what rounding BA does to F
    torch.full((4 * m * n,), float("nan"), device=DEVICE)  # what is not written is seen
    for base in (None, weight, weight.T.contiguous().T):
        expected = exact if base is None else exact + weight.double().cpu()
        formed = effective_weight(base, A, B, row, torch.float32, "triton")
        assert (formed.double().cpu() - expected).abs().max() <= 3e-6 * (size + expected.abs().max())
    effective, grad_a, grad_b, (of_cubics,) = pull_back(upstream.clone(), weight, A, B, row, "triton")
    torch.testing.assert_close(effective, effective_weight(weight, A, B, row, torch.float32, "triton"), rtol=0, atol=0)
    rounded = 1e-6 * 1.5 * curved.abs().max() * upstream.abs().max().cpu()  # of F', by what rounding BA does to it
    for found, factor, expected in ((grad_a, B, B.double().cpu().T @ slope), (grad_b, A, slope @ A.double().cpu().T)):
        bound = 2e-5 * expected.norm() + rounded * factor.norm().cpu()
        assert (found.double().cpu() - expected).norm() <= bound
    grads = torch.autograd.grad(row.parameters, parameters, of_cubics)
    # Float32 rounds BA, and its place in a cell: where the function is steep, that is more than the table's own error.
    rounding = z * (1 + 2**-23)
    moved = direct.pullback(rounding, upstream.double().cpu(), rounding)[2]
    for found, expected, near in zip(grads, truth, moved, strict=True):
        bound = 3e-5 * expected.abs().max() + (near - expected).abs().max()
        assert (found[0].cpu() - expected).abs().max() <= bound + 1e-9


CUT_OFF = pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts bfloat16 off, and does not round")


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=CUT_OFF), torch.float16])
def test_half_precision_is_rounded_once(dtype):
    transfer, A, B, row, _ = made("sinc", 20.0, (40, 50, 3))
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    exact = weight.double() + transfer((B.double() @ A.double()).cpu()).to(DEVICE)
    formed = effective_weight(weight, A, B, row, dtype, "triton")
    assert (formed.double() - exact).norm() <= 1.01 * (exact.to(dtype).double() - exact).norm()
    dense = torch.randn(40, 50, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    _, slope, sums = row.pullback(B @ A, dense.float(), B)
    if DEVICE == "cuda":  # which multiplies halves into float32
        _, grad_a, grad_b, (of_cubics,) = pull_back(dense.clone(), None, A, B, row, "triton", form=False)
        for found, expected in ((grad_a, B.T @ slope), (grad_b, slope @ A.T), (of_cubics, *row.gradients(sums))):
            assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_sums_repeat_bit_for_bit_and_large_and_small_gradients_add_up():
    _, A, B, row, _ = made("bspline", 2.0, (70, 66, 5))
    upstream = torch.randn(70, 66, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    found = {}
    for scale in (1.0, 1e-15, 1e15, 0.0):
        runs = [pull_back(scale * upstream, None, A, B, row, "triton", form=False)[1:] for _ in range(3)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again[:2], runs[0][:2], strict=True))
            assert torch.equal(again[2][0], runs[0][2][0])
        found[scale] = runs[0][2][0]
    for scale in (1e-15, 1e15):
        torch.testing.assert_close(found[scale] / scale, found[1.0], rtol=1e-4, atol=1e-4)
    assert not found[0.0].any()


def test_beyond_its_range_a_table_is_not_a_number():
    _, A, B, row, _ = made("sinc", 20.0, (40, 50, 3))
    B[7] *= 1e3
    A[0, 9] = float("nan")
    bad = ((B @ A).abs() <= 1.5 * 1.002).logical_not()
    assert bad[:, 9].all()
    assert bad[7].any()
    assert not bad.all()
    formed = effective_weight(None, A, B, row, torch.float32, "triton")
    assert torch.equal(formed.isnan(), bad)
    dense = torch.ones(40, 50, device=DEVICE)
    _, grad_a, grad_b, _ = pull_back(dense, None, A, B, row, "triton", form=False)
    assert grad_a[:, 9].isnan().all()
    assert grad_b.isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize(
    ("basis", "omega"), [("sinc", 20.0), ("gaussian_rbf", 40.0), ("bspline", 8.0), ("fourier", 80.0)]
)
def test_a_layers_gradients_by_kernels_are_those_of_torch_and_of_the_direct_sum(basis, omega):
    A, B = factors(300, 200, 8, 1.5)
    x = 0.5 + torch.rand(6, 200, generator=torch.Generator().manual_seed(0))
    upstream = 0.5 + torch.rand(6, 300, generator=torch.Generator().manual_seed(1))
    transfer = make(basis, 20, omega)
    exactly = evaluate(transfer, A, B, x, None, upstream.double(), "cpu", "direct", torch.float64)[1]
    for device, backend in DEVICES[1:]:
        chosen, found = evaluate(transfer, A, B, x, None, upstream, device, backend, torch.float32)
        assert isinstance(chosen, Row)
        for part, expected in zip(found, exactly, strict=True):
            assert (part - expected).norm() <= 1e-4 * expected.norm() + 1e-9


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_table_holds_no_dense_numbers():
    """Beside W's size: what a table takes by torch's operations was many times as much."""
    A, B = (t.cuda() for t in factors(2048, 2048, 8, 1.5))
    transfer = make("sinc", 20, 40.0)
    chosen = evaluator(transfer.with_parameters(*(p.cuda() for p in transfer.parameters)), A, B, "triton")
    assert isinstance(chosen, Row)
    dense = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pull_back(dense, None, A, B, chosen, "triton", form=False)
    effective_weight(dense, A, B, chosen, torch.bfloat16, "triton")
    assert torch.cuda.max_memory_allocated() - before <= 2.5 * dense.nbytes
