"""The optimizers of a run, named from the start or found at their first step."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, repeat
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.accumulate.noise_scale import NoiseScale, NoiseScaleEstimator
from gradwatch.clip.policy import ClipPolicy
from gradwatch.errors import warn_safely
from gradwatch.guard import Shield
from gradwatch.hooks.backward import NOT_NEEDED, Backward
from gradwatch.hooks.optimizer import (
    OptimizerDiscovery,
    StepBoundary,
    first_stepped_in_backward,
    refuse_what_needs_all_gradients,
    stepped_by,
)
from gradwatch.measure.deferred import FloatOrDeferred, resolve
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.record.events import dropped_event
from gradwatch.step.backward_steps import BackwardSteps, EndedWindow
from gradwatch.step.bad_weights import BadWeights
from gradwatch.step.mistakes import CERTAIN, MANY, Silence, tell_cut_off, tell_moved
from gradwatch.step.optimizer_steps import MeasureCurvature, OptimizerSteps
from gradwatch.step.run import Run
from gradwatch.step.steps import Steps
from gradwatch.step.window import Window

MOST_USED = 1_000  # backwards that are remembered: more than a window is likely to hold
MOST_UNOWNED = 8  # forwards that are kept for an optimizer that is not known yet, beside others
LOOK_EVERY, LOOK_AT = 100, (1, 10)  # steps after which the parameters of the model are compared
NO_STEP = "no optimizer has stepped yet"


class OptimizerRegistry:
    """Follows every optimizer of the watched parameters, and the backwards without an optimizer.

    No optimizer is kept alive. When one is gone its steps have ended, unless another one takes its
    place (:meth:`OptimizerSteps.may_go_on`).

    Attributes:
        followed: The steps of each optimizer, in the order in which the optimizers were named or
            found.
        managed: The steps of those optimizers that a managed loop steps: the named ones, or all if
            none was named.
        on_gone: Called when an optimizer is gone, at any moment; None if nobody asks.
    """

    def __init__(self, run: Run, shield: Shield, curvature: MeasureCurvature | None = None) -> None:
        """Follows no optimizer yet; ``curvature`` is measured after steps of the first one."""
        self.followed: list[OptimizerSteps] = []
        self.on_gone: Callable[[], None] | None = None
        self._past: set[str] = set()  # labels of steps that have ended
        self._finished: OptimizerSteps | None = None  # whose step has ended last
        self._serial = 0  # the number of forwards that were kept until then
        self.managed: list[OptimizerSteps] = []
        self._run = run
        self._bad_weights = BadWeights(run.table.tensors)
        self._options = run.options
        self._shield = shield
        self._curvature = curvature
        self._boundaries: list[StepBoundary] = []
        self._named = False
        self._silence = Silence(run)
        self._unowned: BackwardSteps | None = None
        self._discovery: OptimizerDiscovery | None = None
        self._generations: list[object] = []
        self._newest_loss = 0  # the number of its backward
        self._steps: dict[str, int] = {}
        self._controls: dict[str, Any] = {}
        self._noise: dict[str, Any] = {}
        clip = run.options.clip
        self._fresh_clip = {} if clip is None else clip.state_dict()
        self._norm_type = 2.0 if clip is None else clip.norm_type
        self._forwards = None if run.explaining is None else run.explaining.forwards
        # The hooks on the parameters must not keep this object: it leads to the parameters.
        self._on_begin = partial(self._begin_backward, weakref.ref(self))

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        names: Sequence[str] = (),
        finds_more: bool = False,
    ) -> None:
        """Registers the hooks on the optimizers, and on the parameters that they step.

        Args:
            optimizers: The optimizers that the user passed. If there are none, all watched
                parameters are hooked, and optimizers are found at their first step.
            names: Their labels; empty to label them by class.
            finds_more: Whether other optimizers of watched parameters are followed as well.

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
        self._named = bool(optimizers) and not finds_more
        self._discovery = OptimizerDiscovery(self._on_other_step)
        if optimizers:
            for optimizer, name in zip(optimizers, names or repeat(""), strict=False):
                indices = self._indices(stepped_by(optimizer)[-1])
                self._follow(optimizer, self._window(indices), name)
            watched = [index for one in self.followed for index in one.window.indices]
        else:
            self._unowned = BackwardSteps(self._run, self._window(watched))
            self._unowned.step = self._steps.get("none", 0)
            self._run.joint_steps.find_more()
        self._run.hooks.attach(watched, self._norm_type, owned=bool(optimizers))
        self._run.scale.wait()
        if accumulates:
            self._run.hooks.watch_added()
        may_skip = self._options.on_nonfinite == "skip" or self._options.skip_spikes is not None
        self._run.hooks.buffers.attach(may_skip, self._shield, self._is_left_out, self._is_busy)
        if self._forwards is not None:
            self._forwards.attach(self._curvature)
        # Nothing is watched yet: the model may have been moved since, and may be until it trains.
        self._run.follow_model = partial(_follow_model, weakref.ref(self))
        if self.follows_model:
            self.follow_model()
            self._run.hooks.before_first_backward(self._run.follow_model)

    @property
    def follows_model(self) -> bool:
        """Whether parameters that were replaced can be followed.

        Where every model of a process is watched, the new ones get a watcher of their own.
        """
        return self._run.shards is None and self._run.tells_foreign

    def follow_model(self) -> bool:
        """Goes on with the parameters that the model has now, in place of those that are watched.

        Returns:
            Whether any was replaced.
        """
        run = self._run
        if not self.follows_model or self._is_busy():
            return False
        found = run.hooks.replaced.find(reshaped=not run.hooks.arrivals.ended)
        if found:
            dead = run.hooks.exchange(found)
            run.hooks.replaced.note()
            for one in (*self.followed, self._unowned):
                if one is not None:
                    one.exchange(found)
            shapes = tuple(tuple(tensor.shape) for tensor in run.table.tensors)
            run.recorder.reshape(shapes)
            if dead:
                tell_cut_off(run, self.steps + 1, dead)
        return bool(found)

    def _is_busy(self) -> bool:
        busy = self._curvature is not None and self._curvature.busy
        return busy or self._run.stands_aside()

    def _is_left_out(self) -> bool:
        """Returns, once, whether a scaler has left out a step since the last backward.

        Nothing waits: it has updated, and has not called the optimizer.
        """
        if self._options.on_nonfinite != "skip" or self._run.scale.scaler is None:
            return False
        generations = [one.scale.generation() for one in self.followed]
        if list(map(id, generations)) == list(map(id, self._generations)):
            return False
        self._generations = generations
        return any(one.is_left_out for one in self.followed)

    def end_discovery(self) -> None:
        """Finds no optimizer any more; unlike :meth:`detach` it may be called inside a step."""
        if self._discovery is not None:
            self._discovery.end()

    def detach(self) -> None:
        """Removes every hook; safe to call again."""
        if self._discovery is not None:
            self._discovery.remove()
        for boundary in list(self._boundaries):
            boundary.remove()
        self._run.hooks.detach()
        self._run.scale.end()
        if self._forwards is not None:
            self._forwards.stop()  # what is kept may explain the window that is still open

    def let_go(self) -> None:
        """Drops everything of the model, after :meth:`detach`; what is known stays."""
        for boundary in list(self._boundaries):
            boundary.let_go()
        for one in (*self.followed, self._unowned):
            if one is not None:
                one.let_go()
        self._curvature = None
        if self._run.explaining is not None:
            self._run.explaining.let_go()
            self._run.explaining.forwards.measuring = None

    @property
    def is_vacant(self) -> bool:
        """Whether every optimizer that was followed is gone."""
        return all(one.is_vacant for one in self.followed)

    @property
    def steps(self) -> int:
        """The number of steps so far, of the optimizer that has taken the most."""
        everyone = (*self.followed, self._unowned)
        return max((one.step for one in everyone if one is not None), default=0)

    def step_asked_for(self) -> tuple[str, int]:
        """Returns the optimizer and the step that a question is about that is asked now.

        That is the step under way; the one that has just ended, if nothing has come since.
        """
        for one in self.followed:
            if one.window.arrivals or one.stepping is not None:
                return one.label, one.step + 1
        if not self.followed:
            return "", self.steps or 1  # each backward counts as one
        last, kept = self._finished or self.followed[0], self._forwards
        return last.label, last.step + (kept is not None and kept.serial > self._serial) or 1

    def add(self, backward: Backward, weight: FloatOrDeferred) -> None:
        """Adds a backward that has ended to the window of every optimizer that it concerns."""
        run = self._run
        # A scaler does not step with closures, so one that is at hand then is that of another loop.
        if run.scale.looks and not any(one.in_closure for one in self.followed):
            self._look_for_scaler()
        silence = self._silence
        silence.backwards += 1
        silence.others = 0
        if silence.backwards in (CERTAIN, MANY):
            self._look_for_steps()
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
        run.hooks.arrivals.on_begin = self._on_begin
        if run.hooks.before_first is not None:
            run.hooks.end_before_first_backward()
        # With one optimizer nothing else is held, so the windows need not be asked.
        held = self.followed[0].window.backwards if self.followed else ()
        if self._forwards is not None and len(self._forwards.by_number) > len(held):
            self._forwards.keep_only(self._open_backwards())

    def _look_for_scaler(self) -> None:
        """Looks for a scaler, until it is certain which one serves each optimizer."""
        scale = self._run.scale
        nobodys = self._unowned is not None and self._unowned.window.indices
        if nobodys or not all(one.scale_is_certain for one in self.followed):
            scale.look()
            return
        scale.end()
        scalers = [one.scale.scaler for one in self.followed]
        scale.scaler = next((one for one in scalers if one is not None), None)

    def _open_backwards(self) -> set[int]:
        """Returns the numbers of the backwards that a step may still use."""
        numbers = {number for one in self.followed for number in one.window.backwards}
        if self._unowned is not None:
            # Nobody steps what no optimizer holds: its window would grow for ever.
            held = self._unowned.window.backwards
            numbers.update(held[-MOST_UNOWNED:] if self.followed else held)
        return numbers

    def note_loss(self, loss: Tensor, divisor: float | None) -> None:
        """Notes the loss of the newest backward in the windows that it was added to, once."""
        newest = self._run.hooks.arrivals.ended
        if newest == self._newest_loss:
            return  # it reached none of the parameters
        self._newest_loss = newest
        for one in self.followed:
            if one.window.backwards[-1:] == [newest]:
                one.note_loss(loss, divisor)

    @staticmethod
    def _begin_backward(reference: weakref.ref[OptimizerRegistry], first: int) -> None:
        """Looks at the open windows when a backward begins; see :class:`Arrivals`."""
        self = reference()
        if self is None or self._is_busy():
            return
        with self._shield:
            for one in self.followed:
                if one.looks_ahead:
                    one.begin_backward(first)
            if self._unowned is not None and self._unowned.window.arrivals:
                self._unowned.begin_backward(first)

    def _look_for_steps(self) -> None:
        unowned = self._unowned
        windows = [one.window for one in (*self.followed, unowned) if one is not None]
        longest = max(window.backward_count for window in windows)
        # One long window may be a large batch: then the step is still to come.
        if longest < CERTAIN // 2 or self._silence.backwards >= MANY:
            self._silence.look_for_steps(self.followed, unowned is None or unowned.moved)

    def _watch_what_is_added(self) -> None:
        """Measures what the next backward adds, if there is already something to add to."""
        added = self._run.hooks.added
        added.begin()
        added.active = any(one.window.backward_count for one in self.followed)

    def noise_scale(self) -> NoiseScale:
        """Returns the noise scale of the first optimizer; ``reason`` says why there is none."""
        if not self.followed:
            return replace(NoiseScaleEstimator().read(), reason=NO_STEP)
        weights = self.followed[0].weights
        noise = weights.noise.read()
        silent = weights.silent if not noise.updates else ""
        return replace(noise, reason=silent) if silent else noise

    def commit_backwards(self, at_end: bool = False) -> None:
        """Decides that each backward was a step, if no optimizer has been found.

        Before the end of the run this must have shown: an optimizer may still take its first step.
        """
        unowned = self._unowned
        if unowned is not None and not self.followed and (at_end or unowned.seem_steps):
            unowned.commit()

    def leave_windows(self) -> None:
        """Forgets the open windows, whose step another watcher records."""
        for one in self.followed:
            one.window.reset()

    def end(self) -> None:
        """Closes the open windows at the end of the run; warns if an option had no effect."""
        for one in self.followed:
            with self._shield:
                one.end()
        self._run.joint_steps.close()
        self.commit_backwards(at_end=True)
        with self._shield:
            moved = self._unowned is None or self._unowned.moved
            self._silence.end(self.followed, self._run.hooks.arrivals.ended, moved)
            self._run.replicas.end()
            # Only now have all numbers arrived that tell of a NaN; a device that gives none back
            # gives no buffers either.
            self._run.recorder.receive_readable()
            if not self._run.recorder.unread:
                self._run.tell_poisoned(wait=True)
        if self._forwards is not None:
            self._forwards.let_go()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: for each optimizer steps, policies and noise scale."""
        steps = {**self._steps, **{one.label: one.step for one in self.followed}}
        if self._unowned is not None and self._unowned.are_steps and self._unowned.step:
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

    def _on_other_step(self, optimizer: Optimizer) -> None:
        """Finds out what an optimizer has to do with the model that is about to step."""
        if self._run.stands_aside():
            return
        with self._shield:
            indices = self._indices(optimizer)
            if not indices and self._run.hooks.replaced.seem() and self.follow_model():
                indices = self._indices(optimizer)
                tell_moved(self._run, type(optimizer).__name__, self.steps + 1)
            if indices:
                self._on_found(optimizer, indices)
            else:
                self._run.other_steps += 1
                self._silence.note_other_step(type(optimizer).__name__, self.followed)

    def follow(self, optimizer: Optimizer) -> None:
        """Follows one more optimizer of the watched parameters, before it has stepped."""
        if self._is_followed(optimizer):
            return
        with self._shield:
            indices = self._indices(stepped_by(optimizer)[-1])
            self._take_in(optimizer, indices, self._holding(indices))

    def _is_followed(self, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer is followed, or one that it wraps and that steps for it."""
        innermost = (stepped_by(optimizer) or [optimizer])[-1]
        return any(one.has(optimizer) or one.has(innermost) for one in self.followed)

    def _holding(self, indices: Sequence[int]) -> list[OptimizerSteps]:
        """Lists the optimizers that hold, or held before they were gone, any of some parameters."""
        return [one for one in self.followed if not set(indices).isdisjoint(one.window.indices)]

    def _on_found(self, optimizer: Optimizer, indices: list[int]) -> None:
        stepping = [index for one in self.followed if one.stepping for index in one.window.indices]
        if not set(indices).isdisjoint(stepping):
            return  # its step runs inside that of another optimizer, as in SAM: one step, not two
        if self._is_followed(optimizer):  # a wrapper, on which torch runs no step hooks of its own
            if self._discovery is not None:
                self._discovery.leave_out(optimizer)
            return
        before = self._holding(indices)
        if self._named and not before:
            self._silence.tell_left_out(type(optimizer).__name__, indices)
            return
        found = self._take_in(optimizer, indices, before)
        there = [one for one in before if not one.is_vacant and one is not found]
        if self._named and there and not any(one.step for one in there):
            self._silence.tell_another(there[0], found)

    def _take_in(
        self, optimizer: Optimizer, indices: list[int], before: Sequence[OptimizerSteps]
    ) -> OptimizerSteps:
        """Follows an optimizer from now on, with what is known of its parameters already."""
        heirs = [one for one in before if one.may_go_on(stepped_by(optimizer)[0], indices)]
        if heirs:
            shared = [len(set(indices).intersection(one.window.indices)) for one in heirs]
            return self._go_on(heirs[shared.index(max(shared))], optimizer)
        windows = [one.window for one in self.followed]
        ended = []
        if self._unowned is not None:
            windows = [self._unowned.window, *windows]
            ended = self._unowned.ended_of(indices)
        parts = [window.part(indices) for window in windows] or [self._window(indices)]
        found = self._follow(optimizer, max(parts, key=lambda part: len(part.arrived)))
        owners: list[Steps] = [one for one in (self._unowned, *before) if one is not None]
        owner = max(owners, key=lambda one: one.window.backwards[-1:], default=found)
        found.take_over(self._run.hooks.watch_also(indices), owner)
        if self._unowned is not None:
            self._unowned.release(indices)
        if ended:
            self._replay(found, ended)
        for one in before:
            if one.is_vacant:
                self._leave_to_another(one, indices)
        return found

    def _go_on(self, steps: OptimizerSteps, optimizer: Optimizer) -> OptimizerSteps:
        members = stepped_by(optimizer)
        steps.go_on(optimizer, members)
        self._run.joint_steps.follow_one_more()
        self._hook(steps, members)
        return steps

    def _leave_to_another(self, vacant: OptimizerSteps, indices: Sequence[int]) -> None:
        """Takes parameters from an optimizer that is gone; ends its steps if it has no others."""
        vacant.window.leave(indices)
        if vacant.window.indices:
            return
        vacant.end()
        self.followed.remove(vacant)
        if vacant in self.managed:
            self.managed.remove(vacant)
        label = vacant.label
        self._past.add(label)
        self._steps[label], self._controls[label] = vacant.step, vacant.state_dict()
        self._noise[label] = vacant.weights.noise.state_dict()

    def _on_gone(self) -> None:
        """Notes that an optimizer is gone; called at any moment."""
        self._run.joint_steps.follow_one_less()
        gone = [one for one in self._boundaries if one.is_vacant]
        self._boundaries = [one for one in self._boundaries if not one.is_vacant]
        for one in gone:
            one.let_go()
        if self.on_gone is not None:
            self.on_gone()

    def _replay(self, found: OptimizerSteps, ended: Sequence[EndedWindow]) -> None:
        # These steps are over: none of them belongs together with the one that is about to begin.
        joint = self._run.joint_steps
        now, joint.current = joint.current, None
        for one in ended:
            found.replay(*one)
            joint.close()
        joint.current = now

    def _follow(self, optimizer: Optimizer, window: Window, name: str = "") -> OptimizerSteps:
        members = stepped_by(optimizer)
        label = name or _label(members[0], {*self._past, *(one.label for one in self.followed)})
        curvature = None if self.followed else self._curvature
        steps = OptimizerSteps(
            label,
            optimizer,
            members,
            window,
            self._run,
            self._own_clip(),
            curvature,
            self._on_finished,
            self._on_joined,
            self._on_first if not name else None,
            partial(_call_on_gone, weakref.ref(self)),
        )
        self.followed.append(steps)
        filling = [one.window for one in (*self.followed, self._unowned) if one is not None]
        if len(filling) > 1:
            for part in filling:
                part.share()
        if not (self._named and self._run.hooks.arrivals.hooked_indices()):
            self.managed.append(steps)
        self._run.joint_steps.follow_one_more()
        self._load_into(steps)
        self._hook(steps, members)
        return steps

    def _hook(self, steps: OptimizerSteps, members: Sequence[Optimizer]) -> None:
        may_refuse = self._options.on_nonfinite != "record" or self._options.skip_spikes is not None
        for position, one in enumerate(members):
            wrappers = members[:position]
            self._boundaries.append(StepBoundary(one, steps, self._shield, may_refuse, wrappers))
            if self._discovery is not None:
                self._discovery.leave_out(one)

    def _on_first(self, steps: OptimizerSteps, optimizer: Optimizer) -> None:
        """Names a wrapper's steps after what steps: so they are named where it is found."""
        taken = {*self._past, *(one.label for one in self.followed if one is not steps)}
        label = _label(optimizer, taken)
        if label != steps.label:
            steps.label = label
            steps.note_groups(from_step=0)
            self._load_into(steps)

    def _on_joined(self, indices: Sequence[int]) -> None:
        if self._unowned is not None:
            self._unowned.window.leave(indices)

    def _on_finished(self, steps: OptimizerSteps) -> None:
        self._silence.backwards = self._silence.others = 0
        self._finished = steps
        if self._forwards is not None:
            self._serial = self._forwards.serial
            alone = len(self.followed) == 1 and self._unowned is None
            self._forwards.keep_only(() if alone else self._open_backwards())
        if self._run.on_first_step:
            self._run.begin()
        if steps.step % LOOK_EVERY in LOOK_AT:
            self._look_again(steps)
        unowned = self._unowned
        if unowned is not None:
            self._note_unowned(unowned, steps.step)
        if self._run.doubts_buffers:
            self._run.tell_poisoned()
        if self._run.hooks.buffers.restores and steps.in_time:
            others = (one for one in self.followed if one is not steps)
            self._run.hooks.buffers.end_step(any(one.window.arrivals for one in others))
        if len(self.followed) == 1 and not steps.stale.looks and unowned is None:
            self._run.hooks.arrivals.on_begin = NOT_NEEDED
        if self._run.hooks.added.watching:
            self._watch_what_is_added()
        if steps is self.followed[0] and not self._run.accumulation.fixed:
            self._run.accumulation.next_window(steps.step, self._noise_now)

    def _note_unowned(self, unowned: BackwardSteps, step: int) -> None:
        if unowned.window.backwards:
            arrived = sorted(unowned.window.arrived)
            self._silence.note_unowned(unowned.window.backwards, arrived, step)

    def _look_again(self, steps: OptimizerSteps) -> None:
        """Looks, after a few of the steps, at what may have changed without a sign."""
        self.follow_model()
        self._silence.look_at_model(steps.step)
        self._run.hooks.buffers.look_again()
        steps.forget_groups()
        newest = self._run.hooks.arrivals.ended
        self._run.used = {number for number in self._run.used if number > newest - MOST_USED}

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
        run, bad_weights = self._run, self._bad_weights
        return Window(
            run.table, list(indices), self._norm_type, run.shards, bad_weights=bad_weights
        )


def _follow_model(reference: weakref.ref[OptimizerRegistry]) -> bool:
    registry = reference()
    if registry is None:
        return False
    with registry._shield:
        return registry.follow_model()
    return False


def _call_on_gone(reference: weakref.ref[OptimizerRegistry]) -> None:
    registry = reference()
    if registry is not None:
        registry._on_gone()


def _label(optimizer: Optimizer, taken: Container[str]) -> str:
    """Labels an optimizer by its class: ``Adam``, a second one ``Adam-1``."""
    name = type(optimizer).__name__
    labels = chain([name], (f"{name}-{number}" for number in count(1)))
    return next(label for label in labels if label not in taken)
