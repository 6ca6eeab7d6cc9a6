"""Registers our methods with peft, now or as soon as peft is imported.

`import basisadapt` has to be enough for peft to know them, and has to be quick; importing peft takes seconds. So
where peft is not there yet, its registration follows its import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

METHODS = ("basisadapt.adapter", "basisadapt.methods")  # φ(BA), and the rivals that peft lacks


def register_with_peft() -> None:
    """Import what registers our methods if peft is loaded, else arrange for that to follow peft's import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    for name in METHODS:
        importlib.import_module(name)


class _PeftFinder(MetaPathFinder):
    """Finds peft as everybody does, and adds one step to the end of its import; then it is gone."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
