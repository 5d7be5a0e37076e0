"""Tells whether gradients, or weights, have changed since an earlier moment.

:class:`GradientSnapshot` decides whether a step must measure the gradients again, and it does so
without holding a reference to them or reading their elements. :class:`Looks` says when to measure
them although nothing is known to have changed. :class:`WeightSnapshot` tells whether gradients that
nobody stepped with were used nevertheless, because something has moved the weights.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress, repeat
from operator import attrgetter, is_, methodcaller, ne

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure.deferred import Deferred, FloatOrDeferred, defer
from gradwatch.measure.gathering import joined
from gradwatch.measure.norms import StepNorms

_WITNESSES = 16
_version = attrgetter("_version")
_referent = methodcaller("__call__")


class GradientSnapshot:
    """The identity and the version counter of every gradient at one moment."""

    __slots__ = ("_ids", "_references", "_versions")

    # ``Tensor._version`` is private, but it is how the autograd engine itself notices that a tensor
    # was written to: each in-place operation adds one to it (torch 2.4 to 2.13). Writes through
    # ``.data`` do not change it, and neither does a GradScaler when it unscales.

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        """Notes the state of the gradients now; later calls must pass them in the same order."""
        # Strong references would keep the gradients in memory after zero_grad(). Ids alone are not
        # enough: once a gradient is freed, a new tensor may get its id. Weak references show that a
        # gradient was freed. A sample of at most 16 is enough (all, if there are fewer): gradients
        # are freed together, and one weak reference per parameter would cost more than the rest.
        # As this runs in every step, the loops over all gradients (map) run in C.
        stride = 1 + len(gradients) // _WITNESSES
        self._references = list(map(weakref.ref, gradients[::stride]))
        self._ids = list(map(id, gradients))
        self._versions = list(map(_version, gradients))

    def __len__(self) -> int:
        return len(self._ids)

    def subset(self, keep: Sequence[bool], gradients: Sequence[Tensor | None]) -> GradientSnapshot:
        """Returns the snapshot of the gradients for which ``keep`` is true.

        Args:
            keep: For each gradient whether to keep it.
            gradients: What those that are kept are now; None for one without.
        """
        part = GradientSnapshot(())
        part._ids = list(compress(self._ids, keep))
        part._versions = list(compress(self._versions, keep))
        # The sampled gradients need not be among them. Others of their own show when they go.
        there = [one for one, i in zip(gradients, part._ids, strict=True) if id(one) == i]
        sampled = [one for one in there[:: 1 + len(there) // _WITNESSES] if one is not None]
        whole = len(there) == len(part._ids)
        part._references = list(map(weakref.ref, sampled)) if whole else list(self._references)
        return part

    def matches(self, gradients: Sequence[Tensor | None]) -> bool:
        """Returns whether these are the same tensors, and nothing has written into them since.

        Args:
            gradients: The current gradients of the same parameters; None for one without.

        Returns:
            False if any gradient was replaced, written to, added or removed.
        """
        # The ids are compared first: if they are equal, no gradient is None (which has no version).
        # The last line is _alive() without its frame, as this runs in every step.
        return (
            self._ids == list(map(id, gradients))
            and self._versions == list(map(_version, gradients))
            and not any(map(is_, map(_referent, self._references), repeat(None)))
        )

    def moved_among(
        self, positions: Sequence[int], gradients: Sequence[Tensor | None]
    ) -> Sequence[int]:
        """Lists those of some gradients that were replaced, written to or removed since.

        Args:
            positions: Their positions in the snapshot.
            gradients: What they are now; None for one without.
        """
        ids = list(map(self._ids.__getitem__, positions))
        versions = map(self._versions.__getitem__, positions)
        alive = self._alive()
        if alive and ids == list(map(id, gradients)):
            # In C: a loop that accumulates comes here in every backward but the first of a step.
            return list(compress(positions, map(ne, versions, map(_version, gradients))))
        return [
            position
            for position, identity, version, gradient in zip(
                positions, ids, versions, gradients, strict=True
            )
            if gradient is None
            or not alive
            or identity != id(gradient)
            or version != gradient._version
        ]

    def moved(self, gradients: Sequence[Tensor | None]) -> dict[int, int]:
        """Finds the gradients that were replaced, written to or removed since.

        Returns:
            Their positions, each with the number of writes; 2 for one that was replaced or removed.
        """
        if self.matches(gradients):
            return {}
        moved = {}
        then_and_now = zip(self._ids, self._versions, gradients, strict=True)
        for position, (identity, version, gradient) in enumerate(then_and_now):
            kept = gradient is not None and identity == id(gradient)
            writes = gradient._version - version if gradient is not None and kept else 2
            if writes:
                moved[position] = writes
        return moved

    def replaced(self, gradients: Sequence[Tensor]) -> bool:
        """Returns whether each of the gradients is another tensor than it was."""
        return not self._alive() or not set(self._ids).intersection(map(id, gradients))

    def was_discarded(self, gradients: Iterable[Tensor | None], grew: Iterable[bool]) -> bool:
        """Returns whether the gradients were reset (``zero_grad()``) before the latest backward.

        Args:
            gradients: The gradients of the same parameters after the backward; None for one
                without.
            grew: For each gradient whether the backward added to it.

        Returns:
            True if every dense gradient that the backward added to had been reset before.
        """
        # A backward adds in place, which moves the version counter by one. A new tensor means that
        # zero_grad() came in between; a counter that moved by more than one means that
        # zero_grad(set_to_none=False) did, which writes zeros.
        alive = self._alive()
        grown = []
        then_and_now = zip(self._ids, self._versions, gradients, grew, strict=True)
        for identity, version, gradient, added in then_and_now:
            # Adding to a sparse gradient makes a new tensor, so its identity shows nothing.
            if added and gradient is not None and gradient.layout is torch.strided:
                moved = gradient._version - version
                if alive and identity == id(gradient) and moved <= 1:
                    return False  # zero_grad() resets all, so one kept gradient is enough
                grown.append((gradient, identity, moved))
        # Gradients that are views of one tensor, as the backward of torch.cat makes them, share a
        # version counter, and the backward has moved it by one for each of them.
        sharing = Counter(gradient.untyped_storage().data_ptr() for gradient, _, _ in grown)
        return bool(grown) and all(
            not alive or i != id(g) or moved > sharing[g.untyped_storage().data_ptr()]
            for g, i, moved in grown
        )

    def _alive(self) -> bool:
        return not any(map(is_, map(_referent, self._references), repeat(None)))


_PROBED = 64  # elements of a gradient


class Direction:
    """Some elements of gradients at one moment, to tell whether they have been reversed since.

    Norms have no sign. At most 64 elements of at most 16 gradients are copied, which for small
    models are all; empty and sparse gradients are left out.
    """

    __slots__ = ("_elements", "_indices")

    def __init__(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Copies the elements; ``indices`` say which parameters the gradients belong to."""
        self._indices = list(indices)
        self._elements = _probe(gradients)

    def sign(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> FloatOrDeferred:
        """Returns -1.0 if the same gradients, as they are now, point the other way; else 1.0.

        They do if the cosine between the elements is below -0.5: noise that was added does not
        reverse a gradient. Never waits.
        """
        before = self._elements
        now = _probe(gradients) if before is not None and self._indices == list(indices) else None
        if before is None or now is None or now.shape != before.shape:
            return 1.0
        before, now = _of_size_one(before), _of_size_one(now)
        cosine = torch.nn.functional.cosine_similarity(before, now, dim=0)
        return defer(torch.where(cosine < -0.5, torch.full_like(cosine, -1.0), 1.0))


def _probe(gradients: Sequence[Tensor]) -> Tensor | None:
    parts = []
    for gradient in gradients[:: 1 + len(gradients) // _WITNESSES]:
        if gradient.layout is torch.strided and gradient.numel():
            flat = gradient.detach().reshape(-1)
            few = flat[:: -(-len(flat) // _PROBED)]
            parts.append((torch.view_as_real(few).reshape(-1) if few.is_complex() else few).float())
    return joined(parts) if parts else None


def _of_size_one(elements: Tensor) -> Tensor:
    # The squares of large or tiny elements would not fit into float32.
    finite = elements.nan_to_num(0.0, 0.0, 0.0)
    return finite / finite.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


_MOST_ELEMENTS = 16


class WeightSnapshot:
    """A few weights at one moment, to tell whether something has moved the weights since."""

    __slots__ = ("_addresses", "_bytes", "_moved", "_plain", "_tensors", "_values", "_versions")

    # A perturbation (SAM) or an update by hand moves all weights, so a sample is enough. As it is
    # taken at the end of every backward, the loops run in C, and values are read through NumPy,
    # which starts no operation of torch.

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Chooses the sample; :meth:`take` takes the first snapshot."""
        weights = [weight for weight in weights if not weight.is_inference()]  # without a version
        small = sorted(weights, key=Tensor.numel)[: _WITNESSES // 2]
        self._tensors = [*small, *weights[:: 1 + len(weights) // (_WITNESSES // 2)]]
        # Tensors of other classes, such as quantized ones, may have no address.
        self._plain = list(filter(_is_plain, self._tensors))
        # Writes through ``.data`` move no version counter. On a CPU a few values tell.
        self._values = [memory for one in small if (memory := _memory_of(one)) is not None]
        self._moved = False
        self.take()

    def let_go(self) -> None:
        """Drops the weights; :meth:`moved` tells what it would have told until now."""
        self._moved = self.moved()
        self._tensors, self._plain, self._values = [], [], []
        self.take()

    def take(self) -> None:
        """Notes the weights as they are now."""
        self._versions = list(map(_version, self._tensors))
        self._addresses = list(map(_address, self._plain))
        self._bytes = list(map(_bytes_of, self._values))

    def moved(self) -> bool:
        """Returns whether a weight of the sample was written to, or replaced, since :meth:`take`.

        On an accelerator a write through ``.data`` is not seen.
        """
        return self._moved or (
            self._versions != list(map(_version, self._tensors))
            or self._addresses != list(map(_address, self._plain))
            or self._bytes != list(map(_bytes_of, self._values))
        )


_address = methodcaller("data_ptr")
_bytes_of = methodcaller("tobytes")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _memory_of(tensor: Tensor) -> NDArray[np.uint8] | None:
    """Returns the first bytes of a tensor as an array that shares its memory; None off the CPU."""
    if not (_is_plain(tensor) and tensor.is_cpu and tensor.is_contiguous() and tensor.numel()):
        return None
    if tensor.is_conj() or tensor.is_neg():  # a view whose bytes are not its values
        return None
    flat = tensor.detach().view(-1)[:_MOST_ELEMENTS]
    memory: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return memory


EARLY = 64
EVERY = 128


def is_looked_at(count: int) -> bool:
    """Returns whether something that happens in every step is looked at now: 1, 2, 4, ..., 64, 128.

    After that it is every 128th time.
    """
    return count & (count - 1) == 0 if count <= EARLY else count % EVERY == 0


class Looks:
    """Finds out whether a loop changes its gradients in ways that no version counter shows.

    ``p.grad.data.mul_()``, a NumPy view and DLPack write past the counter that a
    :class:`GradientSnapshot` compares, and several frameworks clip like that. So the gradients are
    measured once more in some steps: in steps 1, 2, 4 and so on up to 64, where a loop shows what
    it does, and in every 128th. A loop that was seen to change them is looked at in every step from
    then on. So are the steps that come before the numbers of a look have arrived from a device.

    In the same steps some elements tell whether the gradients were reversed (:class:`Direction`).
    They are compared as well in the step after the loop has begun to change its gradients, and in
    every step once they were reversed.

    Attributes:
        turns: Whether to look at the direction in the coming step.
    """

    __slots__ = ("_found", "_late", "_planned", "_quiet", "_sign", "_steps", "turns")

    def __init__(self) -> None:
        """Starts before the first step."""
        self.turns = True
        self._steps = 0
        self._found = self._planned = False
        self._quiet = True
        self._late: list[StepNorms] = []
        self._sign: FloatOrDeferred = 1.0

    def due(self, unchanged: bool) -> bool:
        """Counts a step; returns whether to measure gradients again that seem unchanged."""
        self._steps = steps = self._steps + 1
        after = steps + 1
        if self._late:
            self._compare_arrived()
        sign = self._sign
        if type(sign) is Deferred and sign.at_hand:
            sign = self._sign = sign.value()
        # In one function, and without calls of others, as it runs in every step: this is
        # is_looked_at() without its frame, for the step after this one.
        soon = after & steps == 0 if after <= EARLY else after % EVERY == 0
        self.turns = soon or sign == -1.0 or (self._quiet and not unchanged)
        self._quiet = unchanged
        self._planned = steps & (steps - 1) == 0 if steps <= EARLY else steps % EVERY == 0
        return self._planned or self._found or bool(self._late)

    def each_step(self) -> None:
        """Has each step looked at from now on."""
        self._found = True

    def turned(self, sign: FloatOrDeferred) -> None:
        """Notes the sign that was found in a step."""
        if self._sign != -1.0:
            self._sign = sign
        self.turns = self.turns or sign == -1.0

    def found(self) -> None:
        """Notes that a look has found other gradients than those of the last backward."""
        self._found = True
        self._late = []

    def compare_later(self, norms: StepNorms) -> None:
        """Keeps the norms of a look whose numbers are still on a device."""
        # Of those that are planned only: else each look would be the reason for the next one.
        if self._planned and not self._found:
            self._late.append(norms)

    def _compare_arrived(self) -> None:
        waiting = []
        for norms in self._late:
            if not _is_at_hand(norms):
                waiting.append(norms)
            elif not norms.untouched:
                self.found()
                return
        self._late = waiting


def _is_at_hand(norms: StepNorms) -> bool:
    needed = (
        norms.before.norms,
        norms.after.norms,
        norms.unit_before,
        norms.unit_after,
        norms.sign,
    )
    return all(not isinstance(one, Deferred) or one.at_hand for one in needed)
