"""The one autograd function: dtypes, strides, autocast, made weights, and W's own gradient."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from basisadapt import phi
from basisadapt.core.errors import InputError
from basisadapt.phi import kernels
from basisadapt.phi.choice import evaluator
from basisadapt.phi.weight import Execution, adapted_linear, delta_weight
from tests.phi.test_evaluators import factors, make

BACKEND = "torch"


def chosen(A, B):
    transfer = make("sinc", 50)
    return evaluator(transfer.with_parameters(*(p.float() for p in transfer.parameters)), A, B, BACKEND)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_dtypes_and_strides(weight_dtype):
    A, B = factors(9, 7, 2, 0.3)
    base = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(weight_dtype)
    x = torch.randn(3, 7).to(weight_dtype)
    y = adapted_linear(x, base.T, None, A, B, chosen(A, B), Execution(BACKEND))
    assert y.dtype == weight_dtype
    dense = (base.T.double() + delta_weight(A, B, chosen(A, B), BACKEND).double()).to(weight_dtype)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense))


def test_autocast():
    A, B = (t.requires_grad_() for t in factors(9, 7, 2, 0.3))
    generator = torch.Generator().manual_seed(0)
    base, x = torch.randn(9, 7, generator=generator), torch.randn(3, 7, generator=generator).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted_linear(x, base, torch.zeros(9), A, B, chosen(A, B), Execution(BACKEND))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32
    effective = base + delta_weight(A, B, chosen(A, B), BACKEND)
    assert torch.equal(y, torch.nn.functional.linear(x.bfloat16(), effective.bfloat16(), torch.zeros(9).bfloat16()))


def test_a_weight_that_is_made_when_needed_and_one_that_trains():
    A, B = factors(9, 7, 2, 0.3)
    base = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.zeros(9, requires_grad=True)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    made = 0

    def make_weight():
        nonlocal made
        made += 1
        return base.detach()

    inputs = [t.clone().requires_grad_() for t in (x, A, B)]
    given = adapted_linear(inputs[0], base, bias, *inputs[1:], chosen(A, B), Execution(BACKEND))
    on_demand = adapted_linear(inputs[0], make_weight, bias, *inputs[1:], chosen(A, B), Execution(BACKEND))
    assert torch.equal(given, on_demand)
    upstream = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    of_base, *expected = torch.autograd.grad(given, [base, bias, *inputs], upstream)
    torch.testing.assert_close(of_base, upstream.T @ x)
    for found, truth in zip(torch.autograd.grad(on_demand, [bias, *inputs], upstream), expected, strict=True):
        assert torch.equal(found, truth)
    assert made == 2


def test_what_needs_no_gradient_costs_none():
    """Without a gradient to x the weight is not made again; a frozen weight is not saved, one that trains is."""
    A, B = (t.requires_grad_() for t in factors(9, 7, 2, 0.3))
    base, bias, x = torch.ones(9, 7), torch.zeros(9), torch.ones(3, 7)
    evaluator, made = chosen(A, B), []

    def make_weight():
        made.append(base)
        return base

    y = adapted_linear(x, make_weight, bias, A, B, evaluator, Execution(BACKEND))
    found = torch.autograd.grad(y.square().sum(), (A, B))
    assert len(made) == 1
    kept = adapted_linear(x.clone().requires_grad_(), base, bias, A, B, evaluator, Execution(BACKEND))
    assert kept.grad_fn.saved_tensors[3] is None
    for gradient, expected in zip(found, torch.autograd.grad(kept.square().sum(), (A, B)), strict=True):
        assert torch.equal(gradient, expected)
    trained = base.clone().requires_grad_()
    y = adapted_linear(x, trained, bias, A, B, evaluator, Execution(BACKEND))
    assert y.grad_fn.saved_tensors[3] is trained
    assert not delta_weight(A, B, evaluator, BACKEND).requires_grad


def test_a_bias_trains_also_where_a_does_not():
    A, B = factors(9, 7, 2, 0.3)
    bias, weight = torch.zeros(9, requires_grad=True), torch.ones(9, 7)
    adapted_linear(torch.ones(3, 7), weight, bias, A, B, chosen(A, B), Execution(BACKEND)).sum().backward()
    assert torch.equal(bias.grad, torch.full((9,), 3.0))


def test_the_weights_gradient_outlives_the_dense_one(monkeypatch):
    """The dense gradient may be overwritten on the way to A and B, as the fused kernels do."""
    A, B = (t.requires_grad_() for t in factors(9, 7, 2, 0.3))
    weight, x = torch.ones(9, 7, requires_grad=True), torch.ones(3, 7)
    plain = kernels.pull_back

    def overwriting(dense, *rest):
        found = plain(dense, *rest)
        dense.fill_(float("nan"))
        return found

    monkeypatch.setattr(kernels, "pull_back", overwriting)
    adapted_linear(x, weight, None, A, B, chosen(A, B), Execution(BACKEND)).sum().backward()
    assert torch.equal(weight.grad, torch.full((9, 7), 3.0))


def test_gradients_of_gradients_are_refused():
    A, B = (t.requires_grad_() for t in factors(9, 7, 2, 0.3))
    y = adapted_linear(torch.ones(3, 7), None, None, A, B, chosen(A, B), Execution(BACKEND))
    (gradient,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("size", [1, 400, 10**6])
def test_pieces_hold_what_they_may_and_change_nothing(monkeypatch, size):
    A, B = factors(9, 7, 2, 0.3)
    evaluator = chosen(A, B)
    base, dense = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
    whole = kernels.pull_back(dense, base, A, B, evaluator, BACKEND)
    monkeypatch.setitem(kernels.PIECE, "cpu", size)
    covered = []
    for rows, z, room in kernels._pieces(A, B, evaluator):
        torch.testing.assert_close(z, B[rows] @ A)
        assert len(z) == 1 or evaluator.width * z.numel() <= size
        assert rows.stop >= 9 or evaluator.width * 7 * (len(z) + 1) > size
        assert room.shape == (evaluator.width, covered[0] * 7 if covered else z.numel())
        assert rows.start == sum(covered)
        covered.append(len(z))
    assert sum(covered) == 9
    effective, *gradients, sums = kernels.pull_back(dense, base, A, B, evaluator, BACKEND)
    torch.testing.assert_close([effective, *gradients, *sums], [*whole[:3], *whole[3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.effective_weight(base, A, B, evaluator, base.dtype, BACKEND), effective)


def test_a_piece_fits_a_cores_cache_and_elsewhere_takes_no_more_than_a_gigabyte():
    assert 2**20 <= 4 * kernels.PIECE["cpu"] <= 2**23
    assert 2**26 <= 4 * kernels.PIECE_ELSEWHERE <= 2**30


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("triton", [True, False])
def test_what_auto_takes_and_what_triton_needs(monkeypatch, device, triton):
    monkeypatch.setattr(kernels, "has_triton", lambda: triton)
    there = torch.device(device)
    fused = device == "cuda" and triton
    assert kernels.resolve_backend("".join(["au", "to"]), there) == ("triton" if fused else "torch")
    assert kernels.resolve_backend("torch", there) == "torch"
    assert kernels.resolve_backend("direct", there) == "direct"
    if fused:
        assert kernels.resolve_backend("triton", there) == "triton"
    else:
        missing = "the triton package" if device == "cuda" else f"a CUDA device, and the weights are on {device}"
        with pytest.raises(InputError, match=missing):
            kernels.resolve_backend("".join(["tri", "ton"]), there)  # equal, as from a file, not the same object


def test_the_fused_kernels_are_for_series_in_float32(monkeypatch):
    """With a stand-in for them, since they need triton to be imported."""
    fused = ModuleType("kernels_triton")
    monkeypatch.setitem(sys.modules, "basisadapt.phi.kernels_triton", fused)
    monkeypatch.setattr(phi, "kernels_triton", fused, raising=False)
    A, B = factors(9, 7, 2, 0.3)
    direct = evaluator(make("sinc", 5), A, B, "direct")
    assert kernels._fused(chosen(A, B), A, "".join(["tri", "ton"])) is fused
    assert not kernels._fused(chosen(A, B), A, "torch")
    assert not kernels._fused(chosen(A, B), A.double(), "triton")
    assert not kernels._fused(direct, A, "triton")


def test_what_the_fused_kernels_are_asked_for(monkeypatch):
    """With a stand-in for them that does the work in pieces."""
    A, B = factors(9, 7, 2, 0.3)
    evaluator = chosen(A, B)
    base, dense = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
    fused = ModuleType("kernels_triton")
    fused.effective_weight = lambda *arguments: kernels.effective_weight(*arguments, "torch")
    fused.pull_back = lambda dense, *rest: kernels.pull_back(dense, None, *rest, "torch", form=False)[1:]
    monkeypatch.setitem(sys.modules, "basisadapt.phi.kernels_triton", fused)
    monkeypatch.setattr(phi, "kernels_triton", fused, raising=False)
    for form in (True, False):
        found, expected = (kernels.pull_back(dense, base, A, B, evaluator, b, form) for b in ("triton", "torch"))
        torch.testing.assert_close(found, expected)  # to the bit on some processors only
        assert (found[0] is None) == (not form)
    found, expected = (kernels.effective_weight(base, A, B, evaluator, torch.bfloat16, b) for b in ("triton", "torch"))
    assert torch.equal(found, expected)


def test_triton_is_found_where_it_is_installed():
    assert kernels.has_triton() == (importlib.util.find_spec("triton") is not None)


def test_zero_b():
    A, B = torch.randn(2, 5), torch.zeros(4, 2)
    assert delta_weight(A, B, chosen(A, B), BACKEND).abs().max() < 1e-5


def test_gradcheck_through_a_series():
    """In float64 a series is exact to 1e-11, so that finite differences see the function itself."""
    transfer = make("sinc", 4, omega=0.7)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3), (4, 3), (4,), (2, 3), (4, 2))
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def layer(x, weight, bias, A, B, *parameters):
        made = evaluator(transfer.with_parameters(*parameters), A, B, BACKEND)
        return adapted_linear(x, weight, bias, A, B, made, Execution(BACKEND))

    parameters = [p.requires_grad_() for p in transfer.parameters]
    assert torch.autograd.gradcheck(layer, [*inputs, *parameters], rtol=1e-4, atol=1e-6)
