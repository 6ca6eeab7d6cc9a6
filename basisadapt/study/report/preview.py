"""A preview of a study: its cells with their parameter counts, and what they would download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basisadapt.core.command import aligned

if TYPE_CHECKING:
    from basisadapt.study.plan.cells import Cell
    from basisadapt.study.plan.spec import StudySpec
    from basisadapt.training import Plan
    from basisadapt.training.config import RunConfig

COUNTS = ("seed", "modules", "A and B", "phi", "head", "trainable", "state")


@dataclass(frozen=True)
class Preview:
    """What a study would run.

    cells: every cell once, in the order in which they run.
    plans: row label to its parameter counts.
    states: cell key to the recorded status, or "to run".
    downloads: what would be downloaded from the hub, in words.
    """

    spec: StudySpec
    cells: Sequence[Cell]
    plans: Mapping[str, Plan]
    states: Mapping[str, str]
    downloads: Sequence[str]


def to_preview(preview: Preview) -> str:
    """The preview for a terminal: settings that all cells share on one line, settings that differ in columns."""
    cells = preview.cells
    facts = [_facts(cell.config) for cell in cells]
    shared = {name: value for name, value in facts[0].items() if all(one[name] == value for one in facts)}
    others = [name for name in facts[0] if name not in shared]
    rows = [("row", *others, *COUNTS)]
    for cell, known in zip(cells, facts, strict=True):
        plan = preview.plans[cell.row]
        counts = (f"{count:,}" for count in (plan.factors, plan.transfer, plan.head, plan.trainable))
        own = (known[name] for name in others)
        rows.append((cell.row, *own, str(cell.seed), str(plan.modules), *counts, preview.states[cell.key]))
    return "\n".join(
        [
            f"{preview.spec.title}: {len(cells)} cells",
            f"Of each: {', '.join(f'{name} {value}' for name, value in shared.items())}",
            f"To download from the hub: {', '.join(preview.downloads) or 'nothing'}",
            "",
            *aligned(rows, left=(0, len(rows[0]) - 1)),
        ]
    )


def _facts(config: RunConfig) -> dict[str, str]:
    """The settings that determine how long a cell takes and which scores are comparable."""
    train = config.train
    length = f"{train.epochs:g} epochs" if train.max_steps is None else f"{train.max_steps} steps"
    return {
        "backbone": config.backbone,
        "task": config.task,
        "rate": f"{train.lr:g}",
        "length": length,
        "batch": str(train.batch_size),
        "training rows": _rows(train.train_rows),
        "test rows": _rows(train.eval_rows),
        "precision": train.precision,
    }


def _rows(count: int | None) -> str:
    return "all" if count is None else f"{count:,}"
