"""Half precision with a scaler that overflows, and 8-bit matrix products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import gradwatch
from tests.gpu.place import Place, adamw, fused_adamw
from tests.gpu.registry import Found, Skipped, check, require
from tests.gpu.training import apart, batch, equal, loss_of

LIMIT = 0.1


@check()
def scaler_passed(place: Place) -> Found:
    """Autocast in float16 with a scale that overflows at first: outcomes, norms, clip."""
    return _overflowing(place, passed=True)


@check()
def scaler_found(place: Place) -> Found:
    """The same with a scaler that was not passed, from the first overflow on."""
    return _overflowing(place, passed=False)


def _overflowing(place: Place, passed: bool) -> Found:
    found = {}
    for name, make in {"AdamW": adamw, "fused AdamW": fused_adamw}.items():
        torch.manual_seed(0)
        layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        model = nn.Sequential(*layers).to(place.device)
        optimizer = make(list(model.parameters()))
        scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**20, growth_interval=4)
        options: dict[str, Any] = {"scaler": scaler} if passed else {}
        applied: list[bool] = []
        with place.late(), gradwatch.watch(model, optimizer, clip=LIMIT, **options) as watcher:
            for step in range(16):
                # A CPU has no float16 that overflows here, so the first losses are infinite.
                low = torch.float16 if place.cuda else torch.bfloat16
                factor = math.inf if not place.cuda and step < 3 else 1.0
                with torch.autocast(place.device.type, dtype=low):
                    loss = loss_of(model, batch(step, place.device)) * factor
                scale = scaler.get_scale()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                applied.append(scaler.get_scale() >= scale)
        steps = watcher.history.steps()
        recorded = [outcome != "skipped_scaler" for outcome in steps["outcome"]]
        require(recorded == applied, f"{name}: applied {applied}, recorded {recorded}")
        require(not all(applied), f"{name}: nothing has overflowed")
        norms = steps["grad_norm_clipped"][applied]
        require(float(norms.max()) < 1.001 * LIMIT, f"{name}: a clipped norm of {norms.max()}")
        found[name] = f"{applied.count(False)} of {len(applied)} steps overflowed"
    return found


class _Product(torch.autograd.Function):
    """x @ w.T in 8 bits, scaled by the largest element: e4m3 forward, e5m2 for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiplied(x, torch.float8_e4m3fn, weight, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        low, fine = torch.float8_e5m2, torch.float8_e4m3fn
        to_x = _multiplied(gradient, low, weight.t(), fine)
        return to_x, _multiplied(gradient.t(), low, x.t(), fine)


def _multiplied(a: Tensor, low: torch.dtype, b: Tensor, fine: torch.dtype) -> Tensor:
    """Returns a @ b.T, with both operands rounded to 8 bits."""
    (first, one), (second, other) = _rounded(a, low), _rounded(b, fine)
    return torch._scaled_mm(first, second.t(), scale_a=one, scale_b=other, out_dtype=torch.bfloat16)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = tensor.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (tensor.float() / scale).to(dtype).contiguous(), scale


class _Linear8(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


def _float8_net(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = [_Linear8(64, 64, bias=False), nn.Tanh(), _Linear8(64, 64, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 1)).to(torch.bfloat16).to(device)


@check()
def float8(place: Place) -> Found:
    """Matrix products in float8: norms are those of the gradients, bits stay, a clip clips."""
    weights: dict[str, Any] = {}
    error = 0.0
    for name, options in {"plain": None, "watched": {}, "clipped": {"clip": 1e-3}}.items():
        model = _float8_net(place.device)
        optimizer = adamw(list(model.parameters()))
        truth = []
        with place.late():
            watcher: Any = None
            if options is not None:
                watcher = gradwatch.watch(model, optimizer, **options).attach()
            for step in range(8):
                x = batch(step, place.device, torch.bfloat16)
                try:
                    loss_of(model, x).backward()
                except (RuntimeError, NotImplementedError) as reason:
                    raise Skipped(f"no float8 product here: {str(reason)[:100]}") from None
                truth.append(_norm(model))
                if name == "plain":
                    nn.utils.clip_grad_norm_(model.parameters(), math.inf)
                optimizer.step()
                optimizer.zero_grad()
            if watcher is not None:
                watcher.close()
                got = watcher.history.steps()["grad_norm"]
                pairs = zip(got, truth, strict=True)
                error = max(error, *(abs(a / b - 1) for a, b in pairs))
        weights[name] = [p.detach().cpu() for p in model.parameters()]
    require(equal(weights["plain"], weights["watched"]), "watching changes the weights")
    require(apart(weights["plain"], weights["clipped"]) > 0, "the clip changes nothing")
    require(error < 1e-5, f"norms differ by {error}")
    return {"largest relative difference": error}


def _norm(model: nn.Module) -> float:
    squares = [float(p.grad.double().cpu().square().sum()) for p in model.parameters()]
    return math.sqrt(sum(squares))
