"""check_gradients of compiled and scripted code, and of reentrant checkpoints."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch import check_gradients

# Dynamo itself warns, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore")


class Backend:
    """Compiles nothing, multiplies the gradients by a factor, and counts."""

    def __init__(self, factor):
        self.factor, self.compiled, self.ran = factor, 0, 0

    def __call__(self, graph, examples):
        """Returns the compiled function."""
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return tuple(o.detach() + self.factor * (o - o.detach()) for o in graph.forward(*args))

        return run


def _tanh(x):
    return torch.tanh(x).sum()


SUBJECTS = {
    "a module": lambda backend: torch.compile(
        nn.Sequential(nn.Linear(3, 2), nn.Tanh()), backend=backend
    ),
    "a part": lambda backend: nn.Sequential(
        nn.Linear(3, 3), torch.compile(nn.Linear(3, 2), backend=backend)
    ),
    "a function": lambda backend: torch.compile(_tanh, backend=backend),
    "a data-parallel module": lambda backend: torch.compile(
        nn.DataParallel(nn.Linear(3, 2)), backend=backend
    ),
}


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_compiled_code_is_what_is_checked(subject, factor):
    """It runs, and a compiler that triples the gradients is found out."""
    torch.manual_seed(0)
    backend = Backend(factor)
    torch._dynamo.reset()
    check = check_gradients(SUBJECTS[subject](backend), torch.randn(4, 3))
    assert check.ok is (factor == 1.0), str(check)
    assert backend.ran > 10


def test_a_module_compiled_in_place_is_refused():
    """A copy of it would run no compiled code; the text says what to write."""
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].compile(backend="eager")
    with pytest.raises(TypeError, match=r"copies of 0, .* Write torch.compile\(module\)"):
        check_gradients(model, torch.randn(4, 3))


@pytest.mark.parametrize("inside", [False, True])
def test_scripted_modules(inside):
    """Of a scripted module a copy is checked, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Linear(3, 2))
        check = check_gradients(
            nn.Sequential(scripted, nn.Tanh()) if inside else scripted, torch.randn(4, 3)
        )
    assert check.ok
    assert check.precision == "float64"
    assert len(check.checked) == 3


class Checkpointed(nn.Module):
    """A reentrant checkpoint around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        """The output of the module."""
        return checkpoint(self.inner, x, use_reentrant=True)


class Doubled(torch.autograd.Function):
    """A wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        """Returns its input."""
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        """Twice the gradient."""
        return 2 * gradient


class Double(nn.Module):
    """Applies it."""

    def forward(self, x):
        """The same output."""
        return Doubled.apply(x)


def test_reentrant_checkpoints():
    """They are checked, whether right or wrong, and the module's own gradients stay as they are."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(inner))
    check = check_gradients(model, torch.randn(3, 4))
    assert check.ok, str(check)
    assert len(check.checked) == 5
    assert all(parameter.grad is None for parameter in model.parameters())
    inner.append(Double())
    check = check_gradients(model, torch.randn(3, 4))
    assert {failure.name for failure in check.failures} == set(check.checked)
    assert check.failures[0].module.startswith("1")


def test_a_function_with_a_reentrant_checkpoint_is_refused():
    """Its backward would write into gradients of the user's; the text says what to write."""
    model = Checkpointed(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="use_reentrant=False"):
        check_gradients(lambda x: 2 * model(x), torch.randn(3, 4))
    assert all(parameter.grad is None for parameter in model.parameters())
