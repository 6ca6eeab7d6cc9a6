"""The contract of a method: how it enters a model, what it trains there, and what it does between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from basisadapt.adapter.placement import target_pattern
from basisadapt.backbones import HEADS
from basisadapt.core.errors import InputError
from basisadapt.core.registry import Registry
from basisadapt.core.settings import seed
from basisadapt.diagnostics.diagnostic import means
from basisadapt.phi.settings import LowRankSettings

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

METHODS: Registry[Method] = Registry("method")
ADAPTER = "default"  # peft's name for the adapter of a run


@dataclass(kw_only=True)
class RandomBasisSettings(LowRankSettings):
    """A method whose random matrices are frozen. basis_seed: they follow from it; None takes the run's seed, or 0."""

    basis_seed: int | None = seed()


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that train in a way of their own.

    parameters: of the model, none of them in another group. lr: their learning rate. weight_decay: decoupled.
    transfer: whether they are counted as parameters.transfer, a learned function's, and not as parameters.factors.
    """

    parameters: Sequence[nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    transfer: bool = False


@dataclass(frozen=True)
class Description:
    """What a method has to say of an adapted layer. Where a value is not finite, none of it is taken.

    numbers: by name. curve: of a learned function, its arguments "z" and its values "phi", equally many; or empty.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)


class Method(ABC):
    """A way to fine-tune a model. Subclass it with a name and the class of its `settings`; an object serves one run.

    bounded: whether r must not exceed the smaller side of an adapted weight. quantisable: whether it trains on a
    backbone with quantised weights.
    """

    settings: ClassVar[type[LowRankSettings]]
    bounded: ClassVar[bool]
    quantisable: ClassVar[bool]

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        settings: type[LowRankSettings] = LowRankSettings,
        bounded: bool = True,
        quantisable: bool = True,
        **kwargs: Any,
    ) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        cls.settings, cls.bounded, cls.quantisable = settings, bounded, quantisable
        if name is not None:
            METHODS.add(name, cls)

    @abstractmethod
    def attach(self, model: PreTrainedModel, settings: Any, task_type: str | None) -> PreTrainedModel | PeftModel:
        """The model, changed in place, with exactly what this method trains set to train.

        task_type: in peft's words, such as "SEQ_CLS", or None where it has none; the task's head, if there is one,
        trains as well. Raises InputError for a placement or a rank that the model does not have.
        """

    def parameter_groups(self, model: Any, settings: Any, lr: float) -> Sequence[ParameterGroup]:
        """What does not train at the run's own rate `lr` and decay; all else that trains does."""
        return ()

    def weight_change(self, layer: Any) -> Tensor | None:
        """ΔW of an adapted layer, shape of its weight; None where there is no such matrix to look at."""
        delta: Tensor = layer.get_delta_weight(ADAPTER)
        return delta

    def describe(self, layer: Any) -> Description:
        """What there is to say of an adapted layer beside its ΔW. Only reads, and draws no random numbers."""
        return Description()

    def measure(self, layer: Any, change: Tensor) -> Mapping[str, float]:
        """Further numbers of an adapted layer and its ΔW, taken once, at the end of a run; finite ones are kept.

        change: what `weight_change` gives, its entries finite. Only reads, and draws no random numbers.
        """
        return {}

    def summary(self, numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of a run, from what `describe` and `measure` gave of its modules: the mean of each."""
        return means(numbers)

    def why_constant(self, settings: Any) -> str:
        """A sentence that says why most updates may have become one constant; empty where nothing is known."""
        return ""

    def before_step(self, model: Any, settings: Any, step: int, total: int) -> None:
        """Called when the gradients are there, clipped, that the optimiser makes step number `step` of `total` with."""
        return

    def after_step(self, model: Any, settings: Any, step: int, total: int) -> None:
        """Called when the optimiser has made step number `step` of `total`, with the gradients still there."""
        return


class PeftMethod(Method):
    """A method that is a peft configuration."""

    @abstractmethod
    def peft_config(self, settings: Any, common: Mapping[str, Any]) -> PeftConfig:
        """The configuration; `common` is what all share: task_type and target_modules."""

    def attach(self, model: PreTrainedModel, settings: Any, task_type: str | None) -> PeftModel:
        """The model with the adapter in it."""
        return put_into(model, settings, task_type, self.peft_config)


def put_into(
    model: PreTrainedModel,
    settings: LowRankSettings,
    task_type: str | None,
    peft_config: Callable[[Any, Mapping[str, Any]], PeftConfig],
) -> PeftModel:
    """The model with an adapter in it, where the settings want it. Raises InputError as `Method.attach`."""
    import peft

    names = [name for name, _ in model.named_modules()]
    targets = settings.target_modules or target_pattern(settings.placement, model)
    common = {"task_type": task_type, "target_modules": targets}
    if task_type is None:  # peft finds a head by the task's type
        common["modules_to_save"] = [name for name in HEADS if name in names]
    try:
        return peft.get_peft_model(model, peft_config(settings, common))
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # peft's answer to target modules that match nothing, or the head
        raise InputError(f"adapter.target_modules {targets}: {' '.join(str(error).split())}") from error
