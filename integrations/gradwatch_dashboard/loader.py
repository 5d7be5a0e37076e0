"""GradientsLoader: what TensorBoard's entry point names; it makes the plugin, or leaves it out.

Any file of this package may be missing, and TensorBoard still starts. Only where all of them are
gone while the entry point is still there does TensorBoard itself die: nothing can prevent that.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin

_LEFT_OUT = (
    "TensorBoard starts without the Gradients tab: %r. Reinstall it with "
    "pip install --force-reinstall --no-deps gradwatch, and TensorBoard 2.14 or newer."
)
_logger = logging.getLogger(__name__)


class GradientsLoader(base_plugin.TBLoader):  # type: ignore[misc]  # TensorBoard has no types
    """Loads the plugin. TensorBoard starts in any case, if need be without it."""

    def fix_flags(self, flags: Any) -> None:
        """Asks TensorBoard to keep all of our data, instead of 10 or 100 samples of each tag."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            # What the user wrote for our data on the command line stands. 0 means all.
            samples.setdefault("gradwatch", 0)

    def load(self, context: Any) -> Any:
        """Makes the plugin; None, and a line in the log, where something is missing."""
        try:
            from gradwatch_dashboard.plugin import GradientsPlugin

            return GradientsPlugin(context)
        except Exception as error:  # whatever it is, the other tabs need not suffer
            _logger.warning(_LEFT_OUT, error)
            return None
