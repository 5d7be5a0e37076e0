"""What users know torch's operations as, by the names of operations and of nodes of the graph."""

from __future__ import annotations

import re

_NAMES = {
    "_to_copy": "to",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
    "_ctc_loss": "ctc_loss",
    "_fused_rms_norm": "rms_norm",
    "_thnn_fused_lstm_cell": "lstm_cell",
    "_thnn_fused_gru_cell": "gru_cell",
    "mkldnn_rnn_layer": "lstm",
    "_safe_softmax": "softmax",
}


def public_name(name: str) -> str:
    """Returns what users know an operation of torch's as: ``"_softmax"`` is ``"softmax"``."""
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("_scaled_dot_product"):
        return "scaled_dot_product_attention"
    short = name.lstrip("_")
    for prefix in ("native_", "cudnn_", "miopen_", "mkldnn_"):
        short = short.removeprefix(prefix)
    return short.removesuffix("_forward").removesuffix("_with_total_weight") or name


def name_of_node(name: str) -> str:
    """Returns the same for a node of the graph: ``"SoftmaxBackward0"`` is ``"softmax"``."""
    base = re.sub(r"Backward\d*$", "", name.rpartition("::")[2])
    return public_name(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", base).lower())
