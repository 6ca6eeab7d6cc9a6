"""What somebody new to the command line does: data of their own, lists of values, names from elsewhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from common import add

from basisadapt import study as studies
from basisadapt.core.errors import InputError
from basisadapt.core.synonyms import SYNONYMS
from basisadapt.study.drive.callback import CALLBACKS
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.keys import full_key, known_keys
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.tuning import resolve_tuning


def write_reviews(folder, header="text,label"):
    rows = [f"film {i} is {'good' if i % 3 else 'bad'},{i % 3}" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join([header, *rows]))


def test_on_own_data_a_shipped_study_says_nothing_of_the_paper(home, fake, study):
    write_reviews(home)
    code, printed, error = study("ablate_basis", "--preset", "smoke", "--set", "task=reviews.csv")
    assert code == 0, error
    assert "published" not in printed.lower()
    assert "Claims" not in printed
    assert "published  seeds" in study("ablate_basis", "--preset", "smoke")[1], "as ever on the study's own"
    spec = read_spec("ablate_basis")
    assert resolve_tuning(spec, changes=["task=reviews.csv"]).spec.claims == ()
    assert resolve(spec, changes=["task=reviews.csv"]).spec.answers is None
    assert resolve(spec).spec == spec


def test_a_study_of_ones_own_keeps_its_claims_on_ones_own_data(folder):
    write_reviews(folder)
    add(folder, "claims: [{text: It does, better: sinc, than: LoRA}]\n")
    assert len(resolve(read_spec("tiny.yaml"), changes=["task=reviews.csv"]).spec.claims) == 1


def test_any_study_is_tuned_from_the_command_line(home, fake, study):
    code, printed, error = study("tiny.yaml", "--set", "tune.train.lr=1e-3,1e-2", "--set", "tune.validation=0.25")
    assert code == 0, error
    assert "Tuning" in printed
    assert "trained on all but the last 25 % of the training rows" in printed
    assert {seed for _, seed in fake.ran} == {1, 2, 3, 7}
    assert len(fake.ran) == 3 * 2 + 3 * 3


def test_a_rule_without_a_file_holds_back_a_fifth_and_draws_where_rows_are_drawn():
    spec = read_spec("ablate_basis")
    tuning = resolve_tuning(spec, changes=["tune.adapter.r=2,4"])
    assert {cell.config.train.validation for cell in tuning.trials} == {0.2}
    assert {cell.config.adapter.r for cell in tuning.trials if cell.config.method == "lora"} == {2, 4}
    drawn = resolve_tuning(read_spec("ablate_nonlinearity"), changes=["tune.train.lr=0.01,0.03"], seeds=[1])
    assert {cell.config.train.validation for cell in drawn.trials} == {None}
    with pytest.raises(InputError, match=r"tune\.seeds must be seeds that no row is reported with: 7 is one"):
        resolve_tuning(spec, changes=["tune.train.lr=0.01,0.03"], seeds=[7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["adapter.r=2,4"], "adapter.r must be a whole number, got '2,4'; for a row of each value: --set sweep.r=2,4"),
        (["r=2,4"], "--set sweep.r=2,4"),
        (["train.lr=1e-3,1e-2"], "--set sweep.train.lr=1e-3,1e-2"),
        (["adapter.grid=uniform,learned"], "--set sweep.grid=uniform,learned"),
        (["lora_dropout=0.1"], "unknown key 'lora_dropout'; did you mean 'adapter.dropout'?"),
        (["adapter.lora_dropout=0.1"], "unknown key 'adapter.lora_dropout'; did you mean 'adapter.dropout'?"),
        (["center=true"], "unknown key 'center'; did you mean 'adapter.centre'?"),
        (["epoch=1"], "unknown key 'epoch'; did you mean 'train.epochs'?"),
        (["train.learning_rate=1"], "unknown key 'train.learning_rate'; did you mean 'train.lr'?"),
        (["sweep.lora_rank=1,2"], "unknown key 'lora_rank'; did you mean 'adapter.r'?"),
        (["seed=1"], "unknown key 'seed'; it is the option --seeds"),
        (["sweep.seed=1,2"], "unknown key 'seed'; it is the option --seeds"),
        (["num_workers=2"], "unknown key 'num_workers'; it is the option --workers"),
        (["backbone=models/of/mine"], "backbone 'models/of/mine' is a folder's path, and there is no such folder"),
        (["backbone=minilmm"], "unknown backbone 'minilmm'; did you mean 'minilm'"),
    ],
)
def test_hints(changes, message):
    with pytest.raises(InputError) as error:
        resolve(read_spec("ablate_basis"), changes=changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--lr=1e-3", "settings are given as --set train.lr=VALUE"),
        ("--learning-rate=1e-3", "settings are given as --set train.lr=VALUE"),
        ("--num_basis=9", "settings are given as --set adapter.num_basis=VALUE"),
        ("--dryrun", "did you mean '--dry-run'?"),
        ("--nothing", "--help lists the options"),
        ("more", "--help says what is expected"),
    ],
)
def test_an_option_that_there_is_not(option, hint, study, folder):
    assert study("tiny.yaml", option) == (2, "", f"basisadapt: error: unrecognized arguments: {option}; {hint}\n")


def test_what_others_call_a_setting_is_told_ours():
    assert set(SYNONYMS) <= set(known_keys())
    for key, names in SYNONYMS.items():
        for name in names.split():
            with pytest.raises(InputError) as error:
                full_key(name)
            assert str(error.value) == f"unknown key {name!r}; did you mean {key!r}?"


def test_a_list_is_hinted_at_only_where_it_is_what_was_refused():
    with pytest.raises(InputError) as error:
        resolve(read_spec("ablate_basis"), changes=["adapter.target_modules=[query, value]", "train.epochs=0"])
    assert "sweep" not in str(error.value)


def test_a_missing_column_is_no_other_column(study, home):
    write_reviews(home, "extra,label")
    code, _, error = study("ablate_basis", "--preset", "smoke", "--set", "task=reviews.csv")
    assert code == 2
    assert "unknown column 'text' (known: extra, label)" in error
    write_reviews(home, "texts,label")
    assert "did you mean 'texts'" in study("ablate_basis", "--preset", "smoke", "--set", "task=reviews.csv")[2]


class Log(studies.Callback):
    def __init__(self):
        self.seen = []

    def on_end(self, cell, result, error):
        self.seen.append((cell.row, cell.seed, result.metrics["accuracy"] if result else error))


class Broken(studies.Callback):
    def on_end(self, cell, result, error):
        raise ConnectionError("no server")


PLUGIN = """
from pathlib import Path
from basisadapt.study import Callback


class Lines(Callback, name="lines_of_a_test"):
    def on_end(self, cell, result, error):
        with Path("lines.txt").open("a") as file:
            print(cell.row, cell.seed, error or result.status, file=file)
"""


def test_callbacks_are_told_how_cells_end_and_cannot_end_the_study(home, fake, capsys):
    fake.ways = {("fourier", 1): "raise"}
    log = Log()
    result = studies.run("tiny.yaml", preset="smoke", callbacks=[Broken(), log])
    values = result.cells().set_index("row")["accuracy"]
    assert log.seen == [
        ("LoRA", 1, values["LoRA"]),
        ("sinc", 1, values["sinc"]),
        ("fourier", 1, "RuntimeError: out of memory"),
    ]
    assert capsys.readouterr().err.count("Broken is not called again: ConnectionError: no server") == 1
    studies.run("tiny.yaml", preset="smoke", callbacks=[log])
    assert len(log.seen) == 4, "what is done is not told again, what failed is run again"


def test_a_callback_of_a_plug_in_is_told_by_the_command_line(home, fake, study, monkeypatch):
    monkeypatch.setattr(CALLBACKS, "_classes", {})
    (home / "my_lines.py").write_text(PLUGIN)
    assert study("tiny.yaml", "--preset", "smoke", "--plugin", "my_lines.py")[0] == 0
    assert (home / "lines.txt").read_text().splitlines() == ["LoRA 1 finished", "sinc 1 finished", "fourier 1 finished"]


def test_a_shell_that_asks_is_told_options_and_studies(study, monkeypatch):
    """By argcomplete, which ends the process; without it the shell gets no answer, and nothing changes otherwise."""
    asked = []

    def autocomplete(parser):
        asked.append(parser)
        raise SystemExit(0)

    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=autocomplete))
    assert study("--list")[0] == 0
    assert asked == []
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    with pytest.raises(SystemExit):
        study("--list")
    actions = {action.dest: action for action in asked[0]._actions}
    assert "--save-adapters" in actions["save_adapters"].option_strings
    assert "ablate_basis" in actions["name"].completer(prefix="abl")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert study("--list")[0] == 0
