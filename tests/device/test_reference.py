"""What is recorded of a training on the device is what a model in float64 says; clips and skips too."""

from tests.reference.test_clipped_weights import (
    test_a_fused_optimizer_clips_alike,
)
from tests.reference.test_norms import (
    test_the_numbers_of_a_managed_loop_equal_the_reference,
    test_the_numbers_of_one_process_equal_the_reference,
    test_the_numbers_of_two_dtypes_equal_the_reference,
)
from tests.reference.test_skipped_steps import (
    test_one_process_is_as_if_the_step_had_not_been,
)

# What pytest collects here once more, with the fixtures of this folder.
__all__ = [
    "test_a_fused_optimizer_clips_alike",
    "test_one_process_is_as_if_the_step_had_not_been",
    "test_the_numbers_of_a_managed_loop_equal_the_reference",
    "test_the_numbers_of_one_process_equal_the_reference",
    "test_the_numbers_of_two_dtypes_equal_the_reference",
]
