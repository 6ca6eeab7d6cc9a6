"""PhiModel: φ(BA) in a whole model, as peft injects it. Holds the banks, one per adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from basisadapt.adapter.config import PhiConfig
from basisadapt.adapter.layer import PhiLinear
from basisadapt.adapter.placement import PROJECTION, describe, target_pattern
from basisadapt.errors import InputError
from basisadapt.phi.bank import TransferBank
from basisadapt.phi.choice import default_tolerance
from basisadapt.phi.compiler import Compiler


class PhiModel(BaseTuner):  # type: ignore[misc]
    """A model with φ(BA) adapters; made by `peft.get_peft_model(model, PhiConfig(...))`.

    The tables of φ live here, in `phi_bank`, since modules may share them. peft's class is made to be extended by
    overriding; each override here keeps the banks in step with the layers.
    """

    prefix = "phi_"
    tuner_layer_cls = PhiLinear
    uses_shared_state = True
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Find where `adapter_name` goes, insert its layers, then build its bank over those with φ.

        Raises InputError for a placement that the model does not have.
        """
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = target_pattern(config.placement, (name for name, _ in model.named_modules()))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if "phi_bank" not in self._modules:
            self.phi_bank = nn.ModuleDict()
        inserted = list(self._layers(adapter_name))
        layers = [layer for layer in inserted if check_target_module_exists(config, layer.name)]
        if not inserted:
            return
        if not layers:
            raise InputError(f"target_modules {config.target_modules!r} match no module: φ would be nowhere")
        bank = TransferBank(config, [replace(describe(layer.name), in_features=layer.in_features) for layer in layers])
        if layers[0].base_layer.weight.dtype == torch.float64:
            bank.double()
        self.phi_bank[adapter_name] = bank
        factors = {layer.name: (layer.phi_A, layer.phi_B) for layer in layers}
        tolerance = config.tolerance or default_tolerance(layers[0].base_layer.weight.dtype)
        compiler = Compiler(bank, adapter_name, factors, config.backend, tolerance)
        for layer in layers:
            layer.phi_source[adapter_name] = compiler
        layers[0]._move_adapter_to_device_of_base_layer(adapter_name)
        self._train_banks(config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model. Compiles φ of all modules first, whatever has changed them since the last call."""
        self._refresh()
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted language model writes; compiles φ first, as `forward` does, which it does not pass."""
        self._refresh()
        return self.model.generate(*args, **kwargs)

    def _refresh(self) -> None:
        for compiler in self._compilers():
            compiler.refresh()

    def _compilers(self) -> Iterator[Compiler]:
        """Those of the adapters at work."""
        found = {}
        for module in self.model.modules():
            if isinstance(module, PhiLinear) and not (module.merged or module.disable_adapters):
                for name in module.active_adapters:
                    if name in module.phi_source and name not in found:
                        found[name] = module.phi_source[name]
        yield from found.values()

    def _layers(self, adapter: str) -> Iterator[PhiLinear]:
        for module in self.model.modules():
            if isinstance(module, PhiLinear) and adapter in module.phi_A:
                yield module

    @staticmethod
    def _check_target_module_exists(peft_config: PhiConfig, key: str) -> Any:
        """Whether a module is adapted: with φ, or as the rest, with BA alone. What is excluded stays so."""
        found = check_target_module_exists(peft_config, key)
        unmatched = found is None or found is False
        return PROJECTION.fullmatch(key) if unmatched and peft_config.rest == "lora" else found

    def _create_and_replace(
        self,
        peft_config: PhiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, PhiLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = PhiLinear(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _train_banks(self, inference_mode: bool = False) -> None:
        for name, bank in self.phi_bank.items():
            bank.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; φ of the others stops training."""
        super().set_adapter(adapter_name, inference_mode)
        if "phi_bank" in self._modules:
            self._train_banks(inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Freeze or train these adapters, φ included."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.phi_bank:
                self.phi_bank[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its bank."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.phi_bank:
            del self.phi_bank[adapter_name]
        self._train_banks()
