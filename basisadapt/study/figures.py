"""The figures of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from basisadapt.study import statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from basisadapt.study.report import Found
    from basisadapt.study.table import Line, Table

NEAR = 0.3  # decades, within which two labels may meet


def comparison_figure(table: Table) -> Figure:
    """A panel a task: a row's seeds as dots, mean ± standard deviation over them, the reference's mean as a line."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line.task for line in table.lines))
    names = list(dict.fromkeys(line.name for line in table.lines))
    size = 4 + 3 * len(tasks), 1.2 + 0.4 * len(names)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for task, axes in zip(tasks, panels, strict=True):
        _compare(axes, [line for line in table.lines if line.task == task], names, 100 if table.percent else 1)
        if len(tasks) > 1:
            axes.set_title(task, fontsize="medium")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"{table.headline}{', %' if table.percent else ''} (mean ± std over seeds)", fontsize="medium")
    figure.suptitle(table.study.spec.title)
    return figure


def _compare(axes: Axes, lines: Sequence[Line], names: Sequence[str], scale: float) -> None:
    """Draw the rows of one task, each at the place of its name."""
    alone = sum(line.row.is_reference for line in lines) == 1
    for line in lines:
        place, values = names.index(line.name), [value * scale for value in line.values.values()]
        centre, spread = statistics.mean(values), statistics.std(values)
        axes.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        if centre is not None:
            axes.errorbar(centre, place, xerr=spread, fmt="o", color="C0", capsize=4)
            if line.row.is_reference and alone:
                axes.axvline(centre, color="0.5", linestyle="--", linewidth=1)
    axes.grid(axis="x", alpha=0.3)


def against_figure(table: Table) -> Figure:
    """The headline metric against each of the metrics that the study is read `against`, by logarithm: a point a row."""
    from matplotlib.figure import Figure

    scale, metrics = 100 if table.percent else 1, table.study.spec.against
    figure = Figure(figsize=(1 + 5.5 * len(metrics), 5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        points = []
        for line in table.lines:
            x, values = line.mean_of(metric), [value * scale for value in line.values.values()]
            centre, spread = statistics.mean(values), statistics.std(values)
            if x is not None and x > 0 and centre is not None:
                axes.errorbar(x, centre, yerr=spread, fmt="o", color="C1" if line.row.is_reference else "C0", capsize=3)
                points.append((centre, x, line.label))
        axes.set_xscale("log")
        axes.margins(x=0.2)
        _label(axes, points)
        axes.set_xlabel(metric)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"{table.headline}{', %' if table.percent else ''} (mean ± std over seeds)")
    figure.suptitle(table.study.spec.title)
    return figure


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """The name of every point (y, x, name) beside it, the upper of two that would lie on each other moved up."""
    low, high = axes.get_ylim()
    line = (high - low) / 35
    placed: list[tuple[float, float]] = []
    for y, x, name in sorted(points):
        near = [there for there, at in placed if abs(math.log10(x / at)) < NEAR]
        place = max([y, *(there + line for there in near)])
        placed.append((place, x))
        axes.annotate(name, (x, place), (6, 0), textcoords="offset points", fontsize=7, va="center")


def search_figure(found: Found, headline: str) -> Figure:
    """Left: every trial's value in order, and the best so far. Right: the importance of each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8 + 0.3 * max(5, len(found.importance))), layout="constrained")
    history, importance = figure.subplots(1, 2)
    finished = [(trial.number, trial.value) for trial in found.trials if trial.value is not None]
    best = [max(value for _, value in finished[: n + 1]) for n in range(len(finished))]
    history.plot([number for number, _ in finished], [value for _, value in finished], "o", color="0.6", label="trial")
    history.step([number for number, _ in finished], best, where="post", color="C0", label="best so far")
    history.set_xlabel("trial")
    history.set_ylabel(headline)
    history.grid(alpha=0.3)
    history.locator_params(axis="x", integer=True)
    if finished:
        history.legend()
    names = [key.removeprefix("adapter.") for key in found.importance]
    importance.barh(names[::-1], list(found.importance.values())[::-1], color="C0")
    importance.set_xlabel("importance (fANOVA)")
    if not names:
        importance.set_axis_off()
    return figure
