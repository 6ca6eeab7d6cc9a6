"""Weights in a GGUF file: unpacked once, and what is recorded of their rounding."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers

from basisadapt import InputError, backbones
from basisadapt.backbones import BACKBONES, Backbone, gguf, gguf_header, packages
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.report.report import make_report
from basisadapt.study.report.table import build_table
from basisadapt.study.report.text_tables import text_tables
from basisadapt.training import plan, run
from tests.backbones.common import config

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
