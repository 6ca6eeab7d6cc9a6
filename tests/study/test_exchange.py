"""Cells exported, run by `python -m basisadapt.training` where neither Optuna nor MLflow is, and imported."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import add, statuses, table_of
from forked import Forked

SEED = ("tiny.yaml", "--seeds", "1")
# A machine without what only studies need. Of what is None in there, Python says that it is not found.
ALONE = "import sys\n\nfor name in ('optuna', 'mlflow', 'datasets'):\n    sys.modules[name] = None\n"


def train(*arguments, start=Forked):
    """Calls the program: exit code, stderr."""
    command = [sys.executable, "-m", "basisadapt.training", *arguments]
    program = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = program.communicate(timeout=500)
    assert out == ""
    return program.returncode, err


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def alone(faking):
    """The options of a plug-in that fakes training and hides what only studies need."""

    def write(ways=None):
        options = faking(ways)
        Path("alone.py").write_text(ALONE)
        return ("--plugin", "alone.py", *options)

    return write


@pytest.fixture
def results(home, fake, study):
    """A file of results of every cell with seed 1, as the program writes it."""
    import dataclasses

    from basisadapt.training.execution.json_lines import to_line

    study(*SEED, "--export", "cells.jsonl")
    lines = []
    for cell in lines_of("cells.jsonl"):
        from basisadapt.training.config import RunConfig

        result = fake.run(RunConfig.from_mapping(cell["config"]), on_step=lambda *_: None)
        when = {"host": "another", "began": 1_700_000_000.0, "ended": 1_700_000_060.0}
        lines.append({**cell, **when, "result": dataclasses.asdict(result), "error": "", "traceback": ""})
    Path("results.jsonl").write_text("".join(map(to_line, lines)))
    fake.ran.clear()
    return lines


def test_a_result_is_a_cell_that_can_be_run_again(home, alone, study):
    study(*SEED, "--export", "cells.jsonl")
    assert train("cells.jsonl", *alone())[0] == 0
    code, err = train("results.jsonl", "--output", "again.jsonl", *alone())
    assert (code, err.count("finished")) == (0, 3)
    then, now = lines_of("results.jsonl"), lines_of("again.jsonl")
    assert [line["result"]["metrics"]["accuracy"] for line in now] == [
        line["result"]["metrics"]["accuracy"] for line in then
    ]


def test_a_file_packed_by_gzip_is_read(home, alone, study):
    study(*SEED, "--export", "cells.jsonl")
    assert train("cells.jsonl", "--output", "brief.jsonl", "--brief", *alone())[0] == 0
    Path("brief.jsonl.gz").write_bytes(gzip.compress(Path("brief.jsonl").read_bytes()))
    code, out, err = study(*SEED, "--import", "brief.jsonl.gz")
    assert (code, err) == (0, "")
    assert "LoRA" in table_of(out)
    Path("cut.jsonl.gz").write_bytes(Path("brief.jsonl.gz").read_bytes()[:100])
    code, _, err = study(*SEED, "--import", "cut.jsonl.gz")
    assert (code, err.count("\n")) == (2, 1)


def test_cells_run_elsewhere_are_as_if_run_here(home, fake, alone, study, runs, trials, tmp_path_factory):
    study(*SEED, "--set", "sweep.basis=sinc", "--set", "method=phi")
    fake.ran.clear()
    code, out, _ = study("tiny.yaml", "--export", "cells.jsonl")
    assert code == 0
    assert "7 cells to run are in cells.jsonl" in out
    options = alone({("fourier", 2): "raise"})
    code, err = train("cells.jsonl", *options, start=subprocess.Popen)  # which has imported nothing else
    assert code == 1
    assert "fourier, seed 2: failed: RuntimeError: out of memory" in err
    assert len(lines_of("results.jsonl")) == 7
    code, out, err = study("tiny.yaml", "--import", "results.jsonl")
    assert code == 1
    assert "not entered: fourier, seed 2, which failed: RuntimeError: out of memory" in err
    assert "1 of 3 not run" in out

    # What is in the file is not run again, but for what failed.
    code, err = train("cells.jsonl", *alone())
    assert (code, err.count("\n")) == (0, 1)
    code, out, _ = study("tiny.yaml", "--import", "results.jsonl")
    assert code == 0
    assert fake.ran == []
    assert statuses(runs()) == ["finished"] * 9
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 9
    elsewhere = tmp_path_factory.mktemp("here")
    _, expected, _ = study("tiny.yaml", "--tracking-uri", f"sqlite:///{elsewhere}/mlflow.db")
    assert table_of(out) == table_of(expected)


def test_what_an_imported_cell_leaves(home, fake, study, results, runs):
    code, out, _ = study(*SEED, "--import", "results.jsonl", "--output", "report")
    assert (code, fake.ran) == (0, [])
    run = next(run for run in runs() if run.data.params["row"] == "sinc")
    assert run.data.tags["basisadapt.imported_from"] == "another"
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    assert run.data.tags["environment.torch"] == "2"  # of the machine that ran it
    names = {path.name for path in Path(run.info.artifact_uri.removeprefix("file://")).iterdir()}
    assert {"config.json", "result.json", "phi.png"} <= names
    assert (home / "report" / "report.html").exists()
    again = study(*SEED, "--import", "results.jsonl")
    assert table_of(again[1]) == table_of(out)
    assert len(runs()) == 3
    assert len(runs(parents=True)) == 2


def change(**values):
    return lambda line: {**line, **values}


def in_result(**values):
    return lambda line: {**line, "result": {**line["result"], **values}}


def contents(folder):
    """File name to content."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_config(line):
    return {**line, "config": {**line["config"], "seed": 2}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (in_config, "its study and configuration have the key "),
        (change(key="0" * 16), ", not 0000000000000000: they were changed"),
        (change(study="other"), "they were changed"),
        (change(config={"basis": "sinc"}), "unknown key 'basis'"),
        (change(colour="red"), "unknown key 'colour'"),
        (change(began="today"), "began must be a number, got 'today'"),
        (change(began=float("nan")), "began and ended must be seconds since 1970, got nan"),
        (change(ended=1e300), "began and ended must be seconds since 1970"),
        (change(ended=10**400), "ended must be a number, got 1000"),
        (in_result(modules={"a": 3}), "not a result: result.modules must be keys and values"),
        (in_result(warnings=[1]), "not a result: result.warnings must be a list of text"),
        (
            in_result(environment={"torch": 2}),
            "not a result: result.environment must be keys and values, each value text",
        ),
        (in_result(status="done"), "unknown status of a result 'done'"),
        (in_result(metrics={"eval_loss": 1.0}), "the run gave no finite 'accuracy', though it has finished"),
        (in_result(metrics={"accuracy": "high"}), "not a result: "),
        (in_result(curves={"loss": [1.0]}), "not a result: "),
        (in_result(colour="red"), "unknown key 'result.colour'"),
        (lambda line: [line], "a line must be an object"),
    ],
)
def test_a_line_that_is_none_of_the_studys_is_refused_and_nothing_is_entered(
    home, fake, study, results, changed, message
):
    lines = [json.dumps(line) + "\n" for line in (results[0], changed(results[1]), results[2])]
    (home / "results.jsonl").write_text("".join(lines))
    before = contents(home)
    code, out, err = study(*SEED, "--import", "results.jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "results.jsonl, line 2: " in err
    assert message in err
    assert contents(home) == before, "the databases too"


@pytest.mark.parametrize("text", ["[" * 10_000, "1" * 5000, "{"])
def test_a_line_that_is_no_json_is_refused(home, fake, study, text):
    (home / "results.jsonl").write_text(text + "\n")
    code, _, err = study(*SEED, "--import", "results.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "results.jsonl, line 1 is not valid JSON: " in err


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(home, fake, study, monkeypatch):
    monkeypatch.setattr("basisadapt.training.execution.json_lines.MAX_BYTES", 1000)
    (home / "results.jsonl.gz").write_bytes(gzip.compress(bytes(100_000)))
    code, _, err = study(*SEED, "--import", "results.jsonl.gz")
    assert code == 2
    assert "must hold at most 1,000 bytes" in err


def test_a_result_that_cannot_be_drawn_leaves_no_record(home, fake, study, results, runs):
    from basisadapt.training.execution.json_lines import to_line

    odd = in_result(snapshots=[{"step": "first"}])(results[1])
    Path("results.jsonl").write_text("".join(map(to_line, (results[0], odd))))
    code, _, err = study(*SEED, "--import", "results.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert f"the result of cell {odd['key']} cannot be drawn: " in err
    assert not (home / "mlruns").exists()


def test_an_import_reports_before_it_draws_what_its_page_does_not_show(home, fake, study, results, runs, monkeypatch):
    from basisadapt.study.record import pictures
    from basisadapt.study.report import html

    asked = []

    def drawn(title, result):
        asked.append(title)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"phi.png": b"\x89PNG"}

    def pictured():
        return sorted(run.data.tags["basisadapt.row"] for run in runs() if "basisadapt.undrawn" not in run.data.tags)

    monkeypatch.setattr(pictures, "pictures", drawn)
    monkeypatch.setattr(html, "MAX_PICTURED", 1)
    code, out, err = study(*SEED, "--import", "results.jsonl")
    assert code == 130
    assert "drawing the pictures of 2 cells; Ctrl-C leaves them to the next --import" in err
    assert "fourier" in table_of(out)
    assert [run.info.status for run in runs(parents=True)] == ["FINISHED"]
    assert len(pictured()) == 1
    code, _, err = study(*SEED, "--import", "results.jsonl")
    assert (code, pictured()) == (0, ["LoRA", "fourier", "sinc"])
    assert "drawing the pictures of 2 cells" in err
    assert len(asked) == 4
    assert study(*SEED, "--import", "results.jsonl")[::2] == (0, "")


def test_an_imported_result_whose_drawing_fails_has_no_pictures(home, fake, study, results, runs, monkeypatch):
    from basisadapt.study.record import pictures

    monkeypatch.setattr(pictures, "pictures", lambda title, result: {}[title])
    code, _, err = study(*SEED, "--import", "results.jsonl", "--output", "report")
    assert code == 0
    assert err.count("cannot be drawn: KeyError") == 3
    assert study("--report", *SEED, "--output", "report")[::2] == (0, "")


def test_cells_of_other_options_are_refused(home, fake, study, results):
    code, _, err = study("tiny.yaml", "--seeds", "2", "--import", "results.jsonl")
    assert code == 2
    assert "line 1: cell " in err
    assert "(sinc) is not a cell of this study with these options" in err


def test_cells_of_other_options_are_passed_over_beside_cells_of_these(home, fake, study, results, runs):
    code, _, err = study(*SEED, "--set", "sweep.basis=sinc", "--import", "results.jsonl")
    assert (code, len(runs())) == (0, 2), "sinc and LoRA"
    assert "1 of 3 results are of this study with other options, and are passed over" in err


def test_results_of_other_studies_serve_where_the_configuration_is_the_same(home, fake, study, results, runs):
    """Two files, of two studies that share LoRA and sinc; the third row is in none of them."""
    spec = (home / "tiny.yaml").read_text()
    (home / "other.yaml").write_text(spec.replace("[sinc, fourier]", "[sinc, bspline]"))
    code, out, _ = study("other.yaml", "--seeds", "1", "--export", "others.jsonl")
    assert "3 cells" in out
    code, out, err = study("other.yaml", "--seeds", "1", "--import", "results.jsonl")
    assert (code, err) == (0, "")
    assert "Not run: 1 of 3 cells." in out
    study("other.yaml", "--seeds", "1", "--export", "missing.jsonl")
    assert [line["row"] for line in lines_of("missing.jsonl")] == ["bspline"]
    assert fake.ran == []

    lone = [line for line in results if line["row"] == "LoRA"]
    Path("lone.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lone))
    rest = [line for line in results if line["row"] != "LoRA"]
    Path("rest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rest))
    code, out, _ = study(*SEED, "--import", "lone.jsonl", "rest.jsonl")
    assert (code, "Not run" in out, len(runs())) == (0, False, 3)


def test_results_from_before_a_setting_was_there_are_read(home, fake, study, results, runs):
    """A configuration as an earlier version wrote it, its key made from what it held; the setting is at its default."""
    from basisadapt.study.plan.cells import cell_key

    for line in results:
        del line["config"]["train"]["landscape"]
        line["key"] = cell_key(line["study"], line["config"])
    Path("results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    code, out, err = study(*SEED, "--import", "results.jsonl")
    assert (code, err, "Not run" in out, len(runs())) == (0, "", False, 3)


def test_a_setting_that_came_late_changes_no_older_key():
    """The keys of recorded results, many of them from before `transfer_delay` and `smoothing` were there."""
    from basisadapt.study.plan.cells import cell_key
    from basisadapt.training.config import RunConfig

    with gzip.open(Path(__file__).parents[2] / "studies/results/cells/ablate_rank.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert {line["config"]["method"] for line in lines} == {"lora", "phi", "sinelora"}
    for line in lines:
        config = RunConfig.from_mapping(line["config"]).to_mapping()
        assert cell_key(line["study"], config) == cell_key(line["study"], line["config"]) == line["key"]
    phi = next(line for line in lines if line["config"]["method"] == "phi")
    changed = {**phi["config"], "adapter": {**phi["config"]["adapter"], "smoothing": 0.5}}
    assert cell_key(phi["study"], changed) != phi["key"]


def test_what_a_kill_left_of_a_line_is_done_again(home, alone, study):
    study(*SEED, "--export", "cells.jsonl")
    options = alone()
    assert train("cells.jsonl", *options)[0] == 0
    whole = (home / "results.jsonl").read_text()
    (home / "results.jsonl").write_text(whole[:-200])
    code, _, err = study(*SEED, "--import", "results.jsonl")
    assert code == 0, err
    code, err = train("cells.jsonl", *options)
    assert (code, err.count("\n")) == (0, 1)
    assert "LoRA, seed 1: finished" in err
    keys = [line["key"] for line in lines_of("results.jsonl")]
    assert len(keys) == len(set(keys)) == 3


def test_killed_the_program_goes_on(home, alone, study):
    study(*SEED, "--export", "cells.jsonl")
    options = alone({("fourier", 1): "hang"})
    program = Forked([sys.executable, "-m", "basisadapt.training", "cells.jsonl", *options])
    deadline = time.monotonic() + 300
    while not (home / "hanging").exists():
        assert program.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    program.kill()
    program.wait()
    assert len(lines_of("results.jsonl")) == 1
    code, err = train("cells.jsonl", *alone(), "--workers", "2")
    assert (code, err.count("\n")) == (0, 2)
    assert len(lines_of("results.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "CELLS 'absent.jsonl' cannot be read"),
        (["broken.jsonl"], "broken.jsonl, line 1 is not valid JSON"),
        (["wrong.jsonl"], "unknown task 'poetry'"),
        (["cells.jsonl", "--output", "."], "--output '.' cannot be "),
        (["cells.jsonl", "--plugin", "absent.py"], "plug-in file 'absent.py' does not exist"),
        (["cells.jsonl", "--workers", "0"], "--workers must be at least 1"),
        (["cells.jsonl", "--timeout", "-1"], "--timeout must be above 0"),
    ],
)
def test_bad_input_of_the_program_is_one_line(home, fake, study, monkeypatch, capsys, arguments, message):
    from basisadapt.training.__main__ import main

    study(*SEED, "--export", "cells.jsonl")
    capsys.readouterr()
    (home / "broken.jsonl").write_text("{\n")
    line = lines_of("cells.jsonl")[0]
    (home / "wrong.jsonl").write_text(json.dumps({**line, "config": {**line["config"], "task": "poetry"}}) + "\n")
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    assert main() == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err
    assert fake.ran == []


def test_a_result_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(home, fake, study, monkeypatch, capsys):
    from basisadapt.training.__main__ import main
    from basisadapt.training.execution import json_lines

    def full(number):
        if len(fake.ran) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    study(*SEED, "--export", "cells.jsonl")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["training", "cells.jsonl"])
    with monkeypatch.context() as disk:
        disk.setattr(json_lines.os, "fsync", full)
        assert main() == 1
    err = capsys.readouterr().err
    assert err.splitlines()[1:] == [
        "basisadapt: error: the results cannot be written: OSError: [Errno 28] No space left on device"
    ]
    assert len(lines_of("results.jsonl")) == 1
    assert main() == 0
    assert len(lines_of("results.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "x.jsonl", "--import", "y.jsonl"], "--import does not go with --export"),
        (["--export", "x.jsonl", "--dry-run"], "--export does not go with --dry-run"),
        (["--import", "x.jsonl", "--search", "tpe", "--trials", "2"], "--import does not go with --search"),
        (["--import", "absent.jsonl"], "--import 'absent.jsonl' cannot be read"),
        (["--export", "absent/x.jsonl"], "--export 'absent/x.jsonl' cannot be written: No such file or directory"),
    ],
)
def test_bad_options(folder, fake, study, arguments, message):
    code, out, err = study("tiny.yaml", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


def test_a_slip_of_export_for_import_costs_nothing(home, fake, study):
    study(*SEED, "--export", "cells.jsonl")
    assert study(*SEED, "--export", "cells.jsonl")[0] == 0
    results = home / "results.jsonl"
    results.write_text((home / "cells.jsonl").read_text().replace("}\n", ', "host": "h", "began": 1, "ended": 2}\n'))
    before = results.read_bytes()
    code, out, err = study(*SEED, "--export", "results.jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--export 'results.jsonl' would overwrite a file that holds something else than cells to run" in err
    assert results.read_bytes() == before


def test_an_export_that_fails_leaves_nothing(home, fake, study, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(os.listdir())
    monkeypatch.setattr(Path, "replace", full)
    code, _, err = study(*SEED, "--export", "cells.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "--export 'cells.jsonl' cannot be written: No space left on device" in err
    assert sorted(os.listdir()) == before


def test_of_a_row_that_is_tuned_the_trials_travel_first(home, fake, study):
    add(home, "tune: {grid: {train.lr: [1e-3, 1e-2]}, seeds: [7], validation: 0.2}\n")
    code, out, _ = study(*SEED, "--export", "cells.jsonl")
    assert (code, {line["config"]["seed"] for line in lines_of("cells.jsonl")}) == (0, {7})
    study("tiny.yaml", "--seeds", "1")
    code, out, _ = study(*SEED, "--export", "cells.jsonl")
    assert "0 cells to run" in out


def test_the_commands_that_an_export_prints_work(home, fake, alone, study, tmp_path):
    """For a study file of one's own in a folder, with the options that it was given."""
    Path("mine").mkdir()
    own = Path("mine/own study.yaml")
    own.write_text(Path("tiny.yaml").read_text())
    code, out, _ = study(str(own), "--seeds=1", "--set", "sweep.basis=sinc", "--export", "cells.jsonl")
    assert code == 0
    elsewhere, here = (shlex.split(line)[3:] for line in out.splitlines()[-2:])
    assert train(*elsewhere, *alone())[0] == 0
    code, out, err = study(*here)
    assert (code, err) == (0, "")
    assert "sinc" in out


def test_an_export_names_the_plug_ins_that_its_cells_need(home, fake, study):
    Path("plug in.py").write_text("")
    _, out, _ = study(*SEED, "--plugin", "plug in.py", "--export=cells.jsonl")
    elsewhere, here = out.splitlines()[-2:]
    assert elsewhere == "  python -m basisadapt.training cells.jsonl --plugin 'plug in.py' --output results.jsonl"
    assert here.endswith("--plugin 'plug in.py' --import results.jsonl")
    assert "--export" not in here
