"""Clips, skips and fused optimizers decide and act on the device as they do on the host."""

from tests.contract.test_every_policy import (
    test_a_fused_optimizer_gets_the_same,
    test_a_rise_that_lasts_is_no_spike,
    test_spikes_are_left_out,
    test_the_record_is_what_was_done,
)
from tests.contract.test_skip_everywhere import (
    test_a_skip_equals_a_batch_left_out,
    test_ten_skips_in_a_row_are_enough,
)
from tests.hooks.test_fused import (
    test_a_clip_makes_no_pass_and_leaves_no_trace,
    test_a_momentum_buffer_must_be_there_before_a_skip,
    test_an_attribute_of_the_users_own_stays,
    test_the_fused_ones_listen,
)

# What pytest collects here once more, with the fixtures of this folder.
__all__ = [
    "test_a_clip_makes_no_pass_and_leaves_no_trace",
    "test_a_fused_optimizer_gets_the_same",
    "test_a_momentum_buffer_must_be_there_before_a_skip",
    "test_a_rise_that_lasts_is_no_spike",
    "test_a_skip_equals_a_batch_left_out",
    "test_an_attribute_of_the_users_own_stays",
    "test_spikes_are_left_out",
    "test_ten_skips_in_a_row_are_enough",
    "test_the_fused_ones_listen",
    "test_the_record_is_what_was_done",
]
