"""What cannot be loaded, and what the message says."""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import huggingface_hub.errors as hub
import pytest
import torch

from basisadapt import InputError, backbones
from basisadapt.study.__main__ import main
from basisadapt.training import plan, run
from tests.backbones.common import config, edit


def without(folder, *names):
    for name in names:
        (folder / name).unlink()


def sharded(folder, name):
    """An index that has all weights in one file."""
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damaged(folder, keep):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: without(f, "config.json"), "a folder without a config.json"),
        (lambda f: (f / "config.json").write_text("{"), "could not be loaded: .*not a valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no config.json with a model_type"),
        (
            lambda f: edit(f / "config.json", model_type="frobnicator"),
            "model type that the installed transformers does not",
        ),
        (lambda f: edit(f / "config.json", hidden_size="wide"), "could not be loaded: .*hidden_size"),
        (lambda f: edit(f / "config.json", hidden_size=64), "weights that do not fit its configuration.*such as"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "weights that do not fit its configuration"),
        (lambda f: edit(f / "config.json", vocab_size=7), "weights that do not fit its configuration: 2 of"),
        (lambda f: without(f, "model.safetensors"), "no safetensors; pickled weights are not read"),
        (lambda f: damaged(f, 1000), "damaged safetensors file"),
        (lambda f: damaged(f, 0), "damaged safetensors file"),
        (lambda f: without(f, "tokenizer.json", "tokenizer_config.json"), "no tokenizer|could not be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "could not be loaded"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "has an adapter beside its weights"),
        (
            lambda f: sharded(f, "pytorch_model-00001.bin"),
            "index, .*, that names 'pytorch_model-00001.bin', which is no",
        ),
        (lambda f: sharded(f, "../model.safetensors"), "names '../model.safetensors', which is not a safetensors file"),
        (lambda f: sharded(f, "/model.safetensors"), "names '/model.safetensors', which is not a safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "has a damaged model.safetensors.index.json"),
    ],
)
def test_a_damaged_folder_is_told_from_others_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        backbones.load(backbones.find(str(folder)), "completion", 1)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"backbone {str(folder)!r} ")


def test_what_lies_beside_the_weights_is_seen_before_anything_runs(folder):
    backbones.check_at_hand(backbones.find(str(folder)))
    sharded(folder, "model.safetensors")
    backbones.check_at_hand(backbones.find(str(folder)))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="has an adapter beside its weights"):
        backbones.check_at_hand(backbones.find(str(folder)))


def test_pickled_weights_and_code_are_not_touched(folder):
    edit(folder / "config.json", model_type="frobnicator", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('code of a stranger ran')")
    with pytest.raises(InputError, match="needs its own code, which is not run"):
        backbones.load(backbones.find(str(folder)), "completion", 1)
    edit(folder / "config.json", model_type="llama", auto_map={})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for call in (lambda: plan(config(folder)), lambda: run(config(folder))):
        with pytest.raises(InputError, match="pickled weights are not read"):
            call()


def test_a_head_for_other_labels_is_replaced_and_missing_weights_of_a_language_model_are_not(folder):
    backbone = backbones.find(str(folder))
    classifier, _ = backbones.load(backbone, "text", 3)
    classifier.save_pretrained(folder)
    again, _ = backbones.load(backbone, "text", 5)
    assert again.score.out_features == 5
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, classifier.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(InputError, match=r"1 of them are missing or have another shape, such as 'lm_head.weight'"):
        backbones.load(backbone, "completion", 1)


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            hub.GatedRepoError("403", response=RESPONSE),
            "is gated: ask for access at https://.*/org/model, then `hf auth",
        ),
        (hub.RepositoryNotFoundError("401", response=RESPONSE), "is not on the hub, or is private"),
        (hub.LocalEntryNotFoundError("offline"), ".*the hub cannot be reached: run `hf download org/model`"),
        (hub.OfflineModeIsEnabled("offline"), ".*the hub cannot be reached"),
        (ConnectionResetError("reset"), ".*the hub cannot be reached"),
        (OSError(errno.ENOSPC, "No space left on device"), "does not fit on the disk: free some space"),
        (RuntimeError("strange\nthings"), "could not be loaded: Can't load"),
    ],
)
@pytest.mark.parametrize("call", [backbones.shape_only, backbones.load])
def test_what_the_hub_refuses(monkeypatch, call, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(InputError, match=f"^backbone 'org/model' {message}"):
        call(backbones.find("org/model"), "text", 3)


def test_a_repository_without_safetensors(monkeypatch, tmp_path, folder):
    """All but its weights is in the cache; the hub says that it has none."""

    def refuse(*_, **__):
        raise hub.RemoteEntryNotFoundError("404", response=RESPONSE)

    cached = tmp_path / "models--org--model"
    without(folder, "model.safetensors")
    shutil.move(folder, cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"^backbone 'org/model' has no safetensors"):
        backbones.load(backbones.find("org/model"), "completion", 1)


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate_basis", "--preset", "smoke", "--set", "backbone=org/model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("basisadapt: error: backbone 'org/model' is neither a folder nor in the cache")
