"""Explains in one line why a backbone could not be loaded, and what to do about it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from basisadapt.backbones.catalogue import Backbone
from basisadapt.core.errors import InputError

NO_SAFETENSORS = (
    "has no safetensors; pickled weights are not read, since they can run code. If you trust them, load them and "
    "call save_pretrained, which writes safetensors"
)
# Where only the text of transformers' error tells the cause: a part of the text, and our explanation.
SENTENCES = {
    "custom code": "needs its own code, which is not run; choose a model that transformers knows",
    "does not recognize this architecture": "has a model type that the installed transformers does not know: pip "
    "install -U transformers, or choose another model",
    "is not supported yet": "has an architecture that the installed transformers does not convert from GGUF: pip "
    "install -U transformers, or choose another file",
    "Unrecognized model": "has no config.json with a model_type that transformers knows",
    "model.safetensors": NO_SAFETENSORS,
}


@contextmanager
def explained(backbone: Backbone) -> Iterator[None]:
    """Turn whatever is raised inside into an InputError: a hub repository or a folder may hold anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"backbone {backbone.name!r} {_reason(backbone.source, error)}") from error


def _reason(source: str, error: Exception) -> str:
    from huggingface_hub import errors
    from safetensors import SafetensorError

    causes, text = list(_causes(error)), " ".join(str(error).split())[:200]

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.GatedRepoError):
        return f"is gated: ask for access at https://huggingface.co/{source}, then `hf auth login`, or set HF_TOKEN"
    if caused_by(errors.HFValidationError):
        return "is neither a folder here nor an id of the hub: check the path"
    if caused_by(errors.RepositoryNotFoundError):
        return "is not on the hub, or is private: check the name; for a private one `hf auth login`, or set HF_TOKEN"
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return "does not fit on the disk: free some space, or set HF_HOME to a folder on another disk"
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if caused_by(*unreachable, socket.gaierror):
        return (
            f"is neither a folder nor in the cache, and the hub cannot be reached: run `hf download {source}` with "
            "network access and without HF_HUB_OFFLINE"
        )
    if caused_by(SafetensorError):
        return f"has a damaged safetensors file; download it again: {text}"
    sentence = next((ours for theirs, ours in SENTENCES.items() if theirs in str(error)), None)
    return sentence or f"could not be loaded: {text}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and the chain of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
