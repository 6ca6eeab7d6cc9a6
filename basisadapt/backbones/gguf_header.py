"""Reads the header of a GGUF file: its metadata, and the type and offset of every tensor."""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basisadapt.backbones.files import stamp
from basisadapt.core.errors import InputError, one_line, refusing

# struct's formats of GGUF's numeric metadata types; texts and lists are read separately.
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, LIST = 8, 9


@dataclass(frozen=True)
class Tensor:
    """A tensor's type and place in the file.

    - `kind` (int): ggml's number of its type.
    - `elements` (int): how many numbers it holds.
    - `start` (int): its offset in bytes from the first tensor.
    """

    kind: int
    elements: int
    start: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    - `metadata`: numbers and texts by key, without lists such as the vocabulary.
    - `tensors`: by name.
    - `start` (int): the offset in bytes at which the tensors begin.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    start: int


def read_header(file: Path) -> Header:
    """The header of `file`, cached until the file changes.

    Raises InputError if it is missing, damaged or not GGUF. Source: the GGUF specification, versions 2 and 3.
    """
    if not file.is_file():
        raise InputError(f"backbone {str(file)!r} does not exist; expected a GGUF file with the weights of a model")
    return _read_once(file, stamp(file))


@functools.lru_cache(maxsize=8)
def _read_once(file: Path, stamp: tuple[int, ...]) -> Header:
    with refusing(f"backbone {str(file)!r} cannot be read"), file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"backbone {str(file)!r} is not a GGUF file: it does not begin with these letters")
        try:
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header()
        except (struct.error, ValueError, KeyError) as error:
            raise InputError(f"backbone {str(file)!r} is a damaged GGUF file: {one_line(error)}") from error


class _Reader:
    """Reads the parts of a header one after the other, from just behind the four letters "GGUF"."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place = content, 4

    def header(self) -> Header:
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} where 2 or 3 was expected")
        tensors, keys = self._number("<Q"), self._number("<Q")
        metadata = {}
        for _ in range(keys):
            key, value = self._text(), self._value(self._number("<I"))
            if value is not None:
                metadata[key] = value
        found = dict(self._tensor() for _ in range(tensors))
        step = metadata.get("general.alignment", 32)
        return Header(metadata, found, -(-self._place // step) * step)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return value

    def _text(self) -> str:
        length = self._number("<Q")
        self._place += length
        return self._content[self._place - length : self._place].decode()

    def _value(self, kind: int) -> Any:
        """A number or a text; None for a list, which is skipped."""
        if kind == TEXT:
            return self._text()
        if kind != LIST:
            return self._number(NUMBERS[kind])
        inner, length = self._number("<I"), self._number("<Q")
        if inner in NUMBERS:
            self._place += length * struct.calcsize(NUMBERS[inner])
        elif inner == TEXT:
            for _ in range(length):
                size = self._number("<Q")
                self._place += size
        else:
            for _ in range(length):
                self._value(inner)
        return None

    def _tensor(self) -> tuple[str, Tensor]:
        name, dimensions = self._text(), self._number("<I")
        elements = math.prod(self._number("<Q") for _ in range(dimensions))
        return name, Tensor(kind=self._number("<I"), elements=elements, start=self._number("<Q"))
