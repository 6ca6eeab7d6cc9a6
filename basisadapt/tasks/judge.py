"""Judges of answers: any OpenAI-compatible endpoint, or judgments that were recorded earlier."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basisadapt.core.errors import InputError, refusing
from basisadapt.core.redaction import hide, hide_in, redacted

ATTEMPTS = 5
LONGEST_PAUSE = 60.0  # seconds
MAX_BYTES = 1 << 20  # of a reply; 2,048 tokens are about ten thousand bytes
PASSING = (408, 425, 429)  # HTTP statuses below 500 that are worth another attempt
ADDRESS = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^/?#@\s:\[\]]+)(:\d+)?(/[^?#@\s]*)?")

Message = Mapping[str, str]  # {"role": "system" or "user", "content": text}


class Judge(ABC):
    """Answers messages with a text; may be called from several threads. name: the model's name in records."""

    name: str

    @abstractmethod
    def ask(self, messages: Sequence[Message]) -> str:
        """The judge's answer to a conversation. Raises InputError if it gives none."""


@dataclass(frozen=True)
class EndpointJudge(Judge):
    """A model at `url`/chat/completions, asked at temperature 0 for up to 2,048 tokens, as MT-Bench asks its judge.

    - `url` (str): the address, of http or https, with only a host, a port and a path.
    - `name` (str): the model's name at the endpoint.
    - `key` (str, default ""): sent as a bearer token. It is never sent to another address to which the endpoint
      redirects, and is removed from messages and from the judge's answers. Whitespace around it is dropped.
    - `timeout` (float, default 120): seconds without data after which an attempt fails.
    - `pause` (float, default 1): seconds before the second of at most ATTEMPTS attempts, doubled each time, unless the
      endpoint states a pause.

    Raises InputError for another form of address, or a key with characters that an HTTP header cannot hold.
    """

    url: str
    name: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    pause: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key.strip())
        hide(self.key)
        hide_in(self.url)
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"the judge's address must begin with http:// or https://, got {redacted(self.url)!r}")
        if not ADDRESS.fullmatch(self.url):
            raise InputError(
                "the judge's address may hold a host, a port and a path, and no user, password, query or space: the "
                f"key goes into BASISADAPT_JUDGE_KEY; got {redacted(self.url)!r}"
            )
        if not re.fullmatch("[!-~]*", self.key):
            raise InputError("BASISADAPT_JUDGE_KEY must be one word of ASCII letters, digits and signs")

    def ask(self, messages: Sequence[Message]) -> str:
        """The text of the first choice. Raises InputError for a refusal, or after ATTEMPTS attempts.

        It retries after HTTP 408, 425, 429 and 5xx, a timeout, broken JSON, or a reply of more than MAX_BYTES.
        """
        for attempt in range(ATTEMPTS):
            pause = self.pause * 2**attempt
            try:
                return redacted(_text(self._post(messages)))
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code < 500 and error.code not in PASSING:
                    raise InputError(f"judge {self.name!r} refuses: {reason}") from error
                pause = _seconds(error.headers.get("Retry-After"), pause)
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = _short(str(error)) or type(error).__name__
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(pause, LONGEST_PAUSE))
        raise InputError(f"judge {self.name!r} gave no answer in {ATTEMPTS} attempts; the last error: {reason}")

    def _post(self, messages: Sequence[Message]) -> Any:
        content = {"model": self.name, "messages": list(messages), "temperature": 0, "max_tokens": 2048}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(content).encode(), headers)
        with urllib.request.build_opener(_Stay).open(request, timeout=self.timeout) as reply:
            content = reply.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"a reply of more than {MAX_BYTES:,} bytes")
        return json.loads(content)


def _reason(error: urllib.error.HTTPError) -> str:
    """The HTTP status, and the beginning of the body."""
    try:
        body = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        body = ""
    return _short(f"HTTP {error.code} {error.reason} {body}")


def _short(text: str) -> str:
    """The beginning of a text in one line. Secrets are hidden before it is cut."""
    return " ".join(redacted(text).split())[:300]


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: urllib would send the key along."""

    def redirect_request(self, *_: Any) -> None:
        """Return None, which makes a redirection an error."""


def _text(reply: Any) -> str:
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"a reply without choices[0].message.content: {json.dumps(reply)}")
    return text


def _seconds(text: str | None, otherwise: float) -> float:
    """The seconds of the header Retry-After, or `otherwise` if it is not a number."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else otherwise


class RecordedJudge(Judge):
    """The judgments by `name` that the file `path` records; missing ones are asked of the judge `behind` and added.

    A line of the file is `{"judge": name, "messages": [...], "text": "..."}`. If there is a judge behind, a malformed
    line, such as one cut off by a kill, is skipped, and the judge is asked again. Raises InputError for a file that
    cannot be read or written and, without a judge behind, for a malformed line or messages that the file lacks.
    """

    def __init__(self, path: Path, name: str, behind: Judge | None = None) -> None:
        self.name = name
        self._path, self._behind, self._writing = path, behind, threading.Lock()
        self._texts: dict[str, str] = {}
        content = self._read()
        self._whole = not content or content.endswith("\n")
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if entry["judge"] == name:
                    self._texts[_canonical(entry["messages"])] = str(entry["text"])
            except (ValueError, KeyError, TypeError) as error:
                if behind is None:
                    raise InputError(
                        f"{path}, line {number}: expected an object with judge, messages and text"
                    ) from error

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError as error:
            if self._behind is None:
                raise InputError(f"there are no recorded judgments in {self._path}") from error
            return ""
        except OSError as error:
            raise InputError(f"recorded judgments {self._path} cannot be read: {error.strerror}") from error

    def ask(self, messages: Sequence[Message]) -> str:
        """The recorded answer, or that of the judge behind. Raises InputError if there is neither."""
        key = _canonical(messages)
        if key not in self._texts:
            if self._behind is None:
                end = messages[-1]["content"][-80:]
                raise InputError(f"{self._path} has no judgment by {self.name!r} of the message that ends in {end!r}")
            text = self._behind.ask(messages)
            with self._writing:
                self._append(json.dumps({"judge": self.name, "messages": list(messages), "text": text}))
                self._texts[key] = text
        return self._texts[key]

    def _append(self, line: str) -> None:
        with refusing(f"judgments cannot be recorded in {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(f"{'' if self._whole else chr(10)}{line}\n".encode())
        self._whole = True


def _canonical(messages: Sequence[Message]) -> str:
    return json.dumps(list(messages), sort_keys=True)


# --- the judge that environment variables configure ---


def folder() -> Path:
    """The folder for answers and judgments: BASISADAPT_JUDGE_DIR, or `mt_bench` in the current folder."""
    return Path(os.environ.get("BASISADAPT_JUDGE_DIR") or "mt_bench")


def configured_judge() -> Judge:
    """The judge that the environment configures. Its answers are recorded in `folder()`/judgements.jsonl and reused.

    - BASISADAPT_JUDGE_URL: an OpenAI-compatible endpoint, such as https://api.openai.com/v1. Without it only the record
      is used, and BASISADAPT_JUDGE_DIR must name its folder.
    - BASISADAPT_JUDGE_MODEL: the model's name there.
    - BASISADAPT_JUDGE_KEY: the key, if the endpoint needs one.

    Raises InputError if no judge is configured, or its answers could not be recorded.
    """
    url, name = os.environ.get("BASISADAPT_JUDGE_URL"), os.environ.get("BASISADAPT_JUDGE_MODEL")
    if not name or not (url or os.environ.get("BASISADAPT_JUDGE_DIR")):
        raise InputError(
            "MT-Bench needs a judge: set BASISADAPT_JUDGE_URL to an OpenAI-compatible endpoint, such as "
            "https://api.openai.com/v1, BASISADAPT_JUDGE_MODEL to the model's name there, and BASISADAPT_JUDGE_KEY if "
            "it asks for one"
        )
    _check_writable(folder())
    behind = EndpointJudge(url, name, os.environ.get("BASISADAPT_JUDGE_KEY", "")) if url else None
    return RecordedJudge(folder() / "judgements.jsonl", name, behind)


def _check_writable(place: Path) -> None:
    """Raise InputError unless files can be created in the folder `place`. Creates nothing."""
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise InputError(f"the folder {str(place)!r} for answers and judgments cannot be written: see {existing}")
