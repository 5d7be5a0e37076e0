"""ModelHooks: everything that hangs on a watched model while a watcher is attached to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from gradwatch.observe.arrivals import Arrivals, Backward
from gradwatch.observe.freed import FreedGradients
from gradwatch.observe.held_back import HeldBack
from gradwatch.observe.local_norms import LocalNorms
from gradwatch.observe.micro_batch_norms import MicroBatchNorms
from gradwatch.observe.parameters import ParameterTable


class ModelHooks:
    """Tells what arrives in each backward, and measures what is gone at its end.

    Attributes:
        local: This rank's own norms; None where the model is not wrapped for data parallelism.
        added: What each backward adds to the gradients; hooks are hung by :meth:`watch_added`.
        unhooked: Parameters that require no gradient yet, and so have no mark.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        table: ParameterTable,
        on_backward: Callable[[Backward], None],
        on_arrived: Callable[[], None],
    ) -> None:
        """Hangs nothing yet.

        Args:
            model: The watched model.
            table: Its tensors.
            on_backward: Called at the end of each backward, when every ``.grad`` is final.
            on_arrived: Called before it, when nothing has been reduced over ranks yet.
        """
        self.unhooked: set[int] = set()
        self.local = LocalNorms.of(model, table)
        self.added = MicroBatchNorms(table.tensors)
        self._freed = FreedGradients(table.tensors)
        self._model = model
        self._table = table
        self._arrivals = Arrivals(on_backward, None if self.local is None else on_arrived)
        self._watches_added = False
        self._held_back: HeldBack | None = None

    def hooked(self, index: int) -> bool:
        """Tells whether the arrival of a parameter will be noticed."""
        return self._arrivals.hooked(index)

    def attach(self, indices: Sequence[int], norm_type: float, owned: bool) -> None:
        """Hangs the hooks.

        Args:
            indices: Parameters to watch.
            norm_type: The p of the norms.
            owned: Whether it is known which optimizers step them.
        """
        if not owned:
            self._freed.attach(indices, norm_type)
        self.watch_also(indices)
        self._held_back = HeldBack.of(self._model, self._arrivals.begin)
        if self.local is not None:
            self.local.attach(norm_type)

    def detach(self) -> None:
        """Takes everything off; safe to call again."""
        self._arrivals.unhook()
        self._freed.detach()
        self.added.detach()
        self.unhooked = set()
        if self._held_back is not None:
            self._held_back.remove()
        if self.local is not None:
            self.local.detach()

    def watch_also(self, indices: Sequence[int]) -> list[int]:
        """Hangs marks on further parameters, as soon as they require a gradient.

        Args:
            indices: The parameters.

        Returns:
            Those that have a gradient already: they arrived before they had a mark.
        """
        self.unhooked.update(index for index in indices if not self.hooked(index))
        return self.hook_thawed()

    def watch_added(self) -> None:
        """Hangs hooks that measure what each backward adds, here and on what is watched later.

        With FSDP2 they would never be called: there a backward adds to whole gradients, which no
        parameter holds.
        """
        if not self._watches_added and self._held_back is None:
            self._watches_added = True
            self.added.watch(self._arrivals.hooked_indices())

    def take_freed(self, arrived: Sequence[int]) -> dict[int, Tensor]:
        """Returns the norms of gradients that are gone at the end of a backward, by index."""
        return self._freed.take(arrived)

    def hook_thawed(self) -> list[int]:
        """Hangs marks on the parameters that require a gradient by now.

        Returns:
            Those of them that have a gradient already.
        """
        tensors = self._table.tensors
        thawed = sorted(index for index in self.unhooked if tensors[index].requires_grad)
        for index in thawed:
            self._arrivals.hook(index, tensors[index])
        if self._watches_added:
            self.added.watch(thawed)
        self.unhooked.difference_update(thawed)
        return [index for index in thawed if tensors[index].grad is not None]
