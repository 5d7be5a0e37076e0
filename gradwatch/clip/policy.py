"""ClipPolicy: the interface of every clipping rule, and the decision that it returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradwatch.contracts import Contract, check_result, is_builtin
from gradwatch.pickles import stable_name

SCOPES = ("global", "group", "parameter")


@stable_name
@runtime_checkable
class ClipPolicy(Protocol):
    """A clipping rule: norms in, a decision out. It never sees a gradient.

    A policy may have an attribute ``scope``. With ``"global"``, or without the attribute, it is
    given the total norm, a tensor ``[]``. With ``"group"`` or ``"parameter"`` it is given one norm
    for each parameter group, or for each parameter, of the optimizer: a tensor ``[n]``, always in
    the same order, with 0 for what has no gradient.

    On the CPU, a policy is never given a norm that is not finite. On an accelerator it may be, as
    checking would mean waiting for the device: the policy must then keep such a norm out of its
    memory by itself, and its decision for that step is not used.
    """

    # `scope` is not a member, or isinstance() would refuse a user's policy that has none.

    @property
    def norm_type(self) -> float:
        """The p of the norm that is measured for this policy, and recorded."""

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides what is done to the gradients of one step.

        Args:
            total_norm: Tensor ``[]``, or ``[n]`` with a scope other than ``"global"``: norms before
                the clip, without loss scale and reduced over ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists; empty for a rule without memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""


class UnitRule(Protocol):
    """A rule that needs the gradient and the weight of each output unit, not only norms."""

    def coefficient(self, name: str, gradient: Tensor, weight: Tensor) -> Tensor | None:
        """Computes the factors for one parameter.

        The gradient is without loss scale and has the shape of the weight.

        Returns:
            The factors, broadcastable to the gradient; None to leave it unchanged.
        """


@stable_name
@dataclass(frozen=True, slots=True)
class ClipDecision:
    """What a policy wants done to the gradients of one step.

    Attributes:
        coefficient: The factor to multiply the gradients by, between 0 and 1, in the shape of the
            norms that the policy was given; None to leave the gradients unchanged.
        threshold: The limit that was applied, a number or a tensor ``[]``, in the unit of the norm
            or, with ``clip_value``, of the elements; NaN if there is no single limit. It is
            recorded only.
        clip_value: The limit for the magnitude of each element; None for no such limit.
        units: A rule that is applied to each output unit of each parameter; None for no such rule.
    """

    coefficient: Tensor | None = None
    threshold: float | Tensor = math.nan
    clip_value: float | None = None
    units: UnitRule | None = None


MEMBERS = {
    "norm_type": "",
    "decide": "(total_norm)",
    "state_dict": "()",
    "load_state_dict": "(state)",
}
DECISION = (
    "a gradwatch.ClipDecision, such as gradwatch.ClipDecision(coefficient, threshold=limit) with a "
    "tensor as coefficient, or gradwatch.ClipDecision() to leave the gradients alone"
)
COEFFICIENT = "a ClipDecision whose coefficient is None or a real tensor of shape {shape}"
THRESHOLD = "a ClipDecision whose threshold is a number or a tensor of one"
CLIP_VALUE = "a ClipDecision whose clip_value is None or a positive number"
UNITS = "a ClipDecision whose units is None or has coefficient(name, gradient, weight)"
FACTORS = "None, or a tensor of factors that can be broadcast to the gradient"


def check_policy(argument: str, policy: object) -> None:
    """Refuses a clipping rule that does not keep to :class:`ClipPolicy`.

    Args:
        argument: How error messages call the argument, as the user wrote it.
        policy: The rule; one of gradwatch's own is not looked at.

    Raises:
        ContractError: If a member is missing, or is not what it must be.
    """
    if is_builtin(policy):
        return
    contract = Contract(argument, policy, "gradwatch.ClipPolicy")
    contract.has(MEMBERS)
    contract.attribute("norm_type", "a positive number, or math.inf", _is_positive)
    if hasattr(policy, "scope"):
        contract.attribute("scope", f"one of {SCOPES}", lambda scope: scope in SCOPES)
    contract.gives_state()
    _try_out(policy)


def _try_out(policy: Any) -> None:
    """Has a copy of a rule decide about a norm of 1, so that a wrong answer shows before a run."""
    if getattr(policy, "scope", "global") != "global":
        return  # how many norms it will be given is not known yet
    norms = torch.ones((), dtype=torch.float32, device="cpu")
    try:
        decision = copy.deepcopy(policy).decide(norms)
    except Exception:  # it cannot be copied, say: the run will show
        return
    check_decision(policy, decision, norms)


def check_decision(policy: object, decision: object, norms: Tensor) -> ClipDecision:
    """Returns what a user's rule has decided; ``norms`` are those that it was given.

    Raises:
        ContractError: If it is no :class:`ClipDecision` that can be carried out.
    """
    if not isinstance(decision, ClipDecision):
        check_result(policy, "decide()", decision, DECISION, fits=False)
        return ClipDecision()
    coefficient, shape = decision.coefficient, tuple(norms.shape)
    fits = coefficient is None or _are_factors(coefficient, shape)
    check_result(policy, "decide()", decision, COEFFICIENT.format(shape=shape), fits)
    check_result(policy, "decide()", decision, THRESHOLD, _is_one_number(decision.threshold))
    clip_value, units = decision.clip_value, decision.units
    fits = clip_value is None or _is_positive(clip_value)
    check_result(policy, "decide()", decision, CLIP_VALUE, fits)
    fits = units is None or callable(getattr(units, "coefficient", None))
    check_result(policy, "decide()", decision, UNITS, fits)
    return decision


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _are_factors(value: object, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and not value.is_complex() and tuple(value.shape) == shape


def _is_one_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


class Stateless:
    """The empty state of policies without memory."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the rule has no memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the rule has no memory."""
