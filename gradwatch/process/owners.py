"""Which model the parameters of an optimizer belong to, and what it is called.

Nobody passes the model: it is searched for among all modules of the process.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradwatch.hooks.data_parallel import shards_of
from gradwatch.hooks.optimizer import parameters_held, parts_of, stepped_by, wrapped_in
from gradwatch.measure.parameters import unwrapped
from gradwatch.process.modules import NotedModules, all_modules, frozen_modules, values_of

# Keys of Together that names leave out (measure/parameters.py).
ONLY_ONE = "(model)"
LOOSE = "(loose)"

_LONGEST_LABEL = 80


class Owner:
    """A model that one or several optimizers train. Keeps neither alive.

    Attributes:
        label: What the model is called: the class of the module, or of the optimizer if no module
            holds its parameters. Can be the name of a folder. Other owners may have the same.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        loose: Mapping[str, Tensor],
    ) -> None:
        """Refers weakly to what it is given.

        Args:
            roots: The outermost modules of the model; several if no module holds all of them.
            optimizers: Those that step its parameters.
            loose: By name the parameters that no module holds.
        """
        self.label = _label(roots, optimizers)
        self._optimizers = [weakref.ref(one) for one in optimizers]
        # A wrapper may be dropped before what is in it.
        self._roots = [(weakref.ref(one), weakref.ref(unwrapped(one))) for one in roots]
        self._prefixes = _prefixes(roots)
        self._loose = {name: TensorWeakRef(tensor) for name, tensor in loose.items()}

    def __repr__(self) -> str:
        return f"Owner({self.label})"

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that step its parameters: those to pass to ``watch()``."""
        return [one for ref in self._optimizers if (one := ref()) is not None]

    @property
    def roots(self) -> list[nn.Module]:
        """The outermost modules that still exist."""
        return list(self._named_roots().values())

    def model(self) -> nn.Module | None:
        """Returns what to build a table of parameters from; None if the program has dropped it.

        This is the module itself. If there are several, or parameters that no module holds, it is
        a container made for this call, which nothing but the caller keeps alive.
        """
        roots = self._named_roots()
        loose = {name: t for name, ref in self._loose.items() if (t := ref()) is not None}
        if not roots and not loose:
            return None
        if len(self._roots) == 1 and not loose:
            return next(iter(roots.values()))
        return Together(roots, loose)

    def _named_roots(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for prefix, (whole, inner) in zip(self._prefixes, self._roots, strict=True):
            module = whole()
            module = inner() if module is None else module
            if module is not None:
                found[prefix] = module
        return found


class Together(nn.ModuleDict):
    """Holds what has no module around it: several models, or parameters that are in none."""

    def __init__(self, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> None:
        """Holds modules and leaf tensors by name."""
        super().__init__()
        # Not by add_module(), which refuses dots, and calls hooks that the program may have set.
        self._modules.update(modules)
        if parameters:
            self._modules[LOOSE] = _Loose(parameters)


class _Loose(nn.Module):
    """Holds parameters. A module of its own, so that they come after those of the models."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__()
        self._parameters.update(parameters)  # register_parameter() refuses plain tensors


def roots_in(model: object) -> list[nn.Module]:
    """Lists the program's own modules in what :meth:`Owner.model` has returned."""
    if not isinstance(model, Together):
        return [model] if isinstance(model, nn.Module) else []
    return [one for one in model._modules.values() if type(one) is not _Loose]


def owners_of(optimizers: Sequence[Optimizer], noted: NotedModules | None = None) -> list[Owner]:
    """Finds the models that optimizers train, in the order of the optimizers.

    Optimizers of one model, or that share parameters, have one owner. An optimizer without
    parameters has none. A wrapper stands for the optimizer in it if both are given.

    Args:
        optimizers: Any optimizers of the process.
        noted: The modules that were noted. Only where they do not tell, all are searched for.
    """
    stepping = _outermost(optimizers)
    wanted = [(one, _parameters_held(one)) for one in stepping]
    wanted = [(one, parameters) for one, parameters in wanted if parameters]
    if not wanted:
        return []
    ids = {id(tensor) for _, parameters in wanted for tensor in parameters}
    graph = _Graph(ids, noted.modules() if noted else ())
    trained = [_Trained(graph, one, parameters) for one, parameters in wanted]
    if noted is None or not all(one.is_known(graph, noted) for one in trained):
        graph = _Graph(ids, all_modules())
        trained = [_Trained(graph, one, parameters) for one, parameters in wanted]
    if any(one.loose for one in trained) and (frozen := frozen_modules()):
        graph = _Graph(ids, [*all_modules(), *frozen])
        trained = [_Trained(graph, one, parameters) for one, parameters in wanted]
    return [_owner(graph, group) for group in _groups(trained)]


def _outermost(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Lists the optimizers to follow: not those that are in others, whose steps are the same."""
    given = list({id(one): one for one in optimizers}.values())
    inside: set[int] = set()
    for outer in given:
        if any(one is outer for one in stepped_by(outer)):
            own = set(map(id, _parameters_held(outer)))
            inside |= {
                id(one)
                for one in wrapped_in(outer)
                if own.issuperset(map(id, _parameters_held(one)))
            }
    found: list[Optimizer] = []
    for one in given:
        if id(one) not in inside:
            found += _followed(one)
    return list({id(one): one for one in found}.values())


def _followed(optimizer: Optimizer) -> list[Optimizer]:
    # As options.optimizer_list() does for watch(): torch runs no step hooks on some wrappers.
    stepped = stepped_by(optimizer)
    if stepped:
        return stepped[:1]
    try:
        return parts_of(optimizer)
    except ValueError:
        return [optimizer]


def _parameters_held(optimizer: Optimizer) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in parameters_held(optimizer)}.values())


class _Trained:
    """What one optimizer trains: modules, and parameters that are in none."""

    def __init__(self, graph: _Graph, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.roots = graph.roots_of(parameters)
        held = set().union(*(graph.held[id(root)] for root in self.roots))
        self.loose = {id(tensor) for tensor in parameters if id(tensor) not in held}
        # Two models may share what neither trains, such as a frozen backbone.
        self.tensors = {id(tensor) for tensor in parameters}
        for root in self.roots:
            self.tensors |= {id(t) for t in _tensors_in(root) if t.requires_grad}

    def is_known(self, graph: _Graph, noted: NotedModules) -> bool:
        """Returns whether the noted modules suffice to say which the model is."""
        # With several models, or parameters that none of them holds, one may have been missed.
        return (
            len(self.roots) == 1 and not self.loose and graph.is_known_around(self.roots[0], noted)
        )


def _groups(trained: Iterable[_Trained]) -> list[list[_Trained]]:
    """Puts together what shares parameters: each of them can be watched only once."""
    groups: list[tuple[set[int], list[_Trained]]] = []
    for one in trained:
        joined = [group for group in groups if not group[0].isdisjoint(one.tensors)]
        tensors = one.tensors.union(*(tensors for tensors, _ in joined))
        members = [member for _, members in joined for member in members] + [one]
        first = groups.index(joined[0]) if joined else len(groups)
        groups = [group for group in groups if not any(group is other for other in joined)]
        groups.insert(first, (tensors, members))
    return [members for _, members in groups]


def _owner(graph: _Graph, trained: Sequence[_Trained]) -> Owner:
    roots = list({id(root): root for one in trained for root in one.roots}.values())
    outermost = [one for one in roots if not any(graph.is_in(one, other) for other in roots)]
    loose: dict[int, tuple[str, Tensor]] = {}
    for number, one in enumerate(trained):
        for place, tensor in _places(one.optimizer):
            name = place if number == 0 else f"{place}#{number + 1}"
            if id(tensor) in one.loose:
                loose.setdefault(id(tensor), (name, tensor))
    optimizers = [one.optimizer for one in trained]
    return Owner(outermost or roots, optimizers, dict(loose.values()))


def _places(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, group in enumerate(optimizer.param_groups):
        for position, tensor in enumerate(group["params"]):
            yield f"param_groups[{index}][{position}]", tensor


# -- names -----------------------------------------------------------------------------------------


def _label(roots: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> str:
    names = [_class_name(root) for root in roots] or [type(one).__name__ for one in optimizers]
    label = "-".join(dict.fromkeys(names))
    return re.sub(r"[^\w.-]+", "_", label)[:_LONGEST_LABEL].strip("._-") or "model"


def _class_name(module: nn.Module) -> str:
    module = unwrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", "ScriptModule"))
    found = type(module)
    # torch makes such a class for a module that it shards or parametrizes.
    while made := [
        base
        for base in found.__bases__
        if found.__name__ in (f"FSDP{base.__name__}", f"Parametrized{base.__name__}")
    ]:
        found = made[0]
    return found.__name__


def _prefixes(roots: Sequence[nn.Module]) -> list[str]:
    """Names the parts of a container, each differently."""
    if len(roots) == 1:
        return [ONLY_ONE]
    names = [_class_name(root).lower().replace(".", "_") for root in roots]
    prefixes: list[str] = []
    for position, name in enumerate(names):
        number = names[: position + 1].count(name)
        prefixes.append(name if names.count(name) == 1 else f"{name}_{number}")
    return prefixes


# -- the modules of the process --------------------------------------------------------------------


class _Graph:
    """The modules that hold any of some parameters, and which of them is in which.

    Keeps them alive: it must not outlive the search.

    Attributes:
        held: By ``id(module)`` the ids of those parameters that are in it.
    """

    def __init__(self, wanted: set[int], modules: Iterable[nn.Module]) -> None:
        """Looks for parameters by their ids, in modules and all that is in these."""
        self._modules: dict[int, nn.Module] = {}
        self._parents: dict[int, list[int]] = {}
        self.held: dict[int, set[int]] = {}
        own: dict[int, set[int]] = {}
        new = [one for one in modules if type(one) not in (Together, _Loose)]
        while new:
            module = new.pop()
            if id(module) in self._modules:
                continue
            self._modules[id(module)] = module
            for tensor in values_of(module, "_parameters"):
                if id(tensor) in wanted:
                    own.setdefault(id(module), set()).add(id(tensor))
            # While the parameters are gathered, the module holds others than the optimizer does.
            for holder, tensor in shards_of(module):
                if id(tensor) in wanted:
                    own.setdefault(id(holder), set()).add(id(tensor))
            children = values_of(module, "_modules")
            new += children
            for child in children:
                self._parents.setdefault(id(child), []).append(id(module))
        waiting = list(own.items())
        while waiting:
            key, tensors = waiting.pop()
            added = tensors - self.held.setdefault(key, set())
            if added:
                self.held[key] |= added
                waiting += [(parent, added) for parent in self._parents.get(key, ())]

    def roots_of(self, parameters: Sequence[Tensor]) -> list[nn.Module]:
        """Lists the modules that hold some parameters; few, and none that is in another."""
        positions = {id(tensor): position for position, tensor in enumerate(parameters)}
        remaining = set(positions)
        roots: list[tuple[int, nn.Module]] = []
        while remaining:
            covers = {key: held & remaining for key, held in self.held.items()}
            size = max(map(len, covers.values()), default=0)
            if size == 0:
                break
            # Of several equally large models the one whose parameters come first.
            largest = [cover for cover in covers.values() if len(cover) == size]
            cover = min(largest, key=lambda one: sorted(positions[key] for key in one))
            root = self._choose([key for key, one in covers.items() if one == cover])
            roots.append((min(positions[key] for key in cover), self._modules[root]))
            remaining -= cover
        return [root for _, root in sorted(roots, key=lambda one: one[0])]

    def is_in(self, module: nn.Module, other: nn.Module) -> bool:
        """Returns whether a module is inside of another one."""
        return module is not other and id(other) in self._around(id(module))

    def is_known_around(self, module: nn.Module, noted: NotedModules) -> bool:
        """Returns whether a module can be in no other one than those that were noted."""
        around = self._around(id(module))
        outermost = [key for key in around if not self._parents.get(key)]
        return all(noted.knows(self._modules[key]) for key in outermost)

    def _choose(self, candidates: list[int]) -> int:
        """Returns which of several modules that hold the same parameters is the model."""
        ranks = {key: self._rank(key) for key in candidates}
        best = [key for key in candidates if ranks[key] == min(ranks.values())]
        while True:
            around = {key: self._around(key) & set(best) - {key} for key in best}
            outermost = [key for key in best if not around[key]] or best
            if len(outermost) == 1:
                return outermost[0]
            # Two wrappers around one model, such as DDP and torch.compile: what is in both of them.
            common = [key for key in best if around[key].issuperset(outermost)]
            if not common or len(common) == len(best):
                return min(outermost, key=self._size)
            best = common

    def _size(self, key: int) -> tuple[int, str]:
        module = self._modules[key]
        return len(list(_tensors_in(module))), type(module).__qualname__

    def _around(self, key: int) -> set[int]:
        """Returns the modules that a module is in, and itself."""
        found, waiting = {key}, [key]
        while waiting:
            new = set(self._parents.get(waiting.pop(), ())) - found
            found |= new
            waiting += new
        return found

    def _rank(self, key: int) -> int:
        """Returns 0 for a model, 2 for a container, 1 for what is around a model."""
        module = self._modules[key]
        if type(module) in _CONTAINERS:
            return 2
        around = isinstance(module, _Loss) or self._is_facade(module)
        return int(around or self._passes_on(module) or self._averages(module))

    def _is_facade(self, module: nn.Module) -> bool:
        """Returns whether calling a module is something else than running the model in it.

        An object that offers training and prediction may be a module that holds the model.
        """
        home = next(one for one in type(module).__mro__ if "__call__" in vars(one))
        if home is nn.Module or home.__module__.partition(".")[0] == "torch":
            return False
        used = _names_in(vars(home)["__call__"])
        running = {"__call__", "_call_impl", "forward", *self._trained_in(module)}
        return used.isdisjoint(running) or not used.isdisjoint(("no_grad", "inference_mode"))

    def _trained_in(self, module: nn.Module) -> list[str]:
        """Names the children that hold any of the parameters."""
        children = module._modules.items()
        return [name for name, child in children if self.held.get(id(child))]

    def _passes_on(self, module: nn.Module) -> bool:
        """Returns whether a module holds a model twice: as it is, and as it is to be called."""
        holding = [one for one in values_of(module, "_modules") if self.held.get(id(one))]
        return len(holding) > 1 and len({id(unwrapped(one)) for one in holding}) == 1

    def _averages(self, module: nn.Module) -> bool:
        """Returns whether a module is a mean of the weights of the model, which it holds as well.

        It is called for the mean.
        """
        children = {name: one for name, one in module._modules.items() if one is not None}
        trained = self._trained_in(module)
        copies = [name for name in children if name not in trained]
        if len(trained) != 1 or not copies or values_of(module, "_parameters"):
            return False
        same = all(type(children[name]) is type(children[trained[0]]) for name in copies)
        frozen = not any(t.requires_grad for name in copies for t in _tensors_in(children[name]))
        used = _names_in(type(module).forward)
        return same and frozen and trained[0] not in used and not used.isdisjoint(copies)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _names_in(function: Any) -> set[str]:
    """Returns the names of attributes and globals that a function uses."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    found: set[str] = set()
    waiting = [] if code is None else [code]
    while waiting:
        code = waiting.pop()
        found.update(code.co_names)
        waiting += [one for one in code.co_consts if isinstance(one, CodeType)]  # functions in it
    return found


def _tensors_in(root: nn.Module) -> Iterator[Tensor]:
    seen, waiting = {id(root)}, [root]
    while waiting:
        module = waiting.pop()
        yield from values_of(module, "_parameters")
        children = [one for one in values_of(module, "_modules") if id(one) not in seen]
        seen.update(map(id, children))
        waiting += children
