"""Layout: the charts of TensorBoard's Custom Scalars dashboard."""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard.summary import custom_scalars

_SPREAD = ["gradwatch/norm_p50", "gradwatch/norm_p05", "gradwatch/norm_p95"]


def chart_layout(*, step_scalars: bool, accumulates: bool = False) -> Any:
    """Lays out the charts that one scalar each cannot show.

    Args:
        step_scalars: Whether the percentiles are written, which the spread is drawn from.
        accumulates: Whether steps have a batch that the noise scale is to be compared with.

    Returns:
        A ``Summary`` for the tag that the dashboard reads. Multiline charts name their tags by
        regular expressions, so that further optimizers are in them as soon as they appear.
    """
    charts: dict[str, list[Any]] = {
        "norm before and after the clip": [
            "Multiline",
            ["gradwatch[^/]*/grad_norm$", "gradwatch[^/]*/grad_norm_clipped$"],
        ],
    }
    if step_scalars:
        charts["norms over parameters: median, 5 % to 95 %"] = ["Margin", _SPREAD]
    if step_scalars and accumulates:
        charts["batch and noise scale"] = [
            "Multiline",
            ["gradwatch[^/]*/noise_scale$", "gradwatch[^/]*/weight$"],
        ]
    charts["norms of module blocks"] = ["Multiline", ["gradwatch[^/]*_blocks/.*"]]
    return custom_scalars({"gradwatch": charts})  # type: ignore[no-untyped-call]  # torch's own
