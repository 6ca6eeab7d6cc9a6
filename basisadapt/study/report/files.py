"""The files of a report."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from basisadapt.study.report.figures import (
    against_figure,
    comparison_figure,
    curves_figure,
    lines_figure,
    map_figure,
    search_figure,
)
from basisadapt.study.report.html import to_html
from basisadapt.study.report.text import text_table_to_csv, to_csv, to_markdown, to_text
from basisadapt.study.report.text_tables import text_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.study.report.report import Report

MARK = "table.md"  # every folder with a report has it, also the shipped ones
KEPT = ("table.txt", "table.csv", "report.html", "comparison.png", "against.png", "map.png", "lines.png", "search.png")


def report_files(report: Report, pictures: Callable[[str], dict[str, bytes]]) -> dict[str, str | bytes]:
    """The files of a report, name to content.

    pictures: run id to the PNG files of that MLflow run, name to content; the HTML page shows those of each row.
    """
    figures = {"comparison.png": comparison_figure(report.table)}
    if len(report.table.at) > 1:
        figures["curves.png"] = curves_figure(report.table)
    if report.table.study.spec.against:
        figures["against.png"] = against_figure(report.table)
    over = report.table.study.spec.map
    if over is not None and (drawn_map := map_figure(report.table, over.x, over.y)) is not None:
        figures["map.png"] = drawn_map
    lines = report.table.study.spec.lines
    if lines is not None and (drawn_lines := lines_figure(report.table, lines.along, lines.against)) is not None:
        figures["lines.png"] = drawn_lines
    if report.search is not None:
        figures["search.png"] = search_figure(report.search, report.table.headline)
    drawn = {name: _png(figure) for name, figure in figures.items()}
    return {
        "table.txt": to_text(report),
        "table.md": to_markdown(report),
        "table.csv": to_csv(report.table),
        **{f"{one.title.lower().replace(' ', '_')}.csv": text_table_to_csv(one) for one in text_tables(report)[1:]},
        "report.html": to_html(report, drawn, pictures),
        **drawn,
    }


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()
