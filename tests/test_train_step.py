"""The benchmark of a training step, on a model that takes no time."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHORT = ["--batch", "1x3", "--rank", "2", "--methods", "phi, N = 8", "--rounds", "2", "--steps", "1", "--no-busy"]


@pytest.fixture
def benchmark(monkeypatch):
    """The script, whose backbone has one narrow block."""
    path = Path(__file__).parents[1] / "benchmarks" / "train_step.py"
    spec = importlib.util.spec_from_file_location("train_step", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_step", script)  # where its dataclasses look for their annotations
    spec.loader.exec_module(script)
    shapes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("qwen2", vocab_size=30000, num_key_value_heads=2, **shapes)
    monkeypatch.setattr(script.Case, "base", lambda case: AutoModelForCausalLM.from_config(config).train())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return script


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "qwen2-0.5b", *SHORT, *arguments])
    script.main()


def test_every_combination_is_a_case(benchmark):
    options = [
        "llama3-8b",
        "--batch",
        "4x128",
        "2",
        "--autocast",
        "no",
        "yes",
        "--graph",
        "yes",
        "--checkpointing",
        "yes",
    ]
    cases = benchmark.axes(benchmark.parse(options))
    assert [(c.batch, c.tokens, c.autocast) for c in cases] == [
        (b, t, a) for b, t in ((4, 128), (2, 512)) for a in (0, 1)
    ]
    assert all(case.graph and case.checkpointing and case.rank == 16 for case in cases)
    assert [case.dtype for case in cases[:2]] == [torch.bfloat16, torch.float32]


def test_weights_and_products_have_the_dtypes_of_the_case(benchmark, monkeypatch, capsys):
    found = []
    attached = benchmark.attached

    def watched(case, base, *rest):
        found.append((case.autocast, base.model.layers[0].mlp.up_proj.weight.dtype))
        return attached(case, base, *rest)

    monkeypatch.setattr(benchmark, "attached", watched)
    run(benchmark, monkeypatch, "--autocast", "yes", "no", "--rounds", "1")
    assert set(found) == {(True, torch.float32), (False, torch.bfloat16)}
    assert capsys.readouterr().out.count("| phi, N = 8 | no |") == 2


def test_a_spent_budget_leaves_what_was_measured_and_says_what_is_missing(benchmark, monkeypatch, capsys):
    turns = []
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: float(len(turns)))
    timed = benchmark.timed
    monkeypatch.setattr(benchmark, "timed", lambda *given: (turns.append(given), timed(*given))[1])
    run(benchmark, monkeypatch, "--budget", "3")
    printed = capsys.readouterr().out
    assert len(turns) == 3
    assert printed.index("round 2, LoRA (peft)") < printed.index("| LoRA (peft) | no |")
    assert "round 2, phi, N = 8" not in printed
    assert "| phi, N = 8 | no |" in printed
    assert "not measured" not in printed
    turns.clear()
    run(benchmark, monkeypatch, "--budget", "1", "--autocast", "yes", "no")
    first, second = capsys.readouterr().out.split("Case(")[1:]
    assert "not measured, for the budget was spent: phi, N = 8 (no compile)" in first
    assert "not measured, for the budget was spent: LoRA (peft) (no compile), phi, N = 8 (no compile)" in second


def test_the_parts_of_a_step(benchmark, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    parts = importlib.import_module("step_parts")
    monkeypatch.setattr(parts, "UNTIMED", 0)
    monkeypatch.setattr(sys, "argv", ["step_parts.py", "qwen2-0.5b", *SHORT])
    parts.main()
    _, _, *rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == ["LoRA (peft)", "phi, N = 8"]
    for _, _, step, forward, compiling, backward, optimizer, *_ in rows:
        assert float(step) >= 0.99 * sum(map(float, (forward, backward, optimizer))) - 0.2
        assert float(compiling) <= float(forward)
    assert float(rows[1][4]) > float(rows[0][4]) == 0
