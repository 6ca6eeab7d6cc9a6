"""What a backbone still needs of the hub."""

from __future__ import annotations

from pathlib import Path

from basisadapt.backbones.beside import INDEX
from basisadapt.backbones.catalogue import Backbone
from basisadapt.backbones.failures import explained

WEIGHTS = ("model.safetensors", INDEX)  # of which a repository has one


def missing_weights(backbone: Backbone) -> str | None:
    """The id of the repository whose weights `load` would download; None where they are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    local = backbone.package is not None or backbone.file is not None or Path(backbone.source).is_dir()
    if local or backbone.drawn:
        return None
    cached = any(isinstance(try_to_load_from_cache(backbone.source, name), str) for name in WEIGHTS)
    return None if cached else backbone.source


def check_reachable(backbone: Backbone) -> None:
    """Raise InputError where weights are to be downloaded and the hub cannot be reached, or does not give them."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with explained(backbone):
        if source := missing_weights(backbone):
            get_hf_file_metadata(hf_hub_url(source, "config.json"))
