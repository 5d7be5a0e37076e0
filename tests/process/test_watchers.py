"""watch_all() watches every model that the process trains."""

import copy
import gc
import io
import math
import os
import sys
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.process import watchers
from gradwatch.process.watchers import ProcessWatch
from tests.support import float64, processes, state, zoo


@pytest.fixture(autouse=True)
def no_models_of_other_tests():
    """Has optimizers collected that are still in a cycle: they would be found."""
    gc.collect()


class Net(nn.Module):
    """A model of two layers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.inner(x).tanh())


def train(model, optimizer, steps=3, micro_batches=1):
    """Train; return the norms of each step, by parameter, computed apart."""
    seen = []
    for _ in range(steps):
        for _ in range(micro_batches):
            (model(torch.randn(5, 3)).square().mean() / micro_batches).backward()
        seen.append(float64.norms(float64.gradients(model)))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def build(kind=torch.optim.SGD, model=None):
    """Build a model and its optimizer."""
    model = model or Net()
    return model, kind(model.parameters(), lr=0.05)


def norms_of(watcher):
    """Return the recorded norms of each step, by parameter."""
    frame = watcher.history.parameters()
    return [
        dict(zip(rows["parameter"], rows["grad_norm"], strict=True))
        for _, rows in frame.groupby("step")
    ]


def only(watching):
    """Return the only watcher."""
    (watcher,) = watching.watchers
    return watcher


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_every_step_from_the_first_is_measured_under_the_models_own_names(micro_batches):
    """Every step from the first is measured under the model's own names."""
    with gradwatch.watch_all() as watching:
        seen = train(*build(), micro_batches=micro_batches)
    watcher = only(watching)
    assert watcher.label == "Net"
    assert norms_of(watcher) == [pytest.approx(one, rel=1e-5) for one in seen]
    assert watcher.history.steps()["micro_batches"].tolist() == [micro_batches] * 3


def test_training_is_bit_identical():
    """Training is bit identical."""

    def run():
        torch.manual_seed(3)
        case = zoo.mlp()
        optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
        for i in range(4):
            case.loss(case.model, case.batch(i)).backward()
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return state.state_of(case.model, optimizer)

    plain = run()
    with gradwatch.watch_all() as watching:
        watched = run()
    assert len(watching.watchers) == 1
    assert state.identical(plain, watched)


def test_an_optimizer_that_was_built_before_is_found():
    """An optimizer that was built before is found."""
    model, optimizer = build()
    with gradwatch.watch_all() as watching:
        seen = train(model, optimizer)
    assert norms_of(only(watching)) == [pytest.approx(one, rel=1e-5) for one in seen]


def test_each_model_has_a_watcher_and_shares_it_among_its_optimizers():
    """Each model has a watcher and shares it among its optimizers."""
    with gradwatch.watch_all() as watching:
        first, second = Net(), nn.Sequential(nn.Linear(3, 2))
        inner = torch.optim.SGD(first.inner.parameters(), lr=0.1)
        head = torch.optim.Adam(first.head.parameters(), lr=0.1)
        other = torch.optim.SGD(second.parameters(), lr=0.1)
        for _ in range(2):
            first(torch.randn(5, 3)).sum().backward()
            inner.step()
            head.step()
            second(torch.randn(5, 3)).sum().backward()
            other.step()
    found = {one.label: one.history.steps() for one in watching.watchers}
    assert list(found) == ["Net", "Sequential"]
    assert found["Net"].groupby("optimizer").size().to_dict() == {"SGD": 2, "Adam": 2}
    assert found["Sequential"]["optimizer"].tolist() == ["SGD", "SGD"]


def test_what_never_steps_is_not_shown(tmp_path):
    """What never steps is not shown."""
    with gradwatch.watch_all(run_dir=tmp_path / "run") as watching:
        frozen, _unused = build(model=nn.Sequential(nn.Linear(3, 1)))
        train(*build())
        frozen(torch.randn(2, 3)).sum().backward()
    assert [one.label for one in watching.watchers] == ["Net"]
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["Net"]


def test_models_that_are_built_anew_each_have_a_history_and_a_folder(tmp_path):
    """Models that are built anew each have a history and a folder."""
    with gradwatch.watch_all(run_dir=tmp_path) as watching:
        for fold in range(3):
            train(*build(), steps=fold + 1)
    assert [(one.label, one.last.step) for one in watching.watchers] == [
        ("Net", 1),
        ("Net-1", 2),
        ("Net-2", 3),
    ]
    assert [len(gradwatch.load(tmp_path / name).steps()) for name in ("Net", "Net-1", "Net-2")] == [
        1,
        2,
        3,
    ]


def test_an_optimizer_that_is_built_later_for_the_same_model_joins_its_watcher():
    """An optimizer that is built later for the same model joins its watcher."""
    with gradwatch.watch_all() as watching:
        model, optimizer = build()
        train(model, optimizer)
        later = torch.optim.Adam(model.parameters(), lr=0.01)
        seen = train(model, later)
    steps = only(watching).history.steps()
    assert steps["optimizer"].tolist() == ["SGD"] * 3 + ["Adam"] * 3
    adam = steps[steps["optimizer"] == "Adam"]["grad_norm"].tolist()
    assert adam == pytest.approx([float64.total(one) for one in seen], rel=1e-5)


@pytest.mark.parametrize("way", ["copied", "unpickled"])
def test_optimizers_that_were_copied_or_unpickled_are_found(way):
    """Optimizers that were copied or unpickled are found."""
    pair = build()
    with gradwatch.watch_all() as watching:
        if way == "copied":
            pair = copy.deepcopy(pair)
        else:
            file = io.BytesIO()
            torch.save(pair, file)
            file.seek(0)
            pair = torch.load(file, weights_only=False)
        seen = train(*pair)
    assert norms_of(only(watching)) == [pytest.approx(one, rel=1e-5) for one in seen]


def _another_model(model, optimizer):
    optimizer.param_groups[0]["params"] = list((other := Net()).parameters())
    return other


def _another_layer(model, optimizer):
    model.inner = nn.Linear(3, 4)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return model


def _one_more_layer(model, optimizer):
    model.head = nn.Sequential(model.head, nn.Linear(1, 1))
    optimizer.add_param_group({"params": list(model.head[1].parameters())})
    return model


@pytest.mark.parametrize("exchange", [_another_model, _another_layer, _one_more_layer])
def test_an_optimizer_that_is_given_other_parameters_has_its_model_watched_anew(exchange):
    """No norm of the old parameters is recorded again, and these are let go."""
    lines = []
    with ProcessWatch({}, say=lines.append, is_first=True) as watching:
        model, optimizer = build()
        before = train(model, optimizer, steps=2)
        weight = weakref.ref(model.inner.weight)
        model = exchange(model, optimizer)
        after = train(model, optimizer, steps=2)
        assert (weight() is None) == (exchange is not _one_more_layer)
    first, second = watching.watchers
    assert (first.label, second.label) == ("Net", "Net-1")
    assert norms_of(first) == [pytest.approx(one, rel=1e-5) for one in before]
    assert norms_of(second) == [pytest.approx(one, rel=1e-5) for one in after]
    assert not first.events
    told = [line for line in lines if not line.startswith("watching ")]
    assert len(told) == 1
    assert "Net is watched anew from this step on" in told[0]


def test_loose_tensors_may_get_another_optimizer():
    """They are watched under its name from then on, and nothing is told of it."""
    x = torch.ones(3, requires_grad=True)
    with gradwatch.watch_all() as watching:
        for kind in (torch.optim.SGD, torch.optim.Adam):
            optimizer = kind([x], lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                (2 * x).sum().backward()
                optimizer.step()
    assert [one.label for one in watching.watchers] == ["SGD", "Adam"]
    for watcher in watching.watchers:
        assert norms_of(watcher) == [{"param_groups[0][0]": pytest.approx(12**0.5)}] * 2
        assert not watcher.events


def test_layers_that_are_thawed_stay_with_their_watcher():
    """They are parameters of the watched model, and not new."""
    with gradwatch.watch_all() as watching:
        model = Net()
        model.inner.requires_grad_(False)
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        seen = train(model, optimizer, steps=2)
        model.inner.requires_grad_(True)
        optimizer.add_param_group({"params": list(model.inner.parameters())})
        seen += train(model, optimizer, steps=2)
    assert norms_of(only(watching)) == [pytest.approx(one, rel=1e-5) for one in seen]


def test_gradients_that_are_set_by_hand_are_measured_from_the_first_step_on():
    """Gradients that are set by hand are measured from the first step on."""
    with gradwatch.watch_all() as watching:
        model, optimizer = build()
        for scale in (1.0, 2.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, scale)
            optimizer.step()
    count = sum(parameter.numel() for parameter in Net().parameters())
    totals = only(watching).history.steps()["grad_norm"].tolist()
    assert totals == pytest.approx([math.sqrt(count), 2 * math.sqrt(count)])


def test_a_step_that_a_scaler_skips_first_is_there():
    """A step that a scaler skips first is there."""
    with gradwatch.watch_all() as watching:
        model, optimizer = build()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        for _ in range(20):
            scaler.scale(model(torch.randn(5, 3)).square().mean() * 100).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    steps = only(watching).history.steps()
    assert len(steps) == 20
    assert steps["outcome"].iloc[0] == "skipped_scaler"


@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.LBFGS, max_iter=1)])
def test_a_scaler_of_another_model_is_not_that_of_a_closure(kind):
    """The first backward is inside of the step then, and the scaler is one that the loop can see."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.watch_all() as watching:
        model, optimizer = build()
        scaler.scale(model(torch.ones(5, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        other, optimizer = build(kind)
        seen = []

        def closure():
            scaler.get_scale()
            optimizer.zero_grad()
            loss = other(torch.ones(5, 3)).square().mean()
            loss.backward()
            seen.append(float64.norms(float64.gradients(other)))
            return loss

        optimizer.step(closure)
    assert norms_of(watching.watchers[1])[0] == pytest.approx(seen[0], rel=1e-5)


def test_the_engine_is_as_torch_made_it_once_all_models_are_known():
    """The engine is as torch made it once all models are known."""
    entry = torch.autograd._engine_run_backward
    with gradwatch.watch_all():
        model, optimizer = build()
        assert torch.autograd._engine_run_backward is not entry
        train(model, optimizer)
        assert torch.autograd._engine_run_backward is entry
    build_one = torch.optim.Optimizer._patch_step_function
    assert build_one.__module__ == "torch.optim.optimizer"
    assert not hasattr(build_one, "__wrapped__")


def test_a_model_that_the_program_watches_is_left_to_it():
    """A model that the program watches is left to it."""
    with gradwatch.watch_all() as watching:
        model, optimizer = build()
        with gradwatch.watch(model, optimizer) as watcher:
            train(model, optimizer)
    assert watcher.last.step == 3
    assert watching.watchers == []
    assert "itself" in watching.nothing_watched()


def test_a_model_that_the_program_watches_later_is_given_up():
    """A model that the program watches later is given up."""
    with gradwatch.watch_all() as watching:
        model, optimizer = build()
        train(model, optimizer, steps=2)
        with gradwatch.watch(model, optimizer) as watcher:
            train(model, optimizer, steps=3)
    assert watcher.last.step == 3
    assert only(watching).last.step == 2


def test_trial_optimizers_of_gradwatch_are_no_models():
    """Trial optimizers of gradwatch are no models."""
    with gradwatch.watch_all(clip=1.0) as watching:
        model = Net()
        train(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    assert [one.label for one in watching.watchers] == ["Net"]


def test_a_wrapper_on_which_torch_runs_no_hooks_is_counted_once():
    """A wrapper on which torch runs no hooks is counted once, as what it wraps."""

    class Wrapper(torch.optim.Optimizer):
        """Never calls `Optimizer.__init__()`, and has plain dicts for hooks."""

        def __init__(self, inner):
            self.inner, self.state, self.defaults = inner, {}, inner.defaults
            self.param_groups = inner.param_groups
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

        def step(self, closure=None):
            return self.inner.step(closure)

    with gradwatch.watch_all() as watching:
        model, inner = build(torch.optim.RAdam)
        seen = train(model, Wrapper(inner))
    assert only(watching).history.steps()["optimizer"].tolist() == ["RAdam"] * 3
    assert norms_of(only(watching)) == [pytest.approx(one, rel=1e-5) for one in seen]


def test_the_first_step_is_explained():
    """The first step is explained."""
    with gradwatch.watch_all(on_nonfinite="explain") as watching:
        model, optimizer = build()
        batch = torch.randn(5, 3)
        batch[2, 1] = math.nan
        model(batch).sum().backward()
        optimizer.step()
    (explanation,) = only(watching).explanations
    assert explanation.origin == "input"
    assert explanation.examples == (2,)


def test_the_first_step_of_two_models_in_one_optimizer_is_explained():
    """Their container is made anew each time; what was kept of the models is found all the same."""
    with gradwatch.watch_all(on_nonfinite="explain") as watching:
        one, other = nn.Linear(3, 3), Net()
        scale = torch.ones(3, requires_grad=True)
        parameters = [*one.parameters(), *other.parameters(), scale]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        batch = torch.randn(5, 3)
        batch[2, 1] = math.nan
        other(one(batch) * scale).sum().backward()
        optimizer.step()
    (explanation,) = only(watching).explanations
    assert (explanation.origin, explanation.module) == ("input", "linear")


def test_models_are_found_without_a_look_at_every_object(monkeypatch):
    """They are noted while they are built."""

    def search():
        raise AssertionError

    monkeypatch.setattr("gradwatch.process.owners.all_modules", search)
    with gradwatch.watch_all() as watching:
        train(*build())
        train(*build(model=nn.Sequential(Net(), nn.Linear(1, 1))))
    assert [one.label for one in watching.watchers] == ["Net", "Sequential"]


def test_each_model_has_its_own_clip():
    """Each model has its own clip."""
    with gradwatch.watch_all(clip=gradwatch.ZClip()) as watching:
        one, other = build(), build(model=nn.Sequential(nn.Linear(3, 1)))
        train(*one)
        train(*other)
    first, second = (one._options.clip for one in watching.watchers)
    assert first is not second


def test_sinks_are_made_for_each_model():
    """Sinks are made for each model."""

    class Sink:
        def __init__(self):
            self.steps = 0

        def write(self, batch):
            self.steps += len(batch.steps)

        def close(self):
            pass

    made = {}
    with gradwatch.watch_all(sinks=lambda name: [made.setdefault(name, Sink())]):
        train(*build(), steps=2)
        train(*build(model=nn.Sequential(nn.Linear(3, 1))), steps=4)
    assert {name: one.steps for name, one in made.items()} == {"Net": 2, "Sequential": 4}


def test_the_report_has_a_part_for_each_model():
    """The report has a part for each model."""
    with gradwatch.watch_all() as watching:
        train(*build())
        train(*build(model=nn.Sequential(nn.Linear(3, 1))))
    report = watching.report()
    assert list(report) == ["Net", "Sequential"]
    assert "== Net\ngradwatch report: 3 steps, 4 parameters" in str(report)
    assert str(report["Sequential"]) in str(report)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: None, "no torch.optim.Optimizer was built"),
        (lambda: build()[0](torch.randn(2, 3)).sum().backward(), "SGD was built, but never"),
    ],
)
def test_where_nothing_was_watched_the_reason_is_said(act, text):
    """Where nothing was watched the reason is said."""
    with gradwatch.watch_all() as watching:
        act()
    if "built, but" in text or not watching._built:  # optimizers of other tests may be in memory
        assert text in watching.nothing_watched()
    assert watching.report() == {}


def test_a_model_that_cannot_be_watched_is_told_of_and_trained():
    """A model that cannot be watched is told of and trained."""
    told = []

    class Broken(torch.optim.SGD):
        """Makes the watcher fail."""

        @property
        def param_groups(self):
            if self.broken:
                raise RuntimeError("no groups here")
            return self.groups

        @param_groups.setter
        def param_groups(self, value):
            self.groups, self.broken = value, False

    watching = ProcessWatch({}, say=told.append).attach()
    try:
        model = Net()
        optimizer = Broken(model.parameters(), lr=0.1)
        model(torch.randn(2, 3)).sum().backward()
        optimizer.broken = False
        optimizer.step()
    finally:
        watching.close()
    assert all(isinstance(one, str) for one in told)


def test_one_line_tells_of_each_model_at_its_first_step(tmp_path):
    """One line tells of each model at its first step."""
    told = []
    watching = ProcessWatch({"run_dir": tmp_path}, say=told.append).attach()
    try:
        model, optimizer = build()
        model(torch.randn(2, 3)).sum().backward()
        assert told == []
        optimizer.step()
        train(model, optimizer)
    finally:
        watching.close()
    assert told == [f"watching Net: 4 parameters (21 elements), SGD -> {tmp_path / 'Net'}"]


@pytest.mark.parametrize("how", ["frozen", "left out of the optimizer"])
def test_the_line_says_how_many_parameters_train_if_not_all_do(how):
    """Those that an optimizer holds and that take a gradient, and their elements."""
    lines, model = [], Net()
    model.inner.requires_grad_(how != "frozen")
    held = model if how == "frozen" else model.head
    with ProcessWatch({}, say=lines.append, is_first=True):
        train(model, torch.optim.SGD(held.parameters(), lr=0.1))
    assert lines == ["watching Net: 4 parameters, 2 of them trained (5 elements), SGD"]


def test_what_would_be_a_warning_is_said():
    """What would be a warning is said."""
    told = []
    watching = ProcessWatch({}, say=told.append).attach()
    try:
        model, optimizer = build()
        model(torch.full((2, 3), math.nan)).sum().backward()
        optimizer.step()
    finally:
        watching.close()
    assert any("NaN" in one for one in told)


def test_no_more_than_a_hundred_models_of_a_kind_are_watched(monkeypatch):
    """No more than a hundred models of a kind are watched."""
    assert watchers.MOST_ALIKE == 100
    monkeypatch.setattr(watchers, "MOST_ALIKE", 3)
    told = []
    watching = ProcessWatch({}, say=told.append).attach()
    try:
        for _ in range(6):
            train(*build(), steps=1)
    finally:
        watching.close()
    assert len(watching.watchers) == 3
    assert sum("are not" in one for one in told) == 1


def test_what_was_there_before_takes_no_place(monkeypatch):
    """However many models of its kind an earlier training has left, the one that trains is watched."""
    monkeypatch.setattr(watchers, "MOST_ALIKE", 3)
    left = [build() for _ in range(6)]
    with gradwatch.watch_all() as watching:
        train(*left[-1], steps=2)
        train(*build(), steps=1)
    assert [len(watcher.history.steps()) for watcher in watching.watchers] == [2, 1]


def test_models_of_two_threads_are_both_watched():
    """Models of two threads are both watched."""
    seen = {}

    def work(name, model):
        seen[name] = train(*build(model=model), steps=5)

    with gradwatch.watch_all() as watching:
        models = {"Net": Net(), "Sequential": nn.Sequential(nn.Linear(3, 1))}
        threads = [threading.Thread(target=work, args=pair) for pair in models.items()]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    for watcher in watching.watchers:
        assert norms_of(watcher) == [pytest.approx(one, rel=1e-5) for one in seen[watcher.label]]
    assert len(watching.watchers) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_watches_nothing(tmp_path):
    """A forked child watches nothing."""
    watching = gradwatch.watch_all(run_dir=tmp_path).attach()
    try:
        train(*build(), steps=2)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(*build(), steps=3)
                watching.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        watching.close()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["Net"]
    assert len(gradwatch.load(tmp_path / "Net").steps()) == 2


@pytest.mark.parametrize("name", ["accumulate", "scaler", "curvature"])
def test_options_of_one_loop_are_refused(name):
    """Options of one loop are refused."""
    with pytest.raises(TypeError, match=rf"gradwatch.watch\(model, optimizer, {name}=...\)"):
        ProcessWatch({name: 2})


def test_sinks_that_all_models_would_share_are_refused():
    """Sinks that all models would share are refused."""
    with pytest.raises(TypeError, match=r"sinks=lambda name: \["):
        gradwatch.watch_all(sinks=[object()])


def test_it_is_attached_once():
    """It is attached once."""
    watching = gradwatch.watch_all().attach()
    watching.close()
    with pytest.raises(RuntimeError, match="attached before"):
        watching.attach()


def test_the_end_of_a_script_is_silent():
    """Its global model and optimizer go when nothing of gradwatch can be called any more."""
    done = processes.run(
        code="""
            import torch, gradwatch

            watching = gradwatch.watch_all().attach()
            model = torch.nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            watching.close()
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_step_costs_what_it_costs_under_watch():
    """But for one look at what the optimizer holds, of a few calls however many parameters there are."""

    def calls_of(watch):
        model, optimizer = build(torch.optim.Adam)
        x = torch.randn(5, 3)
        counts = []
        with watch(model, optimizer):
            for _ in range(30):
                counts.append(0)

                def count(frame, event, argument):
                    counts[-1] += event in ("call", "c_call")

                sys.setprofile(count)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                sys.setprofile(None)
        return counts[20:]  # by then it is known what the loop does

    found = calls_of(lambda model, optimizer: gradwatch.watch_all())
    more = {ours - plain for ours, plain in zip(found, calls_of(gradwatch.watch), strict=True)}
    assert more <= set(range(13))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_an_optimizer_may_take_turns_between_blocks(clip):
    """With block coordinate descent each step is that of the block that it trains, clipped too."""
    with gradwatch.watch_all(clip=clip) as watching:
        model = Net()
        blocks = [list(model.inner.parameters()), list(model.head.parameters())]
        optimizer = torch.optim.SGD(blocks[0], lr=0.05)
        seen, moved = [], []
        for step in range(6):
            optimizer.param_groups[0]["params"] = blocks[step % 2]
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            names = {id(p): name for name, p in model.named_parameters()}
            gradients = {names[id(p)]: p.grad for p in blocks[step % 2]}
            seen.append(float64.norms(gradients))
            before = [p.detach().clone() for p in blocks[step % 2]]
            optimizer.step()
            parts = [p.detach() - q for p, q in zip(blocks[step % 2], before, strict=True)]
            moved.append(float64.norm(torch.cat([one.flatten() for one in parts])) / 0.05)
            model.zero_grad()
    assert norms_of(only(watching)) == [pytest.approx(one, rel=1e-5) for one in seen]
    if clip is not None:
        assert moved == pytest.approx([clip] * 6, rel=1e-3)
