"""A report in words: its tables, verdicts and notes, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from basisadapt import backbones
from basisadapt.core.ranges import Choices, Range
from basisadapt.diagnostics.linear import LINEAR
from basisadapt.study import statistics
from basisadapt.study.outcome import NOT_RUN
from basisadapt.study.plan.cells import plain
from basisadapt.study.report.records import row_records
from basisadapt.study.report.table import LINEARITY, Across, Line, Table

if TYPE_CHECKING:
    from basisadapt.study.plan.spec import Reference
    from basisadapt.study.plan.tuning import RowTuning, Tuned
    from basisadapt.study.report.report import Report, SearchResult
    from basisadapt.study.statistics import Difference

DASH = "-"
FIT, _, LARGEST_SHARE = LINEARITY


class MetricFormat(NamedTuple):
    """How a metric is shown: its head, the number's format, and what it is divided by."""

    head: str
    number: str
    unit: float = 1


METRIC_FORMATS = {  # of metrics for which the plain one would not do
    "stable_rank.mean": MetricFormat("stable rank", ".2f"),
    "dc_share.mean": MetricFormat("DC share", ".3f"),
    "parameters.trainable": MetricFormat("trainable", ",.0f"),
    "linear_fit.mean": MetricFormat("linear fit c", ".3g"),
    "nonlinear_share.mean": MetricFormat("nonlinear share", ".2%"),
    "nonlinear_share.largest": MetricFormat("largest share", ".2%"),
    "bits / parameters.trainable": MetricFormat("bits a number", ".3f"),
    "adapter.bytes": MetricFormat("adapter, MB", ",.2f", 1e6),
    "memory.peak_bytes": MetricFormat("peak memory, MB", ",.0f", 1e6),
    "seconds.train": MetricFormat("training, s", ",.1f"),
    "tokens_per_second": MetricFormat("tokens/s", ",.0f"),
}


@dataclass(frozen=True)
class Grid:
    """A table as text. rows: their cells, the first being the row's name. notes: sentences below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


@functools.lru_cache(maxsize=1)  # a report is written as text, Markdown, CSV and a page
def grids(report: Report) -> tuple[Grid, ...]:
    """Every table of a report, the study's own first."""
    table, found, tuned = report.table, report.search, report.tuned
    made = [_main(table)]
    if len(table.at) > 1:
        made.append(_curves(table))
    if tuned is not None and tuned.tuning.trials:
        made.append(_tuning(tuned, table))
    if table.across:
        made.append(_across(table))
    if found is not None:
        made += [_trials(found, _number_form(table)), _importance(found)]
    return tuple(made)


def to_text(report: Report) -> str:
    """The report for a terminal."""
    parts = []
    for grid in grids(report):
        body = [_aligned(grid), ""] if grid.rows else []
        parts.append("\n".join([grid.title, "", *body, *grid.notes]))
    if report.verdicts:
        lines = ["Claims", ""]
        for verdict in report.verdicts:
            lines += [f"{verdict.word}: {verdict.claim.text}", *(f"    {reason}" for reason in verdict.because)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_markdown(report: Report) -> str:
    """The report for a page."""
    parts = []
    for grid in grids(report):
        rows = [[_marked(cell).replace("|", r"\|") for cell in row] for row in [grid.header, *grid.rows]]
        rows.insert(1, ["---", *["---:"] * (len(grid.header) - 1)])
        body = [*(f"| {' | '.join(row)} |" for row in rows), ""] if grid.rows else []
        notes = (f"- {_marked(note)}" for note in grid.notes)
        parts.append("\n".join([f"**{_marked(grid.title)}**", "", *body, *notes]))
    if report.verdicts:
        lines = ["**Claims**", ""]
        for verdict in report.verdicts:
            lines.append(f"- **{verdict.word}**: {_marked(verdict.claim.text)}. {_marked('; '.join(verdict.because))}.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _marked(text: str) -> str:
    """A text in Markdown: one line, and no HTML."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))


def to_csv(table: Table) -> str:
    """The numbers behind the table, unrounded and unscaled; with values of the tuned setting, each row at these too."""
    text, records = io.StringIO(), row_records(table)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(records[0])
    for record in records:
        label, *others = record.values()
        writer.writerow([_inert(label), *others])
    return text.getvalue()


def grid_to_csv(grid: Grid) -> str:
    """A table as it is shown."""
    text = io.StringIO()
    rows = ([_inert(label), *cells] for label, *cells in grid.rows)
    csv.writer(text, lineterminator="\n").writerows([grid.header, *rows])
    return text.getvalue()


def _inert(label: str) -> str:
    """A label that no spreadsheet takes for a formula."""
    return f"'{label}" if label.startswith(("=", "+", "-", "@", "\t", "\r")) else label


def _aligned(grid: Grid) -> str:
    rows = [grid.header, *grid.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(grid.header))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(grid.header), "  ".join("-" * width for width in widths), *map(line, grid.rows)])


# --- the study's own table ---


def _main(table: Table) -> Grid:
    """A column that the study cannot fill is left out. What rows have at a value of all stands beside their own."""
    reference, answers = table.study.spec.reference, table.study.spec.answers
    shows_published = answers is not None and not any(line.published for line in table.across)
    number = _number_form(table)

    def compared(line: Line) -> list[str]:
        values = list(line.values.values())
        cells = [_with_std(number(statistics.mean(values), ""), number(statistics.std(values), "")), _seeds(line)]
        return [*cells, *([_difference(line.difference, number), _p(line.p)] if reference is not None else [])]

    rows = []
    for index, line in enumerate(table.lines):
        score, *others = compared(line)
        cells = [line.label, score, *([_with_std(*(line.published or (DASH, None)))] if shows_published else [])]
        cells += [*others, *(cell for same in table.beside.values() for cell in compared(same.lines[index]))]
        rows.append([*cells, *(_metric(name, line.mean_of(name)) for name in table.columns)])

    score, *heads = [_headline(table), "seeds", *_compared_heads(reference)]
    header = ["row", score, *(["published"] if shows_published else []), *heads]
    header += _heads_beside(table, score, heads)
    header += [_head(name) for name in table.columns]
    return Grid(table.study.spec.title, header, rows, _notes(table))


def _could_have_seen(differences: Iterable[Difference | None], number: Callable[[float | None, str], str]) -> list[str]:
    """A sentence on the differences that a table's intervals could have told from zero."""
    halves = sorted((d.high - d.low) / 2 for d in differences if d and d.low is not None and d.high is not None)
    if not halves:
        return []
    least, middle, most = halves[0], halves[len(halves) // 2], halves[-1]
    between = "" if least == most else f" in the middle row, {number(least, '')} to {number(most, '')} in all"
    return [f"A difference of {number(middle, '')} could have been seen{between}: half the width of its interval."]


def _heads_beside(table: Table, score: str, heads: Sequence[str]) -> list[str]:
    """The same heads for each of the tables beside."""
    found = []
    for value in table.beside:
        found += [f"{score} at {table.place(value)}", *(f"{head} at {plain(value)}" for head in heads)]
    return found


def _compared_heads(reference: Reference | None) -> list[str]:
    return [] if reference is None else [f"difference to {reference} (95 % CI)", "p (Holm)"]


def _across(table: Table) -> Grid:
    number, reference = _number_form(table), table.study.spec.reference
    shows_published = any(line.published for line in table.across)
    tasks = len({line.task for line in table.lines})

    def compared(line: Across) -> list[str]:
        whole = len(line.values) == tasks  # the mean of fewer tasks stands beside no other
        cells = [number(statistics.mean(list(line.values.values())), "") if whole else DASH]
        cells.append(str(tasks) if whole else f"{len(line.values)} of {tasks}")
        found = [_difference(line.difference, number), _p(line.p), _difference(line.pairs, number)]
        return [*cells, *(found if reference is not None else [])]

    rows = []
    for index, line in enumerate(table.across):
        score, *others = compared(line)
        cells = [line.name, score, *([_with_std(*(line.published or (DASH, None)))] if shows_published else [])]
        rows.append([*cells, *others, *(c for same in table.beside.values() for c in compared(same.across[index]))])

    pairs = ["by task and seed (95 % CI)"] if reference is not None else []
    score, *heads = [_headline(table), "tasks", *_compared_heads(reference), *pairs]
    header = ["row", score, *(["published"] if shows_published else []), *heads]
    header += _heads_beside(table, score, heads)
    notes = ["Means over tasks."]
    if reference is not None:
        notes[0] += (
            " Differences are paired by task, each task's being its mean over seeds; two-sided paired t-test over "
            "tasks, Holm-corrected (paper, section B.2)."
        )
        notes.append(
            "The last column pairs by task and seed: more pairs, for a statement on these tasks alone; its intervals "
            "are not corrected for their number."
        )
    notes += _could_have_seen((line.difference for line in table.across), number)
    return Grid("Over all tasks", header, rows, notes)


def _curves(table: Table) -> Grid:
    """Every row at every value of the tuned setting, and how wide its curve is near its best."""
    number, setting, rows = _number_form(table), table.setting, []
    for line in table.lines:
        cells = [line.label]
        for same in table.curve(line).values():
            values = list(same.values.values())
            cells.append(_with_std(number(statistics.mean(values), ""), number(statistics.std(values), "")))
        plateau = table.plateau(line)
        widths = list(plateau.by_seed.values()) if plateau else []
        cells.append(f"{'≥ ' if plateau.open else ''}{plateau.octaves:.2f}" if plateau else DASH)
        cells.append(_by_seed(widths))
        rows.append(cells)
    header = ["row", *(table.place(value) for value in table.at), "plateau, octaves", "by seed (95 % CI)"]
    point = "one point" if table.percent else "1"
    notes = [
        f"{_headline(table)}, mean ± sample standard deviation over seeds at each {setting}, chosen or not.",
        f"Plateau: how many octaves of {setting} lie within {point} of the best of the row's mean curve, straight "
        "between its values on a logarithmic axis; ≥: the plateau reaches an end of the grid. By seed: the mean of the "
        "same of each seed's curve. Where a run diverged there is no plateau.",
    ]
    return Grid(f"Over {setting}", header, rows, notes)


def _by_seed(widths: list[float]) -> str:
    centre, bounds = statistics.mean(widths), statistics.interval(widths)
    if centre is None:
        return DASH
    return f"{centre:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def _number_form(table: Table) -> Callable[[float | None, str], str]:
    """How the headline metric is written: per cent with two digits, or four digits."""
    scale, digits = (100, 2) if table.percent else (1, 4)
    return lambda value, sign: DASH if value is None else f"{value * scale:{sign}.{digits}f}"


def _headline(table: Table) -> str:
    return f"{table.headline}, %" if table.percent else table.headline


def _head(metric: str) -> str:
    return METRIC_FORMATS[metric].head if metric in METRIC_FORMATS else metric.removesuffix(".mean").replace("_", " ")


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return DASH
    form = METRIC_FORMATS.get(name, MetricFormat("", ",.0f" if abs(value) >= 1000 else ".3g"))
    return format(value / form.unit, form.number)


def _difference(difference: Difference | None, number: Callable[[float | None, str], str]) -> str:
    if difference is None:
        return DASH
    known = difference.low is not None
    interval = f" [{number(difference.low, '+')}, {number(difference.high, '+')}]" if known else ""
    return number(difference.mean, "+") + interval


def standing(table: Table, label: str) -> str:
    """What a row is worth by the cells that have finished: ", +0.42 [-0.10, +0.94] to LoRA over 3 seeds"; nothing where
    there is no seed that it can be compared at."""
    found = next((line.difference for line in table.lines if line.label == label), None)
    if found is None or table.study.spec.reference is None:
        return ""
    seeds = f"{found.n} seed{'' if found.n == 1 else 's'}"
    return f", {_difference(found, _number_form(table))} to {reference_named(table.study.spec.reference)} over {seeds}"


def _seeds(line: Line) -> str:
    """ "3", or what became of the others: "1 of 3 failed"."""
    total = len(line.seeds)
    unfinished = {state: seeds for state, seeds in line.seeds_by_state().items() if state != "finished"}
    return ", ".join(f"{len(seeds)} of {total} {state}" for state, seeds in unfinished.items()) or str(total)


def _with_std(value: str, std: str | None) -> str:
    return value if std in (None, "", DASH) else f"{value} ± {std}"


def _p(p: float | None) -> str:
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def reference_named(reference: Reference) -> str:
    """LoRA; or, for method=lora, what that means."""
    return reference.value if reference.axis is None else f"the row with {reference} that is otherwise equal"


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
                f"Differences to {reference_named(spec.reference)} are paired by seed: mean, 95 % confidence interval "
                f"(t), two-sided paired t-test, Holm-corrected for {tests} test{'' if tests == 1 else 's'}."
            )
        notes += _could_have_seen((line.difference for line in table.lines), _number_form(table))
    if table.beside:
        places = " and ".join(table.place(value) for value in table.beside)
        notes.append(
            f"The first columns have each row at its own {table.setting}, the later ones all rows at {places}."
        )
    notes += _linearity(table)
    notes += _backbones(table)
    notes += trouble(table)
    notes += _splits(table)
    if spec.answers is not None:
        setting = f" ({spec.answers.setting})" if spec.answers.setting else ""
        notes.append(
            f"Published: the paper's {spec.answers.table.removesuffix('.csv').replace('_', ' ')}{setting}. "
            "On another backbone and task, only the order of the rows can be compared."
        )
    return notes


def _linearity(table: Table) -> list[str]:
    """What the columns of `LINEARITY` are, and the rows whose φ is hardly more than LoRA."""
    if not set(LINEARITY) & {*table.columns}:
        return []
    notes = [
        "Linear fit: c of the best ΔW ≈ c · s · BA; nonlinear share: ‖ΔW − c s BA‖ / ‖ΔW‖. Means over a run's modules; "
        "the last of these columns has the largest share of a module."
    ]
    linear = [
        f"{line.label} (times {_metric(FIT, line.mean_of(FIT))})"
        for line in table.lines
        if max(line.values_of(LARGEST_SHARE).values(), default=1.0) < LINEAR
    ]
    if linear:
        notes.append(f"φ is LoRA with its scale times c where no module's share reaches 1 %: {', '.join(linear)}.")
    return notes


def trouble(table: Table) -> list[str]:
    """A sentence for each task whose data changed, for each row's cells that ended badly, for those that were not run,
    and for each warning."""
    notes = _changed_data(table)
    warned: dict[str, list[str]] = {}
    for line in table.every_line:
        label = line.row.cells[0].row
        for state, seeds in line.seeds_by_state().items():
            if state not in ("finished", NOT_RUN):
                errors = dict.fromkeys(line.outcomes[seed].error for seed in seeds if seed in line.outcomes)
                reason = "; ".join(filter(None, errors))
                notes.append(f"{state.capitalize()}: {label} {_named(seeds)}{f' ({reason})' if reason else ''}.")
        by_warning: dict[str, list[int]] = {}
        for seed, outcome in line.outcomes.items():
            for warning in outcome.warnings:
                by_warning.setdefault(warning, []).append(seed)
        for warning, seeds in by_warning.items():
            warned.setdefault(warning, []).append(f"{label} {_named(seeds)}")
    missing = sum(len(line.seeds_by_state().get(NOT_RUN, ())) for line in table.every_line)
    if missing:
        notes.append(f"Not run: {missing} of {sum(len(line.seeds) for line in table.every_line)} cells.")
    return notes + [f"Warning, {'; '.join(places)}: {warning}" for warning, places in warned.items()]


def _changed_data(table: Table) -> list[str]:
    """A sentence for each task whose cells did not all see the same rows."""
    seen: dict[Any, dict[str, list[str]]] = {}
    for line in table.every_line:
        seeds_by_data: dict[str, list[int]] = {}
        for seed, outcome in line.outcomes.items():
            if outcome.done and "fingerprint" in outcome.data:
                seeds_by_data.setdefault(outcome.data["fingerprint"], []).append(seed)
        of_task = seen.setdefault((line.task, line.row.cells[0].config.data), {})
        for fingerprint, seeds in seeds_by_data.items():
            of_task.setdefault(fingerprint, []).append(f"{line.row.cells[0].row} {_named(seeds)}")
    return [
        f"The rows of {task} changed between cells, which cannot be compared across the change: "
        + "; ".join(f"{', '.join(places)} saw {fingerprint}" for fingerprint, places in of_task.items())
        + "."
        for (task, _), of_task in seen.items()
        if len(of_task) > 1
    ]


def _splits(table: Table) -> list[str]:
    """How a task's rows were split, where they do not come that way."""
    outcomes = ((line.task, outcome) for line in table.lines for outcome in line.outcomes.values())
    return list(dict.fromkeys(f"Rows of {task}: {o.data['split']}." for task, o in outcomes if "split" in o.data))


def _backbones(table: Table) -> list[str]:
    """What the runs say of their weights; the catalogue speaks where nothing has run."""
    said = []
    for line in table.lines:
        name, seen = line.row.cells[0].config.backbone, [o.data for o in line.outcomes.values() if o.data]
        notes = [data.get("backbone", "") for data in seen] if seen else [backbones.find(name).note]
        said += [f"Backbone {name}: {note}." for note in notes if note]
    return list(dict.fromkeys(said))


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


# --- tuning ---


def _tuning(tuned: Tuned, table: Table) -> Grid:
    """The choice and the value of every candidate, row by row."""
    rule = tuned.tuning.spec.tune
    assert rule is not None
    number = _number_form(table) if rule.by == "score" else lambda value, _: f"{value:.4f}"
    candidates = [tried.candidate for tried in tuned.choices[0].tried]
    keys = [key for key, _ in candidates[0].point]

    def setting(choice: RowTuning, key: str) -> str:
        settings = choice.row.cells[0].settings
        if choice.best is None or key not in settings:
            return DASH
        return f"{_setting(settings[key])}{' (edge)' if key in choice.edges else ''}"

    rows = []
    for choice in tuned.choices:
        values = [number(tried.value, "") if tried.value is not None else tried.state for tried in choice.tried]
        rows.append([choice.row.label, *(setting(choice, key) for key in keys), *values])
    names = [key.removeprefix("adapter.") for key in keys]
    seeds, where = _named(rule.seeds), "which draw other rows than those reported"
    if rule.validation is not None:
        share = f"the last {100 * rule.validation:g} %"
        where = f"trained on all but {share} of the training rows and evaluated on these"
    notes = [
        f"The rule: each row is first run with every {' and '.join(names)} above and {seeds}, {where}; what gives the "
        f"{'lowest mean eval_loss' if rule.by == 'loss' else f'highest mean {table.headline}'} is taken, the first of "
        "equals; what failed or diverged counts as worst."
    ]
    edges = [choice.row.label for choice in tuned.choices if choice.edges]
    if edges:
        notes.append(f"Chosen at an edge of the grid, beyond which a better value may lie: {', '.join(edges)}.")
    return Grid("Tuning", ["row", *names, *(candidate.name for candidate in candidates)], rows, notes)


# --- a search ---


def _trials(found: SearchResult, number: Callable[[float | None, str], str]) -> Grid:
    names = [key.removeprefix("adapter.") for key in found.space]
    rows = [
        [trial.label, number(trial.value, ""), trial.status, *(_setting(trial.params[key]) for key in found.space)]
        for trial in found.ranked
    ]
    counts = f"{len(found.trials)} of {found.wanted} trials"
    notes = [
        f"{counts}, sampler {found.sampler}, seeded by {found.seeds[0]}; a trial's value is the mean over the seeds "
        f"{', '.join(map(str, found.seeds))}.",
        "The best of many trials is chosen on the seeds that it is shown with, which flatters it: its difference and "
        "p-value are a lead, to be confirmed on other seeds.",
        *(f"{name}: {_where(where)}." for name, where in zip(names, found.space.values(), strict=True)),
    ]
    return Grid("Trials", ["trial", "value", "state", *names], rows, notes)


def _importance(found: SearchResult) -> Grid:
    rows = [[key.removeprefix("adapter."), f"{share:.2f}"] for key, share in found.importance.items()]
    explained = "Share of the value's variance that a setting explains by itself (fANOVA), scaled to add up to 1; "
    note = found.no_importance or f"{explained}rough for few trials."
    return Grid("Importance", ["setting", "importance"], rows, [note])


def _where(where: Range | Choices) -> str:
    return str(where) if isinstance(where, Range) else ", ".join(map(_setting, where))


def _setting(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
