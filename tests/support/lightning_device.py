"""The device under test for Lightning: an accelerator, and the strategy that moves a module to it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.support import device


class DeviceAccelerator(Accelerator):
    """One device, ``device.DEVICE``."""

    def setup_device(self, device: torch.device) -> None:
        """Needs nothing."""

    def teardown(self) -> None:
        """Leaves nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Knows nothing."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """One, whatever was asked for."""
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Lists it."""
        return [device.DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always: the session of pytest runs with it."""
        return True

    @staticmethod
    def name() -> str:
        """What Lightning calls it."""
        return device.DEVICE.type


class DeviceStrategy(SingleDeviceStrategy):
    """Trains on ``device.DEVICE``."""

    strategy_name = "device_under_test"

    def __init__(self, precision: Precision | None = None) -> None:
        """Starts with an accelerator of its own."""
        super().__init__(device.DEVICE, DeviceAccelerator(), precision_plugin=precision)

    def model_to_device(self) -> None:
        """Moves the module as the device needs it."""
        assert self.model is not None
        device.to(self.model)
