"""The presets of the shipped studies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shipped import DRAWN, LANGUAGE, RECOVERY, VISION

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.training import plan


@pytest.mark.parametrize("name", sorted(set(list_studies()) - {*VISION, *DRAWN, RECOVERY}))
def test_presets(name):
    spec = read_spec(name)
    glue = name == "glue"
    quick, smoke, paper = (resolve(spec, preset=preset) for preset in ("quick", "smoke", "paper"))
    # A cell takes about 25 s on two cores.
    large = {
        "glue": 108,
        "ablate_rank": 60,
        "ablate_formulation": 51,
        "ablate_remedies": 57,
        "compare_methods": 54,
        "confirm_formulation": 39,
        "refine_formulation": 44,
    }
    assert len(quick.cells) <= large.get(name, 33)
    assert len(smoke.cells) == len(quick.rows)
    for cell in (*smoke.cells, *quick.cells):
        expected = (LANGUAGE[name], "smollm2-135m") if name in LANGUAGE else ("docstrings", "minilm")
        if glue:
            assert cell.config.task.startswith("glue/")
        else:
            assert cell.config.task == expected[0]
        assert cell.config.backbone == expected[1]
    assert {cell.config.train.max_steps for cell in smoke.cells} == {2}
    assert {cell.config.train.train_rows for cell in smoke.cells} == {64}
    assert {cell.config.train.max_steps for cell in quick.cells} == {50}
    on_glue = name in ("glue", "compare_methods")
    assert {cell.config.train.schedule for cell in paper.cells} == {"linear" if on_glue else "constant"}
    tuning = {"refine_formulation": {8, 9}}  # which chooses, and reports nothing held out
    assert {cell.seed for cell in quick.cells} == tuning.get(name, {42, 123, 456})
    assert {cell.config.train.validation for cell in quick.cells} == {0.2 if name in tuning else None}


# What a preset runs on where it is not the four tasks.
ON_A_GPU = {
    "ablate_formulation": {"glue/cola", "glue/rte"},
    "ablate_scale": {"glue/rte", "glue/mrpc"},
    "commonsense": {"commonsense/all"},
    "commonsense_written": {"commonsense/all"},
    "confirm_commonsense": {"commonsense/all"},
    "confirm_formulation": {"glue/mrpc", "glue/stsb", "glue/sst2"},
    "glue": {"glue/cola", "glue/rte", "glue/mrpc", "glue/stsb", "glue/sst2", "glue/qnli"},
    "refine_formulation": {"glue/cola", "glue/rte"},
}


@pytest.mark.parametrize(
    "name", [name for name in list_studies() if "gpu" in read_spec(name).presets and name not in DRAWN]
)
def test_the_preset_for_a_gpu_runs_the_rows_on_real_tasks(name):
    """Every row on every task, with one schedule; the published table stands beside the means over the tasks."""
    spec = read_spec(name)
    quick, gpu = resolve(spec), resolve(spec, preset="gpu")
    chosen = ON_A_GPU.get(name, {"glue/cola", "glue/rte", "glue/mrpc", "glue/stsb"})
    assert {cell.config.task for cell in gpu.cells} == chosen
    assert {cell.config.train.max_steps for cell in gpu.cells} == {500 if name in LANGUAGE else 800}
    batch = 16 if name in LANGUAGE else 32
    assert name == "ablate_robustness" or {cell.config.train.batch_size for cell in gpu.cells} == {batch}
    if name == "ablate_scale":  # which has another backbone beside that of the quick preset
        assert {cell.config.backbone for cell in gpu.cells} == {"minilm", "smollm2-135m"}
        assert len(gpu.rows) == len(chosen) * 2 * len(quick.rows)
        return
    if name == "ablate_rate":  # and the formulation whose rate was chosen there
        assert {row.name for row in gpu.rows} == {row.label for row in quick.rows} | {"residual, 4"}
        return
    if name != "glue":
        assert [row.name for row in gpu.rows[:: len(chosen)]] == [row.label for row in quick.rows]
        assert [row.published for row in gpu.rows[:: len(chosen)]] == [row.published for row in quick.rows]
    assert len(gpu.rows) == len(chosen) * len({row.name for row in quick.rows})


def test_methods_are_compared_at_a_rate_of_their_own():
    """Each row is tried with the same rates, on other seeds; the published protocol has one rate for all."""
    spec = read_spec("compare_methods")
    tuning = {preset: resolve_tuning(spec, preset=preset) for preset in spec.presets}
    rates = {tuple(one.row.cells[0].config.train.lr for one in of_row) for of_row in tuning["quick"].candidates}
    assert rates == {(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
    assert len(tuning["quick"].trials) == 18 * 5
    assert len(tuning["smoke"].trials) == 18 * 2
    steps = {cell.config.train.max_steps for cell in tuning["quick"].trials}
    assert steps == {50}, "as many as the rows that are reported"
    assert tuning["paper"].trials == ()
    assert {row.cells[0].config.train.lr for row in tuning["paper"].choose({}).study.rows} == {1e-4}


def test_rates_of_a_language_model():
    """Every row at every rate in octaves, of which 1e-4 is the paper's; one epoch of 15,000 rows."""
    tuning = resolve_tuning(read_spec("ablate_rate"), preset="llm")
    rates = [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
    assert (list(tuning.at), tuning.spec.tune.common) == (rates, 1e-4)
    assert len(tuning.trials) == 12 * 3 * 7
    assert len({cell.key for cell in tuning.possible_cells}) == 12 * 3 * 7 * (1 + 3)
    assert {cell.config.train.validation for cell in tuning.trials} == {0.1}
    for cell in tuning.possible_cells:
        train = cell.config.train
        assert (cell.config.task, cell.config.backbone) == ("commonsense/15k", "qwen2.5-coder-0.5b")
        assert (train.batch_size, train.epochs, train.max_steps, train.max_length) == (32, 1, None, 256)
        assert (train.schedule, train.warmup_ratio, train.eval_rows) == ("linear", 0.1, 8000)
    linear = {cell.config.adapter.num_basis for cell in tuning.possible_cells if cell.row.startswith("linear")}
    assert linear == {1}


RANKS = {  # of phi and LoRA under the preset "paper", where it is not 16
    "ablate_rank": {4, 8, 16, 32, 64},
    "ablate_rate": {1, 4, 32},
    "commonsense": {32},
    "commonsense_written": {32},
    "compare_methods": {4},
    "confirm_commonsense": {1, 4, 16},
    "confirm_formulation": {1, 4, 16},
    "glue": {4},
    "instruct": {32},
}


@pytest.mark.parametrize("name", [name for name in list_studies() if "paper" in read_spec(name).presets])
def test_the_preset_paper_is_the_papers_run(name):
    """Table 10's backbone, tasks, rates, schedule, precision and rank, of language models, GLUE and photographs."""
    cells = [cell.config for cell in resolve_tuning(read_spec(name), preset="paper").possible_cells]
    trains = [replace(config.train, lr=1.0, validation=None, epochs=1.0) for config in cells]
    assert {train.max_steps for train in trains} == {train.train_rows for train in trains} == {None}
    assert {train.eval_rows for train in trains} == {None}, "on all test rows"
    rates = {config.train.lr for config in cells}
    tasks = {config.task for config in cells}
    if name in VISION:
        assert {(train.precision, train.batch_size) for train in trains} == {("fp16", 128)}
        return
    assert {c.adapter.r for c in cells if c.method in ("phi", "lora")} == RANKS.get(name, {16})
    adapted = [c.adapter.dropout for c in cells if c.method in ("phi", "lora")]
    if name in ("glue", "compare_methods"):
        assert {config.backbone for config in cells} == {"roberta-base"}
        assert all(task.startswith("glue/") for task in tasks)
        assert len(tasks) == 6
        assert rates == ({5e-5, 1e-4, 2e-4} if name == "glue" else {1e-4})
        assert set(adapted) == {0.1}
        assert {(train.precision, train.batch_size, train.weight_decay) for train in trains} == {("fp16", 32, 0.01)}
        return
    assert set(adapted) == {0.05}
    assert {c.train.epochs for c in cells} == {3}
    assert {(t.precision, t.schedule, t.warmup_ratio) for t in trains} == {("bf16", "constant", 0.1)}
    robust = name == "ablate_robustness"  # which halves and doubles them
    assert rates == ({5e-5, 1e-4, 2e-4} if robust else {1e-4})
    assert robust or {t.batch_size for t in trains} == ({16, 4} if name == "ablate_scale" else {16})
    if name == "ablate_scale":
        assert {c.backbone: c.train.batch_size for c in cells}["llama3-8b"] == 4, "of 8B"
        assert len(tasks) == 6, "the table states none"
        return
    assert {config.backbone for config in cells} == {"qwen2-0.5b"}
    assert tasks == {
        "instruct": {"instruct/mt_bench"},
        "ablate_basis": {"commonsense/170k"},
        "ablate_rank": {"commonsense/170k"},
        "ablate_rate": {"commonsense/170k"},
    }.get(name, {"commonsense/15k"})
    if name != "instruct":
        assert {config.data.scoring for config in cells} == {"generation"}, "the published rule"


@pytest.mark.parametrize("name", sorted(DRAWN - {"ablate_nonlinearity"}))
def test_presets_of_drawn_tasks(name):
    """Whole batches, a rate for every row, chosen on other seeds; the same trained parameters for all low ranks."""
    spec = read_spec(name)
    for preset in ("smoke", "quick"):
        tuning = resolve_tuning(spec, preset=preset)
        study = resolve(spec, preset=preset)
        configs = [cell.config for cell in (*study.cells, *tuning.trials)]
        deepest = {"smoke": 2, "quick": 4}[preset]
        layers = {f"random-mlp-{depth}" for depth in range(1, deepest + 1)}
        assert {config.backbone for config in configs} == (layers if name == "depth" else {"minilm"})
        assert {config.train.validation for config in configs} == {None}
        sizes = {1} if name in ("approximate", "phase_diagram") else {config.data.facts for config in configs}
        assert {config.train.batch_size for config in configs} == sizes
        assert len({config.train.max_steps for config in configs}) == 1
        seeds = {cell.seed for cell in study.cells}
        assert len(seeds) == (1 if preset == "smoke" else 5 if name in ("capacity", "rules") else 3)
        assert not seeds & {cell.seed for cell in tuning.trials}
        rates = {len(of_row) for of_row in tuning.candidates}
        of_quick = {"capacity": 5, "approximate": 3, "depth": 3, "forgetting": 3, "rules": 3}
        assert rates == {1 if preset == "smoke" else of_quick.get(name, 1)}


def test_rank_in_one_layer_has_the_parameters_of_depth():
    """The comparison that tells depth from the number of parameters; and a first layer alone does not grow."""
    rows = {row.label: row.cells[0].config for row in resolve(read_spec("depth"), preset="gpu").rows}

    def count(label):
        return plan(rows[label], dry=True).trainable

    assert count("lora, 4, random-mlp-1") == count("lora, 1, random-mlp-4") == 4 * count("lora, 1, random-mlp-1")
    for row in ("lora in the first layer, 1", "phi in the first layer, 1"):
        assert count(f"{row}, random-mlp-1") == count(f"{row}, random-mlp-8")


def test_the_first_study_compares_everything_at_one_rate_on_the_facts_of_many_seeds():
    """So that its intervals are narrow; what was chosen was chosen on other facts."""
    study = resolve(read_spec("ablate_nonlinearity"))
    assert study.spec.tune is None
    configs = [cell.config for cell in study.cells]
    assert {(one.train.lr, one.train.max_steps, one.train.batch_size) for one in configs} == {(3e-2, 80, 512)}
    assert {config.adapter.r for config in configs} == {1}
    assert len({config.seed for config in configs}) == 27
    capacity = resolve_tuning(read_spec("capacity"))
    assert 3e-2 in capacity.spec.tune.grid["train.lr"]
    assert not {config.seed for config in configs} & set(capacity.spec.tune.seeds)


# Tables of phi, with the row that the controls are held against.
CONTROLLED = {
    "ablate_alpha": "zero",
    "ablate_basis": "sinc",
    "ablate_core": "default",
    "ablate_grid": "uniform",
    "ablate_interval": "3.0",
    "ablate_layers": "all",
    "ablate_n": "64",
    "ablate_nonlinearity": "sinc",
    "ablate_omega": "1.0",
    "ablate_placement": "phi, all",
    "ablate_rank": "phi, 4",
    "ablate_robustness": "default",
    "ablate_sharing": "none",
}


@pytest.mark.parametrize(("name", "best"), CONTROLLED.items())
def test_a_table_of_phi_has_its_controls(name, best):
    """At everything else of the row that they are held against, under every preset that has one."""
    spec = read_spec(name)
    end = best.removeprefix("phi") if name == "ablate_rank" else ""
    pairs = {pair for claim in spec.claims if claim.metric is None for pair in claim.pairs}
    assert {(best, f"linear{end}"), (best, f"sine{end}")} <= pairs
    for preset in spec.presets:
        configs = {row.name: row.cells[0].config for row in resolve(spec, preset=preset).rows}
        linear, sine, phi = configs[f"linear{end}"], configs[f"sine{end}"], configs[best]
        assert (linear.adapter.basis, linear.adapter.num_basis, linear.adapter.learn_omega) == ("linear", 1, False)
        assert sine.method == "sinelora" or (sine.adapter.basis, sine.adapter.learn_omega) == ("sinusoid", False)
        assert linear.train == sine.train == phi.train
        same = ("r", "gain", "placement", "transfer_lr", "identity_path")
        assert [getattr(linear.adapter, key) for key in same] == [getattr(phi.adapter, key) for key in same]


ON_A_LANGUAGE_MODEL = {*CONTROLLED, "commonsense"} - {"ablate_nonlinearity"}


def test_which_studies_have_a_preset_for_a_language_model():
    found = {name for name in list_studies() if "llm" in read_spec(name).presets}
    assert found == ON_A_LANGUAGE_MODEL | {"ablate_memory", "ablate_rate", "capacity", "forgetting", "rules", RECOVERY}


@pytest.mark.parametrize("name", sorted(ON_A_LANGUAGE_MODEL))
def test_the_preset_for_a_language_model(name):
    """One schedule for all studies, that of the study of rates, and phi as there; where a study tunes, each row at the
    paper's rate and at its own."""
    tuning, rate = (resolve_tuning(read_spec(one), preset="llm") for one in (name, "ablate_rate"))
    (of_rate,) = {replace(cell.config.train, lr=1e-4, validation=None) for cell in rate.possible_cells}
    epochs = 3 if name == "commonsense" else 1
    configs = [cell.config for cell in tuning.possible_cells]
    for config in configs:
        assert (config.task, config.backbone, config.data.packed) == ("commonsense/15k", "qwen2.5-coder-0.5b", True)
        own = {} if name != "ablate_robustness" else {"batch_size": config.train.batch_size}
        assert replace(config.train, lr=1e-4, validation=None) == replace(of_rate, epochs=epochs, **own)
        if config.method == "phi":
            assert config.adapter.preset in ("nyquist", "paper")
    rates = {config.train.lr for config in configs}
    if read_spec(name).tune is None:
        assert rates == ({5e-5, 1e-4, 2e-4} if name == "ablate_robustness" else {1e-4})
    else:
        assert (list(tuning.at), rates) == ([1e-4], {1e-4, 2e-4, 4e-4, 8e-4})
        assert {cell.config.train.validation for cell in tuning.trials} == {0.1}


def test_glue_on_an_encoder_of_the_papers_size():
    """Six tasks and six methods, each at its own rate for every task."""
    tuning = resolve_tuning(read_spec("glue"), preset="encoder")
    rows = tuning.choose({}).study.rows
    assert {row.name for row in rows} == {"phi", "lora", "linear", "SineLoRA", "VeRA", "RandLoRA"}
    assert len(rows) == 36
    assert all(len(of_row) == 5 for of_row in tuning.candidates)
    configs = [cell.config for cell in tuning.possible_cells]
    assert {config.backbone for config in configs} == {"all-mpnet-base-v2"}
    assert {config.adapter.preset for config in configs if config.method == "phi"} == {"nyquist"}


@pytest.mark.parametrize("name", VISION)
def test_presets_of_vision(name):
    spec = read_spec(name)
    smoke, quick, paper = (resolve(spec, preset=preset) for preset in ("smoke", "quick", "paper"))
    assert {cell.config.backbone for study in (smoke, quick, paper) for cell in study.cells} == {VISION[name]}
    assert {cell.config.task for study in (smoke, quick) for cell in study.cells} == {"vision/digits"}
    assert len(smoke.cells) == len(quick.cells) == (6 if name == "vision_clip" else 5)
    assert {cell.config.train.max_steps for cell in smoke.cells} == {2}
    epochs = {cell.config.task: cell.config.train.epochs for cell in paper.cells}
    known = {"imagenet": 10, "cifar100": 6, "flowers102": 40, "sun397": 14, "pets": 5}
    assert epochs == {task: known[task.removeprefix("vision/")] for task in epochs}
    assert len(epochs) == 4
    for cell in paper.cells:  # Table 10; no step limit
        train = cell.config.train
        assert (train.lr, train.weight_decay, train.batch_size, train.max_steps) == (1e-2, 0.1, 128, None)
        assert (train.schedule, train.warmup_ratio, cell.config.adapter.dropout) == ("cosine", 0.1, 0.0)
        assert train.precision == "fp16"
    assert {cell.config.adapter.r for cell in paper.cells if cell.config.method in ("lora", "phi")} == {16}
    assert {cell.config.adapter.r for cell in paper.cells if cell.config.method == "vera"} == {256}
    assert {cell.seed for cell in paper.cells} == {42, 123, 456}
