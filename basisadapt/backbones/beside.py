"""Refuses files beside a backbone's weights that would make transformers load anything but its own safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from basisadapt.backbones.catalogue import Backbone
from basisadapt.core.errors import InputError, shown

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"


def check_beside(backbone: Backbone, ask: bool) -> None:
    """Raise InputError for an adapter beside the weights, or for a bad index of shards.

    transformers would silently add the adapter. The index may name only safetensors files of the same folder.
    ask: ask the hub if the backbone is not a local folder.
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
            f"backbone {backbone.name!r} has an index, {INDEX}, that names {shown(odd[0])}, which is not a "
            "safetensors file in the same folder; nothing else is read"
        )


def file_of(source: str, name: str) -> Path | None:
    """The path of the file `name` in a local folder or a hub repository; None if it is missing or out of reach."""
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
