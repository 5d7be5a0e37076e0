"""Steps that several optimizers take together, and the norm over all of their gradients."""

from __future__ import annotations

from gradwatch.measure.deferred import Transfer
from gradwatch.measure.norms import StepNorms, norm_of_norms
from gradwatch.record.records import StepRecord


class JointStep:
    """Steps with no backward in between, at most one of each optimizer.

    While an optimizer steps, nobody knows whether another one will follow. The norm over all of
    them is final when the joint step is closed; a record that was made earlier is updated then.

    Attributes:
        closed: Whether no further optimizer can join.
        awaited: Whether records wait until it is closed, unless somebody reads them.
    """

    def __init__(self, norm_type: float) -> None:
        """Starts without a step; ``norm_type`` is the p of the norms."""
        self.closed = self.awaited = False
        self._norm_type = norm_type
        # Not the pending steps, which refer to this object: such a cycle would keep their tensors
        # until the garbage collector runs.
        self._norms: dict[str, StepNorms] = {}
        self._transfers: list[Transfer] = []
        self._records: dict[int, StepRecord] = {}  # by identity
        self._total: float | None = None

    def __len__(self) -> int:
        return len(self._norms)

    def __contains__(self, optimizer: str) -> bool:
        return optimizer in self._norms

    def add(self, optimizer: str, norms: StepNorms, transfer: Transfer | None) -> None:
        """Adds the step of an optimizer.

        ``transfer`` copies its numbers from a device; None if they are on the host.
        """
        self._norms[optimizer] = norms
        if transfer is not None:
            self._transfers.append(transfer)

    def arrived(self) -> bool:
        """Returns whether the norms of all steps so far can be read; never waits."""
        return all(transfer.arrived() for transfer in self._transfers)

    def fill(self, record: StepRecord) -> None:
        """Sets ``grad_norm_all`` of a record, and of those made before; may wait for numbers."""
        if self._total is not None:
            record.grad_norm_all = self._total
            return
        for transfer in self._transfers:
            transfer.wait()
        total = norm_of_norms([one.grad_norm for one in self._norms.values()], self._norm_type)
        self._records[id(record)] = record
        for one in self._records.values():
            one.grad_norm_all = total
        if self.closed:
            self._total = total


class JointSteps:
    """Finds the optimizers that step together.

    Attributes:
        several: Whether there may be more than one optimizer. If not, nothing need be called.
        current: The joint step under way; None if no optimizer has stepped since the last backward.
    """

    def __init__(self, norm_type: float) -> None:
        """Knows no optimizer yet; ``norm_type`` is the p of the norms."""
        self.several = False
        self.current: JointStep | None = None
        self._norm_type = norm_type
        self._optimizers = 0
        self._finds_more = False

    @property
    def any_followed(self) -> bool:
        """Whether any optimizer is followed."""
        return self._optimizers > 0

    def follow_one_more(self) -> None:
        """Counts an optimizer that is followed from now on."""
        self._optimizers += 1
        self.several = self._finds_more or self._optimizers > 1

    def follow_one_less(self) -> None:
        """Counts an optimizer that is gone."""
        self._optimizers -= 1

    def find_more(self) -> None:
        """Notes that optimizers are found at their first step."""
        self._finds_more = self.several = True

    def of(self, optimizer: str, step: int) -> JointStep:
        """Returns the joint step that a step of an optimizer, counted from 1, belongs to."""
        if self.current is None or self.current.closed or optimizer in self.current:
            self.close()
            self.current = JointStep(self._norm_type)
        # An optimizer that has stepped alone before most likely does so again: then the record
        # does not wait for others.
        if self._optimizers > 1 or step == 1:
            self.current.awaited = True
        return self.current

    def close_if_complete(self) -> None:
        """Closes the joint step if every optimizer has joined it."""
        if self.current is not None and not self._finds_more:
            self.current.closed = len(self.current) == self._optimizers

    def close(self) -> None:
        """Ends the joint step under way, as a backward has ended."""
        if self.current is not None:
            self.current.closed = True
            self.current = None
