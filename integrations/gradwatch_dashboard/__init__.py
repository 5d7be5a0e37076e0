"""The "Gradients" tab in TensorBoard. TensorBoard imports this when it starts: keep it light."""

try:
    from gradwatch_dashboard.loader import GradientsLoader
except Exception as error:  # any error here would keep TensorBoard from starting
    import logging

    from tensorboard.plugins import base_plugin

    logging.getLogger(__name__).warning("TensorBoard starts without the Gradients tab: %r", error)

    class GradientsLoader(base_plugin.TBLoader):  # type: ignore[no-redef, misc]
        """Stands in for the loader that failed to import, and loads nothing."""


__all__ = ["GradientsLoader"]
