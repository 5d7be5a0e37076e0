"""The optimizers of a run, named from the start or found at their first step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from gradwatch.accumulate.noise_scale import NoiseScale, NoiseScaleEstimator
from gradwatch.clip.spikes import SpikeRule
from gradwatch.guard import Shield
from gradwatch.hooks.backward import Backward
from gradwatch.hooks.optimizer import (
    OptimizerDiscovery,
    StepBoundary,
    first_stepped_in_backward,
    refuse_what_needs_all_gradients,
)
from gradwatch.measure.deferred import FloatOrDeferred, resolve
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.record.events import dropped_event, nonfinite_error
from gradwatch.record.records import warn_safely
from gradwatch.step.optimizer_steps import OptimizerSteps, Rules, StepControl
from gradwatch.step.pending import PendingStep
from gradwatch.step.run import Run
from gradwatch.step.window import Window

if TYPE_CHECKING:
    from gradwatch.hessian.every import CurvatureSampler


class BackwardSteps:
    """What happens to parameters before it is known which optimizer steps them.

    Where no optimizer ever steps, each backward is a step. That is settled as soon as the weights
    move without one, or at the end of the run; until then the backwards are held.
    """

    def __init__(self, run: Run, indices: Sequence[int], norm_type: float) -> None:
        """Starts with all watched parameters.

        Args:
            run: What all tracks share.
            indices: The parameters.
            norm_type: The p of the norms.
        """
        self._run = run
        window = Window(run.table, list(indices), norm_type, shards=run.shards)
        self._track = OptimizerSteps("none", None, window, run)
        self._by_backward = False
        self._versions = -1

    @property
    def _raises(self) -> bool:
        # A scaler overflows on purpose while it looks for its scale, and skips those steps.
        return self._run.options.on_nonfinite == "raise" and self._run.options.scaler is None

    @property
    def steps(self) -> int:
        """Backwards that count as steps so far."""
        return self._track.step

    @steps.setter
    def steps(self, value: int) -> None:
        self._track.step = value

    def add(self, backward: Backward, weight: FloatOrDeferred, alone: bool) -> None:
        """Takes in a backward that has ended.

        Args:
            backward: What arrived in it.
            weight: Weight of the micro-batch.
            alone: Whether no optimizer has been found at all.
        """
        if self._by_backward:
            self._track.window.reset()
        if not self._track.add(backward, weight) or not alone:
            return
        self._settle_how_steps_count()
        account = self._track.account_of_backward()
        self._keep(account)
        if self._raises and account.entry().record.nonfinite_parameters:
            raise nonfinite_error(account.entry().record, account.entry().events)

    @property
    def window(self) -> Window:
        """What has come for the parameters that no optimizer has stepped."""
        return self._track.window

    def give_up(self, indices: Sequence[int]) -> None:
        """Leaves parameters to an optimizer that is about to step them.

        Args:
            indices: Its parameters.
        """
        if not self._by_backward:
            self._run.recorder.retract()
            self._track.step = 0
        self._track.window.leave(indices)

    def commit(self) -> None:
        """Settles that each backward was a step."""
        self._by_backward = True
        self._run.recorder.commit()

    def _keep(self, account: PendingStep) -> None:
        recorder = self._run.recorder
        if self._by_backward:
            recorder.expect(account)
        elif recorder.hold(account) >= self._run.options.buffer_size:
            self.commit()

    def _settle_how_steps_count(self) -> None:
        versions = sum(tensor._version for tensor in self._run.table.tensors)
        if not self._by_backward and 0 <= self._versions < versions:
            self.commit()
        self._versions = versions


NO_STEP = "no optimizer has stepped yet"
NEVER_ACTED = (
    "watch({asked}) did nothing: no torch optimizer stepped the watched parameters, as where one "
    "steps copies of them (master weights). Name the optimizer, watch(model, optimizer), to be "
    "told what does not fit."
)

NEVER_TAKEN = (
    "watch({asked}) took nothing: no torch optimizer stepped the watched parameters, and "
    "without one no step is known to have changed the weights. Name the optimizer, watch(model, "
    "optimizer), to be told what does not fit."
)


class OptimizerRegistry:
    """Follows every optimizer that steps the watched parameters, and what none of them steps.

    Attributes:
        followed: One for each optimizer, in the order in which they came.
    """

    def __init__(self, run: Run, shield: Shield, curvature: CurvatureSampler | None = None) -> None:
        """Follows nothing yet.

        Args:
            run: What all tracks share.
            shield: Stands between the training and the errors of gradwatch.
            curvature: Takes the curvature after steps of the first optimizer.
        """
        self.followed: list[OptimizerSteps] = []
        self._run = run
        self._options = run.options
        self._shield = shield
        self._curvature = curvature
        self._boundaries: list[StepBoundary] = []
        self._unclaimed: BackwardSteps | None = None
        self._discovery: OptimizerDiscovery | None = None
        self._steps: dict[str, int] = {}
        self._controls: dict[str, Any] = {}
        self._noise: dict[str, Any] = {}
        clip = run.options.clip
        self._fresh_clip = {} if clip is None else clip.state_dict()

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Hangs hooks on the optimizers, and on the parameters that they step.

        Args:
            optimizers: Those that were named; without any they are found at their first step.

        Raises:
            ValueError: If something was asked for that such optimizers cannot have.
        """
        table = self._run.table
        name = first_stepped_in_backward(table.names, table.tensors)
        if name is not None:
            refuse_what_needs_all_gradients(self._options.deciding, f', as that of "{name}" does')
        watched = list(range(len(table)))
        accumulates = self._run.accumulation.accumulates
        if optimizers:
            for optimizer in optimizers:
                self._follow(optimizer, self._window(self._indices(optimizer)))
            watched = [index for track in self.followed for index in track.window.indices]
        else:
            self._unclaimed = BackwardSteps(self._run, watched, self._norm_type)
            self._unclaimed.steps = self._steps.get("none", 0)
            self._discovery = OptimizerDiscovery(set(table.positions()), self._on_found)
        self._run.hooks.attach(watched, self._norm_type, owned=bool(optimizers))
        if accumulates:
            self._run.hooks.watch_added()

    def detach(self) -> None:
        """Takes every hook off; safe to call again."""
        if self._discovery is not None:
            self._discovery.remove()
        for boundary in self._boundaries:
            boundary.remove()
        self._run.hooks.detach()

    def add(self, backward: Backward, weight: FloatOrDeferred) -> None:
        """Takes in a backward that has ended.

        Args:
            backward: What arrived in it.
            weight: Weight of the micro-batch.
        """
        run = self._run
        if not run.scale.looked:
            run.scale.look()
        if run.hooks.unhooked:
            backward = backward._replace(arrived=[*backward.arrived, *run.hooks.hook_thawed()])
        for track in self.followed:
            track.add(backward, weight)
        if self._unclaimed is not None:
            backward = backward._replace(freed=run.hooks.take_freed(backward.arrived))
            self._unclaimed.add(backward, weight, alone=not self.followed)
        if run.hooks.added.watching:
            self._watch_what_is_added()

    def _watch_what_is_added(self) -> None:
        """Measures what the next backward adds, where something is there to add to."""
        added = self._run.hooks.added
        added.begin()
        added.active = any(track.window.micro_batches for track in self.followed)

    def noise_scale(self) -> NoiseScale:
        """Returns the noise scale of the first optimizer; with the reason where there is none."""
        if not self.followed:
            return replace(NoiseScaleEstimator().read(), reason=NO_STEP)
        weighing = self.followed[0].weighing
        noise = weighing.noise.read()
        if noise.updates or not weighing.silent:
            return noise
        return replace(noise, reason=weighing.silent)

    def settle(self) -> None:
        """Settles that each backward was a step, where no optimizer has been found."""
        if self._unclaimed is not None and not self.followed:
            self._unclaimed.commit()

    def end(self) -> None:
        """Ends the windows that are open when the run ends."""
        for track in self.followed:
            with self._shield:
                track.end()
        self.settle()
        stepped = self.followed or self._unclaimed is None or not self._unclaimed.steps
        if self._options.acting and not stepped:
            warn_safely(NEVER_ACTED.format(asked=" and ".join(self._options.acting)))
        if self._options.of_steps and not stepped:
            warn_safely(NEVER_TAKEN.format(asked=", ".join(self._options.of_steps)))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: steps and decisions per optimizer."""
        steps = {**self._steps, **{track.label: track.step for track in self.followed}}
        if self._unclaimed is not None and self._unclaimed.steps:
            steps["none"] = self._unclaimed.steps
        self._run.recorder.receive(wait=True)
        tracked = [(track.label, track.control) for track in self.followed]
        controls = {label: c.state_dict() for label, c in tracked if c is not None}
        noise = {track.label: track.weighing.noise.state_dict() for track in self.followed}
        return {
            "steps": steps,
            "control": {**self._controls, **controls},
            "noise": {**self._noise, **noise},
            "window": self._window_state(),
        }

    def _window_state(self) -> dict[str, Any]:
        windows = [track.window for track in self.followed if track.window.micro_batches]
        if not windows:
            return {}
        return {
            "micro_batches": windows[0].micro_batches,
            "weight": float(resolve(windows[0].weight)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, also for optimizers that are still to come."""
        self._steps = dict(state["steps"])
        self._controls = dict(state["control"])
        self._noise = dict(state["noise"])
        self._report_dropped(**state["window"])
        for track in self.followed:
            self._load_into(track)
        if self._unclaimed is not None:
            self._unclaimed.steps = self._steps.get("none", 0)

    def _report_dropped(self, micro_batches: int = 0, weight: float = 0.0) -> None:
        if micro_batches:
            step = max(self._steps.values(), default=0) + 1
            event = dropped_event(step, micro_batches, weight)
            self._run.note(event)
            warn_safely(f"gradwatch: {event.message}")

    def _on_found(self, optimizer: Optimizer) -> None:
        if self._unclaimed is None:
            return
        indices = self._indices(optimizer)
        if any(track.stepping and track.shares(indices) for track in self.followed):
            return  # an optimizer that another one calls, as SAM does: one step, not two
        windows = [self._unclaimed.window, *(track.window for track in self.followed)]
        parts = [window.part(indices) for window in windows]
        self._unclaimed.give_up(indices)
        self._follow(optimizer, max(parts, key=lambda part: len(part.arrived)))

    def _follow(self, optimizer: Optimizer, window: Window) -> None:
        label = _label(optimizer, [track.label for track in self.followed])
        control = StepControl(optimizer, self._run.table, self._rules())
        track = OptimizerSteps(label, optimizer, window, self._run, control)
        track.on_parameters_added = self._run.hooks.watch_also
        track.on_finished = partial(self._on_finished, track)
        if self._curvature is not None and not self.followed:
            track.curvature = self._curvature
        self.followed.append(track)
        self._load_into(track)
        may_refuse = self._options.on_nonfinite != "record" or self._options.skip_spikes is not None
        self._boundaries.append(StepBoundary(optimizer, track, self._shield, may_refuse))

    def _on_finished(self, track: OptimizerSteps) -> None:
        if self._run.hooks.added.watching:
            self._watch_what_is_added()
        if track is self.followed[0] and not self._run.accumulation.fixed:
            self._run.accumulation.next_window(track.step, self._noise_now)

    def _noise_now(self) -> NoiseScale:
        self._run.recorder.receive(wait=True)
        return self.followed[0].weighing.noise.read()

    def _load_into(self, track: OptimizerSteps) -> None:
        track.step = self._steps.get(track.label, 0)
        if track.label in self._noise:
            track.weighing.noise.load_state_dict(self._noise[track.label])
        if track.control is not None and track.label in self._controls:
            track.control.load_state_dict(self._controls[track.label])

    def _rules(self) -> Rules:
        options, clip = self._options, self._options.clip
        if clip is not None and self.followed:  # each optimizer's policy has a memory of its own
            clip = copy.deepcopy(clip)
            clip.load_state_dict(self._fresh_clip)
        spikes = None if options.skip_spikes is None else SpikeRule(options.skip_spikes)
        return Rules(clip, options.on_nonfinite, spikes, options.max_consecutive_skips)

    def _indices(self, optimizer: Optimizer) -> list[int]:
        return self._run.table.indices_of(optimizer_parameters(optimizer))

    @property
    def _norm_type(self) -> float:
        return 2.0 if self._options.clip is None else self._options.clip.norm_type

    def _window(self, indices: Sequence[int]) -> Window:
        return Window(self._run.table, list(indices), self._norm_type, shards=self._run.shards)


def _label(optimizer: Optimizer, taken: Sequence[str]) -> str:
    name = type(optimizer).__name__
    same = sum(label == name or label.startswith(f"{name}-") for label in taken)
    return f"{name}-{same}" if same else name
