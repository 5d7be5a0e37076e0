"""Nothing waits for the device but what has to."""

from tests.test_postfix import (
    test_it_waits_for_nothing,
)
from tests.test_waits import (
    test_a_noted_loss_comes_late,
    test_a_step_arrives_while_the_next_ones_run,
    test_nothing_waits_for_the_device,
    test_numbers_that_come_late_are_the_same,
    test_skipping_looks_once_per_step,
    test_what_went_bad_is_named_late,
)

# What pytest collects here once more, with the fixtures of this folder.
__all__ = [
    "test_a_noted_loss_comes_late",
    "test_a_step_arrives_while_the_next_ones_run",
    "test_it_waits_for_nothing",
    "test_nothing_waits_for_the_device",
    "test_numbers_that_come_late_are_the_same",
    "test_skipping_looks_once_per_step",
    "test_what_went_bad_is_named_late",
]
