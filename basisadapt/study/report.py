"""A report: a study's table, the verdicts on its claims, what a search found; and the files that keep it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basisadapt.study import words
from basisadapt.study.claims import Verdict, judge
from basisadapt.study.figures import comparison_figure, search_figure
from basisadapt.study.page import to_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.study.search import Found
    from basisadapt.study.table import Table


@dataclass(frozen=True)
class Report:
    """What is said of a study. search: what a search has found, where there was one."""

    table: Table
    verdicts: tuple[Verdict, ...]
    search: Found | None = None

    @property
    def unsound(self) -> bool:
        """Whether a cell failed or diverged, or a trial of the search did."""
        trials = self.search.trials if self.search else ()
        return self.table.unsound or any(trial.value is None for trial in trials)


def make_report(table: Table, search: Found | None = None) -> Report:
    """The report on a table."""
    return Report(table, judge(table), search)


def report_files(report: Report, pictures: Callable[[str], dict[str, bytes]]) -> dict[str, str | Figure]:
    """Everything that is kept of a report: file name to content.

    pictures: the PNG files of the MLflow run with an id, name to content; the page holds those of each row.
    """
    figures = {"comparison.png": comparison_figure(report.table)}
    if report.search is not None:
        figures["search.png"] = search_figure(report.search, report.table.headline)
    return {
        "table.txt": words.to_text(report),
        "table.md": words.to_markdown(report),
        "table.csv": words.to_csv(report.table),
        **{f"{grid.title.lower()}.csv": words.grid_to_csv(grid) for grid in words.grids(report)[1:]},
        "report.html": to_html(report, figures, pictures),
        **figures,
    }
