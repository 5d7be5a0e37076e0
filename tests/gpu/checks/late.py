"""Numbers that come late: what is asked for meanwhile does not wait, and sinks get all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradwatch.testing import CapturingSink
from tests.gpu.place import Count, Place
from tests.gpu.registry import Found, check, require
from tests.gpu.training import Many, Training, relative


@check()
def late_numbers(place: Place) -> Found:
    """With the device kept busy a step returns at once, and in the end its numbers are right."""
    expected = Training({}, steps=20).run("cpu").norms
    took: list[float] = []

    def after(watcher: Any, step: int) -> None:
        start = time.perf_counter()
        watcher.postfix()
        took.append(time.perf_counter() - start)

    with place.late():
        training = Training({}, steps=20, before_step=lambda step: place.busy(20), after=after)
        training.run(place.device)
    error = relative(training.norms, expected)
    require(error < 1e-3, f"norms {training.norms[:4]}, expected {expected[:4]}")
    require(place.small or max(took) < 0.01, f"postfix() took {max(took):.3f} s")
    return {"largest relative difference": error, "postfix (ms)": round(1e3 * max(took), 3)}


@check()
def threads(place: Place) -> Found:
    """Another thread reads the history while the training goes on."""
    errors: list[str] = []
    watchers: list[Any] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                for watcher in watchers[:1]:
                    norms = watcher.history.steps()["grad_norm"]
                    require(bool((norms > 0).all()), f"norms {norms.tolist()}")
            except Exception as error:
                errors.append(repr(error))
            over.wait(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with place.late():
            Training({}, steps=50, after=lambda watcher, _: watchers.append(watcher)).run(
                place.device
            )
    finally:
        over.set()
        reader.join()
    require(not errors, str(errors[:2]))
    return {}


@check()
def delivery(place: Place) -> Found:
    """A sink gets all steps in order and some of them during the run, and nothing waits for it."""
    return _delivered(place, seconds=0.0)


@check()
def delivery_of_long_steps(place: Place) -> Found:
    """The same where a step takes longer than the 5 s between deliveries."""
    return _delivered(place, seconds=6.0)


def _delivered(place: Place, seconds: float) -> Found:
    steps = 200 if not seconds else 10
    sink, count = CapturingSink(), {}
    for watched in (True, False):
        with place.late(polls=1):
            many = Many(place, 10, {"sinks": [sink]} if watched else None)
            count[watched] = _counted(place, many, steps, seconds)
            early = len(sink.steps)
            many.close()
        if watched:
            numbers = [record.step for record in sink.steps]
            require(numbers == list(range(1, many.warm_up + steps + 1)), f"steps {numbers}")
            require(early > 0, "nothing was delivered before the end")
    waits = count[True].waits - count[False].waits
    require(waits == 0, f"{waits:g} waits in {steps} steps")
    return {"delivered during the run": early, "waits": waits}


def _counted(place: Place, many: Many, steps: int, seconds: float) -> Count:
    with place.counting() as count, _a_clock_that_jumps() as jump:
        for _ in range(steps):
            many.step()
            jump(seconds)
    return count


@contextmanager
def _a_clock_that_jumps() -> Iterator[Any]:
    """Makes the clocks of the process go forward by as much as the function is told."""
    clocks = {name: getattr(time, name) for name in ("perf_counter", "monotonic")}
    ahead = [0.0]

    def jump(seconds: float) -> None:
        ahead[0] += seconds

    for name, clock in clocks.items():
        setattr(time, name, lambda clock=clock: clock() + ahead[0])
    try:
        yield jump
    finally:
        for name, clock in clocks.items():
            setattr(time, name, clock)
