"""postfix(): what a progress bar has room for."""

from __future__ import annotations

from gradwatch.recorder import Recorder


def postfix(recorder: Recorder) -> dict[str, str]:
    """Makes a few short texts of the newest step; see :meth:`gradwatch.watcher.Watcher.postfix`.

    Args:
        recorder: The memory of the watcher.
    """
    record = recorder.newest
    if record is None:
        return {}
    texts = {"grad_norm": f"{record.grad_norm:.3g}"}
    if record.clipped:
        texts["clip_coef"] = f"{record.clip_coef:.2g}"
    if record.nonfinite_parameters:
        texts["nonfinite"] = str(record.nonfinite_parameters)
    if recorder.skipped:
        texts["skipped"] = str(recorder.skipped)
    return texts
