"""The script that trains all weights and looks at what changed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from basisadapt.adapter import fit

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_updates.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, with a case of its own: a two-layer BERT with random weights."""
    spec = importlib.util.spec_from_file_location("real_updates", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a"])}
    transformers.BertTokenizer(vocab=vocab).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("bert", vocab_size=len(vocab), **small)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "bert")
    train = {"lr": 1e-3, "max_steps": 4, "batch_size": 8, "train_rows": 32, "eval_rows": 16}
    case = {"task": "docstrings", "backbone": str(tmp_path / "bert"), "train": train}
    monkeypatch.setitem(module.CASES, "tiny", case)
    monkeypatch.setattr(module, "FITS", 4)
    monkeypatch.setattr(fit, "STEPS", 3)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    return call


def test_the_updates_of_all_matrices_are_looked_at_and_kept(script, tmp_path, capsys):
    folder, kept = tmp_path / "found", tmp_path / "updates.safetensors"
    script("tiny", "--seed", 3, "--steps", 2, "--output", folder, "--matrices", kept)
    assert "of the update BA of rank 4 captures" in capsys.readouterr().out
    found = json.loads((folder / "tiny-3.json").read_text())
    assert found["config"]["method"] == "full"
    assert (found["config"]["seed"], found["config"]["train"]["max_steps"]) == (3, 2)
    assert 0 <= found["metrics"]["accuracy"] <= 1
    assert len(found["modules"]) == 12
    assert sum(one["phi"] is not None for one in found["modules"]) == 4
    changes = load_file(kept)
    assert sorted(changes) == sorted(one["module"] for one in found["modules"] if "attention" in one["module"])
    for one in found["modules"]:
        if one["module"] in changes:
            assert changes[one["module"]].norm().item() == pytest.approx(one["norm"], rel=1e-5)
    script("--table", folder)
    _, _, attention, mlp = capsys.readouterr().out.splitlines()
    assert attention.startswith("| tiny | 3 |")
    assert ("8 of attention" in attention, "4 of mlp" in mlp) == (True, True)
    fitted = [one for one in found["modules"] if one["module"] not in changes and one["phi"] is not None]
    energy = sum(one["norm"] ** 2 for one in fitted)
    phi = sum(one["norm"] ** 2 * one["phi"] for one in fitted) / energy
    assert f"| {100 * phi:.1f} |" in mlp


def test_a_case_needs_a_place(script, capsys):
    with pytest.raises(SystemExit):
        script("tiny")
    assert "give a case and --output, or --table" in capsys.readouterr().err
