"""A diagnostic of one's own, in every run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest

from basisadapt import InputError
from basisadapt.diagnostics.diagnostic import DIAGNOSTICS, Diagnostic
from basisadapt.training import run


@pytest.fixture
def diagnostics(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(DIAGNOSTICS, "_classes", {})


@pytest.mark.usefixtures("diagnostics")
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_a_diagnostic_of_ones_own_is_in_every_result(method, small):
    plain = run(small(method=method, adapter={"r": 2}))

    class RelativeSize(Diagnostic, name="relative_size"):
        def number(self, change, layer):
            assert change.shape == layer.get_base_layer().weight.shape
            return change.norm() / layer.get_base_layer().weight.norm()

    class Nowhere(Diagnostic, name="nowhere"):
        def number(self, change, layer):
            return math.nan

    seen = run(small(method=method, adapter={"r": 2}))
    numbers = [module["relative_size"] for module in seen.modules.values()]
    assert len(numbers) == 12
    assert seen.metrics["relative_size.mean"] == pytest.approx(statistics.fmean(numbers))
    assert 0 < min(numbers) < max(numbers) < 1
    assert not [name for name in seen.metrics if "nowhere" in name]
    assert seen.curves == plain.curves, "it changes nothing"
    json.dumps(dataclasses.asdict(seen), allow_nan=False)


@pytest.mark.usefixtures("diagnostics")
@pytest.mark.parametrize("taken", ["stable_rank", "spectrum", "active_n"])
def test_a_diagnostic_with_the_name_of_another_number_is_refused_before_training(taken, small):
    class Taken(Diagnostic, name=taken):
        def number(self, change, layer):
            return 0.0

    steps = []
    with pytest.raises(InputError, match=f"two numbers of a module are called '{taken}'"):
        run(small(adapter={"r": 2}), on_step=lambda *step: steps.append(step))
    assert not steps
