"""φ(BA), ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from basisadapt.methods.method import PeftMethod
from basisadapt.phi.settings import PhiSettings

if TYPE_CHECKING:
    from peft import PeftConfig


class Phi(PeftMethod, name="phi", settings=PhiSettings):
    """ΔW = s · (p·BA + (φ(g·BA) − c·φ(0)) / g), see `PhiSettings`. Source: Garg, Lucey & Saratchandran."""

    def peft_config(self, settings: PhiSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Our PhiConfig."""
        from basisadapt.adapter import PhiConfig

        return PhiConfig(**{**asdict(settings), **common})

    def parameters(self, settings: PhiSettings, out_features: int, in_features: int) -> int:
        """r (m + n); φ's tables, which modules may share, are counted apart."""
        return settings.r * (out_features + in_features)
