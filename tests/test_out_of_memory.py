"""Running out of memory, and taking the batch back."""

import gc
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn

from gradwatch.out_of_memory import Rollback, forget, is_out_of_memory, release_memory
from tests.support import processes
from tests.support.calls import CountCalls
from tests.support.launch import mesh_of_one
from tests.support.memory import LIMIT_MEMORY

CPU = torch.device("cpu")


def _caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 2359296 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you "
            "tried to allocate 31850496000 bytes."
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("XPU out of memory. Tried to allocate 1.71 GiB (GPU 0; 15.56 GiB total)"),
        RuntimeError("HIP out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB, other allocations: 1 MB)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError(
            "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
        ),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830'
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
        _caused(RuntimeError("in MyFunction"), torch.cuda.OutOfMemoryError("CUDA out of memory.")),
        _caused(RuntimeError("outer"), _caused(RuntimeError("inner"), MemoryError())),
    ],
)
def test_running_out_of_memory_is_recognised(error):
    """The errors of every allocator count, and those that were raised from one."""
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 3x4)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
        ValueError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        KeyboardInterrupt(),
        _caused(RuntimeError("outer"), ValueError("inner")),
    ],
)
def test_other_errors_are_not_recognised(error):
    """An error that less memory does not cure is left alone."""
    assert not is_out_of_memory(error)


def test_an_error_in_the_handling_of_another_is_not_recognised():
    """What was being handled is not the cause."""
    error = ValueError("a bug in the except block")
    error.__context__ = MemoryError()
    assert not is_out_of_memory(error)


def test_causes_in_a_circle_end():
    """An error raised from itself is looked at once."""
    error = RuntimeError("round")
    error.__cause__ = error
    assert not is_out_of_memory(error)
    forget(error)


class _Activation:
    pass


def _fail(kept):
    activation = _Activation()
    kept.append(weakref.ref(activation))
    raise MemoryError


def _fail_twice(kept):
    activation = _Activation()
    kept.append(weakref.ref(activation))
    try:
        _fail(kept)
    except MemoryError as error:
        raise RuntimeError from error


def test_a_forgotten_error_holds_no_activation():
    """What the frames of an error and of its causes held is freed, while the error lives on."""
    kept = []
    try:
        _fail_twice(kept)
    except RuntimeError as caught:
        error, traceback = caught, caught.__traceback__  # as a logger or Python 3.10 keeps it
    assert all(activation() is not None for activation in kept)
    forget(error)
    assert [activation() for activation in kept] == [None, None]
    assert traceback is not None
    assert is_out_of_memory(error)


def test_releasing_breaks_cycles():
    """Tensors in a reference cycle are freed; a device that is not in use is not touched."""
    cycle = _Activation()
    cycle.itself, kept = cycle, weakref.ref(cycle)
    del cycle
    gc.disable()
    try:
        assert kept() is not None
        release_memory([CPU, torch.device("meta")])
        assert kept() is None
    finally:
        gc.enable()
    assert not torch.cuda.is_initialized()


REAL = """
    import torch
    from torch import nn
    from gradwatch.out_of_memory import forget, is_out_of_memory, release_memory

    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.Tanh())])
    model(torch.zeros(2, 256)).sum().backward()
    limit_memory(120 << 20)

    def run(examples):  # 16 activations of 1 KiB per example
        model(torch.ones(examples, 256)).sum().backward()

    def attempt(examples):
        global error
        try:
            run(examples)
        except RuntimeError as caught:
            error = caught
            print(examples, "DefaultCPUAllocator" in str(caught), is_out_of_memory(caught))
        else:
            print(examples, "fits")

    attempt(1 << 14)
    attempt(1 << 12)  # takes more than half of what there is, but the error holds most of it
    forget(error)
    release_memory([torch.device("cpu")])
    attempt(1 << 12)
    attempt(1 << 14)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_real_lack_of_memory_is_recovered_from():
    """The allocator's own error is recognised, and once it is forgotten a smaller run fits."""
    # A fixed threshold gives each activation a mapping of its own, so that none stays in the heap of
    # the C library once it is freed.
    own_mappings = processes.environment(MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    done = processes.run(code=LIMIT_MEMORY + textwrap.dedent(REAL), env=own_mappings)
    assert done.stdout.splitlines() == [
        "16384 True True",
        "4096 True True",
        "4096 fits",
        "16384 True True",
    ], done.stderr


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))


def _rollback(model):
    return Rollback(list(model.parameters()), model.modules())


def _run(model, x):
    model(x).square().mean().backward()


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_rerun_equals_a_run_from_the_start(accumulated):
    """Gradients, running statistics and dropout masks come out the same to the bit."""
    x = torch.randn(12, 4)
    models = _model(), _model()
    for model in models if accumulated else ():
        torch.manual_seed(2)
        _run(model, x[:3])
    torch.manual_seed(1)
    rollback = _rollback(models[0])
    for part in (x[:5], x[5:]):  # the attempt that is taken back
        _run(models[0], part)
    rollback.restore()
    for part in x.split(4):
        _run(models[0], part)
    torch.manual_seed(1)
    for part in x.split(4):
        _run(models[1], part)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_rollback_can_be_used_twice():
    """Each attempt of a batch can be taken back by the same rollback."""
    model, x = _model(), torch.randn(6, 4)
    _run(model, x)
    rollback = _rollback(model)
    seen = []
    for _ in range(3):
        _run(model, x)
        seen.append([parameter.grad.clone() for parameter in model.parameters()])
        rollback.restore()
    for again in seen[1:]:
        assert all(map(torch.equal, seen[0], again))


def test_no_gradient_stays_no_gradient():
    """Where .grad was None it is None again."""
    model = _model()
    rollback = _rollback(model)
    _run(model, torch.randn(6, 4))
    rollback.restore()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_gradients_and_buffers_nothing_is_copied():
    """A rollback of nothing runs no operation on a tensor."""
    model = nn.Linear(3, 3)
    with CountCalls() as operations:
        _rollback(model).restore()
    assert not operations.calls


def test_gradients_are_restored_in_place():
    """A gradient that is a view into a larger tensor is so afterwards, and the same object."""
    bucket = torch.arange(6.0)
    weight = nn.Parameter(torch.ones(3))
    weight.grad = gradient = bucket[3:]
    rollback = Rollback([weight], [])
    (2 * weight).sum().backward()
    assert bucket.tolist() == [0, 1, 2, 5, 6, 7]
    rollback.restore()
    assert weight.grad is gradient
    assert bucket.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("other", [None, torch.zeros(3)])
def test_a_gradient_that_was_replaced_is_restored(other):
    """A loop that sets .grad to None or to another tensor gets the old one back."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = gradient = torch.arange(3.0)
    rollback = Rollback([weight], [])
    gradient.mul_(2)
    weight.grad = other
    rollback.restore()
    assert weight.grad is gradient
    assert gradient.tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_restored():
    """The gradient of a sparse embedding has its old rows again, in the same tensor."""
    embedding = nn.Embedding(6, 2, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    gradient, before = embedding.weight.grad, embedding.weight.grad.to_dense()
    rollback = _rollback(embedding)
    embedding(torch.tensor([0, 4])).sum().backward()
    rollback.restore()
    assert embedding.weight.grad is gradient
    assert torch.equal(gradient.to_dense(), before)
    assert gradient._nnz() == 3


def test_sharded_gradients_are_restored():
    """Of a DTensor the part of this rank is restored, in place and without communication."""
    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import distribute_tensor
    with mesh_of_one() as mesh:
        weight = nn.Parameter(distribute_tensor(torch.ones(3), mesh))
        weight.grad = distribute_tensor(torch.arange(3.0), mesh)
        local = weight.grad.to_local()
        rollback = Rollback([weight], [])
        weight.grad.mul_(2)
        rollback.restore()
        assert local.tolist() == [0, 1, 2]
        assert weight.grad.to_local().data_ptr() == local.data_ptr()


class _Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1))
        self.register_buffer("cache", None)

    def forward(self, x):
        self.total = self.total + x.sum()
        self.cache = x
        return x


def test_buffers_that_a_module_replaces_are_restored():
    """A module that assigns to its buffer has the old tensor again; None is None again."""
    module = _Counter()
    total = module.total
    rollback = _rollback(module)
    module(torch.ones(3))
    rollback.restore()
    assert module.total is total
    assert module.total.item() == 0
    assert module.cache is None


def test_the_generator_is_restored():
    """The next random numbers are those that the batch drew."""
    rollback = Rollback([], [])
    drawn = torch.rand(5)
    rollback.restore()
    assert torch.equal(torch.rand(5), drawn)
