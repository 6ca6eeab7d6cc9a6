"""Adapters that a study keeps with its runs, and plain models made of them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import mlflow
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from basisadapt import InputError, PhiConfig, backbones
from basisadapt import study as studies
from basisadapt.methods.saved_adapter import FILE, merge_into, read_requirements, write_requirements
from basisadapt.phi.basis import BASES
from basisadapt.study.drive.paths import StudyPaths
from basisadapt.training.execution import workers

BASIS = """
import torch
from basisadapt import TransferBasis


class Bump(TransferBasis, name="bump_of_a_test"):
    def forward(self, u):
        return torch.exp(-u.square())
"""
ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1])("good")["input_ids"]
with torch.no_grad():
    print(json.dumps([model.config.id2label[0], model(torch.arange(2, 14).view(2, 6)).logits.tolist()]))
assert not any(name.startswith("basisadapt") for name in sys.modules)
"""


def adapters(home):
    """Row to the folder of its run's adapter, and its run's id."""
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    ids = {run.data.params["row"]: run.info.run_id for run in runs if "row" in run.data.params}
    return {row: (one, [file.path for file in client.list_artifacts(one, "adapter")]) for row, one in ids.items()}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("where", [(), ("--workers", "1")], ids=["here", "in a worker"])
def test_an_adapter_is_kept_and_merged_into_what_transformers_loads_alone(
    home, study, language_model, where, monkeypatch
):
    monkeypatch.setattr(workers, "cores", lambda: 1)  # so that without workers it runs here
    monkeypatch.setattr(BASES, "_classes", {**BASES._classes})
    (home / "my_basis.py").write_text(BASIS)
    rows = [f"{'good' if i % 3 else 'bad'} text {i},{'yes' if i % 3 else 'no'}" for i in range(40)]
    (home / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    changes = {"task": "reviews.csv", "backbone": language_model, "sweep.basis": "bump_of_a_test", "train.lr": 0.1}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    command = ("tiny.yaml", "--preset", "smoke", "--plugin", "my_basis.py", *sets)
    code, printed, error = study(*command, "--save-adapters", *where)
    assert code == 0, error
    kept = adapters(home)
    run_id, files = kept["bump_of_a_test"]
    assert f"\n  {run_id}  bump_of_a_test, seed 1\n" in printed
    assert {Path(file).name for file in files} >= {"adapter_config.json", "adapter_model.safetensors", FILE}
    code, said, error = study("--merge", run_id, "--output", "plain")
    assert (code, error) == (0, "")
    assert "transformers loads it" in said

    folder = Path(mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db").download_artifacts(run_id, "adapter", str(home)))
    saved = read_requirements(folder)
    assert (saved.plugins, saved.form, saved.num_labels) == (("my_basis.py",), "text", 2)
    assert saved.config["adapter"]["basis"] == "bump_of_a_test"
    head = next(v for k, v in load_file(folder / "adapter_model.safetensors").items() if "score" in k)
    merged = load_file(home / "plain" / "model.safetensors")
    assert torch.equal(merged["score.weight"], head), "the head that was trained"
    model, _ = backbones.load(backbones.find(str(language_model)), "text", 2)
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        expected = model(torch.arange(2, 14).view(2, 6)).logits
        with model.disable_adapter():
            assert not torch.allclose(expected, model(torch.arange(2, 14).view(2, 6)).logits, atol=1e-3)
    alone = subprocess.run([sys.executable, "-c", ELSEWHERE, "plain"], capture_output=True, text=True, check=True)
    name, logits = json.loads(alone.stdout)
    assert name == "no"
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)


@pytest.mark.parametrize(("classes", "label"), [(("bad", "good"), "good"), ((), "LABEL_0")], ids=["classes", "numbers"])
def test_a_pipeline_answers_with_the_names_of_the_classes_and_with_plain_numbers(
    classes, label, language_model, tmp_path
):
    outputs = len(classes) or 1
    base, tokenizer = backbones.load(backbones.find(str(language_model)), "text", outputs)
    model = peft.get_peft_model(base, PhiConfig(r=2, task_type="SEQ_CLS")).eval()
    tokens = tokenizer("a text", return_tensors="pt")
    with torch.no_grad():
        head = model.base_model.model.score.modules_to_save["default"].weight
        head[-1] = 3 * model.base_model.model.model(**tokens).last_hidden_state[0, -1]
        logits = model(**tokens).logits[0]
    model.save_pretrained(tmp_path / "adapter")
    config = {"backbone": str(language_model), "method": "phi", "train": {"weights": "fp32"}}
    write_requirements(tmp_path / "adapter", "text", outputs, config, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # which a user could do nothing about
        merge_into(tmp_path / "adapter", tmp_path / "plain")
    (answer,) = transformers.pipeline("text-classification", model=str(tmp_path / "plain"))("a text")
    expected = logits.softmax(0).max() if classes else logits
    assert answer == {"label": label, "score": pytest.approx(expected.item(), rel=1e-4)}
    assert abs(answer["score"]) > 0.5, "a number outside [0, 1], or a class that is sure"
    write_requirements(tmp_path / "adapter", "text", 3, config)
    with pytest.raises(InputError, match=r"adapter' does not fit backbone '.*': .*[Ss]ize") as error:
        merge_into(tmp_path / "adapter", tmp_path / "another")
    assert "\n" not in str(error.value)


def test_from_python(home, fake, monkeypatch):
    def run(config, *, save_to=None, **options):
        save_to.mkdir()
        (save_to / "adapter_config.json").write_text(config.adapter.basis if config.method == "phi" else "")
        return fake.run(config, **options)

    monkeypatch.setattr("basisadapt.training.running.run", run)
    studies.run("tiny.yaml", preset="smoke", place=StudyPaths(save_adapters=True))
    kept = {row: files for row, (_, files) in adapters(home).items()}
    assert kept == {row: ["adapter/adapter_config.json"] for row in ("sinc", "fourier", "LoRA")}


def test_a_method_without_an_adapter_keeps_none(home, fake, study, monkeypatch):
    seen = {}

    def run(config, *, save_to=None, **options):
        seen[config.method] = save_to
        return fake.run(config, **options)

    monkeypatch.setattr("basisadapt.training.running.run", run)
    methods = "tiny.yaml", "--preset", "smoke", "--set", "sweep.method=full,head,frozen", "--save-adapters"
    assert "No adapter is kept with these runs: " in study(*methods)[1]
    assert {method for method, place in seen.items() if place is None} == {"full", "head", "frozen"}
    assert seen["lora"] is not None
    assert not seen["lora"].parent.exists(), "nothing is left behind"


def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(home, study, tmp_path):
    plain = tmp_path / "plain"
    folder = tmp_path / "kept"
    folder.mkdir()

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()

    def refuse(message, form="text", weights="fp32", plain=plain):
        write_requirements(folder, form, 2, {"backbone": "minilm", "method": "phi", "train": {"weights": weights}})
        with pytest.raises(InputError, match=message):
            merge_into(folder, plain)

    with pytest.raises(InputError, match=r"has no basisadapt.json, as the adapters have that --save-adapters keeps"):
        merge_into(folder, plain)
    refuse("has no plain folder", form="zero_shot")
    refuse("basisadapt.json: unknown form 'txt'; did you mean 'text'", form="txt")
    refuse("basisadapt.json: unknown weights 'fp23'; did you mean 'fp32'", weights="fp23")
    refuse(r"notes/x' cannot be created: Not a directory", plain=folder / "adapter_config.json" / "notes" / "x")
    refuse("trained on weights in nf4, into which it cannot be merged", weights="nf4")
    plain.mkdir()
    (plain / "notes.txt").touch()
    refuse("is not an empty folder")
    (folder / "adapter_model.safetensors").unlink()
    refuse(r"kept' has no adapter_model.safetensors: it is not all of an adapter")
    (folder / FILE).write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        merge_into(folder, plain)
    for arguments, message in (
        (["--merge", "0" * 32], "--merge RUN goes with --output DIR"),
        (["tiny.yaml", "--merge", "0" * 32, "--output", "x"], "and with no NAME"),
        (["--merge", "newest", "--output", "x"], "a run's id in MLflow, 32 digits, or an adapter's"),
        (["--merge", "0" * 32, "--output", "x"], "no adapter of run 0000"),
        (["tiny.yaml", "--dry-run", "--save-adapters"], "--save-adapters does not go with --dry-run, which runs"),
        (["tiny.yaml", "--ray", "local", "--save-adapters"], "--save-adapters does not go with --ray"),
    ):
        code, _, error = study(*arguments)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1


def test_a_run_without_an_adapter_says_so(home, fake, study):
    study("tiny.yaml", "--preset", "smoke")
    run_id, files = adapters(home)["sinc"]
    assert files == []
    assert f"run {run_id} has no adapter" in study("--merge", run_id, "--output", "x")[2]
