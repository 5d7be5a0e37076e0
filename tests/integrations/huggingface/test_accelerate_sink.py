"""AcceleratorSink: every row of both sides is in every tracker, whatever the loop logs."""

import random
import warnings

import pytest
import torch

import gradwatch

pytest.importorskip("accelerate", reason="NOT TESTED: accelerate is not installed")

from accelerate.tracking import GeneralTracker

from gradwatch_huggingface import AcceleratorSink
from tests.integrations.huggingface.accelerate_loops import (
    data,
    fresh,
    net,
    squared,
    train,
)

NORM = "gradwatch/grad_norm"
STEPS = 200


class Rows(GeneralTracker):
    """A tracker as a user writes one."""

    name = "rows"
    requires_logging_directory = False

    def __init__(self, name="rows"):
        self.name, self.rows, self.finished = name, [], False
        super().__init__()

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        assert not self.finished
        self.rows.append((step, dict(values)))

    def finish(self):
        self.finished = True

    def series(self, tag):
        return [(step, values[tag]) for step, values in self.rows if tag in values]


def scrambled(step):
    """Return step numbers in no order."""
    return random.Random(step).randrange(10 * STEPS)


ORDERS = {
    "from 0": lambda step: {"step": step - 1},
    "from 1": lambda step: {"step": step},
    "no step": lambda step: {},
    "scrambled": lambda step: {"step": scrambled(step)},
    "falling": lambda step: {"step": STEPS - step},
}


FAST = ("from 0", "scrambled")
EACH = [
    pytest.param(order, marks=() if order in FAST else pytest.mark.slow, id=order)
    for order in ORDERS
]


def train_logged(accelerator, steps=STEPS, log=lambda step: {"step": step}, watch=None, **options):
    """Train a given number of steps and log the loss after each; return the watcher, open."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = data(steps * 2, batch=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sinks = [AcceleratorSink(accelerator, **options)]
    watcher = gradwatch.watch(model, optimizer, sinks=sinks, **(watch or {})).attach()
    for step, (inputs, targets) in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = squared(model(inputs), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if log is not None:
            accelerator.log({"loss": loss.item()}, **log(step))
    return watcher


def norms_of(watcher):
    """Return step and norm of each step, as the history has them."""
    return list(watcher.history.steps()["grad_norm"].items())


@pytest.mark.parametrize("order", EACH)
def test_a_tracker_of_the_users_own(order):
    """All rows of both sides arrive, those of the loop as it logged them, ours in order."""
    tracker = Rows()
    accelerator = fresh(log_with=tracker)
    accelerator.init_trackers("run")
    watcher = train_logged(accelerator, log=ORDERS[order])
    accelerator.end_training()
    watcher.close()
    assert [step for step, _ in tracker.series("loss")] == [
        ORDERS[order](step).get("step") for step in range(1, STEPS + 1)
    ]
    assert tracker.series(NORM) == norms_of(watcher)
    clipped = [value for _, value in tracker.series("gradwatch/grad_norm_clipped")]
    assert clipped == watcher.history.steps()["grad_norm_clipped"].tolist()


def scalars(folder):
    """Read the scalars of a run in TensorBoard."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="NOT TESTED: tensorboard is not installed",
    )
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(one.step, one.value) for one in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


@pytest.mark.parametrize("order", ["from 0", pytest.param("scrambled", marks=pytest.mark.slow)])
def test_tensorboard(order, tmp_path):
    """All rows of both sides are in one event file, beside the data of the Gradients tab."""
    accelerator = fresh(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    watcher = train_logged(accelerator, log=ORDERS[order])
    accelerator.end_training()
    watcher.close()
    found = scalars(tmp_path / "run")
    assert len(found["loss"]) == STEPS
    norms = norms_of(watcher)
    assert [step for step, _ in found[NORM]] == [step for step, _ in norms]
    assert [v for _, v in found[NORM]] == pytest.approx([v for _, v in norms], rel=1e-6)
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    assert {"gradwatch_blocks/0", "gradwatch_blocks/2"} <= found.keys()


def test_blocks_and_statistics(tmp_path):
    """Both options add their tags in every step, in TensorBoard as elsewhere."""
    tracker = Rows()
    accelerator = fresh(log_with=[tracker, "tensorboard"], project_dir=tmp_path)
    accelerator.init_trackers("run")
    watcher = train_logged(
        accelerator, 20, blocks=True, statistics=True, watch={"statistics": ("norm", "max")}
    )
    accelerator.end_training()
    watcher.close()
    found = scalars(tmp_path / "run")
    for tag in ("gradwatch_blocks/0", "gradwatch_blocks/2", "gradwatch_max/2"):
        assert [step for step, _ in found[tag]] == list(range(1, 21))
        ours = [value for _, value in tracker.series(tag)]
        assert ours == pytest.approx([value for _, value in found[tag]], rel=1e-6)


def test_trackers_that_are_made_later_get_all():
    """init_trackers() after watch(), or after some steps, costs no row."""
    tracker = Rows()
    accelerator = fresh(log_with=tracker)
    watcher = train_logged(
        accelerator,
        30,
        log=lambda step: {"step": accelerator.init_trackers("run") or step} if step == 9 else {},
    )
    watcher.close()
    assert tracker.series(NORM) == norms_of(watcher)


def test_without_trackers_nothing_is_logged():
    """Accelerator() without log_with trains as ever: examples switch tracking off like this."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watcher = train_logged(fresh(), 10)
        watcher.close()
    assert len(watcher.history.steps()) == 10


def test_trackers_that_are_never_made_are_told():
    """log_with without init_trackers() logs nothing: a warning says what to call."""
    watcher = train_logged(fresh(log_with=Rows()), 10)
    with pytest.warns(gradwatch.GradwatchWarning, match=r"10 steps.*Call accelerator\.init_track"):
        watcher.close()


def test_steps_after_end_training_are_told():
    """They cannot be logged any more: a warning counts them, and the loop goes on."""
    tracker = Rows()
    accelerator = fresh(log_with=tracker)
    accelerator.init_trackers("run")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data(20, batch=2))
    watcher = gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)]).attach()
    for step, (inputs, targets) in enumerate(loader, start=1):
        accelerator.backward(squared(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        if step == 7:
            accelerator.end_training()
    with pytest.warns(
        gradwatch.GradwatchWarning, match=r"3 steps that came after accelerator\.end"
    ):
        watcher.close()
    assert len(tracker.series(NORM)) == 7


def test_a_tracker_that_fails_costs_the_others_nothing():
    """It is tried again and told by name; what it missed comes later, each row once."""

    class Flaky(Rows):
        fails = 3

        def log(self, values, step=None, **kwargs):
            if NORM in values and self.fails:
                self.fails -= 1
                raise OSError("the server is away")
            super().log(values, step=step)

    trackers = [Flaky("flaky"), Rows("steady")]
    accelerator = fresh(log_with=trackers)
    accelerator.init_trackers("run")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", gradwatch.GradwatchWarning)
        watcher = train_logged(accelerator, 30)
    accelerator.end_training()
    watcher.close()
    texts = [str(one.message) for one in told]
    assert [text.partition(")")[0] for text in texts] == [
        "gradwatch: AcceleratorSink (tracker flaky"
    ] * 2
    assert "the server is away" in texts[0]
    assert "works again and has received what it missed" in texts[1]
    assert trackers[0].series(NORM) == trackers[1].series(NORM) == norms_of(watcher)


def test_several_watchers_share_an_accelerator():
    """Each has tags of its own: by name, or by number."""
    tracker = Rows()
    accelerator = fresh(log_with=tracker)
    accelerator.init_trackers("run")
    pairs = []
    for seed, name in ((0, ""), (1, ""), (2, "critic")):
        model = net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        sinks = [AcceleratorSink(accelerator, name=name)]
        pairs.append((model, optimizer, gradwatch.watch(model, optimizer, sinks=sinks).attach()))
    for inputs, targets in data():
        for model, optimizer, _ in pairs:
            accelerator.backward(squared(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    for prefix, (*_, watcher) in zip(("", "2/", "critic/"), pairs, strict=True):
        watcher.close()
        assert tracker.series(prefix + NORM) == norms_of(watcher)
        assert watcher.history.steps()["loss"].notna().all()


def test_a_second_training_after_the_first():
    """One sink may serve two watchers, one after the other."""
    tracker = Rows()
    accelerator = fresh(log_with=tracker)
    accelerator.init_trackers("run")
    sink, norms = AcceleratorSink(accelerator), []
    for _ in range(2):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, data())
        with gradwatch.watch(model, optimizer, sinks=[sink]) as watcher:
            for inputs, targets in loader:
                accelerator.backward(squared(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        norms += norms_of(watcher)
    assert tracker.series(NORM) == norms


def test_accumulation_is_logged_from_the_first_step():
    """With gradient_accumulation_steps above 1, micro_batches is in every row."""
    tracker = Rows()
    run = train(
        {},
        sinks=lambda accelerator: [AcceleratorSink(accelerator)],
        after_step=lambda accelerator, step, loss: (
            accelerator.init_trackers("run") if step == 1 else None
        ),
        gradient_accumulation_steps=4,
        log_with=tracker,
    )
    counts = [int(value) for _, value in tracker.series("gradwatch/micro_batches")]
    assert counts == run.expected.micro_batches


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((None,), {}, TypeError, r"must be an accelerate\.Accelerator, got None"),
        ((GeneralTracker,), {}, TypeError, r"must be an accelerate\.Accelerator, got"),
        ((), {"blocks": 1}, TypeError, r"AcceleratorSink\(blocks=\) must be True or False, got"),
        ((), {"statistics": "max"}, TypeError, r"\(statistics=\) must be True or False, got"),
        ((), {"name": 2}, TypeError, r"AcceleratorSink\(name=\) must be a string"),
        ((), {"name": "a/"}, ValueError, r"AcceleratorSink\(name=\) must be a string"),
    ],
)
def test_mistakes_are_refused(arguments, options, error, text):
    """Each error names the argument, the value and what to write."""
    with pytest.raises(error, match=text):
        AcceleratorSink(*(arguments or (fresh(),)), **options)
