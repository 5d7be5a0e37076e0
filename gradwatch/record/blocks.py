"""Module blocks: divides a model into a few parts, and says what the gradients of each part are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.records import NO_GRADIENT, Layout, RecordBatch

MAX_BLOCKS = 20
"""The largest number of blocks: more lines cannot be told apart in one chart."""

ROOT = "(root)"
"""The block of parameters that sit directly in the model."""

MODEL = "(model)"
"""The one block of a model that is not divided."""

_Path = tuple[str, ...]


def assign_blocks(modules: Sequence[str], limit: int = MAX_BLOCKS) -> list[str]:
    """Names the block that each parameter belongs to.

    The blocks are the modules at the deepest level that has at most ``limit`` of them. Below that
    level only numbered stacks (``layers.0`` to ``layers.31``) are split further: into single
    layers, or, if those would be too many, into ranges of equal length.

    Args:
        modules: For each parameter the name of its module, such as ``"encoder.layers.0.attn"``.
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
    """Splits numbered stacks below ``level``; None if every range length makes too many blocks."""
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
    """The blocks of one layout, which convert rows of its parameters to rows of blocks.

    Attributes:
        names: Name of each block, in model order.
        order: intp array ``[parameters]``: the columns of the parameters, sorted by block.
        starts: intp array ``[blocks]``: where in ``order`` each block begins.
    """

    names: tuple[str, ...]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, modules: Sequence[str], limit: int = MAX_BLOCKS) -> Blocks:
        """Finds the blocks of a layout. There are none if the only block would be the whole model.

        ``modules`` has, for each parameter, the name of the module that owns it.
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

    @classmethod
    def whole(cls, parameters: int) -> Blocks:
        """Returns the one block of all parameters, of which there is at least one."""
        return cls((MODEL,), np.arange(parameters), np.zeros(1, np.intp))

    def norms(self, norms: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Returns the root of the sum of squares over the parameters of each block.

        Args:
            norms: float array ``[steps, parameters]``; ``NO_GRADIENT`` (-1) where there was none.

        Returns:
            float64 array ``[steps, blocks]``: ``NO_GRADIENT`` if no parameter of the block had a
            gradient, NaN or Inf if one of their norms is NaN or Inf.
        """
        if not self.names:
            return np.empty((len(norms), 0))
        # reduceat sums neighbors, so the parameters of a block must be next to each other.
        ordered = norms.take(self.order, axis=1)
        absent = ordered == NO_GRADIENT
        ordered[absent] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(ordered, dtype=np.float64)  # in float32 a norm of 1e20 overflows
            result: NDArray[np.float64] = np.sqrt(np.add.reduceat(squares, self.starts, axis=1))
        result[np.logical_and.reduceat(absent, self.starts, axis=1)] = NO_GRADIENT
        return result

    def largest(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Returns, of each block, the value of the parameter where it is largest in magnitude.

        Args:
            values: float array ``[steps, parameters]``; NaN where there is none.

        Returns:
            float64 array ``[steps, blocks]``, with the sign of the values; NaN if no parameter of
            the block has one.
        """
        if not self.names:
            return np.empty((len(values), 0))
        ordered = values.take(self.order, axis=1).astype(np.float64)
        known = np.where(np.isnan(ordered), 0.0, ordered)
        above = np.maximum.reduceat(known, self.starts, axis=1)
        below = np.minimum.reduceat(known, self.starts, axis=1)
        result = np.where(-below > above, below, above)
        result[np.logical_and.reduceat(np.isnan(ordered), self.starts, axis=1)] = np.nan
        return result

    def present(self, row: Sequence[float]) -> dict[str, float]:
        """Maps block names to one row of :meth:`norms`, without blocks that had no gradient."""
        return {n: v for n, v in zip(self.names, row, strict=True) if v != NO_GRADIENT}


class BlockScalars:
    """Turns what was measured of each parameter into a few values per step: one per block.

    The norms of a model that is one block are left out, as they are the norm of the step.
    """

    def __init__(self, *, norms: bool, statistics: bool) -> None:
        """Starts without a layout.

        Args:
            norms: Whether there are norms, ``"blocks/<block>"``: the L2 norm before the clip.
            statistics: Whether there are further statistics, ``"<statistic>/<block>"``, where they
                were taken: the value of the parameter of the block where it is largest in
                magnitude.
        """
        self._norms, self._statistics = norms, statistics
        self._blocks: tuple[Layout, Blocks] | None = None

    def of(self, batch: RecordBatch) -> list[dict[str, float]]:
        """Returns, for each step of a batch, its values by name."""
        rows: list[dict[str, float]] = [{} for _ in batch.steps]
        if not (self._norms or self._statistics):
            return rows
        blocks = self._blocks_of(batch.layout)
        if self._norms and blocks.names:
            for row, norms in zip(rows, blocks.norms(batch.norms).tolist(), strict=True):
                row |= {f"blocks/{name}": v for name, v in blocks.present(norms).items()}
        if self._statistics and batch.statistics:
            divided = blocks if blocks.names else Blocks.whole(len(batch.layout.names))
            for statistic, values in batch.statistics.items():
                for row, largest in zip(rows, divided.largest(values).tolist(), strict=True):
                    row |= {
                        f"{statistic}/{name}": value
                        for name, value in zip(divided.names, largest, strict=True)
                        if not math.isnan(value)
                    }
        return rows

    def _blocks_of(self, layout: Layout) -> Blocks:
        if self._blocks is None or self._blocks[0] != layout:
            self._blocks = layout, Blocks.of(layout.modules)
        return self._blocks[1]
