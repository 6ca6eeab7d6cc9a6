"""A model that is adapted twice, and what is for other tuners."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from basisadapt import InputError
from tests.adapter.toys import MLP, adapted, answer, base, config, draw, lora, parts, trainable


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_second_get_peft_model_warns_and_works(name, tmp_path):
    """The model that was adapted first brings φ along: it is trained, saved and deleted as the new one's own."""
    first = adapted()
    expected = answer(first)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        model = get_peft_model(first.base_model.model, config(), adapter_name=name).eval()
    draw(model)
    assert trainable(model) >= parts(name, "lin0")
    if name == "other":
        model.set_adapter("default")
        assert trainable(model) == parts("default", "lin0")
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(base(), tmp_path)), answer(model))
    assert not torch.equal(answer(model), expected), "drawn again"


def test_a_second_adapter_of_the_same_name_elsewhere_is_refused():
    """φ of the first would go on acting and be neither trained nor saved."""
    first = adapted()
    with pytest.raises(InputError, match=r"adapter 'default' in 'lin0', where the new one is not; unload\(\) it first"):
        get_peft_model(first.base_model.model, config(target_modules=["lin1"]))


def test_unload_adapter_and_adapt_again(recwarn):
    expected = answer(base())
    plain = adapted().unload()
    assert torch.equal(answer(plain), expected)
    again = get_peft_model(plain, config(target_modules=["lin1"]))
    assert trainable(again) == parts("default", "lin1")
    assert not [w for w in recwarn if "second time" in str(w.message)]


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_mixed_adapter_batches_are_refused(task, bert, tokens):
    model = get_peft_model(bert, config(target_modules=["query"], task_type=task))
    with pytest.raises(InputError, match=r"φ\(BA\) does not support batches of mixed adapters \(adapter_names\)"):
        model(input_ids=tokens, adapter_names=["default"] * len(tokens))


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda m: get_peft_model(MLP(), config(), mixed=True), ValueError, "'BASISADAPT_PHI' is not compatible with"),
        (lambda m: get_peft_model(MLP(), lora()).add_adapter("x", config()), ValueError, "different peft types"),
        (lambda m: m.add_adapter("x", lora()), ValueError, "different peft types"),
        (lambda m: m.add_weighted_adapter(["default"], [1.0], "x"), InputError, r"a sum is no sum; .*set_adapter\("),
        (lambda m: peft.inject_adapter_in_model(config(), MLP()), ValueError, "use `get_peft_model` instead"),
        (lambda m: peft.convert_to_lora(m, rank=2), TypeError, "not support LoRA conversion.*PhiLinear"),
    ],
    ids=["mixed", "beside LoRA", "LoRA beside", "add_weighted_adapter", "inject_adapter_in_model", "convert_to_lora"],
)
def test_what_is_not_supported_says_so(use, error, message):
    model = adapted()
    expected = answer(model)
    with pytest.raises(error, match=message):
        use(model)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(answer(model), expected)


def test_hotswap_says_that_it_is_for_lora(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
