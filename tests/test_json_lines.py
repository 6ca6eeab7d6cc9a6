"""Files of lines: what a kill left of one goes, and nothing that is somebody else's."""

from __future__ import annotations

import gzip
import json

import pytest

from basisadapt import InputError
from basisadapt.training.execution.json_lines import (
    CellLine,
    LineFile,
    ResultLine,
    check_replaceable,
    read_lines,
    to_line,
)

CELL = CellLine(study="s", row="φ", key="k", config={"seed": 1})
RESULT = ResultLine(study="s", row="φ", key="k", config={"seed": 1}, host="h", began=1.0, ended=2.0, error="e")


@pytest.mark.parametrize("size", range(len(to_line(RESULT).encode())))
def test_what_a_kill_leaves_of_a_line_goes(tmp_path, size):
    path = tmp_path / "results.jsonl"
    path.write_bytes(to_line(RESULT).encode() + to_line(RESULT).encode()[:size])
    whole = 1 + (size == len(to_line(RESULT).encode()) - 1)  # only its end is missing
    assert read_lines(path, ResultLine, "--output") == [RESULT] * whole
    LineFile(path, "--output").append(RESULT)
    assert path.read_text() == to_line(RESULT) * (whole + 1)


@pytest.mark.parametrize(
    "content",
    [
        b"precious",
        b"several\nlines",
        b'{"precious": 1}',
        b'{"precious": 1',
        b"\x89PNG\r\n\x1a\n\x00",
        b"\n{",
        json.dumps({"study": "mine"}).encode()[:-1] + b"\nx",
    ],
)
def test_what_is_not_ours_is_never_cut(tmp_path, content):
    path = tmp_path / "note.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"note\.txt"):
        add(path)
    assert path.read_bytes() == content


def add(path):
    """As a run does, which reads first what is there."""
    read_lines(path, ResultLine, "--output")
    LineFile(path, "--output").append(RESULT)


def test_a_packed_file_is_not_added_to(tmp_path):
    path = tmp_path / "results.jsonl.gz"
    path.write_bytes(content := gzip.compress(to_line(RESULT).encode()))
    assert read_lines(path, ResultLine, "--import") == [RESULT]
    with pytest.raises(InputError, match="packed file; unpack it first"):
        LineFile(path, "--output")
    assert path.read_bytes() == content


def test_a_cell_whose_line_lacks_its_end_is_run(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text(to_line(CELL) + to_line(CELL).rstrip("\n"))
    assert read_lines(path, CellLine, "CELLS") == [CELL, CELL]


def test_cells_take_the_place_of_cells_alone(tmp_path):
    path = tmp_path / "file.jsonl"
    for content in ("", to_line(CELL), to_line(CELL) * 2):
        path.write_text(content)
        check_replaceable(path, "--export")
    for content in (to_line(RESULT), to_line(CELL) + to_line(RESULT), "precious", "[]\n", "\n", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(InputError, match=r"--export .*would overwrite a file that holds something else"):
            check_replaceable(path, "--export")
        assert path.read_text() == content
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="would overwrite"):
        check_replaceable(path, "--export")


def test_a_cell_without_its_key_is_refused(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"study": "a", "row": "b", "config": {}}\n')
    with pytest.raises(InputError, match=r"line 1: key 'key' is missing$"):
        read_lines(path, CellLine, "CELLS")
