"""The notes on MLflow's pages of a study and of a cell."""

from __future__ import annotations

from collections.abc import Mapping

from basisadapt.core.markup import in_markdown
from basisadapt.diagnostics.linear import LINEAR
from basisadapt.study.plan.cells import Cell
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.record.runs import STATUS
from basisadapt.training import RunResult

_TUNING = """- Rows called "..., tuning ..." are trials of a setting's values, evaluated on training rows
  (`train.validation`): not to be compared with the others.
"""


def guide(spec: StudySpec) -> str:
    """How to read the experiment of a study, in Markdown."""
    return f"""**{spec.title}**

{spec.question}

How to compare: each invocation is a parent run, each cell (row and seed) a child run below it.
- The newest finished parent run holds the report: `report.html` (one page with everything), `table.md`, `table.csv`
  and `comparison.png`.
- Runs table: expand the parents, or filter with ``tags.`{STATUS}` = 'finished'``; group by the parameter
  `row` for means over seeds. Columns to show: the headline metric, `stable_rank.mean`, `dc_share.mean`,
  `parameters.trainable`.
- A cell's parameters are what this study varies and every setting that all methods have; `config.json` has the rest.
- A cell's page holds its pictures (`phi.png`, `phi_evolution.png`, `stable_rank.png`, `spectrum.png`, `modules.png`,
  `training.png`), `result.json`, its curves, and every layer's numbers under `stable_rank/`, `dc_share/` and so on.
- Cells that diverged, failed or were killed say so in the tag `{STATUS}`.
{_TUNING if spec.tune else ""}"""


def cell_note(cell: Cell, result: RunResult) -> str:
    """The note of a cell, in Markdown: its status, main metrics and warnings."""
    names = [result.headline, "stable_rank.mean", "dc_share.mean", "parameters.trainable"]
    names += [f"{name}.{of}" for name in ("linear_fit", "nonlinear_share") for of in ("mean", "largest")]
    numbers = "\n".join(f"- {name}: {result.metrics[name]:.6g}" for name in names if name in result.metrics)
    warnings = "\n".join(f"- Warning: {in_markdown(warning)}" for warning in result.warnings)
    said = "\n".join(part for part in (numbers, _linear(result.metrics), warnings) if part)
    return f"**{in_markdown(cell.row)}, seed {cell.seed}**: {result.status}\n\n{said}"


def _linear(metrics: Mapping[str, float]) -> str:
    """A line if φ is nearly linear, so nearly LoRA; else ""."""
    if metrics.get("nonlinear_share.largest", 1.0) >= LINEAR:
        return ""
    times = f"{metrics['linear_fit.mean']:.3g}"
    return f"- This φ is LoRA with its scale times {times}: no module's nonlinear share reaches 1 %."
