"""Placements over the architectures of transformers: all linear layers of the blocks are adapted, or the model is not.

`pytest -m slow -s tests/adapter/test_architectures.py` walks all that can be built here, and prints what it finds.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from basisadapt import InputError
from basisadapt.adapter.placement import find_projections, target_pattern
from basisadapt.methods import METHODS
from basisadapt.training.observation import adapted_layers, adapter_parameters

AUTO = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
DEPTH = re.compile(r"(num_|n_|encoder_|decoder_)(hidden_|encoder_|decoder_|attention_)?layers?|num_blocks|depth")
IN_A_BLOCK = re.compile(r"(.*\.)?\d+\..+")

COMMON = {
    "covered": """albert bart bert biogpt bloom clip codegen deberta deberta-v2 deit dinov2 distilbert electra falcon
        gemma gemma2 gemma3_text glm gpt2 gpt_neo gpt_neox gptj hubert layoutlm led llama longformer marian mistral
        modernbert mpnet mpt mt5 olmo olmo2 opt pegasus persimmon phi phi3 qwen2 qwen3 roberta siglip starcoder2 t5 vit
        wav2vec2 whisper xglm xlm xlm-roberta""",
    "attention": "deepseek_v2 deepseek_v3 gpt_oss granitemoe mixtral olmoe phimoe qwen2_moe qwen3_moe",
    "refused": "mamba mobilebert moonshine moshi rwkv squeezebert swin xlnet",
}


def shallow(config):
    """The configuration with four blocks, where it says how many; on the meta device widths cost nothing."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shallow(value)
        elif type(value) is int and value > 4 and DEPTH.fullmatch(name):
            setattr(config, name, 4)
    return config


def build(model_type, auto="AutoModel"):
    """The model on the meta device, or None where its default configuration makes none here."""
    for make in (shallow, lambda config: config):
        try:
            config = make(transformers.AutoConfig.for_model(model_type))
            with torch.device("meta"):
                return getattr(transformers, auto).from_config(config)
        except Exception:  # of a package that is not here, or of a configuration that needs arguments
            continue
    return None


def verdict(model):
    """What placement "all" makes of a model, and where it is "partial", what it leaves out or calls wrongly."""
    try:
        pattern = re.compile(target_pattern("all", model))
    except InputError as error:
        try:
            pattern = re.compile(target_pattern("attention", model))
        except InputError:
            return "refused", str(error)
        outside = re.compile(r".*(mlp|moe|ffn|feed_forward)(\..*)?")
        left = [name for name in multiplying(model) if not pattern.fullmatch(name) and not outside.fullmatch(name)]
        return ("partial", str(left)) if left else ("attention", str(error))
    left = [name for name in multiplying(model) if not pattern.fullmatch(name)]
    wrong = misnamed(model)
    return ("partial", str(left or wrong)) if left or wrong else ("covered", "")


def multiplying(model):
    """The names of what multiplies in a numbered container: linear layers, and modules with tensors of their own."""
    for name, module in model.named_modules():
        tensors = any(p.dim() > 2 and min(p.shape) > 1 for p in module.parameters(recurse=False))
        attention = isinstance(module, nn.MultiheadAttention)
        linear = isinstance(module, nn.Linear | Conv1D)
        if IN_A_BLOCK.fullmatch(name) and (linear or attention or (tensors and not isinstance(module, _ConvNd))):
            yield name


def misnamed(model):
    """Projections whose shapes are not those of what they are taken for."""
    modules = dict(model.named_modules())

    def sides(projection):
        weight = modules[projection.name].weight
        return weight.shape if isinstance(modules[projection.name], Conv1D) else tuple(reversed(weight.shape))

    blocks = defaultdict(lambda: defaultdict(list))
    for projection in find_projections(modules):
        if isinstance(modules[projection.name], nn.Linear | Conv1D):
            for role in projection.roles:
                blocks[projection.stack, projection.layer][role].append(projection)
    wrong = []
    for block in blocks.values():
        down = {sides(projection)[0] for projection in block["down"]}
        for projection in {*block["gate"], *block["up"]}:
            fused = len(projection.roles)
            wrong += [] if not down or sides(projection)[1] in {fused * width for width in down} else [projection.name]
        o = {sides(projection)[0] for projection in block["o"]}
        for projection in block["q"]:
            latent = re.fullmatch(r".*\.q_[ab]_proj", projection.name) or "mimo" in model.config.model_type
            alone = projection.roles == {"q"}
            low, high = (min(o), max(o)) if alone else (min(o) + 1, 3 * max(o))
            wrong += [] if latent or low <= sides(projection)[1] <= high else [projection.name]
    return wrong


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [(model_type, expected) for expected, types in COMMON.items() for model_type in types.split()],
)
def test_common_architectures(model_type, expected):
    assert verdict(build(model_type))[0] == expected


SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2}
MIXTRAL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL |= {"num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 30, "pad_token_id": 0}


@pytest.mark.parametrize("method", ["phi", "lora", "nola"])
def test_the_ways_out_work(method):
    """All linear layers but the head, where roles are not known; attention alone, beside experts."""
    torch.manual_seed(0)
    settings, x = METHODS[method].settings, torch.randn(2, 3, 16, 16)
    swin = transformers.AutoModelForImageClassification.from_config(transformers.SwinConfig(**SWIN, num_labels=3))
    with pytest.raises(InputError, match=r"roles of swin.encoder.layers.\*.downsample.reduction in the blocks"):
        METHODS[method]().attach(swin, settings(r=2), None)
    linear = {name for name, module in swin.named_modules() if isinstance(module, nn.Linear)}
    model = METHODS[method]().attach(swin, settings(r=2, target_modules="all-linear"), None)
    assert {name for name, _ in adapted_layers(model)} == linear - {"classifier"}
    mixtral = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**MIXTRAL))
    experts = METHODS[method]().attach(mixtral, settings(r=2, placement="attention"), "CAUSAL_LM")
    assert len(list(adapted_layers(experts))) == 2 * 4
    for adapted, given in ((model, {"pixel_values": x}), (experts, {"input_ids": torch.tensor([[3, 4, 5]])})):
        start = adapted.eval()(**given).logits
        start.square().sum().backward()
        with torch.no_grad():
            for parameter in adapter_parameters(adapted).values():
                assert parameter.grad is not None
                parameter.add_(0.05)
        moved = adapted(**given).logits
        assert not torch.allclose(moved, start, atol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(**given).logits, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_architecture_is_adapted_in_part():
    found = defaultdict(dict)
    for auto, mapping in AUTO.items():
        for model_type in getattr(modeling_auto, mapping):
            model = build(model_type, auto)
            kind, why = ("not built", "") if model is None else verdict(model)
            found[kind][f"{model_type} ({auto})"] = why
    for kind, models in found.items():
        print(f"\n{kind}: {len(models)}\n" + "\n".join(f"  {name} {why}" for name, why in models.items()))
    assert not found["partial"]
    assert len(found["covered"]) > len(found["refused"]) > 0
    assert found["attention"]
