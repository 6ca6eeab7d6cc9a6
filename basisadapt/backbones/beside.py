"""Files beside a backbone's weights that would let something else be loaded than safetensors of its own."""

from __future__ import annotations

import json
from pathlib import Path

from basisadapt.backbones.catalogue import Backbone
from basisadapt.core.errors import InputError, shown

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"


def check_beside(backbone: Backbone, ask: bool) -> None:
    """Raise InputError for an adapter beside the weights, which transformers would add to them without a word, and for
    an index of shards that names other files than safetensors of the same folder.

    ask: whether to ask the hub, where the backbone is no folder here.
    """
    folder = Path(backbone.source)
    if backbone.package is not None or backbone.file is not None or not (ask or folder.is_dir()):
        return
    if file_of(backbone.source, ADAPTER) is not None:
        raise InputError(
            f"backbone {backbone.name!r} has an adapter beside its weights ({ADAPTER}), which changes them: merge it "
            "into them, or move it elsewhere"
        )
    index = file_of(backbone.source, INDEX)
    if index is None:
        return
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        odd = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"backbone {backbone.name!r} has a damaged {INDEX}") from error
    if odd:
        raise InputError(
            f"backbone {backbone.name!r} has an index, {INDEX}, that names {shown(odd[0])}, which is no safetensors "
            "file beside it; nothing else is read"
        )


def file_of(source: str, name: str) -> Path | None:
    """A file of a folder, or of a repository of the hub, if it is there and can be had."""
    if (folder := Path(source)).is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
