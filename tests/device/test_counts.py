"""What a step gains on a device, counted: the numbers in docs/settings.md come from here."""

import pytest
import torch

from tests.gpu.checks.waits import FREE, KERNELS, ONE
from tests.gpu.place import Place, adamw
from tests.gpu.training import Many
from tests.support import device

PLACE = Place(device.DEVICE, module=device)
STEPS = 4
TWO = (torch.bfloat16, torch.float32)


def _counted(number, options, how):
    """Counts some steps; returns how many waits, kernels and copies one of them has."""
    many = Many(PLACE, number, options, **how)
    with device.counting() as counts:
        for _ in range(STEPS):
            many.step()
    many.close()
    return [count / STEPS for count in (counts.waits, counts.kernels, counts.copies)]


def _added(number, options, how):
    """Returns what watching adds to a step."""
    pairs = zip(_counted(number, options, how), _counted(number, None, how), strict=True)
    return [watched - plain for watched, plain in pairs]


@pytest.mark.parametrize("case", FREE)
def test_nothing_waits(case):
    """To watch, to clip, for statistics, managed, for a fused skip: not one wait is added."""
    assert _added(20, *FREE[case])[0] == 0


@pytest.mark.parametrize("case", ONE)
def test_an_unfused_skip_waits_once(case):
    """An optimizer that is told by the host costs one wait in a step, managed or not."""
    assert _added(20, *ONE[case])[0] == 1


@pytest.mark.parametrize("case", KERNELS)
def test_kernels_do_not_grow_with_the_model(case):
    """12 and 300 parameters cost the same number of kernels and one copy, for any mix of dtypes."""
    few, many = (_added(number, *KERNELS[case]) for number in (12, 300))
    assert few == many
    assert few[2] == 1


@pytest.mark.parametrize(
    ("options", "dtypes", "expected"),
    [
        ({}, (torch.float32,), 4),
        ({"clip": 1e-3}, (torch.float32,), 15),
        ({}, TWO, 5),
        ({"clip": 1e-3}, TWO, 17),
    ],
    ids=["watch", "clip", "watch, two dtypes", "clip, two dtypes"],
)
def test_so_many_kernels(options, dtypes, expected):
    """4 to watch and 15 to clip; 1 and 2 more for a second dtype."""
    if device.NAME not in ("fake", "mini"):
        pytest.skip("a real device launches several kernels for one call")
    added = _added(12, options, {"dtypes": dtypes, "make": adamw})
    assert added[1] == expected
