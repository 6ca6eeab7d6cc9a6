"""The contract of a method: how it enters a model, what it trains there, and what it does between steps."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from basisadapt.adapter.placement import target_pattern
from basisadapt.backbones import HEADS
from basisadapt.core.errors import InputError
from basisadapt.core.registry import Registered, Registry
from basisadapt.core.settings import seed
from basisadapt.diagnostics.diagnostic import means
from basisadapt.phi.settings import LowRankSettings

METHODS: Registry[Method] = Registry("method")
ADAPTER = "default"  # peft's name for the adapter of a run


@dataclass(kw_only=True)
class RandomBasisSettings(LowRankSettings):
    """The settings of `LowRankSettings` and, for a method with frozen random matrices:

    - `basis_seed` (int or None, default None): the seed of these matrices; None uses the run's seed, or 0 outside a
      run.
    """

    basis_seed: int | None = seed()


def random_basis_config(cls: Any, settings: RandomBasisSettings, **own: Any) -> PeftConfig:
    """The configuration `cls` of peft for frozen matrices that follow from basis_seed and are not saved."""
    key = settings.basis_seed or 0
    with warnings.catch_warnings():  # peft warns that other machines may draw other numbers from the seed
        warnings.simplefilter("ignore", UserWarning)
        config: PeftConfig = cls(r=settings.r, projection_prng_key=key, save_projection=False, **own)
    return config


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate and weight decay of their own.

    - `parameters`: parameters of the model that are in no other group.
    - `lr` (float): their learning rate.
    - `weight_decay` (float, default 0): decoupled weight decay.
    - `transfer` (bool, default False): count them as parameters.transfer, of a learned function, instead of
      parameters.factors.
    """

    parameters: Sequence[nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    transfer: bool = False


@dataclass(frozen=True)
class Description:
    """A method's own measurements of an adapted layer. If any value is not finite, all of it is dropped.

    - `numbers`: values by name.
    - `curve`: a learned function, as "z" (arguments) and "phi" (values) of equal length; empty without one.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)


class Method(Registered, ABC):
    """A way to fine-tune a model. Subclass it with a name and the class of its `settings`; an instance serves one run.

    - `settings`: the dataclass of its settings, `LowRankSettings` by default.
    - `bounded` (default True): r must not exceed the smaller side of an adapted weight.
    - `quantisable` (default True): the method can train on a backbone with quantized weights.
    """

    registry = METHODS
    settings: ClassVar[type[LowRankSettings]]
    bounded: ClassVar[bool]
    quantisable: ClassVar[bool]

    def __init_subclass__(
        cls,
        *,
        settings: type[LowRankSettings] = LowRankSettings,
        bounded: bool = True,
        quantisable: bool = True,
        **kwargs: Any,
    ) -> None:
        """Register the class as `Registered` does, with what the class says of a method."""
        cls.settings, cls.bounded, cls.quantisable = settings, bounded, quantisable
        super().__init_subclass__(**kwargs)

    @abstractmethod
    def attach(self, model: PreTrainedModel, settings: Any, task_type: str | None) -> PreTrainedModel | PeftModel:
        """The model, changed in place; requires_grad is set for exactly the parameters that this method trains.

        task_type: peft's name for the task, such as "SEQ_CLS", or None if it has none. The task's head, if there is
        one, trains as well. Raises InputError for a placement that matches no module, or a rank that does not fit.
        """

    def parameter_groups(self, model: Any, settings: Any, lr: float) -> Sequence[ParameterGroup]:
        """The parameters with rates or decays of their own. All others train at the run's rate `lr` and its decay."""
        return ()

    def weight_change(self, layer: Any) -> Tensor | None:
        """ΔW of an adapted layer, in the shape of its weight; None if the method has no such matrix."""
        return cast(Tensor, layer.get_delta_weight(ADAPTER))

    def describe(self, layer: Any) -> Description:
        """The method's own measurements of an adapted layer, besides those of ΔW.

        It changes nothing and draws no random numbers.
        """
        return Description()

    def measure(self, layer: Any, change: Tensor) -> Mapping[str, float]:
        """Further numbers of an adapted layer and its ΔW, measured once, at the end of a run; finite ones are kept.

        change: the result of `weight_change`, with finite entries. It changes nothing and draws no random numbers.
        """
        return {}

    def summary(self, numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of a run from the numbers that `describe` and `measure` gave for the modules: the mean of each.

        numbers: one mapping for each module that has any.
        """
        return means(numbers)

    def why_constant(self, settings: Any) -> str:
        """A sentence that explains why most updates may have become constant matrices; empty if no cause is known."""
        return ""

    def before_step(self, model: Any, settings: Any, step: int, total: int) -> None:
        """Called before the optimizer's step number `step` of `total`, when the clipped gradients are available."""
        return

    def after_step(self, model: Any, settings: Any, step: int, total: int) -> None:
        """Called after the optimizer's step number `step` of `total`, while the gradients are still available."""
        return


class PeftMethod(Method):
    """A method that peft attaches, given by its peft configuration."""

    @abstractmethod
    def peft_config(self, settings: Any, common: Mapping[str, Any]) -> PeftConfig:
        """The configuration. common: the arguments that all configurations share, task_type and target_modules."""

    def attach(self, model: PreTrainedModel, settings: Any, task_type: str | None) -> PeftModel:
        """Attach the adapter of `peft_config`. Raises InputError as `Method.attach`."""
        return put_into(model, settings, task_type, self.peft_config)


def put_into(
    model: PreTrainedModel,
    settings: LowRankSettings,
    task_type: str | None,
    peft_config: Callable[[Any, Mapping[str, Any]], PeftConfig],
) -> PeftModel:
    """The model with the adapter of `peft_config` in the modules that the settings name.

    Raises InputError as `Method.attach`.
    """
    names = [name for name, _ in model.named_modules()]
    targets = settings.target_modules or target_pattern(settings.placement, model)
    common = {"task_type": task_type, "target_modules": targets}
    if task_type is None:  # peft finds a head only by the task's type
        common["modules_to_save"] = [name for name in HEADS if name in names]
    try:
        return get_peft_model(model, peft_config(settings, common))
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # what peft raises for target modules that match nothing, or the head
        raise InputError(f"adapter.target_modules {targets}: {' '.join(str(error).split())}") from error
