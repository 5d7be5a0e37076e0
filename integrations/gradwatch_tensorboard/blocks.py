"""Module blocks: which few parts of a model its parameters belong to, and the norm of each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.adapters import NO_GRADIENT

MAX_BLOCKS = 20
"""More lines than this nobody can tell apart in one chart."""

ROOT = "(root)"
"""The block of parameters that sit directly in the model."""

_Path = tuple[str, ...]


def assign_blocks(modules: Sequence[str], limit: int = MAX_BLOCKS) -> list[str]:
    """Names the block that each parameter belongs to.

    Blocks are the modules at the deepest level at which there are at most ``limit`` of them. A
    numbered stack below that level (``layers.0`` to ``layers.31``) is the one thing that is
    opened further, in runs of equal length where single layers would be too many.

    Args:
        modules: Name of the module that owns each parameter, ``"encoder.layers.0.attn"``.
        limit: Largest number of blocks, at least 1.

    Returns:
        One block name per parameter.

    >>> assign_blocks(["embed", "layers.0.attn", "layers.0.mlp", "layers.1.attn"], limit=3)
    ['embed', 'layers.0', 'layers.0', 'layers.1']
    >>> assign_blocks([f"layers.{i}" for i in range(6)] + ["head"], limit=4)
    ['layers.0-1', 'layers.0-1', 'layers.2-3', 'layers.2-3', 'layers.4-5', 'layers.4-5', 'head']
    """
    paths = [tuple(module.split(".")) if module else () for module in modules]
    deepest = max(map(len, paths), default=0)
    level = 0
    while level < deepest and len({path[: level + 1] for path in paths}) <= limit:
        level += 1
    blocks = _open_stacks(paths, level, limit) or [path[:level] for path in paths]
    return [".".join(block) or ROOT for block in blocks]


def _open_stacks(paths: Sequence[_Path], level: int, limit: int) -> list[_Path] | None:
    """Opens numbered children below ``level``; None where no run length leaves few enough."""
    last: dict[_Path, int] = {}
    for path in paths:
        if len(path) > level and path[level].isdecimal():
            last[path[:level]] = max(last.get(path[:level], 0), int(path[level]))
    length = 1
    while length <= max(last.values(), default=0):
        blocks = [_run(path, level, length, last) for path in paths]
        if len(set(blocks)) <= limit:
            return blocks
        length *= 2
    return None


def _run(path: _Path, level: int, length: int, last: dict[_Path, int]) -> _Path:
    parent = path[:level]
    if len(path) <= level or not path[level].isdecimal():
        return parent
    first = int(path[level]) // length * length
    final = min(first + length - 1, last[parent])
    return (*parent, str(first) if first == final else f"{first}-{final}")


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one layout, ready to turn rows of parameter norms into rows of block norms.

    Attributes:
        names: Name of each block, in model order.
        order: Column numbers of the parameters, sorted by block.
        starts: Where in ``order`` each block begins.
    """

    names: tuple[str, ...]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, modules: Sequence[str], limit: int = MAX_BLOCKS) -> Blocks:
        """Finds the blocks of a layout; none where the whole model would be the only one.

        Args:
            modules: Name of the module that owns each parameter.
            limit: Largest number of blocks.
        """
        distinct = list(dict.fromkeys(modules))
        block_of = dict(zip(distinct, assign_blocks(distinct, limit), strict=True))
        names = tuple(dict.fromkeys(block_of.values()))
        if len(names) < 2:
            return cls((), np.empty(0, np.intp), np.empty(0, np.intp))
        number = {name: i for i, name in enumerate(names)}
        block = np.array([number[block_of[module]] for module in modules])
        order = np.argsort(block, kind="stable")
        return cls(names, order, np.searchsorted(block[order], np.arange(len(names))))

    def norms(self, norms: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Returns the root of the sum of squares over the parameters of each block.

        Args:
            norms: float array ``[steps, parameters]``; ``NO_GRADIENT`` (-1) where there was none.

        Returns:
            float64 array ``[steps, blocks]``; ``NO_GRADIENT`` where no parameter of the block had
            a gradient, NaN or Inf where one of them had.
        """
        if not self.names:
            return np.empty((len(norms), 0))
        # reduceat sums neighbours, so the parameters of a block have to be next to each other.
        ordered = norms.take(self.order, axis=1)
        absent = ordered == NO_GRADIENT
        ordered[absent] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(ordered, dtype=np.float64)  # in float32 a norm of 1e20 overflows
            result: NDArray[np.float64] = np.sqrt(np.add.reduceat(squares, self.starts, axis=1))
        result[np.logical_and.reduceat(absent, self.starts, axis=1)] = NO_GRADIENT
        return result

    def present(self, row: Sequence[float]) -> dict[str, float]:
        """Names the norms of one row of :meth:`norms`, leaving out blocks without a gradient."""
        return {n: v for n, v in zip(self.names, row, strict=True) if v != NO_GRADIENT}
