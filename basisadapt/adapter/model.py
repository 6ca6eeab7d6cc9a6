"""PhiModel: φ(BA) in a whole model, as peft injects it. Holds the banks, one per adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from basisadapt.adapter.config import PhiConfig
from basisadapt.adapter.honored import watch
from basisadapt.adapter.layer import PhiLinear, refuse_export
from basisadapt.adapter.linear import AdaptedModel
from basisadapt.adapter.placement import describe, target_pattern
from basisadapt.core.errors import InputError, refusing, unknown
from basisadapt.phi.bank import TransferBank
from basisadapt.phi.compiler import Compiler


class PhiModel(AdaptedModel):
    """A model with φ(BA) adapters; made by `peft.get_peft_model(model, PhiConfig(...))`.

    `phi_bank` holds the tables of φ, since modules may share them. The overrides here keep the banks in step with the
    layers.
    """

    prefix = "phi_"
    tuner_layer_cls = PhiLinear
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Insert the layers of `adapter_name`, then build its bank for those with φ.

        Raises InputError for a placement or target modules that the model does not have, and if other modules already
        have an adapter of this name. Warns of a target that no module has among others that some have.
        """
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = target_pattern(config.placement, model)
        _check_targets(config.target_modules, model)
        if config.rest == "lora":
            with refusing('rest "lora" is put into all projections', InputError):
                self._projections = re.compile(target_pattern("all", model))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if "phi_bank" not in self._modules:  # the layers of a model that was adapted before have their banks
            known = {name: source.bank for layer in self._layers() for name, source in layer.phi_source.items()}
            self.phi_bank = nn.ModuleDict(known)
        inserted = [layer for layer in self._layers() if adapter_name in layer.phi_A]
        layers = [layer for layer in inserted if check_target_module_exists(config, layer.name)]
        if not inserted:
            return
        if not layers:
            raise InputError(f"target_modules {config.target_modules!r} match no module: φ would be nowhere")
        if left := [layer.name for layer in inserted if adapter_name in layer.phi_source and layer not in layers]:
            raise InputError(
                f"the model has an adapter {adapter_name!r} in {left[0]!r}, where the new one is not; "
                "unload() it first, or give the new one another name"
            )
        bank = TransferBank(config, [replace(describe(layer.name), in_features=layer.in_features) for layer in layers])
        if any(layer.base_layer.weight.dtype == torch.float64 for layer in layers):
            bank.double()
        self.phi_bank[adapter_name] = bank
        watch(bank, config)
        modules = {layer.name: (layer.phi_A, layer.phi_B, layer.base_layer) for layer in layers}
        compiler = Compiler(bank, adapter_name, modules, config.backend, config.tolerance, config.dense)
        for layer in layers:
            layer.phi_source[adapter_name] = compiler
            layer.phi_link[adapter_name] = compiler.links[layer.name]
        layers[0]._move_adapter_to_device_of_base_layer(adapter_name)
        for layer in self._layers():
            layer.train_tables()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Compile φ of all modules if anything has changed since the last call of the model.

        Raises InputError within torch.export.
        """
        refuse_export()
        with super()._enable_peft_forward_hooks(*args, **kwargs), ExitStack() as stack:
            for compiler in self._compilers():
                stack.enter_context(compiler.compiled())
            yield

    def _compilers(self) -> Iterator[Compiler]:
        """The compilers of the adapters in use."""
        found = {}
        for layer in self._layers():
            if not (layer.merged or layer.disable_adapters):
                for name in layer.active_adapters:
                    if name in layer.phi_source and name not in found:
                        found[name] = layer.phi_source[name]
            if len(found) == len(self.phi_bank):  # usually after the first layer of many
                break
        yield from found.values()

    def _layers(self) -> Iterator[PhiLinear]:
        return (module for module in self.model.modules() if isinstance(module, PhiLinear))

    def _check_target_module_exists(self, peft_config: PhiConfig, key: str) -> Any:
        """Whether a module is adapted, with φ or, outside the placement, with BA alone; never if it is excluded."""
        found = check_target_module_exists(peft_config, key)
        unmatched = found is None or found is False
        return self._projections.fullmatch(key) if unmatched and peft_config.rest == "lora" else found

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its bank."""
        super().delete_adapter(adapter_name)
        for layer in self._layers():  # peft skips layers whose full names contain the prefix
            BaseTunerLayer.delete_adapter(layer, adapter_name)
        # peft asks only the first layer, which need not have any of the remaining adapters.
        self.active_adapter = next((layer.active_adapters for layer in self._layers() if layer.active_adapters), [])
        if adapter_name in self.phi_bank:
            del self.phi_bank[adapter_name]


def _check_targets(targets: str | Collection[str], model: nn.Module) -> None:
    """Warn of a target that no module has. Raises InputError if no module has any."""
    if isinstance(targets, str):  # a pattern
        return
    names = [name for name, _ in model.named_modules()]
    absent = [one for one in targets if not any(name == one or name.endswith(f".{one}") for name in names)]
    if not absent:
        return
    error = unknown("module in target_modules", min(absent), {name.rpartition(".")[2] for name in names} - {""})
    if len(absent) == len(targets):
        raise error
    warnings.warn(f"{error}; it is left out", stacklevel=2)
