"""The files that keep a report."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from basisadapt.study.report import text
from basisadapt.study.report.figures import against_figure, comparison_figure, curves_figure, search_figure
from basisadapt.study.report.html import to_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.study.report.report import Report

MARK = "table.md"  # which every folder with a report has, shipped ones too
KEPT = ("table.txt", "table.csv", "report.html", "comparison.png", "against.png", "search.png")


def report_files(report: Report, pictures: Callable[[str], dict[str, bytes]]) -> dict[str, str | bytes]:
    """Everything that is kept of a report: file name to content.

    pictures: the PNG files of the MLflow run with an id, name to content; the page holds those of each row.
    """
    figures = {"comparison.png": comparison_figure(report.table)}
    if len(report.table.at) > 1:
        figures["curves.png"] = curves_figure(report.table)
    if report.table.study.spec.against:
        figures["against.png"] = against_figure(report.table)
    if report.search is not None:
        figures["search.png"] = search_figure(report.search, report.table.headline)
    drawn = {name: _png(figure) for name, figure in figures.items()}
    return {
        "table.txt": text.to_text(report),
        "table.md": text.to_markdown(report),
        "table.csv": text.to_csv(report.table),
        **{f"{grid.title.lower().replace(' ', '_')}.csv": text.grid_to_csv(grid) for grid in text.grids(report)[1:]},
        "report.html": to_html(report, drawn, pictures),
        **drawn,
    }


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()
