"""Clips that write past autograd's version counter are seen on the device."""

from tests.contract.test_clips_past_the_counter import (
    test_a_look_changes_no_number_of_a_loop_without_a_clip,
    test_a_look_waits_for_nothing,
    test_both_sides_of_the_clip_are_recorded,
    test_our_own_clip_works_on_what_the_loop_has_left,
)

# What pytest collects here once more, with the fixtures of this folder.
__all__ = [
    "test_a_look_changes_no_number_of_a_loop_without_a_clip",
    "test_a_look_waits_for_nothing",
    "test_both_sides_of_the_clip_are_recorded",
    "test_our_own_clip_works_on_what_the_loop_has_left",
]
