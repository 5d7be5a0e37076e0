"""What is written down: steps, events, batches of both, and the sinks that receive them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gradwatch.pickles import stable_name
from gradwatch.record.schema import Kind, Scalar, column, declared, is_finite, loads_older

Outcome = Literal["applied", "skipped_nonfinite", "skipped_scaler", "skipped_policy"]

CLIP_KNOWN = "where it is known"
ACCUMULATING = "from the first step on that has several micro-batches or a noise scale"


def accumulates(record: StepRecord) -> bool:
    """Tells whether a step has a batch to speak of: several micro-batches, or a noise scale."""
    return record.micro_batches > 1 or math.isfinite(record.noise_scale)


def knows_clip(record: StepRecord) -> bool:
    """Tells whether it is known what a clip left of the gradients."""
    return record.clipped is not None


def steps_with_others(record: StepRecord) -> bool:
    """Tells whether other optimizers, whose gradients are not 0, step together with this one."""
    return math.isfinite(record.grad_norm_all) and record.grad_norm_all != record.grad_norm


def exceeds_its_error(record: StepRecord) -> bool:
    """Tells whether the noise scale is larger than its standard error."""
    # One that is smaller says nothing, and may be so large that it hides all others on its axis.
    return 0 <= record.noise_scale_stderr < record.noise_scale < math.inf


@stable_name
@declared
@dataclass(slots=True)
class StepRecord:
    """One optimizer step in true units: unscaled, and reduced over ranks.

    Each field is a column of ``History.steps()`` and declares what it means and where it is shown.
    """

    # The order of the fields is that of the columns: a new one goes to the end.
    step: int = field(metadata=column("optimizer steps so far, counted from 1 per optimizer"))
    optimizer: str = field(
        default="none",
        metadata=column(
            "name of the optimizer in `watch()`, or else its class; a second one of a class is "
            "`Adam-1`, unless it has taken the place of the first one, which is gone; `none` where "
            "no optimizer steps the model, so that each backward counts as a step",
            repeats=True,
        ),
    )
    time_s: float = field(
        default=0.0, metadata=column("time since watching began, at the end of the step", unit="s")
    )
    micro_batches: int = field(
        default=1,
        metadata=column(
            "micro-batches whose gradients are in the step: its backward passes, where each is one "
            "micro-batch; 0 where none was seen",
            page="accumulation.md",
            scalar=Scalar(
                when=accumulates,
                lasting=True,
                condition=ACCUMULATING,
                loggers=True,
            ),
        ),
    )
    weight: float = field(
        default=1.0,
        metadata=column(
            "batch size: the sum of the micro-batch weights, over all ranks where gradwatch "
            "accumulates; `micro_batches` where no weights were given",
            unit="yours",
            repeats=True,
            scalar=Scalar(when=accumulates, lasting=True, condition=ACCUMULATING),
        ),
    )
    grad_norm: float = field(
        default=0.0,
        metadata=column(
            "total gradient norm **before** the clip, unscaled; L2, or the `norm_type` of the clip",
            unit="gradient",
            scalar=Scalar("largest", loggers=True),
        ),
    )
    grad_norm_clipped: float = field(
        default=0.0,
        metadata=column(
            "total gradient norm **after** every clip, gradwatch's or your own: "
            "`abs(clip_coef) * grad_norm`; NaN where it is not known",
            unit="gradient",
            scalar=Scalar("largest", when=knows_clip, condition=CLIP_KNOWN, loggers=True),
        ),
    )
    grad_norm_local: float = field(
        default=math.nan,
        metadata=column(
            "norm of this rank's own gradients, just before `DistributedDataParallel` reduces "
            "them; NaN without it",
            unit="gradient",
        ),
    )
    clip_coef: float = field(
        default=1.0,
        metadata=column(
            "factor that the gradients were multiplied with, negative where they were "
            "reversed; 1 where nothing was clipped, NaN where that is not known",
            repeats=True,
            scalar=Scalar("smallest", when=knows_clip, condition=CLIP_KNOWN, loggers=True),
        ),
    )
    clip_threshold: float = field(
        default=math.nan,
        metadata=column(
            "limit of gradwatch's clipping policy; NaN without one",
            unit="gradient",
            page="clipping.md",
            repeats=True,
        ),
    )
    clipped: bool | None = field(
        default=False,
        metadata=column(
            "whether a clip changed the gradients; `<NA>` (`None`) where that cannot be seen, "
            "because no optimizer steps the model"
        ),
    )
    outcome: Outcome = field(
        default="applied",
        metadata=column(
            "`applied`, `skipped_nonfinite`, `skipped_scaler` (a `GradScaler` left it out) or "
            "`skipped_policy`",
            repeats=True,
        ),
    )
    nonfinite_parameters: int = field(
        default=0,
        metadata=column(
            "parameters whose gradient held a NaN or an Inf",
            scalar=Scalar("largest", tensorboard=False, loggers=True),
        ),
    )
    loss: float = field(
        default=math.nan,
        metadata=column(
            "weighted mean loss of the step, where gradwatch saw it: managed loops, closures and "
            "Lightning; else NaN",
            unit="loss",
            scalar=Scalar(when=is_finite("loss"), condition="where it is known"),
            tail="loss",
            tab=True,
        ),
    )
    lr: float = field(
        default=math.nan,
        metadata=column(
            "learning rate of the first parameter group during the step",
            repeats=True,
            scalar=Scalar(when=is_finite("lr"), condition="where it is known"),
            tail="lr",
        ),
    )
    loss_scale: float = field(
        default=1.0,
        metadata=column(
            "scale of the loop's `GradScaler`, passed as `watch(scaler=)` or found; 1 without one",
            repeats=True,
            scalar=Scalar(
                when=lambda record: record.loss_scale != 1.0,
                lasting=True,
                condition="from the first one on that is not 1",
                loggers=True,
            ),
        ),
    )
    noise_scale: float = field(
        default=math.nan,
        metadata=column(
            "gradient noise scale tr(Sigma) / |G|^2 so far: the batch size whose gradient is as "
            "much noise as signal; NaN where it is not known",
            unit="as `weight`",
            page="accumulation.md",
            scalar=Scalar(
                when=exceeds_its_error,
                condition="where it is larger than its standard error",
                loggers=True,
            ),
        ),
    )
    noise_scale_stderr: float = field(
        default=math.nan,
        metadata=column("standard error of `noise_scale`", unit="as `weight`"),
    )
    hessian_eigenvalue: float = field(
        default=math.nan,
        metadata=column(
            "largest eigenvalue of the Hessian of the loss after the step, as `watch(curvature=)` "
            "asks; NaN where it was not taken",
            unit="loss / weight²",
            page="curvature.md",
            repeats=True,
            scalar=Scalar(
                when=is_finite("hessian_eigenvalue"), condition="at the steps it was taken at"
            ),
        ),
    )
    hessian_trace: float = field(
        default=math.nan,
        metadata=column(
            "trace of that Hessian, an estimate",
            unit="loss / weight²",
            page="curvature.md",
            repeats=True,
            scalar=Scalar(
                when=is_finite("hessian_trace"), condition="at the steps it was taken at"
            ),
        ),
    )
    global_step: int = field(
        default=0,
        metadata=column("the x-axis of loggers: `step`, or the framework's own count"),
    )
    discarded: int = field(
        default=0,
        metadata=column(
            "windows whose gradients were thrown away since the step before: each was a backward, "
            "or several, whose step never came",
            repeats=True,
            scalar=Scalar(
                "largest",
                when=lambda record: record.discarded > 0,
                condition="at steps before which gradients were thrown away",
            ),
        ),
    )
    grad_norm_all: float = field(
        default=math.nan,
        metadata=column(
            "total norm, before any clip and unscaled, over all optimizers that step together: "
            "those with no backward between their steps; `grad_norm` where one steps alone",
            unit="gradient",
            page="plain-loop.md#several-optimizers-several-parameter-groups",
            scalar=Scalar(
                "largest",
                when=steps_with_others,
                lasting=True,
                condition="from the first step on in which it differs from `grad_norm`",
            ),
            tail="norm of all",
            tail_when=steps_with_others,
        ),
    )
    group_lr: str = field(
        default="",
        metadata=column(
            "learning rates of all parameter groups during the step, as a JSON list; empty where "
            "the optimizer has one group, whose rate is `lr`",
            repeats=True,
        ),
    )
    noise_scale_low: float = field(
        default=math.nan,
        metadata=column(
            "lower end of the interval that holds the noise scale in about 95 % of runs; NaN until "
            "20 steps have told about the noise",
            unit="as `weight`",
            page="accumulation.md",
        ),
    )
    noise_scale_high: float = field(
        default=math.nan,
        metadata=column(
            "upper end of that interval; infinite where all that is known is that the noise scale "
            "is at least `noise_scale_low`",
            unit="as `weight`",
        ),
    )


EventKind = Literal[
    "nan",
    "inf",
    "overflow",
    "skipped",
    "exploding",
    "no_gradient",
    "accumulate",
    "dropped",
    "out_of_memory",
    "discarded",
    "changed",
    "mistake",
    "poisoned",
    "explained",
]

_MAGENTA, _PURPLE, _GRAY, _ORANGE, _BLUE, _GREEN, _YELLOW = (
    *("#ff33ff", "#cc79a7", "#8a94a3", "#d55e00", "#56b4e9", "#009e73", "#c9a800"),
)

EVENT_KINDS: dict[str, Kind] = {
    "nan": Kind(
        "a gradient holds a NaN; names the first parameter in backward order where that is known, "
        "with exact counts, and what made it if that was not the backward",
        "NaN elements of that parameter",
        _MAGENTA,
        "triangle",
    ),
    "inf": Kind(
        "a gradient holds an Inf, and no NaN; named likewise",
        "Inf elements of that parameter",
        _MAGENTA,
        "triangle",
    ),
    "overflow": Kind(
        "all gradients are finite, but their norm in float32 is not; the true norm is recorded",
        "norm",
        _PURPLE,
        "triangle",
    ),
    "skipped": Kind("the step was not applied; its `outcome` says why", "norm", _GRAY, "square"),
    "exploding": Kind("the norm is above `watch(exploding_norm=)`", "norm", _ORANGE),
    "no_gradient": Kind(
        "a parameter of the optimizer received no gradient; told once per parameter", "0", _BLUE
    ),
    "accumulate": Kind(
        "from this step on a step has another number of micro-batches; the message says why",
        "micro-batches",
        _GREEN,
    ),
    "dropped": Kind(
        "a run was resumed in the middle of a window, whose gradients are lost",
        "micro-batches",
        _GRAY,
        "square",
    ),
    "out_of_memory": Kind(
        "a batch did not fit into memory and was run again in smaller micro-batches",
        "examples",
        _ORANGE,
        "square",
    ),
    "discarded": Kind(
        "gradients were thrown away: no optimizer stepped between their backward and "
        "`zero_grad()`, or the end of the run; names the step that they would have been",
        "norm",
        _GRAY,
        "square",
    ),
    "changed": Kind(
        "the model or an optimizer is no longer what was watched: parameters were frozen, "
        "replaced, added or removed; or one rank's gradients are not those of the whole model; the "
        "message says which",
        "parameters",
        _BLUE,
        "square",
    ),
    "mistake": Kind(
        "something in the training loop that is nearly always unintended, such as a missing "
        "`zero_grad()`; told once, with what to change",
        "0",
        _YELLOW,
        "square",
    ),
    "poisoned": Kind(
        "buffers of the model, such as running statistics, hold a NaN or Inf since a step whose "
        "gradients did, or were changed by a step that was skipped; told once, with their names",
        "buffers",
        _MAGENTA,
        "square",
    ),
    "explained": Kind(
        'a micro-batch was run again, as `on_nonfinite="explain"` asks: names the operation and '
        "the line that made the NaN or Inf, or the input or weights that held it",
        "bad elements",
        _BLUE,
        "triangle",
    ),
}
"""Every kind of event, in the order in which plots show them."""


@stable_name
@declared
@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in one optimizer step.

    Each field is a column of ``History.events()``.
    """

    # Pickles of earlier versions hold the values in this order: a new field goes to the end.
    step: int = field(metadata=column("optimizer step, counted from 1 per optimizer"))
    micro_batch: int = field(
        metadata=column(
            "micro-batch of the step whose backward made it, counted from 1; the backward where a "
            "micro-batch has several; 0 where none did or where it is not known which, and where "
            "the event belongs to the step as a whole"
        )
    )
    kind: EventKind = field(metadata=column("see the kinds of events"))
    parameter: str = field(
        metadata=column(
            "the parameter; for `nan` and `inf` the first that went bad, in backward order where "
            "that is known; empty where the event belongs to none"
        )
    )
    module: str = field(metadata=column("module that owns the parameter"))
    value: float = field(metadata=column("the number behind the event; see the kinds of events"))
    rank: int = field(
        metadata=column(
            "rank of the process that saw it; for what is wrong with gradients that were reduced "
            "over ranks (`nan`, `inf`, `overflow`, `exploding`, `skipped`) the rank that it came "
            "from, or -1 where that is not this one, or not known"
        )
    )
    message: str = field(metadata=column("one sentence for people"))
    nan_count: int = field(
        default=0,
        metadata=column(
            "NaN elements in the parameter's gradient, exactly; -1 where the gradient was gone "
            "before they could be counted"
        ),
    )
    inf_count: int = field(default=0, metadata=column("Inf elements in it, likewise"))
    optimizer: str = field(
        default="none", metadata=column("label of the optimizer, as in `History.steps()`")
    )
    global_step: int = field(default=0, metadata=column("the x-axis of loggers at that step"))

    @property
    def nonfinite(self) -> bool:
        """Whether the event says that a gradient held a NaN or an Inf."""
        return self.kind in ("nan", "inf")


@stable_name
@dataclass(frozen=True, slots=True)
class Layout:
    """The watched parameters in model order; index ``i`` is column ``i`` of every row.

    Attributes:
        names: Full parameter names, ``"encoder.0.weight"``.
        modules: Name of the module that owns each parameter, ``"encoder.0"``.
        shapes: Shape of each parameter.
        aliases: Further names of a parameter that is used in several places (tied weights).
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    aliases: tuple[tuple[str, ...], ...] = ()


@stable_name
@dataclass(frozen=True, slots=True)
class ParameterGroups:
    """The parameter groups of an optimizer, as they are from one of its steps on.

    Attributes:
        optimizer: Label of the optimizer.
        from_step: The first step that has these groups.
        norm_type: The p of the norms that are recorded.
        names: For each group its ``"name"``, where the user gave it one, or else its index from 0;
            each once. Empty if the groups are not known.
        members: For each group the indices of its parameters in the layout, ascending.
    """

    optimizer: str
    from_step: int
    norm_type: float
    names: tuple[str | int, ...]
    members: tuple[tuple[int, ...], ...]


@stable_name
@loads_older
@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Some consecutive steps, oldest first, as sinks receive them.

    Attributes:
        layout: The parameters that the columns of ``norms`` stand for.
        steps: One record per optimizer step.
        norms: float array ``[len(steps), len(layout.names)]``: pre-clip norm per parameter, in
            true units; :data:`NO_GRADIENT` (-1) where a parameter had no gradient.
        clipped_norms: The same after the clip.
        statistics: Further per-parameter statistics by name, shaped like ``norms``; NaN in steps
            at which a statistic was not taken.
        events: What happened in these steps, oldest first.
        groups: The parameter groups of all optimizers so far, oldest first: of two entries of an
            optimizer the later one replaces the earlier from its step on.
    """

    layout: Layout
    steps: Sequence[StepRecord]
    norms: NDArray[np.floating[Any]]
    clipped_norms: NDArray[np.floating[Any]]
    statistics: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)
    events: Sequence[Event] = ()
    groups: Sequence[ParameterGroups] = ()

    def __repr__(self) -> str:
        return (
            f"RecordBatch({len(self.steps)} steps, {len(self.layout.names)} parameters, "
            f"{len(self.events)} events)"
        )


@stable_name
@runtime_checkable
class Sink(Protocol):
    """Anything that receives batches of records: a file, a logger, TensorBoard, a list.

    It may have an attribute ``deliver``. With ``"step"`` each step is delivered by itself, as soon
    as its numbers are there, for boards whose rows must come in step with those of the loop. With
    ``"batch"``, or without the attribute, steps come together: 64 of them, or those of 5 seconds.

    It may have a method ``attached(watcher)``: it is called when the watcher is attached, in every
    process, also where others than rank 0 deliver nothing. Keep a weak reference to the watcher.
    """

    def write(self, batch: RecordBatch) -> None:
        """Receives some consecutive steps, oldest first, and their events.

        After it has raised, it is called again later, first with the same batch (the same object,
        whole), then with those that it has missed. What it wrote of the batch before it raised is
        its own to undo or to skip.

        Args:
            batch: The records. A sink keeps no reference to the arrays that it changes itself.
        """

    def close(self) -> None:
        """Writes what is still held, releases files; called once, at the end, whatever failed."""


DELIVERIES = ("batch", "step")


def delivery_of(sink: Sink) -> str:
    """Returns how a sink wants its steps: ``"step"`` or ``"batch"``."""
    wanted = getattr(sink, "deliver", "batch")
    return wanted if wanted in DELIVERIES else "batch"


NO_GRADIENT = -1.0
"""Stands in a row of norms where the parameter had no gradient; no norm is negative."""


def clipped_by(
    norms: NDArray[np.floating[Any]], coefficients: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Returns the norms after a clip that multiplied the gradients.

    Args:
        norms: float array: norms before it; :data:`NO_GRADIENT` stays.
        coefficients: float64 array that fits ``norms``: the factors, of which the magnitude counts.
    """
    # The live history, the writer and the reader of a run folder all come here, so that their bits
    # agree: the folder stores only what differs from this.
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (norms * np.abs(coefficients)).astype(norms.dtype)
    return np.where(norms == NO_GRADIENT, NO_GRADIENT, scaled).astype(norms.dtype, copy=False)
