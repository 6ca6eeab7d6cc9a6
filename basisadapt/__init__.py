"""basisadapt: a laboratory for learnable nonlinearities on low-rank updates, ΔW = φ(BA).

The public names load what they need when they are first used, so that `import basisadapt` is quick. After
`import basisadapt`, peft knows the method: `PeftModel.from_pretrained` loads a saved adapter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from basisadapt.core.errors import nearest
from basisadapt.core.peft_hook import register_with_peft

if TYPE_CHECKING:
    from basisadapt.adapter import PhiConfig as PhiConfig
    from basisadapt.adapter import PhiModel as PhiModel
    from basisadapt.adapter.learned import describe as describe
    from basisadapt.adapter.learned import plot as plot
    from basisadapt.adapter.optimizing import PhiCallback as PhiCallback
    from basisadapt.adapter.optimizing import before_step as before_step
    from basisadapt.adapter.optimizing import param_groups as param_groups
    from basisadapt.adapter.placement import Placement as Placement
    from basisadapt.core.errors import InputError as InputError
    from basisadapt.core.ranges import Range as Range
    from basisadapt.diagnostics.diagnostic import Diagnostic as Diagnostic
    from basisadapt.phi.basis import TransferBasis as TransferBasis
    from basisadapt.phi.grids import GridStrategy as GridStrategy
    from basisadapt.phi.sharing import AdaptedModule as AdaptedModule
    from basisadapt.phi.sharing import SharingPolicy as SharingPolicy
    from basisadapt.training.config import RunConfig as RunConfig
    from basisadapt.training.running import run as run

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptedModule": "basisadapt.phi.sharing",
    "Diagnostic": "basisadapt.diagnostics.diagnostic",
    "GridStrategy": "basisadapt.phi.grids",
    "InputError": "basisadapt.core.errors",
    "PhiCallback": "basisadapt.adapter.optimizing",
    "PhiConfig": "basisadapt.adapter",
    "PhiModel": "basisadapt.adapter",
    "Placement": "basisadapt.adapter.placement",
    "Range": "basisadapt.core.ranges",
    "RunConfig": "basisadapt.training.config",
    "SharingPolicy": "basisadapt.phi.sharing",
    "TransferBasis": "basisadapt.phi.basis",
    "before_step": "basisadapt.adapter.optimizing",
    "describe": "basisadapt.adapter.learned",
    "param_groups": "basisadapt.adapter.optimizing",
    "plot": "basisadapt.adapter.learned",
    "run": "basisadapt.training.running",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        near = nearest(name, __all__, alike=0.6)
        hint = f"; did you mean {near!r}?" if near else ""
        raise AttributeError(f"module 'basisadapt' has no attribute {name!r}{hint}")
    try:
        module = importlib.import_module(_PUBLIC[name])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"basisadapt.{name} needs {error.name}, which is not installed: pip install 'basisadapt[lab]'",
            name=error.name,
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
