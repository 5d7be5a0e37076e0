"""The device that these tests run with is one for PyTorch, and does what CUDA does."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

from tests.support import device

ON_BOTH_STAND_INS = pytest.mark.skipif(
    device.NAME not in ("fake", "mini"), reason="a real device is not told what to do"
)
MODULE = getattr(torch, device.NAME)


def _ones(*size, **options):
    return torch.ones(size, device=device.DEVICE, **options)


def _pinned(*size):
    return torch.empty(size, pin_memory=True)


@ON_BOTH_STAND_INS
@pytest.mark.parametrize("kind", [torch.Event, MODULE.Event])
def test_a_copy_to_pinned_memory_comes_late(kind):
    """Until its event was polled often enough the host buffer holds something else."""
    with device.late(2):
        values, host = torch.arange(3.0).to(device.DEVICE), _pinned(3)
        event = kind(device=device.DEVICE)
        host.copy_(values, non_blocking=True)
        event.record()
        assert not event.query()
        assert host.tolist() != [0.0, 1.0, 2.0]
        assert [event.query(), event.query()] == [False, True]
    assert host.tolist() == [0.0, 1.0, 2.0]


def test_a_copy_that_may_be_late_goes_to_pinned_memory():
    """to("cpu", non_blocking=True) does not wait, and may be read after the device was waited for."""
    with device.counting() as counts:
        host = _ones(3).to("cpu", non_blocking=True)
        assert host.is_pinned()
        assert counts.waits == 0
    torch.accelerator.synchronize()
    assert host.tolist() == [1.0, 1.0, 1.0]


@ON_BOTH_STAND_INS
def test_an_event_is_of_one_stream():
    """That the default stream has been waited for says nothing of a copy on another one."""
    stream = torch.Stream(device=device.DEVICE)
    host = _pinned(2)
    with stream:
        host.copy_(_ones(2), non_blocking=True)
    event = torch.Event(device.DEVICE)
    event.record()  # on the default stream, which is empty
    event.synchronize()
    assert host.tolist() != [1.0, 1.0]
    torch.accelerator.current_stream().wait_stream(stream)
    torch.accelerator.current_stream().synchronize()
    assert host.tolist() == [1.0, 1.0]


@pytest.mark.skipif(len(device.DEVICES) < 2, reason="there is one device")
def test_an_event_is_recorded_on_the_current_device():
    """torch.cuda.Event.record() does the same: of a copy from the other device it says nothing."""
    host, event = _pinned(2), MODULE.Event()
    host.copy_(torch.ones(2, device=device.DEVICES[1]), non_blocking=True)
    event.record()
    event.synchronize()
    assert host.tolist() != [1.0, 1.0]
    event = MODULE.Event()
    event.record(torch.accelerator.current_stream(device.DEVICES[1]))
    event.synchronize()
    assert host.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ask", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x[0] > 0), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.copy_(torch.ones(3)), 1),
        (lambda x: x.copy_(_pinned(3), non_blocking=True), 0),
        (lambda x: x * 2 + torch.ones(()), 0),
        (lambda x: torch.where(x > 0, x, 0.0).norm(), 0),
    ],
)
@ON_BOTH_STAND_INS
def test_what_waits_is_counted(ask, waits):
    """A number, a mask, a comparison and a copy of pageable memory; nothing else."""
    x = _ones(3)
    with device.counting() as counts:
        ask(x)
    assert counts.waits == waits


@ON_BOTH_STAND_INS
def test_kernels_are_counted():
    """A view is none; a list of one dtype is one, of several dtypes one for each tensor."""
    single, mixed = [_ones(2), _ones(2)], [_ones(2), _ones(2, dtype=torch.bfloat16)]
    with device.counting() as counts:
        single[0].view(1, 2).t()
        single[0].detach()
        assert counts.kernels == 0
        norms = torch._foreach_norm(single)
        assert counts.kernels == 1
        torch._foreach_mul_(mixed, 2.0)
        assert counts.kernels == 3
    assert [round(norm.item(), 3) for norm in norms] == [1.414, 1.414]
    assert mixed[1].tolist() == [2.0, 2.0]


OTHERS = [torch.device("cpu"), *device.DEVICES[1:]]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, other: x + other,
        lambda x, other: torch.stack([x.sum(), other.sum()]),
        lambda x, other: torch.cat([x, other]),
        lambda x, other: other.sum().add_(x.sum()),
        lambda x, other: torch._foreach_mul_([x], other.sum()),
        lambda x, other: torch.where(other > 0, x, x),
    ],
)
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_devices_do_not_mix(mix, other):
    """As on CUDA, which takes a number in a tensor [] of the CPU, and nothing else."""
    with pytest.raises(RuntimeError, match="device"):
        mix(_ones(2), torch.ones(2, device=other))


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_lists_may_be_on_several_devices(other):
    """torch takes them one by one, each on its own device."""
    both = [_ones(2), torch.ones(2, device=other)]
    torch._foreach_mul_(both, 2.0)
    norms = torch._foreach_norm(both, dtype=torch.float64)
    assert [norm.device for norm in norms] == [x.device for x in both]
    assert [norm.item() for norm in norms] == [pytest.approx(8**0.5)] * 2


def test_hooks_run_in_a_thread_of_autograd():
    """A device's backward has a worker thread, which has none of the loop's frames."""
    threads = []
    x = _ones(2, requires_grad=True)
    x.register_hook(lambda gradient: threads.append(threading.current_thread()))
    x.sum().backward()
    assert threads != [threading.current_thread()]


def _linear():
    torch.manual_seed(0)
    return device.to(nn.Linear(3, 2))


def test_a_model_is_copied_saved_and_shown():
    """deepcopy(), torch.save() and repr() give what they give of a model on a GPU."""
    model = _linear()
    model(_ones(2, 3)).sum().backward()
    for other in (copy.deepcopy(model), _saved(model, weights_only=False)):
        assert isinstance(other.weight, nn.Parameter)
        assert other.weight is not model.weight
        assert torch.equal(other.weight, model.weight)
    state = _saved(model.state_dict(), weights_only=True)
    assert state["weight"].device == device.DEVICE
    assert _saved(state, map_location="cpu")["weight"].device.type == "cpu"
    assert f"device='{device.DEVICE}'" in repr(model.weight)
    assert copy.deepcopy(model.weight.grad).tolist() == model.weight.grad.tolist()


def _saved(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


def test_weights_that_are_tied_stay_so():
    """Also on a device whose move replaces the parameters."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    model = device.to(nn.Sequential(first, second))
    assert model[0].weight is model[1].weight


def test_a_parameter_gets_other_data():
    """`.data` reads and sets the numbers; zero_grad(set_to_none=False) keeps the gradient's tensor."""
    model = _linear()
    model.weight.data = _ones(2, 3)
    model.weight.data.mul_(2)
    assert model.weight.tolist() == [[2.0] * 3] * 2
    model(_ones(1, 3)).sum().backward()
    gradient = model.weight.grad
    model.zero_grad(set_to_none=False)
    assert model.weight.grad is gradient
    assert gradient.tolist() == [[0.0] * 3] * 2


def test_it_draws_from_its_own_generator():
    """manual_seed() seeds it; what is drawn on the CPU does not move it, nor the other way round."""
    torch.manual_seed(3)
    first = torch.rand(2, device=device.DEVICE)
    on_host = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), on_host)
    state = MODULE.get_rng_state(device.DEVICE)
    assert torch.equal(torch.rand(2, device=device.DEVICE), first)
    MODULE.set_rng_state(state, device.DEVICE)
    assert torch.equal(nn.functional.dropout(_ones(2)), nn.functional.dropout(_ones(2))) in (0, 1)
    MODULE.set_rng_state(state, device.DEVICE)
    assert torch.equal(torch.rand(2, device=device.DEVICE), first)


def test_autocast_casts():
    """What multiplies matrices is cast, and a loss is float32."""
    with torch.autocast(device.DEVICE.type, dtype=torch.bfloat16):
        out = _linear()(_ones(2, 3))
        loss = nn.functional.mse_loss(out, _ones(2, 2))
    assert out.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


@ON_BOTH_STAND_INS
def test_it_may_have_no_float64():
    """No tensor is made of it, and none converted to it, as with MPS."""
    with device.no_float64():
        for make in (lambda: _ones(2, dtype=torch.float64), lambda: _ones(2).double()):
            with pytest.raises(TypeError, match="float64"):
                make()
        with pytest.raises(TypeError, match="float64"):
            torch._foreach_norm([_ones(2)], dtype=torch.float64)
    assert _ones(2).double().dtype == torch.float64


WAITING = [
    lambda event: event.query(),
    lambda event: event.synchronize(),
    lambda event: _ones().item(),
    lambda event: _ones(2).cpu(),
    lambda event: torch.accelerator.synchronize(),
]


@ON_BOTH_STAND_INS
@pytest.mark.parametrize("ask", WAITING)
def test_it_may_fail(ask):
    """After an error on the device every event and every wait raises it."""
    event = torch.Event(device.DEVICE)
    event.record()
    with (
        device.failing(RuntimeError("device-side assert")),
        pytest.raises(RuntimeError, match="assert"),
    ):
        ask(event)


@ON_BOTH_STAND_INS
@pytest.mark.parametrize("ask", [*WAITING, lambda event: _pinned(2)])
def test_a_stream_may_be_captured(ask):
    """What a graph cannot hold raises; kernels, and asynchronous copies, are captured."""
    event, host = torch.Event(device.DEVICE), _pinned(2)
    event.record()
    with device.capturing():
        assert MODULE.is_current_stream_capturing()
        host.copy_(_ones(2) * 2, non_blocking=True)
        with pytest.raises(RuntimeError, match="capturing"):
            ask(event)
    assert not MODULE.is_current_stream_capturing()
