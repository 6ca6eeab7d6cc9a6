"""Many messages put to one judge, several at once, until all are answered, one fails, or the user has had enough."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from basisadapt.tasks.judge import Judge, Message

AT_ONCE = 8  # judgements asked for at the same time
LOOK = 0.2  # seconds between two looks at whether Ctrl-C was pressed
PATIENCE, TIMES = 1.0, 3.0  # a judge hangs that is silent for so many seconds and so many times longer than before


def ask_all(judge: Judge, asked: Sequence[Sequence[Message]]) -> list[str]:
    """What the judge says to each, in their order.

    Raises what the judge raises, and asks no more then; what was asked already is waited for, as it is paid for. No
    KeyboardInterrupt waits for the judge. A Ctrl-C that whoever runs this means to answer later, at the end of the
    run, becomes a KeyboardInterrupt here where the judge hangs.
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
                _empty(todo)
                said.put((place, error))

    # Daemons, for which no interpreter waits at its end: a pool's threads would hold it until the judge has answered.
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


def _empty(todo: queue.SimpleQueue[int]) -> None:
    try:
        while True:
            todo.get_nowait()
    except queue.Empty:
        return


@contextmanager
def _presses() -> Iterator[list[int]]:
    """Inside, a list that grows with every Ctrl-C, beside what that does anyway; outside of the main thread, where
    Python lets no one listen, it stays empty."""
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
