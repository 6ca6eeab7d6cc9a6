"""What a backbone cannot read is refused before anything runs: too many tokens, tokens without embeddings, no end."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from basisadapt import InputError, RunConfig, backbones
from basisadapt.backbones.inputs import most_tokens
from basisadapt.training import plan

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 40}
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40, "pad_token_id": 1}
OPT = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8}
# The shapes, and how many tokens they read.
READS = {
    "bert": ({**SMALL, "max_position_embeddings": 20}, 20),
    "roberta": ({**SMALL, "max_position_embeddings": 20, "pad_token_id": 1}, 18),
    "xlm-roberta": ({**SMALL, "max_position_embeddings": 20, "pad_token_id": 3}, 16),
    "mpnet": ({**SMALL, "max_position_embeddings": 20, "pad_token_id": 1}, 18),
    "distilbert": ({"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 20}, 20),
    "gpt2": ({"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 20, "vocab_size": 40}, 20),
    "opt": ({**OPT, "vocab_size": 40, "max_position_embeddings": 20}, 20),
    "bart": ({**BART, "max_position_embeddings": 20}, 20),
    "llama": ({**SMALL, "max_position_embeddings": 20}, None),
    "t5": ({"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "vocab_size": 40}, None),
}


@pytest.mark.parametrize("model_type", READS)
def test_most_tokens_is_what_the_model_reads(model_type):
    shapes, expected = READS[model_type]
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **shapes)).eval()
    assert most_tokens(model) == expected

    def read(count):
        ids = torch.full((1, count), 5)
        extra = {"decoder_input_ids": ids} if model_type == "t5" else {}
        return model(input_ids=ids, **extra).last_hidden_state

    assert read(expected or 60).isfinite().all()
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError)):
            read(expected + 1)


@pytest.mark.parametrize(("backbone", "most"), [("minilm", 512), ("roberta-base", 512)])
def test_a_length_beyond_the_positions_is_refused_by_the_plan(backbone, most, monkeypatch):
    monkeypatch.setattr(backbones, "check_at_hand", lambda _: None)
    allowed = {"backbone": backbone, "train": {"max_length": most}}
    assert plan(RunConfig.from_mapping(allowed)).modules > 0
    message = f"^train.max_length must be at most {most}, the positions of backbone '{backbone}', got {most + 1}$"
    with pytest.raises(InputError, match=message):
        plan(RunConfig.from_mapping({**allowed, "train": {"max_length": most + 1}}))


def folder_with(language_model, tmp_path, model_type, model_class, **shapes):
    """The folder of a model of that type, with the tokenizer of 258 tokens."""
    folder = tmp_path / model_type
    shutil.copytree(language_model, folder)
    shapes = {"vocab_size": 258, **shapes}
    model_class.from_config(AutoConfig.for_model(model_type, **shapes)).save_pretrained(folder)
    return folder


def without(folder, *tokens):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in tokens}))


def planned(folder, task):
    return plan(RunConfig.from_mapping({"backbone": str(folder), "task": task, "adapter": {"r": 2}}))


SHAPES = {key: value for key, value in SMALL.items() if key != "vocab_size"}


@pytest.mark.parametrize("count", [257, 258])
def test_a_tokenizer_larger_than_the_embedding(language_model, tmp_path, count):
    folder = folder_with(
        language_model, tmp_path, "bert", AutoModelForSequenceClassification, **{**SHAPES, "vocab_size": count}
    )
    if count == 258:
        assert planned(folder, "docstrings").modules == 6
        return
    message = "has embeddings for 257 tokens, but its tokenizer has ids up to 257: they do not belong together$"
    with pytest.raises(InputError, match=message):
        planned(folder, "docstrings")
    with pytest.raises(InputError, match=message):
        backbones.load(backbones.find(str(folder)), "text", 3)


@pytest.mark.parametrize(("name", "refused"), [("additional_special_tokens", False), ("pad_token", True)])
def test_special_tokens_count_where_something_puts_them_there(language_model, tmp_path, name, refused):
    folder = folder_with(language_model, tmp_path, "bert", AutoModelForSequenceClassification, **SHAPES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({name: ["<beyond>"] if name.startswith("add") else "<beyond>"})
    assert tokenizer.convert_tokens_to_ids("<beyond>") == 258
    tokenizer.save_pretrained(folder)
    if refused:
        with pytest.raises(InputError, match=r"embeddings for 258 tokens, but its tokenizer has ids up to 258"):
            planned(folder, "docstrings")
    else:
        assert planned(folder, "docstrings").modules == 6


@pytest.mark.parametrize(
    ("form", "gone", "reason"),
    [
        ("text", ("pad_token", "eos_token"), "nothing pads a batch"),
        ("completion", ("pad_token", "eos_token"), "nothing ends an answer"),
        ("completion", ("eos_token",), "nothing ends an answer"),
        ("text", ("eos_token",), None),
        ("completion", ("pad_token",), None),
    ],
)
def test_a_decoder_without_pad_and_eos(language_model, tmp_path, form, gone, reason):
    folder = folder_with(language_model, tmp_path, "llama", AutoModelForCausalLM, **SHAPES)
    without(folder, *gone)
    backbone = backbones.find(str(folder))
    model = backbones.shape_only(backbone, form, 3)
    if reason is None:
        backbones.check_inputs(backbone, form, model, None)
        assert backbones.load(backbone, form, 3)[1].pad_token is not None
        return
    message = f"^the tokenizer of backbone .* has no eos_token, so {reason}; set it in its tokenizer_config.json$"
    with pytest.raises(InputError, match=message):
        backbones.check_inputs(backbone, form, model, None)
    with pytest.raises(InputError, match=message):
        backbones.load(backbone, form, 3)
    if form == "text":
        with pytest.raises(InputError, match=message):
            planned(folder, "docstrings")


def test_a_loaded_tokenizer_knows_the_positions(language_model, tmp_path):
    shapes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 20}
    folder = folder_with(language_model, tmp_path, "gpt2", AutoModelForCausalLM, **shapes)
    assert backbones.load(backbones.find(str(folder)), "completion", 1)[1].model_max_length == 20
    assert backbones.load(backbones.find(str(language_model)), "completion", 1)[1].model_max_length == 2048
