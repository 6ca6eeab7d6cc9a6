"""SineLoRA: a fixed sine as the transfer function. It runs as φ with one basis function that does not train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftConfig

from basisadapt.adapter.config import PhiConfig
from basisadapt.core.errors import require
from basisadapt.methods.phi import TransferMethod
from basisadapt.phi.notation import LARGEST
from basisadapt.phi.settings import LowRankSettings


@dataclass(kw_only=True)
class SineSettings(LowRankSettings):
    """The settings of `LowRankSettings` and:

    - `frequency` (float in (0, 1e6], default 200): ω, the same for all modules.

    Raises InputError for a value out of range.
    """

    frequency: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.frequency <= LARGEST, "frequency", self.frequency, "above 0 and at most 1e6")


class SineLoRA(TransferMethod, name="sinelora", settings=SineSettings):
    """ΔW = (lora_alpha / r) sin(ω BA) / √n over a weight of shape (m, n), A Kaiming-uniform, B = 0.

    Source: Ji et al. (2025), Efficient Learning with Sine-Activated Low-Rank Matrices.
    """

    def peft_config(self, settings: SineSettings, common: Mapping[str, Any]) -> PeftConfig:
        """The `PhiConfig` of ΔW = s φ(BA) with φ(x) = α sin(ωx), where α = 1 / √n and ω do not train."""
        shared = {key: value for key, value in asdict(settings).items() if key != "frequency"}
        return PhiConfig(
            **{**shared, **common},
            basis="sinusoid",
            num_basis=1,
            omega_init=settings.frequency,
            learn_omega=False,
            amplitude_init="fan_in",
            identity_path=False,
            centre=False,
            gain=1.0,
        )
