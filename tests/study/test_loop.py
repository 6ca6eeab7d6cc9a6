"""Cells at an executor, with stores and processes that are none."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from basisadapt.study.drive import loop
from basisadapt.training.execution.executor import Died, Ended


class Stub:
    """Answers every call with None, and keeps it: (name, its first argument's key)."""

    def __init__(self):
        self.said = []

    def __getattr__(self, name):
        return lambda *values: self.said.append((name, *(getattr(value, "key", value) for value in values[:1])))


class Book(Stub):
    """elsewhere: for how many looks another process is at a cell; lost: cells that another has taken over."""

    def __init__(self, elsewhere=(), lost=()):
        super().__init__()
        self.running, self.elsewhere, self.lost = {}, dict(elsewhere), set(lost)

    def start(self, cell, waits):
        if cell.key in self.elsewhere or cell.key in self.lost:
            return False
        self.running[cell.key] = SimpleNamespace(cell=cell)
        return True

    def finish(self, ended):
        del self.running[ended.key]
        self.said.append(("finish", ended.key, ended.error))
        return "done"

    def cut_off(self, key, reason):
        self.said.append(("cut off", key, reason))
        return self.running.pop(key).cell

    def of_others(self, cells):
        self.elsewhere = {key: left - 1 for key, left in self.elsewhere.items()}
        busy = [cell for cell in cells if self.elsewhere.get(cell.key, 0) > 0]
        self.elsewhere = {key: left for key, left in self.elsewhere.items() if left > 0}
        return busy, [cell for cell in cells if cell not in busy and cell.key not in self.lost]


class Executor(Stub):
    """dies: key to how often a cell's process does. most: the jobs that it ever had at once."""

    def __init__(self, slots=1, dies=(), on_wait=lambda: None):
        super().__init__()
        self.slots, self.dies, self.jobs, self.most, self.on_wait = slots, dict(dies), [], 0, on_wait

    def submit(self, job):
        self.jobs.append(job.key)
        self.most = max(self.most, len(self.jobs))

    def wait(self, on_step):
        self.on_wait()
        key = self.jobs.pop(0)
        if self.dies.get(key, 0):
            self.dies[key] -= 1
            return Died(key, "killed by SIGKILL")
        return Ended(key)


def cells(names):
    return [SimpleNamespace(key=name, config=None) for name in names]


def run(names, book, executor, interrupt=None):
    interrupt = interrupt or SimpleNamespace(asked=False, held=nullcontext)
    progress = Stub()
    loop.Loop(cells(names), book, executor, interrupt, progress).run()
    return progress.said


def test_slots_are_kept_full_and_every_cell_is_recorded():
    book, executor = Book(), Executor(slots=2)
    run("abcde", book, executor)
    assert sorted(key for _, key, _ in book.said) == list("abcde")
    assert (executor.most, book.running) == (2, {})


def test_a_cell_whose_process_dies_is_tried_once_more():
    book = Book()
    said = run("ab", book, Executor(dies={"a": 1, "b": 2}))
    assert ("cut off", "a", "killed by SIGKILL") in book.said
    assert ("finish", "a", "") in book.said
    assert ("finish", "b", "killed by SIGKILL, twice") in book.said
    assert said.count(("drop", "a")) == said.count(("drop", "b")) == 1


def test_cells_of_other_processes_are_waited_for(monkeypatch):
    naps = []
    monkeypatch.setattr(loop.time, "sleep", naps.append)
    book = Book(elsewhere={"a": 2}, lost={"b"})
    said = run("abc", book, Executor())
    assert [key for _, key, _ in book.said] == ["c", "a"]
    assert ("end_elsewhere", "b") in said
    assert said.count(("wait", "a")) == len(naps)


def test_an_interrupt_ends_after_the_cells_that_run():
    interrupt = SimpleNamespace(asked=False, held=nullcontext)
    book, executor = Book(), Executor(on_wait=lambda: setattr(interrupt, "asked", True))
    with pytest.raises(KeyboardInterrupt):
        run("abc", book, executor, interrupt)
    assert [key for _, key, _ in book.said] == ["a"]


def test_what_raises_cuts_off_what_is_at_work():
    def fails():
        raise RuntimeError("no executor any more")

    book, executor = Book(), Executor(slots=2, on_wait=fails)
    with pytest.raises(RuntimeError, match="no executor any more"):
        run("abc", book, executor)
    assert book.said == [("cut off", "a", ""), ("cut off", "b", "")]
    assert (("stop",) in executor.said, book.running) == (True, {})
