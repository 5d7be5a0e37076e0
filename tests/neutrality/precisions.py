"""The precisions that a model is trained in."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDE = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@dataclass(frozen=True)
class Precision:
    """The dtype of the parameters, None for the model's own; that of autocast; a scaled loss or not."""

    parameters: torch.dtype | None = torch.float32
    autocast: torch.dtype | None = None
    scaled: bool = False

    def cast(self, model: nn.Module) -> nn.Module:
        """Return the model in this precision."""
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = self.of(tensor.data)
        return model

    def of(self, tensor: Tensor) -> Tensor:
        """Return a tensor in this precision; numbers that are not real or complex stay."""
        if self.parameters is None:
            return tensor
        if tensor.is_complex():
            return tensor.to(WIDE[self.parameters])
        return tensor.to(self.parameters) if tensor.is_floating_point() else tensor

    def forward(self, device: str) -> AbstractContextManager[object]:
        """Return the context of a forward on a type of device."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, dtype=self.autocast)

    def scaler(self, device: str) -> torch.amp.GradScaler | None:
        """Return a scaler that overflows in the first steps, and grows again after some."""
        if not self.scaled:
            return None
        return torch.amp.GradScaler(device, init_scale=2.0**18, growth_interval=6)


PRECISIONS = {
    "float32": Precision(),
    "float64": Precision(torch.float64),
    "autocast_bf16": Precision(autocast=torch.bfloat16),
    "bf16": Precision(torch.bfloat16),
    "autocast_fp16": Precision(autocast=torch.float16, scaled=True),
}
OF_THE_MODEL = {"own": Precision(None)}  # no choice for models that have but one dtype
