"""The cases that peft puts every tuner through, on models that are plain modules, named as there.

Saving and loading, merging by variant, gradient checkpointing, half precision, refused settings and NaN in merging are
in test_peft.py, placements in test_placement.py, copies, compilation and quantised weights in test_training_modes.py.
"""

from __future__ import annotations

import copy
import pickle
import re

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, PeftConfig, PeftModel, functional, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from tests.conftest import tiny

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 90, dtype=torch.float64).view(9, 10)


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 4, bias=bias)
        self.head = nn.Linear(4, 2, bias=bias)

    def forward(self, x):
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class EmbeddingConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 10)
        self.conv1d = Conv1D(6, 10)
        self.lin0 = nn.Linear(6, 2)

    def forward(self, x):
        return self.lin0(torch.relu(self.conv1d(self.emb((29 * x.abs()).long()))))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(nn.ModuleDict({"lin0": nn.Linear(10, 10)}) for _ in range(3))

    def forward(self, x):
        for layer in self.body.layers:
            x = torch.relu(layer["lin0"](x))
        return x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin0 = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, x):
        return self.lm_head(self.lin0(self.emb((9 * x.abs()).long())))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 10)

    def forward(self, x):
        return self.lin0(self.mha(x, x, x)[0])


class Prefixed(nn.Module):
    """Its modules' names hold the prefix of the method's own."""

    def __init__(self):
        super().__init__()
        self.phi_block = MLP()

    def forward(self, x):
        return self.phi_block(x)


CASES = {
    "MLP": (MLP, {"target_modules": ["lin0"]}),
    "MLP, two layers": (MLP, {"target_modules": ["lin0", "lin1"], "sharing": "all"}),
    "MLP without bias": (lambda: MLP(bias=False), {"target_modules": "lin[01]"}),
    "MLP, rest": (MLP, {"target_modules": ["lin0"], "modules_to_save": ["head"]}),
    "Conv1D": (EmbeddingConv1D, {"target_modules": ["conv1d"]}),
    "Conv1D and Linear": (EmbeddingConv1D, {"target_modules": "all-linear"}),
    "Blocks": (Blocks, {"target_modules": ["lin0"], "layers_to_transform": [0, 2]}),
    "Tied": (Tied, {"target_modules": ["lin0"]}),
    "Prefixed": (Prefixed, {"target_modules": ["lin0"]}),
}
cases = pytest.mark.parametrize("case", CASES)


def config(**settings):
    return PhiConfig(**{"r": 2, "num_basis": 5, "gain": 2.0, "target_modules": ["lin0"], **settings})


def base(model=MLP):
    torch.manual_seed(0)
    return model().double().eval()


@torch.no_grad()
def draw(model, seed=0):
    """Values as training would give them to what is the method's own, whatever the base model's modules are called."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if re.search(r"\.phi_([AB]|bank)\.", name) and not name.endswith(("raw_omega", "grid")):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def adapted(case="MLP", **settings):
    model, own = CASES[case]
    peft_model = get_peft_model(base(model), config(**{**own, **settings}))
    draw(peft_model)
    return peft_model.eval()


def two(first="lin0", second="lin0"):
    """A model with two adapters, the first of them active."""
    model = adapted(target_modules=[first])
    model.add_adapter("other", config(target_modules=[second]))
    draw(model, 1)
    return model.eval()


@torch.no_grad()
def answer(model):
    return model(X)


def trainable(model):
    """What trains, without the names of the modules around it."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name.removeprefix("base_model.").removeprefix("model.") for name in names}


def parts(adapter, *modules):
    """What an adapter trains in the modules."""
    factors = {f"{module}.phi_{factor}.{adapter}" for module in modules for factor in "AB"}
    return factors | {f"phi_bank.{adapter}.{table}" for table in ("alpha", "raw_omega")}


def lora(**settings):
    return LoraConfig(**{"r": 2, "target_modules": ["lin0"], "init_lora_weights": False, **settings})


# ---- attributes and configuration


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
        ({"target_modules": ["not_there"]}, "Target modules .* not found in the base model"),
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
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        config(**{setting: None})


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


# ---- training


@cases
def test_only_params_are_updated(case):
    model = adapted(case).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        own = ".phi_A." in name or ".phi_B." in name or ".phi_bank." in name or "modules_to_save." in name
        assert torch.equal(parameter, before[name]) != own, name
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@cases
def test_parameters_after_loading_model(case, tmp_path):
    """What was trained is what is loaded, name by name, in float64 as everything here."""
    model = adapted(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(CASES[case][0]), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    found = loaded.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


@cases
def test_forward_output_finite(case):
    assert answer(adapted(case)).isfinite().all()
    assert answer(adapted(case, preset="paper", amplitude_init="normal:1")).isfinite().all()


@cases
def test_disable_adapters_after_training_nested_and_merged(case):
    expected = answer(base(CASES[case][0]))
    model = adapted(case)
    enabled = answer(model)
    assert not torch.equal(enabled, expected)
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
        with model.disable_adapter():
            assert torch.equal(answer(model), expected)
        assert torch.equal(answer(model), expected), "the inner context leaves the outer one as it was"
    assert torch.equal(answer(model), enabled)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
    torch.testing.assert_close(answer(model), enabled, rtol=1e-12, atol=1e-12)
    assert torch.equal(answer(model.unload()), expected)


def test_disabled_adapters_do_not_train():
    model = adapted()
    model.disable_adapter_layers()
    assert trainable(model) == set()
    model.enable_adapter_layers()
    assert trainable(model) == parts("default", "lin0")


# ---- merging


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


# ---- several adapters


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


# ---- states and files


@cases
def test_state_dict_round_trip(case):
    model = adapted(case)
    state = get_peft_model_state_dict(model)
    assert not [name for name in state if "default" in name or "base_layer" in name]
    other = get_peft_model(base(CASES[case][0]), config(**CASES[case][1]), adapter_name="renamed").eval()
    result = set_peft_model_state_dict(other, state, adapter_name="renamed")
    assert not result.unexpected_keys
    assert torch.equal(answer(other), answer(model))


@cases
def test_load_model_low_cpu_mem_usage(case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(CASES[case][0]), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    for name in ("default", "other"):
        loaded.set_adapter(name)
        torch.testing.assert_close(answer(loaded), answer(model), rtol=1e-12, atol=1e-12)


def test_empty_adapters_are_filled_by_a_state():
    model = adapted()
    empty = get_peft_model(base(), config(), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in empty.named_parameters() if "phi_" in name} == {"meta"}
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(answer(empty), answer(model))
    assert trainable(empty) == parts("default", "lin0")


def test_from_pretrained_config_construction(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=PeftConfig.from_pretrained(tmp_path))
    assert isinstance(loaded.peft_config["default"], PhiConfig)
    assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loading_on_a_model_of_another_dtype(dtype, autocast, tmp_path):
    """Half-precision adapters are kept in float32, unless that is turned off; φ's tables are never below it."""
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items() if "phi_" in name}
    for name, found in dtypes.items():
        assert found == (dtype if not autocast and "phi_bank" not in name else torch.float32), name
    with torch.no_grad():
        found = loaded(X.to(dtype))
    assert found.dtype == dtype
    loose = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(found.double(), answer(model), rtol=0, atol=loose)


def test_autocast():
    model = adapted().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(X.float())
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(found.float(), model(X.float()), rtol=0, atol=2e-2)


@pytest.mark.parametrize("card", ["", "---\nmeta: hello\n---\nThis is a model card\n"])
def test_existing_model_card(card, tmp_path):
    if card:
        (tmp_path / "README.md").write_text(card)
    adapted().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text
    assert ("meta: hello" in text and "This is a model card" in text) == bool(card)


def test_copies_and_pickles():
    model = adapted()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(other), answer(model))
        with torch.no_grad():
            other.base_model.phi_bank["default"].alpha.add_(1)
        assert not torch.equal(answer(other), answer(model))


def test_peft_model_device_map(tmp_path):
    from transformers import AutoModelForSequenceClassification

    tiny("bert").save_pretrained(tmp_path / "base")
    mapped = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", device_map="cpu")
    model = get_peft_model(mapped, config(target_modules=["query"]))
    draw(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "adapter", device_map="cpu").eval()
    tokens = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def disk_map(model, folder):
    """As a map of devices does it that leaves a part of the model on the disk."""
    parts = {"base_model.model.lin0": "cpu", "base_model.model.lin1": "disk", "base_model.model.head": "disk"}
    dispatch_model(model, {**parts, "base_model.phi_bank": "disk"}, main_device="cpu", offload_dir=folder)


offloads = pytest.mark.parametrize("offload", [lambda m, _: cpu_offload(m, CPU), disk_map], ids=["cpu", "disk"])


@offloads
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_offloaded_model_has_the_same_values_and_gradients(offload, dropout, tmp_path):
    """Its weights are there during the forward pass of their own modules alone, the base layers'."""
    found, expected = (adapted("MLP, two layers", dropout=dropout).train() for _ in range(2))
    offload(found, tmp_path)
    layer = found.base_model.model.lin1
    assert layer.base_layer.weight.is_meta
    results = []
    for model in (found, expected):
        torch.manual_seed(0)
        y = model(X)
        y.square().sum().backward()
        results.append((y, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert layer.base_layer.weight.is_meta


@offloads
def test_an_offloaded_model_merges_and_its_layers_work_alone(offload, tmp_path):
    plain = adapted("MLP, two layers")
    alone, merged = copy.deepcopy(plain), copy.deepcopy(plain)
    offload(alone, tmp_path / "alone")
    with torch.inference_mode():
        found, expected = (model.base_model.model.lin0(X) for model in (alone, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    alone(X).sum().backward()  # nothing of the inference is left
    offload(merged, tmp_path / "merged")
    merged.merge_adapter()
    torch.testing.assert_close(answer(merged), answer(plain), rtol=1e-12, atol=1e-12)
    merged.unmerge_adapter()
    torch.testing.assert_close(answer(merged.merge_and_unload()), answer(plain), rtol=1e-12, atol=1e-12)


def test_an_adapter_without_values_is_refused():
    """As it is made in a model that is offloaded, and where accelerate is told to load the whole layer at once."""
    plain, whole = base(), adapted()
    cpu_offload(plain, CPU)
    cpu_offload(whole, CPU, preload_module_classes=["PhiLinear"])
    for model in (get_peft_model(plain, config()), whole):
        with pytest.raises(InputError, match="adapter 'default' is on the meta device, where it has no values"):
            answer(model)


# ---- status


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


# ---- a second time, and other tuners


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
        (lambda m: m.add_weighted_adapter(["default"], [1.0], "x"), AttributeError, "add_weighted_adapter"),
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
