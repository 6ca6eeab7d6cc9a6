"""Who runs a cell: a process that can be told dead from alive, so that what it left open can be closed."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process: host, process id, and when it started, since process ids are used again."""

    host: str
    pid: int
    started: str

    @staticmethod
    def me() -> Owner:
        """This process."""
        return Owner.of(os.getpid())

    @staticmethod
    def of(pid: int) -> Owner:
        """The process with the number `pid`, on this host."""
        return Owner(socket.gethostname(), pid, _started(pid) or "")

    @staticmethod
    def parse(text: str) -> Owner:
        """What str() gave."""
        host, pid, started = text.rsplit("/", 2)
        return Owner(host, int(pid), started)

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.started}"

    @property
    def is_here(self) -> bool:
        """Whether it ran on this host, so that its end can be seen."""
        return self.host == socket.gethostname()

    @property
    def is_dead(self) -> bool:
        """Whether it ran on this host and is gone. Of other hosts nothing is known: False."""
        return self.is_here and _started(self.pid) != self.started


def _started(pid: int) -> str | None:
    """When the process `pid` started, in a form that only compares for equality; None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # The command's name, in parentheses, may hold anything; state and start time (field 22) follow it.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil  # type: ignore[import-untyped]

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
