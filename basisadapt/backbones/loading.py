"""Loads a model for a task: only its shapes, on the meta device, or with its pretrained weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from basisadapt.backbones.beside import check_beside
from basisadapt.backbones.catalogue import OWN, Backbone
from basisadapt.backbones.failures import NO_SAFETENSORS, explained
from basisadapt.backbones.forms import FORMS, ROUNDED, check_form, class_of, is_head, new_model
from basisadapt.backbones.inputs import check_tokenizer, most_tokens
from basisadapt.backbones.packages import check_installed, place_of
from basisadapt.backbones.precision import keep_head_exact, loading_options
from basisadapt.core.errors import InputError


def shape_only(backbone: Backbone, form: str, num_labels: int) -> transformers.PreTrainedModel:
    """A model of that form with `num_labels` outputs on the meta device: names and shapes, without weights or memory.

    Raises InputError if the backbone cannot take the form, or its configuration cannot be loaded.
    """
    with torch.device("meta"):
        return _shaped(backbone, form, num_labels)


def _shaped(backbone: Backbone, form: str, num_labels: int) -> transformers.PreTrainedModel:
    """A model of that form without loaded weights."""
    if backbone.shapes:
        config = transformers.AutoConfig.for_model(num_labels=num_labels, **backbone.shapes)
    else:
        config = _config(backbone, num_labels)
    check_form(backbone, form, config.model_type)
    with explained(backbone):
        return new_model(form, config)


def check_at_hand(backbone: Backbone) -> None:
    """Raise InputError if it is clear that `load` would fail, from the package, the local folder or the GGUF file.

    The hub is not asked. A GGUF file is converted, since only that shows whether it can be.
    """
    check_installed(backbone)
    folder = Path(backbone.source)
    if backbone.package is None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise InputError(f"backbone {backbone.name!r} {NO_SAFETENSORS}")
    check_beside(backbone, ask=False)
    if backbone.file is not None or backbone.called:
        _check_shapes(backbone)


def load(
    backbone: Backbone, form: str, num_labels: int, weights: str = "fp32", prompts: Sequence[Sequence[str]] = ()
) -> tuple[transformers.PreTrainedModel, Any]:
    """The pretrained model with a new head in float32, and its tokenizer, image processor or frozen rest.

    One with random weights is drawn from torch's global generator, in float32.

    - `form`: one of `FORMS`.
    - `num_labels`: outputs of the head.
    - `weights`: the storage of the backbone, one of `WEIGHTS`, default "fp32".
    - `prompts`: sentences about each class, for the form "zero_shot".

    Only safetensors are read, and no code from the hub is run. Raises InputError if the weights cannot be loaded or do
    not fit the backbone.
    """
    if backbone.drawn:
        model = _shaped(backbone, form, num_labels)
        return model, class_of(FORMS[form].processor)(model.config)
    config = _config(backbone, num_labels)
    check_form(backbone, form, config.model_type)
    check_beside(backbone, ask=True)
    processor = _ask(class_of(FORMS[form].processor), backbone)
    model, report = _ask(
        class_of(FORMS[form].model),
        backbone,
        config=config,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # a head for other labels is replaced; `_check_fit` finds anything else
        output_loading_info=True,
        **loading_options(weights),
    )
    _check_fit(backbone, form, report)
    if form == "zero_shot":
        model.classes.copy_(_class_embeddings(backbone, num_labels, prompts))
    if form == "feed_forward":
        model.draw_classes()
    if form == "last_mlp":
        model.classes.copy_(processor.classes(num_labels))
    if form in ROUNDED:
        model.round_weights()
    if weights != "fp32":
        keep_head_exact(model)
    if isinstance(processor, transformers.PreTrainedTokenizerBase):
        check_tokenizer(backbone, form, processor, model)
        processor.model_max_length = min(processor.model_max_length, most_tokens(model) or processor.model_max_length)
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        model.config.pad_token_id = processor.pad_token_id
    return model, processor


def _class_embeddings(backbone: Backbone, num_labels: int, prompts: Sequence[Sequence[str]]) -> Tensor:
    from basisadapt.backbones import clip

    if len(prompts) != num_labels:
        raise InputError(f"data.head zero_shot needs {num_labels} classes with names, but the data has {len(prompts)}")
    whole = _ask(transformers.CLIPModel, backbone, dtype=torch.float32, use_safetensors=True)
    return clip.class_embeddings(whole, _ask(transformers.AutoTokenizer, backbone), prompts)


def _check_shapes(backbone: Backbone) -> None:
    """Raise InputError if the user's own copy of a named backbone is another model."""
    config = _config(backbone, 1)
    for key, expected in backbone.shapes.items():
        if (found := getattr(config, key, None)) != expected:
            raise InputError(
                f"backbone {backbone.name!r} has {key} {expected}, but its copy in {OWN} has {found}: another model"
            )


def _config(backbone: Backbone, num_labels: int) -> transformers.PretrainedConfig:
    return _ask(transformers.AutoConfig, backbone, num_labels=num_labels)


def _ask(auto_class: Any, backbone: Backbone, **options: Any) -> Any:
    with explained(backbone), quietly():
        source = place_of(backbone)
        if Path(source).is_dir() and not Path(source, "config.json").is_file():
            raise InputError(f"backbone {backbone.name!r} is a folder without a config.json: it holds no model")
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress transformers' progress bars and its warnings, such as that of a new head, which is intended."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _check_fit(backbone: Backbone, form: str, report: dict[str, Any]) -> None:
    """Raise InputError if weights are missing, or differ in shape from the configuration.

    In a classifier the head may be missing or differ, and layers outside the blocks, such as a pooler, may be missing.
    """
    block = re.compile(r".*\.\d+\..*")
    missing = [name for name in report["missing_keys"] if form == "completion" or block.fullmatch(name)]
    other = [name for name, *_ in report["mismatched_keys"]]
    wrong = sorted(name for name in [*missing, *other] if not is_head(name))
    if wrong:
        raise InputError(
            f"backbone {backbone.name!r} has weights that do not fit its configuration: {len(wrong)} of them are "
            f"missing or have another shape, such as {wrong[0]!r}"
        )
