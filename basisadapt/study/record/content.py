"""The metrics, tags and parameters of a cell in MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable

from basisadapt.core.settings import field_names
from basisadapt.phi.settings import LowRankSettings
from basisadapt.study.plan.cells import Cell
from basisadapt.study.record.runs import ACCUMULATE, DATA, ENVIRONMENT, HEADLINE, WARNINGS
from basisadapt.study.record.texts import clean, limited, warnings_text
from basisadapt.training import RunResult


def points_of(result: RunResult) -> Iterable[tuple[str, float, int]]:
    """Every number of a result as (name, value, step)."""
    # Final numbers at step 0: MLflow draws a metric with later steps as a line, where rows compare best as
    # bars. A curve of the same name would also hide the final number, which need not be the curve's last.
    for name, value in result.metrics.items():
        yield clean(name), float(value), 0
    for name, points in result.curves.items():
        curve = clean(f"curve/{name}" if name in result.metrics else name)
        yield from ((curve, float(value), int(step)) for step, value in points)
    for module, numbers in result.modules.items():
        for name, value in numbers.items():
            if isinstance(value, float):
                yield clean(f"{name}/{module}"), value, 0


def tags_of(result: RunResult) -> dict[str, str]:
    """What the tags of a run say of its result."""
    tags = {
        HEADLINE: clean(result.headline),
        WARNINGS: warnings_text(result.warnings),
        "mlflow.source.git.commit": result.environment.get("git_commit", "unknown"),
        **{f"{ENVIRONMENT}{name}": value for name, value in result.environment.items()},
        **{f"{DATA}{name}": str(value) for name, value in result.data.items()},
        **({ACCUMULATE: str(result.accumulate)} if result.accumulate > 1 else {}),
    }
    return {clean(name): limited(value) for name, value in tags.items()}


def parameters_of(cell: Cell) -> dict[str, str]:
    """Row, seed, the cell's own parameters, and every setting that all methods have; without "adapter." in their names.

    Settings of single methods are left out: they differ between the rows of most studies, and would crowd out the
    varied ones where MLflow picks parameters to plot. `config.json` has all of them.
    """
    of_all = {f"adapter.{name}" for name in field_names(LowRankSettings)}
    common = {key: value for key, value in cell.settings.items() if key in of_all or not key.startswith("adapter.")}
    named = {key.removeprefix("adapter."): value for key, value in (cell.parameters | common).items()}
    flat = {"row": cell.row, "seed": cell.seed, **named}
    return {clean(name): value if isinstance(value, str) else json.dumps(value) for name, value in flat.items()}
