"""Run: the state that all parts of a watcher share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.accumulate.policies import AccumulationPlan
from gradwatch.errors import warn_safely
from gradwatch.guard import Stopwatch
from gradwatch.hooks.buffers import BufferLook
from gradwatch.hooks.data_parallel import DataParallel, rank
from gradwatch.hooks.model import ModelHooks
from gradwatch.hooks.scaler import FoundScale
from gradwatch.measure.devices import is_capturing
from gradwatch.measure.parameters import ParameterTable
from gradwatch.measure.sharded import Shards
from gradwatch.options import Options
from gradwatch.record.events import changed_event, explained_event, poisoned_event
from gradwatch.record.folder.models import ModelFolder
from gradwatch.record.folder.ranks import RankLog
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.late_sinks import LateSinks
from gradwatch.record.recorder import Recorder, RingBuffer, SinkHub
from gradwatch.record.records import Event, Layout, StepRecord
from gradwatch.step.replicas import Replicas
from gradwatch.step.together import JointSteps

if TYPE_CHECKING:
    from gradwatch.hooks.forwards import ForwardCall
    from gradwatch.record.explanation import Explanation
    from gradwatch.record.folder.explanations import ExplanationStore
    from gradwatch.step.explaining import Explaining

MOST_EXPLANATIONS = 100
"""Explanations that are kept in memory, the newest ones."""

POISONED = "poisoned"
"""What is told once in a run: that buffers hold a NaN."""


class Run:
    """The run that is being watched.

    Attributes:
        table: The watched parameters.
        options: The options of ``watch()``.
        hooks: The hooks on the model.
        data_parallel: The ranks that average their gradients; None if there is only one.
        global_step: Maps a step to the step number that loggers use as their x-axis.
        shards: The sharded parameters; None if no parameter is sharded.
        scale: The loss scale of the newest backward. Each optimizer has its own.
        stopwatch: Measures the time that gradwatch itself takes.
        recorder: Keeps records and events.
        accumulation: How many micro-batches make a step.
        used: The numbers of the newest backwards whose gradients an optimizer has stepped with.
        told: What was told about the training loop.
        other_steps: The number of steps of optimizers that hold no watched parameter.
        joint_steps: Which optimizers step together.
        suspects: Records of steps that held a NaN or Inf, after which no buffer was looked at yet.
        replicas: Sees whether the ranks train one model together.
        explanations: Where bad gradients came from, newest last.
        explaining: Explains bad steps; None if nobody asks.
        tells_changes: Whether to tell that the model has other parameters than it had.
        tells_foreign: Whether to tell of an optimizer with parameters that are not watched. Where
            every model of the process is watched, they will be.
        on_first_step: Called by :meth:`begin`, and then forgotten.
        follow_model: Goes on with the parameters that the model has now, where they were replaced.
    """

    def __init__(
        self,
        table: ParameterTable,
        options: Options,
        hooks: ModelHooks,
        data_parallel: DataParallel | None,
        global_step: Callable[[int], int],
    ) -> None:
        """Begins a run in which nothing has happened yet; for the arguments see the class."""
        self.table = table
        self.options = options
        self.hooks = hooks
        self.data_parallel = data_parallel
        self.global_step = global_step
        self.shards = Shards.of(table.tensors)
        self.scale = FoundScale(options.scaler)
        self.stopwatch = Stopwatch()
        self.used: set[int] = set()
        self.other_steps = 0
        self.suspects: list[StepRecord] = []
        self._looks: list[tuple[StepRecord, BufferLook]] = []
        self.told: set[str] = set()
        self.tells_changes = self.tells_foreign = True
        self.joint_steps = JointSteps(2.0 if options.clip is None else options.clip.norm_type)
        self.accumulation = AccumulationPlan(
            options.accumulate, lambda *change: self.note(changed_event(*change))
        )
        shapes = tuple(tuple(tensor.shape) for tensor in table.tensors)
        layout = Layout(table.names, table.modules, shapes, aliases=table.aliases)
        sinks = options.sinks if rank() == 0 else ()  # all ranks would write the same numbers
        hub = SinkHub(sinks, options.buffer_size)
        self.replicas = Replicas(
            table,
            hooks,
            data_parallel,
            self.tell,
            sharded=self.shards is not None,
            writes=options.run_dir is not None or bool(options.sinks),
        )
        ring = RingBuffer(layout, options.buffer_size)
        self.explanations: list[Explanation] = []
        self.explaining: Explaining | None = None
        self._folder = _folder_of(options)
        self._log = _log_of_rank(self._folder)
        self._store = _store_of(self._folder)
        self.recorder = Recorder(
            ring,
            hub,
            self.replicas.note_record,
            None if self._log is None else self._log.note,
        )
        self.follow_model: Callable[[], bool] = bool
        self.on_first_step: list[Callable[[], None]] = []
        if any(isinstance(sink, ModelFolder | LateSinks) for sink in options.sinks):
            self.on_first_step.append(self._begin_writing)

    @property
    def folder(self) -> Path | None:
        """The run folder, also on a rank that does not write its tables; None without one."""
        return None if self._folder is None else _path_of(self._folder)

    @property
    def has_written(self) -> bool:
        """Whether the run folder holds something of this run, as far as this rank knows."""
        return isinstance(self._folder, RunFolder) and self._folder.has_written

    def tell(self, event: Event, key: str = "", warn: bool = True) -> None:
        """Records an event about the training loop, and warns; once in a run.

        Args:
            event: The event.
            key: What is told once; by default the message itself.
            warn: Whether to warn, too.
        """
        key = key or event.message
        if key in self.told:
            return
        self.told.add(key)
        self.note(event)
        if warn:
            warn_safely(f"gradwatch: {event.message}")

    def stands_aside(self) -> bool:
        """Returns whether a graph is being captured, of which nothing can be seen."""
        tensors = self.table.tensors
        return bool(tensors) and not tensors[0].is_cpu and is_capturing(tensors[0].device)

    def suspect(self, record: StepRecord) -> None:
        """Notes a step that held a NaN or Inf, for :meth:`tell_poisoned`."""
        self.suspects.append(record)

    def tell_poisoned(self, *, wait: bool = False) -> None:
        """Tells, once, of buffers that hold a NaN or Inf after a step whose gradients did.

        Args:
            wait: Whether to wait for what a device knows; without, it is told after a later step.
        """
        suspects, self.suspects = self.suspects, []
        if POISONED in self.told:
            return
        looks = [(record, self.hooks.buffers.look()) for record in suspects]
        self._looks += [(record, look) for record, look in looks if look is not None]
        while self._looks and (wait or self._looks[0][1].arrived()):
            record, look = self._looks.pop(0)
            names = look.poisoned()
            if names:
                skips = self.options.on_nonfinite == "skip"
                self.tell(poisoned_event(record, names, skips), key=POISONED)
                self._looks = []

    @property
    def doubts_buffers(self) -> bool:
        """Whether :meth:`tell_poisoned` may have something to tell."""
        return bool(self.suspects or self._looks)

    def note(self, event: Event) -> None:
        """Records an event that belongs to no finished step."""
        self.recorder.note((replace(event, global_step=self.global_step(event.step)),))

    def explain(
        self, explanation: Explanation, calls: Sequence[ForwardCall] = (), *, labeled: bool = False
    ) -> None:
        """Records an explanation: in memory, as an event, and in the run folder if there is one.

        Args:
            explanation: With its step, its optimizer and the rank of this process.
            calls: The forwards of the micro-batch, to keep it in the run folder; else empty.
            labeled: Whether there are several optimizers, so that names must tell them apart.
        """
        self.explanations.append(explanation)
        del self.explanations[:-MOST_EXPLANATIONS]
        self.note(explained_event(explanation))
        if self._store is not None:
            self._store.write(explanation, calls, labeled=labeled)

    def begin(self) -> None:
        """Notes that an optimizer has taken a step, or was stopped in it by an error of ours."""
        calls, self.on_first_step = self.on_first_step, []
        for call in calls:
            call()

    def move_folder(self, path: str) -> None:
        """Names another run folder, before anything is written; see :meth:`Watcher.move_folder`."""
        if isinstance(self._folder, ModelFolder):
            self._folder.move(path)
        else:  # of a rank that does not write its tables
            self._folder = Path(path)
        for writer in (self._log, self._store):
            if writer is not None:
                writer.move(path)

    def _begin_writing(self) -> None:
        """Writes what had to wait for the first step of a model."""
        for sink in self.options.sinks:
            if isinstance(sink, ModelFolder | LateSinks):
                sink.begin()
        if self._log is not None:
            self._log.begin()
        if self._store is not None:
            folder = self._folder if rank() == 0 else None  # another rank does not make it
            self._store.begin(folder.claim if isinstance(folder, ModelFolder) else None)


def _folder_of(options: Options) -> RunFolder | Path | None:
    """Returns the run folder; its path on a rank that does not write its tables; None without."""
    folders = [one for one in options.sinks if isinstance(one, RunFolder)]
    path = None if options.run_dir is None else Path(options.run_dir)
    return next(iter(folders), path)


def _log_of_rank(folder: RunFolder | Path | None) -> RankLog | None:
    """Returns what notes the NaN of this rank beside the run folder; None on the first rank."""
    mine = rank()
    if not mine or folder is None:
        return None
    return RankLog(_path_of(folder), mine, waits=isinstance(folder, ModelFolder))


def _store_of(folder: RunFolder | Path | None) -> ExplanationStore | None:
    if folder is None:
        return None
    from gradwatch.record.folder.explanations import ExplanationStore  # few runs need it

    return ExplanationStore(_path_of(folder), rank(), waits=isinstance(folder, ModelFolder))


def _path_of(folder: RunFolder | Path) -> Path:
    return folder.path if isinstance(folder, RunFolder) else folder
