"""One adapted module: the frozen linear layer, A and B of each adapter, and φ from the bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional as F

from basisadapt.adapter.config import PhiConfig
from basisadapt.adapter.linear import AdaptedLinear
from basisadapt.core.errors import InputError
from basisadapt.phi.choice import compute_dtype
from basisadapt.phi.compiler import Compiler
from basisadapt.phi.operators import Link, linked_linear, traced_linear
from basisadapt.phi.weight import Weight, adapted_linear, delta_weight


class PhiLinear(AdaptedLinear):
    """y = x (W + ΔW)ᵀ + b over an nn.Linear, or a transformers Conv1D, whose weight is stored transposed.

    A base layer that does more, by its own forward or by hooks, gives y = base(x) + x ΔWᵀ: see `AdaptedLinear`. A layer
    outside the placement, with rest="lora", has ΔW = s BA, computed as s (x Aᵀ) Bᵀ.
    """

    adapter_layer_names = ("phi_A", "phi_B")
    other_param_names = ("phi_dropout", "phi_settings", "phi_source", "phi_link")

    title = "φ(BA)"

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.phi_A = nn.ParameterDict()
        self.phi_B = nn.ParameterDict()
        self.phi_dropout = nn.ModuleDict()
        self.phi_settings: dict[str, PhiConfig] = {}
        # By the adapters with φ here. Not submodules: φ's tables belong to the model, one bank for all layers.
        self.phi_source: dict[str, Compiler] = {}
        self.phi_link: dict[str, Link] = {}

    def update_layer(self, adapter: str, config: PhiConfig) -> None:
        """Add an adapter. Raises InputError if r exceeds the smaller side of the weight."""
        self._check_rank(config.r)
        self.phi_settings[adapter] = config
        self.phi_dropout[adapter] = nn.Dropout(config.dropout)
        # Drawn in the order of peft's LoRA, whose two nn.Linear draw first: one seed gives both methods the same A,
        # which is Kaiming-uniform with a = √5, that is U(−1/√n, 1/√n).
        factor_a = nn.Linear(self.in_features, config.r, bias=False).weight
        factor_b = nn.Linear(config.r, self.out_features, bias=False).weight
        nn.init.kaiming_uniform_(factor_a, a=math.sqrt(5))
        if config.factor_init == "lora":
            nn.init.zeros_(factor_b)
        self.phi_A[adapter], self.phi_B[adapter] = factor_a, factor_b
        self._move_adapter_to_device_of_base_layer(adapter)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its layer's device, as peft does after loading, together with φ's tables."""
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter_name, device)
        source = self.phi_source.get(adapter_name)
        target = device or self.base_layer.weight.device
        if source is not None and not (source.bank.alpha.is_meta or target.type == "meta"):
            source.bank.to(target)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, and train them unless `inference_mode`; φ's tables follow A and B."""
        super().set_adapter(adapter_names, inference_mode)
        self.train_tables()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; those that are off do not train, nor do their tables of φ."""
        super().enable_adapters(enabled)
        self.train_tables()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze these adapters and their tables of φ."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.train_tables()

    def train_tables(self) -> None:
        """Train φ's tables if A trains: they lie outside the layer, where peft does not look for them."""
        for name, source in self.phi_source.items():
            source.bank.requires_grad_(self.phi_A[name].requires_grad)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter in the layout of the base weight, in float32 (float64 for a float64 adapter)."""
        if adapter not in self.phi_source:
            return self.get_product(adapter)
        source = self.phi_source[adapter]
        evaluator = source.fresh(self.name)  # may load offloaded A and B
        A, B = self.phi_A[adapter], self.phi_B[adapter]
        return self._matrix(delta_weight(A, B, evaluator, source.backend(A.device)))

    def get_product(self, adapter: str) -> Tensor:
        """s BA of one adapter, LoRA's update, in the layout and dtype of `get_delta_weight`."""
        A, B = self.phi_A[adapter], self.phi_B[adapter]
        dtype = compute_dtype(A)
        return self._matrix(self.phi_settings[adapter].scaling * (B.to(dtype) @ A.to(dtype)))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer. Several active adapters add their ΔW. Raises InputError for a batch of mixed adapters."""
        if torch.compiler.is_compiling() and not self._in_graphs():
            return cast(Tensor, self._outside_graphs(x, *args, **kwargs))
        return self._forward(x, *args, **kwargs)

    def _in_graphs(self) -> bool:
        """Whether torch.compile can trace the forward pass. It traces this method too, so all layers give one graph."""
        refuse_export()
        linked = all(self.phi_link[name].row is not None for name in self.active_adapters if name in self.phi_link)
        unmerges = self.disable_adapters and self.merged
        return linked and not unmerges and not self._quantised and self._is_plain()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside_graphs(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.refuse_mixed_batches(kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.phi_A]
        if self.disable_adapters or self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        # From the meta device, accelerate brings the weight back for the base layer's own forward pass alone.
        stored = self.base_layer._parameters.get("weight")
        offloaded = stored is not None and stored.is_meta
        if offloaded:
            self._onload()
        reads = self._is_plain() and not offloaded
        fused = next((name for name in active if self._fuses(name)), None) if reads else None
        y: Tensor
        if fused is None:
            y = self._call_base(x, *args, **kwargs)
        else:
            y = self._adapted(fused, x, self._weight(x.dtype), self.base_layer.bias)
        for name in active:
            if name != fused:
                y = y + self._update(name, self.phi_dropout[name](x)).to(y.dtype)
        return y

    def _fuses(self, adapter: str) -> bool:
        drops = self.training and self.phi_settings[adapter].dropout > 0
        return adapter in self.phi_source and not drops

    def _weight(self, dtype: torch.dtype) -> Weight:
        if not self._quantised:
            return self._matrix(self.base_layer.weight)
        # The backward pass dequantizes again: a quantized model has no memory for its full weights.
        return lambda: cast(Tensor, dequantize_module_weight(self.base_layer)).to(dtype)

    def _update(self, adapter: str, x: Tensor) -> Tensor:
        """x ΔWᵀ of one adapter."""
        if adapter in self.phi_source:
            return self._adapted(adapter, x, None, None)
        A, B = self.phi_A[adapter], self.phi_B[adapter]
        return self.phi_settings[adapter].scaling * F.linear(F.linear(x.to(A.dtype), A), B)

    def _adapted(self, adapter: str, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            link = self.phi_link[adapter]
            assert link.row is not None and link.key is not None and not callable(weight)
            layer = x, weight, bias, self.phi_A[adapter], self.phi_B[adapter]
            if link.traced is not None:
                return traced_linear(*layer, link)
            return linked_linear(*layer, link.row, link.key)
        if "_is_replica" in self.__dict__:
            raise InputError(
                "φ(BA) does not work under nn.DataParallel, whose copies of the layers lie apart from φ's tables; use "
                "DistributedDataParallel (torchrun or accelerate launch), or one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        # Direct reads: a look-up in nn.ParameterDict takes microseconds.
        A: Any = self.phi_A._parameters[adapter]
        B: Any = self.phi_B._parameters[adapter]
        function = self.phi_source[adapter].function(self.name, A, B)
        return adapted_linear(x, weight, bias, A, B, function.evaluator, function.execution)


def refuse_export() -> None:
    """Raise InputError within torch.export. A graph of torch.compile can trace this too."""
    # torch.compiler.is_exporting() is always true inside a graph before torch 2.13.
    if getattr(torch.compiler, "_is_exporting_flag", False):
        raise InputError(
            "a model with φ(BA) is not exported, since φ is compiled anew whenever it changes: export the plain model "
            "that merge_and_unload() gives"
        )
