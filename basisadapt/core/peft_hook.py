"""Registers our methods with peft, now or as soon as peft is imported.

`import basisadapt` has to be enough for peft to know them, and has to be quick; importing peft takes seconds. So
where peft is not there yet, its registration follows its import.
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
    """Import what registers our methods if peft is loaded, else arrange for that to follow peft's import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    for name in METHODS:
        importlib.import_module(name)


class _PeftFinder(MetaPathFinder):
    """Finds peft as the others do, and adds one step to the end of its import; then it is gone.

    Until then it stays: transformers and others look for peft, to know whether it is installed, long before they
    import it, and an import may fail and be tried again.
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
