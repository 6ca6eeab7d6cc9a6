"""A report as one self-contained HTML page: tables, verdicts, figures, configurations and versions."""

from __future__ import annotations

import base64
import collections
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path

from basisadapt.core.grouping import grouped
from basisadapt.study.report.footnotes import problems
from basisadapt.study.report.formats import DASH
from basisadapt.study.report.report import Report
from basisadapt.study.report.table import Table, by_name
from basisadapt.study.report.text_tables import TextTable, text_tables
from basisadapt.study.report.verdicts import Verdict

# Column heads become sort buttons only in the script, so the tables also work without it.
PAGE, STYLE, SCRIPT = (
    Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
)
MAX_PICTURED, MAX_BYTES = 20, 5_000_000  # rows whose pictures the page shows, and the size of these pictures

CAPTIONS = {
    "comparison.png": "Seeds as dots, mean ± standard deviation, the reference's mean as a line; a panel a task",
    "curves.png": "The headline metric over the tuned setting: mean ± standard deviation over seeds, a ring at "
    "a row's own choice; dashed, the value that all rows have in common",
    "against.png": "Every row against what it costs, on a logarithmic scale",
    "map.png": "The difference to the reference over two axes; in brackets what may be zero",
    "lines.png": "The headline metric along one axis, with one standard deviation to each side",
    "search.png": "Every trial's value in order with the best so far, and the importance of each setting",
    "phi.png": "What φ has learned to add to an entry of BA, a line per layer",
    "phi_evolution.png": "The same early in training, midway and at the end",
    "stable_rank.png": "Stable rank of the updates against depth, on the way and at the end",
    "spectrum.png": "Singular values of every update, and their median",
    "modules.png": "Numbers of every module against depth",
    "training.png": "The loss with its power law, and how straight the way through the parameters was",
    "landscape.png": "The loss on a plane through the solution",
}


def to_html(report: Report, figures: Mapping[str, bytes], pictures: Callable[[str], dict[str, bytes]]) -> str:
    """The page.

    figures: the PNG files of the report, name to content.
    pictures: run id to the PNG files of that MLflow run, name to content.
    """
    table, spec = report.table, report.table.study.spec
    reference = None if spec.reference is None else str(spec.reference)
    alerts = set(problems(table))
    tables = text_tables(report)
    drawn = {name: _figure(name, content, spec.title, "lines") for name, content in figures.items()}
    search = drawn.pop("search.png", None)
    sections = [
        _section("Result", _text_table(tables[0], alerts, reference), *drawn.values()),
        *([_section("Claims", _verdicts(report.verdicts))] if report.verdicts else []),
        *(_section(one.title, _text_table(one, alerts, reference)) for one in tables[1:]),
        *([_section("The search in pictures", search)] if search else []),
        _diagnostics(table, pictures),
        _section("Configurations", _configurations(table, reference)),
        _section("Versions", _versions(table)),
    ]
    return PAGE.format(
        title=escape(spec.title),
        question=escape(" ".join(spec.question.split())),
        states=escape(_states(table)),
        style=STYLE,
        script=SCRIPT,
        sections="\n".join(filter(None, sections)),
    )


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def _states(table: Table) -> str:
    """ "Cells: 20 finished, 1 failed"."""
    states = (line.seeds_by_state().items() for line in table.every_line)
    counts = collections.Counter(state for of_line in states for state, seeds in of_line for _ in seeds)
    return "Cells: " + ", ".join(f"{count} {state}" for state, count in counts.items()) + "."


def _text_table(table: TextTable, alerts: set[str], reference: str | None) -> str:
    notes = "".join(f"<li{' class=trouble' if note in alerts else ''}>{escape(note)}</li>" for note in table.notes)
    listed = f'<ul class="notes">{notes}</ul>'
    if not table.rows:
        return listed
    # The section heading is the visible caption; this one is for screen readers.
    return f"{_table(table.title, table.header, table.rows, reference, caption='unseen')}\n{listed}"


def _table(
    title: str, header: Iterable[str], rows: Iterable[list[str]], reference: str | None, caption: str = "seen"
) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in header)
    lines = []
    for name, *cells in rows:
        marked = ' class="reference"' if name == reference else ""
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{marked}><th scope="row">{escape(name)}</th>{data}</tr>')
    return (
        f'<div class="box" role="region" aria-label="{escape(title)}" tabindex="0">\n'
        f'<table class="sortable"><caption class="{caption}">{escape(title)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _verdicts(verdicts: Iterable[Verdict]) -> str:
    items = []
    for verdict in verdicts:
        word = f'<span class="word {verdict.word.replace(" ", "-")}">{escape(verdict.word)}</span>'
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.because)
        items.append(f"<li>{word}{escape(verdict.claim.text)}<ul>{reasons}</ul></li>")
    note = (
        "Reproduced: every difference has the claimed sign and is significant at 0.05, Holm-corrected over all tests "
        "of this list. Not reproduced: one is significant the other way, or its 95 % interval excludes the published "
        "one. Where rows are claimed to be equal, two one-sided tests must tell that they differ by less than the "
        "margin; they do not where the 95 % interval lies beyond it. Not testable here: rows or seeds are missing, or "
        "the intervals are too wide to tell."
    )
    return f'<ul class="verdicts">{"".join(items)}</ul>\n<p class="states">{escape(note)}</p>'


def _figure(name: str, content: bytes, of: str, kind: str = "colored") -> str:
    """A figure with its caption. kind: "lines" is inverted in dark mode; "colored" is not, to keep its color scale."""
    caption = CAPTIONS.get(name, name.rpartition(".")[0].replace("_", " ").capitalize())
    data = base64.b64encode(content).decode()
    image = f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(f"{caption}: {of}")}">'
    return f"<figure>{image}<figcaption>{escape(caption)}.</figcaption></figure>"


def _diagnostics(table: Table, pictures: Callable[[str], dict[str, bytes]]) -> str:
    """The pictures of one cell per row, folded; of the leading rows if there are many rows or large pictures."""
    folds, tasks = dict[str, str](), len({line.task for line in table.lines})
    shown = table.leading(max(1, MAX_PICTURED // tasks))
    for line in shown:
        done = [(seed, outcome) for seed, outcome in line.outcomes.items() if outcome.done]
        for seed, outcome in done[:1]:
            cell = f"{line.label}, seed {seed}"
            drawn = [_figure(name, content, cell) for name, content in pictures(outcome.run_id).items()]
            if drawn:
                folds[line.label] = f"<details><summary>{escape(cell)}</summary>{''.join(drawn)}</details>"
    size = sum(map(len, folds.values()))
    if size > MAX_BYTES:
        shown = table.leading(max(1, len(by_name(shown)) * MAX_BYTES // size))
    parts = [folds[line.label] for line in shown if line.label in folds]
    note = (
        f'<p class="states">Of {len(shown)} of {len(table.lines):,} rows: those that claims name and those with the '
        "greatest means, with what they are compared with. The pictures of every cell are with its run in MLflow.</p>"
    )
    whole = len(shown) == len(table.lines)
    return _section("Diagnostics of one cell a row", *([] if whole else [note]), *parts) if parts else ""


def _configurations(table: Table, reference: str | None) -> str:
    """The settings that differ between rows as a table, and the others as a list."""
    every = [(row.label, row.cells[0].settings) for row in table.study.rows]
    flat = [(label, {key: str(value) for key, value in own.items() if key != "seed"}) for label, own in every]
    keys = dict.fromkeys(key for _, settings in flat for key in settings)
    values = {key: {settings[key] for _, settings in flat if key in settings} for key in keys}
    varying = [key for key, found in values.items() if len(found) > 1]
    rows = [[label, *(settings.get(key, DASH) for key in varying)] for label, settings in flat]
    alike = ((key, *found) for key, found in values.items() if len(found) == 1)
    shared = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in alike)
    heads = ["row", *(key.removeprefix("adapter.") for key in varying)]
    return (
        _table("Settings that differ between rows", heads, rows, reference)
        + f"\n<details><summary>Settings that every row with them shares</summary><dl>{shared}</dl></details>"
    )


def _versions(table: Table) -> str:
    """Every recorded version with its values over all cells."""
    outcomes = (outcome for line in table.every_line for outcome in line.outcomes.values())
    found = grouped(pair for outcome in outcomes for pair in outcome.environment.items())
    pairs = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(', '.join(dict.fromkeys(values)))}</dd>"
        for name, values in sorted(found.items())
    )
    return f"<dl>{pairs}</dl>" if pairs else "<p>No cell has recorded them.</p>"
