"""SharedRun: sees what is logged to a run of W&B, and when the run ends."""

from __future__ import annotations

import atexit
import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import wandb

from gradwatch.adapters import warn_safely
from gradwatch_loggers.wandb_steps import RunSteps

SHIFTED = (
    "gradwatch: run.log(step={step}) came after rows without a step, beside which gradwatch had "
    "written rows of its own. W&B would drop it, so its step is raised to {raised}, and so are "
    "those that follow. To keep your steps, write WandbSink(live=False)."
)
NOT_YET = (
    "gradwatch: W&B did not take a row of gradwatch, because of {kind}: {error}. What waits "
    "({rows:,} rows) is tried again."
)
LOST = (
    "gradwatch: W&B did not take what waited until the end of the run, because of {kind}: {error}. "
    "Lost: {rows:,} rows."
)
WAITING = (
    "gradwatch: {most:,} rows wait until the run of W&B ends, as its steps are counted by "
    "run.log(step=), which leaves no room for them. From now on every second of them is left out. "
    "watch(run_dir=) keeps all."
)
LEFT_OUT = (
    "gradwatch: {lost:,} rows, spread over the run, were not written to W&B, as too many waited."
)


ATTEMPTS = 3
"""How often a row is tried at the end of the run."""

NO_ALERT = "gradwatch: W&B took no alert, because of {kind}: {error}. The training goes on."


class Member(Protocol):
    """A sink that writes into the run."""

    def before_log(self) -> None:
        """Called before a row of the user's is logged; may add rows."""

    def before_end(self) -> None:
        """Called before the run ends; may add rows."""


class SharedRun:
    """One run of W&B, with all the sinks that write into it.

    It stands in for ``run.log`` and ``wandb.log`` until nothing of ours waits any more.

    Attributes:
        steps: What we write.
        lock: To be held while something is added.
        is_over: Whether the run has ended, or nobody is left who writes into it.
    """

    _all: ClassVar[dict[int, SharedRun]] = {}

    def __init__(self, run: Any, live: bool | None) -> None:
        """Begins to see what is logged; use :meth:`join`."""
        is_numbered = getattr(run.settings, "mode", "") != "shared"
        self.is_over = False
        self.lock = threading.RLock()
        self._run = run
        self._log = run.log
        self._members: dict[Member, str] = {}
        self._pid = os.getpid()
        self._told: set[str] = set()
        self.steps = RunSteps(self._log, (lambda: run.step) if is_numbered else None, live)
        self.steps.shifted = lambda step, raised: self._tell(SHIFTED, step=step, raised=raised)
        self._stand_in = self._install()

    @classmethod
    def join(cls, run: Any, member: Member, name: str, live: bool | None) -> SharedRun:
        """Returns what all sinks of a run share.

        Args:
            run: The run.
            member: The sink.
            name: What its tags should begin with; see :meth:`prefix_of`.
            live: As for :class:`RunSteps`; of two sinks that disagree, False counts.
        """
        shared = cls._all.get(id(run))
        if shared is None or shared.is_over or shared._pid != os.getpid():
            shared = cls._all[id(run)] = cls(run, live)
        elif live is not None:
            shared.steps.live = live and shared.steps.live is not False
        more = (f"{name}-{count}".strip("-") for count in itertools.count(2))
        names = itertools.chain([name], more)
        used = shared._members.values()
        shared._members[member] = next(one for one in names if one not in used)
        return shared

    def prefix_of(self, member: Member) -> str:
        """Returns what the tags of a sink begin with, so that no other sink has the same."""
        return f"{self._members[member]}/".lstrip("/")

    def define(self, tags: str, axis: str) -> None:
        """Makes a tag the x-axis of others; ``tags`` may end with a star."""
        with self.lock:
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(tags, step_metric=axis)

    def alert(self, title: str, text: str) -> None:
        """Sends an alert; what fails is a warning."""
        try:
            self._run.alert(title, text, level="ERROR")
        except Exception as error:
            self._tell_failure(NO_ALERT, error)

    def show(self, axis: str, step: int, media: dict[str, Any]) -> None:
        """Adds pictures and the like to the newest row of a series."""
        with self.lock:
            if media:
                self.steps.rows.add_media(axis, step, media)

    def add(self, axis: str, step: int, values: dict[str, float]) -> None:
        """Adds a row of numbers, see :meth:`RunSteps.add`."""
        with self.lock:
            self.steps.add(axis, step, values)
            if self.steps.rows.lost:
                self._tell(WAITING, most=self.steps.rows.most)

    def leave(self, member: Member) -> None:
        """Takes leave of a sink that is closed; its rows may wait for the end of the run."""
        with self.lock:
            self._members.pop(member, None)
            if self.steps.may_write():
                self.steps.write()
            if not self._members and self.steps.settled:
                self._uninstall()

    def _install(self) -> Callable[..., None]:
        @functools.wraps(self._log)
        def log(data: Any, step: Any = None, commit: bool | None = None, **more: Any) -> None:
            if self._is_elsewhere() or more:
                self._log(data, step=step, commit=commit, **more)
            else:
                with self.lock:
                    self._log_beside(data, step, commit)

        self._run.log = log
        if wandb.run is self._run:
            wandb.log = log
        # There is no public way to be told of all ends of a run: its `with` block, wandb.finish(),
        # the next wandb.init(). Should the hooks be renamed, run.finish() is seen, and the exit.
        hooks, hook = getattr(self._run, "_teardown_hooks", None), _teardown_hook(self._end)
        if isinstance(hooks, list) and hook is not None:
            hooks.append(hook)
        else:
            self._run.finish = _before(self._end, self._run.finish)
        # W&B finishes no run when the interpreter exits. It registered its own exit before.
        atexit.register(self._exit)
        return log

    def _uninstall(self) -> None:
        self.is_over = True
        self._all.pop(id(self._run), None)
        atexit.unregister(self._exit)
        if vars(self._run).get("log") is self._stand_in:
            del self._run.log
        if wandb.log is self._stand_in:
            wandb.log = self._log

    def _is_elsewhere(self) -> bool:
        return self.is_over or self._pid != os.getpid()

    def _log_beside(self, data: Any, step: Any, commit: bool | None) -> None:
        """Logs what the user does, with a row of ours if there is room for it."""
        ours: dict[str, Any] = {}
        number = _number(step)
        # Nothing of ours goes into a row that W&B refuses.
        if isinstance(data, Mapping) and (step is None or number is not None):
            try:
                for member in tuple(self._members):
                    member.before_log()
                ours, number = self.steps.before(number, commit)
            except Exception as error:
                self._tell_failure(NOT_YET, error)
            else:
                step = number if number is not None else step
            if ours.keys() & data.keys():
                ours = {}
        self._log({**ours, **data} if ours else data, step=step, commit=commit)
        if ours:
            self.steps.rows.drop_first()
        self.steps.after(number, commit, bool(ours))

    def _end(self) -> None:
        """Writes what waits, as the run is about to end."""
        if not self._is_elsewhere():
            with self.lock:
                self._write_last()
                self._uninstall()

    def _exit(self) -> None:
        if not self._is_elsewhere():
            with self.lock:
                self._write_last()
                self.steps.ending = True  # a watcher that is closed later in this exit writes

    def _write_last(self) -> None:
        try:
            for member in tuple(self._members):
                member.before_end()
        except Exception as error:
            self._tell_failure(NOT_YET, error)
        failures, waiting = 0, -1
        while failures < ATTEMPTS and len(self.steps.rows):
            # One that fails costs no others; each is tried a few times.
            failures = failures + 1 if len(self.steps.rows) == waiting else 1
            waiting = len(self.steps.rows)
            try:
                self.steps.write()
            except Exception as error:
                failed = error
        if len(self.steps.rows):
            self._tell_failure(LOST, failed)
        if self.steps.rows.lost:
            self._tell(LEFT_OUT, lost=self.steps.rows.lost)

    def _tell_failure(self, text: str, error: Exception) -> None:
        kind, rows = type(error).__name__, len(self.steps.rows)
        self._tell(text, kind=kind, error=str(error).rstrip("."), rows=rows)

    def _tell(self, text: str, **values: Any) -> None:
        if text not in self._told:
            self._told.add(text)
            warn_safely(text.format(**values))


def _number(step: Any) -> int | None:
    try:
        return operator.index(step)
    except TypeError:
        return None


def _before(call: Callable[[], None], method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        call()
        method(*args, **kwargs)

    return wrapped


def _teardown_hook(call: Callable[[], None]) -> Any:
    try:
        from wandb.sdk.wandb_run import TeardownHook, TeardownStage
    except ImportError:
        return None
    return TeardownHook(call, TeardownStage.EARLY)
