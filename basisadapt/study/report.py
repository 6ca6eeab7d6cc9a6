"""What a study says: its table from the record, as text, Markdown and CSV, and its figures."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basisadapt.study import statistics
from basisadapt.study.spec import published_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.study.record import Outcome
    from basisadapt.study.spec import Row, Study

PERCENT = ("accuracy", "f1", "matthews", "pearson", "spearman")  # metrics that are read as percentages
DASH = "-"


@dataclass(frozen=True)
class Line:
    """A row of the table.

    outcomes: seed to what the record holds of the cell. difference: to the reference row. p: of its test,
    adjusted. published: value and standard deviation as printed in the paper.
    """

    label: str
    seeds: tuple[int, ...]
    outcomes: dict[int, Outcome]
    published: tuple[str, str | None] | None
    difference: statistics.Difference | None = None
    p: float | None = None

    @property
    def values(self) -> dict[int, float]:
        """Seed to headline metric, of the finished cells."""
        return {seed: o.value for seed, o in self.outcomes.items() if o.value is not None}

    def mean_of(self, metric: str) -> float | None:
        """The mean of another metric over the finished cells."""
        finished = [o.metrics for o in self.outcomes.values() if o.status == "finished"]
        return statistics.mean([metrics[metric] for metrics in finished if metric in metrics])

    def seeds_by_state(self) -> dict[str, list[int]]:
        """ "failed", "diverged", ... or "not run", to the seeds of which that is the last word."""
        states: dict[str, list[int]] = {}
        for seed in self.seeds:
            state = self.outcomes[seed].status if seed in self.outcomes else "not run"
            states.setdefault(state, []).append(seed)
        return states


@dataclass(frozen=True)
class Table:
    """The rows of a study, in its order. headline: the metric that is compared."""

    study: Study
    headline: str
    lines: tuple[Line, ...]

    @property
    def unsound(self) -> bool:
        """Whether a cell failed or diverged."""
        return any({"failed", "diverged"} & line.seeds_by_state().keys() for line in self.lines)

    @property
    def percent(self) -> bool:
        """Whether the headline metric is read as a percentage."""
        values = [value for line in self.lines for value in line.values.values()]
        return any(word in self.headline for word in PERCENT) and all(abs(value) <= 1 for value in values)

    @property
    def run_ids(self) -> list[str]:
        """The MLflow runs behind the table."""
        return [o.run_id for line in self.lines for o in line.outcomes.values() if o.done]


def build_table(study: Study, outcomes: Mapping[str, Outcome]) -> Table:
    """The table of a study's own cells, whichever invocation ran them."""
    published = published_values(study.spec.answers)
    lines = [_line(row, outcomes, published) for row in study.rows]
    reference = next((line for line in lines if line.label == study.spec.reference), None)
    if reference is not None:
        lines = [line if line is reference else _compared(line, reference) for line in lines]
    adjusted = statistics.holm([line.difference.p if line.difference else None for line in lines])
    lines = [dataclasses.replace(line, p=p) for line, p in zip(lines, adjusted, strict=True)]
    headlines = [o.headline for line in lines for o in line.outcomes.values() if o.headline]
    return Table(study, headlines[0] if headlines else "result", tuple(lines))


def _line(row: Row, outcomes: Mapping[str, Outcome], published: Mapping[str, tuple[str, str | None]]) -> Line:
    return Line(
        label=row.label,
        seeds=tuple(cell.seed for cell in row.cells),
        outcomes={cell.seed: outcomes[cell.key] for cell in row.cells if cell.key in outcomes},
        published=published.get(row.published or ""),
    )


def _compared(line: Line, reference: Line) -> Line:
    return dataclasses.replace(line, difference=statistics.difference(line.values, reference.values))


def files(table: Table) -> dict[str, str | Figure]:
    """Everything that is kept of a table: file name to content."""
    return {
        "table.txt": to_text(table),
        "table.md": to_markdown(table),
        "table.csv": to_csv(table),
        "comparison.png": comparison_figure(table),
    }


# --- the table in words ---


def to_text(table: Table) -> str:
    """The table for a terminal, with the notes below it."""
    header, *rows = _cells(table)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.study.spec.title, "", line(header), rule, *map(line, rows), "", *_notes(table)]) + "\n"


def to_markdown(table: Table) -> str:
    """The table for a page, with the notes below it."""
    header, *rows = [[cell.replace("|", r"\|") for cell in row] for row in _cells(table)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    body = [f"| {' | '.join(row)} |" for row in lines]
    return "\n".join([f"**{table.study.spec.title}**", "", *body, "", *(f"- {note}" for note in _notes(table))]) + "\n"


def to_csv(table: Table) -> str:
    """The numbers behind the table, unrounded and unscaled."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    compared = ("difference", "ci_low", "ci_high", "p", "p_holm")
    names = ("stable_rank.mean", "dc_share.mean", "parameters.trainable")
    writer.writerow(["row", "metric", "n", "mean", "std", *compared, *names, "states", "published", "published_std"])
    for line in table.lines:
        values, difference = list(line.values.values()), line.difference
        numbers = (difference.mean, difference.low, difference.high, difference.p) if difference else (None,) * 4
        states = "; ".join(f"{state}: {' '.join(map(str, seeds))}" for state, seeds in line.seeds_by_state().items())
        row = [line.label, table.headline, len(values), statistics.mean(values), statistics.std(values)]
        row += [
            *numbers,
            line.p,
            *(line.mean_of(name) for name in names),
            states,
            *(line.published or (None, None)),
        ]
        writer.writerow(row)
    return text.getvalue()


def _cells(table: Table) -> list[list[str]]:
    """Header and rows as text. A column that the study cannot fill is left out."""
    reference, answers = table.study.spec.reference, table.study.spec.answers
    scale, digits = (100, 2) if table.percent else (1, 4)

    def number(value: float | None, sign: str = "") -> str:
        return DASH if value is None else f"{value * scale:{sign}.{digits}f}"

    def row(line: Line) -> list[str]:
        values, difference = list(line.values.values()), line.difference
        cells = [
            line.label,
            _with_std(number(statistics.mean(values)), number(statistics.std(values))),
            _seeds(line),
        ]
        if reference is not None:
            interval = f"[{number(difference.low, '+')}, {number(difference.high, '+')}]" if difference else ""
            known = difference is not None and difference.low is not None
            cells.append(f"{number(difference.mean if difference else None, '+')} {interval if known else ''}".rstrip())
            cells.append(_p(line.p))
        cells += [
            _plain(line.mean_of("stable_rank.mean"), ".2f"),
            _plain(line.mean_of("dc_share.mean"), ".3f"),
            _plain(line.mean_of("parameters.trainable"), ",.0f"),
        ]
        if answers is not None:
            cells.append(_with_std(*(line.published or (DASH, None))))
        return cells

    header = ["row", f"{table.headline}, %" if table.percent else table.headline, "seeds"]
    header += [f"difference to {reference} (95 % CI)", "p (Holm)"] if reference is not None else []
    header += ["stable rank", "DC share", "trainable"]
    header += ["published"] if answers is not None else []
    return [header, *map(row, table.lines)]


def _seeds(line: Line) -> str:
    """ "3", or what became of the others: "1 of 3 failed"."""
    total = len(line.seeds)
    unfinished = {state: seeds for state, seeds in line.seeds_by_state().items() if state != "finished"}
    return ", ".join(f"{len(seeds)} of {total} {state}" for state, seeds in unfinished.items()) or str(total)


def _with_std(value: str, std: str | None) -> str:
    return value if std in (None, "", DASH) else f"{value} ± {std}"


def _plain(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def _p(p: float | None) -> str:
    return "< 0.001" if p is not None and p < 0.001 else _plain(p, ".3f")


def _notes(table: Table) -> list[str]:
    spec, seeds = table.study.spec, table.lines[0].seeds
    notes = []
    if len(seeds) == 1:
        notes.append(f"One seed a row ({seeds[0]}): no deviation, interval or test.")
    else:
        notes.append(f"Mean ± sample standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}).")
        tests = sum(line.p is not None for line in table.lines)
        if spec.reference is not None:
            notes.append(
                f"Differences to {spec.reference} are paired by seed: mean, 95 % confidence interval (t), "
                f"two-sided paired t-test, Holm-corrected for {tests} tests."
            )
    notes += _trouble(table)
    if spec.answers is not None:
        setting = f" ({spec.answers.setting})" if spec.answers.setting else ""
        notes.append(
            f"Published: the paper's {spec.answers.table.removesuffix('.csv').replace('_', ' ')}{setting}. "
            "On another backbone and task, only the order of the rows can be compared."
        )
    return notes


def _trouble(table: Table) -> list[str]:
    """A sentence for the unfinished cells of each row, and one for each warning, with its rows and seeds."""
    notes = []
    warned: dict[str, list[str]] = {}
    for line in table.lines:
        for state, seeds in line.seeds_by_state().items():
            if state != "finished":
                errors = dict.fromkeys(line.outcomes[seed].error for seed in seeds if seed in line.outcomes)
                reason = "; ".join(filter(None, errors))
                notes.append(f"{state.capitalize()}: {line.label} {_named(seeds)}{f' ({reason})' if reason else ''}.")
        by_warning: dict[str, list[int]] = {}
        for seed, outcome in line.outcomes.items():
            for warning in outcome.warnings:
                by_warning.setdefault(warning, []).append(seed)
        for warning, seeds in by_warning.items():
            warned.setdefault(warning, []).append(f"{line.label} {_named(seeds)}")
    return notes + [f"Warning, {'; '.join(places)}: {warning}" for warning, places in warned.items()]


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


# --- figures ---


def comparison_figure(table: Table) -> Figure:
    """Every row's seeds as dots, mean ± standard deviation over them, and the reference's mean as a line."""
    from matplotlib.figure import Figure

    scale = 100 if table.percent else 1
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(table.lines)), layout="constrained")
    axes = figure.add_subplot()
    for place, line in enumerate(table.lines):
        values = [value * scale for value in line.values.values()]
        centre, spread = statistics.mean(values), statistics.std(values)
        axes.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        if centre is not None:
            axes.errorbar(centre, place, xerr=spread, fmt="o", color="C0", capsize=4)
            if line.label == table.study.spec.reference:
                axes.axvline(centre, color="0.5", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(table.lines)), [line.label for line in table.lines])
    axes.set_ylim(len(table.lines) - 0.5, -0.5)
    axes.set_xlabel(f"{table.headline}{', %' if table.percent else ''} (mean ± std over seeds)")
    axes.set_title(table.study.spec.title)
    axes.grid(axis="x", alpha=0.3)
    return figure
