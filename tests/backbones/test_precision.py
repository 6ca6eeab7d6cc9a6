"""Weights in half precision, and quantized ones."""

from __future__ import annotations

import pytest
import torch
import transformers

from basisadapt import InputError, backbones
from basisadapt.backbones import QUANTISED
from basisadapt.methods import METHODS
from basisadapt.training import attach, plan, run
from tests.backbones.common import config, edit


def test_weights_in_half_precision_carry_an_adapter_and_a_head_in_full(language_model):
    chosen = config(language_model, train={"weights": "bf16"})
    assert plan(chosen) == plan(config(language_model))
    for method in ("phi", "lora", "head"):
        model, _ = backbones.load(backbones.find(str(language_model)), "text", 3, "bf16")
        adapted = attach(model, METHODS[method](), config(language_model, method=method), "text")
        trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
        assert (trained, model.model.layers[0].mlp.up_proj.weight.dtype) == ({torch.float32}, torch.bfloat16)
    half, full = run(chosen), run(config(language_model))
    assert half.metrics["eval_loss"] != full.metrics["eval_loss"]
    assert half.metrics["eval_loss"] == pytest.approx(full.metrics["eval_loss"], rel=0.02)
    assert run(config(language_model, method="full", train={"weights": "bf16"})).status == "finished"


@pytest.mark.parametrize("weights", QUANTISED)
def test_quantised_weights_are_refused_where_they_cannot_be(monkeypatch, language_model, weights):
    with pytest.raises(InputError, match="method 'full' cannot work on quantized weights"):
        config(language_model, method="full", train={"weights": weights})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"train.weights {weights} needs bitsandbytes: pip install bitsandbytes"):
        plan(config(language_model, train={"weights": weights}))


def test_unknown_precisions_are_refused(language_model):
    with pytest.raises(InputError, match=r"train\.weights must be one of fp32, bf16, int8, nf4, got 'fp4'"):
        config(language_model, train={"weights": "fp4"})


@pytest.fixture
def wide(folder):
    """A language model with room for bitsandbytes' blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
    edit(folder / "config.json", **sizes, num_key_value_heads=2)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].quantisable])
def test_a_method_trains_on_quantised_weights(wide, method, weights):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    chosen = config(wide, method=method, train={"weights": weights})
    model, _ = backbones.load(backbones.find(str(wide)), "text", 3, weights)
    assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    adapted = attach(model, METHODS[method](), chosen, "text")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    result, exact = run(chosen), run(config(wide, method=method))
    assert result.metrics["parameters.trainable"] == plan(chosen).trainable
    assert result.metrics["eval_loss"] == pytest.approx(exact.metrics["eval_loss"], rel=0.05)
