"""explain(): where the gradients of one forward and backward go bad, without a watcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradwatch.pickles import stable_name
from gradwatch.record.explanation import Explanation
from gradwatch.replay.observer import Observer
from gradwatch.replay.search import explain_run


@stable_name
def explain(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Explanation:
    """temp"""

    def run(observer: Observer) -> list[str]:
        state = torch.get_rng_state()
        for n, m in model.named_modules():
            observer.name_module(m, n)
        grads = [p.grad for p in model.parameters()]
        for n, p in model.named_parameters():
            observer.name_parameter(p, n)
            p.grad = None
        for n, p in model.named_buffers():
            observer.name_buffer(p, n)
        copies, named = tree_map(
            lambda t: (
                t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
            ),
            (args, kwargs),
        )
        import inspect

        try:
            names = inspect.signature(model.forward).bind(*copies, **named).arguments
        except TypeError:
            names = dict(enumerate(copies))

        def walk(path, v):
            if isinstance(v, Tensor):
                observer.name_input(v, path)
            elif isinstance(v, dict):
                for k, x in v.items():
                    walk(f"{path}[{k!r}]", x)
            elif isinstance(v, (list, tuple)):
                for k, x in enumerate(v):
                    walk(f"{path}[{k}]", x)

        for k, v in names.items():
            walk(str(k), v)
        with observer:
            out = model(*copies, **named)
            value = out if loss is None else loss(out)
            g = torch.ones_like(value)
            observer.begin_backward([value], [g])
            value.backward(g)
        observer.end({n: p.grad for n, p in model.named_parameters()})
        for p, g in zip(model.parameters(), grads):
            p.grad = g
        torch.set_rng_state(state)
        return []

    return explain_run(run)
