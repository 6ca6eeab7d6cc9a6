"""Merging on plain modules: there and back, several adapters, and tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from basisadapt.adapter import PhiLinear
from tests.adapter.toys import Tied, adapted, answer, base, cases, config, draw, two


@cases
def test_merge_layers(case):
    model = adapted(case)
    expected = answer(model)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(answer(merged), expected, rtol=1e-12, atol=1e-12)
    assert not [m for m in merged.modules() if isinstance(m, PhiLinear)]
    assert not hasattr(merged, "peft_config")


def test_merge_layers_multi():
    model = two("lin0", "lin1")
    first = answer(model)
    model.set_adapter("other")
    second = answer(model)
    model.base_model.set_adapter(["default", "other"])
    both = answer(model)
    torch.testing.assert_close(
        answer(copy.deepcopy(model).merge_and_unload(adapter_names=["default"])), first, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        answer(copy.deepcopy(model).merge_and_unload(adapter_names=["other"])), second, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(answer(model.merge_and_unload()), both, rtol=1e-12, atol=1e-12)


def test_merge_layers_is_idempotent():
    model = two()
    expected = answer(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    torch.testing.assert_close(answer(model), expected, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="You are now additionally merging other"):
        model.merge_adapter(adapter_names=["other"])
    assert model.base_model.model.lin0.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert torch.equal(answer(model), expected)
    with pytest.raises(TypeError, match="adapter_names should be a list"):
        model.merge_adapter(adapter_names="default")


def test_a_refused_merge_of_a_second_adapter_leaves_the_first_merged():
    """Merged before it stays merged, and merged along with it is not."""
    model = two()
    layer, plain = model.base_model.model.lin0, base().lin0.weight
    with torch.no_grad():
        layer.phi_B["other"].fill_(float("inf"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="merging adapter 'other' into 'lin0' gives NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert layer.merged_adapters == []
    assert torch.equal(layer.weight, plain)
    model.merge_adapter(["default"])
    merged = layer.weight.clone()
    with pytest.raises(ValueError, match="merging adapter 'other' into 'lin0' gives NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.weight, merged)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, plain)


def test_set_adapter_unmerges():
    model = two()
    model.set_adapter("other")
    expected = answer(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert torch.equal(answer(model), expected)


def test_tied_weights_stay_tied():
    """ΔW in a tied weight reaches both ends, as with every tuner; peft says so where it sees it, and it comes off."""
    model = get_peft_model(base(Tied), config(target_modules=["lm_head"]))
    draw(model)
    expected = answer(model)
    model.merge_adapter()
    inner = model.base_model.model
    assert inner.lm_head.base_layer.weight is inner.emb.weight
    model.unmerge_adapter()
    assert torch.equal(answer(model), expected)
    assert inner.lm_head.base_layer.weight is inner.emb.weight
