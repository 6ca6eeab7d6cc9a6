"""What Optuna's pages and importances have to show of a study that is no search."""

from __future__ import annotations

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

VARIANTS = """given: {variant=narrow: {r: 2}, variant=wide: {r: 8}}
sweep: {variant: [narrow, wide], basis: [sinc, fourier]}"""


def params(trials):
    return {trial.user_attrs["row"]: trial.params for trial in trials}


def test_a_trial_has_its_axis_values_as_parameters(home, fake, study, trials):
    assert study("tiny.yaml")[0] == 0
    assert params(trials()) == {
        "sinc": {"adapter.basis": "sinc", "method": "phi"},
        "fourier": {"adapter.basis": "fourier", "method": "phi"},
        "LoRA": {"method": "lora"},  # which has no basis
    }
    (home / "optuna.db").unlink()
    known = params(trials_of_new_store(study))
    assert known["sinc"] == {"adapter.basis": "sinc", "method": "phi"}


def trials_of_new_store(study):
    assert study("tiny.yaml")[0] == 0
    return optuna.load_study(study_name="tiny", storage="sqlite:///optuna.db").get_trials()


def test_optuna_says_which_axis_matters(home, fake, study):
    fake.score = lambda config: 0.5 + config.adapter.r / 100 + config.seed / 10_000
    (home / "tiny.yaml").write_text(
        (home / "tiny.yaml").read_text().replace("sweep: {basis: [sinc, fourier]}", VARIANTS)
    )
    assert study("tiny.yaml")[0] == 0
    optunas = optuna.load_study(study_name="tiny", storage="sqlite:///optuna.db")
    found = get_param_importances(
        optunas, evaluator=FanovaImportanceEvaluator(seed=1), params=["variant", "adapter.basis"]
    )
    assert found["variant"] > 0.9 > 0.1 > found["adapter.basis"]


def test_a_part_of_the_grid_belongs_to_the_same_optuna_study(home, fake, study, trials):
    assert study("tiny.yaml", "--set", "sweep.basis=sinc", "--seeds", "1")[0] == 0
    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    assert [trial.user_attrs["row"] for trial in trials()] == ["LoRA", "sinc", "fourier"]


def test_other_choices_on_an_axis_are_an_optuna_study_of_their_own(home, fake, study, trials):
    assert study("tiny.yaml")[0] == 0
    assert study("tiny.yaml", "--set", "sweep.basis=sinc,bspline", "--seeds", "1")[0] == 0
    assert study("tiny.yaml", "--set", "sweep.basis=sinc,bspline", "--seeds", "1")[0] == 0
    names = sorted(optuna.get_all_study_names("sqlite:///optuna.db"))
    assert "tiny" in names
    (other,) = [name for name in names if name.startswith("tiny grid ")]
    again = optuna.load_study(study_name=other, storage="sqlite:///optuna.db").get_trials()
    assert sorted(trial.user_attrs["row"] for trial in again) == ["LoRA", "bspline", "sinc"]
    assert {trial.params.get("adapter.basis") for trial in again} == {"sinc", "bspline", None}
    assert len(trials()) == 9
