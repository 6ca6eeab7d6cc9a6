"""basisadapt: a laboratory for learnable nonlinearities on low-rank updates, ΔW = φ(BA).

The public names load what they need when they are first used, so that `import basisadapt` is quick. After
`import basisadapt`, peft knows the method: `PeftModel.from_pretrained` loads a saved adapter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from basisadapt.peft_hook import register_with_peft

if TYPE_CHECKING:
    from basisadapt.adapter import PhiConfig, PhiModel
    from basisadapt.adapter.placement import Placement
    from basisadapt.diagnostics.diagnostic import Diagnostic
    from basisadapt.errors import InputError
    from basisadapt.phi.basis import TransferBasis
    from basisadapt.phi.grids import GridStrategy
    from basisadapt.phi.sharing import AdaptedModule, SharingPolicy
    from basisadapt.run_config import RunConfig
    from basisadapt.training import run

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptedModule": "basisadapt.phi.sharing",
    "Diagnostic": "basisadapt.diagnostics.diagnostic",
    "GridStrategy": "basisadapt.phi.grids",
    "InputError": "basisadapt.errors",
    "PhiConfig": "basisadapt.adapter",
    "PhiModel": "basisadapt.adapter",
    "Placement": "basisadapt.adapter.placement",
    "RunConfig": "basisadapt.run_config",
    "SharingPolicy": "basisadapt.phi.sharing",
    "TransferBasis": "basisadapt.phi.basis",
    "run": "basisadapt.training",
}
__all__ = [
    "AdaptedModule",
    "Diagnostic",
    "GridStrategy",
    "InputError",
    "PhiConfig",
    "PhiModel",
    "Placement",
    "RunConfig",
    "SharingPolicy",
    "TransferBasis",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'basisadapt' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


register_with_peft()
