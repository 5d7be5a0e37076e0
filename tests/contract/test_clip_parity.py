"""ClipByNorm and ClipByValue leave what torch.nn.utils leaves, bit for bit, and harm no gradient beside a bad one."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradwatch
from tests.support import float64, zoo
from tests.support.state import identical, snapshot

_always = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
few = settings(max_examples=60, **_always)
some = settings(max_examples=25, **_always)


def _leaves(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]


def _arrive(leaves: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Let a real backward bring exactly these gradients."""
    torch.autograd.backward(list(leaves), [gradient.clone() for gradient in gradients])


def _torch_leaves(gradients: Sequence[Tensor], max_norm: float, p: float) -> list[Tensor]:
    leaves = _leaves(gradients)
    _arrive(leaves, gradients)
    torch.nn.utils.clip_grad_norm_(leaves, max_norm, norm_type=p)
    return [leaf.grad for leaf in leaves]


def _torch_norm(gradients: Sequence[Tensor], p: float = 2.0) -> float:
    leaves = _leaves(gradients)
    _arrive(leaves, gradients)
    return float(torch.nn.utils.clip_grad_norm_(leaves, math.inf, norm_type=p))


def _gradwatch_leaves(
    gradients: Sequence[Tensor], clip: Any, *, groups: int = 1, **options: Any
) -> tuple[list[Tensor], gradwatch.Watcher]:
    leaves = _leaves(gradients)
    parts = [{"params": leaves[i::groups]} for i in range(groups)][::-1]
    optimizer = torch.optim.SGD(parts, lr=0.0)
    named = {f"w{i}": leaf for i, leaf in enumerate(leaves)}
    with gradwatch.watch(named, optimizer, clip=clip, **options) as watcher:
        _arrive(leaves, gradients)
        optimizer.step()
    return [leaf.grad for leaf in leaves], watcher


@st.composite
def gradient_lists(draw: st.DrawFn) -> list[Tensor]:
    """One to eight float32 gradients of mixed shapes and magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = draw(
        st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=8)
    )
    powers = st.sampled_from([-30, -12, -4, 0, 0, 0, 3, 9, 15])
    return [
        torch.randn(shape, generator=generator) * (0.0 if draw(st.integers(0, 7)) == 0 else 1.0)
        * 10.0 ** draw(powers)
        for shape in shapes
    ]  # fmt: skip


max_norms = st.one_of(
    st.sampled_from([1e-30, 1e-12, 1e-6, 0.1, 1, 1.0, 5.0, 1e6, 1e30, math.inf]),
    st.floats(1e-8, 1e8),
)
norm_types = st.sampled_from([1, 1.0, 2, 2.0, 3.0, 0.5, math.inf])


@few
@given(gradients=gradient_lists(), max_norm=max_norms, p=norm_types)
def test_clip_by_norm_leaves_the_bits_of_clip_grad_norm(
    gradients: list[Tensor], max_norm: float, p: float
) -> None:
    """For any finite float32 gradients and any limit the gradients left are torch's, bit for bit."""
    assume(math.isfinite(_torch_norm(gradients, p)))
    expected = _torch_leaves(gradients, max_norm, p)
    left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(max_norm, norm_type=p))
    assert identical(left, expected)


@some
@given(gradients=gradient_lists(), scale=st.sampled_from([1.0, 1.0 - 2**-23, 1.0 + 2**-23]))
def test_a_limit_at_the_norm_itself(gradients: list[Tensor], scale: float) -> None:
    """Where max_norm is the norm itself, or one float beside it, torch's 1e-6 in the divisor is kept."""
    limit = _torch_norm(gradients) * scale
    limit = limit or 1.0
    left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(limit))
    assert identical(left, _torch_leaves(gradients, limit, 2.0))


@some
@given(gradients=gradient_lists(), max_norm=max_norms, groups=st.integers(2, 3))
def test_parameter_groups_do_not_change_the_bits(
    gradients: list[Tensor], max_norm: float, groups: int
) -> None:
    """However the optimizer orders its groups, the bits are those of clip_grad_norm_(model.parameters())."""
    expected = _torch_leaves(gradients, max_norm, 2.0)
    left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(max_norm), groups=groups)
    assert identical(left, expected)


@some
@given(gradients=gradient_lists(), max_norm=max_norms)
def test_a_number_means_clip_by_norm(gradients: list[Tensor], max_norm: float) -> None:
    """clip=m is ClipByNorm(m)."""
    by_number, _ = _gradwatch_leaves(gradients, max_norm)
    by_policy, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(max_norm))
    assert identical(by_number, by_policy)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("options", [{"on_nonfinite": "skip"}, {"on_nonfinite": "raise"},
                                     {"exploding_norm": 1.0}, {"statistics": ("norm", "max")}],
                         ids=lambda o: next(iter(o)) + "=" + str(next(iter(o.values()))))  # fmt: skip
def test_other_options_do_not_change_the_bits(options: dict[str, Any], p: float) -> None:
    """The clip leaves torch's bits whatever else is asked for."""
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(7, 5, generator=generator), torch.randn(11, generator=generator)]
    left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(0.7, norm_type=p), **options)
    assert identical(left, _torch_leaves(gradients, 0.7, p))


def _random(dtypes: Sequence[torch.dtype], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (3, 150, 41, 7, 190, 64)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_float64_has_the_bits_too(seed: int) -> None:
    """Gradients in float64 are left with torch's bits."""
    gradients = _random([torch.float64], seed)
    left, _ = _gradwatch_leaves(gradients, 0.7)
    assert identical(left, _torch_leaves(gradients, 0.7, 2.0))


@pytest.mark.parametrize("seed", range(5))
def test_mixed_float32_and_float64_differ_in_the_last_digit(seed: int) -> None:
    """Torch adds the norms up by dtype; the difference is that of another order of summation."""
    gradients = _random([torch.float64, torch.float32], seed)
    left, _ = _gradwatch_leaves(gradients, 0.7)
    for one, other in zip(left, _torch_leaves(gradients, 0.7, 2.0), strict=True):
        rtol = 1e-15 if one.dtype is torch.float64 else 2e-7
        torch.testing.assert_close(one, other, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_nearer_to_the_limit_than_torch(dtype: torch.dtype, mixed: bool) -> None:
    """Norm and factor are float32: each element is what float64 says, rounded once, which torch's is not."""
    off: list[float] = []
    for seed in range(8):
        gradients = _random([dtype, torch.float32] if mixed else [dtype], seed)
        left, watcher = _gradwatch_leaves(gradients, 0.7)
        norm = float64.total({str(i): float64.norm(one) for i, one in enumerate(gradients)})
        assert watcher.last is not None
        assert watcher.last.clip_coef == pytest.approx(0.7 / (norm + 1e-6), rel=1e-6)
        for one, before in zip(left, gradients, strict=True):
            exact = (before.double() * (0.7 / (norm + 1e-6))).to(one.dtype)
            torch.testing.assert_close(one, exact, rtol=4 * torch.finfo(one.dtype).eps, atol=0.0)
            if one.dtype is dtype:
                assert (one != exact).double().mean() < 0.01
        half = [i for i, one in enumerate(gradients) if one.dtype is dtype]
        torchs = _torch_leaves(gradients, 0.7, 2.0)
        factors = [torchs[i].double().norm() / gradients[i].double().norm() for i in half]
        off.append(max(abs(float(f) * norm / 0.7 - 1) for f in factors))
    assert max(off) > 1e-4


def test_a_scope_is_a_call_for_each_part() -> None:
    """By parameter the bits are those of a call each; by group the difference is some 1e-7."""
    gradients = _random([torch.float32], 0)
    left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(0.7, scope="parameter"))
    each = [_torch_leaves([one], 0.7, 2.0)[0] for one in gradients]
    assert identical(left, each)
    left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(0.7, scope="group"), groups=2)
    for start in (0, 1):
        expected = _torch_leaves(gradients[start::2], 0.7, 2.0)
        for one, other in zip(left[start::2], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=5e-7, atol=0.0)


def test_zero_gradients_stay_zero() -> None:
    """All-zero gradients are left zero, with coefficient 1 and nothing clipped."""
    left, watcher = _gradwatch_leaves([torch.zeros(3), torch.zeros(2, 2)], 1.0)
    assert all(not gradient.any() for gradient in left)
    row = watcher.history.steps().loc[1]
    assert (row["grad_norm"], row["clip_coef"], bool(row["clipped"])) == (0.0, 1.0, False)


def test_many_tensors() -> None:
    """Three hundred tensors, more than one foreach chunk, are left with torch's bits."""
    generator = torch.Generator().manual_seed(9)
    gradients = [torch.randn(13, 7, generator=generator) for _ in range(300)]
    for p in (1.0, 2.0, math.inf):
        left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(1.5, norm_type=p))
        assert identical(left, _torch_leaves(gradients, 1.5, p))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch use two threads, as on a user's machine."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_large_tensors(two_threads: None) -> None:
    """Tensors large enough for torch's threads are left with torch's bits."""
    generator = torch.Generator().manual_seed(9)
    gradients = [
        torch.randn(300_001, generator=generator),
        torch.randn(513, 1025, generator=generator),
    ]
    for p in (1.0, 2.0, math.inf):
        left, _ = _gradwatch_leaves(gradients, gradwatch.ClipByNorm(1.5, norm_type=p))
        assert identical(left, _torch_leaves(gradients, 1.5, p))


def test_not_contiguous_gradients() -> None:
    """Transposed, strided and channels-last gradients are left with torch's bits."""
    generator = torch.Generator().manual_seed(9)
    gradients = [
        torch.randn(33, 65, generator=generator).t(),
        torch.randn(2, 8, 5, 5, generator=generator).to(memory_format=torch.channels_last),
        torch.randn(40, generator=generator)[::2],
        torch.randn(1, generator=generator).expand(6),
    ]
    left, _ = _gradwatch_leaves(gradients, 0.5)
    assert identical(left, _torch_leaves(gradients, 0.5, 2.0))


def _train(
    make: Any, clip: Any, *, own: float | None = None, managed: bool = False, found: bool = False,
    fused: bool | None = None, micro_batches: int = 1,
) -> list[Tensor]:  # fmt: skip
    case = make()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.5, momentum=0.5, fused=fused)
    accumulate = micro_batches if managed else 1
    watcher = (
        gradwatch.watch(case.model, None if found else optimizer, clip=clip, accumulate=accumulate)
        if own is None
        else None
    )
    with watcher or torch.enable_grad():
        for index in range(5 * micro_batches):
            loss = case.loss(case.model, case.batch(index))
            if watcher is not None and managed:
                watcher.backward(loss)
                watcher.step()
                continue
            (loss / micro_batches).backward()
            if (index + 1) % micro_batches:
                continue
            if own is not None:
                torch.nn.utils.clip_grad_norm_(case.model.parameters(), own)
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(case.model)


@pytest.mark.parametrize("limit", [0.05, 0.3, 100.0])
@pytest.mark.parametrize(
    "how", ["named", "found", "managed", "fused", "managed_accumulated", "accumulated"]
)
@pytest.mark.parametrize("make", [zoo.mlp, zoo.cnn, zoo.lstm, zoo.transformer])
def test_five_clipped_steps_leave_the_weights_of_torchs_clip(
    make: Any, how: str, limit: float
) -> None:
    """Trained weights are those of a loop with clip_grad_norm_, from the first step on, however the optimizer came."""
    micro_batches = 2 if "accumulated" in how else 1
    fused = True if how == "fused" else None
    expected = _train(make, None, own=limit, fused=fused, micro_batches=micro_batches)
    trained = _train(
        make, limit, managed="managed" in how, found=how == "found", fused=fused,
        micro_batches=micro_batches,
    )  # fmt: skip
    if how == "fused":  # the kernel divides by the inverse of the coefficient
        for one, other in zip(trained, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    else:
        assert identical(trained, expected)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_sparse_gradients_are_clipped_like_their_dense_sum(p: float) -> None:
    """torch cannot clip sparse gradients; ClipByNorm leaves what clipping their dense sum leaves, and they stay sparse."""
    case, twin = zoo.sparse(), zoo.sparse()
    twin.model.table.sparse = False
    for one in (case, twin):
        optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
        watched = one is case
        clip = gradwatch.ClipByNorm(0.2, norm_type=p)
        with gradwatch.watch(one.model, optimizer, clip=clip) if watched else torch.enable_grad():
            one.loss(one.model, one.batch(0)).backward()
            if not watched:
                torch.nn.utils.clip_grad_norm_(one.model.parameters(), 0.2, norm_type=p)
            optimizer.step()
    assert case.model.table.weight.grad.is_sparse
    for left, expected in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(left.grad.to_dense(), expected.grad)
        torch.testing.assert_close(left, expected)


BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
POLICIES: dict[str, Callable[[], Any]] = {
    "p=1": lambda: gradwatch.ClipByNorm(1.0, norm_type=1),
    "p=2": lambda: gradwatch.ClipByNorm(1.0),
    "p=inf": lambda: gradwatch.ClipByNorm(1.0, norm_type=math.inf),
    "value": lambda: gradwatch.ClipByValue(1.0),
}


@pytest.mark.parametrize("large", [False, True], ids=["small_beside", "large_beside"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_does_not_spoil_the_others(bad: str, policy: str, large: bool) -> None:
    """Beside a NaN or an Inf every finite gradient stays finite, is not zeroed and keeps its direction."""
    generator = torch.Generator().manual_seed(1)
    good = torch.randn(6, generator=generator) * (50.0 if large else 0.01)
    poisoned = torch.randn(4, generator=generator)
    poisoned[1] = BAD[bad]
    left, watcher = _gradwatch_leaves([good, poisoned, good.clone()], POLICIES[policy]())
    for gradient in (left[0], left[2]):
        assert gradient.isfinite().all()
        assert torch.equal(gradient.sign(), good.sign())
        if policy != "value":
            torch.testing.assert_close(
                gradient / gradient.norm(), good / good.norm(), rtol=1e-5, atol=1e-6
            )
    assert watcher.history.steps().loc[1, "nonfinite_parameters"] == 1


@pytest.mark.parametrize("bad", BAD)
def test_finite_elements_beside_a_bad_one_in_the_same_gradient_stay_finite(bad: str) -> None:
    """The NaN does not spread inside its own gradient either."""
    poisoned = torch.tensor([0.5, BAD[bad], -0.25])
    left, _ = _gradwatch_leaves([poisoned, torch.ones(2)], 0.1)
    assert left[0][[0, 2]].isfinite().all()
    assert left[0][[0, 2]].ne(0).all()


def test_overflow_is_clipped_to_the_limit_or_as_torch_does() -> None:
    """Finite gradients whose float32 norm is infinite are left finite, with a norm that the record states."""
    left, watcher = _gradwatch_leaves([torch.full((4,), 3e38), torch.full((4,), 1.0)], 1.0)
    row = watcher.history.steps().loc[1]
    assert all(gradient.isfinite().all() for gradient in left)
    norm = float64.total({str(i): float64.norm(gradient) for i, gradient in enumerate(left)})
    assert norm <= 1.0 + 1e-6
    assert row["grad_norm"] == pytest.approx(6e38, rel=1e-5)
    assert row["grad_norm_clipped"] == pytest.approx(norm, rel=1e-5)
    assert row["clipped"]


@few
@given(
    gradients=gradient_lists(),
    limit=st.one_of(st.sampled_from([1e-6, 0.1, 1, 2.0, 1e9]), st.floats(1e-8, 1e8)),
)
def test_clip_by_value_leaves_the_bits_of_clip_grad_value(
    gradients: list[Tensor], limit: float
) -> None:
    """ClipByValue(v) leaves what clip_grad_value_(parameters, v) leaves, and records the norms of both sides."""
    expected = _leaves(gradients)
    _arrive(expected, gradients)
    torch.nn.utils.clip_grad_value_(expected, limit)
    left, watcher = _gradwatch_leaves(gradients, gradwatch.ClipByValue(limit))
    assert identical(left, [leaf.grad for leaf in expected])
    row = watcher.history.steps().loc[1]
    biggest = max(float(gradient.abs().max()) for gradient in gradients)
    assert bool(row["clipped"]) == (biggest > torch.tensor(float(limit)).item())
    norms = {str(i): float64.norm(gradient) for i, gradient in enumerate(left)}
    assert row["grad_norm_clipped"] == pytest.approx(float64.total(norms), rel=1e-4, abs=1e-18)


@pytest.mark.parametrize("make", [zoo.mlp, zoo.cnn])
def test_training_with_clip_by_value(make: Any) -> None:
    """Five steps with ClipByValue leave the weights of a loop with clip_grad_value_."""
    results: list[list[Tensor]] = []
    for watched in (True, False):
        case = make()
        optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
        clip = gradwatch.ClipByValue(0.01)
        with gradwatch.watch(case.model, optimizer, clip=clip) if watched else torch.enable_grad():
            for index in range(5):
                case.loss(case.model, case.batch(index)).backward()
                if not watched:
                    nn.utils.clip_grad_value_(case.model.parameters(), 0.01)
                optimizer.step()
                optimizer.zero_grad()
        results.append(snapshot(case.model))
    assert identical(*results)


def _train_with_a_closure(make: Any, steps: int) -> list[Any]:
    """Trains with gradwatch's clip, and with clip_grad_norm_ in the closure."""
    results = []
    for watched in (True, False):
        case = zoo.mlp()
        optimizer = make(case.model.parameters())

        def closure(
            case: zoo.Case = case, watched: bool = watched, optimizer: Any = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            loss = case.loss(case.model, case.batch(0))
            loss.backward()
            if not watched:
                nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
            return loss

        with gradwatch.watch(case.model, optimizer, clip=0.1) if watched else torch.enable_grad():
            for _ in range(steps):
                optimizer.step(closure)
        results.append(snapshot(case.model))
    return results


def test_lbfgs_with_a_closure_is_clipped_at_every_evaluation() -> None:
    """Under LBFGS every evaluation of the closure is clipped, as if the closure had called clip_grad_norm_."""
    results = _train_with_a_closure(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4), steps=3)
    assert identical(*results)


def test_an_ordinary_optimizer_with_a_closure_is_clipped() -> None:
    """A closure handed to an ordinary optimizer is clipped once, after its backward."""
    results = _train_with_a_closure(lambda p: torch.optim.SGD(p, lr=0.5), steps=5)
    assert identical(*results)
