"""Programs in processes of their own that need not import first, which takes seconds: forks of a server.

A fork has one thread, and every lock that another thread of its parent held at that moment is held there for ever: of
a heartbeat that writes to a database, of a progress bar's monitor. A process with one thread has none, so programs are
forks of one: `python forked.py`, which is started with the tests, imports at the first request, and ends with its
stdin.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ADDRESS = "BASISADAPT_FORKS"  # names the server's socket to every process of the tests
IMPORTED = (
    "fakes", "pandas", "pytest", "mlflow", "basisadapt.study.__main__", "basisadapt.study.drive.engine",
    "basisadapt.study.drive.exchange", "basisadapt.study.drive.search", "basisadapt.training.__main__",
)  # fmt: skip


def start():
    """Start the server of the tests."""
    # The allocator of pyarrow would have a thread, and OpenBLAS one for each core.
    single = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **single}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, start_new_session=True, **pipes)
    os.environ[ADDRESS] = server.stdout.readline().strip()
    return server


class Forked(subprocess.Popen):
    """`python -m MODULE ARGUMENTS` or `python -c TEXT ARGUMENTS` as a fork of the server; all else is as of Popen.

    Nothing that is patched here is patched there, where figures are not drawn: see `quick`.
    """

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, process_group,
    ):  # fmt: skip
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[ADDRESS])
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        socket.send_fds(self._server, [b" "], streams)
        program = [[str(part) for part in args], os.path.abspath(cwd or "."), dict(os.environ if env is None else env)]
        self._server.sendall(json.dumps([start_new_session, *program]).encode() + b"\n")
        self._said = self._server.makefile("rb", buffering=0)  # what is not read yet keeps the socket ready
        self.pid = int(self._said.readline())
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, _deadstate=None):
        with suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._said.readline())
            self._said.close()
            self._server.close()
        return self.returncode


IN_PLACE = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # of the module, where it starts Python


def serve():
    """Part into what is asked for: a process that waits for the program, and from that the program."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := os.path.join(folder, "socket"))
        listener.listen()
        print(address, flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of those that wait, nobody asks how they ended
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            prepare()
            if os.fork() == 0:
                listener.close()
                attend(connection)
            connection.close()


@functools.cache
def prepare():
    """Import what programs need, and make it quick. Raises AssertionError if there are threads then."""
    sys.path.insert(1, str(Path(__file__).parents[2]))
    for name in IMPORTED:
        importlib.import_module(name)
    import quick

    quick.put(quick.UNDRAWN)
    quick.unhurried().__enter__()
    gc.collect()
    gc.freeze()  # what was imported stays
    threads = list(Path("/proc/self/task").glob("*"))
    assert len(threads) <= 1, [Path(thread, "comm").read_text() for thread in threads]


def attend(connection):
    """Start a program and end with it; its process id and then its exit code are lines to who has asked for it."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile() as asked:
            alone, *program = json.loads(asked.readline())
        if (child := os.fork()) == 0:
            if alone:
                os.setsid()
            connection.sendall(f"{os.getpid()}\n".encode())
            connection.close()
            code = be(streams, *program)
        else:
            for stream in streams:
                os.close(stream)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # until that is told, it can be signalled
            ended_with = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            with suppress(OSError):  # who has asked is gone
                connection.sendall(f"{ended_with}\n".encode())
            os.waitpid(child, 0)
    finally:
        os._exit(code)  # nothing of the server is to be done there


def be(streams, command, folder, environment):
    """Run a command of Python in this process, with these streams. Returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in {*streams} - {0, 1, 2}:
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
    )
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # so that it is looked up there
    sys.orig_argv, (_, way, program, *arguments) = command, command
    sys.argv = [way, *arguments]
    try:
        if way == "-c":
            exec(program, {})
            return 0
        return importlib.import_module(f"{program}.__main__").main(arguments)
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve()
