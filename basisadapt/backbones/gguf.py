"""Converts a GGUF file to a folder that transformers loads: unpacked once to float32, in the user's cache."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
import transformers

from basisadapt.backbones.files import sha256_of
from basisadapt.backbones.gguf_header import Header, read_header
from basisadapt.core.cache import cache_folder
from basisadapt.core.errors import InputError

EMBEDDING, HEAD = "token_embd.weight", "output.weight"  # ggml's names for the two ends of a language model
# The precision of float types in bits per weight, where rounding to b bits has a relative error of about 2^(1 - b).
FLOATS = {"F32": 25.0, "F16": 12.0, "BF16": 9.0}


def rounding(file: Path) -> str:
    """The note that every result with the weights of `file` records: how they were rounded, and the file's hash.

    Raises InputError if the file is missing or not GGUF.
    """
    header, digest = read_header(file), sha256_of(file)[:16]
    kind = _file_type(header)
    if kind == "F32":
        return f"the weights are those of a GGUF file in F32 (sha256 {digest})"
    return f"the weights are a rounding{f' to {kind}' if kind else ''} of the original ones (sha256 {digest})"


def converted(file: Path, sha256: str) -> Path:
    """The folder with the weights and the tokenizer of `file`; the sha256 is part of the folder's name.

    The first call makes it, in a minute or two for half a billion weights. The folder is renamed into place once it is
    complete, so an unfinished one is never used, and a lock lets one process at a time do the work. Raises InputError
    if the cache cannot be written, or the file is damaged.
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


def _file_type(header: Header) -> str:
    """The file type that the header states, such as "Q4_K_M"; empty if it states none, or gguf is not installed."""
    if importlib.util.find_spec("gguf") is None or "general.file_type" not in header.metadata:
        return ""
    from gguf import LlamaFileType

    number = header.metadata["general.file_type"] & ~LlamaFileType.GUESSED
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return names.get(number, "")


def _convert(file: Path, folder: Path) -> None:
    header = read_header(file)
    _check_whole(file, header)
    # Without `dequantize` transformers may keep the blocks packed, and such a model cannot be trained or saved.
    unpacked = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for token, key in (("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        # The numbers in the file itself: what transformers makes of them has changed between versions.
        if (number := header.metadata.get(f"tokenizer.ggml.{key}")) is not None:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(number))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
    )
    _tie_head(model, header)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _check_whole(file: Path, header: Header) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = file.stat().st_size
    for name, tensor in header.tensors.items():
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        end = header.start + tensor.start + tensor.elements // per_block * block_bytes
        if end > size:
            raise InputError(f"backbone {str(file)!r} is cut short: {name} ends at byte {end:,} of {size:,}")


def _tie_head(model: transformers.PreTrainedModel, header: Header) -> None:
    """Tie head and embedding again if they differ only by rounding, and keep the more precise copy.

    A file may store the shared tensor of a tied model twice, in two types; transformers then treats the model as
    untied. The two count as equal if ‖E − H‖ ≤ 2^(2 − b) ‖H‖ with b the bits per weight of the coarser type, which is
    twice its rounding error, and at most ‖H‖ / 2.
    """
    if HEAD not in header.tensors or EMBEDDING not in header.tensors or not model._tied_weights_keys:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    bits = {name: _bits(header.tensors[name].kind) for name in (EMBEDDING, HEAD)}
    apart = torch.linalg.vector_norm(embedding.weight - head.weight) / torch.linalg.vector_norm(head.weight)
    if apart > min(2 ** (2 - min(bits.values())), 0.5):
        return
    if bits[HEAD] > bits[EMBEDDING]:
        embedding.weight = head.weight
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _bits(kind: int) -> float:
    """The precision of a ggml type, in bits per weight."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return FLOATS.get(GGMLQuantizationType(kind).name, 8 * block_bytes / per_block)
