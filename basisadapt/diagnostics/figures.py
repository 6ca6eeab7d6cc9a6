"""Figures of one run, from the fields of a `training.RunResult` or a `result.json`, and of bases."""

from __future__ import annotations

import gc
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from basisadapt.core.grouping import grouped
from basisadapt.diagnostics.convergence import fit_power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALEST = 0.9  # of the color map: paler colors do not show on white
ROUNDING = 1e-6
FEW_TICKS = 4  # the most intervals of an axis: ticks take most of the time of drawing
LOWEST_SIGMA = 1e-4  # below it, the spectrum is mostly rounding
NUMBERS = {  # numbers of a module that are drawn against depth, and their labels
    "dc_share": "DC share",
    "range_share": "max |g·BA| / I",
    "utilisation": "active N / N",
    "alpha_mean_abs": "mean |α|",
    "omega_mean": "mean ω",
    "omega_std": "std of ω",
}
ELSEWHERE = ("stable_rank", "active_n", "alpha_mean", "alpha_std")  # numbers with a figure of their own, or with none
OF_PHI = ("entry of BA", "what φ adds to it")  # the labels of axes

Curve = Mapping[str, Sequence[float]]


def figures(title: str, result: Mapping[str, Any]) -> dict[str, Figure]:
    """File names to figures, one for everything that the result has numbers for.

    result: a mapping with the fields of `training.RunResult`.
    """
    title = verbatim(title)
    modules, snapshots = result["modules"], result["snapshots"]
    drawn = {
        "phi.png": phi_figure(title, result["phi"]),
        "phi_evolution.png": evolution_figure(title, snapshots, result["phi"]),
        "stable_rank.png": stable_rank_figure(title, snapshots, modules),
        "spectrum.png": spectrum_figure(title, modules),
        "modules.png": modules_figure(title, modules),
        "training.png": training_figure(title, result["curves"], result["metrics"]),
        "landscape.png": landscape_figure(title, result["landscape"]),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def pictures(title: str, result: Mapping[str, Any]) -> dict[str, bytes]:
    """File names to the contents of PNG files, of all `figures` of a result."""
    collects = gc.isenabled()
    # A figure has so many objects that garbage collections would take a third of the time. One at the end, over the
    # new objects alone, is enough.
    gc.disable()
    gc.freeze()
    try:
        drawn = {name: _png(figure) for name, figure in figures(title, result).items()}
        gc.collect()
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return drawn


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": 1})
    return file.getvalue()


def phi_figure(title: str, phi: Mapping[str, Curve]) -> Figure | None:
    """The learned φ of every layer (paper, Figure 1): a panel per projection, a line per layer, lighter with depth."""
    if not phi:
        return None
    import matplotlib

    panels = _by_name(phi)
    deepest = max(depth for lines in panels.values() for depth, _ in lines)
    norm, colors = matplotlib.colors.Normalize(0, max(deepest, 1) / PALEST), matplotlib.colormaps["viridis"]
    figure, grid = _panels(title, len(panels), *OF_PHI, right=1.1)
    for axes, (name, lines) in zip(grid, panels.items(), strict=False):
        for depth, curve in lines:
            axes.plot(curve["z"], curve["phi"], color=colors(norm(depth)), linewidth=1.2)
        _name(axes, name)
        axes.locator_params(nbins=FEW_TICKS)
        axes.ticklabel_format(scilimits=(-2, 3))
    place = figure.add_axes((1 - 0.8 / figure.get_figwidth(), 0.2, 0.15 / figure.get_figwidth(), 0.6))
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, colors), cax=place, label="layer")
    bar.ax.set_ylim(0, max(deepest, 1))
    return figure


def evolution_figure(title: str, snapshots: Sequence[Mapping[str, Any]], phi: Mapping[str, Curve]) -> Figure | None:
    """φ early, midway and at the end (paper, Figures 6 to 17) in the first, a middle and the last layer.

    A row per layer, a column per projection. None without snapshots of φ.
    """
    stages = {_stage(s): s["phi"] for s in snapshots if s["step"] > 0} | {"end": phi}
    if not phi or len(stages) == 1:
        return None
    from matplotlib.figure import Figure

    places = {_depth_and_name(module): module for module in phi}
    depths = sorted({depth for depth, _ in places})
    rows = sorted({depths[0], depths[len(depths) // 2], depths[-1]})
    columns = list(dict.fromkeys(name for _, name in places))
    figure = Figure(figsize=(1.2 + 2.4 * max(len(columns), 2), 1 + 2 * len(rows)))
    _set_margins(figure, right=1.0)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for depth, line in zip(rows, grid, strict=True):
        for name, axes in zip(columns, line, strict=True):
            module = places.get((depth, name))
            for (stage, curves), color in zip(stages.items(), _shades(len(stages)), strict=True):
                if module in curves:
                    axes.plot(curves[module]["z"], curves[module]["phi"], color=color, linewidth=1.3, label=stage)
            _tick_ends(axes)
            _name(axes, f"layer {depth}, {name}", fontsize=7)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=8, frameon=False)
    _label(figure, *OF_PHI)
    figure.suptitle(title)
    return figure


def stable_rank_figure(
    title: str, snapshots: Sequence[Mapping[str, Any]], modules: Mapping[str, Mapping[str, Any]]
) -> Figure | None:
    """The stable rank against depth (paper, Figure 2): a panel per kind, a line per snapshot through the kind's mean.

    Dots are the modules at the end. A snapshot in which all updates are zero, as at a start with B = 0, is not drawn.
    """
    if not modules:
        return None
    stages = {_stage(s): s["stable_rank"] for s in snapshots if any(s["stable_rank"].values())}
    stages["end"] = {name: numbers["stable_rank"] for name, numbers in modules.items()}
    kinds = list(dict.fromkeys(numbers["kind"] for numbers in modules.values()))
    figure, grid = _panels(title, len(kinds), "layer", "stable rank of ΔW")
    for axes, kind in zip(grid, kinds, strict=False):
        members = [name for name, numbers in modules.items() if numbers["kind"] == kind]
        axes.plot(
            [_depth_and_name(name)[0] for name in members], [stages["end"][name] for name in members], "o",
            color="0.75", markersize=3, label="modules, end",
        )  # fmt: skip
        for (stage, ranks), color in zip(stages.items(), _shades(len(stages)), strict=True):
            by_depth = grouped((_depth_and_name(name)[0], ranks[name]) for name in members)
            depths = sorted(by_depth)
            means = [statistics.fmean(by_depth[depth]) for depth in depths]
            axes.plot(depths, means, ".-", color=color, linewidth=1.3, label=stage)
        _name(axes, kind)
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))
    grid[0].legend(fontsize=7)
    return figure


def spectrum_figure(title: str, modules: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """σᵢ / σ₁ of every update (paper, Figure 4): a panel per kind, a thin line per module, the median thick."""
    kinds = grouped((one["kind"], one["spectrum"]) for one in modules.values() if one.get("spectrum"))
    if not kinds:
        return None
    figure, grid = _panels(title, len(kinds), "i", "σᵢ / σ₁ of ΔW")
    shown = 1
    for axes, (kind, spectra) in zip(grid, kinds.items(), strict=False):
        for spectrum in spectra:
            axes.semilogy(range(1, len(spectrum) + 1), spectrum, color="C0", alpha=0.3, linewidth=0.7)
        median = [statistics.median(values) for values in zip(*spectra, strict=False)]
        axes.semilogy(range(1, len(median) + 1), median, color="black", linewidth=1.8, label="median")
        _name(axes, f"{kind} ({len(spectra)} modules)")
        shown = max([shown, *(sum(value > LOWEST_SIGMA for value in spectrum) for spectrum in spectra)])
    for axes in grid[: len(kinds)]:
        axes.minorticks_off()
        axes.set_ylim(LOWEST_SIGMA, 1.3)
        axes.set_xlim(0.5, shown + 1.5)
        axes.locator_params(axis="x", integer=True)
    grid[0].legend(fontsize=7)
    return figure


def modules_figure(title: str, modules: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """The other numbers of the modules at the end, against depth: a panel per number, a line per projection."""
    if not modules:
        return None
    found = {key: key for numbers in modules.values() for key, value in numbers.items() if isinstance(value, float)}
    known = {**NUMBERS, **{key: key for key in found if key not in (*NUMBERS, *ELSEWHERE)}}
    shown = {key: label for key, label in known.items() if key in found}
    figure, grid = _panels(title, len(shown), "layer", right=1.6)
    for axes, (key, label) in zip(grid, shown.items(), strict=False):
        for name, members in _by_name(modules).items():
            points = sorted((depth, numbers[key]) for depth, numbers in members if key in numbers)
            if points:  # a projection without φ has none of φ's numbers
                axes.plot(*zip(*points, strict=True), ".-", linewidth=1.2, label=verbatim(name))
        _name(axes, label)
        axes.locator_params(axis="x", integer=True, nbins=FEW_TICKS)
        axes.locator_params(axis="y", nbins=FEW_TICKS)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        low, high = axes.get_ylim()
        if high - low < ROUNDING:  # equal numbers up to rounding need no magnified scale
            axes.set_ylim(min(0.0, low), max(1.05, high))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=7, frameon=False)
    return figure


def training_figure(
    title: str, curves: Mapping[str, Sequence[tuple[int, float]]], metrics: Mapping[str, float]
) -> Figure | None:
    """The loss with its power law and the evaluations, and the smoothness of the adapter's path up to each step."""
    if not curves.get("loss"):
        return None
    figure, (left, right, *_) = _panels(title, 2, "step")
    steps, losses = zip(*curves["loss"], strict=True)
    left.plot(steps, losses, color="0.6", linewidth=1, label="training loss")
    law = fit_power_law(curves["loss"])
    if law is not None:
        label = f"{law.floor:.2f} + c · t^({law.exponent:.2f})"
        left.plot(steps, [law(step) for step in steps], color="C3", linewidth=1.5, label=label, scaley=False)
    if "eval_loss" in metrics:
        left.plot(steps[-1], metrics["eval_loss"], "D", color="C0", markersize=5, label="held-out loss, end")
    if "eval_loss" in curves:
        left.plot(*zip(*curves["eval_loss"], strict=True), ".-", color="C0", label="held-out loss")
    gap = metrics.get("generalisation_gap", math.nan)
    _name(left, "loss" if math.isnan(gap) else f"loss (generalization gap {gap:+.3f})")
    left.legend(fontsize=7)
    if curves.get("update_smoothness"):
        steps, smoothness = zip(*curves["update_smoothness"], strict=True)
        right.plot(steps, smoothness, color="C0", linewidth=1.5, label="this run")
        right.plot(steps, [step**-0.5 for step in steps], color="0.6", linestyle="--", label="random walk, 1/√t")
        right.legend(fontsize=7)
    right.set_ylim(0, 1.05)
    _name(right, "distance from the start / length of the way")
    return figure


def landscape_figure(title: str, landscape: Mapping[str, Any]) -> Figure | None:
    """The loss on the slice of `landscape` (paper, Figure 5) as filled contours; a cross marks the solution."""
    if not landscape:
        return None
    import numpy as np
    from matplotlib.figure import Figure

    axis = landscape["axis"]
    loss = np.array(landscape["loss"], dtype=float).T  # None becomes NaN, which is left white
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    if np.isfinite(loss).any():
        filled = axes.contourf(axis, axis, np.ma.masked_invalid(loss), levels=24, cmap="viridis")
        figure.colorbar(filled, label="loss of one batch").ax.tick_params(labelsize=7)
    axes.plot(0, 0, "x", color="white", markersize=8)
    _dress(axes)
    axes.set_xlabel("a", fontsize=9)
    axes.set_ylabel("b", fontsize=9)
    axes.set_title("loss at θ* + a d₁ + b d₂", fontsize=9)
    figure.suptitle(title)
    return figure


def bases_figure(curves: Mapping[str, Curve]) -> Figure:
    """b(u) of bases, a panel for each. curves: names to {"u": arguments, "b": values}."""
    figure, grid = _panels("", len(curves), "u", "b(u)")
    for axes, (name, curve) in zip(grid, curves.items(), strict=False):
        axes.plot(curve["u"], curve["b"], linewidth=1.5)
        _name(axes, name)
    return figure


def _panels(title: str, count: int, x: str, y: str = "", right: float = 0.2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three per row, with a right margin in inches; panels left over are blank.

    x, y: the labels of all axes.
    """
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.2 + 3.4 * max(columns, 2), 0.8 + 2.6 * rows))
    _set_margins(figure, right)
    grid = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in grid[:count]:
        _dress(axes)
    for axes in grid[count:]:
        axes.set_axis_off()
    figure.suptitle(title)
    _label(figure, x, y)
    return figure, grid


def _label(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    if y:
        figure.supylabel(y, fontsize=9)


def _set_margins(figure: Figure, right: float) -> None:
    """Set fixed margins that leave space for ticks and titles: an automatic layout takes half of the drawing time."""
    width, height = figure.get_size_inches()
    top = 1 - 0.65 / height
    figure.subplots_adjust(0.75 / width, 0.6 / height, 1 - right / width, top, wspace=0.3, hspace=0.4)


def verbatim(text: str) -> str:
    """A text that matplotlib draws as it is: `$` is escaped, since text between two of them would be a formula."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def _name(axes: Axes, name: str, fontsize: int = 9) -> None:
    axes.set_title(verbatim(name), fontsize=fontsize, pad=6, y=1.0)  # without y, matplotlib searches for a place


def _dress(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_fontsize(7)
    axes.yaxis.get_offset_text().set_fontsize(7)


def _tick_ends(axes: Axes) -> None:
    """Label only the ends of the lines: a small panel has no space for more, and ticks are slow (see FEW_TICKS)."""
    box = axes.dataLim
    for axis, ends in ((axes.xaxis, box.intervalx), (axes.yaxis, box.intervaly)):
        shown = [float(end) for end in ends if math.isfinite(end)]
        axis.set_ticks(shown, [f"{end:.2g}" for end in shown], fontsize=6)


def _shades(count: int) -> list[Any]:
    """`count` colors; the last, of the end of training, is the darkest."""
    import matplotlib

    colors = matplotlib.colormaps["viridis_r"]
    return [colors(1 - PALEST + PALEST * i / max(count - 1, 1)) for i in range(count)]


def _stage(snapshot: Mapping[str, Any]) -> str:
    return f"step {snapshot['step']}"


def _by_name(modules: Mapping[str, Any]) -> dict[str, list[tuple[int, Any]]]:
    """Projections, such as "attention.self.query", to the (depth, value) of each of their modules."""
    places = ((*_depth_and_name(module), value) for module, value in modules.items())
    return grouped((name, (depth, value)) for depth, name, value in places)


def _depth_and_name(module: str) -> tuple[int, str]:
    """(3, "attention.self.query") of "encoder.layer.3.attention.self.query"."""
    found = re.search(r"\.(\d+)\.(.+)$", module)
    return (int(found[1]), found[2]) if found else (0, module)
