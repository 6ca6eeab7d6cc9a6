"""The operators behind torch.compile: `opcheck`, and what the eager function gives."""

from __future__ import annotations

import gc

import pytest
import torch

from basisadapt.phi import operators
from basisadapt.phi.choice import evaluator
from basisadapt.phi.cubics import Row
from basisadapt.phi.dense_gradient import DenseGradient
from basisadapt.phi.evaluators import Direct, Series, Split
from basisadapt.phi.operators import Call, Function, Link, Memory, fill, linked_linear
from basisadapt.phi.weight import Execution, adapted_linear
from tests.phi.test_evaluators import factors, make

GENERATOR = torch.Generator().manual_seed(0)


def function(A, B, kind=Series):
    """A function of the factors, by an evaluator of that kind, and its tables."""
    transfer = make("sinc", 50)
    leaves = [p.detach().clone().requires_grad_() for p in transfer.parameters]
    transfer = transfer.with_parameters(*leaves)
    made = Direct(transfer) if kind is Direct else evaluator(transfer, A.detach(), B.detach(), "torch")
    assert isinstance(made, kind)
    return Function(made, Execution("torch", DenseGradient()), lambda *_: None), leaves


def linked(functions, names):
    """What graphs read of the functions, in memory of their own, with their numbers."""
    found = operators.linked(functions, Memory(), names)
    fill(functions, found)
    return found


def inputs(kind=Series, weight=True, bias=True, dtype=torch.float64):
    """x, W, b, A, B, the function and its tables, a row and a key."""
    A, B = (t.to(dtype).requires_grad_() for t in factors(9, 7, 2, 0.3))
    if kind is Split:
        A, B = (t.to(dtype) for t in factors(40, 7, 2, 0.3))
        B[3] *= 1e4
        A, B = A.requires_grad_(), B.requires_grad_()
    W, b, x = (torch.randn(*s, generator=GENERATOR).to(dtype) for s in ((len(B), 7), (len(B),), (2, 3, 7)))
    found, leaves = function(A, B, kind)
    (of_graph,) = linked([found], [""])
    row, key = of_graph.row, of_graph.key
    layer = x.requires_grad_(), W if weight else None, b.requires_grad_() if bias else None, A, B
    return layer, found, leaves, row, key


@pytest.mark.parametrize("kind", [Series, Direct, Split])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, False)])
def test_values_and_gradients_are_those_of_the_eager_function(kind, weight, bias):
    layer, found, leaves, row, key = inputs(kind, weight, bias)
    x, _, b, A, B = layer
    wanted = [t for t in (x, b, A, B, *leaves) if t is not None and t.requires_grad]
    results = []
    for y in (adapted_linear(*layer, found.evaluator, found.execution), linked_linear(*layer, row, key)):
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted, retain_graph=True, allow_unused=True)])
    for eager, operator in zip(*results, strict=True):
        assert (eager is None) == (operator is None)
        if eager is not None:
            assert torch.equal(eager, operator)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Series, torch.float64), (Direct, torch.float32), (Series, torch.bfloat16)]
)
def test_opcheck(kind, dtype):
    (x, W, b, A, B), _, _, row, key = inputs(kind, dtype=dtype)
    W.requires_grad_(dtype == torch.float64)
    torch.library.opcheck(torch.ops.basisadapt.adapted_linear.default, (x, W, b, A, B, row, key))
    torch.library.opcheck(torch.ops.basisadapt.adapted_linear.default, (x.detach(), None, None, A, B, row, key))
    upstream = torch.randn(2, 3, len(B), generator=GENERATOR).to(dtype)
    plain = [t.detach() for t in (x, W, A, B)]
    torch.library.opcheck(torch.ops.basisadapt.linear.default, (*plain[:2], b.detach(), *plain[2:], row.detach(), key))
    torch.library.opcheck(torch.ops.basisadapt.linear.default, (plain[0], None, None, *plain[2:], row.detach(), key))
    for form, trains in ((True, False), (False, True)):
        given = (upstream, *plain, key, form, trains)
        torch.library.opcheck(torch.ops.basisadapt.linear_backward.default, given)


def test_autocast_casts_x_in_the_graph():
    layer, found, _, row, key = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linked_linear(*layer, row, key)
        assert torch.equal(y, adapted_linear(*layer, found.evaluator, found.execution))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer[0].grad.dtype == layer[3].grad.dtype == torch.float32


def test_a_function_is_known_as_long_as_a_graph_hangs_on_its_row():
    layer, found, leaves, row, key = inputs()
    number, y = int(key), linked_linear(*layer, row, key)
    del found, row
    gc.collect()
    y.sum().backward()
    assert leaves[0].grad.abs().sum() > 0
    del y
    gc.collect()
    assert number not in operators._known


def test_rows_of_several_functions_and_one_that_nobody_used():
    A, B = (t.double().requires_grad_() for t in factors(9, 7, 2, 0.3))
    (one, of_one), (other, of_other) = function(A, B), function(A, B, Direct)
    of_graph, _ = linked([other, one], ["", ""])
    row, key = of_graph.row, of_graph.key
    linked_linear(torch.ones(3, 7, dtype=torch.float64), None, None, A, B, row, key).sum().backward()
    assert of_other[0].grad.abs().sum() > 0
    assert not of_one[0].grad.any()


@pytest.fixture
def _fused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(operators, "_FUSED", Execution("torch"))


def plain(A, B, kind=Series):
    """A function whose numbers are in the kernels' dtype."""
    return function(A.float(), B.float(), kind)[0]


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_graphs_get_the_numbers_of_functions_that_are_of_one_kind_with_those_of_their_name():
    A, B = factors(9, 7, 2, 0.3)
    functions = [plain(A, B), plain(A, B, Direct), plain(A, B), plain(A, B), plain(A, B)]
    names = ["q", "q", "k", "v", "k"]
    assert [of_graph.traced is not None for of_graph in linked(functions, names)] == [False, False, True, True, True]
    of_graph = linked(functions, names)[2]
    row, packed = of_graph.traced
    assert row is of_graph.row
    assert torch.equal(packed, functions[2].evaluator.packed)
    assert packed.storage_offset() == 0


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_what_a_graph_gets_of_a_table_brings_the_gradient_to_its_cubics():
    cubics = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    one = Function(Row(cubics.float(), 2, torch.ones(8), 0.0), Execution("torch"), lambda *_: None)
    A, B = factors(9, 7, 2, 0.3)
    of_graph, other = linked([one, plain(A, B)], ["q", "k"])
    row, _ = of_graph.traced
    assert torch.equal(row, cubics.float())
    (3 * row).sum().backward(retain_graph=True)
    assert torch.equal(cubics.grad, torch.full_like(cubics, 3))
    assert other.traced[0] is other.row


class Steps:
    """Passes with the numbers of a table of so many cells."""

    def __init__(self):
        self.memory, self.count = Memory(), 0

    def forward(self, cells=6):
        """What a graph reads in the next pass, a sum that keeps it for its backward pass, and where it is."""
        self.count += 1
        cubics = torch.full((cells, 4), float(self.count), requires_grad=True)
        one = Function(Row(cubics, 2, torch.full((8,), float(self.count)), 0.0), Execution("torch"), lambda *_: None)
        (found,) = operators.linked([one], self.memory, ["q"])
        fill([one], [found])
        numbers, packed = found.traced
        assert torch.equal(numbers, cubics)
        assert torch.equal(packed, torch.full((8,), float(self.count)))
        return cubics, numbers.square().sum() * packed.detach().sum(), (numbers.data_ptr(), packed.data_ptr())


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_numbers_stay_where_they_are_from_step_to_step():
    """As a captured CUDA graph needs it; a table of another size lies elsewhere."""
    steps, places = Steps(), []
    for cells in (6, 6, 6, 8):
        _, total, place = steps.forward(cells)
        total.backward()
        places.append(place)
    assert places[0] == places[1] == places[2]
    assert places[3][0] != places[0][0]


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_every_pass_has_its_own_numbers_until_its_backward_pass():
    """Two losses before a backward pass; again in the next step, at the same places."""
    steps, places = Steps(), []
    for _ in range(2):
        passes = [steps.forward() for _ in range(3)]
        places.append([place for _, _, place in passes])
        sum(total for _, total, _ in passes).backward()
        for cubics, _, _ in passes:
            assert torch.equal(cubics.grad, 2 * cubics * 8 * cubics[0, 0])
    assert len(set(places[0])) == 3
    assert places[0] == places[1]


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_passes_without_a_backward_pass_do_not_pile_up():
    steps = Steps()
    found = [steps.forward() for _ in range(3)]
    del found
    assert len({steps.forward()[2] for _ in range(9)}) <= 3
    with torch.no_grad():
        assert len({steps.forward()[2] for _ in range(4)}) == 1


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_a_second_backward_pass_is_refused_where_its_numbers_are_gone():
    steps = Steps()
    _, total, _ = steps.forward()
    total.backward(retain_graph=True)
    steps.forward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.usefixtures("_fused_on_a_cpu")
def test_the_size_of_a_table_is_a_constant_of_a_graph():
    """Also of one for all shapes of a batch: inductor copies it for a kernel, and fails if the size is unknown."""
    one = Function(
        Row(torch.ones(6, 4, requires_grad=True), 2, torch.ones(8), 0.0), Execution("torch"), lambda *_: None
    )
    link, seen = Link(Call()), []

    def keep(graph, inputs):
        seen.extend(node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        return graph

    (found,) = operators.linked([one], Memory(), ["q"])
    link.point_to(found, one, may_be_traced=True)
    fill([one], [found])
    total = torch.compile(lambda x: link.traced[0].sum() + x.sum(), dynamic=True, backend=keep)(torch.ones(5, 3))
    assert total == 24 + 15
    constant = [all(isinstance(size, int) for size in v.shape) for v in seen if isinstance(v, torch.Tensor)]
    assert sorted(constant) == [False, True]  # of x, and of the table


def test_a_graph_asks_whether_its_functions_belong_to_their_factors():
    A, B = factors(9, 7, 2, 0.3)
    asked = []
    one = Function(plain(A, B).evaluator, Execution("torch"), lambda *given: asked.append(given))
    (of_graph,) = linked([one], [""])
    torch.ops.basisadapt.check(of_graph.key, A, B)
    assert asked == [(one, A, B)]
    torch.library.opcheck(torch.ops.basisadapt.check.default, (of_graph.key, A, B))


def test_gradients_of_gradients_are_refused():
    layer, _, _, row, key = inputs()
    y = linked_linear(*layer, row, key)
    (gradient,) = torch.autograd.grad(y.square().sum(), layer[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", [Series, Direct, Split])
def test_gradients_add_up_within_a_backward_pass_and_not_over_several(kind):
    """Also where a pass before asked for those of A alone, and left the function's own behind."""
    layer, _, leaves, row, key = inputs(kind)
    (alone,) = torch.autograd.grad(linked_linear(*layer, row, key).sum(), leaves[0], retain_graph=True)
    torch.autograd.grad(linked_linear(*layer, row, key).sum(), layer[3])
    twice = linked_linear(*layer, row, key).sum() + linked_linear(*layer, row, key).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(twice, leaves[0], retain_graph=True)
        torch.testing.assert_close(gradient, 2 * alone)
