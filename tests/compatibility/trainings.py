"""Small trainings in float64 whose numbers need no random generator."""

import math

import torch

import gradwatch

STATISTICS = ("max", "mean", "std", "zeros", "weight_norm", "update_ratio")


def wave(*shape, phase=0.0):
    """Numbers between -1 and 1 that look irregular."""
    count = math.prod(shape)
    values = [math.sin(0.7 * n * n + 1.3 * n + phase) for n in range(count)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def make_model():
    """A perceptron with fixed weights."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    model = model.double()
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * wave(*parameter.shape, phase=place))
    return model


def loss_of(model, number, size=6):
    """The loss of a numbered batch; every 13th is some thirty times as large."""
    x, y = wave(size, 4, phase=number), wave(size, 2, phase=0.5 * number)
    scale = 5.0 if number % 13 == 12 else 1.0
    return (model(x) - scale * y).square().mean()


def make_optimizers(model):
    """An optimizer for each layer."""
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.02, momentum=0.9),
        torch.optim.Adam(model[2].parameters(), lr=0.003, betas=(0.8, 0.99)),
    ]


def plain_steps(watcher, model, optimizers, numbers, bad=()):
    """Steps of a loop that calls `loss.backward()` and `optimizer.step()` itself."""
    for number in numbers:
        loss = loss_of(model, number)
        (loss * math.nan if number in bad else loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def managed_steps(watcher, model, numbers, parts=None, bad=()):
    """Windows of a managed loop; a window has as many micro-batches as the watcher wants."""
    for number in numbers:
        stepped, part, window = False, 0, watcher.accumulate if parts is None else parts
        for part in range(window):
            loss = loss_of(model, number + 0.1 * part)
            factor = math.nan if number in bad and part == 1 else 1.0
            watcher.backward(loss * factor, weight=6.0 + part % 2)
            stepped = watcher.step(last=part == window - 1) or stepped


def clip_policies():
    """A fresh policy of each kind that clips, each so strict that it acts within some steps."""
    return {
        "RobustClip": gradwatch.RobustClip(z_thresh=2.0, window=32, warmup=5),
        "AutoClip": gradwatch.AutoClip(60.0, window=20, warmup=3),
        "ZClip": gradwatch.ZClip(alpha=0.9, z_thresh=1.5, warmup_steps=6, max_norm=3.0),
        "AdaGC": gradwatch.AdaGC(beta=0.9, lambda_abs=0.5, warmup=4),
        "AdaptiveGradientClip": gradwatch.AdaptiveGradientClip(0.05, exclude=("2.bias",)),
        "ClipByNorm": gradwatch.ClipByNorm(0.4, norm_type=3.0, scope="parameter"),
        "ClipByValue": gradwatch.ClipByValue(0.05),
    }
