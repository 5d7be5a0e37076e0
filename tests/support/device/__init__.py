"""The device that this session of pytest runs with: ``pytest --device=fake``, ``mini``, ``cuda``.

One process has one accelerator, so importing this module makes it known to torch. Outside of pytest,
the variable GRADWATCH_TEST_DEVICE names it.

Attributes:
    NAME: "fake", "mini" or the type of a real device.
    DEVICE: The device, with index 0.
    DEVICES: All devices of this type, at most two.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch
from torch import Tensor, nn

from tests.support.stand_ins import STAND_INS, VARIABLE

NAME = os.environ.get(VARIABLE, "")
if not NAME:
    raise ImportError(f"run these tests with pytest --device=..., or set {VARIABLE}")
_backend = import_module(f"{__name__}.{NAME if NAME in STAND_INS else 'real'}")
_backend.install()

DEVICE: torch.device = _backend.DEVICE
DEVICES: tuple[torch.device, ...] = _backend.DEVICES
tensor = _backend.tensor
counting, late = _backend.counting, _backend.late
no_float64, failing, capturing = _backend.no_float64, _backend.failing, _backend.capturing


def to(module: nn.Module, index: int = 0) -> nn.Module:
    """Move a module in place to one of the devices, and return it; weights that are tied stay so.

    On a stand-in its parameters are new objects, so an optimizer is made afterwards.
    ``module.to()`` would make new ones too, and one for each place of a weight that is tied.
    """
    if NAME not in STAND_INS:
        return module.to(DEVICES[index])
    moved: dict[int, Tensor] = {}

    def there(on_host: Tensor) -> Tensor:
        if id(on_host) not in moved:
            made = tensor(on_host.detach(), DEVICES[index])
            if isinstance(on_host, nn.Parameter):
                made = nn.Parameter(made, on_host.requires_grad)
            moved[id(on_host)] = made
        return moved[id(on_host)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, one in tensors.items():
                if one is not None:
                    tensors[name] = there(one)
    return module
