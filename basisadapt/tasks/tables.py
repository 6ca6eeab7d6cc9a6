"""Reads files of rows with named columns: CSV, TSV, JSON lines, JSON and parquet.

Text is UTF-8, with or without a byte-order mark. CSV follows RFC 4180: fields are separated by commas, and quoted if
they contain a comma, a quote or a line break. In TSV, a quote is an ordinary character. Empty lines are skipped. A JSON
file holds a list of objects. Only the requested columns are kept.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basisadapt.core.errors import LONGEST, MAX_COMPARED, InputError, refusing, unknown
from basisadapt.core.settings import is_object

CARRIAGE_RETURN = "a carriage return ends a line; expected a line feed, alone or after it"
ALIKE = 0.75  # names of columns below this similarity are not suggested: "extra" is not a typing error for "text"
csv.field_size_limit(2**31 - 1)  # characters; texts may be as long as in the other formats


class UnknownColumn(InputError):
    """A requested column does not exist."""


@dataclass(frozen=True)
class DataColumns:
    """Columns of a source.

    - `source` (str): its name in messages.
    - `unit` (str): "line" or "row", in which places are counted.
    - `numbers`: the place of each row in the source.
    - `columns`: the values of each column, by its name.
    """

    source: str
    unit: str
    numbers: Sequence[int]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.numbers)

    def error(self, row: int, what: str) -> InputError:
        """An InputError that names the place of the row with index `row`, and says what is wrong."""
        return InputError(f"{self.source}, {self.unit} {self.numbers[row]}: {what}")


def read_table(path: Path, columns: Sequence[str], header: Sequence[str] | None = None) -> DataColumns:
    """The named columns of a file whose suffix is one of SUFFIXES.

    header: the names of all columns, if a CSV or TSV file does not begin with them. Values have the types of the
    format; in CSV and TSV they are texts. Raises InputError naming file and row for anything that cannot be read, and
    for a table without rows.
    """
    source = f"data file {str(path)!r}"
    with refusing(f"{source} cannot be read"):
        if path.suffix.lower() in SEPARATORS:
            table = _read_separated(path, source, columns, header)
        else:
            table = READERS[path.suffix.lower()](path, source, columns)
    if not len(table):
        raise InputError(f"{source} has no rows")
    return table


def check_columns(source: str, names: Iterable[str], columns: Sequence[str]) -> None:
    """Raise UnknownColumn for one of `columns` that is not in `names`, and InputError for one that occurs twice."""
    names = list(names)
    for column in columns:
        if column not in names:
            raise UnknownColumn(f"{source}: {_unknown(column, names)}")
        if names.count(column) > 1:
            raise InputError(f"{source} has {names.count(column)} columns called {column!r}")


def _unknown(column: str, names: Sequence[str]) -> str:
    """The message for an unknown column; if a name only looks the same, both are shown with escapes."""
    for name in names[:MAX_COMPARED]:
        if _looks(name) == _looks(column):
            return f"there is a column {_letters(name)}, with other spaces, case or accents than {_letters(column)}"
    return str(unknown("column", column, {" ".join(name.split()) for name in names}, alike=ALIKE))


def _looks(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _letters(name: str) -> str:
    """A name with invisible and non-ASCII characters escaped."""
    return ascii(name[:LONGEST])


# --- formats ---


def _read_separated(path: Path, source: str, columns: Sequence[str], header: Sequence[str] | None) -> DataColumns:
    records = _records(path, source)
    if header is None:
        _, header = next(records, (0, None))
        if header is None:
            raise InputError(f"{source} is empty")
    for separator, called in (";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas"):
        if len(header) == 1 and set(columns) <= set(header[0].split(separator)):
            raise InputError(f"{source} has fields separated by {called}; .csv needs commas, and .tsv needs tabs")
    check_columns(source, header, columns)
    places = [header.index(column) for column in columns]
    numbers: list[int] = []
    values: list[list[str]] = [[] for _ in columns]
    for number, record in records:
        if len(record) != len(header):
            raise InputError(f"{source}, line {number}: {len(record)} fields, where there are {len(header)} columns")
        numbers.append(number)
        for column, place in zip(values, places, strict=True):
            column.append(record[place])
    return DataColumns(source, "line", numbers, dict(zip(columns, values, strict=True)))


def _records(path: Path, source: str) -> Iterator[tuple[int, list[str]]]:
    """Every record: the line in which it begins, and its fields. Raises InputError naming the line."""
    separator = SEPARATORS[path.suffix.lower()]
    lines = _lines(path, source)
    if separator == "\t":
        reader = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=separator, strict=True)
    begin = 1
    try:
        for record in reader:
            if record:
                yield begin, record
            begin = reader.line_num + 1
    except csv.Error as error:
        reason = CARRIAGE_RETURN if "new-line character" in str(error) else error
        raise InputError(f"{source}, line {begin}: {reason}") from error


def _read_jsonl(path: Path, source: str, columns: Sequence[str]) -> DataColumns:
    def objects() -> Iterator[tuple[int, Any]]:
        begun = False
        for number, line in enumerate(_lines(path, source), 1):
            if not begun and line.lstrip().startswith("["):
                raise InputError(
                    f"{source}, line {number} is a list; a file with one list of objects needs the suffix .json"
                )
            if line.strip():
                begun = True
                yield number, _json(line, f"{source}, line {number}")

    return _objects(source, "line", objects(), columns)


def _read_json(path: Path, source: str, columns: Sequence[str]) -> DataColumns:
    lines = list(_lines(path, source))
    if lines and is_object(lines[0]):
        raise InputError(
            f"{source} must hold a list of objects; a file with an object in each line needs the suffix .jsonl"
        )
    values = _json("".join(lines), source)
    if not isinstance(values, list):
        raise InputError(f"{source} must hold a list of objects")
    return _objects(source, "row", enumerate(values, 1), columns)


def _objects(source: str, unit: str, objects: Iterable[tuple[int, Any]], columns: Sequence[str]) -> DataColumns:
    numbers: list[int] = []
    values: dict[str, list[Any]] = {column: [] for column in columns}
    for number, found in objects:
        if not isinstance(found, dict):
            raise InputError(f"{source}, {unit} {number} must be an object with the keys {', '.join(columns)}")
        if not numbers:
            check_columns(source, found, columns)
        numbers.append(number)
        for column in columns:
            values[column].append(found.get(column))
    return DataColumns(source, unit, numbers, values)


def _read_parquet(path: Path, source: str, columns: Sequence[str]) -> DataColumns:
    from pyarrow import parquet

    with path.open("rb") as stream:
        try:
            file = parquet.ParquetFile(stream)
            check_columns(source, file.schema_arrow.names, columns)
            values = file.read(columns=list(columns)).to_pydict()
        except InputError:
            raise
        except Exception as error:  # pyarrow raises many kinds for a damaged file
            raise InputError(f"{source} is not a parquet file that can be read: {_one_line(error)}") from error
    return DataColumns(source, "row", range(1, len(values[columns[0]]) + 1), values)


SEPARATORS = {".csv": ",", ".tsv": "\t"}
READERS: dict[str, Callable[[Path, str, Sequence[str]], DataColumns]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
SUFFIXES = (*SEPARATORS, *READERS)


# --- text ---


def _lines(path: Path, source: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise InputError(
                    f"{source}, line {number}: byte 0x{byte:02x} is not UTF-8, the encoding that is expected"
                ) from error
            if "\0" in text:
                raise InputError(f"{source}, line {number}: a NUL byte, which is not text")
            yield text


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if "\r" in text.replace("\r\n", ""):
            raise InputError(f"{place}: {CARRIAGE_RETURN}") from error
        raise InputError(f"{place} is not valid JSON: {_one_line(error)}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
