"""The tables of a report, each cell as text. `text`, `html` and `files` lay them out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from basisadapt.core.ranges import Range
from basisadapt.study import statistics
from basisadapt.study.plan.keys import plain
from basisadapt.study.plan.spec import Reference
from basisadapt.study.plan.tuning import RowTuning, Tuned
from basisadapt.study.report.footnotes import detectable, footnotes
from basisadapt.study.report.formats import (
    DASH,
    NumberForm,
    difference_text,
    headline_text,
    metric_head,
    metric_text,
    number_form,
    p_text,
    score_text,
    seed_names,
    setting_text,
    with_std,
)
from basisadapt.study.report.report import Report, SearchResult
from basisadapt.study.report.table import Across, Line, Table


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    rows: one list of cells per row; the first cell is the row's label.
    notes: the sentences below the table.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


@functools.lru_cache(maxsize=1)  # one report is written as text, Markdown, CSV and HTML
def text_tables(report: Report) -> tuple[TextTable, ...]:
    """All tables of a report, starting with the study's own."""
    table, found, tuned = report.table, report.search, report.tuned
    made = [_main(table)]
    if len(table.at) > 1:
        made.append(_curves(table))
    if tuned is not None and tuned.tuning.trials:
        made.append(_tuning(tuned, table))
    if table.across:
        made.append(_across(table))
    if found is not None:
        made += [_trials(found, number_form(table)), _importance(found)]
    return tuple(made)


def _main(table: Table) -> TextTable:
    """The study's own table. It omits columns that the study cannot fill, and adds columns for `Table.beside`."""
    reference, answers = table.study.spec.reference, table.study.spec.answers
    shows_published = answers is not None and not any(line.published for line in table.across)
    number = number_form(table)

    def compared(line: Line) -> list[str]:
        cells = [score_text(line.values.values(), number), _seeds(line)]
        return [*cells, *([difference_text(line.difference, number), p_text(line.p)] if reference is not None else [])]

    rows = []
    for index, line in enumerate(table.lines):
        score, *others = compared(line)
        cells = [line.label, score, *([with_std(*(line.published or (DASH, None)))] if shows_published else [])]
        cells += [*others, *(cell for same in table.beside.values() for cell in compared(same.lines[index]))]
        rows.append([*cells, *(metric_text(name, line.mean_of(name)) for name in table.columns)])

    header = _heads(table, shows_published, "seeds", *_compared_heads(reference))
    header += [metric_head(name) for name in table.columns]
    return TextTable(table.study.spec.title, header, rows, footnotes(table))


def _heads(table: Table, shows_published: bool, *others: str) -> list[str]:
    """The column heads of a row, its score and `others`, and these again for each table of `Table.beside`."""
    score = headline_text(table)
    heads = ["row", score, *(["published"] if shows_published else []), *others]
    for value in table.beside:
        heads += [f"{score} at {table.place(value)}", *(f"{head} at {plain(value)}" for head in others)]
    return heads


def _compared_heads(reference: Reference | None) -> list[str]:
    return [] if reference is None else [f"difference to {reference} (95 % CI)", "p (Holm)"]


def _seeds(line: Line) -> str:
    """ "3" if all have finished, else the states of the others: "1 of 3 failed"."""
    total = len(line.seeds)
    unfinished = {state: seeds for state, seeds in line.seeds_by_state().items() if state != "finished"}
    return ", ".join(f"{len(seeds)} of {total} {state}" for state, seeds in unfinished.items()) or str(total)


def _across(table: Table) -> TextTable:
    number, reference = number_form(table), table.study.spec.reference
    shows_published = any(line.published for line in table.across)
    tasks = len({line.task for line in table.lines})

    def compared(line: Across) -> list[str]:
        whole = len(line.values) == tasks  # a mean over fewer tasks is not comparable
        cells = [number(statistics.mean(list(line.values.values())), "") if whole else DASH]
        cells.append(str(tasks) if whole else f"{len(line.values)} of {tasks}")
        found = [difference_text(line.difference, number), p_text(line.p), difference_text(line.pairs, number)]
        return [*cells, *(found if reference is not None else [])]

    rows = []
    for index, line in enumerate(table.across):
        score, *others = compared(line)
        cells = [line.name, score, *([with_std(*(line.published or (DASH, None)))] if shows_published else [])]
        rows.append([*cells, *others, *(c for same in table.beside.values() for c in compared(same.across[index]))])

    pairs = ["by task and seed (95 % CI)"] if reference is not None else []
    header = _heads(table, shows_published, "tasks", *_compared_heads(reference), *pairs)
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
    notes += detectable((line.difference for line in table.across), number)
    return TextTable("Over all tasks", header, rows, notes)


def _curves(table: Table) -> TextTable:
    """Every row at every value of the tuned setting, and the width of its plateau."""
    number, setting, rows = number_form(table), table.setting, []
    for line in table.lines:
        cells = [line.label, *(score_text(same.values.values(), number) for same in table.curve(line).values())]
        plateau = table.plateau(line)
        widths = list(plateau.by_seed.values()) if plateau else []
        cells.append(f"{'≥ ' if plateau.open else ''}{plateau.octaves:.2f}" if plateau else DASH)
        cells.append(_by_seed(widths))
        rows.append(cells)
    header = ["row", *(table.place(value) for value in table.at), "plateau, octaves", "by seed (95 % CI)"]
    point = "one point" if table.percent else "1"
    notes = [
        f"{headline_text(table)}, mean ± sample standard deviation over seeds at each {setting}, chosen or not.",
        f"Plateau: how many octaves of {setting} lie within {point} of the best of the row's mean curve, straight "
        "between its values on a logarithmic axis; ≥: the plateau reaches an end of the grid. By seed: the mean of the "
        "same of each seed's curve. Where a run diverged there is no plateau.",
    ]
    return TextTable(f"Over {setting}", header, rows, notes)


def _by_seed(widths: list[float]) -> str:
    centre, bounds = statistics.mean(widths), statistics.interval(widths)
    if centre is None:
        return DASH
    return f"{centre:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def _tuning(tuned: Tuned, table: Table) -> TextTable:
    """The chosen candidate and the value of every candidate, row by row."""
    rule = tuned.tuning.spec.tune
    assert rule is not None
    number = number_form(table) if rule.by == "score" else lambda value, _: f"{value:.4f}"
    candidates = [tried.candidate for tried in tuned.choices[0].tried]
    keys = [key for key, _ in candidates[0].point]

    def setting(choice: RowTuning, key: str) -> str:
        settings = choice.row.cells[0].settings
        if choice.best is None or key not in settings:
            return DASH
        return f"{setting_text(settings[key])}{' (edge)' if key in choice.edges else ''}"

    rows = []
    for choice in tuned.choices:
        values = [number(tried.value, "") if tried.value is not None else tried.state for tried in choice.tried]
        rows.append([choice.row.label, *(setting(choice, key) for key in keys), *values])
    names = [key.removeprefix("adapter.") for key in keys]
    seeds, where = seed_names(rule.seeds), "which draw other rows than those reported"
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
    return TextTable("Tuning", ["row", *names, *(candidate.name for candidate in candidates)], rows, notes)


def _trials(found: SearchResult, number: NumberForm) -> TextTable:
    names = [key.removeprefix("adapter.") for key in found.space]
    rows = [
        [trial.label, number(trial.value, ""), trial.status, *(setting_text(trial.params[key]) for key in found.space)]
        for trial in found.ranked
    ]
    counts = f"{len(found.trials)} of {found.wanted} trials"
    ranges = (one if isinstance(one, Range) else ", ".join(map(setting_text, one)) for one in found.space.values())
    notes = [
        f"{counts}, sampler {found.sampler}, seeded by {found.seeds[0]}; a trial's value is the mean over the seeds "
        f"{', '.join(map(str, found.seeds))}.",
        "The best of many trials is chosen on the seeds that it is shown with, which flatters it: its difference and "
        "p-value are a lead, to be confirmed on other seeds.",
        *(f"{name}: {where}." for name, where in zip(names, ranges, strict=True)),
    ]
    return TextTable("Trials", ["trial", "value", "state", *names], rows, notes)


def _importance(found: SearchResult) -> TextTable:
    rows = [[key.removeprefix("adapter."), f"{share:.2f}"] for key, share in found.importance.items()]
    explained = "Share of the value's variance that a setting explains by itself (fANOVA), scaled to add up to 1; "
    note = found.no_importance or f"{explained}rough for few trials."
    return TextTable("Importance", ["setting", "importance"], rows, [note])
