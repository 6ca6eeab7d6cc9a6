"""Forks of the server: nothing of this process is in them, but what a new process would have."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
from forked import Forked
from tqdm import tqdm

SOUND = "from tqdm import tqdm\n\nwith tqdm.get_lock():\n    print(sum(tqdm(range(4), disable=True)))"


def test_what_a_thread_holds_as_a_program_is_started_holds_it_up_in_no_fork():
    """As the monitor of a progress bar does; a fork of this process would wait for the lock for ever."""
    held, ended = threading.Event(), threading.Event()

    def hold():
        with tqdm.get_lock():
            held.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    program = Forked([sys.executable, "-c", SOUND], stdout=subprocess.PIPE, text=True)
    try:
        assert program.communicate(timeout=60) == ("6\n", None)
    finally:
        ended.set()
        thread.join()
        program.kill()
    assert program.returncode == 0


def test_a_fork_is_as_a_process_of_popen(tmp_path):
    text = "import os, sys; print(os.getcwd(), sys.argv[1:], os.environ, os.getpgid(0) == os.getpid()); input(); 1 / 0"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    alone = {"cwd": tmp_path, "env": {"A": "b"}, "start_new_session": True}
    program = Forked([sys.executable, "-c", text, "one", "two"], **pipes, **alone)
    assert program.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.01)
    out, err = program.communicate("go on\n", timeout=60)
    assert out == f"{tmp_path} ['one', 'two'] environ({{'A': 'b'}}) True\n"
    assert err.endswith("ZeroDivisionError: division by zero\n")
    assert program.returncode == 1

    killed = Forked([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    killed.kill()
    assert killed.wait() == killed.poll() == -signal.SIGKILL
    killed.stdin.close()
