"""The one autograd function: dtypes, strides, autocast, made weights, and W's own gradient."""

from __future__ import annotations

import pytest
import torch

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
