"""The sentences below a table of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from basisadapt import backbones
from basisadapt.core.grouping import grouped
from basisadapt.diagnostics.linear import LINEAR
from basisadapt.study.outcome import NOT_RUN
from basisadapt.study.report.formats import NumberForm, metric_text, number_form, reference_text, seed_names
from basisadapt.study.report.law import law_notes
from basisadapt.study.report.table import LINEARITY, Table
from basisadapt.study.statistics import Difference

FIT, _, LARGEST_SHARE = LINEARITY


def footnotes(table: Table) -> list[str]:
    """The notes below the study's own table."""
    spec, seeds = table.study.spec, table.lines[0].seeds
    notes = []
    if len(seeds) == 1:
        notes.append(f"One seed a row ({seeds[0]}): no deviation, interval or test.")
    else:
        notes.append(f"Mean ± sample standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}).")
        if spec.reference is not None:
            notes.append(
                f"Differences to {reference_text(spec.reference)} are paired by seed: mean, 95 % confidence interval "
                f"(t), two-sided paired t-test, Holm-corrected for {_tests(table)}."
            )
        notes += detectable((line.difference for line in table.lines), number_form(table))
    if table.beside:
        places = " and ".join(table.place(value) for value in table.beside)
        notes.append(
            f"The first columns have each row at its own {table.setting}, the later ones all rows at {places}, "
            f"corrected for {' and '.join(map(_tests, table.beside.values()))} of their own."
        )
    for notes_of in (law_notes, _linearity, _backbones, problems, _splits):
        notes += notes_of(table)
    if spec.answers is not None:
        setting = f" ({spec.answers.setting})" if spec.answers.setting else ""
        notes.append(
            f"Published: the paper's {spec.answers.table.removesuffix('.csv').replace('_', ' ')}{setting}. "
            "On another backbone and task, only the order of the rows can be compared."
        )
    return notes


def _tests(table: Table) -> str:
    """The number of tests of a table's own columns, such as "12 tests"."""
    count = sum(line.p is not None for line in table.lines)
    return f"{count} test{'' if count == 1 else 's'}"


def detectable(differences: Iterable[Difference | None], number: NumberForm) -> list[str]:
    """A note on the smallest differences that the table's confidence intervals can separate from zero."""
    halves = sorted((d.high - d.low) / 2 for d in differences if d and d.low is not None and d.high is not None)
    if not halves:
        return []
    least, middle, most = halves[0], halves[len(halves) // 2], halves[-1]
    between = "" if least == most else f" in the middle row, {number(least, '')} to {number(most, '')} in all"
    return [f"A difference of {number(middle, '')} could have been seen{between}: half the width of its interval."]


def _linearity(table: Table) -> list[str]:
    """What the columns of `LINEARITY` mean, and the rows whose φ is nearly linear, so nearly LoRA."""
    if not set(LINEARITY) & {*table.columns}:
        return []
    notes = [
        "Linear fit: c of the best ΔW ≈ c · s · BA; nonlinear share: ‖ΔW − c s BA‖ / ‖ΔW‖. Means over a run's modules; "
        "the last of these columns has the largest share of a module."
    ]
    linear = [
        f"{line.label} (times {metric_text(FIT, line.mean_of(FIT))})"
        for line in table.lines
        if max(line.values_of(LARGEST_SHARE).values(), default=1.0) < LINEAR
    ]
    if linear:
        notes.append(f"φ is LoRA with its scale times c where no module's share reaches 1 %: {', '.join(linear)}.")
    return notes


def problems(table: Table) -> list[str]:
    """A note on each task whose data changed, on the failed cells of each row, on missing cells, on each warning."""
    notes = _changed_data(table)
    warned: dict[str, list[str]] = {}
    for line in table.every_line:
        label = line.row.cells[0].row
        for state, seeds in line.seeds_by_state().items():
            if state not in ("finished", NOT_RUN):
                errors = dict.fromkeys(line.outcomes[seed].error for seed in seeds if seed in line.outcomes)
                reason = "; ".join(filter(None, errors))
                notes.append(f"{state.capitalize()}: {label} {seed_names(seeds)}{f' ({reason})' if reason else ''}.")
        by_warning = grouped((warning, seed) for seed, o in line.outcomes.items() for warning in o.warnings)
        for warning, seeds in by_warning.items():
            warned.setdefault(warning, []).append(f"{label} {seed_names(seeds)}")
    missing = sum(len(line.seeds_by_state().get(NOT_RUN, ())) for line in table.every_line)
    if missing:
        notes.append(f"Not run: {missing} of {sum(len(line.seeds) for line in table.every_line)} cells.")
    return notes + [f"Warning, {'; '.join(places)}: {warning}" for warning, places in warned.items()]


def _changed_data(table: Table) -> list[str]:
    """A note on each task whose cells were not all run on the same data."""
    seen: dict[Any, dict[str, list[str]]] = {}
    for line in table.every_line:
        done = ((seed, outcome.data) for seed, outcome in line.outcomes.items() if outcome.done)
        seeds_by_data = grouped((data["fingerprint"], seed) for seed, data in done if "fingerprint" in data)
        of_task = seen.setdefault((line.task, line.row.cells[0].config.data), {})
        for fingerprint, seeds in seeds_by_data.items():
            of_task.setdefault(fingerprint, []).append(f"{line.row.cells[0].row} {seed_names(seeds)}")
    return [
        f"The rows of {task} changed between cells, which cannot be compared across the change: "
        + "; ".join(f"{', '.join(places)} saw {fingerprint}" for fingerprint, places in of_task.items())
        + "."
        for (task, _), of_task in seen.items()
        if len(of_task) > 1
    ]


def _splits(table: Table) -> list[str]:
    """How each task was split, if this package split it."""
    outcomes = ((line.task, outcome) for line in table.lines for outcome in line.outcomes.values())
    return list(dict.fromkeys(f"Rows of {task}: {o.data['split']}." for task, o in outcomes if "split" in o.data))


def _backbones(table: Table) -> list[str]:
    """The notes that runs recorded on their backbone; the catalogue's note if nothing has run."""
    said = []
    for line in table.lines:
        name, seen = line.row.cells[0].config.backbone, [o.data for o in line.outcomes.values() if o.data]
        notes = [data.get("backbone", "") for data in seen] if seen else [backbones.find(name).note]
        said += [f"Backbone {name}: {note}." for note in notes if note]
    return list(dict.fromkeys(said))
