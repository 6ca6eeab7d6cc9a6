"""Placements over the families of transformers: exact counts of modules, on the meta device, and clear refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from basisadapt import InputError, PhiConfig
from basisadapt.adapter.placement import FAMILIES, PLACEMENTS, ROLES, Placement, describe, find_projections
from basisadapt.adapter.placement import target_pattern as pattern

DEPTH = 6
SMALL = {"num_hidden_layers": DEPTH, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
GPT2 = {"n_layer": DEPTH, "n_head": 4, "n_embd": 32, "pad_token_id": 0}
VIT = {**SMALL, "image_size": 16, "patch_size": 8}
# The model's type, its shapes, its head; projections per block: attention, MLP, q and k and v, gate and up.
MODELS = {
    "bert": (SMALL, "SequenceClassification", (4, 2, 3, None)),
    "roberta": (SMALL, "SequenceClassification", (4, 2, 3, None)),
    "llama": (SMALL, "SequenceClassification", (4, 3, 3, 2)),
    "qwen2": ({**SMALL, "num_key_value_heads": 2}, "CausalLM", (4, 3, 3, 2)),
    "phi3": ({**SMALL, "pad_token_id": 0}, "SequenceClassification", (2, 2, 1, 1)),
    "gpt2": (GPT2, "SequenceClassification", (2, 2, 1, None)),
    "gpt_neox": (SMALL, "SequenceClassification", (2, 2, 1, None)),
    "vit": (VIT, "ImageClassification", (4, 2, 3, None)),
    "clip": ({"vision_config": VIT, "text_config": SMALL}, "ImageClassification", (4, 2, 3, None)),
    "dinov2": (VIT, "ImageClassification", (4, 2, 3, None)),
}
families = pytest.mark.parametrize("family", MODELS)


def names(family):
    import transformers

    shapes, head, _ = MODELS[family]
    config = transformers.AutoConfig.for_model(family, **shapes)
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    return [name for name, _ in model.named_modules()]


@pytest.fixture(scope="module")
def modules():
    return {family: names(family) for family in MODELS}


def matched(placement, names):
    import re

    found = re.compile(pattern(placement, names))
    return [name for name in names if found.fullmatch(name)]


@families
def test_counts(family, modules):
    attention, mlp, qkv, gate_up = MODELS[family][2]
    counts = {
        "all": DEPTH * (attention + mlp),
        "attention": DEPTH * attention,
        "mlp": DEPTH * mlp,
        "qkv": DEPTH * qkv,
        "odd": DEPTH // 2 * (attention + mlp),
        "even": DEPTH // 2 * (attention + mlp),
        "first_last:1": 2 * (attention + mlp),
        "first_last:3": DEPTH * (attention + mlp),
        r".*\.[0-1]\..*": 2 * (attention + mlp),
    }
    if gate_up is not None:
        counts["gate_up"] = DEPTH * gate_up
    assert {placement: len(matched(placement, modules[family])) for placement in counts} == counts
    assert {name.partition(":")[0] for name in (*counts, "gate_up")} >= set(PLACEMENTS)


@families
def test_partitions(family, modules):
    names = modules[family]
    everything = sorted(matched("all", names))
    assert sorted(matched("attention", names) + matched("mlp", names)) == everything
    assert sorted(matched("odd", names) + matched("even", names)) == everything
    assert {describe(name).layer for name in matched("odd", names)} == {1, 3, 5}
    assert {describe(name).layer for name in matched("first_last:2", names)} == {0, 1, 4, 5}
    assert {describe(name).kind for name in matched("qkv", names)} == {"attention"}
    outside = [name for name in names if name.rpartition(".")[2] in ("classifier", "score", "lm_head", "pooler")]
    outside += [name for name in names if name.startswith(("classifier", "score", "lm_head")) or "pooler" in name]
    assert outside
    assert not set(outside) & set(everything)
    assert {describe(name).kind for name in outside} == {"other"}


@families
def test_a_gate_that_is_not_there(family, modules):
    if MODELS[family][2][3] is None:
        with pytest.raises(InputError, match="'gate_up' needs gate, which this model has not; it has q, k, v, o, up"):
            pattern("gate_up", modules[family])
    else:
        assert {describe(name).kind for name in matched("gate_up", modules[family])} == {"mlp"}


def test_towers_are_counted_apart():
    towers = [f"{tower}.layers.{i}.mlp.fc1" for tower, depth in (("text", 4), ("vision", 8)) for i in range(depth)]
    assert [p.layers for p in find_projections(towers)] == [4] * 4 + [8] * 8
    assert matched("first_last:1", towers) == [towers[i] for i in (0, 3, 4, 11)]
    assert matched(r"text\..*", towers) == towers[:4]


def test_earlier_names_of_vision_transformers():
    block = ["attention.attention.query", "attention.output.dense", "mlp.weights_in", "mlp.weights_out"]
    names = [f"dinov2.encoder.layer.{i}.{path}" for i in range(2) for path in block]
    assert [describe(name).kind for name in names[:4]] == ["attention", "attention", "mlp", "mlp"]
    assert matched("gate_up", names) == [names[2], names[6]]


def test_the_table_does_not_contradict_itself():
    roles: dict[str, set[str]] = {}
    for family in FAMILIES.values():
        for role, path in family.items():
            roles.setdefault(path, set()).add(role)
            assert set(role.split()) <= set(ROLES)
    assert all(len(found) == 1 for found in roles.values())


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("atention", "unknown placement 'atention'; did you mean 'attention'"),
        ("first_last", 'must be "first_last:K"'),
        ("first_last:0", 'must be "first_last:K"'),
        ("first_last:4", "needs 8 blocks, not 6"),
        ("odd:2", "'odd' takes no argument"),
        ("(attention", "neither a name nor a regular expression"),
    ],
)
def test_bad_placements(placement, message, modules):
    with pytest.raises(InputError, match=message) as caught:
        pattern(placement, modules["bert"])
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_needs_target_modules():
    with pytest.raises(InputError, match="give target_modules"):
        pattern("all", ["net.0", "net.2"])


def test_a_placement_of_ones_own(bert):
    from peft import get_peft_model

    class Last(Placement, name="last_only"):
        def covers(self, projection):
            return projection.layer == projection.layers - 1

    try:
        model = get_peft_model(bert, PhiConfig(r=2, placement="last_only"))
    finally:
        PLACEMENTS._classes.pop("last_only")
    assert {describe(name).layer for name in model.base_model.targeted_module_names} == {1}
    assert len(model.base_model.targeted_module_names) == 6


def test_explicit_modules_win(bert):
    from peft import get_peft_model

    model = get_peft_model(bert, PhiConfig(r=2, placement="mlp", target_modules=["query"]))
    assert len(model.base_model.targeted_module_names) == 2


def test_one_configuration_serves_one_model_and_its_file_says_where(bert, tmp_path):
    import json

    from peft import get_peft_model

    config = PhiConfig(r=2, placement="first_last:1")
    assert config.target_modules is None
    get_peft_model(bert, dataclasses.replace(config)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["placement"] == "first_last:1"
    assert saved["target_modules"].startswith(r"bert\.encoder\.layer\.(?:0|1)\.(?:attention")
