"""The state around a forward: random generators, autocast and grad mode; and whether we replay."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeAlias

import torch
from torch.amp.autocast_mode import is_autocast_available

from gradwatch.hooks.generators import RandomState

Autocast: TypeAlias = tuple[tuple[str, torch.dtype], ...]
"""The kinds of device on which autocast is enabled, with the dtype that it casts to."""

_KINDS = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "ipu", "xla", "maia")


class ForwardContext:
    """Random generators, autocast and grad mode at one moment, to run a forward again in.

    Attributes:
        random: The states of the random generators.
        grad: Whether gradients were recorded.
        inference: Whether inference mode was on.
        autocast: Where autocast was enabled; empty where it was not.
        caches_casts: Whether autocast kept the weights that it had cast.
    """

    __slots__ = ("autocast", "caches_casts", "grad", "inference", "random")
    random: RandomState
    grad: bool
    inference: bool
    autocast: Autocast
    caches_casts: bool

    @classmethod
    def now(cls) -> ForwardContext:
        """Notes the present state; copies nothing from a device, and never waits."""
        self = cls()
        self.random = RandomState()
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.caches_casts = True
        self.autocast = ()
        if torch._C._is_any_autocast_enabled():
            self.autocast = _autocast_now()
            self.caches_casts = torch.is_autocast_cache_enabled()
        return self

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Sets that state for a block, and sets back what was there before, also after an error."""
        before = RandomState()
        threads = torch._C._is_multithreading_enabled()
        try:
            self.random.put_back()
            with (
                torch.inference_mode(self.inference),
                # Which inference_mode() sets as well, whatever it was.
                torch.autograd.set_multithreading_enabled(threads),
                torch.set_grad_enabled(self.grad),
                _autocast_set(self.autocast, self.caches_casts),
            ):
                yield
        finally:
            before.put_back()


@contextmanager
def backwards_permitted() -> Iterator[None]:
    """Makes frameworks accept a backward in a block that they do not run themselves.

    In mixed precision a hook of Fabric's on the outputs of a model raises in any backward but that
    of ``fabric.backward()``, which scales the loss: who runs one here has seen to that.
    """
    # Private (2.0 to 2.6): a later version that renames it raises, and we say that it did.
    name = "_in_fabric_backward"
    homes = (sys.modules.get(f"{one}.wrappers") for one in ("lightning.fabric", "lightning_fabric"))
    before = [(home, getattr(home, name)) for home in homes if hasattr(home, name)]
    for home, _ in before:
        setattr(home, name, True)
    try:
        yield
    finally:
        for home, value in before:
            setattr(home, name, value)


def _autocast_now() -> Autocast:
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in autocast_kinds()
        if torch.is_autocast_enabled(kind)
    )


def autocast_kinds() -> tuple[str, ...]:
    """Lists the kinds of device that know autocast in this build of torch."""
    # A backend outside of torch, such as torch_npu, may be imported late.
    return _kinds(torch._C._get_privateuse1_backend_name())


@lru_cache
def _kinds(other: str) -> tuple[str, ...]:
    return tuple(kind for kind in (*_KINDS, other) if _knows_autocast(kind))


def _knows_autocast(kind: str) -> bool:
    try:
        return is_autocast_available(kind)
    except RuntimeError:  # torch of another version does not know the kind
        return False


@contextmanager
def _autocast_set(autocast: Autocast, caches_casts: bool) -> Iterator[None]:
    """Enables autocast where it is listed, and nowhere else."""
    # Not torch.autocast, which warns of what the user was told when the training did it.
    before = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in autocast_kinds()
    ]
    cached = torch.is_autocast_cache_enabled()
    wanted = dict(autocast)
    torch.autocast_increment_nesting()
    try:
        torch.set_autocast_cache_enabled(caches_casts)
        for kind, _, dtype in before:
            torch.set_autocast_enabled(kind, kind in wanted)
            torch.set_autocast_dtype(kind, wanted.get(kind, dtype))
        yield
    finally:
        # Inside of an autocast of the user's the cache is in use: what is in it must stay.
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cached)
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


class _Replay:
    """Whether a replay is under way: gradwatch's own hooks on the model then do nothing.

    Attributes:
        under_way: Whether there is one in any thread. To be read before :func:`is_replaying` where
            a hook runs in every forward, as a call would cost a frame.
    """

    __slots__ = ("under_way",)

    def __init__(self) -> None:
        self.under_way = False


REPLAY = _Replay()

# torch gives this to its own threads as well, in which a backward runs on accelerators and where
# backwards are deeply nested, and only to those that work for the thread that has set it.
_KEY = "gradwatch.replaying"


@contextmanager
def replaying() -> Iterator[None]:
    """Makes gradwatch's own hooks do nothing for a block, in this thread alone.

    Only one thread at a time may be in such a block.
    """
    before = REPLAY.under_way, is_replaying()
    try:
        REPLAY.under_way = True
        torch._C._stash_obj_in_tls(_KEY, True)
        yield
    finally:
        torch._C._stash_obj_in_tls(_KEY, before[1])
        REPLAY.under_way = before[0]


def is_replaying() -> bool:
    """Returns whether what this thread does is part of a replay: others go on training."""
    return REPLAY.under_way and torch._C._is_key_in_tls(_KEY) and torch._C._get_obj_in_tls(_KEY)
