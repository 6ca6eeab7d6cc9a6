"""JSON lines: the messages between a driver and its workers, and the files of cells and results.

Each line is an object. Numbers keep every bit, including NaN and infinities.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from basisadapt.core.errors import InputError, one_line, refusing, unknown
from basisadapt.core.redaction import redacted
from basisadapt.core.settings import from_mapping, is_object
from basisadapt.training.execution.executor import Ended
from basisadapt.training.result import RunResult

L = TypeVar("L")

MAX_TIME = 1e11  # seconds since 1970: no clock shows more
MAX_BYTES = 4 << 30  # of a file, unpacked
MAX_NUMBER = 1e100  # of a recorded number: the squares of larger ones, for deviations, would overflow
DONE = ("finished", "diverged")  # the states of a result: a cell in one of them is not run again


@dataclass(frozen=True, kw_only=True)
class CellLine:
    """A cell to run elsewhere: its study, row and key in the record, and its configuration."""

    study: str
    row: str
    key: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ResultLine(CellLine):
    """A cell with its result, the fields of a RunResult, or its error and traceback.

    - `host` (str): the machine that ran it.
    - `began`, `ended` (float): seconds since 1970.

    Raises InputError for times out of range.
    """

    host: str
    began: float
    ended: float
    result: dict[str, Any] | None = None
    error: str = ""
    traceback: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.began <= self.ended < MAX_TIME:
            raise InputError(f"began and ended must be seconds since 1970, got {self.began} and {self.ended}")


CELL_FIELDS = {field.name for field in dataclasses.fields(CellLine)}
RESULT_FIELDS = {field.name for field in dataclasses.fields(ResultLine)} - CELL_FIELDS  # beyond those of its cell
LINE_START = f'{{"{dataclasses.fields(CellLine)[0].name}": "'.encode()  # the first bytes of every line of a file


def end_to_mapping(ended: Ended) -> dict[str, Any]:
    """How a job ended, in JSON types, without its key."""
    result = None if ended.result is None else asdict(ended.result)
    return {"result": result, "error": ended.error, "traceback": ended.traceback}


def brief(result: RunResult) -> RunResult:
    """A result without its arrays (φ's curves, snapshots, spectra, the landscape), a hundredth of the size.

    Metrics, curves over the steps and every module's numbers stay as they are.
    """
    modules = {name: {k: v for k, v in numbers.items() if k != "spectrum"} for name, numbers in result.modules.items()}
    return dataclasses.replace(result, modules=modules, phi={}, snapshots=[], landscape={})


def end_from_mapping(key: str, values: dict[str, Any]) -> Ended:
    """The inverse of `end_to_mapping`; an invalid result becomes an error."""
    try:
        result = None if values["result"] is None else parse_result(values["result"])
    except InputError as error:
        return Ended(key, error=one_line(error))
    return Ended(key, result, values["error"], values["traceback"])


def is_number(value: float) -> bool:
    """Whether `value` can be recorded, compared and drawn."""
    return abs(value) < MAX_NUMBER  # NaN is not


def check_score(result: RunResult) -> None:
    """Raise InputError for a finished result without its score."""
    if result.status == "finished" and not is_number(result.metrics.get(result.headline, math.nan)):
        raise InputError(f"the run gave no finite {result.headline!r}, though it has finished")


def parse_result(values: dict[str, Any]) -> RunResult:
    """A RunResult from its fields in JSON types, with secrets redacted. Raises InputError if it is invalid."""
    with refusing("not a result", InputError):
        result = from_mapping(RunResult, redacted(values), "result")
    if result.status not in DONE:
        raise unknown("status of a result", result.status, DONE)
    check_score(result)
    return result


def to_line(values: Any) -> str:
    """A dataclass or a mapping as a line, with its line break."""
    return json.dumps(values if isinstance(values, dict) else asdict(values), ensure_ascii=False) + "\n"


def read_lines(path: Path, kind: type[L], option: str) -> list[L]:
    """The lines of a file, or of a gzip file (`.gz`), each as a `kind`.

    The rest of a last line that a kill cut off is skipped; a whole last line without its line break counts. A result
    can be read as a CellLine, to run its cell again. option: where the user gave the path.

    Raises InputError that names the line, or for a file of more than MAX_BYTES.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{option} {str(path)!r} must hold at most {MAX_BYTES:,} bytes")
        *lines, last = content.split(b"\n")
        whole = [line.decode() for line in (*lines, *([last] if is_object(last) else []))]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{option} {str(path)!r} cannot be read: {one_line(error)}") from error
    return [_parse(text, kind, f"{path}, line {number}") for number, text in enumerate(whole, start=1)]


def _parse(text: str, kind: type[L], where: str) -> L:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise InputError("a line must be an object with keys and values")
        if kind is CellLine:
            values = {key: value for key, value in values.items() if key not in RESULT_FIELDS}
        return from_mapping(kind, values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error


def check_replaceable(path: Path, option: str) -> None:
    """Raise InputError unless the path is free, or is a file of cells that may be replaced."""
    try:
        if not path.exists() or not path.stat().st_size:
            return
        with path.open(encoding="utf-8") as file:
            ours = all(json.loads(line).keys() == CELL_FIELDS for line in file)
    except OSError as error:
        raise InputError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise InputError(f"{option} {str(path)!r} would overwrite a file that holds something else than cells to run")


class LineFile:
    """A file to which lines are appended, each whole or not at all. The rest of a line that a kill cut off is removed.

    Raises InputError for a file that cannot be written, or does not end in a line of ours.
    """

    def __init__(self, path: Path, option: str) -> None:
        self._path = path
        if path.suffix == ".gz":
            raise InputError(f"{option} {str(path)!r}: lines cannot be added to a packed file; unpack it first")
        with refusing(f"{option} {str(path)!r} cannot be written"), path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            last = content[end:]
            if last and is_object(last):
                file.write(b"\n")
            elif last.startswith(LINE_START) or LINE_START.startswith(last):
                file.truncate(end)
            else:
                raise InputError(f"{option} {str(path)!r} does not end in a line of ours: it holds something else")

    def append(self, values: Any) -> None:
        """Append a line; it is on the disk when this returns. Raises OSError, and leaves the file as it was."""
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            line = memoryview(to_line(values).encode())
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
