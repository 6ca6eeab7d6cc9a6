"""Tiny vision models with random weights as folders that `backbones.load` reads: 16 × 16 pixels, two blocks."""

from __future__ import annotations

import json
import string

import torch

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
PROCESSORS = {"vit": "ViTImageProcessor", "dinov2": "BitImageProcessor", "clip": "CLIPImageProcessor"}

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def save_tiny(kind, folder):
    """A model of a family without a head, its image processor and, for CLIP, a tokenizer of single letters."""
    import transformers

    torch.manual_seed(0)
    if kind == "clip":
        tokenizer = letters()
        text = {**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)
        tokenizer.save_pretrained(folder)
    else:
        config = transformers.AutoConfig.for_model(kind, **VISION)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    processor = {"image_processor_type": PROCESSORS[kind], "crop_size": 16, "size": {"shortest_edge": 18}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def letters():
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
