"""What a progress bar shows."""

import math

import torch
from torch import nn
from tqdm import tqdm

import gradwatch


def _train(steps, poisoned=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(steps):
            factor = math.nan if step == poisoned else 1.0
            (model(torch.ones(2, 4)).square().mean() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher


def test_nothing_before_the_first_step():
    """A bar may be drawn before anything has happened."""
    assert _train(0).postfix() == {}


def test_the_norm_and_nothing_else_where_nothing_is_to_be_told():
    """Of a step that was applied as it was, the norm before the clip."""
    watcher = _train(3, clip=1e6)
    assert watcher.postfix() == {"grad_norm": f"{watcher.last.grad_norm:.3g}"}


def test_a_clip_and_a_skip_are_told():
    """The factor of a clipped step; how many steps were skipped so far; bad parameters of the newest."""
    watcher = _train(3, clip=0.1)
    assert watcher.postfix()["clip_coef"] == f"{watcher.last.clip_coef:.2g}"
    watcher = _train(3, poisoned=2, on_nonfinite="skip")
    assert watcher.postfix() == {"grad_norm": "nan", "nonfinite": "2", "skipped": "1"}


def test_it_waits_for_nothing(away):
    """On an accelerator it shows what has arrived, one step behind here, and leaves the rest under way."""
    with away.late(2):
        model = away.to(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer) as watcher:
            model(away.tensor(torch.ones(2, 4))).square().mean().backward()
            optimizer.step()
            assert watcher.postfix() == {}
            assert "grad_norm" in watcher.postfix()


def test_tqdm_takes_it(capsys):
    """bar.set_postfix(watcher.postfix()) shows the norm."""
    watcher = _train(1)
    with tqdm(total=1, ncols=200) as bar:
        bar.set_postfix(watcher.postfix())
    assert f"grad_norm={watcher.last.grad_norm:.3g}" in capsys.readouterr().err
