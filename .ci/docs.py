#!/usr/bin/env python3
"""Writes the API reference, a page for each module: `python .ci/docs.py FOLDER` (needs the extra `docs`)."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from importlib.util import find_spec
from inspect import unwrap
from pathlib import Path
from typing import get_type_hints

import pdoc
import peft
import torch
import transformers

import basisadapt

warnings.filterwarnings("ignore", message="Cannot determine where .*BaseWeight._is_param")  # torch declares it nowhere
# Modules that cannot be imported everywhere, and so have no page there.
NEEDS = {"kernels_triton": "triton", "cells_triton": "triton", "graph_triton": "triton"}

modules = pkgutil.walk_packages(basisadapt.__path__, "basisadapt.")
for package in [basisadapt, *(importlib.import_module(module.name) for module in modules if module.ispkg)]:
    for name in getattr(package, "__all__", ()):  # some are loaded when first used; pdoc only looks
        setattr(package, name, getattr(package, name))
    children = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "__main__"]
    # Modules that `__all__` does not name are private to pdoc.
    package.__all__ = [
        *getattr(package, "__all__", []),
        *(name for name in children if name not in NEEDS or find_spec(NEEDS[name])),
    ]
configs = [peft.PeftConfig, transformers.PretrainedConfig]
for config in configs:  # their constructors are generated, from fields whose types their bases' modules know
    configs += config.__subclasses__()
    if config.__module__.startswith("basisadapt."):
        hints = get_type_hints(config, localns={"torch": torch})  # which transformers imports for type checkers only
        made = unwrap(config.__init__)
        made.__annotations__ = {name: hints.get(name) for name in made.__annotations__}
inherited = pdoc.doc.Namespace.inherited_members.func
# Pages of subclasses list a constructor of an abstract class, whose own page does not show it: a dead link.
pdoc.doc.Class.inherited_members = property(
    lambda cls: {
        origin: [one for one in members if one.name != "__init__"] for origin, members in inherited(cls).items()
    }
)
pdoc.pdoc("basisadapt", output_directory=Path(sys.argv[1]))
