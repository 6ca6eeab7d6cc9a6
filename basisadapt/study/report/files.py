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
    table, spec = report.table, report.table.study.spec
    figures = {
        "comparison.png": comparison_figure(table),
        "curves.png": curves_figure(table) if len(table.at) > 1 else None,
        "against.png": against_figure(table) if spec.against else None,
        "map.png": map_figure(table, spec.map.x, spec.map.y) if spec.map else None,
        "lines.png": lines_figure(table, spec.lines.along, spec.lines.against) if spec.lines else None,
        "search.png": search_figure(report.search, table.headline) if report.search else None,
    }
    drawn = {name: _png(figure) for name, figure in figures.items() if figure is not None}
    return {
        "table.txt": to_text(report),
        "table.md": to_markdown(report),
        "table.csv": to_csv(table),
        **{f"{one.title.lower().replace(' ', '_')}.csv": text_table_to_csv(one) for one in text_tables(report)[1:]},
        "report.html": to_html(report, drawn, pictures),
        **drawn,
    }


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()
