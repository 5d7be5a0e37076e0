"""Copies of a watcher, pickled or deep-copied: they hold the record and watch nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.guard import Overhead
from gradwatch.record.kept import KeptRecords
from gradwatch.record.records import RecordBatch, StepRecord

if TYPE_CHECKING:
    from gradwatch.record.explanation import Explanation

IS_A_COPY = (
    "This watcher is a copy (unpickled, or made by copy.deepcopy()): it holds the record of the "
    "run, and watches nothing. Make a new one with watch(model, optimizer), and give it "
    "load_state_dict() of the copy's state_dict() to go on counting."
)


def refuse_copy() -> NoReturn:
    """Refuses what only a watcher that is no copy can do.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(IS_A_COPY)


class Part:
    """Stands in a copy for a part of the watcher; gives the answers it was made with, no others."""

    def __init__(self, **answers: Any) -> None:
        """Keeps the answers, by name."""
        vars(self).update(answers)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # a protocol that some library looks for
            raise AttributeError(name)
        refuse_copy()


def parts_of_copy(
    *,
    batch: RecordBatch,
    explanations: Sequence[Explanation] = (),
    newest: StepRecord | None,
    skipped: int,
    noise_scale: NoiseScale,
    overhead: Overhead,
    state: Mapping[str, Any],
    accumulate: int,
) -> dict[str, Part]:
    """Makes the private attributes of a watcher that is a copy.

    Args:
        batch: All steps and events in memory.
        explanations: Those of the watcher; pickles of earlier versions have none.
        newest: The newest step whose numbers had arrived.
        skipped: Number of steps that were not applied.
        noise_scale: The noise scale of the first optimizer.
        overhead: The time that gradwatch had taken.
        state: What ``state_dict()`` returns.
        accumulate: Micro-batches of the window that was under way.
    """
    steps = {key: state[key] for key in state.keys() - {"accumulation", "managed"}}
    return {
        "_run": Part(
            recorder=KeptRecords(batch, newest, skipped),
            explanations=list(explanations),
            stopwatch=Part(read=lambda: overhead),
            accumulation=Part(micro_batches=accumulate, state_dict=lambda: state["accumulation"]),
        ),
        "_registry": Part(
            noise_scale=lambda: noise_scale,
            commit_backwards=lambda: None,
            state_dict=lambda: steps,
        ),
        "_managed": Part(state_dict=lambda: state["managed"]),
        "_batches": Part(size=state["micro_batch_size"]),
    }
