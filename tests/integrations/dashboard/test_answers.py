"""Answers and arguments: the framing, the numbers, the limits."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard import errors
from werkzeug.datastructures import MultiDict

from gradwatch_dashboard.answers import json_numbers, pack
from gradwatch_dashboard.arguments import Arguments
from gradwatch_dashboard.untrusted import MAX_NAME, fit_name
from tests.support.board import unpack


@settings(deadline=None)
@given(st.text(max_size=20), st.lists(st.integers(0, 7), max_size=4))
def test_arrays_come_back(name, sizes):
    """Each array begins at a multiple of 8 bytes and is read back as it was, whatever the header."""
    types = ["f4", "u1", "u2", "f8"]
    arrays = {str(i): np.arange(size * 3).reshape(3, size).astype(types[i]) for i, size in enumerate(sizes)}  # fmt: skip
    header = unpack(pack({"run": name}, arrays))
    assert header["run"] == name
    for key, array in arrays.items():
        assert header[key].dtype == array.dtype
        np.testing.assert_array_equal(header[key], array)


def test_a_transposed_array_is_sent_in_the_order_of_its_shape():
    """What lies in memory the other way round is not sent so."""
    array = np.arange(6, dtype="f4").reshape(2, 3).T
    np.testing.assert_array_equal(unpack(pack({}, {"a": array}))["a"], array)


@settings(deadline=None)
@given(st.lists(st.floats(width=32)))
def test_numbers_are_json(values):
    """Finite numbers come back within 7 digits, the others as words that every reader has."""
    decoded = json.loads(json_numbers(np.array(values, "f4")), parse_constant=pytest.fail)
    words = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
    numbers = [words.get(value, value) for value in decoded]
    np.testing.assert_allclose(numbers, values, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "fit"),
    [("a.b", "a.b"), ("\ud800x", "?x"), ("ß" * 2000, "ß" * MAX_NAME + "..."), ("", "")],
)
def test_names_fit(name, fit):
    """A name is cut where it is too long, and holds nothing that UTF-8 cannot."""
    assert fit_name(name) == fit


def arguments(**values):
    """The arguments of a request, each a list of values."""
    return Arguments(MultiDict([(key, one) for key, many in values.items() for one in many]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["7"], 7), (["0"], 1), (["-5"], 1), (["99"], 9), (["9" * 18], 9), ([], 3)],
)
def test_integers_are_clamped(given, expected):
    """A number beyond its bounds counts as the bound."""
    assert arguments(n=given).integer("n", 3, 1, 9) == expected


@pytest.mark.parametrize(
    "given",
    [["abc"], [""], ["NaN"], ["1.5"], ["1e3"], [" 1"], ["1\n"], ["+1"], ["٣"], ["0x1"], ["1", "1"],
     ["9" * 19], ["1_0"], ["--1"], ["\x00"]],
    ids=ascii,
)  # fmt: skip
def test_what_is_no_integer_is_refused(given):
    """A malformed or repeated number is the client's mistake."""
    with pytest.raises(errors.InvalidArgumentError, match="n must be"):
        arguments(n=given).integer("n", 3, 1, 9)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [([], [], (10, 20)), (["12"], [], (12, 20)), (["-3"], ["15"], (10, 15)),
     (["30"], [], (20, 20)), (["1"], ["2"], (10, 10)), (["30"], ["40"], (20, 20))],
)  # fmt: skip
def test_ranges_are_clamped_to_what_is_there(first, last, expected):
    """A range never reaches beyond the steps that there are, and is never empty."""
    assert arguments(first=first, last=last).range(10, 20) == expected


def test_a_range_the_wrong_way_round_is_refused():
    """first beyond last is an error, and says both."""
    with pytest.raises(errors.InvalidArgumentError, match="first=15 and last=12"):
        arguments(first=["15"], last=["12"]).range(10, 20)
