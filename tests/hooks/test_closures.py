"""KeptClosures: what is held of a function that computes a loss, and which of them must not be called again."""

import gc
import io
import weakref
from functools import partial
from typing import Any

import pytest
import torch

from gradwatch.hooks.closures import KeptClosure, KeptClosures, why_not_again


def kept(function: Any, *args: Any) -> KeptClosure:
    """Return what is kept of a function."""
    return KeptClosure(function, args, scaled=False, alone=False)


def test_variables_keep_their_values() -> None:
    """A local variable that is bound anew afterwards is, in the copy, what it was."""
    found = [kept(lambda: value) for value in (1, 2, 3)]  # noqa: B023
    assert [one.bound()() for one in found] == [1, 2, 3]


def test_globals_keep_their_values() -> None:
    """So is a global variable, also one that only a function inside reads."""
    names: dict[str, Any] = {"x": 1, "y": 10}
    exec("def outer(): return x + (lambda: y)()", names)
    one = kept(names["outer"])
    names["x"], names["y"] = 5, 50
    assert one.bound()() == 11
    assert names["outer"]() == 55


def test_what_a_copy_writes_stays_in_it() -> None:
    """A counter in a variable does not count calls of the copy."""
    count = 0

    def function() -> int:
        nonlocal count
        count += 1
        return count

    one = kept(function)
    assert (one.bound()(), count) == (1, 0)


def test_defaults_attributes_and_arguments_are_those_of_the_function() -> None:
    """A copy is called as the function is."""

    def function(x: int, y: int = 2, *, z: int = 3) -> tuple[int, int, int]:
        return x, y, z

    function.mark = "here"  # type: ignore[attr-defined]
    bound = kept(function, 1).bound()
    assert bound() == (1, 2, 3)
    assert isinstance(bound, partial)
    assert bound.func.mark == "here"


def test_a_variable_without_a_value_stays_without() -> None:
    """The copy raises what the function would."""

    def function() -> int:
        return later

    one = kept(function)
    later = 1
    with pytest.raises(NameError):
        one.bound()()
    assert function() == later


def test_nothing_but_references() -> None:
    """Neither function nor batch is held by a cycle, or copied."""
    batch = torch.zeros(3)
    closures = KeptClosures()
    closures.begin(lambda part: part.sum(), batch)
    closures.note_backward(7, {})
    closures.end()
    one = closures.by_number[7]
    assert isinstance(one, KeptClosure)
    assert one.args[0] is batch
    reference = weakref.ref(batch)
    del batch, one
    gc.disable()
    try:
        closures.drop(7)
        assert reference() is None
    finally:
        gc.enable()


def test_a_backward_of_something_else_has_none() -> None:
    """A closure is that of the backwards between its begin and its end."""
    closures, held = KeptClosures(), {1: ["a forward"]}
    closures.note_backward(1, held)
    closures.begin(lambda: None)
    closures.note_backward(2, held)
    closures.note_backward(3, held)
    closures.end()
    closures.note_backward(4, held)
    closures.refuse("Because.")
    closures.note_backward(5, held)
    assert sorted(closures.by_number) == [2, 3, 5]
    assert held == {1: ["a forward"], 2: [], 3: [], 5: []}
    assert closures.by_number[5] == "Because."


def test_a_tensor_that_is_changed_in_place_is_noticed() -> None:
    """In the batch, and in a variable."""
    batch, other = {"x": [torch.zeros(2)]}, torch.zeros(2)
    one = kept(lambda part: part["x"][0] + other, batch)
    assert one.notes() == []
    other.add_(1)
    assert "in place" in one.notes()[0]


class Holder:
    """An object that has an iterator, and methods of which some use it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.batch = stream, 3

    def draw(self) -> Any:
        """Return the next item."""
        return next(self.stream)

    def outer(self) -> Any:
        """Return the next item, by another method."""
        return self.draw()

    def harmless(self) -> int:
        """Return what is there."""
        return self.batch


@pytest.mark.parametrize(
    "how",
    ["variable", "called", "argument", "default", "partial", "method", "by_method", "of_object"],
)
def test_what_draws_from_an_iterator_is_refused(how: str) -> None:
    """A second call would take the next batch."""
    stream = iter([1, 2])

    holder = Holder(stream)

    def inner() -> Any:
        return next(stream)

    functions = {
        "variable": inner,
        "called": lambda: [inner()],
        "argument": partial(lambda given: [next(given)], stream),
        "default": lambda given=stream: next(given),
        "partial": partial(lambda function: function(), inner),
        "method": holder.draw,
        "by_method": holder.outer,
        "of_object": lambda: [holder.draw()],
    }
    assert "iterator" in why_not_again(functions[how])
    assert next(stream) == 1


def test_a_file_is_no_iterator_of_data() -> None:
    """A closure that writes a log is run again."""
    log = io.StringIO()
    assert why_not_again(lambda: log.write("x")) == ""


def test_an_iterator_that_is_not_used_does_no_harm() -> None:
    """An object may have one that the function has nothing to do with."""
    holder = Holder(iter([1]))
    assert why_not_again(holder.harmless) == ""
    assert why_not_again(lambda: [holder.harmless()]) == ""
