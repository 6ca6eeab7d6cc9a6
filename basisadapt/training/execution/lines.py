"""JSON lines: what a driver and its workers say to each other, and the files in which cells and results travel.

A line is an object. Numbers keep every bit, NaN and infinities included.
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
from typing import TYPE_CHECKING, Any, TypeVar

from basisadapt.core.errors import InputError, one_line, unknown
from basisadapt.core.redaction import redacted
from basisadapt.core.settings import from_mapping

if TYPE_CHECKING:
    from basisadapt.training.execution.executor import Ended
    from basisadapt.training.result import RunResult

L = TypeVar("L")

LATEST = 1e11  # seconds since 1970: no clock shows more
MAX_BYTES = 4 << 30  # of a file, unpacked
LARGEST = 1e100  # size of a number that can be compared: the squares of larger ones, for deviations, may have none
DONE = ("finished", "diverged")  # the states of a result: a cell that has come to one is not run again


@dataclass(frozen=True, kw_only=True)
class CellLine:
    """A cell that is to be run elsewhere: its study, row and key in the record, and its configuration."""

    study: str
    row: str
    key: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ResultLine(CellLine):
    """What became of a cell: a result, its fields those of a RunResult, or an error and its traceback.

    host: the machine that ran it. began, ended: seconds since 1970. Raises InputError for times that are none.
    """

    host: str
    began: float
    ended: float
    result: dict[str, Any] | None = None
    error: str = ""
    traceback: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.began <= self.ended < LATEST:
            raise InputError(f"began and ended must be seconds since 1970, got {self.began} and {self.ended}")


OF_CELL = {field.name for field in dataclasses.fields(CellLine)}
ADDED = {field.name for field in dataclasses.fields(ResultLine)} - OF_CELL  # what a result says beyond its cell
BEGINNING = f'{{"{dataclasses.fields(CellLine)[0].name}": "'.encode()  # of every line of a file


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
    """What `end_to_mapping` gave; a result that no run gives is an error."""
    from basisadapt.training.execution.executor import Ended

    try:
        result = None if values["result"] is None else parse_result(values["result"])
    except InputError as error:
        return Ended(key, error=one_line(error))
    return Ended(key, result, values["error"], values["traceback"])


def is_number(value: float) -> bool:
    """Whether it can be recorded, compared and drawn."""
    return abs(value) < LARGEST  # NaN is not


def check_score(result: RunResult) -> None:
    """Raise InputError for a finished result without its score."""
    if result.status == "finished" and not is_number(result.metrics.get(result.headline, math.nan)):
        raise InputError(f"the run gave no finite {result.headline!r}, though it has finished")


def parse_result(values: dict[str, Any]) -> RunResult:
    """A RunResult from its fields in JSON types, without secrets. Raises InputError for what no run gives."""
    from basisadapt.training.result import RunResult

    try:
        result = from_mapping(RunResult, redacted(values), "result")
    except (TypeError, InputError) as error:  # a TypeError for a field that is missing
        raise InputError(f"not a result: {error}") from error
    if result.status not in DONE:
        raise unknown("status of a result", result.status, DONE)
    check_score(result)
    return result


def to_line(values: Any) -> str:
    """A line, its end included; `values` is a dataclass or a mapping."""
    return json.dumps(values if isinstance(values, dict) else asdict(values), ensure_ascii=False) + "\n"


def read_lines(path: Path, kind: type[L], option: str) -> list[L]:
    """The lines of a file, packed by gzip if it ends so, each as a `kind`.

    What a kill leaves of a last line is not one; a last line that lacks its end alone is. A result read as a CellLine
    is its cell, which can be run again. `option` is where the user gave the path. Raises InputError that names the
    line, and for a file of more than MAX_BYTES.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{option} {str(path)!r} must hold at most {MAX_BYTES:,} bytes")
        *lines, last = content.split(b"\n")
        whole = [line.decode() for line in (*lines, *([last] if _is_whole(last) else []))]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{option} {str(path)!r} cannot be read: {one_line(error)}") from error
    return [_parse(text, kind, f"{path}, line {number}") for number, text in enumerate(whole, start=1)]


def _parse(text: str, kind: type[L], where: str) -> L:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise InputError("a line must be an object with keys and values")
        if kind is CellLine:
            values = {key: value for key, value in values.items() if key not in ADDED}
        return from_mapping(kind, values)
    except (InputError, TypeError) as error:  # a TypeError for a field that is missing
        raise InputError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error


def _is_whole(line: bytes) -> bool:
    """Whether a line is there to its last letter: the beginning of an object is none."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def check_replaceable(path: Path, option: str) -> None:
    """Raise InputError unless a file of cells may take this place: it is free, or has such a file."""
    try:
        if not path.exists() or not path.stat().st_size:
            return
        with path.open(encoding="utf-8") as file:
            ours = all(json.loads(line).keys() == OF_CELL for line in file)
    except OSError as error:
        raise InputError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise InputError(f"{option} {str(path)!r} would overwrite a file that holds something else than cells to run")


class LineFile:
    """A file that lines are added to, each whole or not at all. What a kill left of a line is cut off first.

    Raises InputError for a file that cannot be written, or ends in anything else.
    """

    def __init__(self, path: Path, option: str) -> None:
        self._path = path
        if path.suffix == ".gz":
            raise InputError(f"{option} {str(path)!r}: lines cannot be added to a packed file; unpack it first")
        try:
            with path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                end = content.rfind(b"\n") + 1
                last = content[end:]
                if last and _is_whole(last):
                    file.write(b"\n")
                elif last.startswith(BEGINNING) or BEGINNING.startswith(last):
                    file.truncate(end)
                else:
                    raise InputError(f"{option} {str(path)!r} does not end in a line of ours: it holds something else")
        except OSError as error:
            raise InputError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error

    def append(self, values: Any) -> None:
        """Add a line, on the disk when this returns. Raises OSError, the file then being as it was."""
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
