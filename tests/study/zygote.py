"""A process that has imported everything and parts into drivers, each of which is then there in no time.

A line on its stdin is {"folder", "arguments"}, answered by a driver's process id; or {"wait": id}, answered by its exit
code.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def drive(folder, arguments):
    """Be a driver: `python -m basisadapt.study` with runs that take no time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import traceback

    import fakes
    import pandas  # noqa: F401

    from basisadapt.study.__main__ import main
    from basisadapt.study.drive import engine, exchange, search  # noqa: F401

    fakes.Fakes(seconds=0.05).install()
    print("ready", flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        if "wait" in told:
            print(os.waitstatus_to_exitcode(os.waitpid(told["wait"], 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            drive(told["folder"], told["arguments"])
