"""Streams, segments and sessions, and when what waits is written."""

import math

import numpy as np
import pytest

from gradwatch.record.records import Layout
from gradwatch_dashboard.wire import Tag
from gradwatch_tensorboard import stream as stream_module
from gradwatch_tensorboard.matrix import MatrixWriter

from . import logs


class Clock:
    """A clock that stands still until it is told."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """A clock for the matrix."""
    return Clock()


@pytest.fixture
def matrix(tmp_path, clock):
    """A matrix of an empty folder."""
    return MatrixWriter(str(tmp_path), clock)


def add(matrix, part):
    """Gives the matrix a batch; returns the tags and rows of what goes out."""
    return tags(matrix.add(part, [record.time_s for record in part.steps]))


def tags(outgoing):
    """Tag to its number of rows, for each Event."""
    return [
        {Tag.parse(value.tag): value.tensor.tensor_shape.dim[0].size if value.tensor.tensor_shape.dim else 0
         for value in event.summary.value}
        for event, _, _ in outgoing
    ]  # fmt: skip


def kinds(outgoing):
    """The kinds of the tags of each Event, with the rows of the first."""
    return [(next(iter(event)).kind, next(iter(event.values()))) for event in outgoing]


def plain(steps, parameters=3, **fields):
    """Steps without a NaN."""
    return logs.batch(steps, np.ones((len(steps), parameters), np.float32), **fields)


def test_sixty_four_windows_go_out(matrix):
    """The layout at once, then a chunk for each 64 windows; the others wait."""
    assert kinds(add(matrix, plain(range(1, 64)))) == [("layout", 0)]
    assert kinds(add(matrix, plain(range(64, 200)))) == [("norms", 64)] * 3
    assert kinds(add(matrix, plain(range(200, 220)))) == []
    assert kinds(tags(matrix.rest())) == [("norms", 27)]
    assert matrix.rest() == []


def test_five_seconds_later_what_waits_goes_out(matrix, clock):
    """All but the window that is not complete, which is narrower than a pixel."""
    add(matrix, plain(range(4097, 4100)))
    clock.now = 4.0
    assert add(matrix, plain(range(4100, 4103))) == []
    clock.now = 5.0
    assert kinds(add(matrix, plain(range(4103, 4104)))) == [("norms", 1)]
    clock.now = 9.0
    assert add(matrix, plain(range(4104, 4105))) == []
    clock.now = 10.0
    assert kinds(add(matrix, plain(range(4105, 4106)))) == [("norms", 1)]
    assert kinds(tags(matrix.rest())) == [("norms", 1)]


def test_a_nan_goes_out_at_once(matrix):
    """With all that waited, and with the window that it ends."""
    add(matrix, plain(range(4097, 4102)))
    assert kinds(add(matrix, logs.batch([4102], [[1, math.nan, 1]]))) == [("norms", 2)]


def test_segments_of_a_hundred_chunks(matrix):
    """The 101st chunk begins the next segment."""
    sent = [event for i in range(201) for event in add(matrix, logs.batch([i + 1], [[math.nan]]))]
    segments = [next(iter(event)).segment for event in sent if next(iter(event)).kind == "norms"]
    assert segments == [0] * 100 + [1] * 100 + [2]


def test_segments_and_chunks_of_a_huge_model(matrix, monkeypatch):
    """Where the parameters are many, chunks have fewer windows and segments fewer chunks."""
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 16 * 400)
    monkeypatch.setattr(stream_module, "SEGMENT_BYTES", 80 * 400)
    sent = add(matrix, plain(range(1, 129), parameters=100))[1:]
    assert kinds(sent) == [("norms", 16)] * 8
    assert [next(iter(event)).segment for event in sent] == [0] * 5 + [1] * 3


def test_a_single_row_that_is_more_than_a_chunk(matrix, monkeypatch):
    """It goes out alone."""
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 100)
    monkeypatch.setattr(stream_module, "SEGMENT_BYTES", 100)
    sent = add(matrix, plain(range(1, 4), parameters=100))[1:]
    assert kinds(sent) == [("norms", 1)] * 3
    assert [next(iter(event)).segment for event in sent] == [0, 1, 2]


def test_a_model_without_parameters(matrix):
    """There is nothing to write."""
    assert add(matrix, logs.batch([1], np.empty((1, 0), np.float32))) == []
    assert matrix.rest() == []


def two_optimizers(steps):
    """A batch of two optimizers that step in turn; two parameters each, and one that nobody has."""
    records, norms = [], []
    for step in steps:
        for number, label in enumerate(["Adam", "Adam-1"]):
            row = [[-1.0] * 5]
            row[0][2 * number : 2 * number + 2] = [step, number]
            records += logs.batch([step], row, label).steps
            norms += row
    batch = plain([1], parameters=5)
    return type(batch)(
        batch.layout, records, np.array(norms, np.float32), np.array(norms), events=()
    )


def test_each_optimizer_is_a_stream(load, tmp_path):
    """With its own steps and its own parameters, and those that nobody has."""
    folder = tmp_path / "run"
    logs.write(folder, two_optimizers(range(1, 31)), two_optimizers(range(31, 61)))
    first, second = logs.streams(load(folder))
    names = logs.layout_of(5).names
    assert (first.layout.optimizer, second.layout.optimizer) == ("Adam", "Adam-1")
    assert first.layout.parameters == (*names[:2], names[4])
    assert second.layout.parameters == (*names[2:4], names[4])
    for number, stream in enumerate([first, second]):
        assert stream.steps() == list(range(1, 61))
        assert stream.norms[:, 0].tolist() == list(range(1, 61))
        assert (stream.norms[:, 1] == number).all()
        assert (stream.norms[:, 2] == -1).all()


def test_an_optimizer_for_each_parameter(load, tmp_path):
    """40 optimizers of a parameter each: not 40 times the whole matrix."""
    folder = tmp_path / "run"
    layout, batches = logs.layout_of(40), []
    for step in range(1, 33):
        for part in (range(25), range(25, 40)):
            norms = np.where(np.eye(40)[part], step, -1).astype(np.float32)
            records = [
                logs.batch([step], norms[[i]], f"SGD-{i + part[0]}").steps[0]
                for i in range(len(part))
            ]
            batches.append(type(plain([1]))(layout, records, norms, norms))
    logs.write(folder, *batches)
    newest = {stream.layout.optimizer: stream for stream in logs.streams(load(folder))}
    for label, stream in newest.items():
        assert stream.layout.parameters == (layout.names[int(label.partition("-")[2])],)
        assert (stream.norms[:, 0] == stream.column("first_step")).all()
        assert stream.steps()[-1] == 32
    cells = sum(stream.norms.size for stream in logs.streams(load(folder)))
    assert cells <= 32 * 40 + 3 * 40 * 40


def test_a_parameter_that_comes_late(load, tmp_path):
    """A parameter that was another optimizer's alone begins a new stream, and no norm is lost."""
    folder = tmp_path / "run"
    late = two_optimizers(range(11, 21))
    late.norms[::2, 2] = 0.5
    logs.write(folder, two_optimizers(range(1, 11)), late)
    found = [stream for stream in logs.streams(load(folder)) if stream.layout.optimizer == "Adam"]
    assert [len(stream.layout.parameters) for stream in found] == [3, 4]
    assert [stream.steps() for stream in found] == [list(range(1, 11)), list(range(11, 21))]
    assert (found[1].norms[:, 2] == 0.5).all()


def test_an_unused_optimizer_is_left_in_its_stream(load, tmp_path):
    """A batch without steps of one of the optimizers leaves its stream as it is."""
    folder = tmp_path / "run"
    only_first = two_optimizers(range(11, 21))
    keep = slice(None, None, 2)
    part = type(only_first)(
        only_first.layout, only_first.steps[keep], only_first.norms[keep], only_first.norms[keep]
    )
    logs.write(folder, two_optimizers(range(1, 11)), part, two_optimizers(range(21, 31)))
    first, second = logs.streams(load(folder))
    assert first.steps() == list(range(1, 31))
    assert second.steps() == [*range(1, 11), *range(21, 31)]


def test_changed_parameters_begin_a_stream(load, tmp_path):
    """Each stream says which parameters it holds; they follow one another in one session."""
    folder = tmp_path / "run"
    other = Layout(("a", "b"), ("", ""), ((1,), (2,)))
    logs.write(
        folder,
        plain(range(1, 11)),
        logs.batch(range(11, 21), logs.rows(range(11, 21), 2), layout=other),
    )
    first, second = logs.streams(load(folder))
    assert first.session == second.session
    assert (first.steps(), second.steps()) == (list(range(1, 11)), list(range(11, 21)))
    assert second.layout.parameters == ("a", "b")


@pytest.mark.parametrize("parts", [[range(1, 31), range(11, 21)], [range(1, 31), range(30, 40)]])
@pytest.mark.parametrize("together", [False, True])
def test_steps_that_go_back_begin_a_session(load, tmp_path, parts, together):
    """A checkpoint that is loaded in the middle: what follows replaces what it repeats."""
    folder = tmp_path / "run"
    batches = [
        logs.batch(steps, logs.rows(steps, 2), events=[logs.event(steps[-1])]) for steps in parts
    ]
    if together:
        steps = [record for part in batches for record in part.steps]
        norms = np.concatenate([part.norms for part in batches])
        batches = [
            type(batches[0])(batches[0].layout, steps, norms, norms, events=batches[1].events)
        ]
    logs.write(folder, *batches)
    tensors = load(folder)
    first, second = logs.streams(tensors)
    assert first.session < second.session
    assert (first.steps(), second.steps()) == (list(parts[0]), list(parts[1]))
    assert max(tag for tag in tensors if tag.kind == "events").session == second.session


def test_a_resumed_run_takes_the_width_of_its_step(load, tmp_path):
    """From step 50,001 on a window is 32 steps, as it was before."""
    folder = tmp_path / "run"
    logs.write(folder, plain(range(50_001, 50_401)))
    (stream,) = logs.streams(load(folder))
    widths = stream.column("last_step") - stream.column("first_step") + 1
    assert widths.tolist() == [16, *[32] * 12]
    assert stream.column("last_step")[-1] == 50_400
