"""States and files on plain modules: round trips, dtypes, empty adapters, devices and offloading."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict

from basisadapt import InputError, PhiConfig
from tests.adapter.toys import CASES, CPU, X, adapted, answer, base, cases, config, draw, parts, trainable
from tests.conftest import tiny


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
