"""Arbitrary bytes and arbitrary tables as files: they are read into whole rows, or refused with one line."""

from __future__ import annotations

import csv
import io
import json
import math

import pyarrow
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from basisadapt import tasks
from basisadapt.core.errors import InputError
from basisadapt.tasks import DataSettings
from basisadapt.tasks.tables import SUFFIXES

SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

texts = st.text(st.characters(codec=None), max_size=12)
labels = st.one_of(
    st.sampled_from(["a", "b", " a", "1", "2", "1.0", "0.5", "nan", "inf", "1e400", "9" * 30, "1_0", "٣", "", "true"]),
    texts,
    st.floats().map(repr),
    st.integers().map(str),
)
values = st.one_of(labels, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2))


def rows_of(cells):
    """Rows of two cells: a few of anything, or many with few labels and plain texts, so that some can be read."""
    few = st.lists(cells, min_size=2, max_size=4, unique_by=str)
    return st.one_of(
        st.lists(st.tuples(texts, cells), max_size=8),
        st.tuples(few, st.integers(12, 40)).map(
            lambda drawn: [(f"text, {i}", drawn[0][i % len(drawn[0])]) for i in range(drawn[1])]
        ),
    )


def separated(rows, separator):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, escapechar="\\")
    writer.writerows([("text", "label"), *rows])
    return text.getvalue().encode("utf-8", "surrogatepass")


def lines(rows):
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows).encode()


def objects(rows):
    return json.dumps([{"text": text, "label": label} for text, label in rows]).encode()


def columns(rows):
    """Parquet; texts where the values of a column have no common type."""
    made = {}
    for name, column in zip(("text", "label"), zip(*rows, strict=True) if rows else ((), ()), strict=True):
        try:
            made[name] = pyarrow.array(column)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            made[name] = pyarrow.array([str(value).encode("utf-8", "replace").decode() for value in column])
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(made), sink)
    return sink.getvalue()


def damaged(content):
    """The bytes with a piece of them replaced."""
    places = st.tuples(st.integers(0, len(content)), st.integers(0, 8), st.binary(max_size=8))
    return places.map(lambda cut: content[: cut[0]] + cut[2] + content[cut[0] + cut[1] :])


tables = st.one_of(
    st.tuples(st.just(".csv"), rows_of(labels).map(lambda rows: separated(rows, ","))),
    st.tuples(st.just(".tsv"), rows_of(labels).map(lambda rows: separated(rows, "\t"))),
    st.tuples(st.just(".jsonl"), rows_of(values).map(lines)),
    st.tuples(st.just(".json"), rows_of(values).map(objects)),
    st.tuples(st.just(".parquet"), rows_of(values).map(columns)),
)
files = st.one_of(
    tables,
    tables.flatmap(lambda file: st.tuples(st.just(file[0]), damaged(file[1]))),
    st.tuples(st.sampled_from(SUFFIXES), st.binary(max_size=200)),
)


def refused(task):
    try:
        task.check(None)
    except InputError as error:
        return str(error)
    return None


def check(folder, file, kind):
    """Hold a file against its contract; returns why it is refused, or None."""
    suffix, content = file
    path = folder / f"data{suffix}"
    path.write_bytes(content)
    task = tasks.find(str(path), DataSettings(kind=kind))
    refusal = refused(task)
    event(f"{suffix} {'read' if refusal is None else 'refused'}")
    if refusal is not None:
        assert refusal.startswith("data file ")
        assert len(refusal.splitlines()) == 1
        return refusal
    data = task.load(None)
    for part in (data.train, data.eval):
        assert len(part.inputs) == len(part.labels) > 0
        assert all(isinstance(text, str) and text.strip() and text.encode() for text in part.inputs)
        if task.headline == "accuracy":
            assert set(part.labels) <= set(range(task.num_labels))
        else:
            assert all(math.isfinite(label) for label in part.labels)
    if task.headline == "accuracy":
        assert set(data.train.labels) >= set(data.eval.labels)
    assert data.fingerprint()
    json.dumps(data.about, allow_nan=False)
    return None


kinds = st.sampled_from([None, None, "classes", "numbers"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(file=files, kind=kinds)
@SOME
def test_files(folder, file, kind):
    check(folder, file, kind)
