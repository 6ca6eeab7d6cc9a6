"""Labels, errors and files of others, in a report and around it."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.notes import cell_note
from basisadapt.training import RunResult


def test_a_file_that_no_report_has_written_is_not_overwritten(home, fake, study):
    (home / "mine").mkdir()
    (home / "mine" / "table.csv").write_text("precious")
    code, out, err = study("tiny.yaml", "--seeds", "1", "--output", "mine")
    assert (code, out, err.count("\n"), fake.ran) == (2, "", 1, [])
    assert "--output 'mine' has a table.csv that no report has written; give another folder" in err
    assert [(path.name, path.read_text()) for path in (home / "mine").iterdir()] == [("table.csv", "precious")]
    for _ in range(2):  # its own folder, and one with other files
        (home / "mine" / "table.csv").unlink(missing_ok=True)
        assert study("tiny.yaml", "--seeds", "1", "--output", "mine")[0] == 0


def test_a_folder_that_cannot_be_written_is_not_blamed_on_the_record(home, fake, study, monkeypatch):
    from basisadapt.study.drive import paths

    (home / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(paths.os, "access", lambda path, mode: path != Path("out"))
        code, _, err = study("tiny.yaml", "--seeds", "1", "--output", "out")
    assert (code, fake.ran) == (2, [])
    assert "--output 'out' cannot be written" in err

    write = Path.write_bytes

    def full(path, content):
        if path.parent == Path("out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, _, err = study("tiny.yaml", "--seeds", "1", "--output", "out")
    assert code == 1
    assert "error: --output 'out' cannot be written: No space left on device. The record is kept; to resume:" in err


def test_a_copy_that_fails_names_what_was_not_written():
    from basisadapt.study.record.stores import store_reason

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from/result.json", None, "/there/result.json")
    assert store_reason(error) == "No space left on device: '/there/result.json'"
    error = RuntimeError(
        "database is locked\n[SQL: SELECT 1]\n(Background on this error at: https://sqlalche.me/e/20/e3q8)"
    )
    assert store_reason(error) == "RuntimeError: database is locked"
    error = RuntimeError("database is locked (Background on this error at: https://sqlalche.me/e/20/e3q8)")
    assert store_reason(error) == "RuntimeError: database is locked"


@pytest.mark.parametrize("label", ["=1+1", "+1", "-2+cmd", "@sum"])
def test_a_label_is_no_formula(home, fake, study, label):
    text = (home / "tiny.yaml").read_text().replace("label: LoRA", f"label: {json.dumps(label)}")
    (home / "tiny.yaml").write_text(text.replace("reference: LoRA\n", ""))
    assert study("tiny.yaml", "--seeds", "1", "--output", "out")[0] == 0
    assert f"\n'{label}," in (home / "out" / "table.csv").read_text()


def test_a_label_is_no_line_and_no_html(home, fake, study):
    label = "a\nb | <img src=x onerror=alert(1)> < c"
    text = (home / "tiny.yaml").read_text().replace("label: LoRA", f"label: {json.dumps(label)}")
    (home / "tiny.yaml").write_text(text.replace("reference: LoRA\n", ""))
    assert study("tiny.yaml", "--seeds", "1", "--output", "out")[0] == 0
    table = (home / "out" / "table.md").read_text()
    assert "\n| a b \\| &lt;img src=x onerror=alert(1)> < c |" in table
    assert "<img" not in table


def test_a_note_of_mlflow_has_no_line_and_no_html_of_others(home, fake, study, runs):
    bad, error = "a\nb <img src=x>", RuntimeError("c <script>")
    (home / "tiny.yaml").write_text((home / "tiny.yaml").read_text().replace("LoRA", json.dumps(bad)))

    def score(config):
        if config.method != "lora":
            raise error
        return 0.5

    fake.score = score
    assert study("tiny.yaml", "--seeds", "1")[0] == 1
    lora, failed, _ = (run.data.tags["mlflow.note.content"] for run in runs())
    assert lora.startswith("**a b &lt;img src=x>, seed 1**: finished\n")
    assert failed == "Failed: RuntimeError: c &lt;script>"
    result = RunResult("finished", "accuracy", {"accuracy": 0.5}, warnings=[bad])
    assert cell_note(resolve(read_spec("tiny.yaml")).cells[0], result).endswith("\n- Warning: a b &lt;img src=x>")


def test_nothing_that_is_said_steers_the_terminal(capsys):
    from basisadapt.core.command import guarded, print_error, say

    @guarded
    def main(arguments):
        say("a\x1b[2Jb\x9b\r\tc\nd\u202ee")
        print_error("e\x1b]0;f\x07")
        print("\rbar g\x1b[8m\rh\r", file=sys.stderr)
        raise ValueError("i\x1b[2J")

    main([])
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2Jb\\x9b\\x0d\tc\nd\\u202ee\n"
    assert err.startswith("basisadapt: error: e\\x1b]0;f\\x07\n\rbar g\\x1b[8m\\x0dh\r\nTraceback")
    assert err.endswith("ValueError: i\\x1b[2J\n")


def test_no_label_and_no_error_of_a_cell_steers_the_terminal(home, fake, study):
    label, error = "a\x1b]0;b\x07", RuntimeError("c\x1b[2Jd\re")
    (home / "tiny.yaml").write_text(
        (home / "tiny.yaml").read_text().replace("LoRA", json.dumps(label)).replace("[sinc, fourier]", "[sinc]")
    )

    def score(config):
        if config.method == "lora":
            raise error
        return 0.5

    fake.score = score
    code, out, err = study("tiny.yaml", "--seeds", "1")
    assert code == 1
    assert "[1/2] a\\x1b]0;b\\x07, seed 1: failed: RuntimeError: c\\x1b[2Jd" in err
    for said in (out, err):
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", said)


def test_a_server_that_is_not_there_is_not_waited_for(folder, monkeypatch, study):
    slept = []
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setattr("time.sleep", slept.append)
    code, _, err = study("--report", "tiny.yaml", "--tracking-uri", "http://127.0.0.1:9")
    assert code == 2
    assert "--tracking-uri 'http://127.0.0.1:9' cannot be opened" in err
    assert sum(slept) < 30
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
