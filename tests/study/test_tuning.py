"""Tuning: what every row is tried with, what is chosen, and what of it is recorded, shown and done again."""

from __future__ import annotations

import csv
import shutil

import pytest
from common import add, outcome, table_of

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.study.report.table import tuned_table
from basisadapt.study.report.text_tables import _tuning

RATES = "tune: {grid: {train.lr: [1e-3, 1e-2, 1e-1]}, seeds: [7], validation: 0.25}\n"
BEST = {"sinc": 1e-2, "lora": 1e-1}


def name_of(config):
    return getattr(config.adapter, "basis", config.method)


def peaked(config):
    """Best at a rate of each row's own; the seeds differ a little."""
    return 0.5 + 0.2 * (config.train.lr == BEST[name_of(config)]) + config.seed / 1000


def tuning_of(out):
    """Row to the cells of the table of tuning."""
    return {line.split("  ")[0]: line.split()[1:] for line in out.partition("\nTuning\n")[2].splitlines()}


@pytest.fixture
def tuned(home, fake):
    """tiny.yaml with two rows and a grid of rates, of which each row has a best one."""
    path = home / "tiny.yaml"
    path.write_text(path.read_text().replace("[sinc, fourier]", "[sinc]").replace("[1, 2, 3]", "[1, 2]") + RATES)
    fake.score = peaked
    return home


@pytest.fixture
def ran(fake, monkeypatch):
    """The configurations that were run, in order."""
    from basisadapt.training import running

    configs = []

    def run(config, **options):
        configs.append(config)
        return fake.run(config, **options)

    monkeypatch.setattr(running, "run", run)
    return configs


def test_every_row_is_run_with_the_value_that_came_out_best_for_it(tuned, ran, study, runs):
    import mlflow

    code, out, err = study("tiny.yaml", "--output", "results")
    assert code == 0
    trials, reported = ran[:6], ran[6:]
    tried = [(name, lr) for name in BEST for lr in (1e-3, 1e-2, 1e-1)]
    assert [(name_of(c), c.train.lr) for c in trials] == tried
    assert {(c.seed, c.train.validation) for c in trials} == {(7, 0.25)}
    expected = [(name, BEST[name], seed) for seed in (1, 2) for name in ("lora", "sinc")]
    assert [(name_of(c), c.train.lr, c.seed) for c in reported] == expected
    assert {c.train.validation for c in reported} == {None}
    assert "[6/6] LoRA, tuning train.lr=0.1, seed 7: accuracy 0.7070" in err
    assert "[3/4] LoRA, seed 2: accuracy 0.7020" in err
    found = runs()
    assert found[1].data.tags["basisadapt.row"] == "sinc, tuning train.lr=0.01"
    assert found[1].data.params["train.validation"] == "0.25"
    assert len({run.data.tags["mlflow.parentRunId"] for run in found}) == 1
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tuned}/mlflow.db")
    assert "are trials" in client.get_experiment_by_name("tiny").tags["mlflow.note.content"]

    shown = tuning_of(out)
    assert shown["row"] == ["train.lr", "train.lr=0.001", "train.lr=0.01", "train.lr=0.1"]
    assert shown["sinc"] == ["0.01", "50.70", "70.70", "50.70"]
    assert shown["LoRA"] == ["0.1", "(edge)", "50.70", "50.70", "70.70"]
    assert "every train.lr above and seed 7, trained on all but the last 25 % of the training rows" in out
    assert "highest mean accuracy is taken, the first of equals" in out
    assert "beyond which a better value may lie: LoRA." in out
    rows = list(csv.DictReader((tuned / "results" / "tuning.csv").open(encoding="utf-8")))
    assert [row["train.lr"] for row in rows] == ["0.01", "0.1 (edge)"]
    assert "<h2>Tuning</h2>" in (tuned / "results" / "report.html").read_text(encoding="utf-8")
    assert "| sinc | 0.01 |" in (tuned / "results" / "table.md").read_text(encoding="utf-8")

    again = study("tiny.yaml")
    assert (again[0], table_of(again[1]), again[2], len(ran)) == (0, table_of(out), "", 10)
    report = study("--report", "tiny.yaml")
    assert (report[0], table_of(report[1]), len(ran)) == (0, table_of(out), 10)

    code, out, _ = study("tiny.yaml", "--set", "tune.train.lr=1e-3,1e-2,1e-1,1")
    assert code == 0
    assert [(name_of(c), c.train.lr) for c in ran[10:]] == [("sinc", 1), ("lora", 1)], "the rest is recorded"
    assert "beyond which" not in out, "the wider grid holds what is best"


def test_of_equals_the_first(tuned, fake, ran, study):
    fake.score = lambda config: 0.5
    study("tiny.yaml", "--seeds", "1")
    assert {c.train.lr for c in ran[6:]} == {1e-3}


def test_what_failed_counts_as_worst(tuned, fake, ran, study):
    def score(config):
        if config.train.lr == BEST[name_of(config)] and config.seed == 7:
            raise RuntimeError("out of memory")
        return 0.1

    fake.score = score
    code, out, _ = study("tiny.yaml", "--seeds", "1")
    assert code == 1, "a cell failed"
    assert {c.train.lr for c in ran[6:]} == {1e-3}
    assert tuning_of(out)["sinc"] == ["0.001", "(edge)", "10.00", "failed", "10.00"]

    fake.score = peaked
    ran.clear()
    code, _, _ = study("tiny.yaml", "--seeds", "1")
    assert code == 0
    assert [c.seed for c in ran] == [7, 7, 1, 1], "what failed is tried again, and may be chosen"
    assert {name_of(c): c.train.lr for c in ran[2:]} == BEST


def test_a_row_of_which_no_candidate_finished_is_failed(tuned, fake, ran, study):
    fake.ways = {("sinc", 7): "diverge"}
    code, out, _ = study("tiny.yaml", "--seeds", "1")
    assert code == 1
    assert [name_of(c) for c in ran[6:]] == ["lora"]
    assert "1 of 1 failed" in out
    reason = "train.lr=0.001 diverged, train.lr=0.01 diverged, train.lr=0.1 diverged"
    assert f"Failed: sinc seed 1 (tuning: {reason})." in out
    report = study("--report", "tiny.yaml", "--seeds", "1")
    assert (report[0], table_of(report[1])) == (1, table_of(out))


def test_an_interrupted_tuning_goes_on_as_if_it_had_not_been(
    tuned, fake, ran, study, tmp_path_factory, empty_databases
):
    fake.ways = {("lora", 7): "interrupt"}
    assert study("tiny.yaml", "--seeds", "1")[0] == 130
    assert len(ran) == 4
    code, out, _ = study("--report", "tiny.yaml", "--seeds", "1")
    assert code == 0
    assert "1 of 1 not run" in out
    assert tuning_of(out)["LoRA"] == ["-", "killed", "not", "run", "not", "run"]
    fake.ways = {}
    code, resumed, _ = study("tiny.yaml", "--seeds", "1")
    assert (code, len(ran)) == (0, 4 + 3 + 2)
    elsewhere = tmp_path_factory.mktemp("undisturbed")
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(empty_databases / name, elsewhere / name)
    _, whole, _ = study("tiny.yaml", "--seeds", "1", "--tracking-uri", f"sqlite:///{elsewhere}/mlflow.db")
    assert table_of(resumed) == table_of(whole)


def test_a_row_is_not_shown_with_cells_of_another_time_while_its_choice_is_open(folder):
    add(folder, RATES)
    tuning = resolve_tuning(read_spec("tiny.yaml"))
    known = {cell.key: outcome(cell, 0.5) for cell in tuning.candidates[0][0].row.cells}
    found = tuning.choose(known)
    assert [choice.best for choice in found.choices] == [None] * 3
    assert found.seen(known) == {}
    assert found.chosen.rows == ()
    assert len(found.study.rows) == 3


def test_the_mean_over_the_seeds_decides_and_all_must_have_finished(folder):
    add(folder, RATES.replace("[7]", "[7, 8]"))
    tuning = resolve_tuning(read_spec("tiny.yaml"))
    first, second, third = tuning.candidates[0]
    values = dict(zip([c.key for c in (*first.trials, *second.trials)], [0.5, 0.6, 0.9, 0.1], strict=True))
    known = {cell.key: outcome(cell, values[cell.key]) for one in (first, second) for cell in one.trials}
    known |= {third.trials[0].key: outcome(third.trials[0], 1.0)}
    assert tuning.choose(known).choices[0].best is None, "one is still to be tried"
    known |= {third.trials[1].key: outcome(third.trials[1], status="diverged")}
    assert tuning.choose(known).choices[0].best is first
    known |= {third.trials[1].key: outcome(third.trials[1], status="killed")}
    assert tuning.choose(known).choices[0].is_open, "a killed cell is run again"


def test_by_loss_the_least_is_chosen(folder):
    add(folder, RATES.replace("0.25", "0.25, by: loss"))
    tuning = resolve_tuning(read_spec("tiny.yaml"))
    cells = [one.trials[0] for one in tuning.candidates[0]]
    losses = [0.3, 0.2, 0.4]
    known = {cell.key: outcome(cell, 0.5, eval_loss=loss) for cell, loss in zip(cells, losses, strict=True)}
    tuned = tuning.choose(known)
    assert tuned.choices[0].best is tuning.candidates[0][1]
    grid = _tuning(tuned, tuned_table(tuned, known))
    assert grid.rows[0] == ["sinc", "0.01", "0.3000", "0.2000", "0.4000"]
    assert "what gives the lowest mean eval_loss is taken" in grid.notes[0]
    known[cells[1].key] = outcome(cells[1], 0.9)
    assert tuning.choose(known).choices[0].best is tuning.candidates[0][0], "without a loss it is no candidate"


def test_several_settings_are_combined_and_a_method_without_one_does_not_show_it(folder):
    add(folder, RATES.replace("1e-2, 1e-1]", "1e-2], omega_init: [nyquist, 2, 1]"))
    tuning = resolve_tuning(read_spec("tiny.yaml"))
    sinc, _, lora = tuning.candidates
    assert [one.name for one in sinc][:2] == ["train.lr=0.001, omega_init=nyquist", "train.lr=0.001, omega_init=2"]
    assert len(sinc) == 6
    known = {cell.key: outcome(cell, 0.5) for cell in tuning.trials}
    choices = tuning.choose(known).choices
    assert len({cell.key for one in lora for cell in one.trials}) == 2, "omega is nothing to LoRA: no cell runs twice"
    assert choices[0].edges == ["train.lr"], "words have no order"
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("[nyquist, 2, 1]", "[3, 2, 1]"))
    tuning = resolve_tuning(read_spec("tiny.yaml"))
    choices = tuning.choose({cell.key: outcome(cell, 0.5) for cell in tuning.trials}).choices
    assert [choice.edges for choice in choices] == [["train.lr", "adapter.omega_init"]] * 2 + [["train.lr"]]


def test_one_value_needs_no_trial(tuned, ran, study):
    code, out, _ = study("tiny.yaml", "--set", "tune.train.lr=1e-2", "--seeds", "7")
    assert (code, "Tuning" in out) == (0, False)
    assert [(c.train.lr, c.seed, c.train.validation) for c in ran] == [(1e-2, 7, None)] * 2


def test_a_preset_has_a_grid_of_its_own_and_the_command_line_comes_last(folder):
    add(folder, RATES)
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("seeds: [1]}", "seeds: [1], tune.train.lr: [1, 2]}"))
    spec = read_spec("tiny.yaml")
    assert len(resolve_tuning(spec).trials) == 9
    assert len(resolve_tuning(spec, preset="smoke").trials) == 6
    assert len(resolve_tuning(spec, preset="smoke", changes=["tune.train.lr=1,2,3,4"]).trials) == 12


def test_a_study_without_it_is_what_it_was(folder):
    spec = read_spec("tiny.yaml")
    tuning = resolve_tuning(spec, changes=["r=2"], seeds=[5])
    assert tuning.trials == ()
    assert tuning.choose({}).study == tuning.choose({}).chosen == resolve(spec, changes=["r=2"], seeds=[5])


def test_dry_run_lists_the_trials_too_and_leaves_nothing(folder, fake, study):
    add(folder, RATES)
    code, out, _ = study("tiny.yaml", "--dry-run")
    assert code == 0
    assert "Two bases: 18 cells" in out
    assert len([line for line in out.splitlines() if ", tuning train.lr=" in line and line.endswith("to run")]) == 9
    assert len([line for line in out.splitlines() if line.startswith("sinc  ") and line.endswith("to run")]) == 3
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


def test_a_search_does_without(tuned, ran, study):
    add(tuned, "search: {train.lr: [1e-3, 1e-2]}\n")
    code, out, _ = study("tiny.yaml", "--search", "random", "--trials", "2", "--seeds", "7")
    assert (code, "\nTuning\n" in out) == (0, False)
    assert {c.train.validation for c in ran} == {None}


def test_a_task_that_draws_its_rows_is_tuned_on_other_seeds_alone(tuned, ran, study):
    path = tuned / "tiny.yaml"
    path.write_text(path.read_text().replace("docstrings", "facts").replace("0.25", "null"))
    code, out, _ = study("tiny.yaml")
    assert code == 0
    assert {(c.seed, c.train.validation) for c in ran[:6]} == {(7, None)}
    assert {(c.seed, c.train.validation) for c in ran[6:]} == {(1, None), (2, None)}
    assert tuning_of(out)["sinc"] == ["0.01", "50.70", "70.70", "50.70"]
    assert "every train.lr above and seed 7, which draw other rows than those reported; what gives the highest" in out


@pytest.mark.parametrize(
    ("before", "after", "arguments", "message"),
    [
        ("[7]", "[2]", [], "tune.seeds must be seeds that no row is reported with: 2 is one of the study's"),
        ("[7]", "[]", [], "tune.seeds must be seeds that no row is reported with: there are none"),
        ("[7]", "[-7]", [], "seeds must be whole numbers of at least 0"),
        ("", "", ["--seeds", "7"], "7 is one of the study's"),
        ("", "", ["--set", "train.lr=1e-2"], "train.lr is tuned; --set tune.train.lr=0.01 tries that value only"),
        ("{method: lora}", "{method: lora, train.lr: 1}", [], "row 'LoRA' sets train.lr, which is tuned"),
        ("train.lr: [", "train.lrr: [", [], "did you mean 'train.lr'"),
        ("train.lr: [1e-3, 1e-2, 1e-1]", "method: [phi, lora]", [], "only settings of the adapter and of training"),
        ("1e-1]", "-1]", [], "train.lr must be above 0"),
        ("[1e-3, 1e-2, 1e-1]", "1e-3", [], "tune.train.lr must be a list of values"),
        ("0.25", "1.5", [], "train.validation must be between 0 and 1"),
        (", validation: 0.25", "", [], "validation"),
        ("0.25", "0.25, by: accuracy", [], "tune.by must be score or loss, got 'accuracy'"),
        ("0.25", "null", [], "tune.validation must be a share of the training rows for task 'docstrings', whose"),
        ("seeds: [1]}", "seeds: [1], tune.train.lr: 1e-3}", [], "tune.train.lr must be a list of values"),
        ("", "", ["--set", "tune.train.lr="], "at least one value"),
        (RATES, "", ["--set", "tune.by=loss"], "study 'tiny' tunes nothing, so that tune.by means nothing without a"),
    ],
)
def test_bad_tuning_is_one_line_and_leaves_nothing(folder, fake, study, before, after, arguments, message):
    add(folder, RATES)
    path = folder / "tiny.yaml"
    if before:
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    code, out, err = study("tiny.yaml", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert fake.ran == []
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]
