"""A report as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io

from basisadapt.core.command import aligned
from basisadapt.core.markup import in_markdown
from basisadapt.study.report.formats import difference_text, number_form, reference_text
from basisadapt.study.report.records import row_records
from basisadapt.study.report.report import Report
from basisadapt.study.report.table import Table
from basisadapt.study.report.text_tables import TextTable, text_tables


def to_text(report: Report) -> str:
    """The report as plain text with aligned columns."""
    parts = []
    for table in text_tables(report):
        under = ["-" * max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        body = [*aligned([table.header, under, *table.rows]), ""] if table.rows else []
        parts.append("\n".join([table.title, "", *body, *table.notes]))
    if report.verdicts:
        lines = ["Claims", ""]
        for verdict in report.verdicts:
            lines += [f"{verdict.word}: {verdict.claim.text}", *(f"    {reason}" for reason in verdict.because)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = []
    for table in text_tables(report):
        rows = [[in_markdown(cell).replace("|", r"\|") for cell in row] for row in [table.header, *table.rows]]
        rows.insert(1, ["---", *["---:"] * (len(table.header) - 1)])
        body = [*(f"| {' | '.join(row)} |" for row in rows), ""] if table.rows else []
        notes = (f"- {in_markdown(note)}" for note in table.notes)
        parts.append("\n".join([f"**{in_markdown(table.title)}**", "", *body, *notes]))
    if report.verdicts:
        lines = ["**Claims**", ""]
        for verdict in report.verdicts:
            claim, because = in_markdown(verdict.claim.text), in_markdown("; ".join(verdict.because))
            lines.append(f"- **{verdict.word}**: {claim}. {because}.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """The table's numbers as CSV, neither rounded nor scaled; see `row_records`."""
    text, records = io.StringIO(), row_records(table)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(records[0])
    for record in records:
        label, *others = record.values()
        writer.writerow([_inert(label), *others])
    return text.getvalue()


def text_table_to_csv(table: TextTable) -> str:
    """A table as CSV, its cells as shown."""
    text = io.StringIO()
    rows = ([_inert(label), *cells] for label, *cells in table.rows)
    csv.writer(text, lineterminator="\n").writerows([table.header, *rows])
    return text.getvalue()


def _inert(label: str) -> str:
    """The label, quoted if a spreadsheet would read it as a formula."""
    return f"'{label}" if label.startswith(("=", "+", "-", "@", "\t", "\r")) else label


def standing(table: Table, label: str) -> str:
    """The row's difference so far: ", +0.42 [-0.10, +0.94] to LoRA over 3 seeds"; empty if it shares no seed with its
    reference."""
    found = next((line.difference for line in table.lines if line.label == label), None)
    if found is None or table.study.spec.reference is None:
        return ""
    difference, reference = difference_text(found, number_form(table)), reference_text(table.study.spec.reference)
    return f", {difference} to {reference} over {found.n} seed{'' if found.n == 1 else 's'}"
