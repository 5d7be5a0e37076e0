"""What a loop does that was most likely not meant, and what changes under the watch.

Each is told once, when it is certain. :class:`Silence` notices loops in which gradwatch sees less
than its user believes: they step another optimizer than the watched one, or none, or train another
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gradwatch.checks import described
from gradwatch.hooks.context import REPLAY
from gradwatch.record.events import counted_names, loop_event
from gradwatch.step.run import Run

CERTAIN = 50
"""Backwards, or steps, after which it is certain that what is missing will not come."""

MANY = 1_000
"""Backwards without a step that are no accumulation any more."""

SHORT = 10
"""A run of fewer backwards may be meant as a look at gradients, without any step."""

NO_STEPS = "no steps"
"""What is told once in a run: that no optimizer steps, whatever the reason."""

NOT_MOVED = (
    "{count} backwards, and the weights have not moved: no optimizer has stepped. Each backward is "
    "recorded as a step. Call optimizer.step() in the loop."
)
NO_STEP = (
    "{count} backwards, and {optimizer} has never stepped: its weights do not move{asked}. Call "
    "optimizer.step(), or pass the optimizer that the loop steps: watch(model, optimizer). Leave "
    "out one that steps inside of the backward without step(), as LOMO does: watch(model)."
)
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
HOLDS_NONE = (
    "{other} steps, but holds no parameter of the watched model, and no optimizer that does has "
    "stepped in {count} backwards{asked}. Was the model moved, wrapped, sharded or replaced after "
    "the optimizer was built? Build the optimizer after that, and call watch() last."
)
NOT_TRAINED = (
    "{other} has made {count} steps without a backward of the watched model: another model is "
    "being trained, such as a copy of it, or parameters that were added or replaced after watch(). "
    "Pass the model that the loop trains."
)
ANOTHER = (
    "watch() was given {named}, which has never stepped, but {found} steps its parameters: it is "
    "followed from here on. Pass the optimizer that the loop steps."
)
LEFT_OUT = (
    "{found} steps parameters of the watched model that no optimizer given to watch() holds: "
    "{parameters}. They are neither recorded nor clipped. Name all optimizers, "
    "watch(model, [first, second]), or none, to have them found."
)
UNSTEPPED = (
    "{parameters} received a gradient in {count} steps, but no optimizer that steps holds them: "
    "they keep their values. A layer that is replaced after the optimizer was built is not in it. "
    "Build the optimizer last, or call requires_grad_(False) on what must not be trained."
)
REPLACED = (
    "The watched model has {gained} that it did not have when watch() was called, and no longer "
    "has {lost}: layers were replaced, or the model was moved or sharded. The new ones are not "
    "watched. Call watch() when the model is complete."
)
GAINED = (
    "The watched model has {gained} that it did not have when watch() was called: they are not "
    "watched. Call watch() when the model is complete."
)
REMOVED = "The watched model no longer has {lost}, which it had when watch() was called."


CAPTURED = (
    "A step is being captured into a graph, as by torch.cuda.graph(). When the graph is replayed, "
    "no hook runs."
)
NOT_SEEN = (
    "So its steps are not recorded. To see their gradients, run a step without the graph now and "
    "then, or capture the model alone, with torch.cuda.make_graphed_callables()."
)
CANNOT_ACT = (
    "So gradwatch could not act on its gradients: clip inside of the captured step, with "
    "torch.nn.utils.clip_grad_norm_(), and watch without clip=, on_nonfinite=, skip_spikes= and "
    "accumulate=; or capture the model alone, with torch.cuda.make_graphed_callables()."
)
EARLY_CLIP = (
    "The gradients of {optimizer} were clipped between two micro-batches of step {step}, to "
    "{left:.3g} of their norm, and the next backward added to what was left: micro-batches then "
    "count for more the later they come. Clip once, after the last backward of a step."
)
CLIP_OF_LOOP = (
    "The loop clips the gradients of {optimizer} itself, to a norm of {limit:.4g} (seen up to step "
    "{step}), and clip={clip!r} acts on what is left: the coefficient in the records is the "
    "product of both. Keep one of the two: leave clip= (--clip) out, or take the loop's clip away "
    "or raise its limit."
)
NO_GRADIENT = (
    "{optimizer} has taken {steps} steps, and none of its parameters has ever received a gradient: "
    "the loss does not depend on them. Look for detach(), no_grad(), .item() or .data between the "
    "model and the loss."
)
STALE = (
    "The last {steps} steps of {optimizer} (up to step {step}) began with the gradients of the "
    "step before, and added to them: zero_grad() is missing. Call optimizer.zero_grad() after each "
    "optimizer.step()."
)
FROZEN = (
    "{parameters} of {optimizer} no longer require a gradient, from step {step} on: they keep "
    "their values. Some functions that save or merge a model leave requires_grad off."
)
LOST = (
    "{optimizer} no longer holds {parameters}, from step {step} on, and does not train what it "
    "does not hold."
)
LEFT_BEHIND = (
    "{optimizer} steps {parameters}, but the model has others in their place, from step {step} on: "
    "they were replaced after the optimizer was built, as a move of the model to some devices "
    "replaces all of them. What the optimizer holds gets no gradient, and what the model has is "
    "not trained by it. Move or change the model first, and build the optimizer then."
)
MOVED = (
    "The parameters of the watched model were replaced before step {step} of {optimizer}, as a "
    "move to some devices does. The new ones are watched from here on; the backwards before this "
    "step were not seen."
)
CUT_OFF = (
    "{parameters} cannot be watched any more: torch.utils.swap_tensors() has put other tensors "
    "into them, as model.to() does after set_swap_module_params_on_conversion(True), and torch "
    "calls no hook on them any more, nor those of your own. Move the model before hooks are "
    "registered."
)
FOREIGN = (
    "{optimizer} holds {count} parameter(s), from step {step} on, that are not those of the model "
    "as it was when watch() was called: their gradients are in no norm and in no clip. Call "
    "watch() when the model has all its parameters."
)
UNSCALED = (
    "The accumulation policy multiplies the learning rate, but a rate of {optimizer} is {rate}, "
    "which is not a number: it stays as it is. Give the optimizer a number as its rate, or leave "
    "the policy's lr_factor at 1."
)


def tell_unscaled(run: Run, optimizer: str, step: int, rate: object) -> None:
    """Tells of a learning rate that the factor of the accumulation policy cannot be applied to."""
    text = UNSCALED.format(optimizer=optimizer, rate=described(rate))
    run.tell(loop_event("mistake", text, step, optimizer), key=f"unscaled rate of {optimizer}")


def tell_early_clip(run: Run, optimizer: str, step: int, left: float) -> None:
    """Tells of a clip between two micro-batches, which left this share of the norm."""
    text = EARLY_CLIP.format(optimizer=optimizer, step=step, left=left)
    run.tell(loop_event("mistake", text, step, optimizer), key=f"early clip of {optimizer}")


def tell_stale(run: Run, optimizer: str, step: int, steps: int) -> None:
    """Tells of this many steps in a row that began with the gradients of the step before."""
    text = STALE.format(optimizer=optimizer, steps=steps, step=step)
    run.tell(loop_event("mistake", text, step, optimizer))


def tell_clip_of_loop(run: Run, optimizer: str, step: int, limit: float) -> None:
    """Tells of a loop that clips to a limit, although gradwatch was asked to clip."""
    text = CLIP_OF_LOOP.format(optimizer=optimizer, limit=limit, step=step, clip=run.options.clip)
    run.tell(loop_event("mistake", text, step, optimizer), key=f"clip of {optimizer}'s loop")


def tell_no_gradient(run: Run, optimizer: str, step: int) -> None:
    """Tells of an optimizer none of whose parameters has ever received a gradient."""
    if step == CERTAIN:
        text = NO_GRADIENT.format(optimizer=optimizer, steps=step)
        run.tell(loop_event("mistake", text, step, optimizer))


def tell_frozen(run: Run, optimizer: str, step: int, frozen: Sequence[int]) -> None:
    """Tells of parameters, given by their indices, that no longer require a gradient."""
    names = [run.table.names[index] for index in frozen]
    text = FROZEN.format(optimizer=optimizer, parameters=counted_names(names), step=step)
    owner = (names[0], run.table.modules[frozen[0]])
    event = loop_event("changed", text, step, optimizer, owner, float(len(names)))
    run.tell(event, warn=False)


def tell_lost(run: Run, optimizer: str, step: int, lost: Sequence[int]) -> None:
    """Tells of parameters, given by their indices, that an optimizer no longer holds."""
    names = [run.table.names[index] for index in lost]
    text = LOST.format(optimizer=optimizer, parameters=counted_names(names), step=step)
    owner = (names[0], run.table.modules[lost[0]])
    event = loop_event("changed", text, step, optimizer, owner, float(len(names)))
    run.tell(event, key=f"{optimizer} lost {names}")  # once, where blocks take turns


def tell_left_behind(run: Run, optimizer: str, step: int, old: Sequence[int]) -> None:
    """Tells of parameters, given by their indices, of which an optimizer holds the old tensors."""
    names = [run.table.names[index] for index in old]
    text = LEFT_BEHIND.format(
        optimizer=optimizer, parameters=f"the old {counted_names(names)}", step=step
    )
    owner = (names[0], run.table.modules[old[0]])
    run.tell(loop_event("mistake", text, step, optimizer, owner, float(len(names))))


def tell_moved(run: Run, optimizer: str, step: int) -> None:
    """Tells that parameters were replaced, which was seen only when their gradients were there."""
    text = MOVED.format(optimizer=optimizer, step=step)
    run.tell(loop_event("changed", text, step, optimizer), warn=False)


def tell_cut_off(run: Run, step: int, dead: Sequence[int]) -> None:
    """Tells of parameters, given by their indices, on which no hook is called any more."""
    names = [run.table.names[index] for index in dead]
    text = CUT_OFF.format(parameters=counted_names(names))
    owner = (names[0], run.table.modules[dead[0]])
    run.tell(loop_event("mistake", text, step, "none", owner, float(len(names))))


def tell_foreign(run: Run, optimizer: str, step: int, count: int) -> None:
    """Tells that an optimizer holds parameters that are not watched."""
    if not run.tells_foreign:
        return
    text = FOREIGN.format(optimizer=optimizer, count=count, step=step)
    run.tell(loop_event("changed", text, step, optimizer, value=float(count)))


class Followed(Protocol):
    """The steps of an optimizer of the watched model."""

    label: str
    step: int
    discarded: int
    has_begun: bool


def tell_captured(run: Run, optimizer: str, step: int, acts: bool) -> None:
    """Tells that steps are captured into a graph, and so are not seen.

    Raises:
        NotImplementedError: If gradwatch acts, which it cannot when the graph is replayed.
    """
    if acts:
        raise NotImplementedError(f"{CAPTURED} {CANNOT_ACT}")
    run.tell(loop_event("changed", f"{CAPTURED} {NOT_SEEN}", step, optimizer), key=CAPTURED)


class Silence:
    """Counts the backwards and steps of a run, and tells when they do not fit together.

    Attributes:
        backwards: Backwards since the last step of a followed optimizer.
        others: Steps of optimizers that hold no watched parameter since the last backward.
    """

    def __init__(self, run: Run) -> None:
        """Starts with nothing seen."""
        self.backwards = 0
        self._run = run
        self.others = 0
        self._other = ""
        self._unstepped = 0
        self._known_change: tuple[object, ...] = ((), ())

    def note_other_step(self, name: str, followed: Sequence[Followed]) -> None:
        """Notes a step of an optimizer that holds no watched parameter.

        Args:
            name: Class of that optimizer.
            followed: The optimizers of the watched model.
        """
        self.others += 1
        self._other = name
        if self.others in (1, CERTAIN):
            self.look_at_model(self._step_of(followed))
        # A model that takes turns with another one, of many steps each, is trained.
        seen = self._run.hooks.arrivals.ended or any(one.step for one in followed)
        certain = MANY if seen else CERTAIN
        if self.others == certain and not any(self._known_change):
            text = NOT_TRAINED.format(other=name, count=certain)
            self._run.tell(loop_event("mistake", text, self._step_of(followed)))

    def note_unowned(self, backwards: Sequence[int], arrived: Sequence[int], step: int) -> None:
        """Notes, after a step, the parameters whose gradients no optimizer has stepped with.

        Args:
            backwards: The backwards that left these gradients.
            arrived: The indices of the parameters.
            step: The step that has just been taken.
        """
        together = bool(arrived) and backwards[-1] in self._run.used
        self._unstepped = self._unstepped + 1 if together else 0
        if self._unstepped == CERTAIN:
            names = [self._run.table.names[index] for index in arrived]
            text = UNSTEPPED.format(parameters=counted_names(names), count=CERTAIN)
            owner = (names[0], self._run.table.modules[arrived[0]])
            self._run.tell(loop_event("mistake", text, step, "none", owner, float(len(names))))

    def tell_another(self, named: Followed, found: Followed) -> None:
        """Tells that another optimizer than the named one steps its parameters."""
        text = ANOTHER.format(named=named.label, found=found.label)
        self._run.tell(loop_event("mistake", text, found.step + 1, found.label), key=NO_STEPS)

    def tell_left_out(self, found: str, indices: Sequence[int]) -> None:
        """Tells that an optimizer steps parameters that no named optimizer holds."""
        names = [self._run.table.names[index] for index in indices]
        text = LEFT_OUT.format(found=found, parameters=counted_names(names))
        owner = (names[0], self._run.table.modules[indices[0]])
        self._run.tell(loop_event("mistake", text, 1, "none", owner, float(len(names))))

    def look_at_model(self, step: int) -> None:
        """Tells if the model has other parameters than when it was watched."""
        if not self._run.tells_changes:
            return
        gained, lost = change = self._run.hooks.changed_parameters()
        # Another thread may step its optimizer while this model is replayed, with copies in it.
        if REPLAY.under_way or change in (self._known_change, ((), ())):
            return
        self._known_change = change
        text = REPLACED if gained and lost else GAINED if gained else REMOVED
        text = text.format(gained=counted_names(gained), lost=counted_names(lost))
        number = float(len(gained) or len(lost))
        owner = ((gained or lost)[0], "")
        self._run.tell(loop_event("changed", text, step, "none", owner, number))

    def end(self, followed: Sequence[Followed], backwards: int, moved: bool) -> None:
        """Tells at the end of a run what never happened.

        Args:
            followed: The optimizers of the watched model.
            backwards: The backwards of the whole run that were noticed.
            moved: Whether something else may have moved the weights.
        """
        self.look_at_model(self._step_of(followed))
        if not backwards or any(one.step for one in followed):
            return
        options = self._run.options
        if backwards >= (SHORT if followed else CERTAIN) or options.acting:
            self.look_for_steps(followed, moved, at_end=True)
        if options.of_steps:
            self._tell(NEVER_TAKEN.format(asked=", ".join(options.of_steps)))

    def look_for_steps(
        self, followed: Sequence[Followed], moved: bool, at_end: bool = False
    ) -> None:
        """Tells if no step has come after many backwards, or until the end.

        Args:
            followed: The optimizers of the watched model.
            moved: Whether something else may have moved the weights.
            at_end: Whether the run has ended.
        """
        if any(one.step or one.has_begun for one in followed):  # a step may have raised
            return
        acting, count = self._run.options.acting, self.backwards
        asked = f", and watch({' and '.join(acting)}) did nothing" if acting else ""
        # A window may be long; one whose gradients were thrown away has ended.
        thrown_away = sum(one.discarded for one in followed)
        outside = moved and not followed  # the weights are written back, as from master weights
        if self._run.other_steps and not thrown_away and not outside:
            self._tell(HOLDS_NONE.format(other=self._other, count=count, asked=asked), NO_STEPS)
        elif followed and (thrown_away >= CERTAIN // 2 or count >= MANY or at_end):
            label = followed[0].label
            self._tell(NO_STEP.format(count=count, optimizer=label, asked=asked), NO_STEPS)
        elif not followed and acting:
            self._tell(NEVER_ACTED.format(asked=" and ".join(acting)), NO_STEPS)
        elif not followed and not moved:
            self._tell(NOT_MOVED.format(count=count), NO_STEPS)

    def _tell(self, text: str, key: str = "") -> None:
        self._run.tell(loop_event("mistake", text, 1), key)

    @staticmethod
    def _step_of(followed: Sequence[Followed]) -> int:
        return max((one.step for one in followed), default=0) + 1
