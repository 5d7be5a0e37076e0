"""The optimizers of a run, named from the start or found at their first step."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, repeat
from typing import Any

from torch.optim import Optimizer

from gradwatch.accumulate.noise_scale import NoiseScale, NoiseScaleEstimator
from gradwatch.clip.policy import ClipPolicy
from gradwatch.errors import warn_safely
from gradwatch.guard import Shield
from gradwatch.hooks.backward import Backward
from gradwatch.hooks.optimizer import (
    OptimizerDiscovery,
    StepBoundary,
    first_stepped_in_backward,
    refuse_what_needs_all_gradients,
)
from gradwatch.hooks.scaler import LossScale
from gradwatch.measure.deferred import FloatOrDeferred, resolve
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.record.events import dropped_event, nonfinite_error
from gradwatch.step.optimizer_steps import MeasureCurvature, OptimizerSteps, Steps
from gradwatch.step.pending import PendingStep
from gradwatch.step.run import Run
from gradwatch.step.window import Window


class BackwardSteps(Steps):
    """The backwards of parameters of which it is not known yet which optimizer steps them.

    If no optimizer ever steps, each backward counts as a step. This is known as soon as the weights
    change without an optimizer step, or at the end of the run. Until then the backwards are held.
    """

    def __init__(self, run: Run, window: Window) -> None:
        """Starts with an empty window over all watched parameters."""
        # Only a scaler that the user named: without an optimizer step nothing shows whether one
        # that was found is in use.
        super().__init__("none", window, run, LossScale(run.options.scaler))
        # Not with a scaler: it provokes overflows while it searches for its scale, and skips those
        # steps.
        self._raises = run.options.on_nonfinite == "raise" and run.options.scaler is None
        self._are_steps = False
        self._versions = -1

    def add_alone(self, backward: Backward, weight: FloatOrDeferred, alone: bool) -> None:
        """Adds a backward that has ended.

        ``alone`` says that no optimizer has been found at all, so the backward may be a step.
        """
        if self._are_steps or self._scaler_has_updated():
            self.window.reset()
        if not self.add(backward, weight) or not alone:
            return
        self._find_out_what_steps_are()
        pending = self._step_of_newest()
        if self._are_steps:
            self._run.recorder.expect(pending)
        elif self._run.recorder.hold(pending) >= self._options.buffer_size:
            self.commit()
        if self._raises and pending.entry().record.nonfinite_parameters:
            raise nonfinite_error(pending.entry().record, pending.entry().events)

    def release(self, indices: Sequence[int]) -> None:
        """Leaves parameters to an optimizer that has been found and is about to step them."""
        if not self._are_steps:
            self._run.recorder.retract()
            self.step = 0
        self.window.leave(indices)

    def commit(self) -> None:
        """Decides that each backward was a step."""
        self._are_steps = True
        self._run.recorder.commit()

    def _step_of_newest(self) -> PendingStep:
        whole, self.window = self.window, self.window.latest()
        self.step += 1
        norms = self.window.step_norms(self._scale, 1.0)
        pending = self._pending(norms, self.step)
        self.window = whole
        return pending

    def _find_out_what_steps_are(self) -> None:
        versions = sum(tensor._version for tensor in self._run.table.tensors)
        if not self._are_steps and 0 <= self._versions < versions:
            self.commit()  # the weights were changed in place, but not by an optimizer
        self._versions = versions


NO_STEP = "no optimizer has stepped yet"
NEVER_ACTED = (
    "watch({asked}) did nothing: no torch optimizer stepped the watched parameters, as happens if "
    "one steps copies of them (master weights). Name the optimizer, watch(model, optimizer), to be "
    "told what does not fit."
)

NEVER_TAKEN = (
    "watch({asked}) took nothing: no torch optimizer stepped the watched parameters, and "
    "without one no step is known to have changed the weights. Name the optimizer, watch(model, "
    "optimizer), to be told what does not fit."
)


class OptimizerRegistry:
    """Follows every optimizer of the watched parameters, and the backwards without an optimizer.

    Attributes:
        followed: The steps of each optimizer, in the order in which the optimizers were named or
            found.
    """

    def __init__(self, run: Run, shield: Shield, curvature: MeasureCurvature | None = None) -> None:
        """Follows no optimizer yet; ``curvature`` is measured after steps of the first one."""
        self.followed: list[OptimizerSteps] = []
        self._run = run
        self._options = run.options
        self._shield = shield
        self._curvature = curvature
        self._boundaries: list[StepBoundary] = []
        self._unowned: BackwardSteps | None = None
        self._discovery: OptimizerDiscovery | None = None
        self._steps: dict[str, int] = {}
        self._controls: dict[str, Any] = {}
        self._noise: dict[str, Any] = {}
        clip = run.options.clip
        self._fresh_clip = {} if clip is None else clip.state_dict()
        self._norm_type = 2.0 if clip is None else clip.norm_type

    def attach(self, optimizers: Sequence[Optimizer], names: Sequence[str] = ()) -> None:
        """Registers the hooks on the optimizers, and on the parameters that they step.

        Args:
            optimizers: The optimizers that the user passed. If there are none, all watched
                parameters are hooked, and optimizers are found at their first step.
            names: Their labels; empty to label them by class.

        Raises:
            ValueError: If an optimizer steps inside the backward, and an option was set that needs
                all gradients.
        """
        table = self._run.table
        name = first_stepped_in_backward(table.names, table.tensors)
        if name is not None:
            refuse_what_needs_all_gradients(self._options.deciding, f', as that of "{name}" does')
        watched = list(range(len(table)))
        accumulates = self._run.accumulation.accumulates
        if optimizers:
            for optimizer, name in zip(optimizers, names or repeat(""), strict=False):
                self._follow(optimizer, self._window(self._indices(optimizer)), name)
            watched = [index for one in self.followed for index in one.window.indices]
        else:
            self._unowned = BackwardSteps(self._run, self._window(watched))
            self._unowned.step = self._steps.get("none", 0)
            self._run.joint_steps.find_more()
            self._discovery = OptimizerDiscovery(set(table.positions()), self._on_found)
        self._run.hooks.attach(watched, self._norm_type, owned=bool(optimizers))
        if accumulates:
            self._run.hooks.watch_added()

    def detach(self) -> None:
        """Removes every hook; safe to call again."""
        if self._discovery is not None:
            self._discovery.remove()
        for boundary in self._boundaries:
            boundary.remove()
        self._run.hooks.detach()

    def add(self, backward: Backward, weight: FloatOrDeferred) -> None:
        """Adds a backward that has ended to the window of every optimizer that it concerns."""
        run = self._run
        if not run.scale.looked:
            run.scale.look()
        if run.hooks.unhooked:
            backward = backward._replace(arrived=[*backward.arrived, *run.hooks.hook_thawed()])
        for one in self.followed:
            one.add(backward, weight)
        if self._unowned is not None:
            backward = backward._replace(freed=run.hooks.freed.take(backward.arrived))
            self._unowned.add_alone(backward, weight, alone=not self.followed)
        if run.joint_steps.current is not None:
            run.joint_steps.close()  # only now: the loop above may find steps that a scaler skipped
        if run.hooks.added.watching:
            self._watch_what_is_added()

    def _watch_what_is_added(self) -> None:
        """Measures what the next backward adds, if there is already something to add to."""
        added = self._run.hooks.added
        added.begin()
        added.active = any(one.window.micro_batches for one in self.followed)

    def noise_scale(self) -> NoiseScale:
        """Returns the noise scale of the first optimizer; ``reason`` says why there is none."""
        if not self.followed:
            return replace(NoiseScaleEstimator().read(), reason=NO_STEP)
        weights = self.followed[0].weights
        noise = weights.noise.read()
        silent = weights.silent if not noise.updates else ""
        return replace(noise, reason=silent) if silent else noise

    def commit_backwards(self) -> None:
        """Decides that each backward was a step, if no optimizer has been found."""
        if self._unowned is not None and not self.followed:
            self._unowned.commit()

    def end(self) -> None:
        """Closes the open windows at the end of the run; warns if an option had no effect."""
        for one in self.followed:
            with self._shield:
                one.end()
        self._run.joint_steps.close()
        self.commit_backwards()
        stepped = self.followed or self._unowned is None or not self._unowned.step
        if self._options.acting and not stepped:
            warn_safely(NEVER_ACTED.format(asked=" and ".join(self._options.acting)))
        if self._options.of_steps and not stepped:
            warn_safely(NEVER_TAKEN.format(asked=", ".join(self._options.of_steps)))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: for each optimizer steps, policies and noise scale."""
        steps = {**self._steps, **{one.label: one.step for one in self.followed}}
        if self._unowned is not None and self._unowned.step:
            steps["none"] = self._unowned.step
        self._run.recorder.receive(wait=True)
        controls = {one.label: one.state_dict() for one in self.followed}
        noise = {one.label: one.weights.noise.state_dict() for one in self.followed}
        return {
            "steps": steps,
            "control": {**self._controls, **controls},
            "noise": {**self._noise, **noise},
            "window": self._window_state(),
        }

    def _window_state(self) -> dict[str, Any]:
        windows = [one.window for one in self.followed if one.window.micro_batches]
        if not windows:
            return {}
        weight = float(resolve(windows[0].weight))
        return {"micro_batches": windows[0].micro_batches, "weight": weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned, also for optimizers found later."""
        self._steps = dict(state["steps"])
        self._controls = dict(state["control"])
        self._noise = dict(state["noise"])
        self._report_dropped(**state["window"])
        for one in self.followed:
            self._load_into(one)
        if self._unowned is not None:
            self._unowned.step = self._steps.get("none", 0)

    def _report_dropped(self, micro_batches: int = 0, weight: float = 0.0) -> None:
        if micro_batches:
            step = max(self._steps.values(), default=0) + 1
            event = dropped_event(step, micro_batches, weight)
            self._run.note(event)
            warn_safely(f"gradwatch: {event.message}")

    def _on_found(self, optimizer: Optimizer) -> None:
        if self._unowned is None:
            return
        indices = self._indices(optimizer)
        stepping = [index for one in self.followed if one.stepping for index in one.window.indices]
        if not set(indices).isdisjoint(stepping):
            return  # its step runs inside that of another optimizer, as in SAM: one step, not two
        windows = [self._unowned.window, *(one.window for one in self.followed)]
        parts = [window.part(indices) for window in windows]
        self._unowned.release(indices)
        self._follow(optimizer, max(parts, key=lambda part: len(part.arrived)))

    def _follow(self, optimizer: Optimizer, window: Window, name: str = "") -> None:
        label = name or _label(optimizer, {one.label for one in self.followed})
        curvature = None if self.followed else self._curvature
        steps = OptimizerSteps(
            label, optimizer, window, self._run, self._own_clip(), curvature, self._on_finished
        )
        self.followed.append(steps)
        self._run.joint_steps.follow_one_more()
        self._load_into(steps)
        may_refuse = self._options.on_nonfinite != "record" or self._options.skip_spikes is not None
        self._boundaries.append(StepBoundary(optimizer, steps, self._shield, may_refuse))

    def _on_finished(self, steps: OptimizerSteps) -> None:
        if self._run.hooks.added.watching:
            self._watch_what_is_added()
        if steps is self.followed[0] and not self._run.accumulation.fixed:
            self._run.accumulation.next_window(steps.step, self._noise_now)

    def _noise_now(self) -> NoiseScale:
        self._run.recorder.receive(wait=True)
        return self.followed[0].weights.noise.read()

    def _load_into(self, steps: OptimizerSteps) -> None:
        steps.step = self._steps.get(steps.label, 0)
        if steps.label in self._noise:
            steps.weights.noise.load_state_dict(self._noise[steps.label])
        if steps.label in self._controls:
            steps.load_state_dict(self._controls[steps.label])

    def _own_clip(self) -> ClipPolicy | None:
        """Returns a clipping policy for one more optimizer; each has a memory of its own."""
        clip = self._options.clip
        if clip is not None and self.followed:
            clip = copy.deepcopy(clip)
            clip.load_state_dict(self._fresh_clip)
        return clip

    def _indices(self, optimizer: Optimizer) -> list[int]:
        return self._run.table.indices_of(optimizer_parameters(optimizer))

    def _window(self, indices: Sequence[int]) -> Window:
        return Window(self._run.table, list(indices), self._norm_type, self._run.shards)


def _label(optimizer: Optimizer, taken: Container[str]) -> str:
    """Labels an optimizer by its class: ``Adam``, a second one ``Adam-1``."""
    name = type(optimizer).__name__
    labels = chain([name], (f"{name}-{number}" for number in count(1)))
    return next(label for label in labels if label not in taken)
