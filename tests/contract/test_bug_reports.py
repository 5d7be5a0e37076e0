"""What gradwatch answers in loops from public bug reports; the right answer is computed apart.

The truth about a NaN comes from hooks of the test's own: which parameter received it first, and how
many of its elements. Norms are computed in float64 from the gradients that the loop saw.
"""

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.report.finding import Finding

from .poison import bad_events

NAN = math.nan
Named = Iterable[tuple[str, nn.Parameter]]


class Arrivals:
    """Which parameters received a bad gradient, in order: (name, NaN elements, Inf elements)."""

    def __init__(self, named: Named) -> None:
        self.bad: list[tuple[str, int, int]] = []
        for name, parameter in named:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._see(name, p))

    def _see(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if not torch.isfinite(gradient).all():
            self.bad.append((name, int(gradient.isnan().sum()), int(gradient.isinf().sum())))


def norm_of(parameters: Iterable[Tensor]) -> float:
    """Return the L2 norm of all gradients, in float64."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def mlp(*widths: int) -> nn.Sequential:
    """Return Linear layers with a Tanh between each two."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def finding(watcher: gradwatch.Watcher, kind: str) -> Finding:
    """Return the report's finding of a kind."""
    return next(f for f in watcher.report().findings if f.kind == kind)


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int = 24,
    between: Callable[[int], None] = lambda step: None,
    lr: float = 0.01,
    **options: Any,
) -> gradwatch.Watcher:
    """Run a plain loop; `between` is called between backward and step."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss(step).backward()
            between(step)
            optimizer.step()
    return watcher


def says_nothing_false(watcher: gradwatch.Watcher, *allowed: str) -> None:
    """Assert that a healthy run has no event and no finding but those allowed."""
    assert set(watcher.history.events()["kind"]) <= set(allowed)
    assert set(watcher.report().kinds) <= set(allowed)


# Where a NaN began


def inactive_branch(x: Tensor) -> Tensor:
    """pytorch/pytorch#187297: where() with an inactive sqrt; finite, but its gradient is not."""
    return torch.where(x > 0, x.sqrt(), x)


def zero_over_zero(x: Tensor) -> Tensor:
    """pytorch/pytorch#16317: 0/0 in one element, masked away afterwards."""
    count = torch.ones_like(x)
    count[0, 0] = 0
    return torch.where(count == 0, torch.zeros_like(x), x * count / count)


def norm_of_zero(x: Tensor) -> Tensor:
    """pytorch/pytorch#2421: the norm of a vector that is exactly 0, written by hand."""
    return (x - x.detach()).square().sum(1).sqrt()


def hidden_nan(x: Tensor) -> Tensor:
    """pytorch/pytorch#94700: nan_to_num hides a NaN in the forward only."""
    return (x * torch.tensor([NAN, 1.0, 1.0])).nan_to_num(0)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("function", [inactive_branch, zero_over_zero, norm_of_zero, hidden_nan])
def test_a_nan_of_the_backward_is_placed(
    function: Callable[[Tensor], Tensor], micro_batch: int
) -> None:
    """Step, micro-batch, first parameter and counts are those that hooks of one's own see."""
    model = mlp(4, 5, 3)
    truth, first = Arrivals(model.named_parameters()), list[tuple[str, int, int]]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        for step in range(1, 24):
            optimizer.zero_grad()
            for batch in range(1, 4):
                out = model(torch.randn(6, 4)) - 1
                bad = step == 21 and batch == micro_batch
                (function(out) if bad else out).mean().backward()
                first = first or list(truth.bad)
            optimizer.step()
    event = bad_events(watcher).iloc[0]
    assert (event["step"], event["micro_batch"]) == (21, micro_batch)
    assert (event["parameter"], event["nan_count"], event["inf_count"]) == first[0]
    assert watcher.history.steps()["nonfinite_parameters"][21] == len(
        {name for name, *_ in truth.bad}
    )
    assert f"micro-batch {micro_batch}" in finding(watcher, str(event["kind"])).title


def test_a_masked_row_of_attention() -> None:
    """pytorch/pytorch#41508: the loss leaves the masked row out, in_proj is NaN, the head is not."""
    torch.manual_seed(0)
    attention, head = nn.MultiheadAttention(4, 1, batch_first=True), nn.Linear(4, 1)
    model = nn.ModuleDict({"attention": attention, "head": head})
    truth = Arrivals(model.named_parameters())

    def loss(step: int) -> Tensor:
        x, mask = torch.randn(2, 3, 4), torch.zeros(3, 3)
        mask[2, :] = -math.inf if step == 21 else 0
        return head(attention(x, x, x, attn_mask=mask)[0][:, :2]).square().mean()

    watcher = train(model, loss, on_nonfinite="skip")
    event = bad_events(watcher).iloc[0]
    assert (event["parameter"], event["nan_count"], event["inf_count"]) == truth.bad[0]
    assert event["module"].startswith("attention")
    assert watcher.history.steps()["nonfinite_parameters"][21] == len(truth.bad)


def test_a_checkpoint_with_a_nan() -> None:
    """A NaN among the weights is there in the first step: no batch is to blame."""
    model = mlp(4, 5, 2)
    next(model.parameters()).data[0, 0] = NAN
    watcher = train(
        model,
        lambda step: model(torch.randn(8, 4)).square().mean(),
        on_nonfinite="skip",
        max_consecutive_skips=100,
    )
    advice = finding(watcher, "nan").advice
    assert "initial weights" in advice
    assert "single bad batch" not in advice


def test_an_inf_before_the_clip() -> None:
    """pytorch/pytorch#46849: the clip makes a NaN of an Inf; the event is the Inf of the backward."""
    leaves = {name: nn.Parameter(torch.randn(6)) for name in "abc"}
    optimizer = torch.optim.SGD(list(leaves.values()), 0.01)
    with gradwatch.watch(leaves, optimizer) as watcher:
        for factor in ([1.0], [1.0, math.inf]):
            for value in factor:
                scale = torch.ones(6)
                scale[2] = value
                (sum(p.sum() for p in leaves.values()) + (leaves["b"] * scale).sum()).backward()
            torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    event = bad_events(watcher).iloc[0]
    assert (event["kind"], event["parameter"], event["micro_batch"]) == ("inf", "b", 2)
    assert (event["nan_count"], event["inf_count"]) == (0, 1)


def divided_by_zero(model: nn.Module) -> None:
    """As a count of tokens that is 0 does to gradients of 0."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(0.0).div_(0.0)


def clipped_by_inf(model: nn.Module) -> None:
    """As a clip "only to log the norm" does where the norm overflows."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(1e30)
    torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)


def written(model: nn.Module) -> None:
    """One parameter's gradient is written to."""
    gradient = model.get_parameter("2.weight").grad
    assert gradient is not None
    gradient[0] = NAN


def replaced(model: nn.Module) -> None:
    """Gradients are set anew, as DP-SGD by hand does."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, NAN)


@pytest.mark.parametrize("spoil", [divided_by_zero, clipped_by_inf, written, replaced])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_nan_after_the_backward_has_no_order(
    spoil: Callable[[nn.Module], None], micro_batches: int, policy: str
) -> None:
    """A NaN made between backward and step is told so: no first in order, no batch to look at."""
    model = mlp(4, 5, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite=policy) as watcher:
        for step in range(1, 24):
            optimizer.zero_grad()
            for _ in range(micro_batches):
                model(torch.randn(8, 4)).square().mean().backward()
            if step == 22:
                spoil(model)
            optimizer.step()
    events = bad_events(watcher)
    events = events[events["step"] == 22]
    message = " ".join(events["message"])
    assert len(events) > 0
    assert "first in backward order" not in message
    assert re.search(r"between|after (the|its|their) (last )?backward", message)
    assert not re.search(r"in micro-batch \d", message)
    told = finding(watcher, "nan")
    assert "micro-batch" not in told.title
    assert "data of micro-batch" not in told.advice
    assert "single bad batch" not in told.advice
    if spoil is written:
        assert set(events["parameter"]) == {"2.weight"}
        assert set(events["nan_count"]) == {5}


def test_a_nan_between_two_micro_batches() -> None:
    """The backward after it is not to blame, nor is its batch."""
    model = mlp(4, 5, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        for step in range(1, 24):
            optimizer.zero_grad()
            for batch in range(2):
                model(torch.randn(8, 4)).square().mean().backward()
                gradient = model.get_parameter("0.weight").grad
                assert gradient is not None
                if step == 21 and batch == 0:
                    gradient.fill_(NAN)
            optimizer.step()
    message = " ".join(bad_events(watcher)["message"])
    assert "first in backward order, in micro-batch 2" not in message
    assert "data of micro-batch 2" not in finding(watcher, "nan").advice


def test_a_hook_that_repairs_gradients() -> None:
    """ultralytics/yolov5#8598: what a hook has made finite never was in a gradient."""
    model, norms = mlp(4, 5, 2), list[float]()
    for parameter in model.parameters():
        parameter.register_hook(lambda g: g.nan_to_num(0, 0, 0))
    watcher = train(
        model,
        lambda step: model(torch.randn(8, 4) * (NAN if step == 21 else 1)).square().mean(),
        between=lambda step: norms.append(norm_of(model.parameters())),
    )
    assert watcher.history.steps()["grad_norm"].tolist() == pytest.approx(norms)
    assert bad_events(watcher).empty


def test_double_backward_of_a_gradient_penalty() -> None:
    """pytorch/pytorch#2534: a penalty whose inner gradient is 0; autograd.grad is no micro-batch."""
    model = mlp(3, 8, 1)
    truth = Arrivals(model.named_parameters())

    def loss(step: int) -> Tensor:
        x = torch.randn(6, 3, requires_grad=True)
        out = model(x) * (0.0 if step == 21 else 1.0)
        (inner,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return model(x.detach()).mean() + (inner.square().sum(1).sqrt() - 1).square().mean()

    watcher = train(model, loss, on_nonfinite="skip")
    event = bad_events(watcher).iloc[0]
    assert (event["step"], event["parameter"], event["nan_count"]) == (21, *truth.bad[0][:2])
    assert set(watcher.history.steps()["micro_batches"]) == {1}


# What a skip leaves


def batch_norm(momentum: float | None) -> Callable[[], nn.Module]:
    """pytorch/pytorch#1206: running statistics that became NaN."""
    return lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=momentum))


class OwnStatistics(nn.Module):
    """A buffer of the model's own, which its forward writes to."""

    seen: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.seen += 1
        return self.layer(x - self.mean)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("make", [batch_norm(0.1), batch_norm(None), OwnStatistics])
def test_a_skipped_step_leaves_no_trace(
    make: Callable[[], nn.Module], bad: float, accumulate: int
) -> None:
    """Weights, optimizer and buffers are those of a run in which the window was left out."""

    def run(left_out: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, data = make(), torch.randn(8, accumulate, 16, 4)
        data[5, 0, 3, 2] = bad
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        with gradwatch.watch(
            model, optimizer, accumulate=accumulate, on_nonfinite="skip"
        ) as watcher:
            for step, window in enumerate(data):
                if step == 5 and left_out:
                    continue
                for x in window:
                    watcher.backward(model(x).square().mean())
                    watcher.step()
        return model.state_dict()

    expected, state = run(left_out=True), run(left_out=False)
    different = [name for name in state if not torch.equal(expected[name], state[name])]
    assert different == []


@pytest.mark.parametrize("evaluation", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_meets_a_nan(search: str | None, step: int, evaluation: int) -> None:
    """pytorch/pytorch#5953: a NaN in any evaluation of a step; weights go back, and on it goes."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(20, 3).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=5, line_search_fn=search, tolerance_grad=0
    )
    calls = 0

    def evaluate(bad: bool) -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean() + model.weight.pow(4).sum()
        loss = loss * (NAN if bad and calls == evaluation else 1)
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        for number in range(4):
            before, calls = copy.deepcopy(model.state_dict()), 0
            optimizer.step(lambda number=number: evaluate(number == step))
            same = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
            assert same == (number == step)
    outcomes = watcher.history.steps()["outcome"].tolist()
    assert outcomes == ["skipped_nonfinite" if n == step else "applied" for n in range(4)]


# Numbers


@pytest.mark.parametrize("ids", [[3, 3, 7], [0], [5, 6, 5, 6, 49]])
def test_statistics_of_a_sparse_gradient(ids: list[int]) -> None:
    """pytorch/pytorch#4829: unset rows are zeros, and repeated rows are one."""
    torch.manual_seed(0)
    model = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(
        model, optimizer, statistics=("norm", "max", "mean", "std", "zeros")
    ) as watcher:
        (model(torch.tensor(ids)) * torch.tensor([1.0, -2.0, 0.5, 0.0])).sum().backward()
        assert model.weight.grad is not None
        dense = model.weight.grad.to_dense().double()
        optimizer.step()
    row = watcher.history.parameters().iloc[0]
    expected = {
        "grad_norm": dense.norm(),
        "max": dense.abs().max(),
        "mean": dense.mean(),
        "std": dense.std(unbiased=False),
        "zeros": (dense == 0).double().mean(),
    }
    assert row[list(expected)].astype(float).to_dict() == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )


def test_the_largest_magnitude_of_complex_elements() -> None:
    """google-deepmind/optax#144: a complex element counts by its magnitude."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([weight], 0.1)
    with gradwatch.watch({"w": weight}, optimizer, statistics=("norm", "max")) as watcher:
        (weight * torch.tensor([3 - 4j, 1 + 2j])).real.sum().backward()
        optimizer.step()
    row = watcher.history.parameters().iloc[0]
    assert row["max"] == pytest.approx(5)
    assert row["grad_norm"] == pytest.approx(math.sqrt(30))


@pytest.mark.parametrize(
    "rate", [None, "relative", lambda step: 0.1 / step], ids=["none", "text", "function"]
)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_learning_rate_that_is_no_number(rate: Any, clip: float | None) -> None:
    """huggingface/transformers#11612: Adafactor with lr=None; norms, clip and report go on."""

    class Relative(torch.optim.Optimizer):
        def __init__(self, parameters: Iterable[Tensor]) -> None:
            super().__init__(parameters, {"lr": rate})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(parameter.grad, alpha=-0.01)

    model = mlp(3, 4, 1)
    optimizer, norms = Relative(model.parameters()), list[float]()
    with gradwatch.watch(model, optimizer, clip=clip) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            norms.append(norm_of(model.parameters()))
            optimizer.step()
    steps = watcher.history.steps()
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert steps["lr"].isna().all()
    if clip:
        assert steps["clip_coef"].tolist() == pytest.approx(
            [min(1, clip / n) for n in norms], rel=1e-4
        )
    str(watcher.report())


def test_the_report_names_the_rate_of_its_parameter() -> None:
    """open-mmlab/mmengine#482: a log shows the first group's rate, 0.0001, and not the one in use."""
    model = mlp(8, 16, 1)
    rates = [
        {"params": model[0].parameters(), "lr": 1e-4},
        {"params": model[2].parameters(), "lr": 2},
    ]
    optimizer = torch.optim.Adam(rates)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(40):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
    assert "(0.0001)" not in finding(watcher, "unstable_start").advice


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_checkpoint_wrapped_module"])
def test_names_that_look_wrapped(wrapper: str) -> None:
    """Two parameters whose names differ by a wrapper's prefix keep a name and a norm each."""
    torch.manual_seed(0)
    model = nn.Module()
    model.head = nn.Linear(2, 1)
    model.add_module(wrapper, nn.ModuleDict({"head": nn.Linear(2, 1)}))
    inner = model.get_submodule(f"{wrapper}.head")
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            (model.head(torch.ones(1, 2)) + 3 * inner(torch.ones(1, 2))).sum().backward()
            optimizer.step()
    assert len(set(watcher.history.names)) == 4
    first = watcher.history.parameters().query("step == 1")
    assert sorted(first["grad_norm"]) == pytest.approx([1, math.sqrt(2), 3, math.sqrt(18)])
    assert len(watcher.history.flow()) == 4
    str(watcher.report())


class TurnedRound:
    """A policy that takes half of the gradient, the other way."""

    norm_type, scope = 2.0, "global"

    def decide(self, norm: Tensor) -> gradwatch.ClipDecision:
        return gradwatch.ClipDecision(torch.full_like(norm, -0.5))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_norm_after_a_turn_is_no_less_than_zero() -> None:
    """The factor of a clip that reverses gradients is negative; the norm that it leaves is not."""
    model = mlp(3, 4, 1)
    watcher = train(
        model, lambda step: model(torch.randn(5, 3)).square().mean(), steps=3, clip=TurnedRound()
    )
    steps = watcher.history.steps()
    assert steps["clip_coef"].tolist() == [-0.5] * 3
    assert steps["grad_norm_clipped"].tolist() == pytest.approx((steps["grad_norm"] / 2).tolist())


# Loops whose backwards are not micro-batches of one loss


def real_and_fake(model: nn.Module) -> None:
    """The discriminator of a GAN, FoundationVision/OmniTokenizer#15 among many."""
    bce = F.binary_cross_entropy_with_logits
    bce(model(torch.randn(8, 4) + 1), torch.ones(8, 1)).backward()
    bce(model(torch.randn(8, 4) - 1), torch.zeros(8, 1)).backward()


def two_losses(model: nn.Module) -> None:
    """Two losses of one batch."""
    x = torch.randn(8, 4)
    (model(x) - x[:, :1]).square().mean().backward()
    (model(x) + x[:, 1:2] + 1).abs().mean().backward()


def separate_parts(model: nn.Module) -> None:
    """A loss each for the first and the last layer, which share no parameter."""
    x = torch.randn(8, 4)
    model.get_submodule("0")(x).add(x.sum(1, keepdim=True) + 2).square().mean().backward()
    model.get_submodule("2")(torch.randn(8, 5)).add(3).square().mean().backward()


def chunks(model: nn.Module) -> None:
    """The loss of the head in chunks, then the body once."""
    x = torch.randn(16, 4)
    hidden = model.get_submodule("0")(x)
    leaf = hidden.detach().requires_grad_()
    for part in leaf.chunk(4):
        (model.get_submodule("2")(part).add(1).square().mean() / 4).backward()
    hidden.backward(leaf.grad)


@pytest.mark.parametrize("backwards", [real_and_fake, two_losses, separate_parts, chunks])
def test_no_noise_scale_is_claimed(backwards: Callable[[nn.Module], None]) -> None:
    """Only exchangeable backwards have a noise scale; for others a reason is given."""
    model, norms = mlp(4, 5, 1), list[float]()
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(60):
            optimizer.zero_grad()
            backwards(model)
            norms.append(norm_of(model.parameters()))
            optimizer.step()
    steps = watcher.history.steps()
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert not watcher.noise_scale.valid
    assert watcher.noise_scale.reason
    # Where the graphs are the same, only the numbers of many steps tell. No estimate counts before.
    since = 20 if backwards is real_and_fake else 1
    assert steps["noise_scale"].loc[since:].isna().all()
    assert steps["noise_scale_low"].isna().all()
    if backwards is chunks:
        assert set(steps["micro_batches"]) == {1}
    says_nothing_false(watcher)


def test_honest_micro_batches_have_a_noise_scale() -> None:
    """karpathy/nanoGPT#206: divided by their number or not; by hand it is 3.5 micro-batches of 2."""
    # g = 2x(x.d), so that E g = 2d, and tr(Sigma) = E |g|^2 - |E g|^2 = (4 (6 + 2) - 4) |d|^2.
    found = {}
    for divisor in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(6, 1, bias=False)
        nn.init.constant_(model.weight, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with gradwatch.watch(model, optimizer) as watcher:
            for _ in range(200):
                optimizer.zero_grad()
                for _ in range(4):
                    x = torch.randn(2, 6)
                    loss = (model(x) - x.sum(1, keepdim=True)).square().mean() / divisor
                    loss.backward()
                optimizer.step()
        found[divisor] = watcher.noise_scale
    assert found[1].b_simple == pytest.approx(found[4].b_simple, rel=1e-3)
    assert found[1].valid
    assert found[1].low <= 3.5 <= found[1].high


def test_sharpness_aware_minimization() -> None:
    """davda54/sam#32: the second gradient is the step's, the first is not thrown away."""
    model, norms = mlp(4, 8, 1), list[float]()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(30):
            x = torch.randn(16, 4)
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            with torch.no_grad():
                total = norm_of(parameters)
                moves = [0.05 / total * p.grad for p in parameters if p.grad is not None]
                torch._foreach_add_(parameters, moves)
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            norms.append(norm_of(parameters))
            with torch.no_grad():
                torch._foreach_sub_(parameters, moves)
            optimizer.step()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert set(steps["micro_batches"]) == {1}
    says_nothing_false(watcher)


# Rows, names and verdicts


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("early", ["entered", "backward"])
def test_reading_before_the_first_step(early: str, named: bool) -> None:
    """flush() and state_dict() before the first step make no row of their own."""
    model = mlp(3, 4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradwatch.watch(model, optimizer if named else None) as watcher:
        for step in range(3):
            if early == "entered":
                watcher.flush()
                watcher.state_dict()
            model(torch.randn(4, 3)).mean().backward()
            if early == "backward" and step == 0:
                watcher.flush()
                watcher.state_dict()
            optimizer.step()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    assert steps.index.tolist() == [1, 2, 3]
    assert set(steps["optimizer"]) == {"SGD"}


def test_a_checkpoint_whose_input_needs_no_gradient() -> None:
    """huggingface/transformers#21381: the layers inside never get a gradient; only they are named."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 8), nn.Linear(8, 1)
    model = nn.ModuleDict({"encoder": encoder, "head": head})

    def loss(step: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the gradients will be None
            return head(checkpoint(encoder, torch.randn(8, 4), use_reentrant=True)).square().mean()

    events = train(model, loss).history.events()
    assert set(events["kind"]) == {"no_gradient"}
    assert sorted(events["parameter"]) == ["encoder.bias", "encoder.weight"]


class RootMeanSquare(nn.Module):
    """As in Llama: computed in float32, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Through(nn.Module):
    """A layer that is called in a way of its own."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = nn.Linear(4, 4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "root mean square": lambda: nn.Sequential(nn.Linear(4, 4), RootMeanSquare(), nn.Linear(4, 2)),
    "float inside": lambda: Through(lambda layer, x: layer(x).float().tanh()),
    "reentrant": lambda: Through(lambda layer, x: checkpoint(layer, layer(x), use_reentrant=True)),
    "not reentrant": lambda: Through(lambda layer, x: checkpoint(layer, x, use_reentrant=False)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)),
    "complex": lambda: Through(lambda layer, x: torch.view_as_real(torch.fft.fft(layer(x)))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_are_called_right(name: str) -> None:
    """What only looks hard to check is checked, and is right."""
    torch.manual_seed(0)
    gradwatch.check_gradients(RIGHT[name](), torch.randn(5, 4)).raise_if_wrong()


BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sign": lambda x, g: -g * x.cos(),
    "factor": lambda x, g: 1.01 * g * x.cos(),
    "zero": lambda x, g: torch.zeros_like(g),
    "no chain rule": lambda x, g: x.cos(),
    "straight through": lambda x, g: g,
    "rows": lambda x, g: (g * x.cos()).flip(0),
    "columns": lambda x, g: (g * x.cos()).flip(1),
    "clamped": lambda x, g: (g * x.cos()).clamp(-1e-3, 1e-3),
    "derivative of the output": lambda x, g: g * x.sin().cos(),
    "a column lost": lambda x, g: g * x.cos() * torch.tensor([1, 1, 1, 0]),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_wrong_gradients_are_called_wrong(name: str) -> None:
    """A sine whose backward is wrong, in the middle of a model, is named."""

    class WrongSine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return BACKWARDS[name](ctx.saved_tensors[0], gradient)

    torch.manual_seed(0)
    middle = Through(lambda layer, x: WrongSine.apply(layer(x)))
    model = nn.Sequential(nn.Linear(4, 4), middle, nn.Tanh(), nn.Linear(4, 1))
    result = gradwatch.check_gradients(model, torch.randn(6, 4))
    assert not result
    assert "WrongSine" in str(result)


def test_what_a_compiler_made_is_checked() -> None:
    """A backend whose code has a wrong gradient is found out, or the check says why it cannot run."""

    def backend(graph: Any, inputs: Any) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *arguments: tuple(o * o.detach() for o in graph.forward(*arguments))

    torch.manual_seed(0)
    model = torch.compile(mlp(4, 3, 2), backend=backend)
    x = torch.randn(5, 4)
    model(x)
    try:
        found_out = not gradwatch.check_gradients(model, x)
    except (TypeError, ValueError) as error:
        found_out = "compile" in str(error)
    assert found_out


def test_a_mean_over_tokens() -> None:
    """meta-pytorch/torchtune#1875: a managed window is the whole batch at once, loss and norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    whole = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    losses, norms = [], []
    with gradwatch.watch(model, optimizer, accumulate=3) as watcher:
        for window in range(4):
            parts = [torch.randint(0, 11, (count,)) for count in (2, 7, 1 + window)]
            whole.zero_grad()
            loss = F.cross_entropy(whole(torch.cat(parts)), torch.cat(parts))
            loss.backward()
            losses.append(loss.item())
            norms.append(norm_of(whole.parameters()))
            for part in parts:
                watcher.backward(F.cross_entropy(model(part), part), weight=len(part))
                watcher.step()
    steps = watcher.history.steps()
    assert steps["loss"].tolist() == pytest.approx(losses)
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert steps["weight"].tolist() == [10, 11, 12, 13]
