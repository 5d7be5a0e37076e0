"""Names of parameters: the user's own, wrappers taken off."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradwatch.measure.parameters import ParameterTable, named_modules


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_parameters_stand_once_with_their_aliases():
    """A tensor that is used twice is one row with two names."""
    table = ParameterTable.of(_Tied())
    assert table.names == ("embed.weight",)
    assert table.aliases == (("head.weight",),)
    assert table.modules == ("embed",)


def test_wrapper_prefixes_are_no_part_of_a_name():
    """DataParallel, an averaged model and torch.compile leave the names of the user's model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = ParameterTable.of(model).names
    assert ParameterTable.of(torch.optim.swa_utils.AveragedModel(model)).names == plain
    assert ParameterTable.of(nn.DataParallel(model)).names == plain
    assert ParameterTable.of(torch.compile(model, backend="eager")).names == plain


def test_a_users_own_module_named_module_keeps_its_name():
    """Only wrappers are taken off, not a child that is called module."""
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2, bias=False))
    assert ParameterTable.of(model).names == ("module.weight",)


def test_a_mapping_gives_its_own_names():
    """Names of a mapping stand as they are."""
    x = torch.ones(1, requires_grad=True)
    assert ParameterTable.of({"x": x}).names == ("x",)


def test_indices_are_in_model_order():
    """The parameters of an optimizer are found in the order of the model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parameters = list(model.parameters())
    table = ParameterTable.of(model)
    assert table.indices_of([parameters[3], parameters[1], parameters[3], torch.ones(1)]) == [1, 3]


def test_every_wrapper_of_torch_is_cut_out_wherever_it_is():
    """Compiled and checkpointed parts inside, and a compiled data-parallel model, keep the user's names."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    plain = ParameterTable.of(model).names
    inside = nn.Sequential(
        torch.compile(model[0], backend="eager"), nn.Sequential(checkpoint_wrapper(model[1][0]))
    )
    assert ParameterTable.of(inside).names == plain
    assert ParameterTable.of(torch.compile(nn.DataParallel(model), backend="eager")).names == plain
    assert ParameterTable.of(nn.ModuleDict({"a": nn.DataParallel(model)})).names == tuple(
        f"a.{name}" for name in plain
    )


@pytest.mark.parametrize(
    "name", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_a_users_submodule_with_the_name_of_a_wrapper_is_one(name: str):
    """A name is cut only where a wrapper of that class put it, so that two parameters stay two."""
    model = nn.Module()
    model.head = nn.Linear(2, 1, bias=False)
    model.add_module(name, nn.Module())
    model.get_submodule(name).head = nn.Linear(2, 1, bias=False)
    names = ("head.weight", f"{name}.head.weight")
    assert ParameterTable.of(model).names == names
    assert ParameterTable.of(torch.compile(model, backend="eager")).names == names
    assert ParameterTable.of(dict(model.named_parameters())).names == names


class _PassesOn(nn.Module):
    """A wrapper of no known library: what it has not, it has from the module inside."""

    def __init__(self, inner: nn.Module, given: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        if given is not None:
            self.given = given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules.get("given") or self._modules["inner"], name)


def test_a_wrapper_of_any_library_is_cut_out():
    """One that passes attributes on to the one module in it adds nothing to names, in any nesting."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    plain = ParameterTable.of(model).names
    for wrapped in (
        _PassesOn(model),
        _PassesOn(_PassesOn(model)),
        _PassesOn(torch.compile(model, backend="eager")),
        torch.compile(_PassesOn(model), backend="eager"),
        _PassesOn(nn.DataParallel(model), given=model),  # as Fabric holds a module
        nn.Sequential(_PassesOn(model[0]), _PassesOn(model[1])),
    ):
        table = ParameterTable.of(wrapped)
        assert table.names == plain
        assert table.aliases == ((),) * len(plain)
        assert [name for name, _, _ in named_modules(wrapped)][-1] == "1.0"
    assert not [key for key in vars(model) if "gradwatch" in key]  # nothing is left of it


def test_a_module_that_only_looks_like_a_wrapper_is_none():
    """Without passing attributes on, or with parameters or modules of its own, names stay."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name)

    assert ParameterTable.of(Named()).names == ("inner.weight", "inner.bias")
    more = _PassesOn(nn.Linear(2, 2, bias=False))
    more.scale = nn.Parameter(torch.ones(1))
    assert ParameterTable.of(more).names == ("scale", "inner.weight")
    heads = _PassesOn(nn.Linear(2, 2, bias=False))
    heads.head = nn.Linear(2, 1, bias=False)
    assert ParameterTable.of(heads).names == ("inner.weight", "head.weight")


def test_no_two_parameters_have_one_name():
    """Where two names would be the same without what a wrapper adds, both stay in full."""
    wrapped = nn.DataParallel(nn.Linear(2, 2, bias=False))
    wrapped.weight = nn.Parameter(torch.ones(2))
    assert ParameterTable.of(wrapped).names == ("weight", "module.weight")
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    table = ParameterTable.of({"_orig_mod.x": x, "x": y})
    assert table.names == ("_orig_mod.x", "x")
    assert ParameterTable.of({"_orig_mod.x": x}).names == ("x",)


def test_names_are_those_of_named_parameters():
    """Without wrappers names, aliases and order are those of torch."""
    model = nn.ModuleList([_Tied(), nn.LSTM(2, 3), nn.TransformerEncoderLayer(4, 2)])
    nn.utils.parametrizations.weight_norm(model[0].head)
    table = ParameterTable.of(model)
    named = list(model.named_parameters(remove_duplicate=False))
    assert list(table.names) == [name for name, _ in model.named_parameters()]
    ids = {name: id(tensor) for name, tensor in named}
    for name, tensor, aliases in zip(table.names, table.tensors, table.aliases, strict=True):
        assert {ids[one] for one in (name, *aliases)} == {id(tensor)}
