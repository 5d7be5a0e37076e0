"""watch(on_nonfinite="explain") and explain=True: which micro-batch, when, and at no price for the training."""

import copy
import gc
import inspect
import logging
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.testing import late_readings
from tests.support import zoo
from tests.support.calls import CountCalls
from tests.support.state import identical, state_of

BAD = math.nan


class Model(nn.Module):
    """A perceptron that takes a logarithm: of 0 where a row of its input is all below 0."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return two numbers for each row."""
        hidden = torch.nn.functional.dropout(self.norm(self.first(x)), 0.2)
        room = x.clamp(min=0.0).sum(1, keepdim=True)
        return self.last(hidden * scale) + room.log().clamp(min=-5.0) * 0.1 + room.log() * 1e-3


LOG = inspect.getsourcelines(Model.forward)[1] + 4


def good(seed: int = 0) -> Tensor:
    """Return a batch of three rows that is harmless."""
    return torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) + 0.1


def bad(row: int = 1) -> Tensor:
    """Return a batch with a row that the logarithm is infinite for."""
    batch = good()
    batch[row] = -1.0
    return batch


def setting(kind: str = "SGD", **options: Any) -> tuple[Model, torch.optim.Optimizer]:
    """Return a model and its optimizer."""
    torch.manual_seed(0)
    model = Model()
    return model, getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[list[Tensor]]) -> None:
    """Take a step with each of the windows."""
    for window in batches:
        for batch in window:
            model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_micro_batch_that_was_bad_is_replayed_to_its_line() -> None:
    """Of three micro-batches the second one; step, optimizer, line, operation and example are named."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        train(model, optimizer, [[good()] * 3, [good(1), bad(2), good(2)], [good()] * 3])
    (one,) = watcher.explanations
    assert (one.step, one.optimizer, one.micro_batch) == (2, "SGD", 2)
    assert (one.origin, one.operation, one.phase, one.module) == ("operation", "log", "forward", "")
    assert (one.file, one.line) == (inspect.getsourcefile(Model), LOG)
    assert one.examples == (2,)
    assert watcher.history.steps()["outcome"].tolist() == [
        "applied",
        "skipped_nonfinite",
        "applied",
    ]


def poisoned(case: zoo.Case, batch: zoo.Batch, index: int) -> Tensor:
    """Return the loss of a batch; that of the third is NaN, from the input on where it is a number."""
    if index == 2 and batch[0].is_floating_point():
        return case.loss(case.model, (torch.full_like(batch[0], BAD), *batch[1:]))
    return case.loss(case.model, batch) * (BAD if index == 2 else 1.0)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_training_is_that_of_a_plain_skip(name: str) -> None:
    """Weights, optimizer state, buffers, gradients and random states are equal to the bit, with dropout."""

    def trained(**options: Any) -> tuple[Any, gradwatch.Watcher]:
        torch.manual_seed(0)
        case = zoo.make_case(name, dropout=0.2)
        make = torch.optim.SGD if "sparse" in name else torch.optim.AdamW
        optimizer = make(case.model.parameters(), lr=0.01)
        with gradwatch.watch(case.model, optimizer, **options) as watcher:
            for index in range(5):
                optimizer.zero_grad()
                poisoned(case, case.batch(index), index).backward()
                optimizer.step()
            torch.rand(3)
        return state_of(case.model, optimizer), watcher

    skipped, _ = trained(on_nonfinite="skip")
    explained, watcher = trained(on_nonfinite="explain")
    assert identical(skipped, explained)
    assert [one.step for one in watcher.explanations] == [3]
    recorded, _ = trained()
    assert identical(recorded, trained(explain=True)[0])


def test_an_error_tells_its_explanation() -> None:
    """on_nonfinite="raise" with explain=True: the error has it, and its text says it."""
    model, optimizer = setting()
    watcher = gradwatch.watch(model, optimizer, on_nonfinite="raise", explain=True)
    with watcher, pytest.raises(gradwatch.NonFiniteGradientError) as caught:
        train(model, optimizer, [[good()], [bad()]])
    explanation = caught.value.explanation
    assert explanation is watcher.explanations[-1]
    assert explanation.operation == "log"
    assert str(explanation) in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.explanation == explanation
    assert again.step == 2


def test_an_error_without_it_has_none() -> None:
    """Its attribute is None where nobody has asked."""
    model, optimizer = setting()
    watcher = gradwatch.watch(model, optimizer, on_nonfinite="raise")
    with watcher, pytest.raises(gradwatch.NonFiniteGradientError) as caught:
        train(model, optimizer, [[bad()]])
    assert caught.value.explanation is None
    assert watcher.explanations == []


def test_an_error_after_too_many_skips_tells_the_newest_explanation() -> None:
    """It is that of the run's newest bad step that was explained."""
    model, optimizer = setting()
    watcher = gradwatch.watch(model, optimizer, on_nonfinite="explain", max_consecutive_skips=2)
    with watcher, pytest.raises(gradwatch.NonFiniteGradientError) as caught:
        train(model, optimizer, [[bad()]] * 4)
    assert caught.value.explanation == watcher.explanations[-1]
    assert caught.value.explanation.step == 3


def test_recorded_steps_are_explained_and_so_are_the_weights_that_they_spoil() -> None:
    """The step after an applied NaN says: the weights, since then, without another replay."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, explain=True) as watcher:
        train(model, optimizer, [[good()], [bad()], [good()], [good(1)]])
    first, second, third = watcher.explanations
    assert (first.step, first.operation) == (2, "log")
    assert (second.step, second.origin, second.since_step) == (3, "weights", 3)
    assert (third.step, third.origin, third.since_step) == (4, "weights", 3)
    names = dict(model.named_parameters())
    assert second.kind == "nan"
    assert second.count == int(names[second.parameter].isnan().sum()) > 0
    assert second.result_shape == tuple(names[second.parameter].shape)
    assert 'on_nonfinite="skip"' in second.advice


@pytest.mark.parametrize("options", [{"on_nonfinite": "explain"}, {"explain": True}])
def test_weights_that_the_optimizer_has_spoiled(options: dict[str, Any]) -> None:
    """In float16 the eps of AdamW is 0: finite gradients make a NaN, which no skip prevents."""
    model = nn.Linear(4, 2).half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = torch.zeros(3, 4, dtype=torch.float16)  # the weight's gradient is 0
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for _ in range(3):
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = watcher.explanations
        norms = watcher.history.steps()["grad_norm"]
    assert math.isfinite(norms.iloc[0])
    assert [one.step for one in found] == [2, 3]
    for one in found:
        assert (one.origin, one.parameter, one.result_dtype) == ("weights", "weight", "float16")
        assert "the optimizer's own update made it" in one.advice
        assert "eps of 1e-8 is 0" in one.advice
        assert "on_nonfinite" not in one.advice


def test_many_bad_steps_are_explained_seldom() -> None:
    """The first four, then the 8th, 16th, ...; another culprit is explained at once."""
    model, optimizer = setting()
    watcher = gradwatch.watch(
        model, optimizer, on_nonfinite="explain", max_consecutive_skips=1_000
    ).attach()
    train(model, optimizer, [[bad()]] * 40)
    assert [one.step for one in watcher.explanations] == [1, 2, 3, 4, 8, 16, 32]
    model.last.bias.grad = torch.full((2,), BAD)  # another one: set by hand, in no backward
    optimizer.step()
    watcher.close()
    assert watcher.explanations[-1].step == 41
    assert watcher.explanations[-1].origin == "not_found"


def test_a_hundred_are_kept() -> None:
    """The list is bounded, newest last."""
    leaves = {f"p{i}": torch.ones(1, requires_grad=True) for i in range(31)}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.0)
    options = {"on_nonfinite": "explain", "max_consecutive_skips": 10_000}
    with gradwatch.watch(leaves, optimizer, **options) as watcher:
        for _ in range(4):
            for one in leaves.values():
                (one * BAD).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert len(watcher.explanations) == 100
    assert watcher.explanations[-1].step == 124


# -- what is held, and for how long --------------------------------------------------------------


def micro_batch(model: nn.Module, is_bad: bool = False) -> tuple[weakref.ref, torch.Tensor]:
    """Runs one; in a frame of its own, as a frame that is looked at keeps its variables."""
    batch = bad() if is_bad else good()
    output = model(batch)
    output.square().mean().backward()
    return weakref.ref(batch), output


@pytest.mark.usefixtures("no_scaler_left")
def test_inputs_die_after_the_step() -> None:
    """Of each micro-batch the input is held until the step, and the output never."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
        for step in range(3):
            held, outputs = [], []
            for _ in range(3):
                batch, output = micro_batch(model, step == 1)
                held.append(batch)
                outputs.append(weakref.ref(output))
                del output
            assert all(one() is not None for one in held)
            assert all(one() is None for one in outputs)
            optimizer.step()
            assert all(one() is None for one in held)
            optimizer.zero_grad()


@pytest.mark.usefixtures("no_scaler_left")
def test_inputs_die_after_the_step_though_the_loop_still_has_the_output() -> None:
    """A loop keeps its variables until it sets them anew; the graph keeps no input of the model."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
        held, output = micro_batch(model)
        optimizer.step()
        assert held() is None
        assert output.grad_fn is not None


@pytest.mark.parametrize("how", ["no_grad", "no backward", "raises"])
@pytest.mark.usefixtures("no_scaler_left")
def test_what_has_no_backward_is_not_held(how: str) -> None:
    """A validation, with and without no_grad(), and a forward that raises."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
        batch = good()
        held = weakref.ref(batch)
        if how == "no_grad":
            with torch.no_grad():
                model(batch)
        elif how == "raises":
            with pytest.raises(TypeError):
                model(batch, scale="large")
        else:
            model(batch)
        del batch
        assert held() is None
        train(model, optimizer, [[good()]])


@pytest.mark.usefixtures("no_scaler_left")
def test_what_is_thrown_away_is_dropped_with_the_next_backward() -> None:
    """Nothing tells before that the loop has thrown the gradients away."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
        held = []
        for _ in range(5):
            batch = good()
            held.append(weakref.ref(batch))
            model(batch).sum().backward()
            del batch
            assert sum(one() is not None for one in held) <= 2
            optimizer.zero_grad()


@pytest.mark.usefixtures("no_scaler_left")
def test_a_loop_that_never_steps_holds_a_bounded_number() -> None:
    """Gradients that are never used and never reset keep the newest micro-batches only."""
    model = nn.Linear(2, 1)
    held = []
    with gradwatch.watch(model, explain=True):
        for _ in range(300):
            batch = torch.ones(1, 2)
            held.append(weakref.ref(batch))
            model(batch).sum().backward()
            del batch
        assert sum(one() is not None for one in held) <= 256


@pytest.mark.usefixtures("no_scaler_left")
def test_nothing_is_held_after_the_end() -> None:
    """Closing the watcher in the middle of a window frees it, and takes every hook from the model."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
        batch = good()
        held = weakref.ref(batch)
        output = model(batch)
        output.sum().backward()
        del batch
        assert held() is not None
    assert held() is None
    assert output.grad_fn is not None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.usefixtures("no_scaler_left")
def test_a_copy_of_a_watched_model_keeps_nothing() -> None:
    """Its hooks do nothing, and a pickled one needs no gradwatch."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            batch = good()
            held = weakref.ref(batch)
            output = other(batch)
            output.sum().backward()
            del batch, output
            assert held() is None
        assert b"gradwatch" not in pickle.dumps(nn.Sequential(model)).replace(
            b"test_explaining", b""
        )


# -- kinds of loops ------------------------------------------------------------------------------


def test_several_forwards_before_one_backward_belong_together() -> None:
    """A siamese loss: the bad one of two forwards is found."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        (model(good()) - model(bad())).square().mean().backward()
        optimizer.step()
    (one,) = watcher.explanations
    assert (one.operation, one.examples) == ("log", (1,))


def test_each_optimizer_of_a_gan_is_explained_by_its_own_forwards() -> None:
    """A bad generator step is explained with its label; its line is that in the generator."""
    torch.manual_seed(0)
    generator, judge = Model(), nn.Linear(2, 1)
    of_generator = torch.optim.SGD(generator.parameters(), lr=0.01)
    of_judge = torch.optim.SGD(judge.parameters(), lr=0.01)
    optimizers = {"generator": of_generator, "judge": of_judge}
    both = nn.ModuleDict({"generator": generator, "judge": judge})
    with gradwatch.watch(both, optimizers, on_nonfinite="explain") as watcher:
        for noise in (good(), bad()):
            of_judge.zero_grad()
            judge(torch.ones(3, 2)).mean().backward()
            judge(generator(good()).detach()).mean().neg().backward()
            of_judge.step()
            of_generator.zero_grad()
            judge(generator(noise)).square().mean().backward()
            of_generator.step()
    (one,) = watcher.explanations
    assert (one.optimizer, one.step, one.module) == ("generator", 2, "generator")
    assert (one.operation, one.line) == ("log", LOG)


def test_a_model_that_is_called_by_its_parts_is_kept_from_the_second_window_on() -> None:
    """The loop calls an encoder and a head; the first bad step says why it is not explained."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": Model()})
    holder = nn.Module()
    holder.parts = model
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.01)
    with gradwatch.watch(holder, optimizer, on_nonfinite="explain") as watcher:
        train(model["encoder"], optimizer, [[bad()], [bad()]])
    first, second = watcher.explanations
    assert first.origin == "not_found"
    assert "Nothing was kept" in first.notes[0]
    assert (second.operation, second.module) == ("log", "parts.encoder")


def test_lbfgs_is_explained_at_the_evaluation_that_went_bad() -> None:
    """Only the third evaluation of the closure is bad."""
    model, _ = setting()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=5)
    batches = [good(), good(), bad(0), *[good()] * 20]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batches.pop(0)).square().mean()
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        optimizer.step(closure)
    (one,) = watcher.explanations
    assert (one.step, one.operation, one.examples) == (1, "log", (0,))


def test_an_overflow_that_a_scaler_handles_is_not_explained() -> None:
    """A scale that is too large at first is no accident."""
    model, optimizer = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with gradwatch.watch(model, optimizer, scaler=scaler, on_nonfinite="explain") as watcher:
        for _ in range(4):
            scaler.scale(model(good() * 1e3).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert "skipped_scaler" in set(watcher.history.steps()["outcome"])
    assert watcher.explanations == []


def test_a_fused_optimizer_that_a_scaler_stops_is_not_explained() -> None:
    """The same where the optimizer itself is told to skip the step."""
    model, _ = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with gradwatch.watch(model, optimizer, scaler=scaler, explain=True) as watcher:
        scaler.scale(model(good() * 1e3).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert watcher.last.outcome == "skipped_scaler"
    assert watcher.explanations == []


def test_a_loop_without_an_optimizer_is_explained_once_its_steps_are_certain() -> None:
    """Each backward is a step there."""
    model = Model()
    with gradwatch.watch(model, explain=True) as watcher:
        for index in range(30):
            model.zero_grad()
            model(bad() if index == 25 else good()).square().mean().backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.sub_(weight.grad.nan_to_num(0.0, 0.0, 0.0), alpha=1e-3)
    (one,) = watcher.explanations
    assert (one.step, one.optimizer, one.operation) == (26, "none", "log")


def test_the_managed_loop_is_explained() -> None:
    """watcher.backward() and watcher.step(): the micro-batch in its window."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, accumulate=3, on_nonfinite="explain") as watcher:
        for batch in (good(), good(), bad()):
            watcher.backward(model(batch).square().mean())
            watcher.step()
    (one,) = watcher.explanations
    assert (one.step, one.micro_batch, one.operation) == (1, 3, "log")


def test_gradients_that_the_loop_has_written_are_said_to_be_so() -> None:
    """No replay can find what came after the backward."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(good()).square().mean().backward()
        model.last.bias.grad.div_(0.0)
        optimizer.step()
    (one,) = watcher.explanations
    assert one.origin == "not_found"
    assert "made after the last backward" in one.notes[0]


def test_gradients_left_from_the_step_before_are_said_to_be_so() -> None:
    """The NaN of a skipped step that nobody has zeroed."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(bad()).square().mean().backward()
        optimizer.step()
        model(good()).square().mean().backward()
        optimizer.step()
    first, second = watcher.explanations
    assert first.operation == "log"
    assert second.origin == "not_found"
    assert "left in it since an earlier step" in second.notes[0]


def test_a_mapping_cannot_be_replayed() -> None:
    """It says that no module was given."""
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer, on_nonfinite="explain") as watcher:
        (x * BAD).sum().backward()
        optimizer.step()
    (one,) = watcher.explanations
    assert (one.origin, one.kind) == ("not_found", "nan")
    assert "no module" in one.notes[0]


def test_a_batch_whose_containers_were_changed_is_not_replayed() -> None:
    """Another tensor in the dict that the forward was given: its replay would be of other data."""

    class OfDict(Model):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    model = OfDict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        for changes in (True, False):
            batch = {"x": bad()}
            model(batch).square().mean().backward()
            if changes:
                batch["x"] = good()
            optimizer.step()
            optimizer.zero_grad()
    first, second = watcher.explanations
    assert first.origin == "not_found"
    assert "put other tensors" in first.notes[0]
    assert second.operation == "log"


def test_compiled_in_place_nothing_is_kept() -> None:
    """module.compile(): no hook runs outside of its code, and the explanation says so."""
    model, optimizer = setting()
    model.compile(backend="eager")
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        train(model, optimizer, [[bad()]])
    (one,) = watcher.explanations
    assert one.origin == "not_found"
    assert "module.compile()" in one.notes[0]


def test_a_compiled_model_is_compiled_once_and_explained() -> None:
    """torch.compile(model): neither a graph break nor a second compilation."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    class Straight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.log())

    plain = Straight()
    model = torch.compile(plain, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
            train(model, optimizer, [[good()], [good()], [good().mul_(0.0)], [good()]])
    finally:
        torch._dynamo.reset()
    assert len(compilations) == 1
    (one,) = watcher.explanations
    assert (one.step, one.operation) == (3, "log")


def test_the_curvature_runs_forwards_that_are_not_kept() -> None:
    """Its backwards are none of the loop; a bad step after it is explained as before."""
    model, optimizer = setting()
    curvature = gradwatch.CurvatureEvery(1, lambda: model(good()).square().mean(), iterations=2)
    options = {"on_nonfinite": "explain", "curvature": curvature}
    with gradwatch.watch(model, optimizer, **options) as watcher:
        train(model, optimizer, [[good()], [bad()]])
    (one,) = watcher.explanations
    assert (one.step, one.operation) == (2, "log")


# -- what else is promised -----------------------------------------------------------------------


def test_a_failing_replay_ends_as_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, and the explanation says what failed."""
    model, optimizer = setting()

    def forward(x: Tensor) -> Tensor:
        if any("replay" in frame.filename for frame in inspect.stack(0)):
            raise RuntimeError("not twice")
        return Model.forward(model, x)

    monkeypatch.setattr(model, "forward", forward)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        train(model, optimizer, [[bad()], [good()]])
    (one,) = watcher.explanations
    assert one.origin == "not_found"
    assert "not twice" in " ".join(one.notes)
    assert watcher.history.steps()["outcome"].tolist() == ["skipped_nonfinite", "applied"]


def test_the_log_tells_each_explanation_once(caplog: pytest.LogCaptureFixture) -> None:
    """A warning in the log of gradwatch with its paragraph."""
    model, optimizer = setting()
    watched = gradwatch.watch(model, optimizer, on_nonfinite="explain")
    with caplog.at_level(logging.WARNING, "gradwatch"), watched as watcher:
        train(model, optimizer, [[bad()], [good()]])
    text = str(watcher.explanations[0])
    assert [one.getMessage() for one in caplog.records].count(text) == 1


def test_explanations_outlive_the_watcher_and_its_copies() -> None:
    """They can be read after closing, from a pickled and from a deep-copied watcher."""
    model, optimizer = setting()
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        train(model, optimizer, [[bad()]])
        copied = copy.deepcopy(watcher)
    again = pickle.loads(pickle.dumps(watcher))
    assert watcher.explanations == copied.explanations == again.explanations != []


def test_the_host_waits_once_per_step() -> None:
    """On an accelerator the host must know at the step whether it is bad; without explain it does not."""

    def waits(**options: Any) -> int:
        model, optimizer = setting()
        with late_readings(), gradwatch.watch(model, optimizer, **options) as watcher:
            train(model, optimizer, [[good()]] * 40)
            watcher.flush()
            with CountCalls() as counter:
                train(model, optimizer, [[good()]] * 4)
        return counter.waits

    assert waits(explain=True) - waits() <= 4


def test_late_numbers_are_explained_alike() -> None:
    """An explanation where numbers arrive late names the same line."""
    found = []
    for late in (False, True):
        model, optimizer = setting()
        options = {"on_nonfinite": "explain"}
        if late:
            with late_readings(), gradwatch.watch(model, optimizer, **options) as watcher:
                train(model, optimizer, [[good()], [good(), bad()], [good()]])
        else:
            with gradwatch.watch(model, optimizer, **options) as watcher:
                train(model, optimizer, [[good()], [good(), bad()], [good()]])
        found.append(watcher.explanations)
    assert found[0] == found[1] != []


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"explain": "yes"}, TypeError, "explain=) must be True or False"),
        ({"keep_batches": 1}, TypeError, "keep_batches=) must be True or False"),
        ({"keep_batches": True}, ValueError, "nothing is"),
        ({"keep_batches": True, "explain": True}, ValueError, "run_dir="),
        ({"on_nonfinite": "explained"}, ValueError, "explain"),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Wrong types, and keep_batches without something to keep or somewhere to keep it."""
    model, optimizer = setting()
    with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")):
        gradwatch.watch(model, optimizer, **options)


@pytest.mark.usefixtures("no_scaler_left")
def test_nothing_is_left_for_the_collector() -> None:
    """What is kept is in no cycle: without a collection it goes at the step, double backward or not."""
    model, optimizer = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    gc.disable()
    try:
        with gradwatch.watch(model, optimizer, on_nonfinite="explain"):
            batch = good().requires_grad_()
            held = weakref.ref(batch)
            output = model(batch)
            (slope,) = torch.autograd.grad(output.square().sum(), batch, create_graph=True)
            (slope.square().sum() + output.sum()).backward()
            del batch, slope, output
            optimizer.step()
            optimizer.zero_grad()
            assert held() is None
    finally:
        gc.enable()


class Normalized(nn.Module):
    """A logarithm, and running statistics that its infinity spoils in the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a number for each row."""
        return self.last(self.norm(x.log()))


@pytest.mark.parametrize("options", [{"on_nonfinite": "explain"}, {"explain": True}], ids=str)
def test_running_statistics_that_the_batch_has_spoiled_are_not_to_blame(
    options: dict[str, Any],
) -> None:
    """The forward writes NaN there before anybody replays it."""
    torch.manual_seed(0)
    model = Normalized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        train(model, optimizer, [[good()], [bad().clamp_(min=0.0)]])
    (one,) = watcher.explanations
    assert (one.operation, one.examples, one.module) == ("log", (1,), "")


class Codebook(nn.Module):
    """Follows the mean of its input in a buffer that every forward reads first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(4))
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a number for each row."""
        logs = x.log()
        result = self.last(logs - self.center)
        with torch.no_grad():
            self.center.lerp_(logs.mean(0), 0.1)
        return result


def test_a_buffer_that_the_batch_has_spoiled_is_not_to_blame() -> None:
    """Where steps are skipped, its value from before the window is known."""
    torch.manual_seed(0)
    model = Codebook()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        train(model, optimizer, [[good()], [bad().clamp_(min=0.0)], [good()]])
    (one,) = watcher.explanations
    assert (one.operation, one.examples) == ("log", (1,))
    assert model.center.isfinite().all()


class Directions(nn.Module):
    """Divides by the norm of each example, which may be 0."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.inner(x) / x.norm(dim=1, keepdim=True)).mean()


@pytest.mark.parametrize("zeroes", ["before the forward", "before the backward"])
def test_a_loop_that_leaves_out_the_step_itself(zeroes):
    """Its bad micro-batch is explained before the next step, and the training is what it would be."""

    def train(mode):
        torch.manual_seed(0)
        model = Directions()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer, on_nonfinite=mode) as watcher:
            for step in range(8):
                x = torch.randn(3, 4)
                if step in (3, 4):
                    x[1] = 0
                if zeroes == "before the forward":
                    optimizer.zero_grad()
                loss = model(x)
                if zeroes == "before the backward":
                    optimizer.zero_grad()
                loss.backward()
                if loss.isfinite():
                    optimizer.step()
        return watcher, [p.clone() for p in model.parameters()], torch.get_rng_state()

    watcher, weights, random = train("explain")
    found = [(one.step, one.operation, one.examples) for one in watcher.explanations]
    assert found == [(4, "div", (1,)), (4, "div", (1,))]
    _, others, other_random = train("skip")
    assert all(map(torch.equal, weights, others))
    assert torch.equal(random, other_random)


class Parts(nn.Module):
    """Its loss is made by a method, between and after the forwards of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        hidden = self.encoder(x)  # the call
        return self.decoder(hidden.abs().sqrt()).mean()

    compute_loss = forward


@pytest.mark.parametrize("way", ["forward", "compute_loss", "by parts"])
def test_what_came_back_is_told_of_the_module_that_was_called(way: str) -> None:
    """A function that has returned has called layers: the line between them is not seen."""
    torch.manual_seed(0)
    model = Parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run(x: Tensor) -> None:
        if way == "by parts":
            hidden = model.encoder(x)  # the call
            model.decoder(hidden.abs().sqrt()).mean().backward()
        else:
            getattr(model, way)(x).backward()

    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        for x in (good(), bad() * torch.tensor([[1.0], [0.0], [1.0]])):
            run(x)
            optimizer.step()
            optimizer.zero_grad()
    (one,) = watcher.explanations
    assert (one.origin, one.module, one.module_class) == ("output_gradient", "encoder", "Linear")
    assert one.source.endswith("# the call")
    assert one.examples == (1,)
    assert "the output of encoder (Linear)" in str(one)
    assert "loss" not in one.summary
    assert "outside of the forwards that are kept" in " ".join(str(one).split())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("managed", [False, True])
def test_bad_data_under_a_scaler_is_explained(fused, managed):
    """A scaler leaves out the step; that it is bad without the scale, too, makes it an accident."""
    torch.manual_seed(0)
    model = Directions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    options = {"scaler": scaler} if managed else {}
    with gradwatch.watch(model, optimizer, on_nonfinite="explain", **options) as watcher:
        for step in range(6):
            x = torch.randn(3, 4)
            if step == 3:
                x[1] = 0
            loss = model(x)
            if managed:
                watcher.backward(loss)
                watcher.step()
                continue
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    found = [(one.step, one.operation, one.examples) for one in watcher.explanations]
    assert found == [(4, "div", (1,))]
    assert list(watcher.history.steps()["outcome"]).count("skipped_scaler") == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_model_whose_buffers_are_followed_can_be_scripted(policy: str) -> None:
    """So it is before the first backward, and where buffers are copied before each window."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite=policy):
        scripted = torch.jit.script(model)
    assert scripted(torch.ones(3, 4)).shape == (3, 4)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_watched_model_can_be_scripted() -> None:
    """TorchScript compiles the hooks that it finds on a module: it does not find those of ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        scripted = torch.jit.script(model)
        assert torch.equal(scripted(torch.ones(3, 4)), model(torch.ones(3, 4)))
        optimizer.zero_grad()
        model(torch.full((3, 4), math.nan)).sum().backward()
        optimizer.step()
    assert [one.origin for one in watcher.explanations] == ["input"]


def test_a_loop_that_stops_at_a_bad_loss_is_explained() -> None:
    """A program that sees a NaN itself, after its backward, and stops: the window is looked into."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        for x in (torch.ones(3, 4), torch.full((3, 4), math.nan)):
            loss = model(x).sum()
            loss.backward()
            if loss.isnan():
                break
            optimizer.step()
            optimizer.zero_grad()
    (one,) = watcher.explanations
    assert (one.origin, one.step) == ("input", 2)
