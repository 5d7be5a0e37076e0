"""The local variables of running functions."""

import sys
import weakref

from gradwatch.hooks.variables import local_variables


class _Thing:
    pass


def test_what_a_variable_has_held_is_not_kept():
    """An object goes when its variable gets another, though the function still runs."""
    thing = _Thing()
    gone = weakref.ref(thing)
    assert local_variables(sys._getframe())["thing"] is thing
    thing = None
    assert gone() is None


def test_variables_of_a_function_inside_are_seen():
    """Variables that an inner function uses, and those of an outer one, are there by name."""
    outer = 1

    def inner():
        own = outer + 1
        return local_variables(sys._getframe()), own

    variables, own = inner()
    assert variables == {"outer": 1, "own": own}


def test_a_dict_that_somebody_has_stays_full():
    """What locals() has returned to the program is left to it."""
    thing = _Thing()
    theirs = locals()
    local_variables(sys._getframe())
    assert theirs["thing"] is thing


def test_namespaces_are_not_emptied():
    """Modules and class bodies keep their names, which are no copies."""
    namespace = {"local_variables": local_variables, "sys": sys}
    exec("x = 1\nseen = local_variables(sys._getframe())\ny = x", namespace)
    assert namespace["y"] == namespace["seen"]["x"] == 1

    class Body:
        x = 1
        seen = local_variables(sys._getframe())
        y = x

    assert Body.y == Body.seen["x"] == 1


def test_a_tracing_function_loses_no_variable():
    """A debugger's function that is being traced keeps its variables."""
    seen = []

    def traced():
        value = 1
        return value + 1

    def trace(frame, event, argument):
        if frame.f_code is traced.__code__:
            seen.append(dict(local_variables(frame)))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert traced() == 2
    finally:
        sys.settrace(before)
    assert {"value": 1} in seen
