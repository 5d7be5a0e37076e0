"""What a logger gets: tags and values of each step, of blocks and statistics too if asked."""

import math

import torch

import gradwatch
from gradwatch.adapters import LoggerScalars
from gradwatch.testing import CapturingSink


def batch_of(steps=4, optimizers=1, **options):
    """What a sink gets of a training of two blocks, and the watcher."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    parts = [model] if optimizers == 1 else list(model)
    chosen = [torch.optim.SGD(part.parameters(), 0.01) for part in parts]
    sink = CapturingSink()
    with gradwatch.watch(model, chosen, sinks=[sink], **options) as watcher:
        for _ in range(steps):
            model(torch.randn(5, 3)).square().mean().backward()
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad()
    (batch,) = sink.batches
    return batch, watcher


def test_a_row_has_the_blocks_of_its_step():
    """The norms of the blocks are those of the history, and together that of the step."""
    batch, watcher = batch_of()
    rows = LoggerScalars(blocks=True).rows(batch)
    parameters = watcher.history.parameters().set_index(["step", "parameter"])["grad_norm"]
    for record, values in rows:
        blocks = [values["gradwatch_blocks/0"], values["gradwatch_blocks/1"]]
        assert math.isclose(math.hypot(*blocks), record.grad_norm, rel_tol=1e-6)
        both = [parameters[record.step, name] for name in ("0.weight", "0.bias")]
        assert math.isclose(blocks[0], math.hypot(*both), rel_tol=1e-6)
        assert values["gradwatch/grad_norm"] == record.grad_norm


def test_statistics_are_logged_where_they_are_taken():
    """With `every=2` every second row has them, each the largest of its block."""
    batch, watcher = batch_of(statistics=("max", "zeros"), every=2)
    rows = [values for _, values in LoggerScalars(statistics=True).rows(batch)]
    names = {"gradwatch_max/0", "gradwatch_max/1", "gradwatch_zeros/0", "gradwatch_zeros/1"}
    assert [names <= values.keys() for values in rows] == [
        step in set(watcher.history.parameters().dropna()["step"]) for step in (1, 2, 3, 4)
    ]
    taken = watcher.history.parameters().dropna().set_index(["step", "parameter"])["max"]
    step = taken.index[0][0]
    assert rows[step - 1]["gradwatch_max/0"] == max(taken[step, "0.weight"], taken[step, "0.bias"])
    assert not any(tag.startswith("gradwatch_blocks/") for values in rows for tag in values)


def test_each_optimizer_has_groups_of_its_own():
    """Tags of the second one carry its label, also those of its block, and nobody else's block."""
    batch, _ = batch_of(optimizers=2)
    rows = LoggerScalars(blocks=True).rows(batch)
    blocks = {tag for _, values in rows for tag in values if "_blocks/" in tag}
    assert blocks == {"gradwatch_blocks/0", "gradwatch-SGD-1_blocks/1"}


def test_nothing_more_than_was_asked_for():
    """Without blocks and statistics a row is what `of()` says of its step."""
    batch, _ = batch_of(statistics=("max",))
    scalars = LoggerScalars()
    assert [values for _, values in LoggerScalars().rows(batch)] == [
        scalars.of(record) for record in batch.steps
    ]


def test_a_step_can_be_read_with_its_norms_as_it_ends():
    """`on_each_step` hands out the step as a sink would get it."""
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batches, sink = [], CapturingSink()
    with gradwatch.watch(model, optimizer, sinks=[sink], clip=0.1) as watcher:
        watcher.on_each_step(lambda step: batches.append(step.batch()))
        for _ in range(3):
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    (together,) = sink.batches
    assert [batch.steps[0] for batch in batches] == together.steps
    for index, batch in enumerate(batches):
        assert batch.norms[0].tolist() == together.norms[index].tolist()
        assert batch.clipped_norms[0].tolist() == together.clipped_norms[index].tolist()
