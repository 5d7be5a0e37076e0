"""Background: calls a function from a thread of its own, so that nobody waits for what it does."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from gradwatch.adapters import warn_safely

T = TypeVar("T")

ATTEMPTS = 3
"""How often a group of items is tried before it counts as lost."""

MOST_AT_END, END_S = 3 * ATTEMPTS, 2.0
"""Failures in a row, and seconds, after which :meth:`Background.close` has nothing more tried."""

PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause after a failure; it doubles with each further failure in a row."""

PAUSE_AT_END_S = 0.02
"""The pause after a failure once :meth:`Background.close` was called."""

MOST_CHARACTERS = 300
"""Of the first line of an error: those of a database go on with the whole statement."""

FAILED = (
    "gradwatch: {name} failed in the background with {error}. It is tried again. The training goes "
    "on, and up to {most:,} records are kept for it; the oldest are lost beyond that."
)
FULL = (
    "gradwatch: {name} takes records more slowly than the training makes them: {most:,} wait "
    "already, and the oldest are lost from now on. The training goes on."
)
LOST = "gradwatch: {name} lost {lost:,} of {records:,} records{why}. The training was not affected."
RAN_OUT = " It had not ended after wait_s={wait_s:g} s and is given up."
RECOVERED = "gradwatch: {name} works again and has received all {records:,} records."
CLOSED = "{name} is closed and takes no more steps. Make a new one for a new run."


class Background(Generic[T]):
    """Hands items to a function in a thread of its own, in order, a group at a time.

    :meth:`put` never waits. What the function has not taken yet is kept up to a limit, beyond which
    the oldest items are lost. A group at which it raises is tried again after a pause, and is lost
    after three attempts; pauses grow as long as it fails. The first failure is told by the next
    :meth:`put`, what was lost by :meth:`close`: both in the caller's thread, where filters and
    handlers of warnings are those of the program.

    The thread starts with the first item and ends with :meth:`close`. It is a daemon, so it keeps
    no program from exiting. After a fork it is the parent's alone: the child delivers nothing.
    """

    def __init__(
        self,
        call: Callable[[Sequence[T]], None],
        name: str,
        *,
        at_once: int = 1,
        most: int = 4_096,
        wait_s: float = 30.0,
    ) -> None:
        """Starts no thread yet.

        Args:
            call: Called with a group of items, oldest first; never by two threads at once.
            name: What the user called: warnings begin with it.
            at_once: The most items of a group.
            most: The most items that are kept while the function is busy or fails.
            wait_s: The longest time that :meth:`close` waits for what is kept.
        """
        self._call, self._name = call, name
        self._at_once, self._most, self._wait_s = at_once, most, wait_s
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._in_hand = 0  # items of the group that the function has been given
        self._records = self._lost = 0
        self._failures = 0  # in a row
        self._error = ""
        self._closing = self._given_up = False
        self._closed_at = 0.0
        self._told: set[str] = set()
        self._thread: threading.Thread | None = None
        self._owner = 0  # the process that has the thread

    def put(self, items: Iterable[T]) -> None:
        """Has items passed to the function soon; returns at once.

        Raises:
            RuntimeError: If this is closed.
        """
        if self._is_of_parent():  # first of all: a thread of the parent may have held the lock
            return
        with self._changed:
            if self._closing:
                raise RuntimeError(CLOSED.format(name=self._name))
            before = len(self._waiting)
            self._waiting.extend(items)
            self._records += len(self._waiting) - before
            is_full = len(self._waiting) > self._most
            while len(self._waiting) > self._most:
                self._waiting.popleft()
                self._lost += 1
            self._start()
            self._changed.notify_all()
        if self._failures:
            self._tell(FAILED)
        elif is_full:
            self._tell(FULL)

    def flush(self, seconds: float) -> bool:
        """Waits until everything has been delivered or lost; returns whether it has been."""
        if self._is_of_parent():
            return True
        with self._changed:
            return self._changed.wait_for(self._is_idle, seconds)

    def close(self) -> None:
        """Delivers what waits, for a limited time, and says what is lost; safe to call again."""
        if self._is_of_parent() or self._closing:
            return
        with self._changed:
            self._closing, self._closed_at = True, time.monotonic()
            self._changed.notify_all()
        in_time = True
        try:
            in_time = self._end()
        finally:  # also if the user interrupts it
            with self._changed:
                self._given_up = True  # ends the thread once the function returns
                self._lost += len(self._waiting) + self._in_hand
                self._waiting.clear()
            self._tell_end(in_time)

    def _end(self) -> bool:
        """Waits until all is delivered or lost; returns whether that was in time."""
        if self._thread is None:
            # Nothing waits, or else the interpreter exits, and has let no thread start.
            self._deliver_all(time.monotonic() + self._wait_s)
            return self._is_idle()
        with self._changed:
            return self._changed.wait_for(self._is_idle, self._wait_s)

    def _is_of_parent(self) -> bool:
        return self._owner not in (0, os.getpid())

    def _is_idle(self) -> bool:
        return not self._waiting and not self._in_hand

    def _start(self) -> None:
        if self._thread is not None:
            return
        # In the context of the training: trackio.log(), say, looks there for its run.
        run = contextvars.copy_context().run
        thread = threading.Thread(
            target=run, args=(self._deliver_all,), name=self._name, daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the interpreter exits: close() delivers what waits
            return
        self._thread, self._owner = thread, os.getpid()

    def _deliver_all(self, deadline: float = float("inf")) -> None:
        """Passes groups on until there is none left and this is closed."""
        while group := self._next_group():
            self._deliver(group)
            with self._changed:
                self._in_hand = 0
                self._changed.notify_all()
            if time.monotonic() > deadline:
                return

    def _next_group(self) -> list[T]:
        """Waits for the next group; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._given_up:
                return []
            # A service that is down at the end is not tried with every single record.
            if self._closing and self._is_down():
                self._lost += len(self._waiting)
                self._waiting.clear()
                return []
            group = list(islice(self._waiting, self._at_once))
            for _ in group:
                self._waiting.popleft()
            self._in_hand = len(group)
            return group

    def _is_down(self) -> bool:
        long = time.monotonic() - self._closed_at > END_S
        return self._failures >= MOST_AT_END and long

    def _deliver(self, group: list[T]) -> None:
        for _ in range(ATTEMPTS):
            try:
                self._call(group)
            # Whatever it is, SystemExit too: without its thread nothing would be delivered.
            except BaseException as error:
                self._note(error)
                self._pause()
            else:
                self._failures = 0
                return
            if self._given_up:  # close() has counted this group
                return
        with self._changed:
            if not self._given_up:
                self._lost += len(group)

    def _note(self, error: BaseException) -> None:
        self._failures += 1
        try:
            text = str(error).partition("\n")[0][:MOST_CHARACTERS]
            self._error = f"{type(error).__name__}: {text}"
        except Exception:
            self._error = type(error).__name__

    def _pause(self) -> None:
        """Waits before the next attempt; next to nothing when this is being closed."""
        seconds = min(PAUSE_S * 2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE_S)
        with self._changed:
            if not self._changed.wait_for(lambda: self._closing, seconds):
                return
        time.sleep(PAUSE_AT_END_S)

    def _tell_end(self, in_time: bool) -> None:
        if self._lost:
            why = f" ({self._error})" if self._error else ""
            text = LOST.format(name=self._name, lost=self._lost, records=self._records, why=why)
            warn_safely(text if in_time else text + RAN_OUT.format(wait_s=self._wait_s))
        elif FAILED in self._told:
            self._tell(RECOVERED)

    def _tell(self, text: str) -> None:
        """Tells something once."""
        if text not in self._told:
            self._told.add(text)
            told = {"name": self._name, "error": self._error, "most": self._most}
            warn_safely(text.format(records=self._records, **told))
