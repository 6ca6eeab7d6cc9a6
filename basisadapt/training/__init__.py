"""How a run is trained: a frozen RunConfig in, a plain RunResult out. Knows neither Optuna nor MLflow.

The public names load what they need when they are first used, so that `import basisadapt.training` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from basisadapt.training.config import RunConfig
    from basisadapt.training.data import load_data
    from basisadapt.training.planning import Plan, attach, count_parameters, plan
    from basisadapt.training.result import RunResult
    from basisadapt.training.running import run

_PUBLIC = {
    "Plan": "basisadapt.training.planning",
    "RunConfig": "basisadapt.training.config",
    "RunResult": "basisadapt.training.result",
    "attach": "basisadapt.training.planning",
    "count_parameters": "basisadapt.training.planning",
    "load_data": "basisadapt.training.data",
    "plan": "basisadapt.training.planning",
    "run": "basisadapt.training.running",
}
__all__ = ["Plan", "RunConfig", "RunResult", "attach", "count_parameters", "load_data", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'basisadapt.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
