"""watch(): checks what is asked for, and makes the watcher of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.control.policy import ClipPolicy
from gradwatch.described import described_optimizer, described_options
from gradwatch.explain.curvature_every import CurvatureEvery, sampler_of
from gradwatch.observe.ranks import rank
from gradwatch.options import Accumulate, check_options
from gradwatch.record.run_folder import RunFolder
from gradwatch.record.sinks import Sink
from gradwatch.targets import check_unwatched, optimizer_list, parameter_table
from gradwatch.watcher import Watcher


def watch(
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    clip: float | str | ClipPolicy | None = None,
    accumulate: Accumulate = 1,
    on_nonfinite: str = "record",
    statistics: Iterable[str] = ("norm",),
    every: int = 1,
    buffer_size: int = 1024,
    scaler: torch.amp.GradScaler | None = None,
    sinks: Iterable[Sink] = (),
    run_dir: str | os.PathLike[str] | None = None,
    exploding_norm: float | None = None,
    skip_spikes: float | str | None = None,
    max_consecutive_skips: int = 10,
    curvature: CurvatureEvery | None = None,
) -> Watcher:
    """Watches the gradients of a model while its training loop runs.

    Args:
        model: A module, or a mapping from names to leaf tensors.
        optimizer: One or several. Left out, the optimizers that step the model's parameters are
            found at their first step; where none ever steps, each backward counts as a step.
        clip: A maximum for the global L2 norm, ``"auto"`` to have it found, or a policy such as
            ``ClipByNorm``, ``ClipByValue`` or ``ZClip``. None leaves the gradients alone.
        accumulate: Micro-batches per step: a number, ``{step: number}``, a function of the step, or
            a policy such as :class:`~gradwatch.AccumulateByNoiseScale`, which is what ``"auto"``
            stands for.
        on_nonfinite: What to do about a gradient with NaN or Inf: ``"record"`` it, ``"skip"`` the
            step (weights and optimizer state stay as they were) or ``"raise"``
            :class:`~gradwatch.NonFiniteGradientError` before any weight changes.
        statistics: What to take per parameter besides ``"norm"``: ``"max"``, ``"mean"``, ``"std"``,
            ``"zeros"``, ``"weight_norm"``, ``"update_ratio"``.
        every: Take those at every so many steps.
        buffer_size: Steps kept in memory.
        scaler: The ``GradScaler`` of the loop, so that norms are in true units.
        sinks: Receive all records: objects with ``write(batch)`` and ``close()``; of several ranks
            the first one's do.
        run_dir: A folder that keeps the whole run, for :func:`gradwatch.load` and every tool that
            reads Parquet; one that holds a run is gone on with. Needs ``gradwatch[runs]``.
        exploding_norm: A total norm above it is an ``exploding`` event; None for no limit.
        skip_spikes: Leaves a step out whose norm is so many deviations above the usual, as
            ``on_nonfinite="skip"`` does; ``"auto"`` for 6, None to take all.
        max_consecutive_skips: How many steps in a row gradwatch may leave out. One more with a NaN
            or Inf raises :class:`~gradwatch.NonFiniteGradientError`; one more that is finite is
            taken: so many outliers in a row are a rise that lasts.
        curvature: Takes the curvature of a loss along the training:
            ``CurvatureEvery(200, lambda: criterion(model(x), y))``. Not with FSDP2, nor with
            weights in half precision.

    Returns:
        The watcher, to be used in a ``with`` statement.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of bounds, or the optimizer's parameters are not the
            model's.

    Example:
        >>> import torch
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> with watch({"x": x}) as watcher:
        ...     (x**2 + 3 * x + 1).backward()
        >>> watcher.last.grad_norm
        7.0
    """
    options = check_options(
        clip=clip,
        accumulate=accumulate,
        on_nonfinite=on_nonfinite,
        statistics=statistics,
        every=every,
        buffer_size=buffer_size,
        scaler=scaler,
        sinks=sinks,
        run_dir=run_dir,
        exploding_norm=exploding_norm,
        skip_spikes=skip_spikes,
        max_consecutive_skips=max_consecutive_skips,
        curvature=curvature,
    )
    table = parameter_table(model)
    check_unwatched(table)
    sampler_of(options.curvature, model)  # refuses what cannot be had before a folder is made
    optimizers = optimizer_list(optimizer, table)
    if options.run_dir is not None and rank() == 0:
        folder = RunFolder(
            options.run_dir,
            optimizers=list(map(described_optimizer, optimizers)),
            options=described_options(options),
        )
        options = replace(options, sinks=(*options.sinks, folder))
    return Watcher(model, table, optimizers, options)
