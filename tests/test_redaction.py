"""What is secret, and the ways in which a text may hold it."""

from __future__ import annotations

import html
import json
import reprlib
import shlex
import sys
import time
import urllib.parse
from dataclasses import dataclass

import pytest

from basisadapt.core import redaction
from basisadapt.core.command import guarded
from basisadapt.core.redaction import MARK, hide, hide_in, redacted

SECRET = "Zq7-a\"b\\c/é'<&>x y 9k%+w"


FORMS = {
    "as it is": str,
    "repr": repr,
    "ascii": ascii,
    "bytes": lambda text: repr(text.encode()),
    "json": json.dumps,
    "json in json": lambda text: json.dumps(json.dumps(text)),
    "json, all escaped": lambda text: "".join(f"\\u{ord(letter):04X}" for letter in text),
    "json, some escaped": lambda text: "".join(f"\\u{ord(c):04x}" if i % 3 else c for i, c in enumerate(text)),
    "html": html.escape,
    "html, numbers": lambda text: "".join(f"&#{ord(letter)};" for letter in text),
    "json in html": lambda text: html.escape(json.dumps(text)),
    "path of an address": urllib.parse.quote,
    "part of an address": lambda text: urllib.parse.quote(text, safe=""),
    "query of an address": urllib.parse.quote_plus,
    "address in an address": lambda text: urllib.parse.quote(urllib.parse.quote(text)),
    "shell": shlex.quote,
    "one line": lambda text: " ".join(text.split()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_hidden(form):
    hide(f"{SECRET}\n")
    written = FORMS[form](SECRET)
    text = redacted(f"before {written} after")
    assert MARK in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    left = text.removeprefix("before ").removesuffix(" after").replace(MARK, "")
    assert set(left) <= set("b'\"\\quot&;"), left  # the form's own quotes


def test_a_cut_leaves_nothing_of_use():
    secret = "Zq7mV2xKw9Tb4RnL8sPd"
    hide(secret)
    for cut in range(len(secret) + 1):
        for text in (
            f"key {secret[:cut]}",
            f"key {secret[:cut]}...",
            f"...{secret[cut:]} is wrong",
            f"'{secret[:cut]}'",
        ):
            assert longest_part(redacted(text), secret) < redaction.SHORTEST, text
    assert longest_part(redacted(reprlib.repr(f"the key {secret} {secret}")), secret) < redaction.SHORTEST
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in secret)
    assert (
        longest_part(redacted(escaped[:63]).encode().decode("unicode_escape", "replace"), secret) < redaction.SHORTEST
    )


def longest_part(text, secret):
    """The length of the longest beginning of the secret that is in the text."""
    return max(n for n in range(len(secret) + 1) if secret[:n] in text)


ADDRESSES = {
    "as it should be": ("postgresql://me:{}@host/db", "Zq7mV2xKw9"),
    "percent signs": ("postgresql://me:{}@host/db", "Zq7%40mV2xKw9"),
    "at signs and slashes": ("postgresql://me:{}@host/db", "Zq7mV2@xKw9Tb/4RnL8sPd"),
    "spaces": ("postgresql://me:{}@host/db", "Zq7mV2 xKw9"),
    "user with an at sign": ("postgresql+psycopg://me@corp:{}@host/db", "Zq7mV2xKw9"),
    "user with a slash": ("postgresql://corp/me:{}@host/db", "Zq7mV2xKw9"),
    "query": ("postgresql://host/db?user=me&password={}&sslmode=require", "Zq7mV2+xKw9"),
    "question mark": ("mysql://me:{}@host/db?charset=utf8", "Zq7mV2?xKw9Tb4"),
    "server": ("http://me:{}@127.0.0.1:5000", "Zq7mV2xKw9"),
}


@pytest.mark.parametrize("kind", ADDRESSES)
def test_passwords_in_addresses_are_known(kind):
    pattern, secret = ADDRESSES[kind]
    address = pattern.format(secret)
    hide_in(f"--storage={address}")
    parts = [part for part in secret.replace("@", "/").split("/") if len(part) >= redaction.SHORTEST]
    meant = urllib.parse.unquote_plus(secret)
    for text in (address, repr(address), shlex.join(["study", address]), f"no host {secret!r}", f"no {meant}", *parts):
        shown = redacted(f"{text}: refused")
        assert MARK in shown
        for part in (secret, meant, *parts):
            assert part not in shown
    assert "host" in redacted(address) or "127.0.0.1" in redacted(address)


def test_addresses_that_nobody_told_of():
    assert redacted("see postgresql://me:word@host/db") == f"see postgresql://me:{MARK}@host/db"
    assert redacted("x?a=1&password=word&b=2") == f"x?a=1&password={MARK}&b=2"
    assert redacted("http://127.0.0.1:5000/#/experiments/1/runs by me@host") == (
        "http://127.0.0.1:5000/#/experiments/1/runs by me@host"
    )


def test_the_environment_is_known(monkeypatch):
    monkeypatch.setenv("BASISADAPT_JUDGE_KEY", " sk-Zq7mV2xKw9\n")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "Tb4RnL8sPd")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:Vx2KmQ7z@host")
    monkeypatch.setenv("SHORT_KEY", "is")
    assert redacted("sk-Zq7mV2xKw9, Tb4RnL8sPd, Vx2KmQ7z is") == f"{MARK}, {MARK}, {MARK} is"


def test_long_secrets_and_long_texts_take_no_time():
    secret = "".join(chr(33 + i * i % 94) for i in range(5000))
    hide(secret)
    hide("Zq7\\\\mV2 xKw9")
    assert redacted(f"before {secret} after") == f"before {MARK} after"
    begin = time.perf_counter()
    for letter in "\\ %&'.Z":
        assert redacted(letter * 1_000_000) == letter * 1_000_000
    redacted("://a:" * 100_000)
    redacted(";apikey" * 100_000 + "=")
    assert time.perf_counter() - begin < 20


def test_numbers_stay_whole():
    hide("123456")
    assert redacted("0.1234567 and 123456") == f"0.1234567 and {MARK}"


def test_what_holds_texts():
    @dataclass(frozen=True)
    class Holder:
        texts: dict[str, list[str]]
        number: float = 1.5

    hide("Zq7mV2xKw9")
    assert redacted(Holder({"a Zq7mV2xKw9": ["Zq7mV2xKw9"]})) == Holder({f"a {MARK}": [MARK]})
    assert redacted(("Zq7mV2xKw9", None, 3, b"x")) == (MARK, None, 3, b"x")


def test_a_command_line_shows_no_secret(capsys):
    @guarded
    def main(arguments):
        print(*arguments)
        print(*arguments, file=sys.stderr)
        raise RuntimeError(arguments[0])

    assert main(["postgresql://me:Zq7mV2xKw9@host/db"]) == 1
    out, err = capsys.readouterr()
    assert out == f"postgresql://me:{MARK}@host/db\n"
    assert f"RuntimeError: postgresql://me:{MARK}@host/db" in err
    assert "Zq7" not in err
