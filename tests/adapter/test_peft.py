"""φ(BA) as a peft method: start, training, merging, several adapters, saving, over every basis, grid and policy."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.sharing import SHARING
from tests.conftest import randomise, tiny

# One setting at a time over the registries, so that a new plug-in is covered without a line here.
VARIANTS = [
    *({"basis": name} for name in sorted(BASES)),
    *({"grid": name} for name in sorted(GRIDS)),
    *({"sharing": name} for name in sorted(SHARING)),
    {"preset": "paper"},
    {"backend": "direct"},
    {"learn_omega": False},
    {"factor_init": "both"},
    {"amplitude_init": "identity", "identity_path": False},
    {"omega_init": "nyquist"},
    {"omega_init": "depth:0.5:2"},
    {"gain": "learned:2"},
    {"gain": "normalised:0.5"},
    {"placement": "odd", "rest": "lora"},
    {"dropout": 0.1, "lora_alpha": 8.0},
]


def label(variant):
    return " ".join(f"{key}={value}" for key, value in variant.items())


variants = pytest.mark.parametrize("variant", VARIANTS, ids=label)
families = pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])


def adapted(base, seed=0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(
        base, PhiConfig(**{"task_type": "SEQ_CLS", "r": 3, "num_basis": 10, "gain": 2.0, **settings})
    )
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def test_the_enum_has_exactly_one_new_member():
    assert PeftType("BASISADAPT_PHI") is PeftType["BASISADAPT_PHI"] is PeftType.BASISADAPT_PHI
    assert list(PeftType).count("BASISADAPT_PHI") == 1
    assert isinstance(PeftType.BASISADAPT_PHI, PeftType)
    assert copy.deepcopy(PeftType.BASISADAPT_PHI) is PeftType.BASISADAPT_PHI
    assert json.dumps({"peft_type": PeftType.BASISADAPT_PHI}) == '{"peft_type": "BASISADAPT_PHI"}'


@variants
def test_save_and_load(variant, bert, tokens, tmp_path):
    model = adapted(copy.deepcopy(bert), **variant)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path).eval()
    assert torch.equal(logits(model, tokens), logits(loaded, tokens))
    # Tensors mapped straight from the file lie at other addresses, which may change the last bit of a sum.
    mapped = PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path, low_cpu_mem_usage=True, torch_device="cpu").eval()
    torch.testing.assert_close(logits(model, tokens), logits(mapped, tokens), rtol=0, atol=1e-6)


@variants
def test_merge_and_unmerge(variant, bert, tokens):
    base = {name: value.clone() for name, value in bert.state_dict().items()}
    model = adapted(bert, **variant)
    expected = logits(model, tokens)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
    for name, value in model.base_model.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in base and "modules_to_save" not in name:
            assert torch.equal(value, base[plain]), name


@families
def test_merge_and_unload_is_a_plain_model(family, tokens, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = adapted(tiny(family))
    expected = logits(model, tokens)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if type(m).__module__.startswith(("basisadapt", "peft"))]
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-6)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(merged, tokens))
    assert (expected - logits(tiny(family), tokens)).abs().max() > 1e-3


@families
def test_unload_gives_the_base_back(family, tokens):
    base = tiny(family)
    expected = logits(base, tokens)
    model = adapted(base)
    assert torch.equal(logits(model.unload(), tokens), expected)


def test_a_new_process_needs_only_import_basisadapt(bert, tokens, tmp_path):
    """And that it needs; here peft is imported first, `test_loading` has the other orders."""
    model = adapted(copy.deepcopy(bert), basis="gaussian_rbf", grid="random", sharing="kind")
    bert.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens")
    program = f"""
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
from torch.optim import optimizer
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
try:
    PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
except KeyError as error:
    assert error.args == ("BASISADAPT_PHI",)
else:
    raise AssertionError("known without us")
import basisadapt
assert {{"BASISADAPT_PHI", "BASISADAPT_DYLORA"}} <= {{kind.value for kind in known}}
assert not optimizer._global_optimizer_pre_hooks, "others' steps are looked at before there is an adapter"
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    print(model(input_ids=torch.load({str(tmp_path / "tokens")!r})).logits.double().tolist())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == logits(model, tokens).double().tolist()


def test_residual_starts_exactly_as_lora(bert, tokens):
    labels = torch.tensor([0, 1, 2, 0])

    def first_step(config):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(bert).double(), config)
        output = model(input_ids=tokens, labels=labels)
        output.loss.backward()
        return model, output.logits.detach()

    names = r".*layer\.\d+\..*(query|key|value|dense)"
    phi, phi_logits = first_step(PhiConfig(preset="residual", r=3, target_modules=names))
    lora, lora_logits = first_step(LoraConfig(r=3, lora_alpha=3, target_modules=names))
    torch.testing.assert_close(phi_logits, lora_logits, rtol=1e-13, atol=1e-15)  # all but the rounding of F(0) = 0
    gradients = {
        n.replace("lora_", "phi_").replace(".weight", ""): p.grad for n, p in lora.named_parameters() if p.requires_grad
    }
    for name, parameter in phi.named_parameters():
        if "phi_A" in name or "phi_B" in name:
            torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-10, atol=1e-14)
    assert not gradients


@variants
def test_gradients_reach_every_trainable_parameter(variant, bert, tokens):
    model = adapted(bert, **variant).train()
    model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            unused = variant.get("basis") == "polynomial" and name.endswith("grid")
            assert unused or parameter.grad.abs().max() > 0, name


def test_several_adapters(bert, tokens):
    model = adapted(bert, seed=1, task_type=None)
    first = logits(model, tokens)
    model.add_adapter("second", PhiConfig(r=2, num_basis=5, basis="fourier", sharing="all"))
    assert torch.equal(logits(model, tokens), first), "adding an adapter changes nothing"
    assert not [n for n, p in model.named_parameters() if ".second" in n and p.requires_grad and "phi_" in n]
    randomise(model, 2)
    first = logits(model, tokens)
    model.set_adapter("second")
    second = logits(model, tokens)
    assert not torch.equal(first, second)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "phi_" in n}
    assert trainable
    assert all(".second" in name for name in trainable)

    model.base_model.set_adapter(["default", "second"])
    combined = logits(model, tokens)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), combined, rtol=0, atol=2e-6)
    model.unmerge_adapter()

    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), first)
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if ".second" in name]
    assert torch.equal(logits(model, tokens), first)


def test_disable_adapter(bert, tokens):
    expected = logits(bert, tokens)
    model = adapted(bert)
    enabled = logits(model, tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(logits(model, tokens), enabled)


def test_dropout_acts_while_training_only(bert, tokens):
    model = adapted(bert, dropout=0.5)
    assert torch.equal(logits(model, tokens), logits(model, tokens))
    for module in model.modules():
        if isinstance(module, PhiLinear):
            module.train()
    assert not torch.equal(logits(model, tokens), logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, bert, tokens):
    model = adapted(bert.to(dtype))
    output = logits(model, tokens)
    assert output.dtype == dtype
    assert output.isfinite().all()
    model.merge_adapter()
    loose = {torch.float64: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(logits(model, tokens), output, rtol=0, atol=loose)


def test_gradient_checkpointing_gives_the_same_gradients(bert, tokens):
    def gradients(checkpointing):
        model = adapted(copy.deepcopy(bert)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 33}, "r must be at most 32"),
        ({"r": 0}, "r must be at least 1"),
        ({"basis": "sink"}, "did you mean 'sinc'"),
        ({"grid": "unifrom"}, "did you mean 'uniform'"),
        ({"sharing": "omga"}, "did you mean 'omega'"),
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"placement": "attn"}, "placement"),
        ({"num_basis": 0}, "num_basis must be at least 1"),
        ({"interval": 0.0}, "interval must be above 0"),
        ({"omega_init": 0.0}, "omega_init must be above 0"),
        ({"omega_init": "nyquist", "num_basis": 1}, "omega_init must be above 0"),
        ({"omega_init": "nyqist"}, "omega_init must be"),
        ({"omega_init": "depth:0.5"}, "omega_init must be"),
        ({"omega_init": "depth:0:2"}, "omega_init must be"),
        ({"omega_init": "0.5:2"}, "omega_init must be"),
        ({"gain": float("nan")}, "gain"),
        ({"gain": "learned"}, 'gain must be above 0, from 1e-6 to 1e6, or "learned:G" or "normalised:G"'),
        ({"gain": "learnt:2"}, "got 'learnt:2'"),
        ({"gain": "normalised:0"}, "gain"),
        ({"transfer_delay": 1.5}, "transfer_delay must be from 0 to 1, got 1.5"),
        ({"smoothing": -1.0}, "smoothing must be at least 0"),
        ({"amplitude_init": "normal:x"}, "amplitude_init"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_settings_are_refused(settings, message, bert):
    with pytest.raises(InputError, match=message):
        get_peft_model(bert, PhiConfig(**settings))


def test_other_layers_are_refused(bert):
    with pytest.raises(InputError, match="Embedding"):
        get_peft_model(bert, PhiConfig(target_modules=["word_embeddings"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "8"}, "r must be a whole number, got '8'"),
        ({"r": 10**12}, "r must be at least 1 and at most 16384"),
        ({"num_basis": 10**9}, "num_basis must be at least 1 and at most 4096"),
        ({"gain": [1]}, "gain must be a number or text or null"),
        ({"target_modules": 5}, "target_modules must be a list of text or text or null"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression"),
        ({"modules_to_save": 5}, "modules_to_save must be a list of text or null"),
    ],
)
def test_a_saved_configuration_of_wrong_types_is_refused(settings, message, bert, tmp_path):
    adapted(copy.deepcopy(bert)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(InputError, match=message) as caught:
        PeftModel.from_pretrained(bert, tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BASISADAPT_PHY", "unknown peft_type 'BASISADAPT_PHY'; did you mean 'BASISADAPT_PHI'?"),
        ("LORA", "unknown peft_type 'LORA' (known: BASISADAPT_ABBA, "),
        (None, "unknown peft_type 'None' (known: BASISADAPT_ABBA, "),
        ([], "unknown peft_type '[]' (known: BASISADAPT_ABBA, "),
    ],
)
def test_a_saved_configuration_of_another_type_is_refused(name, message, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": name}))
    with pytest.raises(InputError) as caught:
        PhiConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def change(tensors, name, tensor):
    return {key: tensor if key.endswith(name) else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: change(t, "0.attention.self.query.phi_A", torch.zeros(4, 32)), "phi_A must be 3 × any"),
        (lambda t: change(t, "0.attention.self.query.phi_B", torch.zeros(32)), "phi_B must be any × 3"),
        (lambda t: change(t, "phi_bank.alpha", torch.zeros(12, 9)), r"alpha must be any × 10.*has the shape \(12, 9\)"),
        (
            lambda t: change(t, "phi_A", torch.zeros(3, 32, dtype=torch.int64)),
            "must be of F64, F32, F16, BF16, not I64",
        ),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("0.output.dense.phi_B")}, "phi_B is missing or alone"),
        (lambda t: {k: v for k, v in t.items() if "phi_bank" not in k}, "it has no phi_bank.alpha"),
        (
            lambda t: {
                **t,
                "base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight": torch.zeros(32, 48),
            },
            "base_layer.weight' is no weight of the adapter and would overwrite one of the model",
        ),
        (
            lambda t: {**t, "base_model.model.bert.embeddings.word_embeddings.weight": torch.zeros(60, 32)},
            "word_embeddings.weight' is no weight of the adapter",
        ),
    ],
)
def test_saved_weights_of_wrong_shapes_are_refused(damage, message, bert, tmp_path):
    from safetensors.torch import load_file, save_file

    adapted(copy.deepcopy(bert)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in damage(load_file(path)).items()}, path)
    with pytest.raises(InputError, match=message) as caught:
        PeftModel.from_pretrained(bert, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_cut_off_and_pickles_are_refused(bert, tmp_path):
    adapted(copy.deepcopy(bert)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"adapter_model.safetensors is not a safetensors file that can be read"):
        PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle, which is not read"):
        PeftModel.from_pretrained(bert, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_beyond_the_range_of_the_weights_is_refused(dtype, safe_merge, bert):
    """Half of float16's numbers end at 65,504, where F, in float32, does not; bfloat16 goes as far as float32."""
    model = adapted(bert.to(dtype))
    layer = next(m for m in model.modules() if isinstance(m, PhiLinear))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.phi_B["default"].fill_(3000.0)
        layer.phi_A["default"].fill_(30.0)
    assert layer.get_delta_weight("default").isfinite().all()
    if dtype == torch.bfloat16:
        layer.merge(safe_merge)
        assert layer.base_layer.weight.isfinite().all()
        return
    y = layer(torch.ones(1, 32, dtype=dtype))
    assert not y.isfinite().any(), "no clipping: what has overflowed is seen"
    with pytest.raises(ValueError, match=r"gives weights beyond 65504, the largest number in torch\.float16"):
        layer.merge(safe_merge)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_safe_merge_refuses_before_anything_changes(bert):
    model = adapted(bert)
    layer = next(m for m in model.modules() if isinstance(m, PhiLinear))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.phi_A["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
