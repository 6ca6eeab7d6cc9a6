"""A run's adapter in a folder: kept with what it needs named beside it, and merged into plain weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from basisadapt import backbones
from basisadapt.backbones import FORMS, QUANTISED
from basisadapt.core.errors import InputError, one_line
from basisadapt.core.registry import loaded_plugins
from basisadapt.core.settings import from_mapping

NEEDS = "basisadapt.json"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a kept adapter needs.

    backbone: by name. form, num_labels: the model's, see `backbones.load`. weights: how the backbone was held. plugins:
    the files, without their folders, and modules that were loaded when it was trained. config: the run's.
    """

    backbone: str
    form: str
    num_labels: int
    weights: str
    plugins: tuple[str, ...] = ()
    config: dict[str, Any]


def keep_needs(folder: Path, form: str, num_labels: int, config: dict[str, Any]) -> None:
    """Write beside an adapter that a run has saved what it needs. config: the run's canonical mapping."""
    plugins = tuple(Path(one).name if one.endswith(".py") else one for one in loaded_plugins())
    backbone, weights = config["backbone"], config["train"]["weights"]
    needs = Needs(backbone=backbone, form=form, num_labels=num_labels, weights=weights, plugins=plugins, config=config)
    (folder / NEEDS).write_text(json.dumps(asdict(needs), indent=2), encoding="utf-8")


def read_needs(folder: Path) -> Needs:
    """What the adapter in a folder needs. Raises InputError where no run has kept one there."""
    try:
        return from_mapping(Needs, json.loads((folder / NEEDS).read_text(encoding="utf-8")), NEEDS)
    except FileNotFoundError as error:
        raise InputError(f"{str(folder)!r} has no {NEEDS}, as the adapters have that --save-adapters keeps") from error
    except (OSError, ValueError, TypeError) as error:  # a TypeError for a field that is missing
        raise InputError(f"{folder / NEEDS} cannot be read: {one_line(error)}") from error


def merge_into(folder: Path, target: Path) -> Needs:
    """Merge a kept adapter into its backbone, and write the model with its tokenizer or image processor.

    What is written is transformers' alone: `AutoModelForSequenceClassification` and so on load it without this package,
    with the head that was trained. Returns what the adapter needed.

    Raises InputError where there is no kept adapter, its backbone or a plug-in is missing, the model is no class of
    transformers' or has rounded weights, or the target holds something.
    """
    needs = read_needs(folder)
    if not FORMS[needs.form].model.startswith("Auto"):
        raise InputError(f"a model to {FORMS[needs.form].does} is not transformers' own and has no plain folder")
    if needs.weights in QUANTISED:
        raise InputError(
            f"this adapter was trained on weights in {needs.weights}, into which it cannot be merged, and beside other "
            "weights it is another model; train with train.weights bf16 or fp32"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} is not an empty folder; give another one")
    if not os.access(next(parent for parent in target.absolute().parents if parent.exists()), os.W_OK):
        raise InputError(f"{str(target)!r} cannot be made")
    from peft import PeftModel

    base, processor = backbones.load(backbones.find(needs.backbone), needs.form, needs.num_labels, needs.weights)
    with backbones.quietly():
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        merged.save_pretrained(target)
        processor.save_pretrained(target)
    return needs
