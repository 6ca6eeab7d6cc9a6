"""Pretrained models and random ones: a catalog by name, the forms that models take for a task, and loading.

Importing this package registers the model types that are ours.
"""

from __future__ import annotations

from basisadapt.backbones import random_mlp as random_mlp
from basisadapt.backbones.catalogue import BACKBONES, Backbone, Package, find, register
from basisadapt.backbones.forms import FORMS, HEADS, ROUNDED, Form, is_head
from basisadapt.backbones.hub import check_reachable, missing_weights
from basisadapt.backbones.inputs import check_inputs
from basisadapt.backbones.loading import check_at_hand, load, quietly, shape_only
from basisadapt.backbones.precision import QUANTISED, WEIGHTS, check_weights

__all__ = [
    "BACKBONES",
    "FORMS",
    "HEADS",
    "QUANTISED",
    "ROUNDED",
    "WEIGHTS",
    "Backbone",
    "Form",
    "Package",
    "check_at_hand",
    "check_inputs",
    "check_reachable",
    "check_weights",
    "find",
    "is_head",
    "load",
    "missing_weights",
    "quietly",
    "register",
    "shape_only",
]
