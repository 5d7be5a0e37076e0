"""The line in the loss: managed loops, closures of optimizers, and watcher.explain(closure)."""

# ruff: noqa: B023 - the functions are called while the variables have their values, and not only then

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support.state import differences, pieces, state_of

GONE = 2.0
"""The class that the loss gives no probability."""


class Model(nn.Module):
    """A small classifier with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return three scores for each row."""
        return self.last(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.3))


def loss_of(scores: Tensor, target: Tensor) -> Tensor:
    """Return a mean of logarithms, of a 0 where the target is GONE."""
    chosen = scores.softmax(1)[:, 0]
    chosen = chosen * (target != GONE)
    return -torch.log(chosen).mean()


LINE = "return -torch.log(chosen).mean()"


def batches(*bad: int, count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Return batches of six rows; row 3 of the bad ones has the class that is gone."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number in range(count):
        target = torch.zeros(6)
        if number in bad:
            target[3] = GONE
        found.append((torch.randn(6, 4, generator=generator), target))
    return found


Loop = Callable[
    [gradwatch.Watcher, Model, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]], None
]


def by_run_batch(watcher, model, optimizer, given) -> None:
    """Train with ``run_batch()``."""
    for batch in given:
        watcher.run_batch(lambda part: loss_of(model(part[0]), part[1]), batch)
        watcher.step()


def by_run_batch_with_weights(watcher, model, optimizer, given) -> None:
    """Train with ``run_batch()``, whose closure returns a weight as well."""
    for number, (x, target) in enumerate(given):
        batch = {"x": x, "target": target}
        watcher.run_batch(lambda part: (loss_of(model(part["x"]), part["target"]), 2), batch)
        watcher.step(last=number == len(given) - 1)


def by_function(watcher, model, optimizer, given) -> None:
    """Train with ``backward()`` of a function."""
    for x, target in given:
        watcher.backward(lambda: loss_of(model(x), target), weight=len(x))
        watcher.step()


def by_parts(watcher, model, optimizer, given) -> None:
    """Train with ``backward()`` of a function of a part."""
    for batch in given:
        for x, target in watcher.micro_batches(batch, size=6):
            watcher.backward(lambda: loss_of(model(x), target))
        watcher.step()


def by_closure(watcher, model, optimizer, given) -> None:
    """Train with a closure for ``optimizer.step()``."""
    for x, target in given:

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model(x), target)
            loss.backward()
            return loss

        optimizer.step(closure)


def train(
    loop: Loop, mode: str, *, accumulate: int = 1, kind: str = "Adam", **options: Any
) -> tuple[gradwatch.Watcher, dict[str, Any]]:
    """Train a model, with its fourth batch bad; return the watcher, and the state at the end."""
    torch.manual_seed(0)
    model = Model()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    watcher = gradwatch.watch(model, optimizer, on_nonfinite=mode, accumulate=accumulate)
    with watcher:
        loop(watcher, model, optimizer, batches(3))
    return watcher, state_of(model, optimizer)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("loop", [by_run_batch, by_run_batch_with_weights, by_function, by_parts])
def test_a_managed_loop_is_run_again_whole(loop: Loop, accumulate: int) -> None:
    """The line in the loss is found, and the training is that which skips, bit by bit."""
    watcher, state = train(loop, "explain", accumulate=accumulate)
    _, skipped = train(loop, "skip", accumulate=accumulate)

    (found,) = watcher.explanations
    assert (found.step, found.micro_batch) == (3 // accumulate + 1, 3 % accumulate + 1)
    assert (found.origin, found.phase, found.operation) == ("operation", "forward", "log")
    assert (found.source, found.module, found.examples) == (LINE, None, (3,))
    assert found.notes == ()
    assert list(differences(pieces(skipped), pieces(state))) == []


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {}),
        ("Adam", {}),
        ("LBFGS", {"max_iter": 4}),
        ("LBFGS", {"max_iter": 4, "line_search_fn": "strong_wolfe"}),
    ],
)
def test_a_closure_is_run_again_whole(kind: str, options: dict[str, Any]) -> None:
    """A closure given to ``step()``, which resets gradients and runs its backward, is run again."""
    watcher, state = train(by_closure, "explain", kind=kind, **options)
    _, skipped = train(by_closure, "skip", kind=kind, **options)

    (found,) = watcher.explanations
    assert (found.step, found.operation, found.source) == (4, "log", LINE)
    assert found.examples == (3,)
    assert list(differences(pieces(skipped), pieces(state))) == []


def test_a_loss_that_was_given_is_explained_up_to_the_model() -> None:
    """Of a loss only the tensor is there: its gradient is blamed, and a note says what to write."""

    def by_loss(watcher, model, optimizer, given) -> None:
        def run(x, target) -> None:  # its variables are gone when the step is explained
            watcher.backward(loss_of(model(x), target))

        for x, target in given:
            run(x, target)
            watcher.step()

    watcher, _ = train(by_loss, "explain")
    (found,) = watcher.explanations
    assert found.origin == "output_gradient"
    assert "watcher.backward(lambda: criterion(model(x), y))" in found.notes[-1]


def test_the_variables_of_that_time_are_used() -> None:
    """A function of a script reads globals, which by the time of the step are the next batch's."""
    script = compile(
        "for x, target in batches(2):\n"
        "    watcher.backward(lambda: loss_of(model(x), target))\n"
        "    watcher.step()\n",
        "script.py",
        "exec",
    )
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    names = {"batches": batches, "loss_of": loss_of, "model": model}
    with gradwatch.watch(model, optimizer, on_nonfinite="explain", accumulate=2) as watcher:
        FunctionType(script, {**names, "watcher": watcher, "__name__": "script"})()
    (found,) = watcher.explanations
    assert (found.micro_batch, found.source, found.examples) == (1, LINE, (3,))


@pytest.mark.parametrize("loop", [by_run_batch, by_function, by_closure])
@pytest.mark.usefixtures("no_scaler_left")
def test_nothing_is_held_after_the_step(loop: Loop) -> None:
    """Closure and batch are free once their step is over, also a bad one."""
    held = []

    def noting(watcher, model, optimizer, given) -> None:
        while given:
            held.append(weakref.ref(given[0][0]))
            # Not in a variable: a frame that is looked at keeps what its variables were.
            loop(watcher, model, optimizer, [given.pop(0)])
        gc.collect()
        assert [one() is None for one in held] == [True] * len(held)

    train(noting, "explain")


def test_a_batch_that_was_changed_is_said_to_be() -> None:
    """The version counters tell that a batch is another one by the time of the step."""

    def changing(watcher, model, optimizer, given) -> None:
        for x, target in given:
            watcher.backward(lambda: loss_of(model(x), target))
            target.zero_()
            watcher.step()

    watcher, _ = train(changing, "explain")
    (found,) = watcher.explanations
    assert "changed in place" in found.notes[0]


def test_a_closure_that_draws_its_batch_is_not_run_again() -> None:
    """It would take the next batch from its iterator; the model's part is run again by itself."""

    def drawing(watcher, model, optimizer, given) -> None:
        stream = iter(given)

        def closure():
            optimizer.zero_grad()
            x, target = next(stream)
            loss = loss_of(model(x), target)
            loss.backward()
            return loss

        for _ in given:
            optimizer.step(closure)

    watcher, state = train(drawing, "explain")
    _, skipped = train(drawing, "skip")
    (found,) = watcher.explanations
    assert found.origin == "output_gradient"
    assert "iterator" in found.notes[0]
    assert list(differences(pieces(skipped), pieces(state))) == []


def test_what_a_closure_counts_is_counted_once() -> None:
    """Variables and lists that a closure writes to are afterwards what they were."""
    calls, kept = 0, []

    def counting(watcher, model, optimizer, given) -> None:
        nonlocal calls
        for x, target in given:

            def closure():
                nonlocal calls
                calls += 1
                optimizer.zero_grad()
                loss = loss_of(model(x), target)
                kept.append(loss.item())
                loss.backward()
                return loss

            optimizer.step(closure)

    watcher, _ = train(counting, "explain", kind="SGD")
    assert watcher.explanations[0].source == LINE
    assert (calls, len(kept)) == (6, 6)


def test_the_replay_starts_from_the_real_scale() -> None:
    """A micro-batch that outweighs its window overflows in float16, and does so again."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.full((2, 2), 100.0, dtype=torch.float16)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain", accumulate=2) as watcher:
        for weight in (1, 4_000):
            watcher.run_batch(lambda part, weight=weight: (model(part).mean(), weight), x)
            watcher.step()
    (found,) = watcher.explanations
    assert (found.kind, found.phase, found.micro_batch) == ("inf", "backward", 2)
    assert found.operation in ("mm", "linear")


# -- backward(function) ----------------------------------------------------------------------------


def test_a_function_gives_the_same_gradients_as_its_loss() -> None:
    """It is called at once, and what it returns is the loss."""
    found = []
    for as_function in (False, True):
        torch.manual_seed(1)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
            for x, target in batches():

                def make(x=x, target=target) -> Tensor:
                    return loss_of(model(x), target)

                watcher.backward(make if as_function else make(), weight=3)
                watcher.step()
        found.append((state_of(model, optimizer), watcher.history.steps().loss.tolist()))
    assert list(differences(pieces(found[0]), pieces(found[1]))) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3.0, "got 3.0"),
        (lambda: None, "a function that returned None"),
        (lambda: torch.zeros(2), r"a function that returned a tensor of shape \[2\]"),
    ],
)
def test_backward_refuses_what_is_no_loss(given: Any, told: str) -> None:
    """The error says what came, and what to write."""
    model = nn.Linear(2, 1)
    watching = gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    told = f"{told}.*Write watcher.backward"
    with watching as watcher, pytest.raises(TypeError, match=told):
        watcher.backward(given)


# -- explain(closure) ------------------------------------------------------------------------------


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return all that must not change."""
    return pieces(state_of(model, optimizer))


@pytest.mark.parametrize("mode", ["record", "explain"])
@pytest.mark.parametrize("moment", ["forward", "backward", "step", "before", "after"])
def test_explain_works_at_any_time_and_changes_nothing(mode: str, moment: str) -> None:
    """Before and after the backward, after the step, and outside of the with block."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ((x, target),) = batches(0, count=1)
    found = []

    def closure() -> Tensor:
        return loss_of(model(x), target)

    def explain(now: str) -> None:
        if now == moment:
            before = whole(model, optimizer)
            found.append(watcher.explain(closure))
            assert list(differences(before, whole(model, optimizer))) == []

    watcher = gradwatch.watch(model, optimizer, on_nonfinite=mode)
    explain("before")
    with watcher:
        for good in batches(count=2):
            loss_of(model(good[0]), good[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        loss = closure()
        explain("forward")
        if mode == "explain":
            loss.backward()
            explain("backward")
            optimizer.step()
            explain("step")
        else:
            found.extend([watcher.explain(closure)] if moment in ("backward", "step") else [])
    explain("after")

    (one,) = found
    assert (one.operation, one.source, one.examples) == ("log", LINE, (3,))
    # Without explain=True a forward is not seen.
    forward = 3 if mode == "explain" else 2
    wanted = {"before": 1, "forward": forward, "backward": 3 if mode == "explain" else 2}
    assert one.step == wanted.get(moment, 3 if mode == "explain" else 2)
    assert one in watcher.explanations


def test_explain_takes_a_closure_that_runs_the_backward() -> None:
    """Gradients that it resets and makes are those of the replay, not of the training."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ((x, target),) = batches(0, count=1)

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model(x), target).backward()

    with gradwatch.watch(model, optimizer) as watcher:
        model(x).sum().backward()
        before = whole(model, optimizer)
        assert watcher.explain(closure).source == LINE
        assert list(differences(before, whole(model, optimizer))) == []


def test_explain_works_for_a_mapping_of_tensors() -> None:
    """Without a module the operation has no module, and its line all the same."""
    x = torch.zeros(3, requires_grad=True)
    watcher = gradwatch.watch({"x": x})
    found = watcher.explain(lambda: x.sqrt().sum())
    assert (found.operation, found.phase, found.kind) == ("sqrt", "backward", "inf")
    assert x.grad is None


def test_explain_inside_of_a_step() -> None:
    """A closure of an optimizer may ask as well."""
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    ((x, target),) = batches(0, count=1)
    found = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x), target)
        if not loss.isfinite():
            found.append(watcher.explain(lambda: loss_of(model(x), target)))
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        optimizer.step(closure)
    assert [one.source for one in found] == [LINE]
    assert watcher.last.outcome == "skipped_nonfinite"


@pytest.mark.parametrize(
    ("closure", "told"),
    [
        (None, "got None"),
        (torch.zeros(()), r"got a tensor|got Tensor|got tensor"),
        (lambda: None, "one that returned None"),
        (lambda: 1.0, "one that returned 1.0"),
        (lambda: torch.zeros(3, requires_grad=True) * 2, r"a tensor of shape \[3\]"),
        (lambda: torch.zeros(()), "a tensor of shape .* that requires no gradient"),
    ],
)
def test_explain_refuses_what_is_no_loss(closure: Any, told: str) -> None:
    """The error says what came, and what to write instead."""
    with pytest.raises(TypeError, match=f"({told}).*Write watcher.explain"):
        gradwatch.watch(nn.Linear(2, 1)).explain(closure)


def test_an_error_in_the_closure_is_a_note() -> None:
    """The training goes on: the explanation says what happened."""

    def closure() -> Tensor:
        raise ValueError("no such file")

    found = gradwatch.watch(nn.Linear(2, 1)).explain(closure)
    assert found.origin == "not_found"
    assert "no such file" in found.notes[0]


def test_finite_gradients_are_said_to_be() -> None:
    """Where nothing is bad, nothing is found."""
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    found = gradwatch.watch(model).explain(lambda: model(x).sum())
    assert found.origin == "not_found"
    assert found.notes == ("All gradients are finite, and so is the loss.",)
    assert str(found).startswith("Nothing bad was found.\n")
    assert found.advice == ""


def test_explain_is_recorded(tmp_path) -> None:
    """In memory, as an event for sinks, and in the run folder."""
    pytest.importorskip("pyarrow")
    model, sink = nn.Linear(2, 1), CapturingSink()
    x = torch.zeros(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[sink], run_dir=tmp_path) as watcher:
        model(x).sum().backward()
        optimizer.step()
        watcher.explain(lambda: model(x).div(x.norm()).sum() * 1.0)
    assert [event.kind for event in watcher.events] == ["explained"]
    assert [event.kind for event in sink.events] == ["explained"]
    (read,) = gradwatch.load(tmp_path).explanations().itertuples()
    assert (read.step, read.operation, read.optimizer) == (1, "div", "SGD")
    assert watcher.events[0].step == 1


def test_explain_is_of_the_step_that_has_ended_last() -> None:
    """Between two steps it is the step before: of the optimizer that took it."""
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    optimizers = {name: torch.optim.SGD(one.parameters(), lr=0.1) for name, one in model.items()}
    with gradwatch.watch(model, optimizers) as watcher:
        found = []
        for name in ("a", "a", "b"):
            found.append(watcher.explain(lambda: model["a"](torch.zeros(2)).sum().sqrt()))
            model[name](torch.ones(2)).sum().backward()
            found.append(watcher.explain(lambda: model["a"](torch.zeros(2)).sum().sqrt()))
            optimizers[name].step()
            optimizers[name].zero_grad()
    places = [(one.optimizer, one.step) for one in found]
    assert places == [("a", 1), ("a", 1), ("a", 1), ("a", 2), ("a", 2), ("b", 1)]


def test_explain_without_an_optimizer() -> None:
    """Each backward then counts as a step."""
    model = nn.Linear(2, 1)
    with gradwatch.watch(model) as watcher:
        assert watcher.explain(lambda: model(torch.ones(2)).sum()).step == 1
        model(torch.ones(2)).sum().backward()
        assert watcher.explain(lambda: model(torch.ones(2)).sum()).step == 1


def test_a_copy_explains_nothing() -> None:
    """It watches no model."""
    copied = copy.deepcopy(gradwatch.watch(nn.Linear(2, 1)))
    with pytest.raises(RuntimeError, match="copy"):
        copied.explain(lambda: None)


def rows(values: Tensor) -> Iterator[Tensor]:
    """Yield rows."""
    yield from values


def test_explain_refuses_a_closure_that_draws() -> None:
    """A generator would be moved on."""
    model = nn.Linear(2, 1)
    stream = rows(torch.zeros(3, 2))
    found = gradwatch.watch(model).explain(lambda: model(next(stream)).log().sum())
    assert found.origin == "not_found"
    assert "iterator" in found.notes[0]
    assert len(list(stream)) == 3


# -- note_micro_batch(), for adapters --------------------------------------------------------------


def by_framework(mode: str, note: Callable[..., Any], accumulate: int = 2) -> gradwatch.Watcher:
    """Train as a framework does, that tells an adapter before each of its micro-batches."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watcher = gradwatch.watch(model, optimizer, on_nonfinite=mode)
    watcher.leave_windows(accumulates=accumulate > 1)

    def replay(x: Tensor, target: Tensor) -> Tensor:
        return loss_of(model(x), target)

    with watcher:
        for number, (x, target) in enumerate(batches(3), start=1):
            note(watcher, replay, x, target)
            (replay(x, target) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return watcher


def test_a_framework_says_how_to_run_its_micro_batch_again() -> None:
    """The line in the loss is found, in the micro-batch that went bad."""
    watcher = by_framework(
        "explain",
        lambda watcher, replay, *batch: watcher.note_micro_batch(replay, *batch, divisor=2),
    )
    (found,) = watcher.explanations
    assert (found.step, found.micro_batch, found.source) == (2, 2, LINE)
    assert found.examples == (3,)


def test_a_framework_may_say_that_it_cannot() -> None:
    """Without a function the model is run again; with a reason nothing is, and it is told."""
    watcher = by_framework("explain", lambda watcher, *_: watcher.note_micro_batch(None))
    assert watcher.explanations[0].origin == "output_gradient"
    watcher = by_framework(
        "explain", lambda watcher, *_: watcher.note_micro_batch(None, reason="It is far away.")
    )
    (found,) = watcher.explanations
    assert (found.origin, found.notes) == ("not_found", ("It is far away.",))


@pytest.mark.usefixtures("no_scaler_left")
def test_nothing_is_noted_where_nobody_asks() -> None:
    """Without explain, before and after, a note does nothing and holds nothing."""
    held = []

    def note(watcher: gradwatch.Watcher, replay: Any, *batch: Any) -> None:
        batch = (batch[0].clone(), batch[1])
        watcher.note_micro_batch(replay, *batch)
        held.append(weakref.ref(batch[0]))

    watcher = by_framework("skip", note)
    note(watcher, None, torch.zeros(2), None)
    assert not any(one() is not None for one in held)
    assert watcher.explanations == []


# -- batches that do not fit, and loops that cannot be run again -----------------------------------


def test_a_batch_that_was_halved_is_explained_by_its_part() -> None:
    """Of a batch that ran in parts, because memory ran out, the part that is bad is run again."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def closure(part: tuple[Tensor, Tensor]) -> Tensor:
        if len(part[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_of(model(part[0]), part[1])

    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        for batch in batches(1, count=2):
            watcher.run_batch(closure, batch)
            watcher.step()
    (found,) = watcher.explanations
    assert (found.step, found.micro_batch, found.source) == (2, 2, LINE)
    assert found.examples == (0,)  # row 3 of six, in the second part of three


def test_a_closure_that_steps_an_optimizer_is_explained_up_to_the_model() -> None:
    """A replay moves no weight: what would is refused, and the model's part is run again."""
    model, other = Model(), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inner = torch.optim.SGD(other.parameters(), lr=0.01)
    before = pieces(other.state_dict())

    def closure(part: tuple[Tensor, Tensor]) -> Tensor:
        inner.step()
        return loss_of(model(part[0]), part[1])

    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        watcher.run_batch(closure, batches(0, count=1)[0])
        watcher.step()
    (found,) = watcher.explanations
    assert found.origin == "output_gradient"
    assert "steps an optimizer" in found.notes[0]
    assert list(differences(before, pieces(other.state_dict()))) == []


def test_batches_are_kept_with_their_targets(tmp_path) -> None:
    """With keep_batches=True the run folder has all that the closure was given."""
    pytest.importorskip("pyarrow")
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"on_nonfinite": "explain", "run_dir": tmp_path, "keep_batches": True}
    ((x, target),) = batches(0, count=1)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        watcher.run_batch(lambda part: loss_of(model(part[0]), part[1]), (x, target))
        watcher.step()
    (file,) = tmp_path.glob("nonfinite/*/batch.pt")
    kept = torch.load(file, weights_only=True)
    leaves = torch.utils._pytree.tree_leaves(kept)
    tensors = [one for one in leaves if isinstance(one, Tensor)]
    for wanted in (x, target):
        assert any(one.shape == wanted.shape and torch.equal(one, wanted) for one in tensors)


def test_the_batch_of_an_adapter_comes_before_what_its_function_leads_to() -> None:
    """A function that has the whole data set at hand names the example of its batch all the same."""
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleNamespace(data=[{"x": torch.randn(7), "y": torch.randn(7)} for _ in range(40)])
    batch = {"x": torch.randn(8, 3), "y": torch.randn(8, 1)}
    batch["x"][2, 1] = math.nan

    def loss(inputs: Any) -> torch.Tensor:
        assert trainer.data
        return (model(inputs["x"]) - inputs["y"]).square().mean()

    watcher = gradwatch.watch(model, optimizer, on_nonfinite="explain")
    watcher.leave_windows(accumulates=False)
    with watcher:
        watcher.note_micro_batch(loss, batch)
        loss(batch).backward()
        optimizer.step()
    (explanation,) = watcher.explanations
    assert explanation.examples == (2,)
