"""GradientsLoader: the entry point for TensorBoard. It makes the plugin, or leaves it out.

TensorBoard still starts if any file of this package is missing. If the whole package is missing but
its entry point is still installed, TensorBoard itself fails to start; nothing here can prevent it.
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
    """Loads the plugin. If that fails, TensorBoard starts without it."""

    def fix_flags(self, flags: Any) -> None:
        """Asks TensorBoard to keep all of our data, instead of 10 or 100 samples of each tag."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            # 0 means all. setdefault: the user's own setting on the command line takes precedence.
            samples.setdefault("gradwatch", 0)

    def load(self, context: Any) -> Any:
        """Makes the plugin. If that fails, logs a warning and returns None."""
        try:
            from gradwatch_dashboard.plugin import GradientsPlugin

            return GradientsPlugin(context)
        except Exception as error:  # no error here may affect the other tabs
            _logger.warning(_LEFT_OUT, error)
            return None
