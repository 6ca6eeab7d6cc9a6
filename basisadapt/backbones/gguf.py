"""A GGUF file as a folder that transformers loads: unpacked once to float32 and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from basisadapt.errors import InputError


def converted(file: Path, sha256: str) -> Path:
    """The folder with the weights and the tokenizer of `file`, whose checked sha256 is part of its name.

    The first call makes it, in some 40 s. The folder gets its name only when it is complete, so that nothing half done
    is ever taken for it, and a lock lets one process work at a time. Raises InputError where the cache cannot be
    written.
    """
    cache = cache_folder()
    folder = cache / f"{file.stem}-{sha256[:16]}"
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                part = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                _convert(file, part)
                part.rename(folder)
    except OSError as error:
        raise InputError(
            f"{file.name} could not be converted in the cache {str(cache)!r}: {error.strerror or error}; it takes four "
            "bytes a weight, and BASISADAPT_CACHE names another folder"
        ) from error
    return folder


def cache_folder() -> Path:
    """Where converted weights are kept: BASISADAPT_CACHE, or basisadapt in the platform's folder for caches."""
    if chosen := os.environ.get("BASISADAPT_CACHE"):
        return Path(chosen)
    home = {"darwin": Path.home() / "Library" / "Caches", "win32": Path.home() / "AppData" / "Local"}
    return Path(os.environ.get("XDG_CACHE_HOME") or home.get(sys.platform, Path.home() / ".cache")) / "basisadapt"


def _convert(file: Path, folder: Path) -> None:
    import transformers

    # Without `dequantize` transformers may keep the blocks packed, and such a model cannot be trained or saved.
    unpacked = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
