"""What holds for all tests."""

import gc

from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Takes what is there for good, a million objects, from the garbage collector.

    A watcher that was given no scaler looks through the collector's objects for one, in its first
    backward. Without this, that and the collector itself would take a third of the suite's time.
    """
    gc.collect()
    gc.freeze()
