"""MLflow's UI for a record, as long as this process lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import FrameType
from typing import NoReturn

from basisadapt.core.errors import InputError
from basisadapt.study.record.stores import check_recorded

HOST, FIRST_PORT, PORTS = "127.0.0.1", 5000, 100
START_SECONDS, STOP_SECONDS = 120, 10
ENDS = (signal.SIGTERM, signal.SIGHUP)
# A process that stops the server when its stdin closes, which happens when this process ends.
WATCH = """
import os, sys, time
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), 15)
    time.sleep(1)
    os.killpg(int(sys.argv[1]), 9)
except ProcessLookupError:
    pass
"""


def serve(tracking_uri: str) -> None:
    """Serve MLflow's UI on this machine until Ctrl-C, SIGTERM, or the end of the terminal or of this process.

    No process of the server is left then. Raises InputError if the store is missing, no port is free, or the server
    does not start.
    """
    if tracking_uri.startswith(("http:", "https:")):
        raise InputError(f"--ui serves a local store; {tracking_uri!r} is a server already")
    check_recorded(tracking_uri)
    listening = _listen()
    port = listening.getsockname()[1]
    address, command = f"http://{HOST}:{port}", ["mlflow", "server", "--host", HOST, "--port", str(port)]
    before = {number: signal.signal(number, _interrupt) for number in ENDS}
    # No jobs: their processes would be outside of the group.
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    store = {"MLFLOW_BACKEND_STORE_URI": tracking_uri}  # every user of the machine could read an argument
    with listening:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--workers", "1", "--uvicorn-opts", "--fd 0"],
            env={**os.environ, **quiet, **store},
            stdin=listening.fileno(),  # and not the port alone, which could be taken before the server is up
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    reader = threading.Thread(target=_pass_on, args=(server,), daemon=True)
    reader.start()
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(server.pid)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        _wait_for(f"{address}/health", server)
        print(f"{address}  shows {tracking_uri}; Ctrl-C ends it", flush=True)
        server.wait()
        raise InputError(f"MLflow's server ended by itself, with exit code {server.returncode}")
    except KeyboardInterrupt:
        pass
    finally:
        _stop(server)
        reader.join(STOP_SECONDS)
        watch.communicate()
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(server: subprocess.Popen[str]) -> None:
    """Forward the server's stderr through this process's, which redacts secrets."""
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _listen() -> socket.socket:
    """A socket that listens at the first free port, which nobody else can take until every copy of it is closed."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen()
        except OSError:
            listening.close()
        else:
            return listening
    raise InputError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free")


def _wait_for(address: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise InputError(f"MLflow's server did not come up (exit code {server.poll()})")


def _stop(server: subprocess.Popen[str]) -> None:
    """Stop the whole group: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_SECONDS)
        except ProcessLookupError:
            break  # no process of the group is left
        except subprocess.TimeoutExpired:
            continue
    server.wait()
