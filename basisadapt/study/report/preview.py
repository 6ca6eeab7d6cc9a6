"""What a study would run, in words: its cells with their parameter counts, and what they would download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from basisadapt.study.plan.cells import Cell
    from basisadapt.study.plan.spec import StudySpec
    from basisadapt.training import Plan
    from basisadapt.training.config import RunConfig

COUNTS = ("seed", "modules", "A and B", "phi", "head", "trainable", "state")


def to_preview(
    spec: StudySpec,
    cells: Sequence[Cell],
    plans: Mapping[str, Plan],
    states: Mapping[str, str],
    downloads: Sequence[str],
) -> str:
    """Cells to run. plans: row label to counts. states: cell key to what the record says. downloads: in words.

    What all cells share is said once, what differs in a column.
    """
    facts = [_facts(cell.config) for cell in cells]
    shared = {name: value for name, value in facts[0].items() if all(one[name] == value for one in facts)}
    others = [name for name in facts[0] if name not in shared]
    rows = [("row", *others, *COUNTS)]
    for cell, known in zip(cells, facts, strict=True):
        plan = plans[cell.row]
        counts = (f"{count:,}" for count in (plan.factors, plan.transfer, plan.head, plan.trainable))
        own = (known[name] for name in others)
        rows.append((cell.row, *own, str(cell.seed), str(plan.modules), *counts, states[cell.key]))
    return "\n".join(
        [
            f"{spec.title}: {len(cells)} cells",
            f"Of each: {', '.join(f'{name} {value}' for name, value in shared.items())}",
            f"To download from the hub: {', '.join(downloads) or 'nothing'}",
            "",
            *_aligned(rows),
        ]
    )


def _facts(config: RunConfig) -> dict[str, str]:
    """What decides how long a cell takes and what its score may be compared with."""
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


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left and the last as it is, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        padded = (cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]))
    return lines
