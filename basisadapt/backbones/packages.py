"""Weights that come with Python packages: found, checked and, from GGUF, converted once."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

from basisadapt.backbones import gguf
from basisadapt.backbones.catalogue import Backbone, Package
from basisadapt.errors import InputError


def check_installed(backbone: Backbone) -> None:
    """Raise InputError, with the command to run, where a package that the backbone needs is not installed."""
    if backbone.package is None:
        return
    needed = [backbone.source, *(["gguf"] if backbone.package.weights.endswith(".gguf") else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"backbone {backbone.name!r} needs {' and '.join(missing)}, not installed here: {backbone.package.install}"
        )


def folder_of(backbone: Backbone, package: Package) -> Path:
    """The folder of the checked weights, for transformers. Raises InputError if they cannot be had."""
    check_installed(backbone)
    found = importlib.util.find_spec(backbone.source)
    assert found is not None
    assert found.origin is not None
    weights = Path(found.origin).parent / package.weights
    _check_sha256(weights, package.sha256)
    return gguf.converted(weights, package.sha256) if weights.suffix == ".gguf" else weights.parent


@functools.cache
def _check_sha256(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"the weights {str(path)!r} cannot be read: {error.strerror}") from error
    if found != expected:
        raise InputError(f"the weights {str(path)!r} have sha256 {found}, expected {expected}")
