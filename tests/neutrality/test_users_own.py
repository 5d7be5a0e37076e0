"""What users have around their step goes on as ever: schedulers, hooks, second derivatives."""

import pytest
import torch
from torch.optim import lr_scheduler

import gradwatch
from tests.support.state import differences, pieces
from tests.support.zoo import make_case

STEPS = 5


def _bare_and_watched():
    """Yields a model, its optimizer and its watcher, which is None the first time."""
    for watched in (False, True):
        case = make_case("mlp", dropout=0.0)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        yield case, optimizer, gradwatch.watch(case.model, optimizer) if watched else None


def _weights(case):
    return pieces(dict(case.model.named_parameters()))


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph_is_bit_identical():
    """A loop that differentiates through its own gradients (create_graph=True) trains as without gradwatch."""
    results = []
    for case, optimizer, watcher in _bare_and_watched():
        with watcher or torch.enable_grad():
            for index in range(STEPS):
                case.loss(case.model, case.batch(index)).backward(create_graph=True)
                penalty = sum(p.grad.pow(2).sum() for p in case.model.parameters())
                case.model.zero_grad()
                (case.loss(case.model, case.batch(index)) + 0.1 * penalty).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(_weights(case))
    assert list(differences(*results)) == []


def test_a_scheduler_works_as_ever_and_its_rate_is_recorded():
    """A learning-rate scheduler steps without a warning, and `lr` is the rate that the step used."""
    results = []
    for case, optimizer, watcher in _bare_and_watched():
        scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        with watcher or torch.enable_grad():
            for index in range(STEPS):
                case.loss(case.model, case.batch(index)).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        results.append(_weights(case))
    assert list(differences(*results)) == []
    assert list(watcher.history.steps()["lr"]) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_the_users_own_hooks_still_run():
    """The user's parameter, tensor and optimizer hooks run as before, and see the same gradients."""
    logs = []
    for case, optimizer, watcher in _bare_and_watched():
        log = []
        first = next(case.model.parameters())
        first.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad.clone()))
        first.register_hook(lambda grad, log=log: log.append(grad.clone()))
        optimizer.register_step_pre_hook(lambda *_, log=log: log.append("pre"))
        optimizer.register_step_post_hook(lambda *_, log=log: log.append("post"))
        with watcher or torch.enable_grad():
            for index in range(3):
                case.loss(case.model, case.batch(index)).backward()
                optimizer.step()
                optimizer.zero_grad()
        case.loss(case.model, case.batch(0)).backward()
        optimizer.step()
        logs.append(log)
    assert len(logs[0]) == 4 * 4
    assert list(differences(*logs)) == []


def test_what_step_returns_is_untouched():
    """optimizer.step() returns None without a closure, and the closure's own object with one."""
    case = make_case("mlp")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    loss = torch.tensor(3.0)
    with gradwatch.watch(case.model, optimizer):
        assert optimizer.step() is None
        assert optimizer.step(lambda: loss) is loss
        assert optimizer.step(closure=lambda: loss) is loss
