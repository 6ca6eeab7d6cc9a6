"""Instructions: Alpaca's template, and files of them in Alpaca's layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basisadapt.core.errors import InputError


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's template (Taori et al., 2023) up to the point where the response begins.

    The commonsense scripts of LLM-Adapters use the same words but indent every line except the first by sixteen spaces;
    here nothing is indented.
    """
    with_input = ", paired with an input that provides further context" if input else ""
    further = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{with_input}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{further}### Response:\n"
    )


@dataclass(frozen=True)
class Instruction:
    """A row of an instruction file.

    - `instruction` (str): the task in words.
    - `input` (str): further context; may be empty.
    - `output` (str): the response.
    - `answer` (str, default ""): the response in one word, if the file has it.
    """

    instruction: str
    input: str
    output: str
    answer: str = ""

    @property
    def prompt(self) -> str:
        """The instruction and its input in Alpaca's template, see `alpaca_prompt`."""
        return alpaca_prompt(self.instruction, self.input)


def read_instructions(path: Path) -> list[Instruction]:
    """The rows of a JSON file in Alpaca's layout: a list of objects with instruction, output and, mostly, input.

    Raises InputError naming the file and the row, counted from one.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"data file {str(path)!r} must hold a list of rows, at least one")
    return [_instruction(row, f"data file {str(path)!r}, row {number}") for number, row in enumerate(rows, start=1)]


def read_json(path: Path) -> Any:
    """The content of a JSON file, with or without a byte-order mark. Raises InputError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"data file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise InputError(f"data file {str(path)!r} is not JSON: {error}") from error


def _instruction(row: Any, where: str) -> Instruction:
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object, got {type(row).__name__}")
    values = {"input": "", "answer": "", **row}
    for key in ("instruction", "input", "output", "answer"):
        if not isinstance(values.get(key), str):
            found = f"got {values[key]!r:.80}" if key in values else "which is missing"
            raise InputError(f"{where} needs a text called {key!r}, {found}")
        try:
            values[key].encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InputError(f"{where}: {key!r} has half a character at {error.start}") from error
    return Instruction(values["instruction"], values["input"], values["output"], values["answer"])
