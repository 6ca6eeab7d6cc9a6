"""The figures of a report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from basisadapt.core.grouping import grouped
from basisadapt.diagnostics.figures import verbatim
from basisadapt.study import statistics
from basisadapt.study.plan.cells import label_of
from basisadapt.study.plan.keys import plain
from basisadapt.study.report.formats import headline_text, number_form
from basisadapt.study.report.table import Line, Table, by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from basisadapt.study.report.report import SearchResult

MAX_ROWS = 100  # rows in a figure; of more it shows the leading ones, and says so
MARKERS = "os^Dv"
NEAR = 0.12  # the share of a panel's width below which two labels may overlap


def comparison_figure(table: Table) -> Figure:
    """A panel per task: each row's seeds as dots with mean ± standard deviation, the reference's mean as a line."""
    shown = by_name(table.leading(MAX_ROWS))
    tasks, names = list(dict.fromkeys(line.task for line in table.lines)), list(shown)
    figure = _figure(4 + 3 * len(tasks), 1.2 + 0.4 * len(names))
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for task, axes in zip(tasks, panels, strict=True):
        places = [(place, line) for place, same in enumerate(shown.values()) for line in same if line.task == task]
        _compare(axes, places, 100 if table.percent else 1)
        if len(tasks) > 1:
            axes.set_title(verbatim(task), fontsize="medium")
    panels[0].set_yticks(range(len(names)), [verbatim(name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"{verbatim(headline_text(table))} (mean ± std over seeds)", fontsize="medium")
    figure.suptitle(_title(table, names))
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _title(table: Table, names: Collection[str]) -> str:
    """The study's title, with the number of shown rows if some are not shown."""
    every = len(by_name(table.lines))
    part = f" ({len(names)} of {every:,} rows)" if len(names) < every else ""
    return verbatim(table.study.spec.title) + part


def _compare(axes: Axes, places: Sequence[tuple[int, Line]], scale: float) -> None:
    """Draw the rows of one task, each at its position."""
    alone = sum(line.row.is_reference for _, line in places) == 1
    for place, line in places:
        values = [value * scale for value in line.values.values()]
        center, spread = statistics.mean(values), statistics.std(values)
        axes.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        if center is not None:
            axes.errorbar(center, place, xerr=spread, fmt="o", color="C0", capsize=4)
            if line.row.is_reference and alone:
                axes.axvline(center, color="0.5", linestyle="--", linewidth=1)
    axes.grid(axis="x", alpha=0.3)


def curves_figure(table: Table) -> Figure:
    """The headline metric over the tuned setting, on a logarithmic axis: a panel per group of compared rows.

    A line is a row's mean over seeds, its band one standard deviation to each side, so that a row with few seeds does
    not set the scale of all. A ring marks the row's own choice, the dashed line `tune.common`. Values at which no seed
    has finished are left out.
    """
    shown = table.leading(MAX_ROWS)
    panels = grouped((line.row.group, line) for line in shown)
    names = list(dict.fromkeys(_curve_name(table, line) for line in shown))
    shared = len({line.task for line in table.lines}) == 1
    figure, every = _panels(len(panels), shared)
    for axes, lines in zip(every, panels.values(), strict=True):
        for line in lines:
            name = _curve_name(table, line)
            _curve(axes, table, line, name, names.index(name))
        common = table.study.spec.tune.common if table.study.spec.tune else None
        if common is not None:
            axes.axvline(common, color="0.5", linestyle="--", linewidth=1)
        axes.set_xlim(min(table.at) / 1.4, max(table.at) * 1.4)
        axes.set_xscale("log")
        axes.set_xticks(list(table.at), [f"{value:g}" for value in table.at], rotation=45, fontsize="small")
        axes.minorticks_off()
        axes.set_title(verbatim(_panel_name(table, lines[0])), fontsize="medium")
    _name_axes(figure, table, table.setting)
    figure.suptitle(_title(table, by_name(shown)))
    return figure


def _panels(count: int, sharey: bool) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most four in a row, with one horizontal scale."""
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = _figure(1.6 + 3.4 * columns, 0.8 + 3.2 * rows)
    every = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).flat)
    for axes in every[count:]:
        axes.set_axis_off()
    for axes in every[:count]:
        axes.tick_params(labelbottom=True)  # shared axes hide them above an empty panel
        axes.grid(alpha=0.3)
    return figure, every[:count]


def _name_axes(figure: Figure, table: Table, horizontal: str) -> None:
    """One legend and one pair of labels for all panels."""
    drawn = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center", fontsize="small")
    figure.supxlabel(verbatim(horizontal), fontsize="medium")
    figure.supylabel(f"{verbatim(headline_text(table))} (mean ± std over seeds)", fontsize="medium")


def _curve(axes: Axes, table: Table, line: Line, name: str, number: int) -> None:
    rule = table.study.spec.tune
    means = _draw(axes, table, table.curve(line).items(), name, number)
    chosen = line.row.cells[0].settings.get(rule.setting) if rule else None
    if line.values and chosen in means:
        axes.plot(chosen, means[chosen], "o", color=f"C{number}", markersize=9, fillstyle="none")


def _draw(axes: Axes, table: Table, at: Iterable[tuple[float, Line]], name: str, number: int) -> dict[float, float]:
    """Draw the means of lines at their places, with a band of one standard deviation. Returns the means by place.

    number: which line of the figure it is; colors repeat after ten, with another marker.
    """
    color, marker = f"C{number}", MARKERS[number // 10 % len(MARKERS)]
    scale = 100 if table.percent else 1
    points = []
    for place, line in at:
        values = [score * scale for score in line.values.values()]
        center = statistics.mean(values)
        if center is not None:
            spread = statistics.std(values) or 0.0
            points.append((place, center, center - spread, center + spread))
    if not points:
        return {}
    x, y, low, high = zip(*points, strict=True)
    axes.plot(x, y, f"{marker}-", color=color, markersize=3, label=verbatim(name))
    axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    return dict(zip(x, y, strict=True))


def lines_figure(table: Table, along: str, against: str | None) -> Figure | None:
    """The headline metric along an axis: a panel per group of rows that differ in `along` and the compared axis alone.

    A line is of rows that differ in `along` alone, with means and deviations as in `curves_figure`. Its places are the
    values on the axis, evenly spaced, or the means of the metric `against`, on a logarithmic scale; there a row that is
    not on the axis is a point. None if no row has a place.
    """
    from matplotlib.ticker import LogLocator

    values = _values_on(table, along)
    panels: dict[str, dict[str, list[tuple[float, Line]]]] = {}
    for line in (shown := table.leading(MAX_ROWS)):
        point = dict(line.row.point)
        place = line.mean_of(against) if against is not None else values.get(point.get(along))
        if place is not None and line.values:
            panel, name = _panel_and_line(line, along, _compared_axis(table))
            panels.setdefault(panel, {}).setdefault(name, []).append((place, line))
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure, every = _panels(len(panels), sharey=len({line.task for line in table.lines}) == 1)
    for axes, (panel, lines) in zip(every, panels.items(), strict=True):
        for name, places in lines.items():
            _draw(axes, table, sorted(places, key=lambda at: at[0]), name, names.index(name))
        axes.set_title(verbatim(panel), fontsize="medium")
        if against is None:
            axes.set_xticks(range(len(values)), [verbatim(plain(value)) for value in values], rotation=45, ha="right")
        else:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.tick_params(axis="x", labelrotation=45, labelbottom=True)
            axes.minorticks_off()
    _name_axes(figure, table, against or along)
    figure.suptitle(_title(table, by_name(shown)))
    return figure


def _values_on(table: Table, along: str) -> dict[Any, int]:
    """The values on an axis, in the order of the rows, each with its place."""
    points = (dict(line.row.point) for line in table.lines)
    return {value: n for n, value in enumerate(dict.fromkeys(point[along] for point in points if along in point))}


def _panel_and_line(line: Line, along: str, compared: str | None) -> tuple[str, str]:
    """The labels of a row's panel and of its line there: the line's is what the compared axis says, if there is one."""
    rest = [(axis, value) for axis, value in line.row.point if axis != along]
    of_line = [pair for pair in rest if (pair[0] != "task" if compared is None else pair[0] == compared)]
    shared = (pair for pair in rest if pair not in of_line)
    panel = ", ".join(plain(value) if axis == "task" else f"{axis} = {plain(value)}" for axis, value in shared)
    return panel, label_of(of_line, line.row.beside)


def _panel_name(table: Table, line: Line) -> str:
    """The values that the rows of a panel share on the axes."""
    compared = _compared_axis(table)
    shared = [f"{name} = {plain(value)}" for name, value in line.row.point if name not in (compared, "task")]
    tasks = {other.task for other in table.lines}
    return ", ".join([*(shared if compared else []), *([line.task] if len(tasks) > 1 else [])])


def _curve_name(table: Table, line: Line) -> str:
    """The value, or name, that distinguishes a row in its panel."""
    return next((plain(value) for axis, value in line.row.point if axis == _compared_axis(table)), line.name)


def _compared_axis(table: Table) -> str | None:
    """The axis on which rows are compared; None if all are compared with one row."""
    reference = table.study.spec.reference
    return None if reference is None else reference.axis


def against_figure(table: Table) -> Figure:
    """The headline metric against each metric in `StudySpec.against`, on a logarithmic axis: a point per row.

    With several tasks, a point is the mean over them, without a deviation; rows that lack a task are left out.
    """
    scale, metrics = 100 if table.percent else 1, table.study.spec.against
    tasks, shown = len({line.task for line in table.lines}), by_name(table.leading(MAX_ROWS))
    figure = _figure(1 + 5.5 * len(metrics), 5)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        points = []
        for name, lines in shown.items():
            costs, scores = _all_of(lines, metric), _all_of(lines, None)
            if not costs or not scores or min(costs) <= 0:
                continue
            x, y = math.fsum(costs) / len(costs), math.fsum(scores) / len(scores)
            spread = statistics.std([value * scale for value in lines[0].values.values()]) if tasks == 1 else None
            color = "C1" if lines[0].row.is_reference else "C0"
            axes.errorbar(x, y * scale, yerr=spread, fmt="o", color=color, capsize=3)
            points.append((y * scale, x, name))
        axes.set_xscale("log")
        axes.margins(x=0.2)
        _label(axes, points)
        axes.set_xlabel(verbatim(metric))
        axes.grid(alpha=0.3)
    over = "mean ± std over seeds" if tasks == 1 else f"mean over {tasks} tasks"
    figure.axes[0].set_ylabel(f"{verbatim(headline_text(table))} ({over})")
    figure.suptitle(_title(table, shown))
    return figure


def _all_of(lines: Sequence[Line], metric: str | None) -> list[float]:
    """The mean of every line; empty if a line has none."""
    means = [line.mean_of(metric) for line in lines]
    return [] if None in means else [mean for mean in means if mean is not None]


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Label every point (y, x, name). Labels that would overlap move up, and down again at the panel's upper end."""
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    line, width = (high - low) / 35, math.log10(right / left)

    def overlap(one: int, other: int) -> bool:
        return abs(math.log10(points[one][1] / points[other][1])) < NEAR * width

    points = sorted(points)
    places: list[float] = []
    for n, (y, _, _) in enumerate(points):
        places.append(max([y, *(places[k] + line for k in range(n) if overlap(k, n))]))
    for n in reversed(range(len(points))):
        above = [places[k] - line for k in range(n + 1, len(points)) if overlap(k, n)]
        places[n] = min([places[n], high - line, *above])
    way = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    for (y, x, name), place in zip(points, places, strict=True):
        axes.annotate(
            verbatim(name), (x, y), (x * 10 ** (0.02 * width), place), fontsize=7, va="center", arrowprops=way
        )


def map_figure(table: Table, x: str, y: str) -> Figure | None:
    """The mean difference to the reference over the axes x and y: a panel per group of rows that differ in them alone.

    Blue is better than the reference, red worse. A difference is in brackets if its confidence interval includes 0, or
    if it has none. None if no row has a difference.
    """
    scale, number = 100 if table.percent else 1, number_form(table)
    panels: dict[str, dict[tuple[Any, Any], statistics.Difference]] = {}
    for line in table.lines:
        point = dict(line.row.point)
        if line.difference is not None and {x, y} <= point.keys():
            rest = label_of((axis, value) for axis, value in line.row.point if axis not in (x, y))
            panels.setdefault(rest, {})[point[x], point[y]] = line.difference
    if not panels:
        return None
    columns, rows = (_values(panels.values(), part) for part in (0, 1))
    most = max(abs(found.mean) for panel in panels.values() for found in panel.values()) * scale or 1.0
    figure = _figure(1.5 + (0.6 + 0.75 * len(columns)) * len(panels), 1.8 + 0.45 * len(rows))
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, panel) in zip(every, panels.items(), strict=True):
        grid = [[scale * panel[c, r].mean if (c, r) in panel else math.nan for c in columns] for r in rows]
        image = axes.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        for (column, row), found in panel.items():
            told = number(found.mean, "+")
            sure = found.low is not None and found.high is not None and not found.low <= 0 <= found.high
            place = columns.index(column), rows.index(row)
            axes.text(*place, told if sure else f"({told})", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(columns)), [verbatim(plain(c)) for c in columns], rotation=45, ha="right")
        axes.set_title(verbatim(name), fontsize="medium")
    every[0].set_yticks(range(len(rows)), [verbatim(plain(r)) for r in rows])
    every[0].set_ylabel(verbatim(y))
    reference = table.study.spec.reference
    figure.colorbar(
        image, ax=list(every), label=f"{verbatim(headline_text(table))}, difference to {verbatim(str(reference))}"
    )
    figure.suptitle(verbatim(table.study.spec.title))
    return figure


def _values(panels: Iterable[Mapping[tuple[Any, Any], Any]], part: int) -> list[Any]:
    """The values on an axis, in the order of the rows."""
    return list(dict.fromkeys(point[part] for panel in panels for point in panel))


def search_figure(found: SearchResult, headline: str) -> Figure:
    """Left: the value of every trial in order, and the best so far. Right: the importance of each setting."""
    figure = _figure(9, 1.8 + 0.3 * max(5, len(found.importance)))
    history, importance = figure.subplots(1, 2)
    finished = [(trial.number, trial.value) for trial in found.trials if trial.value is not None]
    best = list(itertools.accumulate((value for _, value in finished), max))
    history.plot([number for number, _ in finished], [value for _, value in finished], "o", color="0.6", label="trial")
    history.step([number for number, _ in finished], best, where="post", color="C0", label="best so far")
    history.set_xlabel("trial")
    history.set_ylabel(verbatim(headline))
    history.grid(alpha=0.3)
    history.locator_params(axis="x", integer=True)
    if finished:
        history.legend()
    names = [verbatim(key.removeprefix("adapter.")) for key in found.importance]
    importance.barh(names[::-1], list(found.importance.values())[::-1], color="C0")
    importance.set_xlabel("importance (fANOVA)")
    if not names:
        importance.set_axis_off()
    return figure
