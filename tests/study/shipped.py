"""The shipped studies, by what they need."""

from __future__ import annotations

import pytest

from basisadapt.study.plan.shipped import list_studies

# Of a language model, on data that do not come with Python.
LANGUAGE = {
    "commonsense": "commonsense/all",
    "commonsense_written": "commonsense/all",
    "confirm_commonsense": "commonsense/all",
    "instruct": "instruct/mt_bench",
}
VISION = {"vision_clip": "clip-vit-b32", "vision_dinov2": "dinov2-base"}  # and the weights that they download
# Whose tasks are no data.
DRAWN = {
    "ablate_memory",
    "ablate_nonlinearity",
    "approximate",
    "capacity",
    "depth",
    "forgetting",
    "phase_diagram",
    "rules",
}
RECOVERY = "recovery"  # whose task is its own, with a language model's beside it
FULL = {**dict.fromkeys(DRAWN, "gpu"), RECOVERY: "llm"}  # presets with all rows, where there is no published run
every_study = pytest.mark.parametrize("name", list_studies())
