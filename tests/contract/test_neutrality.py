"""A watcher that only watches changes nothing: weights, optimizer state, random numbers."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import gradwatch

from . import reference, zoo
from .watching import EVERY_STATISTIC, OPTIONS, STEPS, known
from .zoo import CLOSURES, OPTIMIZERS, Make


def _run(
    make_case: Callable[[], zoo.Case],
    make_optimizer: Make,
    options: dict[str, Any] | None,
    *,
    closure: bool = False,
    found: bool = False,
    micro_batches: int = 1,
    set_to_none: bool = True,
) -> dict[str, Any]:
    case = make_case()
    optimizer = make_optimizer(case.model.parameters())
    torch.manual_seed(77)
    watcher = None
    if options is not None:
        watcher = gradwatch.watch(case.model, None if found else optimizer, **options)
    losses = []
    with watcher or torch.enable_grad():
        for step in range(STEPS):

            def evaluate(step: int = step) -> Tensor:
                optimizer.zero_grad(set_to_none=set_to_none)
                for i in range(micro_batches):
                    loss = case.loss(case.model, case.batch(step * micro_batches + i))
                    loss.backward()
                return loss.detach()

            losses.append(optimizer.step(evaluate) if closure else evaluate())
            if not closure:
                optimizer.step()
    if watcher is not None:
        assert len(watcher.history.steps()) == STEPS
    return {
        "weights": reference.snapshot(case.model),
        "gradients": [p.grad for p in case.model.parameters()],
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "losses": losses,
        "training": [m.training for m in case.model.modules()],
    }


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_identical(name: str, found: bool) -> None:
    """Weights, gradients, optimizer state and generator after five watched steps are those of the bare loop."""
    bare = _run(zoo.dropout_mlp, OPTIMIZERS[name], None)
    watched = _run(zoo.dropout_mlp, OPTIMIZERS[name], {}, found=found)
    assert reference.identical(bare, watched)


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
@pytest.mark.parametrize("name", CLOSURES)
def test_training_with_a_closure_is_bit_identical(name: str, found: bool) -> None:
    """With a closure the weights, the state and the returned losses are those of the bare loop."""
    bare = _run(zoo.mlp, CLOSURES[name], None, closure=True)
    watched = _run(zoo.mlp, CLOSURES[name], {}, closure=True, found=found)
    assert reference.identical(bare, watched)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_way_of_watching_changes_the_training(options: str, closure: bool) -> None:
    """Sinks, failing sinks, statistics, limits and an infinite clip leave AdamW's run as it is."""
    bare = _run(zoo.dropout_mlp, OPTIMIZERS["AdamW"], None, closure=closure)
    watched = _run(zoo.dropout_mlp, OPTIMIZERS["AdamW"], OPTIONS[options](), closure=closure)
    assert reference.identical(bare, watched)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", ["skip", "raise", "every_statistic", "raising_sink"])
@pytest.mark.parametrize("name", CLOSURES)
def test_no_way_of_watching_changes_a_closure(name: str, options: str) -> None:
    """The same under LBFGS and the other closures."""
    bare = _run(zoo.mlp, CLOSURES[name], None, closure=True)
    watched = _run(zoo.mlp, CLOSURES[name], OPTIONS[options](), closure=True)
    assert reference.identical(bare, watched)


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to_none", "to_zero"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "lstm", "transformer", "complex_numbers", "mixed", "double"]
)
def test_every_model_is_trained_alike(name: str, micro_batches: int, set_to_none: bool) -> None:
    """Every kind of model, accumulated or not, gradients dropped or zeroed, trains as without gradwatch."""
    make, kind = getattr(zoo, name), {"micro_batches": micro_batches, "set_to_none": set_to_none}
    bare = _run(make, OPTIMIZERS["SGD_momentum"], None, **kind)
    options = {"statistics": known(EVERY_STATISTIC)}
    assert reference.identical(bare, _run(make, OPTIMIZERS["SGD_momentum"], options, **kind))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "statistics", [("norm",), EVERY_STATISTIC], ids=["norm", "every_statistic"]
)
def test_sparse_training_is_bit_identical(statistics: tuple[str, ...], micro_batches: int) -> None:
    """SparseAdam and SGD over sparse gradients train as without gradwatch, gradients uncoalesced or not alike."""
    options = {"statistics": known(statistics)}
    pairs: list[tuple[Callable[[], zoo.Case], Make]] = [
        (zoo.sparse_only, lambda p: torch.optim.SparseAdam(p, lr=0.1)),
        (zoo.sparse, lambda p: torch.optim.SGD(p, lr=0.1)),
        (zoo.sparse, lambda p: torch.optim.Adagrad(p, lr=0.1)),
    ]
    for make, optimizer in pairs:
        bare = _run(make, optimizer, None, micro_batches=micro_batches)
        watched = _run(make, optimizer, options, micro_batches=micro_batches)
        assert reference.identical(bare, watched)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph_is_bit_identical() -> None:
    """A loop that differentiates through its own gradients (create_graph=True) trains as without gradwatch."""
    results = []
    for watched in (False, True):
        case = zoo.mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        with gradwatch.watch(case.model, optimizer) if watched else torch.enable_grad():
            for index in range(STEPS):
                case.loss(case.model, case.batch(index)).backward(create_graph=True)
                penalty = sum(p.grad.pow(2).sum() for p in case.model.parameters())
                case.model.zero_grad()
                (case.loss(case.model, case.batch(index)) + 0.1 * penalty).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(reference.snapshot(case.model))
    assert reference.identical(*results)


def test_a_scheduler_works_as_ever_and_its_rate_is_recorded() -> None:
    """A learning-rate scheduler steps without a warning, and `lr` is the rate that the step used."""
    results = []
    for watched in (False, True):
        case = zoo.mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        watcher = gradwatch.watch(case.model, optimizer) if watched else None
        with watcher or torch.enable_grad():
            for index in range(STEPS):
                case.loss(case.model, case.batch(index)).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        results.append(reference.snapshot(case.model))
    assert reference.identical(*results)
    assert list(watcher.history.steps()["lr"]) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_the_users_own_hooks_still_run() -> None:
    """The user's parameter, tensor and optimizer hooks run as before, and see the same gradients."""
    seen: dict[bool, list[Any]] = {False: [], True: []}
    for watched in (False, True):
        case = zoo.mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        log = seen[watched]
        first = next(case.model.parameters())
        first.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad.clone()))
        first.register_hook(lambda grad, log=log: log.append(grad.clone()))
        optimizer.register_step_pre_hook(lambda *_, log=log: log.append("pre"))
        optimizer.register_step_post_hook(lambda *_, log=log: log.append("post"))
        with gradwatch.watch(case.model, optimizer) if watched else torch.enable_grad():
            for index in range(3):
                case.loss(case.model, case.batch(index)).backward()
                optimizer.step()
                optimizer.zero_grad()
        case.loss(case.model, case.batch(0)).backward()
        optimizer.step()
    assert reference.identical(seen[False], seen[True])


def test_watching_raises_no_warning_of_its_own() -> None:
    """A watched run of several models warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (zoo.mlp, zoo.sparse, zoo.complex_numbers, zoo.mixed):
            _run(make, OPTIMIZERS["SGD"], {})


def test_what_step_returns_is_untouched() -> None:
    """optimizer.step() returns None without a closure, and the closure's own object with one."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    loss = torch.tensor(3.0)
    with gradwatch.watch(case.model, optimizer):
        assert optimizer.step() is None
        assert optimizer.step(lambda: loss) is loss
        assert optimizer.step(closure=lambda: loss) is loss
