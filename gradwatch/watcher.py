"""Watcher: a run being watched; ties together what is observed, decided, recorded and explained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.control.boundary import StepBoundary
from gradwatch.control.discovery import OptimizerDiscovery
from gradwatch.control.in_backward import (
    first_stepped_in_backward,
    refuse_what_needs_all_gradients,
)
from gradwatch.control.loss_scale import LossScale
from gradwatch.control.policy import ClipPolicy
from gradwatch.control.spikes import SpikeRule
from gradwatch.control.step_control import Rules, StepControl
from gradwatch.control.window import Window
from gradwatch.history import History
from gradwatch.managed import ManagedLoop
from gradwatch.observe.arrivals import Backward
from gradwatch.observe.model_hooks import ModelHooks
from gradwatch.observe.parameters import ParameterTable, optimizer_parameters
from gradwatch.observe.ranks import rank
from gradwatch.observe.shards import Shards
from gradwatch.options import Options, check_options
from gradwatch.overhead import Overhead, Stopwatch
from gradwatch.record.batch import Layout
from gradwatch.record.buffer import RingBuffer
from gradwatch.record.event import Event
from gradwatch.record.hub import SinkHub
from gradwatch.record.sinks import Sink
from gradwatch.record.step import StepRecord
from gradwatch.recorder import Recorder
from gradwatch.shield import Shield, ShieldedListener
from gradwatch.targets import check_unwatched, optimizer_list, parameter_table
from gradwatch.track import Run, Track
from gradwatch.unclaimed import Unclaimed

STATE_VERSION = 2

ATTACHED_BEFORE = (
    "This watcher was attached before and holds the history of that run. Make a new one with "
    "watch(...), and give it load_state_dict() of the old one to go on counting."
)


class Watcher:
    """A run being watched: made by :func:`watch`, attached by its ``with`` block.

    Attributes:
        global_step: Gives the x-axis of loggers for a step that ends; a framework's adapter sets
            it to the framework's own count. None for the optimizer's steps.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        table: ParameterTable,
        optimizers: Sequence[Optimizer],
        options: Options,
    ) -> None:
        """Takes checked arguments; use :func:`watch`."""
        self.global_step: Callable[[], int] | None = None
        self._options = options
        self._optimizers = list(optimizers)
        self._hooks = ModelHooks(model, table, self._on_backward, self._on_arrived)
        self._run = self._make_run(table)
        self._managed = ManagedLoop(options)
        self._shield = Shield(options.acts, self._detach)
        self._tracks: list[Track] = []
        self._boundaries: list[StepBoundary] = []
        self._unclaimed: Unclaimed | None = None
        self._discovery: OptimizerDiscovery | None = None
        self._steps: dict[str, int] = {}
        self._control_states: dict[str, Any] = {}
        self._fresh_clip = {} if options.clip is None else options.clip.state_dict()
        self._state = "new"

    # -- life ----------------------------------------------------------------------------------

    def attach(self) -> Watcher:
        """Hangs the hooks on parameters and optimizers; ``with`` does it.

        Returns:
            The watcher.

        Raises:
            RuntimeError: If another watcher is attached to the model, or this one was before.
        """
        if self._state != "new":
            raise RuntimeError(ATTACHED_BEFORE)
        check_unwatched(self._run.table)
        self._check_optimizers_in_backward()
        self._state = "attached"
        self._run.stopwatch.start()
        watched = list(range(len(self._run.table)))
        if self._optimizers:
            for optimizer in self._optimizers:
                indices = self._run.table.indices_of(optimizer_parameters(optimizer))
                self._track(optimizer, self._window(indices))
            watched = [index for track in self._tracks for index in track.window.indices]
        else:
            self._unclaimed = Unclaimed(self._run, watched, self._norm_type)
            self._unclaimed.steps = self._steps.get("none", 0)
            owned = set(self._run.table.positions())
            self._discovery = OptimizerDiscovery(owned, self._on_optimizer_found)
        self._hooks.attach(watched, self._norm_type, owned=bool(self._optimizers))
        return self

    def close(self) -> None:
        """Takes every hook off, delivers what the sinks have not seen and closes them.

        The history stays readable. Safe to call again; leaving the ``with`` block does it.
        """
        if self._state == "closed":
            return
        self._state = "closed"
        self._detach()
        for track in self._tracks:
            self._shield.run(partial(track.abandon_window, track.left_out_by_scaler), None)
        if self._unclaimed is not None and not self._tracks:
            self._unclaimed.commit()
        self._run.stopwatch.stop()
        self._run.recorder.close()

    def __enter__(self) -> Watcher:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- a loop that leaves backward and step to gradwatch ---------------------------------------

    def backward(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Runs the backward of one micro-batch.

        The gradient of a window is the mean over its micro-batches, weighted where weights are
        given: the loss must be a mean over the micro-batch, and a weight the number of its
        examples or tokens.

        Args:
            loss: Tensor ``[]``; neither divided by the number of micro-batches nor scaled.
            weight: Weight of the micro-batch, positive; all the same if left out.

        Raises:
            RuntimeError: If no optimizer was named.
            AccumulationError: If the window is full already.
        """
        self._managed.backward(self._tracks, loss, weight)

    def step(self, last: bool = False) -> bool:
        """Steps when the window is full: unscales, measures, clips, steps and zeroes.

        Args:
            last: Steps a window that is not full too, its gradient the mean over what is there.

        Returns:
            True when the optimizer stepped; False when the window is not full yet, or the step
            was skipped.

        Raises:
            NonFiniteGradientError: If asked for by ``on_nonfinite="raise"``.
        """
        return self._managed.step(self._tracks, last)

    # -- what is there to read -------------------------------------------------------------------

    @property
    def history(self) -> History:
        """The newest ``buffer_size`` steps and the events, as pandas frames."""
        return History(self._run.recorder.batch)

    @property
    def events(self) -> list[Event]:
        """What happened so far, oldest first: the first 1,000 and the newest 9,000."""
        return list(self._run.recorder.events())

    @property
    def last(self) -> StepRecord | None:
        """The newest complete step; None before the first."""
        return self._run.recorder.last

    @property
    def overhead(self) -> Overhead:
        """What gradwatch took so far: seconds, and their share of the wall time."""
        return self._run.stopwatch.read()

    def flush(self) -> None:
        """Delivers what the sinks have not seen yet, rather than with the next batch."""
        if self._unclaimed is not None and not self._tracks:
            self._unclaimed.commit()
        self._run.recorder.flush()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on, as plain numbers, strings and lists.

        Returns:
            Steps per optimizer and the memory of the clipping policy; not the history.
        """
        steps = {**self._steps, **{track.label: track.step for track in self._tracks}}
        if self._unclaimed is not None and self._unclaimed.steps:
            steps["none"] = self._unclaimed.steps
        self._run.recorder.receive(wait=True)
        control = {t.label: t.control.state_dict() for t in self._tracks if t.control is not None}
        return {
            "version": STATE_VERSION,
            "steps": steps,
            "control": {**self._control_states, **control},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the run that gave the state stopped; before or after attaching.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: If the state is no mapping.
            ValueError: If the state is of another version.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"load_state_dict() takes what state_dict() returned, got {state!r} of type "
                f"{type(state).__name__}."
            )
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"load_state_dict() got a state of version {state.get('version')!r}, this "
                f"gradwatch reads version {STATE_VERSION}. Pass what Watcher.state_dict() returned."
            )
        self._steps = dict(state["steps"])
        self._control_states = dict(state["control"])
        for track in self._tracks:
            self._load_into(track)
        if self._unclaimed is not None:
            self._unclaimed.steps = self._steps.get("none", 0)

    def _load_into(self, track: Track) -> None:
        track.step = self._steps.get(track.label, 0)
        if track.control is not None and track.label in self._control_states:
            track.control.load_state_dict(self._control_states[track.label])

    # -- what the hooks call -----------------------------------------------------------------------

    def _on_arrived(self) -> None:
        local = self._hooks.local
        if local is not None:
            with self._run.stopwatch, torch.no_grad():
                self._shield.run(local.take, None)

    def _on_backward(self, backward: Backward) -> None:
        with self._run.stopwatch, torch.no_grad():
            self._run.stopwatch.count_arrivals(len(backward.arrived))
            self._shield.run(lambda: self._add(backward), None)

    def _add(self, backward: Backward) -> None:
        self._run.scale.look_once()
        thawed = self._hooks.hook_thawed()
        if thawed:
            backward = replace(backward, arrived=[*backward.arrived, *thawed])
        for track in self._tracks:
            track.add(backward, self._managed.weight)
        if self._unclaimed is not None:
            backward = replace(backward, freed=self._hooks.take_freed(backward.arrived))
            self._unclaimed.add(backward, self._managed.weight, alone=not self._tracks)

    def _on_optimizer_found(self, optimizer: Optimizer) -> None:
        if self._unclaimed is None:
            return
        indices = self._run.table.indices_of(optimizer_parameters(optimizer))
        if any(track.stepping and track.shares(indices) for track in self._tracks):
            return  # an optimizer that another one calls, as SAM does: one step, not two
        windows = [self._unclaimed.window, *(track.window for track in self._tracks)]
        parts = [window.part(indices) for window in windows]
        self._unclaimed.give_up(indices)
        self._track(optimizer, max(parts, key=lambda part: len(part.arrived)))

    def _track(self, optimizer: Optimizer, window: Window) -> None:
        label = _label(optimizer, [track.label for track in self._tracks])
        control = StepControl(optimizer, self._run.table, self._rules())
        track = Track(label, optimizer, window, self._run, control)
        track.on_parameters_added = self._hooks.watch_also
        self._tracks.append(track)
        self._load_into(track)
        may_refuse = self._options.on_nonfinite != "record" or self._options.skip_spikes is not None
        listener = ShieldedListener(track, self._shield)
        self._boundaries.append(StepBoundary(optimizer, listener, may_refuse))

    def _detach(self) -> None:
        if self._discovery is not None:
            self._discovery.remove()
        for boundary in self._boundaries:
            boundary.remove()
        self._hooks.detach()

    def _check_optimizers_in_backward(self) -> None:
        table = self._run.table
        name = first_stepped_in_backward(table.names, table.tensors)
        if name is not None:
            where = f', as that of "{name}" does'
            refuse_what_needs_all_gradients(self._options.deciding, where)

    def _rules(self) -> Rules:
        options, clip = self._options, self._options.clip
        if clip is not None and self._tracks:  # each optimizer's policy has a memory of its own
            clip = copy.deepcopy(clip)
            clip.load_state_dict(self._fresh_clip)
        spikes = None if options.skip_spikes is None else SpikeRule(options.skip_spikes)
        return Rules(clip, options.on_nonfinite, spikes, options.max_consecutive_skips)

    # -- parts -------------------------------------------------------------------------------------

    def _make_run(self, table: ParameterTable) -> Run:
        options = self._options
        layout = Layout(
            names=table.names,
            modules=table.modules,
            shapes=tuple(tuple(tensor.shape) for tensor in table.tensors),
            aliases=table.aliases,
        )
        buffer = RingBuffer(layout, options.buffer_size)
        sinks = options.sinks if rank() == 0 else ()  # the ranks would write the same numbers
        return Run(
            table=table,
            shards=Shards.of(table.tensors),
            options=options,
            scale=LossScale(options.scaler),
            recorder=Recorder(buffer, SinkHub(sinks, options.buffer_size)),
            stopwatch=Stopwatch(),
            hooks=self._hooks,
            global_step=lambda step: step if self.global_step is None else self.global_step(),
        )

    @property
    def _norm_type(self) -> float:
        return 2.0 if self._options.clip is None else self._options.clip.norm_type

    def _window(self, indices: Sequence[int]) -> Window:
        return Window(self._run.table, list(indices), self._norm_type, shards=self._run.shards)


def watch(
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    clip: float | str | ClipPolicy | None = None,
    accumulate: int = 1,
    on_nonfinite: str = "record",
    statistics: Iterable[str] = ("norm",),
    every: int = 1,
    buffer_size: int = 1024,
    scaler: torch.amp.GradScaler | None = None,
    sinks: Iterable[Sink] = (),
    exploding_norm: float | None = None,
    skip_spikes: float | str | None = None,
    max_consecutive_skips: int = 10,
) -> Watcher:
    """Watches the gradients of a model while its training loop runs.

    Args:
        model: A module, or a mapping from names to leaf tensors.
        optimizer: One or several. Left out, the optimizers that step the model's parameters are
            found at their first step; where none ever steps, each backward counts as a step.
        clip: A maximum for the global L2 norm, ``"auto"`` to have it found, or a policy such as
            ``ClipByNorm``, ``ClipByValue`` or ``ZClip``. None leaves the gradients alone.
        accumulate: Micro-batches per step.
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
        exploding_norm: A total norm above it is an ``exploding`` event; None for no limit.
        skip_spikes: Leaves a step out whose norm is so many deviations above the usual, as
            ``on_nonfinite="skip"`` does; ``"auto"`` for 6, None to take all.
        max_consecutive_skips: How many steps in a row gradwatch may leave out. One more with a NaN
            or Inf raises :class:`~gradwatch.NonFiniteGradientError`; one more that is finite is
            taken: so many outliers in a row are a rise that lasts.

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
        exploding_norm=exploding_norm,
        skip_spikes=skip_spikes,
        max_consecutive_skips=max_consecutive_skips,
    )
    table = parameter_table(model)
    check_unwatched(table)
    return Watcher(model, table, optimizer_list(optimizer, table), options)


def _label(optimizer: Optimizer, taken: Sequence[str]) -> str:
    name = type(optimizer).__name__
    same = sum(label == name or label.startswith(f"{name}-") for label in taken)
    return f"{name}-{same}" if same else name
