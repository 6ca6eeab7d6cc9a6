from __future__ import annotations

import math
import shutil

import pytest
from common import add

from basisadapt.core.errors import InputError
from basisadapt.core.ranges import Range, parse_range
from basisadapt.study.drive.search import Search, SearchDriver
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.space import DECLARED, suggest

SPACE = """
search:
  adapter.gain: [1, 100, log]
  omega_init: [0.5, 2.0]
  adapter.basis: [sinc, gaussian_rbf]
"""


def search_of(name="tiny.yaml", changes=(), **options):
    options = {"preset": "quick", "seeds": None, "sampler": "tpe", "trials": 5, **options}
    return Search(spec=read_spec(name), changes=changes, **options)


@pytest.fixture
def searched(home):
    """tiny.yaml with a space."""
    add(home, SPACE)
    return home


def hill(config):
    """Highest at gain 10 and omega 1; LoRA lies at 0.5; seeds differ a little."""
    if not hasattr(config.adapter, "gain"):
        return 0.5 + config.seed / 1000
    distance = (math.log10(config.adapter.gain) - 1) ** 2 + (config.adapter.omega_init - 1) ** 2 / 100
    return 0.8 - 0.2 * distance + (config.seed % 2) / 1000


def optuna_trials(home):
    import optuna

    url = f"sqlite:///{home}/optuna.db"
    (name,) = [name for name in optuna.get_all_study_names(url) if " search " in name]
    return optuna.load_study(study_name=name, storage=url).get_trials()


TPE = ("tiny.yaml", "--search", "tpe", "--trials", "12", "--seeds", "1")


def test_a_search_finds_the_hill_and_says_what_mattered(searched, fake, drawn_reports, study, runs):
    fake.score = hill
    code, out, err = study(*TPE, "--output", "results")
    assert code == 0
    assert len(fake.ran) == 1 + 12  # the reference, then every trial
    assert "trial 12 of 12: 0." in err
    best = max(optuna_trials(searched), key=lambda trial: trial.value)
    assert abs(math.log10(best.params["adapter.gain"]) - 1) < 0.3
    table = out.split("\n\n")[1].splitlines()
    assert [line.split("  ")[0] for line in table[2:]][-1] == "LoRA"
    assert f"trial {best.number + 1}" in table[2]
    importance = out.partition("\nImportance\n")[2].split()
    assert importance.index("gain") < importance.index("omega_init")
    assert "a lead, to be confirmed on other seeds" in out
    names = {path.name for path in (searched / "results").iterdir()}
    assert {"report.html", "search.png", "trials.csv", "importance.csv"} <= names
    assert {run.data.params["row"] for run in runs()} == {"LoRA", *(f"trial {n}" for n in range(1, 13))}

    again = study(*TPE)
    assert (again[0], again[1].split("\nRecorded")[0], len(fake.ran)) == (0, out.split("\nRecorded")[0], 13)
    report = study("--report", *TPE)
    assert report[1].split("\nRecorded")[0] == out.split("\nRecorded")[0]
    assert len(fake.ran) == 13


@pytest.mark.parametrize(
    ("sampler", "seeds", "trials"),
    [("tpe", (1,), 12), ("random", (1, 2), 3)],  # TPE draws its first ten trials at random
)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    searched, fake, study, tmp_path_factory, empty_databases, sampler, seeds, trials
):
    arguments = ["tiny.yaml", "--search", sampler, "--trials", str(trials), "--seeds", ",".join(map(str, seeds))]

    def interrupted(config):
        if len(fake.ran) == len(seeds) * trials:  # the last seed of the last trial but one
            raise KeyboardInterrupt
        return hill(config)

    fake.score = interrupted
    code, _, err = study(*arguments)
    assert code == 130
    assert f"to resume: python -m basisadapt.study {' '.join(arguments)}" in err
    fake.score = hill
    code, resumed, _ = study(*arguments)
    assert code == 0
    assert len(fake.ran) == len(seeds) * (trials + 1) + 1  # the interrupted cell alone is run twice
    states = [trial.state.name for trial in optuna_trials(searched)]
    assert states == ["COMPLETE"] * (trials - 2) + ["FAIL"] + ["COMPLETE"] * 2

    elsewhere = tmp_path_factory.mktemp("undisturbed")
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(empty_databases / name, elsewhere / name)
    _, whole, _ = study(*arguments, "--tracking-uri", f"sqlite:///{elsewhere}/mlflow.db")
    assert resumed.split("\nRecorded")[0] == whole.split("\nRecorded")[0]


def test_trials_of_a_batch_run_at_once_and_differ(searched, fake, study):
    fake.score = hill
    arguments = ["tiny.yaml", "--search", "tpe", "--trials", "14", "--seeds", "1", "--at-once", "4"]
    code, whole, err = study(*arguments)
    assert code == 0
    assert len(fake.ran) == 1 + 14
    assert [f"trial {n} of 14" in err for n in range(1, 15)] == [True] * 14
    trials = optuna_trials(searched)
    assert len({trial.params["adapter.gain"] for trial in trials}) == 14
    begun, ended = ([getattr(trial, at) for trial in trials] for at in ("datetime_start", "datetime_complete"))
    for first in (0, 4, 8, 12):  # a batch is asked before any of it ends, and told before the next is asked
        assert max(begun[first : first + 4]) < min(ended[first : first + 4])
        assert all(max(ended[first : first + 4]) < later for later in begun[first + 4 :])
    assert study(*arguments)[1].split("\nRecorded")[0] == whole.split("\nRecorded")[0]


def test_a_batch_that_was_interrupted_is_proposed_again(searched, fake, study):
    arguments = ["tiny.yaml", "--search", "random", "--trials", "6", "--seeds", "1", "--at-once", "3"]

    def interrupted(config):
        if len(fake.ran) == 1 + 5:  # in the second batch
            raise KeyboardInterrupt
        return hill(config)

    fake.score = interrupted
    assert study(*arguments)[0] == 130
    fake.score = hill
    assert study(*arguments)[0] == 0
    states = [trial.state.name for trial in optuna_trials(searched)]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] * 3 + ["COMPLETE"] * 3
    killed, again = (optuna_trials(searched)[at : at + 3] for at in (3, 6))
    assert [trial.params for trial in killed] == [trial.params for trial in again]
    assert len(fake.ran) == 1 + 6 + 1  # the interrupted cell alone is run twice


def test_a_trial_is_run_on_every_task_of_the_study(searched, fake, study):
    path = searched / "tiny.yaml"
    path.write_text(path.read_text().replace("sweep: {", "sweep: {task: [docstrings, glue/cola], "))
    ran = []

    def score(config):
        ran.append(config)
        return hill(config) - (0.1 if config.task == "glue/cola" else 0.0)

    fake.score = score
    code, out, _ = study("tiny.yaml", "--search", "random", "--trials", "2", "--seeds", "1", "--at-once", "2")
    assert code == 0
    assert [config.task for config in ran] == ["docstrings", "glue/cola"] * 3  # LoRA's, then the trials'
    for trial in optuna_trials(searched):
        cells = [config for config in ran if getattr(config.adapter, "gain", None) == trial.params["adapter.gain"]]
        assert trial.value == pytest.approx(hill(cells[0]) - 0.05)
    assert "Over all tasks" in out
    assert "task" not in study("tiny.yaml", "--search", "random", "--trials", "2", "--dry-run")[1]
    alone = search_of(changes=["sweep.task=glue/cola", "sweep.basis=sinc"])
    assert [row.task for row in alone.rows("alone", {})] == ["glue/cola"]


def test_cells_that_the_grid_has_run_are_not_run_again(searched, fake, study):
    (searched / "tiny.yaml").write_text((searched / "tiny.yaml").read_text().partition("\nsearch:")[0])
    study("tiny.yaml", "--seeds", "1")
    add(searched, "\nsearch: {basis: [sinc, fourier]}\n")
    fake.ran.clear()
    code, out, _ = study("tiny.yaml", "--search", "random", "--trials", "6", "--seeds", "1")
    assert (code, fake.ran) == (0, [])
    assert "No importances: they need at least 10 finished trials, and there are 6." in out


def test_trials_that_fail_or_diverge_are_shown_and_the_others_go_on(searched, fake, study):
    def score(config):
        if getattr(config.adapter, "basis", "") == "sinc":
            raise RuntimeError("out of memory")
        return hill(config)

    fake.score, fake.ways = score, {("gaussian_rbf", 42): "diverge"}
    code, out, _ = study("tiny.yaml", "--search", "random", "--trials", "2", "--seeds", "42")
    assert code == 1
    trials = optuna_trials(searched)
    expected = {"sinc": "FAIL", "gaussian_rbf": "PRUNED"}
    assert [trial.state.name for trial in trials] == [expected[trial.params["adapter.basis"]] for trial in trials]
    assert {trial.state.name for trial in trials} == {"FAIL", "PRUNED"}
    rows = out.partition("\nTrials")[2].splitlines()
    assert {line.split()[3] for line in rows if line.startswith("trial ") and "state" not in line} == {
        "failed",
        "diverged",
    }
    assert "Failed: trial" in out


def driver_of(name="tiny.yaml", **options):
    return SearchDriver("sqlite:///optuna.db", search_of(name, **options))


class Killed(BaseException):
    """As a kill: nobody catches it."""


@pytest.mark.parametrize("writes", range(5))
def test_a_process_that_is_killed_while_it_asks_leaves_a_trial_that_is_closed(
    searched, fake, study, monkeypatch, writes
):
    """However many writes to the store it lived for; three are the settings of the trial."""
    driver, left = driver_of(seeds=[1], trials=1), iter(range(writes))

    def counted(write):
        def one(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return write(*arguments, **options)

        return one

    storage = driver._study._storage
    with monkeypatch.context() as killed:
        for name in ("create_new_trial", "set_trial_user_attr", "set_trial_param"):
            killed.setattr(storage, name, counted(getattr(storage, name)))
        if writes < 4:
            with pytest.raises(Killed):
                driver._ask(1, "gone")
        else:
            driver._ask(1, "gone")
    assert study("tiny.yaml", "--search", "tpe", "--trials", "1", "--seeds", "1")[0] == 0
    assert [trial.state.name for trial in optuna_trials(searched)] == ["FAIL"] * (writes > 0) + ["COMPLETE"]
    assert len(fake.ran) == 1 + 1


def test_a_trial_of_a_live_process_stays_open(searched):
    driver = driver_of()
    driver._ask(1, "alive")
    driver._ask(1, "gone")
    driver.close_orphans(lambda: {"alive"})
    assert [trial.state.name for trial in optuna_trials(searched)] == ["RUNNING", "FAIL"]
    assert driver.ended == []


def test_which_runs_are_open_is_asked_after_the_trials_were_read(searched):
    """Else a trial that another process starts in between would be closed."""
    driver = driver_of()
    driver._ask(1, "gone")

    def running():
        driver._ask(2, "alive")
        return ()

    driver.close_orphans(running)
    assert [trial.state.name for trial in optuna_trials(searched)] == ["FAIL", "RUNNING"]


@pytest.mark.parametrize(("sampler", "at_once"), [("tpe", 1), ("tpe", 2), ("random", 1)])
def test_settings_are_chosen_as_optunas_own_ask_chooses_them(searched, sampler, at_once):
    """Of 14 trials, of which TPE draws the first ten at random."""
    import optuna

    driver = driver_of(sampler=sampler, at_once=at_once)
    plain = optuna.create_study(direction="maximize")
    for first in range(1, 15, at_once):
        numbers, pairs = range(first, first + at_once), []
        for number in numbers:
            ours = driver._ask(number, "run")
            plain.sampler = driver._sampler(number)
            pairs.append((ours, plain.ask(ours.distributions)))
        for ours, theirs in pairs:
            assert ours.params == theirs.params
            value = -((ours.params["adapter.omega_init"] - 1) ** 2)
            driver._tell(ours, "finished", value)
            plain.tell(theirs, value)
    assert len({tuple(trial.params.items()) for trial in plain.trials}) == 14


def test_the_space_of_a_study_without_one(folder):
    space = search_of().space()
    assert list(space) == ["adapter.basis", *DECLARED]
    assert space["adapter.basis"] == ("sinc", "fourier")
    assert space["adapter.gain"] == DECLARED["adapter.gain"]
    # Fourier declares a wider omega; with sinc in play too, the range holds both.
    assert space["adapter.omega_init"] == Range(0.3, 30.0, log=True)
    alone = search_of(changes=["sweep.basis=polynomial"]).space()
    assert alone["adapter.num_basis"] == Range(4, 16, log=True)
    assert str(alone["adapter.num_basis"]) == "4 to 16, by its logarithm"
    learned = search_of(changes=["sweep.grid=learned,uniform"]).space()
    assert learned["adapter.transfer_lr"] == Range(0.01, 10.0, log=True)


def test_the_methods_settings_alone_are_searched(folder):
    space = search_of(changes=["method=lora"]).space()
    assert list(space) == ["adapter.basis", "train.lr"]


def test_a_plugin_declares_its_range(folder):
    from basisadapt.phi.basis import BASES, TransferBasis

    class Wave(TransferBasis, name="wave_of_test"):
        search = {"omega_init": Range(3.0, 4.0), "tolerance": Range(1e-6, 1e-3, log=True)}  # noqa: RUF012

        def forward(self, u):
            return u.cos()

    try:
        space = search_of(changes=["sweep.basis=wave_of_test"]).space()
    finally:
        del BASES._classes["wave_of_test"]
    assert space["adapter.omega_init"] == Range(3.0, 4.0)
    assert space["adapter.tolerance"] == Range(1e-6, 1e-3, log=True)


def test_declared_ranges_may_be_named(folder):
    add(folder, "search: {gain: declared, train.lr: [1e-3, 1e-2, log]}\n")
    space = search_of().space()
    assert space == {"adapter.gain": DECLARED["adapter.gain"], "train.lr": Range(1e-3, 1e-2, log=True)}


def test_every_declared_range_can_be_run(folder):
    """The ends of each range are valid settings."""
    from basisadapt.study.plan.space import edges

    search = search_of()
    for settings in edges(search.space()):
        assert search.rows("end", settings)[0].cells


def test_optunas_distributions():
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    expected = {
        ("adapter.num_basis", Range(8, 64, log=True)): IntDistribution(8, 64, log=True),
        ("adapter.omega_init", Range(1, 8)): FloatDistribution(1, 8),
        ("train.lr", Range(1e-4, 1e-2, log=True)): FloatDistribution(1e-4, 1e-2, log=True),
        ("train.max_steps", Range(10, 20)): IntDistribution(10, 20),
        ("data.facts", Range(64, 512)): IntDistribution(64, 512),
        ("adapter.centre", (True, False)): CategoricalDistribution((True, False)),
    }
    trial = optuna.create_study().ask()
    for key, where in expected:
        suggest(trial, key, where)
    assert trial.distributions == {key: distribution for (key, _), distribution in expected.items()}


def test_parsed_ranges():
    assert parse_range([1, 100, "log"], "x") == Range(1, 100, log=True)
    assert parse_range([0.5, 2], "x") == Range(0.5, 2)
    assert parse_range([1, 10, 100], "x") == (1, 10, 100)
    assert parse_range(["sinc", "fourier"], "x") == ("sinc", "fourier")
    assert parse_range([True, False], "x") == (True, False)
    for bad in (None, [], "sinc", [2, 1], [0, 1, "log"]):
        with pytest.raises(InputError, match=r"search\.x"):
            parse_range(bad, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {adapter.gainn: [1, 2]}", "did you mean 'adapter.gain'"),
        ("search: {gain: [2, 1]}", "low < high"),
        ("search: {gain: [-5, 1]}", "gain must be above 0, from 1e-6 to 1e6"),
        ("search: {r: [4, 999]}", "adapter.r must be at most 384"),
        ("search: {basis: [sinc, sync]}", "did you mean 'sinc'"),
        ("search: {r: declared}", "search.adapter.r: no range is declared"),
        ("search: [gain]", "search must be"),
    ],
)
def test_a_bad_space_is_one_line_and_leaves_nothing(folder, fake, study, text, message):
    add(folder, text + "\n")
    code, out, err = study("tiny.yaml", "--search", "tpe", "--trials", "3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "tpe"], "--search and --trials go together"),
        (["--trials", "3"], "--search and --trials go together"),
        (["--search", "grid", "--trials", "3"], "invalid choice: 'grid'"),
        (["--search", "tpe", "--trials", "0"], "--trials must be at least 1, got 0"),
        (["--search", "tpe", "--trials", "many"], "invalid int value: 'many'"),
        (["--search", "tpe", "--trials", "3", "--at-once", "0"], "--at-once must be at least 1, got 0"),
        (["--at-once", "3"], "--at-once goes with --search"),
    ],
)
def test_bad_options_of_a_search(folder, fake, study, arguments, message):
    code, _, err = study("tiny.yaml", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_report_of_a_search_that_was_not_run(searched, fake, study):
    study("tiny.yaml", "--seeds", "1")
    code, _, err = study("--report", "tiny.yaml", "--search", "tpe", "--trials", "3")
    assert code == 2
    assert "nothing of this search of 'tiny' is recorded" in err


def test_dry_run_shows_the_space_and_leaves_nothing(folder, fake, study):
    code, out, _ = study("tiny.yaml", "--search", "tpe", "--trials", "3", "--dry-run")
    assert code == 0
    assert "adapter.gain: 1 to 300, by its logarithm" in out
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]
