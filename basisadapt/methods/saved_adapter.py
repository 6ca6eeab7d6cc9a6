"""The saved adapter of a run: the file that states what it requires, and its merging into plain weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from basisadapt import backbones
from basisadapt.backbones import FORMS, QUANTISED, WEIGHTS
from basisadapt.core.errors import InputError, one_line, refusing, shown, unknown
from basisadapt.core.registry import loaded_plugins
from basisadapt.core.settings import from_mapping

FILE = "basisadapt.json"


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a saved adapter requires.

    - `backbone` (str): its name.
    - `form` (str), `num_labels` (int): the model's, see `backbones.load`.
    - `classes`: the names of the classes by index; empty if they have none, or there are none.
    - `weights` (str): the storage of the backbone in training, one of `backbones.WEIGHTS`.
    - `plugins`: the plug-ins of the run: file names without folders, and modules.
    - `config`: the run's canonical mapping.
    """

    backbone: str
    form: str
    num_labels: int
    classes: tuple[str, ...] = ()
    weights: str
    plugins: tuple[str, ...] = ()
    config: dict[str, Any]


def write_requirements(
    folder: Path, form: str, num_labels: int, config: dict[str, Any], classes: tuple[str, ...] = ()
) -> None:
    """Write `basisadapt.json` beside the adapter that a run has saved. config: the run's canonical mapping."""
    plugins = tuple(Path(one).name if one.endswith(".py") else one for one in loaded_plugins())
    saved = Requirements(
        backbone=config["backbone"],
        form=form,
        num_labels=num_labels,
        classes=classes,
        weights=config["train"]["weights"],
        plugins=plugins,
        config=config,
    )
    (folder / FILE).write_text(json.dumps(asdict(saved), indent=2), encoding="utf-8")


def read_requirements(folder: Path) -> Requirements:
    """What the adapter in a folder requires. Raises InputError if no run saved one there."""
    try:
        return from_mapping(Requirements, json.loads((folder / FILE).read_text(encoding="utf-8")), FILE)
    except FileNotFoundError as error:
        raise InputError(f"{str(folder)!r} has no {FILE}, as the adapters have that --save-adapters keeps") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / FILE} cannot be read: {one_line(error)}") from error


def merge_into(folder: Path, target: Path) -> Requirements:
    """Merge a saved adapter into its backbone, and write the model with its tokenizer or image processor to `target`.

    transformers loads it without this package, for example as `AutoModelForSequenceClassification`, with the trained
    head. Its configuration has the names of the classes, or says that the labels are numbers: a pipeline answers with
    them. Returns what the adapter required.

    Raises InputError if there is no whole saved adapter, its backbone or a plug-in is missing, they do not fit, the
    model is not a class of transformers or its weights are quantized, or `target` is not empty or cannot be created.
    """
    saved = read_requirements(folder)
    if saved.form not in FORMS:
        raise InputError(f"{folder / FILE}: {unknown('form', saved.form, FORMS)}")
    if saved.weights not in WEIGHTS:
        raise InputError(f"{folder / FILE}: {unknown('weights', saved.weights, WEIGHTS)}")
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise InputError(f"{str(folder)!r} has no {name}: it is not all of an adapter")
    if not FORMS[saved.form].model.startswith("Auto"):
        raise InputError(f"a model to {FORMS[saved.form].does} is not transformers' own and has no plain folder")
    if saved.weights in QUANTISED:
        raise InputError(
            f"this adapter was trained on weights in {saved.weights}, into which it cannot be merged, and beside "
            "other weights it is another model; train with train.weights bf16 or fp32"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} is not an empty folder; give another one")
    with refusing(f"{str(target)!r} cannot be created"):
        target.mkdir(parents=True, exist_ok=True)
    base, processor = backbones.load(backbones.find(saved.backbone), saved.form, saved.num_labels, saved.weights)
    with backbones.quietly(), warnings.catch_warnings():
        # peft uses a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        except InputError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:  # what torch and peft raise for tensors that do not fit
            raise InputError(
                f"{str(folder)!r} does not fit backbone {saved.backbone!r}: {shown(one_line(error))}"
            ) from error
        _name_outputs(merged.config, saved)
        merged.save_pretrained(target)
        processor.save_pretrained(target)
    return saved


def _name_outputs(config: Any, saved: Requirements) -> None:
    """State in a merged model's configuration what its outputs are called, as transformers expects it there."""
    if saved.form == "text" and saved.num_labels == 1:
        config.problem_type = "regression"  # without it a pipeline would take the number for the logit of a class
    elif len(saved.classes) == saved.num_labels:
        config.id2label = dict(enumerate(saved.classes))
        config.label2id = {name: index for index, name in config.id2label.items()}
