"""The process that runs a cell, identified so that others can see whether it is dead and close its open runs."""

from __future__ import annotations

import functools
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process.

    host: where its id is valid, see `here`.
    pid: its process id.
    started: its start time, since ids are reused.
    """

    host: str
    pid: int
    started: str

    @staticmethod
    def me() -> Owner:
        """This process."""
        return Owner.of(os.getpid())

    @staticmethod
    def of(pid: int) -> Owner:
        """The process with the id `pid` on this host."""
        return Owner(here(), pid, _started(pid) or "")

    @staticmethod
    def parse(text: str) -> Owner:
        """The inverse of str(). Raises ValueError for any other text."""
        host, pid, started = text.rsplit("/", 2)
        return Owner(host, int(pid), started)

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.started}"

    @property
    def is_here(self) -> bool:
        """Whether this process can see its end."""
        return self.host in (here(), socket.gethostname())  # older records have the name alone

    @property
    def is_dead(self) -> bool:
        """Whether it ran here and has ended, or this machine has rebooted since. False if unknown, on other hosts."""
        return _started(self.pid) != self.started if self.is_here else _is_earlier(self.host)


@functools.cache
def here() -> str:
    """The scope of a process id: the host name and, on Linux, machine, PID namespace and boot.

    Containers, and machines, may share a host name.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else ""
        namespace = os.readlink("/proc/self/ns/pid")
        parts += [machine, namespace, Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    return "/".join(parts)


def _is_earlier(host: str) -> bool:
    """Whether `host` is this machine before its last boot."""
    (*place, boot), (*mine, booted) = host.split("/"), here().split("/")
    return len(mine) == 3 and bool(mine[1]) and place == mine and boot != booted


def _started(pid: int) -> str | None:
    """The start time of the process `pid`, only comparable for equality; None if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # The command's name, in parentheses, may hold anything; state and start time (field 22) follow it.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
