"""The common form of the methods that peft lacks, y = x Wᵀ + b + s g(x Aᵀ) Bᵀ, as a peft method.

A method consists of three subclasses: of `ProductLinear`, its formula; of `ProductConfig`, its settings, which
registers it with peft; and of `ProductMethod`. If ΔW is not a product of thin matrices, the first is an `AddedLinear`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from basisadapt.adapter.linear import AdaptedLinear, AdaptedModel
from basisadapt.adapter.peft_type import peft_type, register
from basisadapt.adapter.saved import CheckedConfig
from basisadapt.core.errors import InputError
from basisadapt.methods.method import PeftMethod
from basisadapt.phi.choice import compute_dtype
from basisadapt.phi.settings import LowRankSettings


class AddedLinear(AdaptedLinear):
    """y = x Wᵀ + b + s f(x) for a base weight W (m, n), with the trained tensors named in `adapter_layer_names`."""

    other_param_names: ClassVar[tuple[str, ...]] = ("settings", "dropout")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for tensor in self.adapter_layer_names:
            self.add_module(tensor, nn.ParameterDict())
        self.settings: dict[str, Any] = {}
        self.dropout = nn.ModuleDict()

    @abstractmethod
    def start(self, adapter: str, settings: Any) -> Mapping[str, Tensor]:
        """The trained tensors at the start, by name. Frozen tensors are made here too."""

    @abstractmethod
    def added(self, adapter: str, x: Tensor) -> Tensor:
        """f(x) in the dtype of the trained tensors, shape (..., m), for x of shape (..., n)."""

    def update_layer(self, adapter: str, settings: Any) -> None:
        """Add an adapter with these settings. Raises InputError if r exceeds the smaller side of the weight."""
        self._check_rank(settings.r)
        self.settings[adapter] = settings
        self.dropout[adapter] = nn.Dropout(settings.dropout)
        for name, tensor in self.start(adapter, settings).items():
            self._by_adapter(name)[adapter] = nn.Parameter(tensor)
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=settings.inference_mode)

    def trained(self, adapter: str) -> Iterator[Tensor]:
        """The trained tensors, in the order of `adapter_layer_names`."""
        return (self._by_adapter(name)[adapter] for name in self.adapter_layer_names)

    def _by_adapter(self, name: str) -> nn.ParameterDict:
        return cast(nn.ParameterDict, self.get_submodule(name))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of shape (..., m) for x of shape (..., n); the updates of several active adapters add up.

        Raises InputError for a batch of mixed adapters.
        """
        self.refuse_mixed_batches(kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        y = self._call_base(x, *args, **kwargs)
        stored = self.base_layer._parameters.get("weight")
        if stored is not None and stored.is_meta:
            self._onload()
        for adapter in filter(self._holds, self.active_adapters):
            y = y + (self.settings[adapter].scaling * self.added(adapter, self.dropout[adapter](x))).to(y.dtype)
        return y


class ProductLinear(AddedLinear):
    """f(x) = g(x Aᵀ) Bᵀ with A (k, n) and B (m, k). If g is linear, ΔW = s B g(Aᵀ)ᵀ.

    not_a_weight: for a nonlinear g, the reason why there is no ΔW, as a part of a sentence; None otherwise.
    """

    not_a_weight: ClassVar[str | None] = None

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (k, n) and B (m, k), differentiable in the trained tensors; the first two of them unless overridden."""
        A, B, *_ = self.trained(adapter)
        return A, B

    def bottleneck(self, adapter: str, h: Tensor) -> Tensor:
        """g(h) for h = x Aᵀ, both of shape (..., k); h itself unless a method overrides it."""
        return h

    def added(self, adapter: str, x: Tensor) -> Tensor:
        """f(x) = g(x Aᵀ) Bᵀ, shape (..., m), for x of shape (..., n)."""
        A, B = self.factors(adapter)
        return F.linear(self.bottleneck(adapter, F.linear(x.to(A.dtype), A)), B)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of evaluation mode, in the layout of the base weight and at least float32.

        Raises InputError for a method without ΔW.
        """
        if self.not_a_weight is not None:
            raise InputError(f"{self.title} {self.not_a_weight}, so it has no ΔW and cannot be merged")
        training = self.training
        self.training = False
        A, B = self.factors(adapter)
        h = self.bottleneck(adapter, A.T)
        self.training = training
        dtype = compute_dtype(A)
        return self._matrix(self.settings[adapter].scaling * (B.to(dtype) @ h.T.to(dtype)))


@dataclass(kw_only=True)
class ProductConfig(LowRankSettings, CheckedConfig):
    """Settings and peft configuration in one. Subclass it, after the settings, with the method's name and its layer."""

    method: ClassVar[str]

    def __init_subclass__(cls, *, method: str, layer: type[AddedLinear], **kwargs: Any) -> None:
        """Register the method with peft. The names of the layer's trained tensors must begin with the method's and "_".

        Raises as `register`.
        """
        super().__init_subclass__(**kwargs)
        cls.method = method
        members = {"prefix": f"{method}_", "tuner_layer_cls": layer}
        register(method, cls, type(f"{layer.title}Model", (AdaptedModel,), members))

    def __post_init__(self) -> None:
        CheckedConfig.__post_init__(self)
        LowRankSettings.__post_init__(self)
        self.peft_type = peft_type(self.method)


class ProductMethod(PeftMethod):
    """A method whose layers are an `AddedLinear`. Subclass it with the `config` that holds its settings."""

    config: ClassVar[type[ProductConfig]]

    def __init_subclass__(cls, *, config: type[ProductConfig], **kwargs: Any) -> None:
        """Register the class as `Method` does, with the class of its peft configuration."""
        super().__init_subclass__(**kwargs)
        cls.config = config

    def peft_config(self, settings: LowRankSettings, common: Mapping[str, Any]) -> PeftConfig:
        """The method's `config` with these settings."""
        return self.config(**{**asdict(settings), **common})


def kaiming(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """LoRA's start of A: uniform on [−1 / √columns, 1 / √columns], shape (rows, columns), float32.

    Without a generator it is drawn from torch's global one.
    """
    drawn = 2 * torch.rand(rows, columns, generator=generator) - 1
    return drawn / math.sqrt(columns)
