"""Names of parameters: the user's own, wrappers taken off."""

import torch
from torch import nn

from gradwatch.measure.parameters import ParameterTable


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
    """DataParallel and torch.compile leave the names of the user's model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = ParameterTable.of(model).names
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
