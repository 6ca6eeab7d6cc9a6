"""The base classes of adapted linear layers and of models with them: the frozen layer, and merging into it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from basisadapt.core.errors import InputError, require
from basisadapt.phi.compiler import onload

DEQUANTISED = ("Params4bit", "Int8Params")  # classes of weights that peft can dequantize
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that are not quantized
PLAIN = (nn.Linear.forward, Conv1D.forward)
PRODUCTS = {
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.multi_head_attention_forward),
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm, Tensor.__matmul__, Tensor.__rmatmul__),
}


class BaseWeight(Tensor):
    """W as an adapted layer shows it to modules that read a weight instead of calling its layer.

    It has W's values, and raises InputError in a matrix product, which would lack ΔW. For a subclass of Tensor, torch's
    fast paths, such as that of nn.TransformerEncoderLayer, call the layer instead.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch calls it for every function of such a tensor. Raises InputError for a product."""
        if func in PRODUCTS:
            raise InputError(
                "the weight of an adapted layer was multiplied by, where the layer should have been called: the "
                "adapter would do nothing there; leave that layer out by exclude_modules"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class AdaptedLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """An adapted nn.Linear, or a transformers Conv1D, whose weight is stored transposed.

    A subclass's own forward, hooks, and a parametrized or pruned weight keep their effect: such a layer is called,
    and x ΔWᵀ is added, which is exact. It cannot be merged into.

    title: the method's name in messages. Raises InputError for another module, or a weight that it cannot adapt.
    """

    title: ClassVar[str]
    adapter_layer_names: ClassVar[tuple[str, ...]]  # of the dictionaries that hold the trained tensors, by adapter

    base_layer: nn.Linear  # or a Conv1D, which has the same members
    in_features: int
    out_features: int
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self._transposed = isinstance(base_layer, Conv1D)
        if not (isinstance(base_layer, nn.Linear) or self._transposed):
            raise InputError(
                f"module {name!r} is a {type(base_layer).__name__}; {self.title} adapts nn.Linear and Conv1D only"
            )
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise InputError(
                f"module {name!r} is inside an nn.MultiheadAttention, which reads its weight and never calls it: "
                f"{self.title} would do nothing there; leave it out by exclude_modules"
            )
        self.base_layer = cast(nn.Linear, base_layer)
        weight = self.base_layer.weight
        if is_lazy(weight):
            raise InputError(f"module {name!r} has no weight yet: call the model once before {self.title}")
        self._quantised = weight.dtype not in DTYPES
        if self._quantised and type(weight).__name__ not in DEQUANTISED:
            raise InputError(
                f"module {name!r} has a weight of dtype {weight.dtype}; of the quantized ones "
                f"{self.title} adapts those of bitsandbytes"
            )
        layer = self.base_layer
        sides = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
        if not self._quantised and self._matrix(weight).shape != sides:
            raise InputError(
                f"module {name!r} is a {type(base_layer).__name__} with a weight of shape {tuple(weight.shape)}; "
                f"{self.title} adapts matrices, {sides[0]} × {sides[1]} there"
            )
        self.out_features, self.in_features = sides
        self.name = name
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None

    @abstractmethod
    def update_layer(self, adapter: str, config: Any) -> None:
        """Add an adapter with the settings of `config`. Raises InputError if r exceeds the smaller side of W."""

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter in the layout of the base weight, in float32 (float64 for a float64 adapter)."""

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out_features, in_features); its own inverse."""
        return weight.T if self._transposed else weight

    @property
    def weight(self) -> Tensor:
        """The base weight, for modules that read it: see `BaseWeight`."""
        weight: Tensor = self.base_layer.weight
        idle = self.merged or self.disable_adapters or not any(map(self._holds, self.active_adapters))
        return weight if idle or type(weight) not in (Tensor, nn.Parameter) else weight.as_subclass(BaseWeight)

    def _is_plain(self) -> bool:
        """Whether the base layer does nothing but x Wᵀ + b, so that reading its weight does the same as calling it."""
        layer = self.base_layer
        return (type(layer).forward in PLAIN or self._quantised) and not (
            "forward" in layer.__dict__
            or "parametrizations" in layer._modules
            or layer._forward_pre_hooks
            or layer._forward_hooks
            or layer._backward_pre_hooks
            or layer._backward_hooks
        )

    def _call_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output for x. Raises InputError if x ΔWᵀ cannot be added to it."""
        y = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], self.out_features):
            found = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise InputError(
                f"{self.name!r}, a {type(self.base_layer).__name__}, gives {found} for an input of shape "
                f"{tuple(x.shape)}: {self.title} cannot be added to that; leave it out by exclude_modules"
            )
        return y

    def _check_rank(self, r: int) -> None:
        m, n = self.out_features, self.in_features
        require(r <= min(m, n), "r", r, f"at most {min(m, n)}, the smaller side of {self.name!r} ({m} × {n})")

    def _holds(self, adapter: str) -> bool:
        """Whether this layer has the adapter."""
        holders: nn.ParameterDict = getattr(self, self.adapter_layer_names[0])
        return adapter in holders

    def _onload(self) -> None:
        for holder in self.adapter_layer_names:
            onload(self.get_submodule(holder))

    @classmethod
    def refuse_mixed_batches(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise InputError if the arguments of a call name an adapter for each row of the batch."""
        if kwargs.get("adapter_names") is not None:
            raise InputError(f"{cls.title} does not support batches of mixed adapters (adapter_names)")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight; the original is kept, so that unmerge restores it bit for bit.

        Raises InputError and ValueError as `merged_weight`, before this layer changes.
        """
        adapters = list(filter(self._holds, check_adapters_to_merge(self, adapter_names)))
        merged, weight = self.merged_weight(adapters, safe_merge), self.base_layer.weight
        if not adapters:
            return
        if self._unmerged_weight is None:
            self._unmerged_weight = weight.detach().clone()
        weight.data.copy_(merged)
        self.merged_adapters += adapters

    @torch.no_grad()
    def merged_weight(self, adapters: Iterable[str], safe_merge: bool = False) -> Tensor:
        """The base weight plus ΔW of those `adapters` that this layer has and has not merged yet.

        Raises InputError for a quantized weight, and for a base layer that does more than x Wᵀ + b or recomputes its
        weight; ValueError if the sum exceeds the range of the weight's dtype (65,504 in float16), or with `safe_merge`
        if it is not finite for another reason.
        """
        if self._quantised:
            raise InputError(f"{self.name!r} has a quantized weight; load the base model unquantized to merge into it")
        weight: Tensor = self.base_layer.weight
        for adapter in adapters:
            if not self._holds(adapter) or adapter in self.merged_adapters:
                continue
            self._check_mergeable()
            delta = self.get_delta_weight(adapter)
            merged = (weight + delta).to(weight.dtype)
            if not merged.isfinite().all():
                self._refuse(adapter, weight, delta, safe_merge)
            weight = merged
        return weight

    def _check_mergeable(self) -> None:
        layer = self.base_layer
        if "parametrizations" in layer._modules or not isinstance(layer._parameters.get("weight"), nn.Parameter):
            what = "a weight that is made anew for every call"
        elif layer._forward_pre_hooks or layer._forward_hooks:
            what = "forward hooks, which would see ΔW too; remove them first"
        elif type(layer).forward not in PLAIN or ("forward" in layer.__dict__ and not _only_moves(layer)):
            what = "a forward of its own, which may do more than x Wᵀ + b"
        else:
            return
        raise InputError(f"{self.name!r}, a {type(layer).__name__}, cannot be merged into: it has {what}")

    def _refuse(self, adapter: str, weight: Tensor, delta: Tensor, safe_merge: bool) -> None:
        into = f"merging adapter {adapter!r} into {self.name!r} gives"
        if (weight + delta).isfinite().all():
            largest = torch.finfo(weight.dtype).max
            raise ValueError(f"{into} weights beyond {largest:g}, the largest number in {weight.dtype}")
        if safe_merge:
            raise ValueError(f"{into} NaN or infinite weights")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if self._unmerged_weight is not None:
            self.base_layer.weight.data.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()


def _only_moves(layer: nn.Module) -> bool:
    """Whether only accelerate has replaced its forward, to move weights and inputs to one device."""
    hook = getattr(layer, "_hf_hook", None)
    return all(isinstance(part, AlignDevicesHook) for part in getattr(hook, "hooks", [hook]))


class AdaptedModel(BaseTuner):  # type: ignore[misc]
    """A model with `AdaptedLinear` layers of the class `tuner_layer_cls`."""

    tuner_layer_cls: type[AdaptedLinear]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.tuner_layer_cls(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """The context in which peft calls the model, `generate` included.

        Raises InputError for a batch of mixed adapters, which peft would not pass on to the layers.
        """
        self.tuner_layer_cls.refuse_mixed_batches(kwargs)
        yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge in every layer. Raises what `AdaptedLinear.merge` raises, before any layer changes."""
        self._try_to_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The plain model with ΔW in its weights. Raises what `AdaptedLinear.merge` raises, before anything changes."""
        self._try_to_merge(adapter_names, safe_merge)
        return cast(nn.Module, super().merge_and_unload(progressbar, safe_merge, adapter_names))

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Raises InputError: the adapters of this package are summed where they act, and not into another adapter."""
        raise InputError(
            f"{self.tuner_layer_cls.title} does not support add_weighted_adapter, which joins factors: their ΔW need "
            "not be the sum, as φ of a sum is no sum; model.base_model.set_adapter([NAME, NAME]) adds ΔW of several "
            "adapters up, and merge_and_unload(adapter_names=[NAME, NAME]) merges the sum"
        )

    def _try_to_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        # Every ΔW is computed twice: to undo half a merge would need a copy of all adapted weights.
        for layer in self.model.modules():
            if isinstance(layer, AdaptedLinear):
                with onload_layer(layer):
                    layer.merged_weight(layer.active_adapters if adapter_names is None else adapter_names, safe_merge)
