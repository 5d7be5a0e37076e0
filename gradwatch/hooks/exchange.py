"""Who takes part in the sums over ranks that hold shards, and what becomes of them when one stops.

The norm of a sharded gradient is a sum over ranks, so each of them has to take part in every
exchange. Who watches is settled through the store of the process group, before the first step.

On CPUs the exchange then has connections of its own (a gloo group), so that nothing that happens
to it can reach the training's own communication:

- A rank that stops leaves its reason in the store and closes its connections. An exchange that
  others wait in, or begin later, fails at once, and they go on without it.
- A rank that leaves out a step is missed for a few seconds, while the all-reduce stays open. If it
  comes, it was only late. If it comes with a later backward, all ranks see that in the same
  all-reduce: those that are behind have no norms for their step, and the others send theirs again.

On accelerators the exchange uses the process groups of the training. NCCL ends the process when a
collective times out, and a stream that waits for it waits as long, so there a rank that has stopped
is waited for as in any other collective.

Private API is used to reach the store of the process group and to make a group outside of torch's
own registry (torch 2.13).
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from gradwatch.measure.parameters import local_part
from gradwatch.measure.sharded import KINDS, MeetAgainError, RanksPartedError, Shards

MISSING = (
    "The parameters are sharded over ranks {ranks}, whose parts of the norms are added up, so all "
    "of them must be watched, but {missing} did not begin to watch within {seconds:g} s of rank "
    "{rank}. Enter gradwatch.watch() on every rank with the same options (or on none), after "
    "torch.distributed.barrier() if some come to it much later."
)
DIFFERENT = (
    "The parameters are sharded over ranks {ranks}, whose parts of the norms are added up, so all "
    "of them must be watched alike, but rank {other} has {theirs} where rank {rank} has {mine}. "
    "Pass the same options to gradwatch.watch() on every rank."
)
DIFFERENT_COPIES = (
    "The ranks {ranks} hold copies of the same parameters, which stay alike only if all of them do "
    "the same, but rank {other} has {theirs} where rank {rank} has {mine}. Start every rank with "
    "the same options."
)
PARTED = (
    "{why}, so the norms of sharded gradients are not known from step {step} on: they are recorded "
    "as NaN. The training goes on untouched."
)
PARTED_ACTING = (
    "{why}, so the norms of sharded gradients are not known in step {step}, and {asked} cannot be "
    "done without them. Keep the watcher open on every rank until all have taken their last step."
)
LATE = (
    "Another rank had not come to step {step} after {seconds:g} s, and was not waited for any "
    "longer: the norms of this step are not known, and are recorded as NaN."
)
STOPPED = "Rank {rank} has stopped watching ({why})"
MISSED = "Another rank has not come to the same step within {seconds:g} s"
LOST = "Another rank does not answer (it has ended, or waits elsewhere)"
LEFT_OUT = "Rank {rank} has left out a step() that other ranks have taken"
LEFT_OUT_ONCE = (
    LEFT_OUT
    + ", by step {step}. Norms of a step that not all ranks take are not known, and recorded as "
    "NaN, and so are all statistics besides the norm from now on, as the ranks count different "
    "steps."
)
OTHER_ORDER = "The ranks have not stepped the same optimizers in the same order"

OTHERS_WAIT = (
    "This rank's training goes on, but the other ranks watch sharded gradients and wait for it in "
    "their next all-reduce."
)

STEP_MARKS = 2**24  # more than twice the parameters of any model; float64 holds up to 2**53

START_WAIT_S = 30.0
STEP_WAIT_S, LEFT_OUT_WAIT_S = 10.0, 2.0
# The others may still be receiving what was sent last, and a connection that is closed with data
# left unread can take away what it has sent.
LAST_WORD_S = 1.0
SHORTEST_S, LONGEST_S = 1e-5, 1e-2

_rounds: Counter[str] = Counter()


class Listener(Protocol):
    """What an exchange asks of its watcher, and tells it."""

    def backwards(self) -> int:
        """Returns the number of backwards so far."""

    def step(self) -> int:
        """Returns the number of the step under way."""

    def tell(self, message: str, mistake: bool) -> None:
        """Records that norms are unknown; warns of a mistake."""


@dataclass(slots=True, eq=False)
class _Link:
    """A group of gradwatch's own with the ranks of one of the training's groups.

    Attributes:
        group: The group; None once it is closed.
        rank: The position of this rank in it.
        ranks: The ranks of the default group that are in it.
        store: A part of the store for these ranks alone.
    """

    group: Any
    rank: int
    ranks: list[int]
    store: Any

    def first_reason(self, why: str) -> str:
        """Returns why the group has ended, as the first of its ranks has said or says now."""
        return str(self.store.compare_set("reason", "", why).decode())


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """An all-reduce under way.

    Attributes:
        link: The group that it is sent in.
        numbers: ``[n + ranks]``, float64: the payload, then a mark of each rank for the number of
            backwards that it has run, the optimizer that steps, and whether it does.
        work: The one handle to wait for; empty once that is over.
        step: The step in which it was sent.
        backwards: The number of backwards before it.
    """

    link: _Link
    numbers: Tensor
    work: list[Any]
    step: int
    backwards: int


class Exchange:
    """Adds up numbers over the ranks that hold the shards of a model.

    Attributes:
        parted: Why the ranks no longer exchange anything; empty as long as they do.
    """

    def __init__(
        self,
        shards: Shards,
        options: Mapping[str, str],
        acting: Sequence[str],
        has_statistics: bool,
        listener: Listener,
    ) -> None:
        """Starts without a connection.

        Args:
            shards: The sharded parameters, which reduce by this exchange once it is open.
            options: What must be the same on all ranks, as it was written, by name.
            acting: The options that need the norms to change the training. Then a rank that is
                late is waited for as in any collective, and one that has stopped is an error.
            has_statistics: Whether more than norms is exchanged in some steps.
            listener: The watcher.
        """
        self.parted = ""
        self._shards = shards
        self._options = dict(options)
        self._acting = list(acting)
        self._kinds = 1 + max(KINDS) if has_statistics else 1
        self._listener = listener
        self._links: dict[tuple[int, int], _Link] = {}
        self._in_turn = 0
        self._rank = 0
        self._pending: _Sent | None = None
        self._told_late = self._has_left = self._apart = False
        self._alike = True
        self._timeout_s = math.inf

    @property
    def others_wait(self) -> bool:
        """Whether the other ranks wait for this one once it has stopped."""
        return not self._apart and any(group.size > 1 for group in self._shards.groups)

    # -- the start ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Settles through the store that all ranks watch alike; then makes the connections.

        Raises:
            RuntimeError: If a rank does not begin to watch too, or watches with other options.
        """
        groups = [group for group in self._shards.groups if len(group.ranks) > 1]
        default: Any = dist.distributed_c10d._get_default_store()
        # There is none with MPI, and a "fake" one is for a dry run with only one of the ranks.
        if not groups or default is None or "fake" in dist.get_backend():
            return
        self._rank = dist.get_rank()
        ranks = sorted({rank for group in groups for rank in group.ranks})
        self._timeout_s = min(_timeout_s(one) for group in groups for one in group.groups)
        asked = {**self._options, "parameters": _described(self._shards)}
        wait_s = min(START_WAIT_S, self._timeout_s / 4)
        store = _settle(default, ranks, asked, wait_s, MISSING, DIFFERENT)
        for group in groups:
            tensors = [self._shards.tensors[index] for index in group.indices]
            if not all(local_part(tensor).is_cpu for tensor in tensors):
                continue
            for one in filter(_is_gloo, group.groups):
                if (0, id(one)) not in self._links:
                    self._in_turn += 1
                    for kind in range(self._kinds):
                        name = f"link{self._in_turn}.{kind}"
                        self._links[kind, id(one)] = _linked(one, name, store, self._timeout_s)
        self._apart = bool(self._links)
        self._shards.reduce, self._shards.settle = self.reduce, self.settle

    # -- a step ------------------------------------------------------------------------------------

    def reduce(self, payload: Tensor, group: Any) -> Tensor:
        """Sums a payload ``[n]`` over the ranks of one of the training's groups.

        Returns:
            The sums ``[n]``; the payload itself where it was summed in place.

        Raises:
            RanksPartedError: If they cannot be had in this step, or no longer.
            RuntimeError: The same, if gradwatch acts.
        """
        if self._pending is not None:
            self._finish(self._pending)
        if self.parted:
            self._fail(self.parted)
        # Payloads of different length must never meet, for which gloo ends the process.
        link = self._links.get((self._shards.kind, id(group)))
        if link is None:
            dist.all_reduce(payload, group=group)
            return payload
        shards, marks = self._shards, [0] * len(link.ranks)
        step = 2 * (shards.stepping + 1) + shards.is_step
        backwards = self._listener.backwards()
        marks[link.rank] = backwards * STEP_MARKS + step
        numbers = torch.cat([payload, payload.new_tensor(marks)])
        work = dist.all_reduce(numbers, group=link.group, async_op=True)
        return self._numbers(_Sent(link, numbers, [work], self._listener.step(), backwards))

    def settle(self) -> bool:
        """Waits for what an earlier step has left open; returns whether all ranks step alike.

        If not, their steps have different numbers, and what is due in one of them is not due in
        all: then only what is due in every step can be exchanged.
        """
        if self._pending is not None:
            if self._pending.backwards == self._listener.backwards():
                return False  # of this very step: it has been waited for
            self._finish(self._pending)
        return self._alike

    def _finish(self, pending: _Sent) -> None:
        """Ends what an earlier step has left open, which has no use for the sums any more."""
        with suppress(RanksPartedError):
            self._numbers(pending)
        self._pending = None

    def _numbers(self, sent: _Sent) -> Tensor:
        """Returns the sums of an all-reduce, if all ranks have sent it in the same step."""
        if not self._acting and not _ends(sent.work[0], self._wait_s):
            self._miss(sent)
        # The work holds the connections, and an error that somebody keeps holds this frame.
        try:
            sent.work.pop().wait()
        except RuntimeError:
            self._part(LOST)
        size = len(sent.link.ranks)
        marks = [divmod(int(mark), STEP_MARKS) for mark in sent.numbers[-size:].tolist()]
        backwards, steps = zip(*marks, strict=True)
        if len(set(backwards)) > 1:
            self._meet_again(sent, backwards)
        if len({step // 2 for step in steps}) > 1:
            self._part(OTHER_ORDER)
        if len(set(steps)) > 1:  # some have thrown away the gradients of a step
            self._note_left_out(sent.link.ranks[steps.index(min(steps))], sent.step)
        return sent.numbers[:-size]

    def _meet_again(self, sent: _Sent, backwards: Sequence[int]) -> NoReturn:
        """Goes on where some ranks have come to a later step: they wait there for the others."""
        # A backward of sharded parameters takes all ranks, so they have run as many.
        latest = max(backwards)
        rank = sent.link.ranks[backwards.index(latest)]
        if self._acting or self._in_turn > 1:
            self._part(LEFT_OUT.format(rank=rank))
        self._note_left_out(rank, sent.step)
        is_ahead = backwards[sent.link.rank] == latest
        raise MeetAgainError(rank) if is_ahead else RanksPartedError(rank)

    def _note_left_out(self, rank: int, step: int) -> None:
        if self._alike:
            self._alike = False
            self._listener.tell(LEFT_OUT_ONCE.format(rank=rank, step=step), False)

    def _miss(self, sent: _Sent) -> NoReturn:
        """Goes on without the sums of this step; they stay open for a rank that is only late."""
        # If there are several, those that follow this one would come apart. A rank that has not
        # come to the step before is not late.
        if self._in_turn > 1 or sent is self._pending:
            self._pending = sent
            self._part(MISSED.format(seconds=self._wait_s))
        self._pending = sent
        if not self._told_late:
            self._told_late = True
            self._listener.tell(LATE.format(seconds=self._wait_s, step=sent.step), False)
        raise RanksPartedError(f"late in step {sent.step}")

    # -- the end -----------------------------------------------------------------------------------

    def leave(self, why: str) -> None:
        """Takes no further part, and has the other ranks know why; never raises nor waits."""
        if self._links and not self.parted:
            mine = STOPPED.format(rank=self._rank, why=why)
            self.parted, self._has_left = mine, True
            self._first_reason(mine)
            self._let_go(LAST_WORD_S)

    def _part(self, why: str) -> NoReturn:
        """Ends the exchange, with the reason of the rank that was the first to end it."""
        why = self._first_reason(why)
        step = self._listener.step()
        self.parted = PARTED.format(why=why, step=step)
        self._let_go(0.0)
        if self._acting:
            asked = " and ".join(self._acting)
            self.parted = PARTED_ACTING.format(why=why, step=step, asked=asked)
        else:
            self._listener.tell(self.parted, True)
        self._fail(self.parted)

    def _fail(self, text: str) -> NoReturn:
        if self._acting and not self._has_left:
            raise RuntimeError(text)
        raise RanksPartedError(text)

    def _first_reason(self, why: str) -> str:
        """Returns the reason of the rank that was the first to give one, maybe this.

        It is passed on to the ranks that only this one is connected with.
        """
        try:
            for link in self._links.values():
                why = link.first_reason(why)
            for link in self._links.values():
                link.first_reason(why)
        except Exception:  # the store ends with the process that has opened it
            return why
        return why

    def _let_go(self, delay_s: float) -> None:
        """Closes the connections, some time later and not in this thread."""
        groups = [link.group for link in self._links.values()]
        work = self._pending.work.copy() if self._pending is not None else []
        for link in self._links.values():
            link.group = None
        if self._pending is not None:
            self._pending.work.clear()
        self._links, self._pending = {}, None
        closing = threading.Thread(target=_close, args=(groups, work, delay_s), daemon=True)
        with suppress(RuntimeError):  # at the exit no thread can be started; then all ends anyway
            closing.start()

    @property
    def _wait_s(self) -> float:
        # All-reduces that follow one another cannot be left open.
        usual = STEP_WAIT_S * self._in_turn if self._alike else LEFT_OUT_WAIT_S
        return min(usual, self._timeout_s / 4)


def _ends(work: Any, seconds: float) -> bool:
    """Waits for an all-reduce; returns whether it has ended in time, well or not."""
    # Not Work.wait(timeout), which would end the work, and not a callback, which gloo's thread may
    # run while the interpreter exits.
    begin, waited = time.monotonic(), 0.0
    while not work.is_completed():
        if waited > seconds:
            return False
        time.sleep(min(max(waited / 8, SHORTEST_S), LONGEST_S))
        waited = time.monotonic() - begin
    return True


def _close(groups: list[Any], work: list[Any], delay_s: float) -> None:
    """Closes connections, by dropping the last reference to them."""
    # abort() and shutdown() of gloo leave them open (torch 2.13), and its destructor waits for
    # what is under way: here it keeps nobody waiting.
    time.sleep(delay_s)
    while work and not work[0].is_completed():
        time.sleep(0.1)
    work.clear()
    groups.clear()


# -- torch's groups and their store ----------------------------------------------------------------


def settle_copies(ranks: Sequence[int], asked: Mapping[str, str], missing: str) -> None:
    """Settles through the store that ranks with copies of the same parameters act alike.

    Args:
        ranks: The ranks, in the numbers of the whole world.
        asked: What this one does, as written, by the name of the option.
        missing: What to raise if some do not come: a format with the fields of ``MISSING``.

    Raises:
        RuntimeError: If one of them does not come, or asks for something else.
    """
    default: Any = dist.distributed_c10d._get_default_store()
    if default is not None and "fake" not in dist.get_backend():
        wait_s = min(START_WAIT_S, _timeout_s(None) / 4)
        _settle(default, sorted(ranks), asked, wait_s, missing, DIFFERENT_COPIES)


def _settle(
    default: Any,
    ranks: Sequence[int],
    asked: Mapping[str, str],
    wait_s: float,
    missing: str,
    different: str,
) -> Any:
    """Meets all ranks in the store of the default group; returns a part of it for this meeting.

    Raises:
        RuntimeError: If one of them does not come, or asks for something else.
    """
    rank = dist.get_rank()
    name = hashlib.sha1(json.dumps(ranks).encode(), usedforsecurity=False).hexdigest()
    store = _next_meeting(name, default)
    try:
        # Everybody compares with one of them, as the store would be asked a million things by a
        # thousand ranks that compare with each other.
        mine = {**asked, "rank": rank}
        found = json.loads(store.compare_set("asked", "", json.dumps(mine)))
        for option in (one for one in asked if asked[one] != found[one]):
            texts = {"mine": f"{option}={asked[option]}", "theirs": f"{option}={found[option]}"}
            text = different.format(ranks=_listed(ranks), rank=rank, other=found["rank"], **texts)
            store.set("different", text)
        _meet(store, "asks", ranks, wait_s)
        if store.check(["different"]):
            raise RuntimeError(store.get("different").decode())
        # Whoever has given up in the meantime does not come to this one.
        _meet(store, "agrees", ranks, wait_s)
    except _MissingError as error:
        store.set("given up", "")
        absent = f"rank{'s' if len(error.ranks) > 1 else ''} {_listed(error.ranks)}"
        text = missing.format(ranks=_listed(ranks), missing=absent, seconds=wait_s, rank=rank)
        raise RuntimeError(text) from None
    return store


def _next_meeting(name: str, default: Any) -> Any:
    """Returns the part of the store for the next meeting of some ranks."""
    while True:
        _rounds[name] += 1
        store = PrefixStore(f"gradwatch/{name}/{_rounds[name]}", default)
        # If the others have given one up, this rank can only meet them in the one after it.
        if not store.check(["given up"]):
            return store


class _MissingError(Exception):
    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = ranks


def _meet(store: Any, name: str, ranks: Sequence[int], wait_s: float) -> None:
    store.set(f"{name}{dist.get_rank()}", "")
    try:
        store.wait([f"{name}{rank}" for rank in ranks], timedelta(seconds=wait_s))
    except RuntimeError:
        missing = [rank for rank in ranks if not store.check([f"{name}{rank}"])]
        if missing:
            raise _MissingError(missing) from None


def _listed(ranks: Sequence[int]) -> str:
    """Lists ranks in words: ``"0, 1 and 2"``; only the first of many."""
    texts = [str(rank) for rank in ranks]
    if len(texts) > 8:
        texts = [*texts[:7], f"{len(texts) - 7} more"]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _described(shards: Shards) -> str:
    """Describes which parameters are exchanged: their number, and a digest of their shapes."""
    indices = [index for group in shards.groups for index in group.indices]
    shapes = [(index, tuple(shards.tensors[index].shape)) for index in indices]
    digest = hashlib.sha1(repr(shapes).encode(), usedforsecurity=False).hexdigest()
    return f"{len(shapes)} sharded ones ({digest[:8]})"


def _backend(group: Any) -> Any:
    """Returns what reduces CPU tensors for a group (None: the whole world), or what else it has."""
    group = group or dist.group.WORLD
    for device in ("cpu", *(str(one.type) for one in group._device_types)):
        with suppress(RuntimeError):
            return group._get_backend(torch.device(device))
    return None


def _timeout_s(group: Any) -> float:
    try:
        return float(_backend(group).options._timeout.total_seconds())
    except AttributeError:  # of a backend that is not torch's own
        return float(dist.distributed_c10d.default_pg_timeout.total_seconds())


def _is_gloo(group: Any) -> bool:
    gloo = getattr(dist, "ProcessGroupGloo", None)
    return gloo is not None and isinstance(_backend(group), gloo)


def _linked(group: Any, name: str, store: Any, timeout_s: float) -> _Link:
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    rank = ranks.index(dist.get_rank())
    # A mesh has several groups of one kind, which have no rank in common.
    store = PrefixStore(f"{name}/{ranks[0]}", store)
    return _Link(connected(store, rank, len(ranks), timeout_s), rank, ranks, store)


def connected(store: Any, rank: int, ranks: int, timeout_s: float) -> Any:
    """Connects some ranks by a gloo group, apart from those of the training."""
    # Not dist.new_group(), which all ranks of the default group must call, numbers the groups of
    # the training on, and adds one that destroy_process_group() would take from us.
    gloo, cpu = dist.ProcessGroup.BackendType.GLOO, torch.device("cpu")
    backend: Any = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=timeout_s))
    try:
        group = dist.ProcessGroup(store, rank, ranks)
    except TypeError:  # older versions of torch take another argument
        return backend
    group._set_default_backend(gloo)
    group._register_backend(cpu, gloo, backend)
    return group
