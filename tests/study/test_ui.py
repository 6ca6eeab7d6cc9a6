"""MLflow's pages: served to this machine alone, and gone with the one who asked for them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from basisadapt.study.record import ui


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_the_pages_are_served_until_ctrl_c_or_whatever_ends_the_program(home, fake, study, end):
    study("tiny.yaml", "--seeds", "1")
    command = [sys.executable, "-m", "basisadapt.study", "--ui"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = program.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:5")
        family = psutil.Process(program.pid).children(recursive=True)
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert (answer.status, answer.read()) == (200, b"OK")
        listening = [c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        assert set(listening) == {"127.0.0.1"}
    finally:
        program.send_signal(end)
    assert program.wait(60) == (-end if end == signal.SIGKILL else 0)
    deadline = time.monotonic() + 30
    while any(process.is_running() for process in family):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:1", "is a server already"),
        ("sqlite:///absent.db", "nothing is recorded in 'sqlite:///absent.db'"),
        ("sqlite:///tiny.yaml", "file is not a database"),
    ],
)
def test_what_cannot_be_served(folder, study, uri, message):
    code, out, err = study("--ui", "--tracking-uri", uri)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_servers_that_start_at_once_have_ports_of_their_own(home, fake, study):
    study("tiny.yaml", "--seeds", "1")
    command = [sys.executable, "-m", "basisadapt.study", "--ui"]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        addresses = {program.stdout.readline().split()[0] for program in programs}
        assert len(addresses) == 2
        for address in addresses:
            with urllib.request.urlopen(f"{address}/health") as answer:
                assert answer.read() == b"OK"
    finally:
        for program in programs:
            program.send_signal(signal.SIGINT)
    assert [program.wait(60) for program in programs] == [0, 0]


def test_a_port_that_is_found_is_taken():
    with ui._listen() as first, ui._listen() as second:
        assert second.getsockname()[1] > first.getsockname()[1]


def test_no_port_is_free(home, fake, study, monkeypatch):
    study("tiny.yaml", "--seeds", "1")
    with ui._listen() as taken:
        monkeypatch.setattr(ui, "FIRST_PORT", port := taken.getsockname()[1])
        monkeypatch.setattr(ui, "PORTS", 1)
        code, out, err = study("--ui")
    assert (code, out, err) == (2, "", f"basisadapt: error: no port from {port} to {port} is free\n")
