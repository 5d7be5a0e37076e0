"""What a forward changes in objects, and nobody knows from before it, is said and not relied on."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.replay.changes import CHANGES, TAKEN_BACK


def _explained(model, *given, **named):
    """Train one step, with zeros in row 1 of the batch, and return the explanation."""
    torch.manual_seed(0)
    for one in model.parameters():
        nn.init.normal_(one)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 4)
    x[1] = 0
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(x, *given, **named).backward()
        optimizer.step()
    (found,) = watcher.explanations
    return found


class Cache:
    """Keeps keys, in one way or another."""

    def __init__(self, keys):
        self.keys = keys
        self.calls = 0


class Slots:
    """The same without a dict."""

    __slots__ = ("keys",)

    def __init__(self, keys):
        self.keys = keys


def _appended(cache, keys):
    cache.keys.append(keys)
    return torch.cat(list(cache.keys))


def _joined(cache, keys):
    cache.keys = keys if cache.keys is None else torch.cat([cache.keys, keys])
    return cache.keys


def _written(cache, keys):
    # Twice as much the second time, so the numbers are others.
    cache.keys.add_(keys.detach())
    return keys + cache.keys


def _by_layer(cache, keys):
    cache.keys["layer"] = torch.cat(
        [*(cache.keys.get("layer", ()),), keys][-2:] if cache.keys else [keys]
    )
    return cache.keys["layer"]


FILLED = {
    "list": (lambda: Cache([]), _appended),
    "deque": (lambda: Cache(deque(maxlen=4)), _appended),
    "attribute": (lambda: Cache(None), _joined),
    "in place": (lambda: Cache(torch.zeros(3, 4)), _written),
    "dict": (lambda: Cache({}), _by_layer),
    "slots": (lambda: Slots([]), _appended),
}


class Caching(nn.Module):
    """Takes a root of what a cache holds."""

    def __init__(self, update, cache=None):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.update, self.cache = update, cache

    def forward(self, x, cache=None):
        return self.update(cache or self.cache, self.layer(x)).abs().sqrt().mean()


@pytest.mark.parametrize("kind", FILLED)
@pytest.mark.parametrize("place", ["argument", "attribute", "two deep"])
def test_a_cause_that_comes_after_what_was_filled_is_not_claimed(kind, place):
    """The replay is given a cache that is filled already: its examples would be others."""
    make, update = FILLED[kind]
    if place == "argument":
        found, name = _explained(Caching(update), make()), "cache"
    elif place == "attribute":
        found, name = _explained(Caching(update, make())), "self.cache"
    else:
        model = nn.Sequential(Caching(update, make()))
        found, name = _explained(model), "0.cache"
    assert found.origin == "not_found"
    assert CHANGES.format(name=name) in found.notes


class Earlier(Caching):
    """Has gone bad before it comes to the cache."""

    def forward(self, x, cache=None):
        hidden = self.layer(x).abs().sqrt()
        return self.update(cache or self.cache, hidden).mean()


@pytest.mark.parametrize("kind", FILLED)
def test_a_cause_before_that_is_claimed_with_a_note(kind):
    """What is computed before the cache is read is what the training has computed."""
    make, update = FILLED[kind]
    found = _explained(Earlier(update), make())
    assert (found.operation, found.phase, found.examples) == ("sqrt", "backward", (1,))
    assert found.notes == (CHANGES.format(name="cache"),)


def test_data_that_is_bad_is_so_whatever_a_cache_holds():
    """A NaN in an argument is there all the same."""
    model = Caching(_appended, Cache([]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(torch.full((3, 4), torch.nan)).backward()
        optimizer.step()
    (found,) = watcher.explanations
    assert (found.origin, found.argument) == ("input", "x")
    assert found.notes == (CHANGES.format(name="self.cache"),)


class Counting(nn.Module):
    """Has attributes of every kind that a forward changes, and the cause at a count."""

    def __init__(self, change):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.change = change
        self.t, self.flag, self.name, self.scale = 0, False, "", 0.0
        self.state, self.array, self.seen = Cache(()), np.zeros(3), []
        self.counts = {"t": 0}

    def forward(self, x):
        self.change(self)
        return self.layer(x).abs().sqrt().mean()


def _change(key, value):
    return lambda model: setattr(model, key, value(model))


def _count(model):
    model.state.calls += 1


def _count_in_array(model):
    model.array[0] += 1


CHANGED = {
    "flag": (_change("flag", lambda model: not model.flag), "self.flag"),
    "text": (_change("name", lambda model: model.name + "a"), "self.name"),
    "float": (_change("scale", lambda model: model.scale**2 + 0.5), "self.scale"),
    "array": (_count_in_array, "self.array"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_plain_attribute_that_the_forward_changes_is_named(kind):
    """Its value is that from after the forward, so a branch may be another one."""
    change, name = CHANGED[kind]
    found = _explained(Counting(change))
    assert (found.operation, found.examples) == ("sqrt", (1,))
    assert found.notes == (CHANGES.format(name=name),)


def _count_in_dict(model):
    model.counts["t"] += 2


COUNTED = {
    "number": (_change("t", lambda model: model.t + 1), "self.t", 0),
    "float": (_change("scale", lambda model: model.scale - 0.5), "self.scale", 0.0),
    "object": (_count, "self.state.calls", 0),
    "dict": (_count_in_dict, "self.counts['t']", 0),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_a_number_that_the_forward_moves_is_taken_back(kind):
    """By as much as the replay has moved it, if it then ends where the training has ended."""
    change, name, value = COUNTED[kind]
    model = Counting(change)
    found = _explained(model)
    assert (found.operation, found.examples) == ("sqrt", (1,))
    assert found.notes == (TAKEN_BACK.format(name=name, value=value),)
    assert (model.t, model.scale, model.state.calls, model.counts["t"]) == {
        "number": (1, 0.0, 0, 0),
        "float": (0, -0.5, 0, 0),
        "object": (0, 0.0, 1, 0),
        "dict": (0, 0.0, 0, 2),
    }[kind]


class AtACount(nn.Module):
    """Goes bad in its third forward, and would in another way in its fourth."""

    def __init__(self, counter):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.counter = counter

    def forward(self, x, counter=None):
        counter = counter or self.counter
        counter.calls += 1
        hidden = self.layer(x)
        if counter.calls == 3:
            hidden = torch.log(hidden * 0) * hidden
        if counter.calls == 4:
            hidden = hidden / (hidden * 0)
        return hidden.square().mean()


@pytest.mark.parametrize("place", ["argument", "attribute"])
def test_the_branch_of_the_training_is_run(place):
    """A counter decides, and it is one further by the time of the replay."""
    counter = Cache(None)
    model = AtACount(None if place == "argument" else counter)
    given = (counter,) if place == "argument" else ()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        for _ in range(3):
            model(torch.ones(3, 4), *given).backward()
            optimizer.step()
            optimizer.zero_grad()
    (found,) = watcher.explanations
    assert found.operation == "log"
    name = "counter.calls" if place == "argument" else "self.counter.calls"
    assert found.notes == (TAKEN_BACK.format(name=name, value=2),)
    assert counter.calls == 3


UNCHANGED = {
    "nothing": lambda model: None,
    "the same again": _change("scale", lambda model: 0.5),
    "a list of numbers": lambda model: model.seen.append(1.0),
    "a flag that is set": _change("flag", lambda model: True),
}


@pytest.mark.parametrize("kind", UNCHANGED)
def test_what_is_only_noted_is_not_named(kind):
    """A forward that writes the same again, or appends numbers to a list, does not need it."""
    found = _explained(Counting(UNCHANGED[kind]))
    assert (found.operation, found.notes) == ("sqrt", ())


class Remembering(nn.Module):
    """Multiplies by a number of Python that the forward before has left."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.last = 1.0

    def forward(self, x):
        hidden = self.layer(x) * self.last
        self.last = float(hidden.detach().abs().sum(1).log().sum())
        return hidden.abs().sqrt().mean()


def test_a_number_that_is_infinite_since_the_forward():
    """Nobody knows what it was before, and it makes everything bad."""
    found = _explained(Remembering())
    assert found.origin == "not_found"
    assert CHANGES.format(name="self.last") in found.notes


class Strange(dict):
    """Tells nobody what is in it."""

    def items(self):
        raise RuntimeError("no")


def test_a_container_that_cannot_be_looked_into():
    """The cause is found all the same."""
    model = Counting(lambda model: None)
    model.state = Strange(a=1)
    found = _explained(model)
    assert (found.operation, found.notes) == ("sqrt", ())


def test_by_hand_objects_are_what_is_given():
    """There nothing has run before, so there is nothing to say."""
    model, cache = Caching(_appended), Cache([])
    found = gradwatch.explain(model, torch.zeros(3, 4), cache)
    assert (found.operation, found.notes, cache.keys) == ("sqrt", (), [])


@pytest.mark.parametrize("way", ["managed", "closure"])
def test_closures_tell_attributes_too(way):
    """A closure that is run again is given the attributes as the training has left them."""
    model = Counting(COUNTED["number"][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        if way == "managed":
            watcher.backward(lambda: model(torch.zeros(3, 4)))
        else:
            model(torch.zeros(3, 4)).backward()
        optimizer.step()
    (found,) = watcher.explanations
    assert (found.operation, found.notes) == ("sqrt", (TAKEN_BACK.format(name="self.t", value=0),))
