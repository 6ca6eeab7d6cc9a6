"""The methods a run may use, each a peft configuration made from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from basisadapt.phi.settings import LowRankSettings, PhiSettings

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Method:
    """A method: the settings it has, and how they become a peft configuration for a task type such as "SEQ_CLS"."""

    settings: type[LowRankSettings]
    peft_config: Callable[[Any, str], PeftConfig]


def _lora(settings: LowRankSettings, task_type: str) -> PeftConfig:
    """LoRA (Hu et al., 2022), peft's own: ΔW = (lora_alpha / r) BA."""
    from peft import LoraConfig

    from basisadapt.adapter.placement import target_pattern

    return LoraConfig(
        task_type=task_type,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or target_pattern(settings.placement),
    )


def _phi(settings: PhiSettings, task_type: str) -> PeftConfig:
    """φ(BA), ours."""
    from basisadapt.adapter import PhiConfig

    return PhiConfig(task_type=task_type, **asdict(settings))


METHODS = {"lora": Method(LowRankSettings, _lora), "phi": Method(PhiSettings, _phi)}
