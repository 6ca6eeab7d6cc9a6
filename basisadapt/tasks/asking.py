"""Sends many messages to one judge, several at a time, until all are answered, one fails, or the user interrupts."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from basisadapt.tasks.judge import Judge, Message

AT_ONCE = 8  # concurrent requests
LOOK = 0.2  # seconds between two checks for Ctrl-C
# After Ctrl-C, a judge counts as hanging after PATIENCE seconds of silence, or TIMES its longest silence before.
PATIENCE, TIMES = 1.0, 3.0


def ask_all(judge: Judge, asked: Sequence[Sequence[Message]]) -> list[str]:
    """The judge's answers to the messages `asked`, in their order.

    If the judge raises, its exception is raised after the pending requests, which are paid for, have finished; no
    further ones are sent. A KeyboardInterrupt does not wait for the judge. If the caller's handler of Ctrl-C only takes
    note of it, to stop after this run, and the judge hangs, this raises KeyboardInterrupt.
    """
    todo, said = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, str | BaseException]]()
    for place in range(len(asked)):
        todo.put(place)

    def ask() -> None:
        while True:
            try:
                place = todo.get_nowait()
            except queue.Empty:
                return
            try:
                said.put((place, judge.ask(asked[place])))
            except BaseException as error:
                with suppress(queue.Empty):
                    while True:
                        todo.get_nowait()
                said.put((place, error))

    # Daemon threads, for which the interpreter does not wait at exit; it would wait for the threads of a pool.
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(min(AT_ONCE, len(asked)))]
    for thread in threads:
        thread.start()
    texts: dict[int, str] = {}
    last, longest = time.monotonic(), 0.0
    with _presses() as pressed:
        while len(texts) < len(asked):
            try:
                place, text = said.get(timeout=LOOK)
            except queue.Empty:
                if pressed and time.monotonic() - last > max(PATIENCE, TIMES * longest):
                    raise KeyboardInterrupt from None
                continue
            if isinstance(text, BaseException):
                for thread in threads:
                    thread.join()
                raise text
            texts[place] = text
            last, longest = time.monotonic(), max(longest, time.monotonic() - last)
    return [texts[place] for place in range(len(asked))]


@contextmanager
def _presses() -> Iterator[list[int]]:
    """Yield a list that grows with every Ctrl-C, in addition to what the previous handler does.

    Outside the main thread, where Python allows no signal handlers, it stays empty.
    """
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed
        return

    def press(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
