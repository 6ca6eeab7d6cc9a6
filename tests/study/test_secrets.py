"""Secrets are planted, failures provoked, and everything that was written or said is searched for them."""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import socketserver
import threading
import urllib.parse
import warnings
from pathlib import Path

import pytest

from basisadapt.study.__main__ import main
from basisadapt.tasks.judge import EndpointJudge
from basisadapt.training import RunResult

KEY = "sk-Zq7mV2xKw9Tb4RnL8sPd"
PASSWORD = "Hy3kP0cWv6Jd"
URL = f"postgresql+nothing://me:{PASSWORD}@host/db"


class Server(socketserver.ThreadingTCPServer):
    """Answers whatever `answer` makes of the path, byte by byte as it says."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, answer):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                path = self.rfile.readline().split()[1].decode()
                length = 0
                while (line := self.rfile.readline()).strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.rfile.read(length)
                with contextlib.suppress(OSError):  # the caller may have heard enough
                    self.wfile.write(answer(path))

        super().__init__(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def reply(status, body, reason="No", header=""):
    content = body.encode()
    return f"HTTP/1.1 {status} {reason}\r\n{header}Content-Length: {len(content)}\r\n\r\n".encode() + content


ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
REPLIES = {
    "status line": f"{KEY} is wrong\r\n\r\n".encode(),
    "status": f"HTTP/1.1 {KEY} wrong\r\n\r\n".encode(),
    "reason": reply(401, "", f"wrong key {KEY}"),
    "refusal": reply(401, f"Incorrect key: {KEY}"),
    "escaped refusal": reply(400, f'{{"error": "wrong key {ESCAPED}"}}'),
    "refusal in HTML": reply(403, "".join(f"&#{ord(letter)};" for letter in KEY)),
    "refusal with an address": reply(403, f"see /login?back={urllib.parse.quote(f'a&key={KEY}', safe='')}"),
    "cut": reply(400, f"{'x' * 985}{KEY}"),
    "cut after space": reply(400, f"{' ' * 9_985}{KEY}"),
    "cut in an escape": reply(400, f"{' ' * 9_940}{ESCAPED}"),
    "redirection": reply(302, "", header=f"Location: https://host/?key={KEY}\r\n"),
    "server's error": reply(500, f"cannot log {KEY}"),
    "no JSON": reply(200, f"hello {KEY}"),
    "no choices": reply(200, json.dumps({"error": {"message": f"key {KEY}"}})),
    "long key in JSON": reply(200, json.dumps({"a": "x" * 140, "key": KEY})),
    "header": b"HTTP/1.1 200 OK\r\nContent-Length: " + KEY.encode() + b"\r\nBroken " + KEY.encode() + b"\r\n\r\n",
    "judgement": reply(200, json.dumps({"choices": [{"message": {"content": f"You sent {KEY}. [[1]]"}}]})),
    "too long": reply(200, KEY * 50_000),
    "nested": reply(200, f'{{"{KEY}": ' + "[" * 200_000),
}


def raised(error):
    raise error


def noted():
    error = RuntimeError("see the note")
    error.add_note(f"key={KEY}, url={URL!r}")
    raise error


def chained():
    try:
        raise KeyError(URL)
    except KeyError as error:
        raise RuntimeError("another") from error


def said():
    print(f"key {KEY}")
    logging.getLogger("somebody").error("connecting to %s", URL)
    warnings.warn(f"deprecated: {KEY!r}", stacklevel=1)
    raise RuntimeError(html.escape(f"<{KEY}>"))


ERRORS = {
    "message": lambda: raised(RuntimeError(f"Invalid header value {f'Bearer {KEY}'.encode()!r}")),
    "environment": lambda: raised(RuntimeError(f"unset: {dict(os.environ)}")),
    "connection": lambda: raised(OSError(5, f"no way to {URL}")),
    "note": noted,
    "chain": chained,
    "streams": said,
    "memory": lambda: raised(MemoryError(KEY)),
    "warning": lambda: RunResult(
        status="diverged",
        headline="accuracy",
        warnings=[f"sent {KEY}"],
        environment={"proxy": URL},
        data={f"of {KEY}": [f"and {URL}"]},
    ),
}
FAST = ["status line", "escaped refusal", "cut", "judgement", "nested", "note", "streams", "warning"]


@pytest.fixture
def planted(home, monkeypatch):
    monkeypatch.setenv("BASISADAPT_JUDGE_KEY", f" {KEY}\n")
    monkeypatch.setenv("SOME_DATABASE_URL", URL)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return home


def assert_clean(folder: Path, *texts: str) -> None:
    """Nothing of a secret in what was said, nor in any file: databases, artifacts, reports."""
    files = {str(path): path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()}
    for name, text in {**files, **dict(enumerate(texts))}.items():
        # Escaped once or twice, by JSON or an address.
        unescaped = urllib.parse.unquote(html.unescape(text))
        for secret in (KEY, PASSWORD):
            for part in (secret[:8], secret[-8:]):
                assert part not in text, name
                assert part not in unescaped, name
                assert part not in "".join(text.split("\\")), name
                assert "".join(f"\\u{ord(letter):04x}" for letter in part) not in text, name


@pytest.mark.parametrize("names", [FAST, pytest.param([*REPLIES, *ERRORS], marks=pytest.mark.slow)], ids=["few", "all"])
def test_no_failed_cell_tells_a_secret(planted, fake, capfd, names):
    def fail(config):
        name = names[config.seed]
        if name in ERRORS:
            return ERRORS[name]()
        raise RuntimeError(judge(name).ask([{"role": "user", "content": "?"}]))

    def judge(name):
        place = f"http://{server.place}/{urllib.parse.quote(name)}"
        return EndpointJudge(place, "tester", os.environ["BASISADAPT_JUDGE_KEY"], pause=0.001)

    fake.run = lambda config, **_: fail(config)
    with (
        pytest.MonkeyPatch.context() as patch,
        Server(lambda path: REPLIES[urllib.parse.unquote(path).split("/")[1]]) as server,
    ):
        patch.setattr("basisadapt.training.running.run", fake.run)
        seeds = ",".join(map(str, range(len(names))))
        code = main(["tiny.yaml", "--seeds", seeds, "--set", "sweep.basis=sinc", "--output", "out"])
    out, err = capfd.readouterr()
    assert code == 1
    assert err.count("failed: ") + err.count("diverged") == 2 * len(names)  # beside LoRA
    assert_clean(planted, out, err)
    assert "***" in err
    assert "***" in (planted / "out" / "report.html").read_text()
    assert any("***" in path.read_text() for path in planted.rglob("traceback.txt"))


ADDRESSES = {
    "password": "postgresql+nothing://me:{}@host/db",
    "user with an at sign": "postgresql+nothing://me@corp:{}@host/db",
    "user with a slash": "postgresql+nothing://corp/me:{}@host/db",
    "query": "postgresql+nothing://host/db?user=me&password={}",
    "spaces": "postgresql+nothing://me:{} and more@host/db",
    "server": "http://me:{}@127.0.0.1:9",
}


@pytest.mark.parametrize("kind", ADDRESSES)
def test_no_refusal_tells_a_password(planted, fake, capfd, kind):
    address = ADDRESSES[kind].format(PASSWORD)
    calls = [
        ["tiny.yaml", "--tracking-uri", address, "--debug"],
        ["tiny.yaml", f"--storage={address}", "--debug", "--output", "out"],
        ["tiny.yaml", "--tracking-uri", address, "--storage", address],
        ["--ui", "--tracking-uri", address, "--bad"],
        ["tiny.yaml", "--plugin", address],
        ["tiny.yaml", "--set", address],
        [address],
    ]
    for arguments in calls:
        assert main(arguments) != 0, arguments
    assert_clean(planted, *capfd.readouterr())


def test_a_server_that_fails_while_it_is_read(planted, fake, capfd):
    experiment = {"experiment": {"experiment_id": "1", "name": "tiny", "lifecycle_stage": "active"}}

    def answer(path):
        return reply(200, json.dumps(experiment)) if "get-by-name" in path else reply(500, f"I am me:{PASSWORD}")

    with Server(answer) as server:
        code = main(["--report", "tiny.yaml", "--tracking-uri", f"http://me:{PASSWORD}@{server.place}"])
    out, err = capfd.readouterr()
    assert code == 1
    assert "Traceback" not in err
    assert err.startswith("basisadapt: error: the record cannot be read or written any more")
    assert "***" in err
    assert_clean(planted, out, err)


def test_the_server_of_the_pages_is_not_told_aloud(planted, monkeypatch, capfd):
    """Neither in the list of processes nor in what it says."""
    import subprocess
    import sys

    from basisadapt.study.record import ui

    started = []
    start = subprocess.Popen

    def popen(command, **options):
        started.append(command)
        program = "import os, sys; sys.exit(os.environ['MLFLOW_BACKEND_STORE_URI'] + ' is not there')"
        return start([sys.executable, "-c", program], **options)

    monkeypatch.setattr(ui.subprocess, "Popen", popen)
    assert main(["--ui", "--tracking-uri", URL]) == 2
    out, err = capfd.readouterr()
    assert PASSWORD not in str(started)
    assert "://me:***@host/db is not there" in err
    assert_clean(planted, out, err)
