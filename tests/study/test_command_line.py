"""The command line of studies: what it previews, refuses, hides and answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import pytest

from basisadapt import training
from basisadapt.core.errors import InputError
from basisadapt.study.__main__ import main
from basisadapt.study.options import check_together, make_parser
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.record import Record


def test_dry_run_counts_and_leaves_nothing(folder, fake, study):
    code, out, _ = study("tiny.yaml", "--dry-run", "--set", "adapter.r=8")
    assert code == 0
    assert "Two bases: 9 cells" in out
    assert "Of each: backbone minilm, task docstrings, rate 0.002, length 5 steps, batch 16" in out
    assert "training rows all, test rows all, precision fp32\nTo download from the hub: nothing\n" in out
    assert [line.split()[0] for line in out.splitlines()[5:]] == [
        n for n in ("sinc", "fourier", "LoRA") for _ in range(3)
    ]
    assert "8,110" in out
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


def test_dry_run_says_what_differs_and_what_would_be_downloaded(home, fake, study, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("basisadapt.tasks.hub.is_cached", lambda _: False)
    changes = ["--set", "sweep.task=docstrings,glue/rte", "--set", "backbone=qwen2-0.5b", "--seeds", "1"]
    code, out, _ = study("tiny.yaml", "--dry-run", *changes, "--set", "train.max_steps=null")
    assert code == 0
    assert "Of each: backbone qwen2-0.5b, rate 0.002, length 3 epochs" in out
    assert "To download from the hub: backbone Qwen/Qwen2-0.5B, data nyu-mll/glue\n" in out
    rows = [line.split() for line in out.splitlines()[4:]]
    assert rows[0][:3] == ["row", "task", "seed"]
    assert [row[2] for row in rows[1:5]] == ["docstrings", "glue/rte"] * 2, "after the two words of the label"


@pytest.mark.parametrize("hub", ["backbone", "data"])
def test_a_hub_that_cannot_be_reached_fails_once_and_before_anything_is_recorded(home, fake, study, monkeypatch, hub):
    asked = []

    def fail(*arguments):
        asked.append(arguments)
        raise socket.gaierror(-2, "Name or service not known") if hub == "backbone" else InputError("no network")

    if hub == "backbone":
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
        change, message = "backbone=qwen2-0.5b", "is neither a folder nor in the cache, and the hub cannot be reached"
    else:
        monkeypatch.setattr("basisadapt.tasks.hub.is_cached", lambda _: False)
        monkeypatch.setattr(training, "load_data", fail)
        change, message = "task=glue/rte", "no network"
    code, _, error = study("tiny.yaml", "--set", change)
    assert (code, len(asked), fake.ran) == (2, 1, [])
    assert message in error
    assert Record.read("sqlite:///mlflow.db", "tiny") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate_bases"], "did you mean 'ablate_basis'"),
        (["tiny.yaml", "--set", "adapter.q=1"], "unknown key 'adapter.q'"),
        (["tiny.yaml", "--set", "train.max_steps=soon"], "train.max_steps must be a whole number or null"),
        (["tiny.yaml", "--set", "adapter.r=999"], "adapter.r must be at most 384"),  # plan()'s answer
        (["tiny.yaml", "--seeds", "one"], "--seeds needs whole numbers"),
        (["tiny.yaml", "--seeds=-1"], "seeds must be whole numbers of at least 0"),
        (["tiny.yaml", "--preset", "huge"], "invalid choice: 'huge'"),
        (["tiny.yaml", "--data-dir", "absent"], "data folder 'absent' cannot be read"),
        (["tiny.yaml", "--plugin", "absent.py"], "does not exist"),
        (["tiny.yaml", "--plugin", "broken.py"], "does not import: ZeroDivisionError"),
        (["tiny.yaml", "--plugin", "no.such.module"], "does not import: ModuleNotFoundError"),
        (["tiny.yaml", "--tracking-uri", "sqlite:///absent/mlflow.db"], "--tracking-uri 'sqlite:///absent"),
        (["tiny.yaml", "--storage", "sqlite:////proc/optuna.db"], "--storage 'sqlite:////proc/optuna.db'"),
        (["tiny.yaml", "--storage", "sqlite:///broken.py"], "file is not a database"),
        (["tiny.yaml", "--tracking-uri", "postgres://x"], "--tracking-uri 'postgres://x' cannot be opened"),
        (["tiny.yaml", "--tracking-uri", "./folder"], "--tracking-uri './folder' cannot be opened"),
        (["tiny.yaml", "--storage", "nosql://x"], "--storage 'nosql://x' cannot be opened"),
        (["tiny.yaml", "--storage", "sqlite:///mlflow.db"], "cannot share one database"),
        (["tiny.yaml", "--output", "broken.py"], "--output 'broken.py' cannot be created"),
        (["--report", "tiny.yaml"], "nothing of study 'tiny' is recorded"),
        ([], "give the NAME of a study"),
        (["tiny.yaml", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, fake, study, arguments, message):
    (folder / "broken.py").write_text("1 / 0\n" * 200)
    code, out, err = study(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("basisadapt: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert fake.ran == []
    assert sorted(path.name for path in folder.iterdir()) == ["broken.py", "tiny.yaml"]


def test_debug_shows_where_an_input_error_comes_from(folder, study):
    code, _, err = study("absent.yaml", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_passwords_are_shown_nowhere(home, fake, study, monkeypatch, runs):
    from basisadapt.study import __main__ as program

    code, _, err = study("tiny.yaml", "--storage", "postgresql+nothing://me:s3cret@host/name")
    assert code == 2
    assert "me:***@host" in err
    assert "s3cret" not in err
    secret = "https://judge:s3cret@host/plugin"
    monkeypatch.setattr(program, "load_plugin", lambda plugin: None)
    assert study("tiny.yaml", "--seeds", "1", "--plugin", secret)[0] == 0
    (parent,) = runs(parents=True)
    assert "judge:***@host" in parent.data.tags["basisadapt.command"]
    assert "s3cret" not in str(parent.data)


def test_too_many_runs_for_an_address_have_no_link(home, fake, study, runs, monkeypatch):
    monkeypatch.setattr("basisadapt.study.record.record.MAX_COMPARED", 8)
    code, out, _ = study("tiny.yaml")
    assert code == 0
    assert "all runs, by invocation" in out
    assert "compare-runs" not in out
    (parent,) = runs(parents=True)
    assert parent.data.tags["mlflow.note.content"].startswith("**")


def test_a_reader_that_has_seen_enough_is_no_error():
    """python -m basisadapt.study --list | head"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "basisadapt.study", "--list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_help_and_list_do_without_torch(option):
    program = (
        "import sys\nfrom basisadapt.study.__main__ import main\n"
        f"try:\n    main([{option!r}])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'peft', 'transformers', 'pandas', 'matplotlib', 'scipy'}\n"
        "heavy &= sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ablate_basis" in done.stdout or "--tracking-uri" in done.stdout


@pytest.mark.parametrize("module", ["basisadapt", "basisadapt.study"])
def test_the_version_is_the_packages(module):
    """That of pyproject.toml, by either name of the command."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"basisadapt {project['version']}\n", "")


def test_the_examples_of_help_are_command_lines(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.split("\nExamples:\n")[1].split("\n\n")[0].splitlines()
    assert 4 <= len(lines) <= 6
    for line in lines:
        options = make_parser().parse_args(line.split()[3:])
        check_together(options)
        read_spec(options.name or options.report)
