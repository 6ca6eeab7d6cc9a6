"""A user's own files: writing, loading and refusing them."""

from __future__ import annotations

import csv
import io

import pytest

from basisadapt import tasks
from basisadapt.core.errors import InputError
from basisadapt.tasks import DataSettings

ROWS = [(f"text, number {i}", "good" if i % 3 else "bad") for i in range(60)]


def write(name, content):
    with open(name, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_csv(rows, name="data.csv", header=("text", "label")):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write(name, text.getvalue())


def find(name="data.csv", **settings):
    return tasks.find(name, DataSettings(**settings))


def load(name="data.csv", **settings):
    task = find(name, **settings)
    task.check(None)
    return task.load(None)


def refused(name="data.csv", **settings):
    """The message, one line, that names the file."""
    with pytest.raises(InputError) as caught:
        find(name, **settings).check(None)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message
