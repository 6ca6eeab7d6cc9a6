"""The processes of a group, whatever becomes of them; and runs that are spread over them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch import distributed as dist

from basisadapt import InputError, training
from basisadapt.core import registry
from basisadapt.phi.basis import BASES
from basisadapt.training.config import RunConfig
from basisadapt.training.distributed import group
from basisadapt.training.distributed.group import run_in_processes, sum_over_group
from tests.conftest import save_encoder

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these processes meet on the CPU; benchmarks/several_gpus.py is for GPUs"
)


def meet(number, report):
    report("begun")
    time.sleep(0.1 * dist.get_rank())
    report("done")
    with group.shared_folder() as folder:
        (folder / str(dist.get_rank())).touch()
        dist.barrier()
        names = sorted(path.name for path in folder.iterdir())
    gone = not folder.exists()
    return sum_over_group(number + dist.get_rank()), names, gone, BASES["plugged"].__name__


def fail(report):
    if dist.get_rank() == 1:
        raise InputError("what was asked for cannot be done")
    dist.barrier()


def die(report):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


PLUGIN = """
import torch
from basisadapt import TransferBasis

class Plugged(TransferBasis, name="plugged"):
    def forward(self, u):
        return torch.exp(-u.square())
"""


def test_a_group_meets_reports_and_knows_the_plugins(tmp_path, monkeypatch):
    monkeypatch.setattr(BASES, "_classes", dict(BASES._classes))
    monkeypatch.setattr(registry, "_plugins", {})
    (tmp_path / "plugged.py").write_text(PLUGIN)
    registry.load_plugin(str(tmp_path / "plugged.py"))
    heard = []
    assert run_in_processes(meet, (3.0,), 2, heard.append) == (7.0, ["0", "1"], True, "Plugged")
    assert heard == ["begun", "done"]
    assert multiprocessing.active_children() == []


def test_an_error_is_raised_as_it_was():
    with pytest.raises(InputError, match="what was asked for cannot be done") as caught:
        run_in_processes(fail, (), 2)
    assert "in fail" in caught.value.__notes__[0]
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_ends_the_others():
    with pytest.raises(RuntimeError, match="process 1 of 2 died with exit code -9"):
        run_in_processes(die, (), 2)
    assert multiprocessing.active_children() == []


def wait_for_ever(report):
    report(os.getpid())
    time.sleep(600)


def test_the_processes_end_with_the_one_that_started_them():
    work = "run_in_processes(wait_for_ever, (), 2, lambda pid: print(pid, flush=True))"
    program = f"from tests.test_distributed import *; {work}"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline().strip().isdecimal()
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"processes": 0}, "train.processes must be a divisor of train.batch_size, 16, got 0"),
        ({"processes": 3}, "train.processes must be a divisor of train.batch_size, 16, got 3"),
        ({"processes": 2, "parallel": "fdsp"}, "train.parallel must be one of ddp, fsdp"),
        ({"parallel": "fsdp"}, "train.parallel must be used together with train.processes of at least 2"),
        ({"processes": 2, "parallel": "fsdp", "weights": "nf4"}, "train.parallel must be ddp with train.weights nf4"),
    ],
)
def test_bad_settings_are_refused(train, message):
    with pytest.raises(InputError, match=message):
        RunConfig.from_mapping({"train": train})


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=r"train\.processes is 2, one for each GPU, but there are only 1"):
        training.plan(RunConfig.from_mapping({"train": {"processes": 2}}))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny encoder without dropout, which draws differently in every process."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_encoder(tmp_path_factory.mktemp("backbone"), **still)


def run(backbone, method="phi", save_to=None, accumulate=1, **train):
    """Two epochs of 21 rows in batches of 8, the last of which has 5; 71 held-out rows, a batch of 64 and one of 7."""
    settings = {"batch_size": 8, "epochs": 2, "train_rows": 21, "eval_rows": 71, "lr": 1e-2, "eval_steps": 4, **train}
    config = RunConfig.from_mapping(
        {"backbone": backbone, "method": method, "adapter": {"r": 4}, "train": {"max_length": 32, **settings}}
    )
    steps = []

    def on_step(step, total):
        steps.append((step, total))

    result = training.run(config, on_step=on_step, save_to=save_to, accumulate=accumulate)
    assert steps == [(step, 6) for step in range(1, 7)]
    return result


def assert_same(found, truth):
    """The same run up to rounding, scores included; what measures time and memory apart."""
    assert found.status == truth.status == "finished"
    assert found.curves.keys() == truth.curves.keys()
    for name in truth.curves:
        assert [step for step, _ in found.curves[name]] == [step for step, _ in truth.curves[name]], name
        expected = [value for _, value in truth.curves[name]]
        assert [value for _, value in found.curves[name]] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    for name in ("loss", "eval_loss"):
        assert [v for _, v in found.curves[name]] == pytest.approx([v for _, v in truth.curves[name]], abs=1e-5), name
    for name in ("accuracy", "generalisation_gap", "parameters.trainable", "adapter.bytes"):
        assert found.metrics[name] == truth.metrics[name], name
    for name in ("eval_loss", "train_loss"):
        assert found.metrics[name] == pytest.approx(truth.metrics[name], abs=1e-5), name
    assert found.metrics.keys() == truth.metrics.keys()
    assert found.modules.keys() == truth.modules.keys()
    assert len(found.snapshots) == len(truth.snapshots)
    assert found.data == truth.data


@pytest.mark.parametrize(
    ("method", "parallel"),
    [
        ("phi", "ddp"),
        pytest.param("phi", "fsdp", marks=pytest.mark.slow),
        pytest.param("lora", "ddp", marks=pytest.mark.slow),
        pytest.param("lora", "fsdp", marks=pytest.mark.slow),
        pytest.param("head", "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_two_processes_is_the_run_in_one(method, parallel, backbone, tmp_path):
    alone = run(backbone, method, tmp_path / "alone", landscape=3)
    spread = run(backbone, method, tmp_path / "spread", landscape=3, processes=2, parallel=parallel)
    assert_same(spread, alone)
    from safetensors.torch import load_file

    files = [next((tmp_path / name).glob("*.safetensors")) for name in ("alone", "spread")]
    truth, found = map(load_file, files)
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_in_parts_is_the_batch(processes, backbone):
    whole, parts = (run(backbone, processes=processes, accumulate=accumulate, train_rows=24) for accumulate in (1, 2))
    assert_same(parts, whole)


@pytest.mark.slow
def test_a_run_in_two_processes_repeats_bitwise(backbone):
    first, second = (run(backbone, processes=2, parallel="fsdp", precision="bf16") for _ in range(2))
    assert (first.curves, first.modules, first.phi) == (second.curves, second.modules, second.phi)


def test_shards_need_an_adapter(backbone):
    config = {"backbone": backbone, "method": "head", "train": {"processes": 2, "parallel": "fsdp"}}
    with pytest.raises(InputError, match="fsdp shards the weights below an adapter, but method 'head' has none"):
        training.plan(RunConfig.from_mapping(config))


USER = """
import sys
import torch, transformers
from peft import get_peft_model
import basisadapt

transformers.set_seed(0)
shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48)
config = transformers.LlamaConfig(vocab_size=60, **shape)
phi = basisadapt.PhiConfig(task_type="CAUSAL_LM", r=3, num_basis=10, gain=2.0)
model = get_peft_model(transformers.AutoModelForCausalLM.from_config(config), phi)
rows = torch.randint(1, 60, (16, 9), generator=torch.Generator().manual_seed(1))
processes = int(sys.argv[1])
arguments = transformers.TrainingArguments(
    sys.argv[2], per_device_train_batch_size=4 // processes, max_steps=5, learning_rate=1e-2, logging_steps=1,
    use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
)
trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.train()
trainer.save_model()
trainer.save_state()
"""


@pytest.mark.slow
def test_a_users_own_trainer_under_torchrun(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    losses = []
    for processes, launcher in ((1, []), (2, torchrun)):
        folder = tmp_path / str(processes)
        command = [sys.executable, *launcher, str(tmp_path / "user.py"), str(processes), str(folder)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (folder / "adapter_model.safetensors").is_file()
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses.append([float(entry["loss"]) for entry in history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
