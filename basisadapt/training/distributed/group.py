"""A group of processes: starting it, receiving its reports, and ending it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist

from basisadapt.core.errors import InputError
from basisadapt.core.registry import load_plugin, loaded_plugins

T = TypeVar("T")
Report = Callable[[Any], None]


def check_processes(processes: int) -> None:
    """Raise InputError unless there is a GPU for every process; without any GPU, all run on the CPU."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if processes > devices:
        raise InputError(f"train.processes is {processes}, one for each GPU, but there are only {devices}")


def in_group() -> bool:
    """Whether this process belongs to a group that trains together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in its group; 0, which saves and reports, outside one."""
    return dist.get_rank() if in_group() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if in_group() else 1


def run_in_processes(
    function: Callable[..., Any], arguments: Sequence[Any], processes: int, on_report: Report | None = None
) -> Any:
    """Call `function(*arguments, report)` in every process of a new group. Returns the result of process 0.

    - `function`: a function at the top level of its module. It, its arguments and its result are pickled.
    - `processes` (int): the size of the group.
    - `on_report` (default None): called here with every value that process 0 passes to `report`.

    The plug-ins of this process are loaded in all of them. Each process imports the main program, which must therefore
    start its work under `if __name__ == "__main__"`. No process is left at the end, however it comes. Raises the
    exception of the first process that fails, with its traceback in a note, or RuntimeError if a process dies.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        members: dict[Connection, Any] = {}
        for number in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            place = (number, processes, str(Path(folder) / "meeting"))
            process = context.Process(target=_member, args=(place, loaded_plugins(), theirs, function, arguments))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            theirs.close()
            members[ours] = process
        return _listen(members, on_report)


def _listen(members: dict[Connection, Any], on_report: Report | None) -> Any:
    """Receive messages until all processes are done. Returns the result of process 0."""
    waiting, result = list(members), None
    while waiting:
        for pipe in wait(waiting):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pickle.loads(pipe.recv_bytes())  # of a process of ours
            except EOFError:
                kind, value = "failed", None
            if kind == "report" and on_report is not None:
                on_report(value)
            if kind == "failed":
                raise _cause(members, pipe, value)
            if kind == "done":
                waiting.remove(pipe)
                result = value if pipe is next(iter(members)) else result
    for process in members.values():
        process.join()
    return result


def _cause(members: dict[Connection, Any], pipe: Connection, error: BaseException | None) -> BaseException:
    """The exception to raise. If a process died, that is the cause: the others' errors only follow from it."""
    if error is None:
        members[pipe].join()
    for number, process in enumerate(members.values()):
        if process.exitcode:
            return RuntimeError(f"process {number} of {len(members)} died with exit code {process.exitcode}")
    return error or RuntimeError("a process ended before its work was done")


def _member(
    place: tuple[int, int, str], plugins: Sequence[str], pipe: Connection, function: Callable[..., Any], arguments: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    number = place[0]

    def say(kind: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, value)))  # `send` would leave tensors in this process' shared memory

    def report(value: Any) -> None:
        if number == 0:
            say("report", value)

    try:
        for plugin in plugins:
            load_plugin(plugin)
        _join(*place)
        result = function(*arguments, report)
        dist.barrier()
        say("done", result if number == 0 else None)
        dist.destroy_process_group()
    except BaseException as error:
        say("failed", _portable(error))
        threading.Event().wait()  # until it is killed: if it ended now, the others would fail too


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error, if it can be sent, with its traceback in a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _join(number: int, processes: int, meeting: str) -> None:
    """Join the group, with the environment variables that accelerate reads."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    # They meet in a file and use the loopback interface, so no port is open to others.
    for _, interface in socket.if_nameindex():
        if interface.startswith("lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(number)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{meeting}", rank=number, world_size=processes
    )


def sum_over_group(number: float) -> float:
    """The sum of the numbers that the processes pass. All processes of the group must call it."""
    return _reduced(number, dist.ReduceOp.SUM)


def lowest_in_group(number: float) -> float:
    """The lowest of the numbers that the processes pass. All processes of the group must call it."""
    return _reduced(number, dist.ReduceOp.MIN)


def _reduced(number: float, how: Any) -> float:
    if not in_group():
        return number
    values = torch.tensor(number, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(values, how)
    return values.item()


def on_rank_zero(function: Callable[..., T]) -> Callable[..., T]:
    """The function, called only in process 0; all processes get its result, which is pickled."""

    def call(*arguments: Any) -> T:
        result = [function(*arguments) if rank() == 0 else None]
        if in_group():
            dist.broadcast_object_list(result)
        return cast(T, result[0])

    return call


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder, the same in all processes of the group; it is removed when all have left the context."""
    with contextlib.ExitStack() as stack:
        path = [stack.enter_context(tempfile.TemporaryDirectory()) if rank() == 0 else ""]
        if in_group():
            dist.broadcast_object_list(path)
        yield Path(path[0])
        if in_group():
            dist.barrier()
