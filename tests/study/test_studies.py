"""The shipped studies: which tables they answer, their rows and their claims."""

from __future__ import annotations

import csv
import math
import re

import pytest
from shipped import FULL, LANGUAGE, every_study

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.published import published_values
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies, studies_dir

TABLES = {1, 2, 3, 5, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}
# What no one table has.
OURS = {
    "ablate_formulation",
    "ablate_interval",
    "ablate_memory",
    "ablate_nonlinearity",
    "ablate_remedies",
    "approximate",
    "capacity",
    "commonsense_written",
    "compare_methods",
    "confirm_commonsense",
    "confirm_formulation",
    "depth",
    "forgetting",
    "phase_diagram",
    "recovery",
    "refine_formulation",
    "rules",
}
SAME_VALUES = {"ablate_grid": ["table_16.csv"]}  # further tables that print what a study answers
LEFT_OUT = {  # rows of the table that no row of the study answers, for reasons that its file gives
    "ablate_alpha": ["model_size=8B,alpha_init=0.0", "model_size=8B,alpha_init=0.01", "model_size=8B,alpha_init=0.1"],
    "ablate_core": ["n=50", "alpha_init=zero", "omega=learned"],
    "ablate_rate": ["rank=8", "rank=16", "rank=64"],
    "ablate_robustness": ["perturbation=alpha_init_pm50pct"],
    "ablate_scale": ["LLaMA3-13B"],
    "glue": [
        "LR-LoRA-4, average",
        "LoRA-4, average",
        "SineLoRA-4, average",
        "VeRA-1024, average",
        "RandLoRA-64, average",
    ],
    "vision_clip": ["average, LoRA", "average, VeRA", "average, RandLoRA", "average, LR-LoRA"],
    "vision_dinov2": ["average, LoRA", "average, VeRA", "average, RandLoRA", "average, LR-LoRA"],
}


def tables(spec):
    files = (spec.answers.table, *SAME_VALUES.get(spec.name, ())) if spec.answers else ()
    return [int(re.fullmatch(r"table_(\d+)\.csv", file)[1]) for file in files]


def rows_of(spec):
    """Label -> name in the published table, under every preset."""
    return {
        row.label: row.published for preset in ("quick", *spec.presets) for row in resolve(spec, preset=preset).rows
    }


def joined(names):
    return {", ".join(name) for name in names if name is not None}


def test_every_ablation_table_has_a_study_and_the_list_says_which(study):
    specs = {name: read_spec(name) for name in list_studies()}
    answered = sorted(table for name, spec in specs.items() if name != "ablate_rate" for table in tables(spec))
    assert answered == sorted(TABLES), "each once, but for the one that the study of rates is held against as well"
    assert {name for name, spec in specs.items() if not spec.answers} == OURS
    code, listed, _ = study("--list")
    assert code == 0
    for name, spec in specs.items():
        (line,) = (line for line in listed.splitlines() if line.startswith(f"{name} "))
        assert all(str(table) in line for table in tables(spec))


@every_study
def test_published_rows(name):
    spec = read_spec(name)
    if not spec.answers:
        return
    values, found = published_values(spec.answers), rows_of(spec)
    published = joined(values)
    by_method = isinstance(spec.answers.column, dict)
    left_out = {f"{row}, {m}" if by_method else row for row in LEFT_OUT.get(name, ()) for m in ("phi", "lora")}
    assert left_out <= published
    answered = joined(found.values()) & published
    assert answered | left_out == published
    assert not answered & left_out
    assert all(math.isfinite(float(value)) for value, _ in values.values())
    # A name that someone wrote down, as opposed to one made from the axes, is in the table.
    suffixes = ("", ", phi", ", lora")
    assert all(any(f"{row}{end}" in published for end in suffixes) for row in spec.answers.rows.values())
    names = {row.name for preset in spec.presets for row in resolve(spec, preset=preset).rows}
    assert {str(label) for label in spec.answers.rows} <= {*found, *names}
    assert all(any(f"{row.published}{end}" in published for end in suffixes) for row in spec.beside if row.published)


@pytest.mark.parametrize("name", SAME_VALUES)
def test_further_tables_print_the_same_values(name):
    spec = read_spec(name)
    for table in SAME_VALUES[name]:
        with (studies_dir() / "paper" / table).open(encoding="utf-8", newline="") as file:
            values = {
                (row[spec.answers.key],): (row[spec.answers.column], row[spec.answers.std])
                for row in csv.DictReader(file)
            }
        assert values == published_values(spec.answers)


@every_study
def test_rows_differ_from_one_another(name):
    for preset in ("quick", FULL.get(name, "paper")):
        configs = [str(row.cells[0].config) for row in resolve(read_spec(name), preset=preset).rows]
        assert len(set(configs)) == len(configs)


def test_every_study_shows_lora_and_most_the_literal_recipe():
    literal = set()
    for name in list_studies():
        configs = [row.cells[0].config for row in resolve(read_spec(name)).rows]
        assert "lora" in {config.method for config in configs}
        phis = (config.adapter for config in configs if config.method == "phi")
        if any(adapter.preset == "paper" and not adapter.centre for adapter in phis):
            literal.add(name)
    assert set(list_studies()) - literal - set(LANGUAGE) == {
        "ablate_rank",
        "ablate_rate",
        "ablate_remedies",
        "ablate_scale",
        "ablate_robustness",
        "ablate_memory",
        "ablate_nonlinearity",
        "approximate",
        "capacity",
        "compare_methods",
        "confirm_formulation",
        "depth",
        "forgetting",
        "glue",
        "phase_diagram",
        "recovery",
        "refine_formulation",
        "rules",
    }


@every_study
def test_claims_name_rows_of_the_study(name):
    spec = read_spec(name)
    names = {row.name for preset in ("quick", *spec.presets) for row in resolve(spec, preset=preset).rows}
    assert {label for claim in spec.claims for label in claim.labels} <= {*rows_of(spec), *names}


def test_the_formulations_cover_what_the_paper_leaves_open():
    adapters = [row.cells[0].config.adapter for row in resolve(read_spec("ablate_formulation")).rows[1:]]
    axes = {
        "identity_path": {True, False},
        "centre": {True, False},
        "gain": {1.0, 10.0, 30.0, 100.0},
        "amplitude_init": {"zero", "identity", "normal:0.1"},
        "omega_init": {1.0, "nyquist"},
        "factor_init": {"lora", "both"},
        "transfer_lr": {1.0, 0.1, 0.01},
    }
    assert {axis: {getattr(adapter, axis) for adapter in adapters} for axis in axes} == axes


def test_the_parts_of_what_stores_facts_are_changed_one_at_a_time():
    """Every row but LoRA differs from phi in one setting, the last one in two, and phi is that of `capacity`."""
    configs = {row.label: row.cells[0].config.to_mapping() for row in resolve(read_spec("ablate_memory")).rows}
    phi = configs.pop("phi")
    (theirs,) = (row for row in resolve(read_spec("capacity")).rows if row.label == "phi, 1")
    assert phi["adapter"] == theirs.cells[0].config.to_mapping()["adapter"]
    assert configs.pop("LoRA")["method"] == "lora"
    changed = {
        label: {key for key, value in one["adapter"].items() if value != phi["adapter"][key]}
        for label, one in configs.items()
    }
    assert changed.pop("phi's rate x 0, alpha random") == {"transfer_lr", "amplitude_init"}
    assert {len(keys) for keys in changed.values()} == {1}
    axes = {"basis", "num_basis", "omega_init", "learn_omega", "gain", "factor_init", "amplitude_init", "identity_path"}
    assert set.union(*changed.values()) == axes | {"centre", "sharing", "transfer_lr"}


@pytest.mark.parametrize("name", ["approximate", "phase_diagram"])
def test_energy_is_drawn_against_parameters(name):
    """A line of every method, as the question of `approximate` has it set."""
    spec = read_spec(name)
    assert (spec.lines.along, spec.lines.against) == ("r", "parameters.trainable")
    shown = re.findall(r"--set \"?(sweep\.\w+=[^\"]*?)(?:\"|(?= --))", spec.question)
    changes = [one for one in shown if "matrix/update" not in one] or ["sweep.r=2,4,8,16"]
    rows = resolve(spec, changes=changes).rows
    assert {dict(row.point)["r"] for row in rows} == {2, 4, 8, 16}
    assert {dict(row.point)["variant"] for row in rows} >= {"lora", "phi"}
    assert name != "approximate" or len(changes) == 2
