"""Checks of objects that the user writes, such as policies and sinks, before the run begins.

Structural typing finds a class whose methods have the right names. These checks also find methods
that take other arguments, attributes of a wrong type, and, at the first call, results of a wrong
type: each error names the class, the member, what it is and what to write instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gradwatch.checks import described
from gradwatch.errors import ContractError

MISSING = "{argument} got a {kind}, which has no {missing}: {interface} needs it."
NOT_CALLABLE = (
    "{argument} got a {kind} whose {method} is not a method, but {value}. Write def "
    "{method}{takes}."
)
OTHER_ARGUMENTS = (
    "{argument} got a {kind} whose {method}{signature} cannot be called as {method}{takes}: "
    "{error}. Write def {method}{takes}."
)
WRONG_VALUE = "{argument} got a {kind} whose {member} is {value}, but it must be {wanted}."
WRONG_RESULT = "{kind}.{method} returned {value}, but it must return {wanted}."
FAILED = "{argument} got a {kind} whose {member} cannot be read: {error}."


class Contract:
    """What an object that the user passes must have.

    Args:
        argument: How error messages call the argument, as the user wrote it.
        value: The object.
        interface: The name of the interface, such as ``"gradwatch.ClipPolicy"``.
    """

    def __init__(self, argument: str, value: object, interface: str) -> None:
        self._argument = argument
        self._value = value
        self._interface = interface
        self._kind = type(value).__name__

    def has(self, members: Mapping[str, str]) -> None:
        """Refuses an object that lacks a member, or whose methods take other arguments.

        Args:
            members: Each member with how it is written: ``"(step, noise)"`` for a method, empty for
                an attribute.
        """
        missing = [
            f"{name}{takes}" for name, takes in members.items() if not has(self._value, name)
        ]
        if missing:
            names = ", ".join(missing)
            raise ContractError(
                MISSING.format(
                    argument=self._argument,
                    kind=self._kind,
                    missing=names,
                    interface=self._interface,
                )
            )
        for name, takes in members.items():
            if takes:
                self.takes(name, takes)

    def takes(self, method: str, takes: str) -> None:
        """Refuses a method that cannot be called as ``takes`` says: ``"(step, noise)"``."""
        call = getattr(self._value, method, None)
        told = {"argument": self._argument, "kind": self._kind, "method": method, "takes": takes}
        if not callable(call):
            raise ContractError(NOT_CALLABLE.format(value=described(call), **told))
        try:
            signature = inspect.signature(call)
        except (TypeError, ValueError):  # a method in C need not have one
            return
        try:
            signature.bind(*filter(None, takes.strip("()").split(", ")))
        except TypeError as error:
            text = OTHER_ARGUMENTS.format(signature=signature, error=error, **told)
            raise ContractError(text) from None

    def attribute(self, name: str, wanted: str, accepts: Callable[[Any], bool]) -> None:
        """Refuses an attribute that is not what it must be.

        Args:
            name: Name of the attribute.
            wanted: What it must be, for the message.
            accepts: Returns whether a value is that.
        """
        told = {"argument": self._argument, "kind": self._kind, "member": name}
        try:
            value = getattr(self._value, name)
        except Exception as error:
            raise ContractError(FAILED.format(error=error, **told)) from error
        if not _holds(accepts, value):
            raise ContractError(WRONG_VALUE.format(value=described(value), wanted=wanted, **told))

    def gives_state(self) -> None:
        """Refuses an object whose ``state_dict()`` does not return a mapping."""
        state = self._value.state_dict()  # type: ignore[attr-defined]
        check_result(
            self._value,
            "state_dict()",
            state,
            "a dict of plain numbers and lists; {} for a rule without memory",
            isinstance(state, Mapping),
        )


def check_result(owner: object, method: str, value: object, wanted: str, fits: bool) -> None:
    """Refuses what a method of the user's object returned, unless it ``fits``."""
    if not fits:
        kind = type(owner).__name__
        text = WRONG_RESULT.format(kind=kind, method=method, value=described(value), wanted=wanted)
        raise ContractError(text)


def has(value: object, name: str) -> bool:
    """Returns whether an object has an attribute; one that cannot be read counts."""
    try:
        return hasattr(value, name)
    except Exception:  # hasattr() lets through what a property raises
        return True


def is_builtin(value: object) -> bool:
    """Returns whether an object is of a class of gradwatch itself, which needs no check."""
    return type(value).__module__.partition(".")[0] == __name__.partition(".")[0]


def _holds(accepts: Callable[[Any], bool], value: object) -> bool:
    try:
        return bool(accepts(value))
    except Exception:  # a comparison that the value does not know
        return False
