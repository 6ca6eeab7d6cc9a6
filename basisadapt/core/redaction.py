"""Removes secrets from texts. Everything that leaves a process passes through `redacted`: streams, records, files.

Secrets are the passwords in the environment and in addresses, and whatever was given to `hide`. A secret is found
however a text escapes it (JSON, percent signs, HTML, repr, shell quotes), and also if the text was cut off inside it.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import os
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

MARK, CUT = "***", "..."
SHORTEST = 6  # characters: a shorter secret would match ordinary words; in an address it is hidden all the same

# Names of secrets: environment variables, and fields in the query of an address.
VARIABLE = re.compile(r"(?:KEY|TOKEN|PASSWORD|SECRET)$", re.IGNORECASE)
FIELD = r"[?&;][\w.-]*(?:pass|pwd|secret|token|key)[\w.-]*="

OCTET = re.compile(r"(?:%(?:25)*|(?<!\\)\\+x)([0-9a-fA-F]{2})")  # escaped any number of times
ESCAPED = re.compile(
    rf"(?P<units>(?:(?<!\\)\\+u[0-9a-fA-F]{{4}})+)|(?P<octets>(?:{OCTET.pattern})+)|(?<!\\)\\+[nrt]"
    r"|&(?:amp;)*(?P<entity>#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8});"
)
HALF_ESCAPED = r"(?:u?[0-9a-fA-F]{0,3}|x?[0-9a-fA-F]?|%[0-9a-fA-F]?|&[#\w]{0,8})"
CUT_HERE = re.compile(rf"{HALF_ESCAPED}(?:\.\.\.|…|\Z)")
DROPPED = dict.fromkeys([*(code for code in range(0x3001) if chr(code).isspace()), *map(ord, "+\\'\"")])

T = TypeVar("T")

_told: set[str] = set()


def hide(secret: str) -> None:
    """Treat a text as a secret from now on, without the whitespace around it."""
    _told.add(secret)


def hide_in(address: str) -> None:
    """Treat the passwords in an address as secrets from now on, if it has any."""
    _told.update(_passwords(address))


def redacted(value: T) -> T:
    """The value with `***` for every secret in its texts: a text, or lists, tuples, mappings and dataclasses of texts.

    Passwords in well-formed addresses are hidden even if they are not known as secrets:
    `postgresql://me:***@host/name?password=***`.
    """
    return cast(T, _redacted(value, _known()))


def _redacted(value: object, secrets: frozenset[str]) -> object:
    if isinstance(value, str):
        text = _without(value, secrets) if secrets else value
        text = re.sub(r"(://[^:/@\s]{0,99}):[^@\s\"<>]{0,999}@", rf"\1:{MARK}@", text) if "://" in text else text
        return re.sub(rf"({FIELD})[^&;\s\"'<>]+", rf"\1{MARK}", text, flags=re.IGNORECASE) if "=" in text else text
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):  # a named tuple takes its fields one by one
        return type(value)(_redacted(item, secrets) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _redacted(item, secrets) for name, item in fields.items()})
    return value


# --- what is secret ---


def _known() -> frozenset[str]:
    """All secrets known now, each without escapes (see `_bare`), as far as they are long enough to be searched for."""
    found = set(_told)
    for name, value in os.environ.items():
        if VARIABLE.search(name):
            found.add(value)
        elif "://" in value:
            found.update(_passwords(value))
    return _bare_ones(frozenset(found))


@functools.lru_cache(maxsize=8)
def _bare_ones(secrets: frozenset[str]) -> frozenset[str]:
    return frozenset(bare for bare in map(_bare, secrets) if len(bare) >= SHORTEST)


@functools.lru_cache(maxsize=256)
def _passwords(address: str) -> frozenset[str]:
    """Every part of an address that may be a password.

    Users leave @, / and spaces in names and passwords unescaped. Libraries then split the address at different places
    and quote the pieces in their errors. So the password may end at any @, and its parts are secrets too.
    """
    _, there, rest = address.partition("://")
    if not there:
        return frozenset()
    found: set[str] = set()
    before, _, query = rest.partition("?")
    for part in {before, rest}:
        _, colon, after = part.partition(":")
        ends = [place for place, letter in enumerate(after) if colon and letter == "@"]
        found.update(after[:end] for end in ends)
        if ends and part == before:
            found.update(re.split("[@/:]", after[: ends[-1]]))
    found.update(re.findall(rf"{FIELD}([^&;]*)", f"?{query}", re.IGNORECASE))
    return frozenset(found)


# --- how it is found ---


def _without(text: str, secrets: Iterable[str]) -> str:
    """The text with a mark for every secret, whether whole or cut off."""
    bare = _bare(text)
    spans = sorted(span for secret in secrets for span in _spans(bare, secret))
    if not spans:
        return text
    wanted = {place for first, last in spans for place in (first, last - 1)}
    places = {number: place for number, place in enumerate(_places(text)) if number in wanted}
    pieces, end = list[str](), 0
    for first, last in spans:
        begin = places[first][0]
        pieces += [text[end:begin], MARK] if begin >= end else []
        end = max(end, places[last - 1][1])
    return "".join(pieces) + text[end:]


def _spans(bare: str, secret: str) -> Iterator[tuple[int, int]]:
    """The places of a secret in a text, both bare: all of it, its beginning before a cut, or its end after one."""
    size = len(secret)
    for start in _every(secret[:SHORTEST], bare):
        same = next((n for n in range(SHORTEST, size) if bare[start + n : start + n + 1] != secret[n]), size)
        if secret.isdigit():
            if same == size and not re.match(r"\d", bare[start + size :]) and not re.search(r"[\d.]\Z", bare[:start]):
                yield start, start + size  # no part of a number
        elif same == size or CUT_HERE.match(bare, start + same):
            yield start, start + same
    for start in _every(secret[-SHORTEST:], bare):
        end = start + SHORTEST
        same = next((n for n in range(SHORTEST, size) if bare[end - n - 1 : end - n] != secret[-n - 1]), size)
        if bare.endswith(CUT, 0, end - same) and not secret.isdigit():
            yield end - same, end


def _every(part: str, text: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start
        start = text.find(part, start + 1)


def _bare(text: str) -> str:
    """A text without escapes, and without the characters that only some encodings escape: space, +, quotes, \\."""
    return (ESCAPED.sub(_meant, text) if any(sign in text for sign in "\\%&") else text).translate(DROPPED)


def _places(text: str) -> Iterator[tuple[int, int]]:
    """For each character of the bare text, the start and end of what stands for it in the text."""
    end = 0
    for found in (*ESCAPED.finditer(text), None):
        begin = len(text) if found is None else found.start()
        yield from ((place, place + 1) for place in range(end, begin) if ord(text[place]) not in DROPPED)
        if found is not None:
            yield from [found.span()] * len(_meant(found).translate(DROPPED))
            end = found.end()


def _meant(found: re.Match[str]) -> str:
    """The characters that an escape stands for; empty for escaped whitespace (\\n, \\r, \\t)."""
    if found["units"]:
        return bytes.fromhex("".join(re.findall("u(....)", found["units"]))).decode("utf-16-be", "replace")
    if found["octets"]:
        octets = bytes.fromhex("".join(OCTET.findall(found["octets"])))
        try:
            return octets.decode()
        except UnicodeDecodeError:
            return octets.decode("latin-1")
    return html.unescape(f"&{found['entity']};") if found["entity"] else ""
