"""The frames of all threads are looked at without a collection of garbage in between."""

import gc
import sys

from gradwatch.hooks import callers


def test_no_garbage_is_collected_meanwhile(monkeypatch):
    """A collection would run under a lock of the interpreter, and free tensors that others wait for."""
    enabled = []
    frames = sys._current_frames

    def look():
        enabled.append(gc.isenabled())
        return frames()

    monkeypatch.setattr(sys, "_current_frames", look)
    assert callers.frames_of_threads().keys() == frames().keys()
    assert enabled == [False]
    assert gc.isenabled()
