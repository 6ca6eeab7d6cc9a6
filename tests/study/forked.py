"""Programs in processes of their own that have imported already what this one has, which else takes seconds."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import traceback

from basisadapt.core import registry


class Forked(subprocess.Popen):
    """`python -m MODULE ARGUMENTS` or `python -c TEXT` as a fork of this process; all else is as of Popen.

    What is patched here is patched there; plug-ins are imported anew.
    """

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, process_group,
    ):  # fmt: skip
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if start_new_session:
                    os.setsid()
                code = _run([str(part) for part in args], env, (p2cread, c2pwrite, errwrite))
            finally:
                os._exit(code)  # nothing of this process is to be done there, such as the end of the tests
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _run(command, environment, streams):
    """Be the program. Returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        if stream not in (-1, number):
            os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
    )
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for name in [name for name in sys.modules if name.startswith(registry.FILE)]:
        del sys.modules[name]
    registry._plugins.clear()
    sys.orig_argv, (_, way, program, *arguments) = command, command
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
