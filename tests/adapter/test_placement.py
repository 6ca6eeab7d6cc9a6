"""Placements over the families of transformers: exact counts of modules, on the meta device, and clear refusals."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from basisadapt import InputError, PhiConfig
from basisadapt.adapter.placement import FAMILIES, PLACEMENTS, ROLES, ROLES_OF, Placement, describe, find_projections
from basisadapt.adapter.placement import target_pattern as pattern
from tests.conftest import model_of

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


def shaped(family, shapes, head):
    import transformers

    config = transformers.AutoConfig.for_model(family, **shapes)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{head}").from_config(config)


@pytest.fixture(scope="module")
def modules():
    return {family: shaped(family, *MODELS[family][:2]) for family in MODELS}


def names_of(model):
    return [name for name, _ in model.named_modules()]


def matched(placement, model):
    found = re.compile(pattern(placement, model))
    return [name for name in names_of(model) if found.fullmatch(name)]


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
    model = modules[family]
    names = names_of(model)
    everything = sorted(matched("all", model))
    assert sorted(matched("attention", model) + matched("mlp", model)) == everything
    assert sorted(matched("odd", model) + matched("even", model)) == everything
    assert {describe(name).layer for name in matched("odd", model)} == {1, 3, 5}
    assert {describe(name).layer for name in matched("first_last:2", model)} == {0, 1, 4, 5}
    assert {describe(name).kind for name in matched("qkv", model)} == {"attention"}
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
    assert matched("first_last:1", model_of(towers)) == [towers[i] for i in (0, 3, 4, 11)]
    assert matched(r"text\..*", model_of(towers)) == towers[:4]


def test_earlier_names_of_vision_transformers():
    block = ["attention.attention.query", "attention.output.dense", "mlp.weights_in", "mlp.weights_out"]
    names = [f"dinov2.encoder.layer.{i}.{path}" for i in range(2) for path in block]
    assert [describe(name).kind for name in names[:4]] == ["attention", "attention", "mlp", "mlp"]
    assert matched("gate_up", model_of(names, nn.Identity)) == [names[2], names[6]]


def test_the_table_does_not_contradict_itself():
    for modules, linear in FAMILIES.values():
        for roles, names in linear.items():
            assert set(roles.split()) <= set(ROLES)
            paths = {f"{module}.{name}".removeprefix(".") for module in modules for name in names.split()}
            assert {ROLES_OF[path] for path in paths} == {frozenset(roles.split())}


# What an earlier release adapted in the backbones that are recorded, written out: per block, in the modules' order.
BERT = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense"
)
LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
DINO = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2"
CLIP = "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj mlp.fc1 mlp.fc2"
RECORDED = {
    "minilm": ("text", "bert.encoder.layer", 6, BERT),
    "roberta-base": ("text", "roberta.encoder.layer", 12, BERT),
    "smollm2-135m": ("completion", "model.layers", 30, LLAMA),
    "qwen2-0.5b": ("completion", "model.layers", 24, LLAMA),
    "dinov2-base": ("image", "dinov2.encoder.layer", 12, DINO),
    "clip-vit-b32": ("image", "vision_model.encoder.layers", 12, CLIP),
}


@pytest.mark.parametrize("backbone", RECORDED)
def test_recorded_backbones_keep_their_modules_in_their_order(backbone):
    from basisadapt import backbones

    form, stack, depth, paths = RECORDED[backbone]
    model = backbones.shape_only(backbones.find(backbone), form, 3)
    expected = [f"{stack}.{layer}.{path}" for layer in range(depth) for path in paths.split()]
    assert matched("all", model) == expected
    assert matched("attention", model) == [name for name in expected if "att" in name]
    assert matched("odd", model) == [name for name in expected if int(name[len(stack) + 1 :].split(".")[0]) % 2]
    assert matched("qkv", model) == [name for name in expected if re.search(r"[qkv]_proj|query|key|value", name)]


LLAMA_BLOCKS = [f"layers.{layer}.{path}" for layer in range(2) for path in LLAMA.split()]


@pytest.mark.parametrize(
    ("placement", "names", "message"),
    [
        (
            "all",
            ["net.0", "net.2"],
            r"'all' knows no block of a Module; target_modules=\"all-linear\" adapts all linear",
        ),
        (
            "all",
            ["layers.0.self_attn.gate_proj"],
            r"roles of layers\.\*\.self_attn\.gate_proj in the blocks; target_mod",
        ),
        ("attention", ["layers.1.dt_proj"], r"roles of layers\.\*\.dt_proj in the blocks"),
        ("odd", ["tower.stages.0.1.reduction"], r"roles of tower\.stages\.\*\.\*\.reduction in the blocks"),
        (r".*gate_proj", ["layers.0.self_attn.gate_proj"], r"roles of layers\.\*\.self_attn\.gate_proj in the blocks"),
        (
            "all",
            ["layers.1.mlp.experts.0.w1"],
            r"covers mixtures of experts, .*: layers\.\*\.mlp; placement=\"attention\"",
        ),
        ("gate_up", ["layers.0.mlp.experts.0.w1"], r"covers mixtures of experts"),
        ("mlp", ["layers.0.moe.experts.0.up_proj", "layers.0.moe.router"], r"experts, .*: layers\.\*\.moe;"),
        ("all", ["layers.0.experts.0.up_proj", "layers.0.router"], r"roles of layers\.\*\.router in the blocks"),
    ],
)
def test_a_part_of_a_model_is_refused(placement, names, message):
    known = [] if names[0].startswith("net") else LLAMA_BLOCKS
    with pytest.raises(InputError, match=message) as caught:
        pattern(placement, model_of([*known, *names]))
    assert "\n" not in str(caught.value)


def test_a_long_list_is_cut():
    with pytest.raises(InputError, match=r"roles of layers\.\*\.w0, .*layers\.\*\.w7 and 3 more in the blocks"):
        pattern("all", model_of([*LLAMA_BLOCKS, *(f"layers.1.w{i}" for i in range(11))]))


def test_attention_beside_experts():
    names = [*LLAMA_BLOCKS, "layers.1.moe.experts.0.up_proj", "layers.1.moe.shared_expert.up_proj", "layers.1.moe.gate"]
    attention = [name for name in LLAMA_BLOCKS if "self_attn" in name]
    assert matched("attention", model_of(names)) == attention
    assert matched("qkv", model_of(names)) == [name for name in attention if "o_proj" not in name]
    assert matched(r".*\.0\..*", model_of(names)) == LLAMA_BLOCKS[:7]


def test_names_are_held_against_shapes():
    """In some families, such as Moshi, "fc1" is gate and up in one."""
    fused = model_of(["layers.0.self_attn.q_proj", "layers.0.mlp.fc1", "layers.0.mlp.fc2"], lambda: nn.Linear(2, 4))
    with pytest.raises(InputError, match=r"roles of layers\.\*\.mlp\.fc1 in the blocks"):
        pattern("all", fused)


def test_what_is_outside_the_blocks_needs_no_role(bert):
    from torch.nn import Flatten, Linear, Sequential

    expected = matched("all", bert)
    assert matched("all", Sequential(bert, Flatten(), Linear(2, 2))) == [f"0.{name}" for name in expected]
    bert.heads = nn.ModuleList([Linear(2, 2), Linear(2, 2)])
    assert matched("all", bert) == expected


def test_a_registered_placement_is_never_called_unknown():
    no_mlp = model_of([f"layers.0.self_attn.{name}_proj" for name in "qkvo"])
    with pytest.raises(
        InputError, match=r"^placement 'mlp' covers no linear layer of this model, which has q, k, v, o$"
    ):
        pattern("mlp", no_mlp)
    with pytest.raises(InputError, match=r"^placement 'odd' covers no linear layer"):
        pattern("odd", no_mlp)


def test_a_second_adapter_finds_the_same_modules(bert):
    from peft import get_peft_model

    expected = matched("all", bert)
    model = get_peft_model(bert, PhiConfig(r=2, placement="attention"))
    model.add_adapter("second", PhiConfig(r=2, placement="all"))
    assert [module.name for module in model.base_model._layers() if "second" in module.phi_A] == expected


def test_the_rest_of_a_model_is_all_of_it():
    from peft import get_peft_model

    model = model_of([*LLAMA_BLOCKS, "layers.0.self_attn.gate_proj"])
    with pytest.raises(InputError, match=r'rest "lora" is put into all projections: .* roles of layers\.\*\.self_attn'):
        get_peft_model(model, PhiConfig(r=2, target_modules=["q_proj"], rest="lora"))


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
