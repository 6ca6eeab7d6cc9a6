"""Studies: one YAML file per table of the paper, run as an Optuna study and recorded in MLflow.

    import basisadapt.study as study

    result = study.run("ablate_basis", preset="quick")
    result.to_dataframe()

The public names load what they need when they are first used, so that `import basisadapt.study` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from basisadapt.study.drive.callback import Callback
    from basisadapt.study.drive.paths import StudyPaths
    from basisadapt.study.result import Result, read_report, run

_PUBLIC = {
    "Callback": "basisadapt.study.drive.callback",
    "StudyPaths": "basisadapt.study.drive.paths",
    "Result": "basisadapt.study.result",
    "read_report": "basisadapt.study.result",
    "run": "basisadapt.study.result",
}
__all__ = ["Callback", "Result", "StudyPaths", "read_report", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'basisadapt.study' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
