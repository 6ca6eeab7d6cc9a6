"""The operators that torch.compile looks into, against the kernels launched one by one: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

from basisadapt.phi import kernels, series
from basisadapt.phi.choice import evaluator
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Series
from tests.phi import test_cells_triton as tables
from tests.phi.test_cells_triton import DEVICE, INTERPRETED
from tests.phi.test_evaluators import factors, make

pytestmark = tables.pytestmark
_interpreter = tables._interpreter  # the fixture
SHAPES = [(37, 150, 3), (130, 70, 16)] if INTERPRETED else [(37, 150, 3), (300, 500, 16), (90, 100, 80)]
# The interpreter loops neither over powers nor up to a number that it was passed.
KINDS = [Row] if INTERPRETED else [Row, Series]


def function(kind, shape):
    """A, B and an evaluator."""
    if kind is Row:
        return tables.made("sinc", 20.0, shape)[1:4]
    A, B = (t.to(DEVICE) for t in factors(*shape, 0.4))
    transfer = make("sinc", 50)
    on_device = transfer.with_parameters(*(p.to(DEVICE) for p in transfer.parameters))
    return A, B, evaluator(on_device, A, B, "triton")


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_kernels_without_a_graph(kind, shape, dtype, monkeypatch):
    from basisadapt.phi import graph_triton

    if INTERPRETED:
        monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    A, B, chosen = function(kind, shape)
    assert isinstance(chosen, kind)
    m, n, _ = shape
    generator = torch.Generator().manual_seed(3)
    weight, upstream = (torch.randn(m, n, generator=generator).to(DEVICE, dtype) for _ in range(2))
    row = chosen.parameters[0].detach()
    if kind is Series:
        row = row.new_empty(series.POINTS[-1] + series.POWER_COUNT)
    for base in (None, weight, weight.T.contiguous().T):
        truth = kernels.effective_weight(base, A, B, chosen, dtype, "triton")
        found = graph_triton.effective_weight(base, A, B, row, chosen.packed, upstream)
        assert (found - truth).norm() <= (1e-6 if dtype == torch.float32 else 1e-3) * truth.norm()
    _, *truths, (of_row,) = kernels.pull_back(upstream.clone(), None, A, B, chosen, "triton", form=False)
    ours = graph_triton.pull_back(upstream.clone(), A, B, row, chosen.packed)
    if kind is Series:  # by moments or by powers
        to_moments = series.with_powers(series.POINTS[-1], of_row.device)
        of_row, ours = to_moments @ of_row, (*ours[:2], to_moments @ ours[2])
    for gradient, expected in zip(ours, (*truths, of_row), strict=True):
        assert (gradient - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
