"""The forms that a model takes for a task, the models that can take them, and the head that some of them have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from basisadapt.backbones.catalogue import BACKBONES, Backbone
from basisadapt.core.errors import InputError


@dataclass(frozen=True)
class Form:
    """What a model does for a task.

    - `does` (str): in words, for messages.
    - `model` (str): the class, of transformers or ours, that loads the model.
    - `models` (str or tuple of str): the model types that can take the form, or transformers' mapping of them.
    - `processor` (str): the class that loads what a task makes inputs with: a tokenizer, an image processor, or for
      parts of a model (`bert_parts`) its frozen rest.
    - `peft` (str or None, default None): peft's name for the type of task, if it has one.
    """

    does: str
    model: str
    models: str | tuple[str, ...]
    processor: str
    peft: str | None = None


FORMS = {
    "text": Form(
        does="classify texts",
        model="AutoModelForSequenceClassification",
        models="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        processor="AutoTokenizer",
        peft="SEQ_CLS",
    ),
    "image": Form(
        does="classify images",
        model="AutoModelForImageClassification",
        models="MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        processor="AutoImageProcessor",
    ),
    "zero_shot": Form(
        does="classify images by sentences about the classes (data.head zero_shot)",
        model="ZeroShotCLIP",  # ours
        models=("clip",),
        processor="AutoImageProcessor",
    ),
    "feed_forward": Form(
        does="store facts in a feed-forward block (task facts)",
        model="LastFeedForward",  # ours, like FeedForwardInputs
        models=("bert",),
        processor="FeedForwardInputs",
    ),
    "random_mlp": Form(
        does="store facts in random layers (task facts/vectors)",
        model="RandomMLP",  # ours, like RandomVectors
        models=("random_mlp",),
        processor="RandomVectors",
    ),
    "last_mlp": Form(
        does="store words in its last MLP (task phone_book)",
        model="LastMLP",  # ours, as is what is below it
        models=("llama", "qwen2"),
        processor="MLPInputs",
    ),
    "weight": Form(
        does="be fitted to a given matrix (tasks matrix/...)",
        model="LastQuery",  # ours, like QueryWeight
        models=("bert",),
        processor="QueryWeight",
    ),
    "rounded_encoder": Form(
        does="be rounded to 4 bits and compared by hidden states (task recovery/states)",
        model="RoundedEncoder",  # ours, like OriginalEncoder
        models=("bert",),
        processor="OriginalEncoder",
    ),
    "rounded_language_model": Form(
        does="be rounded to 4 bits and compared by the next token (task recovery/text)",
        model="RoundedLanguageModel",  # ours, like OriginalLanguageModel
        models=("llama", "qwen2"),
        processor="OriginalLanguageModel",
    ),
    "completion": Form(
        does="complete texts",
        model="AutoModelForCausalLM",
        models="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        processor="AutoTokenizer",
        peft="CAUSAL_LM",
    ),
}

ROUNDED = ("rounded_encoder", "rounded_language_model")  # forms of models whose weights we round
HEADS = ("classifier", "score")  # transformers' names for a classifier's head; peft trains modules of these names


def new_model(form: str, config: Any) -> Any:
    """A model of that form, without loaded weights."""
    whole = class_of(FORMS[form].model)
    return getattr(whole, "from_config", whole)(config)  # an Auto class of transformers' cannot be called


def class_of(name: str) -> Any:
    """The class of that name in a `Form`: one of ours or of transformers."""
    from basisadapt.backbones import bert_parts, clip, last_mlp, random_mlp, rounded

    if hasattr(transformers, name):
        return getattr(transformers, name)
    return next(vars(ours)[name] for ours in (bert_parts, clip, last_mlp, random_mlp, rounded) if name in vars(ours))


def is_head(parameter: str) -> bool:
    """Whether a parameter of that name belongs to the task's head."""
    return not set(HEADS).isdisjoint(parameter.split("."))


def check_form(backbone: Backbone, form: str, model_type: str) -> None:
    """Raise InputError, naming backbones that can, if models of type `model_type` cannot take the form."""
    if not _can(form, model_type):
        able = [name for name, other in BACKBONES.items() if _can(form, other.shapes.get("model_type", ""))]
        hint = f"; among the named ones, {', '.join(able)} can" if able else ""
        raise InputError(f"backbone {backbone.name!r} ({model_type}) cannot {FORMS[form].does}{hint}")


def _can(form: str, model_type: str) -> bool:
    from transformers.models.auto import modeling_auto

    models = FORMS[form].models
    if isinstance(models, tuple):
        return model_type in models
    # transformers also offers encoders as causal language models, which they were not trained to be.
    encoder = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in getattr(modeling_auto, models) and not (form == "completion" and encoder)
