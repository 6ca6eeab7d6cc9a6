"""A report: a study's table, the verdicts on its claims, what a search found; and the files that keep it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from basisadapt.study import words
from basisadapt.study.claims import Verdict, judge
from basisadapt.study.figures import comparison_figure, search_figure
from basisadapt.study.page import to_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.study.search import Found
    from basisadapt.study.table import Table
    from basisadapt.training import RunResult


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


def phi_figure(title: str, result: RunResult) -> Figure | None:
    """The learned φ of every layer: a panel per kind of module, a line per layer, lighter with depth."""
    if not result.phi:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for module, curve in result.phi.items():
        depth, name = _depth_and_name(module)
        panels.setdefault(name, []).append((depth, curve))
    deepest = max(depth for lines in panels.values() for depth, _ in lines)
    # The last, palest colours are left out: they do not show on white.
    norm, colours = matplotlib.colors.Normalize(0, 1.1 * max(deepest, 1)), matplotlib.colormaps["viridis"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.4 * columns, 0.6 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, lines) in zip(grid, panels.items(), strict=False):
        for depth, curve in lines:
            axes.plot(curve["z"], curve["phi"], color=colours(norm(depth)), linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.xaxis.get_offset_text().set_fontsize(7)
        axes.yaxis.get_offset_text().set_fontsize(7)
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(scilimits=(-2, 3))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("entry of BA", fontsize=9)
    figure.supylabel("what φ adds to it", fontsize=9)
    figure.suptitle(title)
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=figure.axes, label="layer", shrink=0.8)
    bar.ax.set_ylim(0, max(deepest, 1))
    return figure


def _depth_and_name(module: str) -> tuple[int, str]:
    """(3, "attention.self.query") of "encoder.layer.3.attention.self.query"."""
    found = re.search(r"\.(\d+)\.(.+)$", module)
    return (int(found[1]), found[2]) if found else (0, module)
