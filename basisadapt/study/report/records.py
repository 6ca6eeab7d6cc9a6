"""The numbers of a table, neither rounded nor scaled: one record per row, or per cell."""

from __future__ import annotations

from typing import Any

from basisadapt.study import statistics
from basisadapt.study.outcome import NOT_RUN
from basisadapt.study.report.table import Table

Record = dict[str, Any]


def row_records(table: Table) -> list[Record]:
    """One record per row, then one per row at each value of the tuned setting, if there are any."""
    at = ((value, line) for value, same in table.at.items() for line in same.lines)
    records = []
    for value, line in (*((None, line) for line in table.lines), *at):
        values, difference = list(line.values.values()), line.difference
        low, high = statistics.interval(values) or (None, None)
        plateau = table.plateau(line) if value is None else None
        curve = {"at": value, "plateau_octaves": plateau.octaves if plateau else None}
        value_printed, std_printed = line.published or (None, None)
        records.append(
            {
                "row": line.label,
                "metric": table.headline,
                "n": len(values),
                "mean": statistics.mean(values),
                "std": statistics.std(values),
                "mean_ci_low": low,
                "mean_ci_high": high,
                "difference": difference.mean if difference else None,
                "ci_low": difference.low if difference else None,
                "ci_high": difference.high if difference else None,
                "p": difference.p if difference else None,
                "p_holm": line.p,
                **{name: line.mean_of(name) for name in table.columns},
                "states": "; ".join(
                    f"{state}: {' '.join(map(str, seeds))}" for state, seeds in line.seeds_by_state().items()
                ),
                "published": value_printed,
                "published_std": std_printed,
                **(curve if table.at else {}),
            }
        )
    return records


def cell_records(table: Table) -> list[Record]:
    """One record per cell: its values on the axes, its state, its run in MLflow or None, and every recorded metric."""
    return [
        {
            **dict(line.row.point),
            "row": line.label,
            "task": line.task,
            "seed": seed,
            "state": line.outcomes[seed].status if seed in line.outcomes else NOT_RUN,
            "run_id": line.outcomes[seed].run_id if seed in line.outcomes else None,
            **(line.outcomes[seed].metrics if seed in line.outcomes else {}),
        }
        for line in table.lines
        for seed in line.seeds
    ]
