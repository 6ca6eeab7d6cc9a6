"""Several adapters in one model: which is active, which trains, which is saved, what peft reports of them, and how one
goes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, functional

from tests.adapter.toys import adapted, answer, base, config, parts, trainable, two


def test_active_adapter_get_and_set():
    model = two()
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    assert model.base_model.model.lin0.active_adapters == ["default"]
    model.set_adapter("other")
    assert (model.active_adapter, model.active_adapters) == ("other", ["other"])
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == model.base_model.model.lin0.active_adapters == ["default", "other"]
    with pytest.raises(ValueError, match="unknown not found"):
        model.set_adapter("unknown")
    with pytest.raises(ValueError, match="'other' already exists"):
        model.add_adapter("other", config())


@pytest.mark.parametrize("second", ["lin0", "lin1"])
def test_requires_grad(second):
    """φ's tables, which lie outside the layers, train where A and B do, and nowhere else."""
    model = two("lin0", second)
    first, other = parts("default", "lin0"), parts("other", second)
    assert trainable(model) == first
    model.set_adapter("other")
    assert trainable(model) == other
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == first | other
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad("other")
    assert trainable(model) == other
    model.set_requires_grad(["default", "other"])
    assert trainable(model) == first | other
    model.set_requires_grad("other", requires_grad=False)
    assert trainable(model) == first


@pytest.mark.parametrize("inference_mode", [False, True])
def test_adding_an_adapter_changes_nothing_that_trains(inference_mode):
    model = adapted()
    model.add_adapter("other", config(inference_mode=inference_mode))
    assert trainable(model) == parts("default", "lin0")
    model.set_requires_grad("default", requires_grad=False)
    model.add_adapter("third", config(target_modules=["lin1"], inference_mode=inference_mode))
    assert trainable(model) == set()
    model.set_adapter("third")
    assert trainable(model) == parts("third", "lin1")


def test_set_adapter_of_the_functional_interface():
    """It knows the layers alone, not the model that holds φ's tables."""
    model = two()
    functional.set_adapter(model, "other")
    assert trainable(model) == parts("other", "lin0")


def test_load_multiple_adapters(tmp_path):
    model = two()
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = answer(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    result = loaded.load_adapter(tmp_path / "other", adapter_name="other")
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert trainable(loaded) == set()
    for name, truth in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(answer(loaded), truth), name
    loaded.set_adapter("default")
    loaded.load_adapter(tmp_path / "other", adapter_name="third", is_trainable=True)
    loaded.set_adapter("third")
    assert trainable(loaded) == parts("third", "lin0")
    assert torch.equal(answer(loaded), expected["other"])


def test_save_pretrained_selected_adapters(tmp_path):
    model = two()
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert (tmp_path / "one" / "adapter_config.json").exists()
    assert not (tmp_path / "one" / "other").exists()
    model.save_pretrained(tmp_path / "two", selected_adapters=["other"])
    assert not (tmp_path / "two" / "adapter_config.json").exists()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "two" / "other")
    model.set_adapter("other")
    assert torch.equal(answer(loaded), answer(model))
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["unknown"])


@pytest.mark.parametrize(("first", "second"), [("lin0", "lin0"), ("lin0", "lin1"), ("lin1", "lin0")])
def test_delete_adapter(first, second):
    model = two(first, second)
    expected = answer(model)
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Adapter other was active which is now deleted"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert trainable(model) == parts("default", first)
    assert not [name for name in model.state_dict() if "other" in name]
    assert torch.equal(answer(model), expected)


def test_delete_inactive_adapter():
    model = two()
    expected = answer(model)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(answer(model), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_delete_unknown_adapter_raises():
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        adapted().delete_adapter("unknown")


@pytest.mark.parametrize("active", ["default", "other"])
def test_delete_adapter_in_modules_whose_names_hold_the_prefix(active):
    """peft passes over them."""
    model = adapted("Prefixed")
    expected = answer(model)
    model.add_adapter("other", config())
    model.set_adapter(active)
    model.delete_adapter("other")
    assert model.active_adapters == model.base_model.active_adapters == ["default"]
    assert not [name for name in model.state_dict() if "other" in name]
    assert torch.equal(answer(model), expected)
    assert trainable(model) == parts("default", "phi_block.lin0")


def test_the_last_adapter_may_go_and_another_come():
    model = adapted()
    model.delete_adapter("default")
    assert trainable(model) == set()
    model.add_adapter("new", config())
    model.set_adapter("new")
    assert trainable(model) == parts("new", "lin0")
    assert answer(model).isfinite().all()


@pytest.mark.parametrize("saved", [["head"], ["lin1", "head"]], ids=str)
def test_modules_to_save(saved, tmp_path):
    model = adapted(modules_to_save=saved)
    model.add_adapter("other", config(modules_to_save=saved))
    for name in ("other", "default"):
        model.set_adapter(name)
        heads = {f"{module}.modules_to_save.{name}.{p}" for module in saved for p in ("weight", "bias")}
        assert trainable(model) == parts(name, "lin0") | heads
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(base(), tmp_path)), answer(model))
    torch.testing.assert_close(answer(copy.deepcopy(model).merge_and_unload()), answer(model), rtol=1e-12, atol=1e-12)
    model.delete_adapter("other")
    assert not [name for name in model.state_dict() if "other" in name]


def test_layer_and_model_status():
    model = two("lin0", "lin1")
    first, second = model.get_layer_status()
    assert (first.name, first.requires_grad) == ("model.lin0", {"default": True})
    assert (second.name, second.requires_grad) == ("model.lin1", {"other": False})
    status = model.get_model_status()
    assert (status.adapter_model_type, status.num_adapter_layers) == ("PhiModel", 2)
    assert status.requires_grad == {"default": True, "other": False}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.trainable_params == 2 * (10 + 20) + 2 * 5
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
