"""How many micro-batches make a step: what a user may write, and what each means."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.accumulate.noise_scale import NoiseScaleEstimator
from gradwatch.accumulate.policies import (
    AccumulateByNoiseScale,
    AccumulatePolicy,
    AccumulationSchedule,
    FixedAccumulation,
    accumulate_policy,
    check_window,
)
from gradwatch.errors import AccumulationError

NAME = "watch(accumulate=)"
UNKNOWN = NoiseScaleEstimator().read()


class Alternating:
    """A user's policy, which can be called as well."""

    most = 3
    lr_factor = 1.0

    def __init__(self):
        self.micro_batches = 1

    def __call__(self, step):
        raise AssertionError("a policy was taken for a function")

    def looks_at(self, step):
        return False

    def decide(self, step, noise):
        self.micro_batches = 1 + 2 * (step % 2)
        return self.micro_batches

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("number", [4, np.int64(4), torch.tensor(4)])
def test_a_number_is_for_every_step(number):
    """An integer, NumPy's and torch's as well, is the number of all windows."""
    policy = accumulate_policy(NAME, number)
    assert isinstance(policy, FixedAccumulation)
    assert [policy.decide(step, UNKNOWN) for step in (0, 1, 1000)] == [4, 4, 4]
    assert (policy.micro_batches, policy.most, policy.lr_factor) == (4, 4, 1.0)
    assert type(policy.micro_batches) is int
    assert repr(policy) == "FixedAccumulation(4)"


def test_a_mapping_says_from_which_step_on():
    """Each entry holds until the next one, in whatever order they were written."""
    policy = accumulate_policy(NAME, {1000: 4, 0: 1, 50: 2})
    assert isinstance(policy, AccumulationSchedule)
    assert policy.micro_batches == 1
    steps = (0, 49, 50, 999, 1000, 10**9)
    assert [policy.decide(step, UNKNOWN) for step in steps] == [1, 1, 2, 2, 4, 4]
    assert (policy.micro_batches, policy.most, policy.lr_factor) == (4, 4, 1.0)
    assert repr(policy) == "AccumulationSchedule({0: 1, 50: 2, 1000: 4})"


@given(st.dictionaries(st.integers(1, 50), st.integers(1, 9)), st.integers(1, 9))
def test_a_mapping_is_the_last_entry_that_has_come(entries, first):
    """At each step the number is that of the largest key that is not above the step."""
    table = {**entries, 0: first}
    policy = AccumulationSchedule(table)
    for step in range(55):
        assert policy.decide(step, UNKNOWN) == table[max(key for key in table if key <= step)]


def test_the_callers_mapping_is_left_alone():
    """The mapping is copied: what is done to it later has no effect, and it is not changed."""
    table = {10: 2, 0: 1}
    policy = AccumulationSchedule(table)
    assert list(table) == [10, 0]
    table[10] = 99
    assert policy.decide(10, UNKNOWN) == 2


def test_a_function_is_asked_for_each_step():
    """A function is called with the step, and may return any number."""
    policy = accumulate_policy(NAME, lambda step: 1 + step // 10)
    assert policy.micro_batches == 1
    assert [policy.decide(step, UNKNOWN) for step in (0, 9, 10, 95)] == [1, 1, 2, 10]
    assert policy.micro_batches == 10
    assert policy.most is None


def test_auto_is_the_policy_by_noise_scale():
    """The word is short for the policy without arguments."""
    assert repr(accumulate_policy(NAME, "auto")) == repr(AccumulateByNoiseScale())


@pytest.mark.parametrize(
    "make", [Alternating, AccumulateByNoiseScale, lambda: FixedAccumulation(3)]
)
def test_a_policy_is_taken_as_it_is(make):
    """An object with the methods of a policy is not copied, and not called."""
    policy = make()
    assert isinstance(policy, AccumulatePolicy)
    assert accumulate_policy(NAME, policy) is policy


@pytest.mark.parametrize("value", [3, {0: 1, 7: 2}, lambda step: step + 1, "auto"])
def test_state_goes_through_json(value):
    """A restored policy has the number of the window under way."""
    policy, restored = accumulate_policy(NAME, value), accumulate_policy(NAME, value)
    policy.decide(7, UNKNOWN)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert restored.micro_batches == policy.micro_batches


def test_only_auto_reads_the_noise_scale():
    """A number and a schedule never make anyone wait for it."""
    for value in (3, {0: 1, 7: 2}, lambda step: 1):
        assert not any(accumulate_policy(NAME, value).looks_at(step) for step in range(100))
    assert accumulate_policy(NAME, "auto").looks_at(10)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, r"^watch\(accumulate=\) must be at least 1, got 0\. Write 1"),
        (-4, ValueError, r"must be at least 1, got -4"),
        (True, TypeError, r"must be an integer of at least 1, .* got True of type bool\. Write acc"),
        (np.bool_(True), TypeError, r"got .*True_? of type bool"),
        (2.0, TypeError, r"must be an integer .* got 2\.0 of type float"),
        (np.array([1.5]), TypeError, r"must be an integer of at least 1, got array\(\[1\.5\]\)"),
        (torch.tensor(2.0), TypeError, r"must be an integer of at least 1, got tensor\(2\.\)"),
        (None, TypeError, r"got None of type NoneType"),
        ([1, 2], TypeError, r"got \[1, 2\] of type list"),
        ("many", ValueError, r"""a function of the step, "auto" or .*, got 'many'"""),
        (AccumulateByNoiseScale, TypeError, r"got <class .*AccumulateByNoiseScale.* of type type"),
        (Alternating, TypeError, r"got <class .*Alternating.*\(or an object, AccumulateByNoiseScale"),
        ({}, ValueError, r"must say how many micro-batches step 0 has, got \{\}\. Add 0 to it"),
        ({1000: 4}, ValueError, r"step 0 has, got \{1000: 4\}\. Add 0 to it: \{0: 1, \.\.\.\}"),
        ({0: 1, -5: 2}, ValueError, r"A step of watch\(accumulate=\) must be at least 0, got -5"),
        ({0: 1, 1.5: 2}, TypeError, r"A step of .* must be an integer of at least 0, got 1\.5"),
        ({False: 1}, TypeError, r"A step of .* got False of type bool"),
        ({0: 1, 9: 0}, ValueError, r"watch\(accumulate=\) gives for step 9 must be at least 1, got 0"),
        ({0: 2.0}, TypeError, r"gives for step 0 must be an integer .*, got 2\.0 of type float"),
        (lambda step: 0, ValueError, r"gives for step 0 must be at least 1, got 0\. Return 1 or more"),
        (lambda step: None, TypeError, r"gives for step 0 must be an integer .*, got None"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(value, error, text):
    """Each error names the argument, what was given, and what to write instead."""
    with pytest.raises(error, match=text):
        accumulate_policy(NAME, value)


def test_a_function_that_fails_later_is_named_with_its_step():
    """What a function returns is checked each time, and leaves the number that there was."""
    policy = accumulate_policy(NAME, lambda step: 2 - step // 100)
    with pytest.raises(ValueError, match=r"gives for step 200 must be at least 1, got 0"):
        policy.decide(200, UNKNOWN)
    assert policy.micro_batches == 2


def test_classes_name_themselves_in_errors():
    """Made directly, a policy's error shows its own argument."""
    with pytest.raises(
        ValueError, match=r"^FixedAccumulation\(number=\) must be at least 1, got 0"
    ):
        FixedAccumulation(0)
    with pytest.raises(
        TypeError, match=r"^AccumulationSchedule\(schedule=\) must be a mapping .*got 3"
    ):
        AccumulationSchedule(3)


def test_a_window_of_another_size_is_refused():
    """Fewer or more micro-batches than were asked for are an error; with 1 any number is taken."""
    check_window("AdamW", 4, 4)
    check_window("AdamW", 3, 1)
    with pytest.raises(AccumulationError, match=r"AdamW\.step\(\) was called after 3 of the 4"):
        check_window("AdamW", 3, 4)
    with pytest.raises(AccumulationError, match="5 micro-batches came before"):
        check_window("AdamW", 5, 4)
