"""Tables of many modules made at once: what each alone is, of a few sizes; and chosen as on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from basisadapt.phi import choice, extent, together
from basisadapt.phi.choice import Choice, Fitted, Work
from basisadapt.phi.cubic_tables import Cells, Spline, Table
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Direct, Series
from tests.phi.test_evaluators import Morlet, factors, make

RADII = torch.tensor([0.4, 2.0, 1.1], dtype=torch.float64)
MOST = 1 << 20


def stacked(*transfers):
    """Functions of one basis side by side: what makes them all, and their parameters."""
    parameters = tuple(torch.stack(column) for column in zip(*(t.parameters for t in transfers), strict=True))
    return transfers[0].with_parameters, tuple(p.double().requires_grad_() for p in parameters)


def three(basis, num=12):
    return [make(basis, num, omega, gain=gain) for omega, gain in ((3.0, 1.0), (9.0, 2.0), (6.0, 0.5))]


@pytest.mark.parametrize(("kind", "basis"), [(Table, "gaussian_rbf"), (Spline, "bspline")])
def test_functions_at_once_are_those_of_each_alone(kind, basis):
    """Cubics, their gradients, and whether they are close."""
    alone = three(basis)
    of_all, parameters = stacked(*alone)
    cells = Cells.of(of_all(*parameters), RADII, 192)
    found = kind.cubics(of_all(*parameters), cells)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = torch.autograd.grad(found, parameters, upstream)
    close = {t: kind.close(of_all(*parameters), cells, t).tolist() for t in (1e-1, 1e-3, 1e-5, 1e-7, 1e-14)}
    assert {answer for answers in close.values() for answer in answers} == {True, False}
    asked = torch.tensor([1e-1, 1e-7, 1e-3], dtype=torch.float64)
    mixed = kind.close(of_all(*parameters), cells, asked).tolist()
    assert mixed == [close[t][index] for index, t in enumerate((1e-1, 1e-7, 1e-3))]
    for index, transfer in enumerate(alone):
        one = tuple(p.double().requires_grad_() for p in transfer.parameters)
        single = transfer.with_parameters(*one)
        itself = Cells.of(single, RADII[index], 192)
        expected = kind.cubics(single, itself)
        torch.testing.assert_close(found[index], expected, rtol=1e-10, atol=1e-10)
        for part, truth in zip(grads, torch.autograd.grad(expected, one, upstream[index]), strict=True):
            torch.testing.assert_close(part[index], truth, rtol=1e-9, atol=1e-9)
        assert [bool(kind.close(single, itself, t)) for t in close] == [answers[index] for answers in close.values()]


@pytest.mark.parametrize("basis", ["sinc", "gaussian_rbf", "bspline", "fourier", Morlet()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_direct_sum(basis, dtype):
    alone = three(basis)
    of_all, parameters = stacked(*alone)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-8
    with torch.no_grad():
        fitted = together.fit(of_all(*parameters), RADII, [tolerance] * 3, [MOST] * 3, [0] * 3)
    assert {half for _, half in fitted} <= set(together.SIZES)
    rows = together.rows(of_all, parameters, RADII, {i: (*found, dtype) for i, found in enumerate(fitted)})
    generator = torch.Generator().manual_seed(1)
    for index, transfer in enumerate(alone):
        z = RADII[index] * (2 * torch.rand(20, 30, generator=generator, dtype=torch.float64) - 1)
        z = z.to(dtype)
        upstream = torch.rand(20, 30, generator=generator, dtype=dtype)
        row, direct = rows[index], Direct(transfer)
        value, slope, moments = row.pullback(z, upstream, row.scratch(z.numel(), z))
        assert torch.equal(value, row.value(z, row.scratch(z.numel(), z)))
        true_value, true_slope, truth = direct.pullback(z.double(), upstream.double(), z)
        grads = torch.autograd.grad(row.parameters, parameters, row.gradients(moments), retain_graph=True)
        for found, expected in [(value, true_value), (slope, true_slope)]:
            assert (found - expected).abs().max() <= 20 * tolerance * expected.abs().max()
        each = [p.detach().expand(z.numel(), *p.shape).clone().requires_grad_() for p in transfer.parameters]
        on_each = transfer.with_parameters(*each)(z.double().reshape(-1, 1))
        largest = torch.autograd.grad(on_each.sum(), each, allow_unused=True)
        for found, expected, size in zip(grads, truth, largest, strict=True):
            size = 0.0 if size is None else size.abs().max()  # as if nothing cancelled
            assert (found[index] - expected).abs().max() <= 10 * tolerance * upstream.abs().sum() * size + 1e-12
            others = [i for i in range(3) if i != index]
            assert not found[others].any()


def test_sizes_follow_reach_and_tolerance_and_have_limits():
    of_all, parameters = stacked(*three("sinc"))
    with torch.no_grad():
        transfer = of_all(*parameters)
        coarse, fine = (together.fit(transfer, RADII, [t] * 3, [MOST] * 3, [0] * 3) for t in (1e-4, 1e-8))
        sizes = [[half for _, half in found] for found in (coarse, fine)]
        assert all(a <= b for a, b in zip(*sizes, strict=True))
        assert sizes[0][1] < sizes[1][1]
        assert sizes[0][0] < sizes[0][1]
        most = [MOST, 2 * sizes[0][1] - 2, 2 * sizes[0][2]]
        limited = together.fit(transfer, RADII, [1e-4] * 3, most, [2 * sizes[0][0], 0, 0])
        assert limited == [(Table, 2 * sizes[0][0]), None, coarse[2]]
        unbounded = torch.where(torch.arange(3) == 1, torch.nan, RADII)
        assert [f is None for f in together.fit(transfer, unbounded, [1e-4] * 3, [MOST] * 3, [0] * 3)] == [0, 1, 0]


def test_tables_share_a_batch_unless_one_is_much_smaller():
    of_all, parameters = stacked(*three("sinc"), *three("sinc"))
    radii, sizes = RADII.repeat(2), (192, 3072, 384, 768, 3072, 192)
    dtypes = [torch.float32] * 5 + [torch.float64]
    rows = together.rows(of_all, parameters, radii, {i: (Table, sizes[i], d) for i, d in enumerate(dtypes)})
    assert [rows[i].half for i in range(6)] == [384, 3072, 384, 3072, 3072, 192]
    for index, single in enumerate(three("sinc") * 2):
        z = torch.linspace(-1, 1, 50, dtype=dtypes[index]) * radii[index].to(dtypes[index])
        truth = single(z.double())
        found = rows[index].value(z, rows[index].scratch(50, z)).double()
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_memory_for_few_cells_makes_some_modules_at_a_time(monkeypatch):
    of_all, parameters = stacked(*three("sinc"))
    fitted = dict.fromkeys(range(3), (Table, 192, torch.float64))
    found = []
    for at_once in (1 << 22, 2 * 384, 1):
        monkeypatch.setattr(together, "AT_ONCE", at_once)
        rows = together.rows(of_all, parameters, RADII, fitted)
        total = sum((index + 1) * rows[index].parameters[0].sum() for index in range(3))
        found.append([*(rows[i].parameters[0] for i in range(3)), *torch.autograd.grad(total, parameters)])
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=1e-11, atol=1e-9)


def test_one_table_serves_several_backward_passes():
    """Of what it was made of: that its parameters have moved since, without a new version, changes nothing."""
    of_all, parameters = stacked(*three("sinc"))
    row = together.rows(of_all, parameters, RADII, {1: (Table, 192, torch.float32)})[1].parameters[0]
    upstream = torch.randn(row.shape, generator=torch.Generator().manual_seed(0))
    first = torch.autograd.grad(row, parameters, upstream, retain_graph=True)
    for parameter in parameters:
        parameter.data.mul_(1.5)
    again = torch.autograd.grad(row, parameters, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].any()


def test_the_largest_entries_of_many_pairs_are_those_of_each():
    shapes = [(30, 20, 3), (20, 30, 3), (30, 20, 3), (1, 7, 1), (30, 20, 3), (30, 20, 5)]
    pairs = [factors(*shape, radius) for shape, radius in zip(shapes, (1.0, 2.0, 0.1, 3.0, 5.0, 7.0), strict=True)]
    pairs.append((torch.full((2, 4), float("nan")), torch.ones(3, 2)))
    expected = torch.tensor([(B.double() @ A.double()).abs().max() for A, B in pairs])
    torch.testing.assert_close(extent.largest(pairs), expected, rtol=1e-5, atol=0, equal_nan=True)
    for entries in (1 << 20, 1300, 40):
        torch.testing.assert_close(extent._at_once(pairs, entries), expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The host does not wait: it reads what a compilation found at the next one."""
    monkeypatch.setattr(choice, "deferred", lambda _: True)
    monkeypatch.setattr(choice, "_send", lambda numbers: (numbers.clone(), choice._arrived))


def test_chosen_at_once_they_stay_right_while_range_and_function_move(as_on_a_gpu):
    """Compiled again and again, as in training, two modules with one memory: what is too coarse is seen one compilation
    later, when it has moved by a tenth once more."""
    memory, kinds = Choice(), set()
    for step in range(40):
        singles = [make("bspline", 6, omega=start * 1.08**step) for start in (0.2, 0.6)]
        of_all, parameters = stacked(*singles)
        pairs = [tuple(t.float() for t in factors(40, 50, 2, 0.05 * 1.1**step)) for _ in singles]
        work = Work(of_all, parameters, singles.__getitem__, pairs, torch.ones(2), (1e-6, 1e-6))
        for single, chosen, (A, B) in zip(singles, memory.evaluators(work), pairs, strict=True):
            kinds.add(type(chosen))
            z = B @ A
            truth = single(z.double())
            error = (chosen.value(z, chosen.scratch(z.numel(), z)).double() - truth).abs().max()
            assert error <= 6e-6 * truth.abs().max(), (step, type(chosen).__name__)
    assert {Series, Row} <= kinds


def test_a_stretched_table_is_fitted_again(as_on_a_gpu):
    single = make("bspline", 8, 6.0)
    of_all, parameters = stacked(single)
    memory, fitted = Choice(), []
    for stretch in (1.0, 1.02, 1.2, 1.2):
        A, B = factors(60, 50, 2, 1.0)
        work = Work(of_all, parameters, lambda _: single, [(A, stretch * B)], torch.ones(1), (1e-6,))
        assert isinstance(memory.evaluators(work)[0], Row)
        fitted.append(memory._tables[0])
    assert fitted[0] is fitted[1] is fitted[2]
    assert fitted[3].reach > 1.15 * fitted[0].reach


def test_modules_of_one_name_have_series_or_tables_of_one_size(as_on_a_gpu, monkeypatch):
    """A module that a series would serve gets a table where another of its name needs one."""
    monkeypatch.setattr(together, "SMALLER", 1)
    singles = [make("gaussian_rbf", 8, omega) for omega in (0.5, 60.0, 60.0, 0.5)]
    of_all, parameters = stacked(*singles)
    pairs = [factors(60, 50, 2, radius) for radius in (1.0, 1.0, 3.0, 1.0)]
    work = Work(of_all, parameters, singles.__getitem__, pairs, torch.ones(4), (1e-6,) * 4)
    alone = Choice().evaluators(work)
    assert [type(one) for one in alone] == [Series, Row, Row, Series]
    assert alone[1].half < alone[2].half
    chosen = Choice().evaluators(replace(work, alike=("q", "q", "q", "k")))
    assert [type(one) for one in chosen] == [Row, Row, Row, Series]
    assert len({one.half for one in chosen[:3]}) == 1
    for single, one, (A, B) in list(zip(singles, chosen, pairs, strict=True))[:2]:
        z = (B @ A).float()
        truth = single(z.double())
        error = (one.value(z, one.scratch(z.numel(), z)).double() - truth).abs().max()
        assert error <= 1e-5 * truth.abs().max()


def test_where_a_table_would_take_longer_the_sum_is_direct(as_on_a_gpu):
    single = make("gaussian_rbf", 3, 40.0)
    of_all, parameters = stacked(single)
    for shape, kind in (((400, 300), Row), ((3, 4), Direct)):
        A, B = factors(*shape, 2, 3.0)
        work = Work(of_all, parameters, lambda _: single, [(A, B)], torch.ones(1), (1e-6,))
        assert isinstance(Choice().evaluators(work)[0], kind)
        (found,) = Fitted.together(work, [0], torch.tensor([3.0], dtype=torch.float64), {})
        alone = Fitted.to(work, 0, torch.tensor(3.0, dtype=torch.float64), None)
        assert (found.kind, found.reach) == (alone.kind, alone.reach)
        assert 0.7 * alone.half <= found.half <= 1.6 * alone.half
