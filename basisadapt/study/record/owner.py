"""Who runs a cell: a process that can be told dead from alive, so that what it left open can be closed."""

from __future__ import annotations

import functools
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process: where it is, see `here`, its number there, and when it started, since numbers are used again."""

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
        return Owner(here(), pid, _started(pid) or "")

    @staticmethod
    def parse(text: str) -> Owner:
        """What str() gave. Raises ValueError for another text."""
        host, pid, started = text.rsplit("/", 2)
        return Owner(host, int(pid), started)

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.started}"

    @property
    def is_here(self) -> bool:
        """Whether its end can be seen from here."""
        return self.host in (here(), socket.gethostname())  # the name alone was written once

    @property
    def is_dead(self) -> bool:
        """Whether it ran here and is gone, or this machine was restarted since. Of others nothing is known: False."""
        return _started(self.pid) != self.started if self.is_here else _is_earlier(self.host)


@functools.cache
def here() -> str:
    """Where a process number means the same process: host name and, on Linux, machine, PID namespace and boot.

    Containers may have one host name, and machines too.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else ""
        namespace = os.readlink("/proc/self/ns/pid")
        parts += [machine, namespace, Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    return "/".join(parts)


def _is_earlier(host: str) -> bool:
    """Whether `host` is this machine before it was started again."""
    (*place, boot), (*mine, booted) = host.split("/"), here().split("/")
    return len(mine) == 3 and bool(mine[1]) and place == mine and boot != booted


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
