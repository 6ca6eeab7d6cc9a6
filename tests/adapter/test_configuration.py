"""What an adapter's configuration finds in a model, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from basisadapt import InputError
from basisadapt.methods.abba import ABBAConfig
from tests.adapter.toys import (
    CASES,
    MLP,
    Attention,
    Blocks,
    X,
    adapted,
    answer,
    base,
    cases,
    config,
    draw,
    parts,
    trainable,
)


@cases
def test_model_attributes_and_adapter_name(case):
    model = adapted(case)
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert model.active_adapters == ["default"]
    named, own = CASES[case]
    model = get_peft_model(base(named), config(**own), adapter_name="test-adapter")
    assert "test-adapter" in model.peft_config
    assert model.active_adapter == "test-adapter"
    assert [name for name in trainable(model) if ".test-adapter" in name]


def test_weight_bias_attributes_and_repr():
    layer = adapted().base_model.model.lin0
    assert layer.weight.data_ptr() == layer.base_layer.weight.data_ptr()
    assert torch.equal(layer.weight, layer.base_layer.weight)
    assert layer.bias is layer.base_layer.bias
    assert repr(layer).startswith("PhiLinear(")
    assert "(base_layer): Linear(in_features=10, out_features=20, bias=True)" in repr(layer)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (["lin0"], ["lin0"]),
        ({"lin1"}, ["lin1"]),
        (("lin0", "lin1"), ["lin0", "lin1"]),
        ("lin[01]", ["lin0", "lin1"]),
        ("all-linear", ["lin0", "lin1", "head"]),
        (["lin0", "not_there"], ["lin0"]),
    ],
    ids=str,
)
def test_target_modules(target, found):
    assert adapted(target_modules=target).base_model.targeted_module_names == found


def test_exclude_modules():
    model = adapted(target_modules="all-linear", exclude_modules=["head"])
    assert model.base_model.targeted_module_names == ["lin0", "lin1"]
    with pytest.warns(UserWarning, match="no modules were excluded"):
        adapted(exclude_modules=["not_there"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["not_there"]}, "unknown module in target_modules 'not_there'"),
        ({"target_modules": "not_there"}, "Target modules .* not found in the base model"),
        ({"target_modules": []}, "No `target_modules` passed"),
        ({"exclude_modules": ["lin0"]}, "No modules were targeted for adaptation"),
        ({"modules_to_save": ["lin0"]}, "only targeted modules that are marked to be saved"),
        ({"target_modules": None}, "placement 'all' knows no block of a .*target_modules=\"all-linear\""),
    ],
    ids=str,
)
def test_non_existing_target_modules_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(MLP(), config(**settings))


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": 0}, [0]),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, [0, 2]),
        ({"layers_to_transform": [0, 2], "layers_pattern": ["blocks", "layers"]}, [0, 2]),
    ],
    ids=str,
)
def test_training_layer_indexing(settings, blocks, tmp_path):
    model = get_peft_model(base(Blocks), config(**settings))
    draw(model)
    names = [f"body.layers.{block}.lin0" for block in blocks]
    assert model.base_model.targeted_module_names == names
    model(X).sum().backward()
    assert trainable(model) == parts("default", *names)
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(Blocks), tmp_path)
    assert loaded.base_model.targeted_module_names == names
    assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": [0], "target_modules": "lin0"}, "needs a list of target_modules"),
        ({"layers_to_transform": [0], "target_modules": None}, "needs a list of target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
        ({"layers_to_transform": [7]}, "You specified 'layers_to_transform'"),
    ],
    ids=str,
)
def test_layer_indexing_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(Blocks(), config(**settings))


@pytest.mark.parametrize(
    "setting",
    ["bias", "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices", "use_dora"],
)
def test_settings_of_other_tuners_are_refused_by_name(setting):
    with pytest.raises(
        TypeError, match=rf"unexpected keyword argument '{setting}'; help\(PhiConfig\) has its settings$"
    ):
        config(**{setting: None})


@pytest.mark.parametrize(
    ("setting", "ours"),
    [
        ("lora_dropout", "dropout"),
        ("vera_dropout", "dropout"),
        ("lora_r", "r"),
        ("rank", "r"),
        ("network_dim", "r"),
        ("num_basis_functions", "num_basis"),
        ("n_functions", "num_basis"),
        ("omega_0", "omega_init"),
        ("activation", "basis"),
        ("lr_phi", "transfer_lr"),
        ("optimizer", None),
        ("dim", "r"),
        ("alpha", "lora_alpha"),
        ("target_module", "target_modules"),
        ("centered", "centre"),
        ("n_basis", "num_basis"),
        ("n", "num_basis"),
        ("nbasis", "num_basis"),
        ("num_bases", "num_basis"),
    ],
)
def test_a_setting_by_another_name_is_told_ours(setting, ours):
    told = f"did you mean '{ours}'?" if ours else "help(PhiConfig) has its settings"
    with pytest.raises(TypeError) as refused:
        config(**{setting: 1})
    assert str(refused.value) == f"PhiConfig got an unexpected keyword argument '{setting}'; {told}"


@pytest.mark.parametrize(
    "setting",
    ["lr", "learning_rate", "weight_decay", "batch", "num_epochs", "per_device_train_batch_size", "load_in_4bit"],
)
def test_what_training_takes_is_no_setting_of_an_adapter(setting):
    with pytest.raises(TypeError, match=rf"'{setting}'; it belongs where the model is loaded or trained; basisadapt\."):
        config(**{setting: 1})


def test_a_method_is_told_of_no_setting_that_it_lacks():
    with pytest.raises(TypeError, match=r"'n_basis'; help\(ABBAConfig\) has its settings$"):
        ABBAConfig(n_basis=3)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 2), nn.Embedding(3, 4), nn.MultiheadAttention(8, 2), nn.LayerNorm(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_unsupported_layers_raise(layer):
    with pytest.raises(
        InputError, match=rf"module '0' is a {type(layer).__name__}; φ\(BA\) adapts nn.Linear and Conv1"
    ):
        get_peft_model(nn.Sequential(layer), config(target_modules=["0"]))


def test_multihead_attention_keeps_its_projection():
    """It reads out_proj.weight and never calls the module: an adapter there would act only once it is merged."""
    with pytest.raises(InputError, match=r"'mha.out_proj' is inside an nn.MultiheadAttention.*exclude_modules"):
        get_peft_model(Attention(), config(target_modules="all-linear"))
    model = get_peft_model(base(Attention), config(target_modules="all-linear", exclude_modules=["out_proj"]))
    assert model.base_model.targeted_module_names == ["lin0"]
