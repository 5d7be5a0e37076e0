"""The "Gradients" tab inside TensorBoard, which imports this at its start: nothing heavy here."""

try:
    from gradwatch_dashboard.loader import GradientsLoader
except Exception as error:  # TensorBoard would die of it, whatever it is
    import logging

    from tensorboard.plugins import base_plugin

    logging.getLogger(__name__).warning("TensorBoard starts without the Gradients tab: %r", error)

    class GradientsLoader(base_plugin.TBLoader):  # type: ignore[no-redef, misc]
        """Stands where the loader should be; loads nothing."""


__all__ = ["GradientsLoader"]
