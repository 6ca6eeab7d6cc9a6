"""φ(BA) as a peft method. Importing this package registers it."""

from __future__ import annotations

import peft  # noqa: F401  # first: its import is followed by that of all methods, some of which build on this package

from basisadapt.adapter.config import PhiConfig
from basisadapt.adapter.layer import PhiLinear
from basisadapt.adapter.model import PhiModel
from basisadapt.adapter.peft_type import register

__all__ = ["PhiConfig", "PhiLinear", "PhiModel"]

register("phi", PhiConfig, PhiModel)
