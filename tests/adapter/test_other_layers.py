"""Layers that do more than x Wᵀ + b, and modules that read a weight instead of calling its layer: right, or refused.

Truth is y = base(x) + x ΔWᵀ with base as it was before the adapter came, and ΔW written out in float64.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from basisadapt import InputError, PhiConfig
from basisadapt.methods.abba import ABBAConfig
from basisadapt.methods.nola import NoLAConfig
from tests.conftest import randomise

SETTINGS = {"r": 2, "num_basis": 5, "gain": 2.0, "factor_init": "both", "amplitude_init": "normal:0.1"}
ADAPTERS = {"default": "gaussian_rbf", "second": "sinc"}


class Thrice(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class ThriceConv1D(Conv1D):
    def forward(self, x):
        return 3 * super().forward(x)


class Normed(nn.Linear):
    """As transformers' AutoBitLinear: it has a module of its own, and rounds what it multiplies."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.LayerNorm(self.in_features)

    def forward(self, x):
        return nn.functional.linear(self.norm(x), self.weight.sign(), self.bias)


def hooked(register):
    def make(layer):
        register(layer)
        return layer

    return make


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


BASES = {
    "a forward of its own": lambda: Thrice(6, 5),
    "a Conv1D with a forward of its own": lambda: ThriceConv1D(5, 6),
    "a module of its own": lambda: Normed(6, 5),
    "forward hook": lambda: hooked(lambda m: m.register_forward_hook(lambda m, x, y: y.sin()))(nn.Linear(6, 5)),
    "hook on a Conv1D": lambda: hooked(lambda m: m.register_forward_hook(lambda m, x, y: y.sin()))(Conv1D(5, 6)),
    "pre-hook": lambda: hooked(lambda m: m.register_forward_pre_hook(lambda m, x: (x[0].sin(),)))(nn.Linear(6, 5)),
    "backward hook": lambda: hooked(lambda m: m.register_full_backward_hook(lambda m, i, o: (2 * i[0],)))(
        nn.Linear(6, 5)
    ),
    "a hook of accelerate": lambda: add_hook_to_module(nn.Linear(6, 5), Doubled()),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
    "weight_norm of old": lambda: weight_norm(nn.Linear(6, 5)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 5)),
    "spectral_norm of old": lambda: spectral_norm(nn.Linear(6, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 5)),
    "pruned": lambda: hooked(lambda m: prune.l1_unstructured(m, "weight", 0.5))(nn.Linear(6, 5)),
}
bases = pytest.mark.parametrize("base", BASES)
plain_too = pytest.mark.parametrize("base", [*BASES, "plain", "plain Conv1D"])


def model_of(make):
    """`make()`, an activation and a head, in float64, which not all of what makes weights anew converts."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return nn.Sequential(OrderedDict(lin=make(), act=nn.Tanh(), head=nn.Linear(5, 3))).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def model_with(base):
    return model_of({**BASES, "plain": lambda: nn.Linear(6, 5), "plain Conv1D": lambda: Conv1D(5, 6)}[base])


def adapted(model, target="lin", adapters=ADAPTERS):
    for name, basis in adapters.items():
        config = PhiConfig(**SETTINGS, basis=basis, target_modules=[target])
        model = get_peft_model(model, config) if name == "default" else model
        if name != "default":
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    randomise(model)
    return model.eval()


def tensors(model, adapter, name="lin"):
    """A, B, α, ω before softplus, and the grid, of a layer called `name`."""
    layer = model.base_model.model.get_submodule(name)
    bank = model.base_model.phi_bank[adapter]
    row = bank.rows[name][0]
    return layer.phi_A[adapter], layer.phi_B[adapter], bank.alpha[row], bank.raw_omega[row], bank.grid[row]


def formula(A, B, alpha, raw, grid, basis):
    """BA + (φ(g BA) − φ(0)) / g with g = 2."""

    def phi(x):
        u = nn.functional.softplus(raw) * (x.unsqueeze(-1) - grid)
        return (alpha * (torch.exp(-(u**2)) if basis == "gaussian_rbf" else torch.sinc(u))).sum(-1)

    z = B @ A
    return z + (phi(2 * z) - phi(torch.zeros_like(z))) / 2


def both(model, adapters=ADAPTERS, name="lin"):
    return sum(formula(*tensors(model, adapter, name), basis) for adapter, basis in adapters.items())


def run(model, call, x):
    """Output and gradients of the input and of all that is trained."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def inputs():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_right(model, plain):
    """`model` against `plain`, the same without an adapter, and the formula beside it."""
    x = inputs()
    with torch.enable_grad():
        found = run(model, model.base_model.model, x)
        expected = run(model, lambda x: plain.head(plain.act(plain.lin(x) + x @ both(model).T)), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    assert max(gradient.abs().max() for gradient in found[2:]) > 1e-3


@plain_too
def test_values_and_gradients(base):
    assert_right(adapted(model_with(base)), model_with(base))


@bases
def test_one_adapter_and_a_module_of_its_own_layer(base):
    model = adapted(model_with(base), adapters={"default": "gaussian_rbf"})
    found, x = model(inputs()), inputs()
    plain = model_with(base)
    expected = plain.head(plain.act(plain.lin(x) + x @ both(model, {"default": "gaussian_rbf"}).T))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))


LATE = {
    "hook": lambda layer: layer.register_forward_hook(lambda m, x, y: y.sin()),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda m, x: (x[0].sin(),)),
    "accelerate": lambda layer: add_hook_to_module(layer, Doubled()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("late", LATE)
def test_what_comes_after_the_adapter(late):
    model, plain = adapted(model_with("plain")), model_with("plain")
    model(inputs())
    LATE[late](model.base_model.model.lin.base_layer)
    LATE[late](plain.lin)
    assert_right(model, plain)


def test_hooks_see_the_base_layers_calls_and_may_go_again():
    model, seen = adapted(model_with("plain")), []
    layer = model.base_model.model.lin.base_layer
    handle = layer.register_forward_hook(lambda m, x, y: seen.append(y))
    model(inputs())
    assert torch.equal(seen[0], layer(inputs()))
    handle.remove()
    model.merge_adapter()
    assert torch.equal(model.base_model.model.lin.weight, layer.weight)


@bases
@pytest.mark.parametrize("unload", [False, True])
def test_merging_is_refused_before_anything_changes(base, unload):
    model = adapted(model_with(base))
    expected = model(inputs())
    if base == "backward hook":
        torch.testing.assert_close(model.merge_and_unload()(inputs()), expected, rtol=2e-6, atol=2e-6)
        return
    reason = "(forward hooks, which would see|a weight that is made anew for every call|a forward of its own)"
    with pytest.raises(InputError, match=rf"^'lin', a \w+, cannot be merged into: it has {reason}"):
        model.merge_and_unload() if unload else model.merge_adapter()
    assert model.base_model.model.lin.merged_adapters == []
    assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("base", ["plain", "plain Conv1D"])
def test_plain_layers_merge(base):
    model, plain = adapted(model_with(base)), model_with(base)
    expected = model(inputs())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(inputs()), expected, rtol=2e-6, atol=2e-6)
    change = merged.lin.weight - plain.lin.weight
    assert (change.T if base == "plain Conv1D" else change).shape == (5, 6)


@pytest.mark.parametrize("config", [ABBAConfig, NoLAConfig])
@bases
def test_other_methods(config, base):
    model = get_peft_model(model_with(base), config(r=2, target_modules=["lin"])).eval()
    x, plain, layer = inputs(), model_with(base), model.base_model.model.lin
    with torch.no_grad():
        for name in layer.adapter_layer_names:
            layer.get_submodule(name)["default"].add_(0.3)
    change = layer.get_delta_weight("default")
    change = change.T if isinstance(layer.base_layer, Conv1D) else change
    expected = plain.head(plain.act(plain.lin(x) + x @ change.T))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    if base != "backward hook":
        with pytest.raises(InputError, match="cannot be merged into"):
            model.merge_adapter()


# --- layers of transformers ---


def linear_classes():
    from transformers.integrations.bitnet import AutoBitLinear
    from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear

    return {
        "AutoBitLinear": lambda: AutoBitLinear(6, 5, online_quant=True),
        "AutoBitLinear with a norm": lambda: AutoBitLinear(6, 5, online_quant=True, use_rms_norm=True),
        "IdeficsDecoupledLinear": lambda: IdeficsDecoupledLinear(6, 5),
    }


@pytest.mark.parametrize("kind", ["AutoBitLinear", "AutoBitLinear with a norm", "IdeficsDecoupledLinear"])
def test_linear_layers_of_transformers_with_a_forward_of_their_own(kind):
    make = linear_classes()[kind]
    model, plain, x = adapted(model_of(make)), model_of(make), inputs()
    expected = plain.head(plain.act(plain.lin(x) + x @ both(model).T))
    torch.testing.assert_close(model(x), expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(InputError, match="cannot be merged into: it has a forward of its own"):
        model.merge_adapter()


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Longer(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x), x], -1)


@pytest.mark.parametrize(("kind", "found"), [(Pair, "a tuple"), (Longer, r"\(4, 11\)")])
@pytest.mark.parametrize("config", [PhiConfig, NoLAConfig])
def test_what_no_update_can_be_added_to(kind, found, config):
    """Such as the routers of Llama 4 and Phi-MoE, which give scores and logits, and Idefics' heads for more words."""
    model = get_peft_model(model_of(lambda: kind(6, 5)), config(r=2, target_modules=["lin"]))
    with pytest.raises(InputError, match=rf"^'lin', a {kind.__name__}, gives {found} for an input .*exclude_modules$"):
        model(inputs())


def fp8():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    return FP8Linear(6, 5, block_size=(128, 128))


class Packed(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.weight = nn.Parameter(torch.zeros(5 * 3))


REFUSED = {
    "FP8Linear": (fp8, "has a weight of dtype torch.float8_e4m3fn"),
    "packed": (lambda: Packed(6, 5), r"is a Packed with a weight of shape \(15,\); .* adapts matrices, 5 × 6 there"),
    "lazy": (lambda: nn.LazyLinear(5), "has no weight yet: call the model once before"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("config", [PhiConfig, NoLAConfig])
def test_weights_that_are_no_matrix_of_numbers_are_refused_by_name(kind, config):
    make, message = REFUSED[kind]
    with pytest.raises(InputError, match=f"module 'lin' {message}"):
        get_peft_model(model_of(make), config(r=2, target_modules=["lin"]))


# --- modules that read a weight ---


def encoder(layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, layers)}).double().eval()


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_in_evaluation(masked):
    """Its fast path reads linear1.weight and linear2.weight; it gives way to the layers' own calls."""
    plain, x = encoder(), torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 2 + [True] * 2]) if masked else None
    seen = slice(None) if mask is None else ~mask
    model = get_peft_model(encoder(), PhiConfig(**SETTINGS, basis="sinc", target_modules=["linear1", "linear2"])).eval()
    randomise(model)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name.endswith(("linear1", "linear2")):
                module.weight += formula(*tensors(model, "default", name), "sinc")
        expected = plain["encoder"](x, src_key_padding_mask=mask)[seen]
        found = model.base_model.model["encoder"](x, src_key_padding_mask=mask)[seen]
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
        with model.disable_adapter():
            base = model.base_model.model["encoder"](x, src_key_padding_mask=mask)[seen]
        torch.testing.assert_close(base, encoder()["encoder"](x, src_key_padding_mask=mask)[seen])
        assert not torch.allclose(base, expected, atol=1e-2)
        merged = model.merge_and_unload()["encoder"](x, src_key_padding_mask=mask)[seen]
    torch.testing.assert_close(merged, expected, rtol=2e-6, atol=2e-6)


READERS = {
    "mamba": ("dt_proj", {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 20}),
    "wavlm": (
        "q_proj",
        {
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
            **{"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        },
    ),
}


@pytest.mark.parametrize("model_type", READERS)
def test_a_model_that_multiplies_by_a_layers_weight_itself(model_type):
    target, shapes = READERS[model_type]
    base = AutoModel.from_config(AutoConfig.for_model(model_type, **shapes)).eval()
    model = get_peft_model(base, PhiConfig(**{**SETTINGS, "r": 1}, target_modules=[target]))
    x = torch.randn(1, 64) if model_type == "wavlm" else torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match=r"the weight of an adapted layer was multiplied by.*exclude_modules$"):
        model(x)
    with model.disable_adapter():
        model(x)


def test_a_model_that_asks_a_weight_for_its_dtype():
    shapes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 30}
    config = AutoConfig.for_model("t5", **shapes, decoder_start_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(config).double().eval()
    model = get_peft_model(copy.deepcopy(base), PhiConfig(**SETTINGS)).eval()
    assert len(model.base_model.targeted_module_names) == 4 * 2 + 8 * 2 + 2 * 4
    randomise(model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids).logits
        merged = model.merge_and_unload()(input_ids=ids, labels=ids).logits
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, base(input_ids=ids, labels=ids).logits, atol=1e-2)


def test_the_weight_of_an_adapted_layer_is_there_to_look_at():
    layer = adapted(model_with("plain")).base_model.model.lin
    weight, base = layer.weight, layer.base_layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (base.dtype, base.device, base.shape)
    assert torch.equal(weight, base)
    assert weight.norm() == base.norm()
    with pytest.raises(InputError, match="multiplied by"):
        weight.T.chunk(2)[0] @ torch.ones(5, dtype=torch.float64)
    layer.enable_adapters(False)
    assert layer.weight is base
