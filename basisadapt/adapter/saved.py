"""The base class of this package's peft configurations: it checks types, and saved adapters before they are used."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from basisadapt.core.errors import InputError, nearest, one_line, refusing, shown, unknown
from basisadapt.core.settings import checked
from basisadapt.core.synonyms import meant

FLOATS = ("F64", "F32", "F16", "BF16")

Shape = tuple[int | None, ...]  # None where the model decides


@dataclass(kw_only=True)
class CheckedConfig(PeftConfig, ABC):  # type: ignore[misc]
    """A peft configuration whose own fields are checked against their declared types, from whatever source.

    layers_to_transform, layers_pattern: as in peft, the indices of the blocks in which a list of target_modules is
    adapted, and the name of the list of blocks.

    Raises InputError for a wrong type, and for layers_to_transform without such a list. If it is loaded from a local
    folder, also for weights that are not safetensors, cannot be read, belong to the model itself, or do not have the
    shapes that the configuration states.
    """

    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __new__(cls, *values: Any, **settings: Any) -> Any:
        """Raises TypeError for a setting that there is not, with the nearest one, and for one without its name."""
        if values:
            raise TypeError(
                f"{cls.__name__} takes settings by name, such as r=8, and got {shown(values[0])} without one"
            )
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        for name in settings:
            if name not in known:
                # The words "got an unexpected keyword argument" tell peft that a saved file may be of a later version.
                raise TypeError(
                    f"{cls.__name__} got an unexpected keyword argument {name!r}; {_hint(cls, name, known)}"
                )
        return super().__new__(cls)

    @abstractmethod
    def saved_shapes(self) -> Mapping[str, Shape]:
        """The shapes of an adapted module's tensors, and of tables, by the ends of their names in the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = {field.name for field in dataclasses.fields(PeftConfig)}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in others}
        own = {name: list(value) if isinstance(value, set | frozenset) else value for name, value in own.items()}
        for name, value in checked(type(self), own).items():
            setattr(self, name, value)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                what = f"{name} {shown(value)} is not a regular expression"
                with refusing(what, re.error, OverflowError, RecursionError):
                    re.compile(value)
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            raise InputError("layers_to_transform needs a list of target_modules; anything else chooses blocks itself")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise InputError("layers_pattern needs layers_to_transform")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration of a saved adapter; in a local folder the weights' shapes are checked too."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (InputError, TypeError) as error:
            raise InputError(f"{folder / CONFIG_NAME}: {' '.join(str(error).split())}{_plugins_of(folder)}") from error
        check_weights(folder, config.saved_shapes(), config.modules_to_save or ())
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The configuration of the class that peft_type names. Raises InputError if that is none of this package."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = [name.value for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(kind, CheckedConfig)]
        if "peft_type" in kwargs and kwargs["peft_type"] not in known:
            raise unknown("peft_type", kwargs["peft_type"], known)
        return super().from_peft_type(**kwargs)


def _hint(cls: type, name: str, known: Set[str]) -> str:
    """What to do instead of giving a setting of that name."""
    key = meant(name) or ""
    ours = key.rpartition(".")[2]
    if key.startswith("train.") and ours not in known:
        return "it belongs where the model is loaded or trained; basisadapt.param_groups takes rates and decay"
    near = ours if ours in known else nearest(name, sorted(known), alike=0.75)
    return f"did you mean {near!r}?" if near else f"help({cls.__name__}) has its settings"


def _plugins_of(folder: Path) -> str:
    """The end of a message that names the plug-ins of the adapter in a folder; empty if it has none."""
    with suppress(OSError, ValueError, AttributeError):
        plugins = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("plugins")
        if plugins and isinstance(plugins, list) and all(isinstance(plugin, str) for plugin in plugins):
            return f"; the adapter needs {', '.join(plugins)}: import it first, or give it as --plugin"
    return ""


def check_weights(folder: Path, shapes: Mapping[str, Shape], modules: Sequence[str]) -> None:
    """Check the weights in a folder, if there are any, against the shapes that their configuration states.

    - `shapes`: of the adapter's tensors, see `CheckedConfig.saved_shapes`.
    - `modules`: the ends of the names of modules that are saved whole. Any other tensor of the file would overwrite one
      of the model's own.

    Only the header of the file is read. Raises InputError that names the file and, if there is one, the tensor.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (folder / WEIGHTS_NAME).exists():
            raise InputError(f"{folder / WEIGHTS_NAME} is a pickle, which is not read; save it as {file.name}")
        return
    found = _shapes_in(file)
    for name in found:
        if not (name.endswith(tuple(f".{end}" for end in shapes)) or any(f".{module}." in name for module in modules)):
            raise InputError(
                f"{file}: {shown(name)} is no weight of the adapter and would overwrite one of the model; what comes "
                f"with an adapter is named in modules_to_save of {CONFIG_NAME}"
            )
    holders: dict[str, set[str]] = {}
    for end, expected in shapes.items():
        here = {name.removesuffix(end): shape for name, shape in found.items() if name.endswith(f".{end}")}
        for holder, shape in here.items():
            if len(shape) != len(expected) or any(n not in (None, m) for n, m in zip(expected, shape, strict=True)):
                said = " × ".join("any" if n is None else str(n) for n in expected)
                raise InputError(
                    f"{file}: {holder}{end} must be {said}, as {CONFIG_NAME} says, and has the shape {shape}"
                )
        table = end.rpartition(".")[0]
        if not here or holders.setdefault(table, set(here)) != set(here):
            odd = sorted(holders.get(table, set()) ^ set(here))
            raise InputError(f"{file}: {odd[0] if odd else 'it has no '}{end} is missing or alone")


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape. Raises InputError for one whose dtype is not a floating-point type."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            for name, tensor in found.items():
                if tensor.get_dtype() not in FLOATS:
                    raise InputError(f"{file}: {shown(name)} must be of {', '.join(FLOATS)}, not {tensor.get_dtype()}")
            return {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a safetensors file that can be read: {one_line(error)}") from error
