"""A report as one self-contained HTML page: tables, verdicts, figures, configurations and versions."""

from __future__ import annotations

import base64
import collections
from collections.abc import Callable, Iterable, Mapping
from html import escape

from basisadapt.core.grouping import grouped
from basisadapt.study.plan.cells import Row
from basisadapt.study.report.footnotes import problems
from basisadapt.study.report.formats import DASH
from basisadapt.study.report.report import Report
from basisadapt.study.report.table import Table, by_name
from basisadapt.study.report.text_tables import TextTable, text_tables
from basisadapt.study.report.verdicts import Verdict

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{question}</p>
<p class="states">{states}</p>
</header>
{sections}
</main>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --paper: #fff; --ink: #1c2126; --faint: #59636e; --line: #d5dae0; --shade: #f4f6f8; --accent: #0a58a8;
  --good: #11672f; --good-paper: #def3e4; --bad: #9f1f1f; --bad-paper: #fbe4e3; --open: #6b4a00;
  --open-paper: #faeecb; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --faint: #a0a9b4; --line: #39414a;
  --shade: #1e2328; --accent: #7db8f5; --good: #8fdba6; --good-paper: #173723; --bad: #f5a6a2; --bad-paper: #451d1d;
  --open: #ecca75; --open-paper: #3c3010; } img { filter: brightness(.9); }
  img.lines { filter: invert(.91) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li, figcaption, dd { max-width: 46rem; overflow-wrap: anywhere; }
.lead { margin: 0; }
.states, .notes, figcaption { color: var(--faint); }
.states { margin: .75rem 0 0; font-size: .9rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; background:
  linear-gradient(to left, var(--paper) 1.5rem, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / .75rem 100% no-repeat scroll; }
:is(.box, button, summary):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: max-content; min-width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .75rem; color: var(--faint); }
caption.unseen { position: absolute; width: 1px; height: 1px; padding: 0; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; }
th:first-child { position: sticky; left: 0; text-align: left; background: var(--paper); }
thead th, thead th:first-child { white-space: normal; vertical-align: bottom; background: var(--shade);
  border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; }
tr.reference, tr.reference th:first-child { background: var(--shade); }
th button { all: unset; display: inline-block; width: min-content; cursor: pointer; }
th button::after { content: "\\a0\\2195"; color: var(--faint); }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; }
.notes { padding-left: 1.1rem; font-size: .9rem; }
.notes .trouble { color: var(--bad); }
.verdicts { list-style: none; padding: 0; }
.verdicts > li { padding: .6rem 0; border-bottom: 1px solid var(--line); }
.verdicts ul { margin: .25rem 0 0; padding-left: 1.1rem; color: var(--faint); font-size: .9rem; }
.word { display: inline-block; margin-right: .5rem; padding: 0 .5rem; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; color: var(--open); background: var(--open-paper); }
.word.reproduced { color: var(--good); background: var(--good-paper); }
.word.not-reproduced { color: var(--bad); background: var(--bad-paper); }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; }
img { display: block; width: 100%; max-width: 52rem; height: auto; background: #fff; border-radius: .4rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--faint); }
dd { margin: 0; }
"""

# Column heads become sort buttons only here, so the tables also work without the script.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const read = (row, column) => row.cells[column].textContent.trim();
  const number = text => parseFloat(text.replace(/,/g, "").replace(/^[<\\s]+/, ""));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows], words = rows.every(row => isNaN(number(read(row, column))));
      rows.sort((one, other) => {
        const a = read(one, column), b = read(other, column);
        if (words) return sign * a.localeCompare(b);
        const x = number(a), y = number(b);
        return isNaN(x) ? (isNaN(y) ? 0 : 1) : isNaN(y) ? -1 : sign * (x - y);
      });
      body.append(...rows);
    };
  });
}
"""

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
    flat = [(row.label, _settings(row)) for row in table.study.rows]
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


def _settings(row: Row) -> dict[str, str]:
    """Full key to value as text, without the seed."""
    return {key: str(value) for key, value in row.cells[0].settings.items() if key != "seed"}


def _versions(table: Table) -> str:
    """Every recorded version with its values over all cells."""
    outcomes = (outcome for line in table.every_line for outcome in line.outcomes.values())
    found = grouped(pair for outcome in outcomes for pair in outcome.environment.items())
    pairs = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(', '.join(dict.fromkeys(values)))}</dd>"
        for name, values in sorted(found.items())
    )
    return f"<dl>{pairs}</dl>" if pairs else "<p>No cell has recorded them.</p>"
