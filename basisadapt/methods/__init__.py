"""The methods a run may use, each a peft configuration made from its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from basisadapt.phi.settings import LowRankSettings, PhiSettings

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Method:
    """A method: the settings it has, and how they become a peft configuration.

    peft_config: of settings, a task type such as "SEQ_CLS", and the full names of the model's modules.
    """

    settings: type[LowRankSettings]
    peft_config: Callable[[Any, str, Iterable[str]], PeftConfig]


def _lora(settings: LowRankSettings, task_type: str, names: Iterable[str]) -> PeftConfig:
    """LoRA (Hu et al., 2022), peft's own: ΔW = (lora_alpha / r) BA."""
    from peft import LoraConfig

    from basisadapt.adapter.placement import target_pattern

    return LoraConfig(
        task_type=task_type,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or target_pattern(settings.placement, names),
    )


def _phi(settings: PhiSettings, task_type: str, names: Iterable[str]) -> PeftConfig:
    """φ(BA), ours; it finds its modules when it is put into the model."""
    from basisadapt.adapter import PhiConfig

    return PhiConfig(task_type=task_type, **asdict(settings))


METHODS = {"lora": Method(LowRankSettings, _lora), "phi": Method(PhiSettings, _phi)}
