"""Finds weights in an installed package or a local file, checks them, and converts GGUF once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from basisadapt.backbones import gguf
from basisadapt.backbones.catalogue import Backbone, Package
from basisadapt.backbones.files import sha256_of
from basisadapt.core.errors import InputError


def check_installed(backbone: Backbone) -> None:
    """Raise InputError, with the command to run, if a package that the backbone needs is not installed."""
    if backbone.package is not None:
        from_gguf = backbone.package.weights.endswith(".gguf")
        needed, install = [backbone.source, *(["gguf"] if from_gguf else [])], backbone.package.install
    else:
        needed, install = ["gguf"] if backbone.file is not None else [], "pip install gguf"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"backbone {backbone.name!r} needs {' and '.join(missing)}, not installed here: {install}")


def place_of(backbone: Backbone) -> str:
    """What transformers loads: a hub id, or a local folder, which is converted from GGUF if need be.

    Raises InputError if the weights are not installed, damaged or changed.
    """
    if backbone.package is not None:
        return str(folder_of(backbone, backbone.package))
    if backbone.file is not None:
        check_installed(backbone)
        return str(gguf.converted(backbone.file, sha256_of(backbone.file)))
    return backbone.source


def folder_of(backbone: Backbone, package: Package) -> Path:
    """The folder of a package's weights, checked by their hash. Raises InputError if they are missing or changed."""
    check_installed(backbone)
    found = importlib.util.find_spec(backbone.source)
    assert found is not None and found.origin is not None
    weights = Path(found.origin).parent / package.weights
    if (hashed := sha256_of(weights)) != package.sha256:
        raise InputError(f"the weights {str(weights)!r} have sha256 {hashed}, expected {package.sha256}")
    return gguf.converted(weights, package.sha256) if weights.suffix == ".gguf" else weights.parent
