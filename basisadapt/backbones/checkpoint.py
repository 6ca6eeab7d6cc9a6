"""Reads the matrices of a pretrained model one at a time, without building the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from basisadapt.backbones.beside import INDEX, check_beside, file_of
from basisadapt.backbones.catalogue import Backbone
from basisadapt.backbones.failures import NO_SAFETENSORS, explained
from basisadapt.backbones.packages import place_of
from basisadapt.core.errors import InputError

WEIGHTS = "model.safetensors"
MATRIX = ".weight"


class Checkpoint:
    """The matrices in a backbone's safetensors, by the names of their modules.

    - `name` (str): the backbone's name.
    - `shapes`: module to the shape (out_features, in_features) of its two-dimensional ".weight".

    Raises InputError if there are no safetensors, or if they are damaged.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self.name = backbone, backbone.name
        if backbone.drawn:
            raise InputError(f"backbone {backbone.name!r} has random weights, which no file holds")
        with explained(backbone):
            check_beside(backbone, ask=True)
            self._files = _files(backbone)
            self.shapes: dict[str, tuple[int, ...]] = {}
            for file in dict.fromkeys(self._files.values()):
                with safe_open(file, framework="pt") as opened:
                    for name in filter(self._files.__contains__, opened.keys()):
                        shape = tuple(opened.get_slice(name).get_shape())
                        if name.endswith(MATRIX) and len(shape) == 2:
                            self.shapes[name.removesuffix(MATRIX)] = shape

    def read(self, module: str) -> Tensor:
        """The matrix of a module, in its shape in `shapes` and the dtype of the file. Raises InputError."""
        name = module + MATRIX
        with explained(self._backbone), safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def _files(backbone: Backbone) -> Mapping[str, Path]:
    """Every tensor's name and the file that holds it. Raises InputError for a missing file."""
    source = place_of(backbone)
    index = file_of(source, INDEX)
    if index is not None:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts = {name: file_of(source, name) for name in set(names.values())}
        if missing := sorted(name for name, file in parts.items() if file is None):
            raise InputError(f"backbone {backbone.name!r} lacks {missing[0]}, which its {INDEX} names")
        return {tensor: file for tensor, name in names.items() if (file := parts[name]) is not None}
    file = file_of(source, WEIGHTS)
    if file is None:
        if not Path(source).is_dir():
            cached_file(source, "config.json")  # raises an error that says why the hub could not be asked
        raise InputError(f"backbone {backbone.name!r} {NO_SAFETENSORS}")
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file)
