"""A worker: a process of `Workers`, which reads jobs from its stdin and writes events to its stdout, a line each.

A job is {"key", "config"}. The events are {"event": "began", "key"}, {"event": "step", "key", "step", "total"} and
{"event": "ended", "key", "result", "error", "traceback"}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, NoReturn

from basisadapt.core.command import INTERRUPTED
from basisadapt.core.registry import load_plugin
from basisadapt.training.config import RunConfig
from basisadapt.training.execution.compute import compute
from basisadapt.training.execution.executor import Job, JobSettings
from basisadapt.training.execution.json_lines import end_to_mapping, to_line

PR_SET_PDEATHSIG = 1  # Linux's prctl: the signal that a process gets when its parent dies


def serve(settings: JobSettings) -> NoReturn:
    """Run jobs until stdin ends; the process then ends at once, even during a job."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    out.write("\n")  # ends a line that was printed before
    os.dup2(2, 1)  # all other output, of Python and of libraries, goes to stderr

    def say(event: str, key: str, **values: Any) -> None:
        out.write(to_line({"event": event, "key": key, **values}))
        out.flush()

    if sys.platform == "linux":  # the end of stdin has no effect while Python is blocked
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, lambda *_: None)  # the driver's Ctrl-C: only who waits for a judge takes it up
    for plugin in settings.plugins:
        load_plugin(plugin)
    gc.freeze()  # what is imported lives as long as this process; the collection before each run need not look at it
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(told,), daemon=True).start()
    while True:
        values = json.loads(told.get())
        job = Job(values["key"], RunConfig.from_mapping(values["config"]))
        say("began", job.key)
        try:
            ended = compute(job, settings, lambda key, step, total: say("step", key, step=step, total=total))
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        say("ended", job.key, **end_to_mapping(ended))


def _listen(told: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        told.put(line)
    os._exit(0)
