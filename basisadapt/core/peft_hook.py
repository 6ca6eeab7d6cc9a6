"""Registers our methods with peft, at once or as soon as peft is imported.

`import basisadapt` must be enough for peft to know them, and must be quick, but importing peft takes seconds. So if
peft is not loaded yet, the registration runs at the end of its import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

METHODS = ("basisadapt.adapter", "basisadapt.methods")  # φ(BA), and the rivals that peft lacks


def register_with_peft() -> None:
    """Register our methods now if peft is loaded, otherwise at the end of peft's import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    for name in METHODS:
        importlib.import_module(name)


class _PeftFinder(MetaPathFinder):
    """Finds peft as the other finders do, adds the registration to the end of its import, then removes itself.

    It stays until an import succeeds: transformers and others look for peft, to know whether it is installed, long
    before they import it, and an import may fail and be retried.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        spec = self._found_by_others(path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def _found_by_others(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec("peft", path, target)) is not None:
                return spec
        return None
