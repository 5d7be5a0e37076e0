"""Healthy training loops as people write them: the record is right, and nothing is told.

Each loop trains a tiny model three times: unwatched, with its optimizers named, and with its optimizers
found. It writes down itself, with `run.row(optimizer)` before each step, which row must be recorded.
"""

import copy
import functools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.state import differences, pieces

from .loops import (
    WAYS,
    Expected,
    Loop,
    Watch,
    adam,
    inputs,
    loss_of,
    net,
    norm_of,
    parameters_of,
    sgd,
    warnings_of_gradwatch,
)

STEPS = 12

# What a training of a dozen steps on random numbers may be said to show. Every other kind of finding,
# also one that is new, accuses the loop.
OF_TOYS = {
    *("exploding", "loss_rising", "vanishing", "update_large", "update_small", "unstable_start"),
    *("zero_gradient", "dead_units", "spike", "clip_always", "clip_never"),
    *("batch_small", "batch_large"),
}


class Healthy(NamedTuple):
    """A loop, how it can be watched, and the kinds of events that it may have."""

    loop: Loop
    ways: tuple[str, ...]
    events: frozenset[str]


LOOPS: dict[str, Healthy] = {}


def healthy(ways: tuple[str, ...] = WAYS, events: Iterable[str] = ()) -> Callable[[Loop], Loop]:
    """Add a loop to the table."""

    def add(loop: Loop) -> Loop:
        LOOPS[loop.__name__.strip("_")] = Healthy(loop, ways, frozenset(events))
        return loop

    return add


# -- zero_grad ------------------------------------------------------------------------------------


@healthy()
def _zero_grad_at_the_end(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return model


@healthy()
def _zero_grad_at_the_start(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _zero_grad_between_forward_and_backward(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss = loss_of(model, i)
            optimizer.zero_grad()
            loss.backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _zero_grad_in_place(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad(set_to_none=False)
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _zero_grad_of_the_model(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            model.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _zero_grad_twice(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            model.zero_grad()
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return model


@healthy()
def _gradients_set_to_none_by_hand(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            for parameter in model.parameters():
                parameter.grad = None
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _gradients_zeroed_by_hand(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad.zero_()
    return model


@healthy()
def _gradients_zeroed_through_data(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad.data.zero_()
    return model


# -- changes of the gradients between the backward and the step --------------------------------------


@healthy()
def _clip_by_norm(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return model


@healthy()
def _clip_by_value(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
    return model


@healthy()
def _clip_by_each_layer(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            for layer in model:
                nn.utils.clip_grad_norm_(layer.parameters(), 0.3)
            optimizer.step()
    return model


@healthy()
def _clip_through_data(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            factor = min(1.0, 0.5 / (norm_of(model.parameters()) + 1e-6))
            for parameter in model.parameters():
                parameter.grad.data.mul_(factor)
            optimizer.step()
    return model


@healthy()
def _clip_by_gradwatch(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, clip=1e3, on_nonfinite="skip") as run:  # never needed
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _divided_before_the_clip_of_gradwatch(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, clip=1e3) as run:  # never needed
        for i in range(STEPS):
            optimizer.zero_grad()
            tokens = 7 + i % 3
            (loss_of(model, i) * tokens).backward()
            run.row(optimizer)
            for parameter in model.parameters():
                parameter.grad.div_(tokens)
            optimizer.step()
    return model


@healthy(events=["nan", "skipped"])
def _steps_left_out_by_gradwatch(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, on_nonfinite="skip") as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            bad = i in (0, 5, 6)  # a step was due for each: nothing is thrown away unseen
            loss_of(model, i, math.nan if bad else 1.0).backward()
            run.row(optimizer, outcome="skipped_nonfinite" if bad else "applied")
            if run.watcher is not None or not bad:
                optimizer.step()
    return model


@healthy()
def _gradient_noise(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    noise = torch.Generator().manual_seed(3)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            for p in model.parameters():
                p.grad.add_(torch.randn(p.shape, generator=noise), alpha=0.01)
            optimizer.step()
    return model


@healthy()
def _gradient_centralization(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            for p in model.parameters():
                if p.dim() > 1:
                    p.grad.sub_(p.grad.mean(1, keepdim=True))
            optimizer.step()
    return model


@healthy()
def _gradients_filtered_by_a_moving_average(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    slow: dict[Tensor, Tensor] = {}
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            for p in model.parameters():  # Grokfast
                slow[p] = slow.get(p, torch.zeros_like(p)) * 0.9 + p.grad * 0.1
                p.grad = p.grad + slow[p] * 2
            optimizer.step()
    return model


@healthy()
def _hooks_that_scale_gradients(watch: Watch) -> Any:
    model = net()
    model[0].weight.register_hook(lambda gradient: gradient * 0.1)
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _rows_of_an_embedding_kept_frozen(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 1))
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            model(torch.arange(6) * (i + 1) % 6).square().mean().backward()
            run.row(optimizer)
            model[0].weight.grad[:3] = 0  # of pretrained words
            optimizer.step()
    return model


# -- several backwards in one step -------------------------------------------------------------------


@healthy()
def _accumulation_by_hand(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        optimizer.zero_grad()
        for i in range(STEPS):
            loss_of(model, i, 1 / 4).backward()
            if (i + 1) % 4 == 0:
                run.row(optimizer, 4)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return model


@healthy()
def _accumulation_with_zeroing_in_place(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            for i in range(3):
                loss_of(model, i, 1 / 3).backward()
            run.row(optimizer, 3)
            optimizer.step()
    return model


@healthy()
def _micro_batches_left_over_go_into_the_next_epoch(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    seen = 0
    with watch(model, optimizer) as run:
        for _ in range(3):
            for i in range(7):
                loss_of(model, i, 1 / 3).backward()
                seen += 1
                if seen % 3 == 0:
                    run.row(optimizer, 3)
                    optimizer.step()
                    optimizer.zero_grad()
            with torch.no_grad():
                loss_of(model, 99)
    return model


@healthy()
def _a_short_window_at_the_end_of_the_epoch(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for _ in range(3):
            window = 0
            for i in range(7):
                loss_of(model, i, 1 / 3).backward()
                window += 1
                if window == 3 or i == 6:
                    run.row(optimizer, window)
                    optimizer.step()
                    optimizer.zero_grad()
                    window = 0
    return model


@healthy()
def _two_losses_with_a_backward_each(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            loss_of(model, i + 100, 0.1).backward()
            run.row(optimizer, 2)
            optimizer.step()
    return model


@healthy()
def _losses_of_different_heads_with_a_backward_each(watch: Watch) -> Any:
    body, one, two = net(), net(1), net(2)
    model = nn.ModuleList([body, one, two])
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            for head in (one, two):
                loss_of(lambda x, head=head: body(x) + head(x), i).backward()
            run.row(optimizer, 2)
            optimizer.step()
    return model


@healthy()
def _retain_graph(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            output = model(inputs(i))
            output.square().mean().backward(retain_graph=True)
            output.abs().mean().backward()
            run.row(optimizer, 2)
            optimizer.step()
    return model


@healthy()
def _one_backward_of_two_losses(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            torch.autograd.backward([loss_of(model, i), loss_of(model, i + 100)])
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _truncated_backpropagation_through_time(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"cell": nn.GRU(4, 5, batch_first=True), "head": nn.Linear(5, 1)})
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for epoch in range(3):
            state = torch.zeros(1, 3, 5)
            for i in range(4):
                output, state = model["cell"](inputs(epoch * 4 + i, 12).view(3, 4, 4), state)
                optimizer.zero_grad()
                model["head"](output).square().mean().backward()
                run.row(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                optimizer.step()
                state = state.detach()
    return model


@healthy()
def _gradient_cache_of_contrastive_learning(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            chunks = inputs(i).chunk(4)
            with torch.no_grad():
                features = torch.cat([model(chunk) for chunk in chunks])
            features.requires_grad_()
            (features @ features.T).logsumexp(1).mean().backward()
            for chunk, gradient in zip(chunks, features.grad.chunk(4), strict=True):
                (model(chunk) * gradient).sum().backward()
            run.row(optimizer, 4)
            optimizer.step()
    return model


@healthy(ways=("named",))
def _managed_accumulation(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, accumulate=4) as run:
        for i in range(STEPS):
            if run.watcher is None:
                loss_of(model, i).div(4).backward()
                if (i + 1) % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            run.watcher.backward(loss_of(model, i))
            if (i + 1) % 4 == 0:
                run.row(optimizer, 4, norm=None)
            assert run.watcher.step() == ((i + 1) % 4 == 0)
    return model


@healthy()
def _zero_grad_at_the_start_of_a_window(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            if i % 3 == 0:
                optimizer.zero_grad()
            loss_of(model, i, 1 / 3).backward()
            if i % 3 == 2:
                run.row(optimizer, 3)
                optimizer.step()
    return model


# -- several optimizers ------------------------------------------------------------------------------


def _gan() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return generator and discriminator, and the optimizers of both."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    critic = net(1)
    return generator, critic, adam(generator), torch.optim.RMSprop(critic.parameters(), lr=1e-3)


def _bce(output: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, torch.full_like(output, target))


def _train_gan(generator: Any, critic: Any, of_g: Any, of_d: Any, g: Expected, d: Expected) -> None:
    """Train as torch's DCGAN example does: G's backward fills D's gradients too."""
    for i in range(STEPS):
        critic.zero_grad()
        _bce(critic(inputs(i)), 1.0).backward()
        fake = generator(inputs(i + 100))
        _bce(critic(fake.detach()), 0.0).backward()
        d.row(of_d, 2)
        of_d.step()
        generator.zero_grad()
        _bce(critic(fake), 1.0).backward()
        g.row(of_g)
        of_g.step()


@healthy()
def _gan_with_one_watcher(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    model = nn.ModuleList([generator, critic])
    with watch(model, of_d, of_g) as run:
        _train_gan(generator, critic, of_g, of_d, run, run)
    return model


@healthy()
def _gan_with_a_watcher_each(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    with watch(generator, of_g) as g, watch(critic, of_d) as d:
        _train_gan(generator, critic, of_g, of_d, g, d)
    return generator, critic


@healthy()
def _gan_whose_discriminator_alone_is_watched(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    with watch(critic, of_d) as d:
        _train_gan(generator, critic, of_g, of_d, Expected([]), d)
    return generator, critic


@healthy()
def _gan_that_zeroes_in_place(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    model = nn.ModuleList([generator, critic])
    with watch(model, of_g, of_d) as run:
        for i in range(STEPS):
            of_g.zero_grad(set_to_none=False)
            fake = generator(inputs(i + 100))
            _bce(critic(fake), 1.0).backward()
            run.row(of_g)
            of_g.step()
            of_d.zero_grad(set_to_none=False)
            (_bce(critic(inputs(i)), 1.0) + _bce(critic(fake.detach()), 0.0)).backward()
            run.row(of_d)
            of_d.step()
    return model


@healthy()
def _wgan_gp(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    model = nn.ModuleList([generator, critic])
    with watch(model, of_d, of_g) as run:
        for i in range(STEPS):
            fake = generator(inputs(i + 100))
            mixed = (inputs(i) + fake.detach()).div(2).requires_grad_()
            (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            penalty = (slope.norm(dim=1) - 1).square().mean()
            of_d.zero_grad()
            (critic(fake.detach()).mean() - critic(inputs(i)).mean() + 10 * penalty).backward()
            run.row(of_d)
            of_d.step()
            if i % 5 == 4:
                of_g.zero_grad()
                (-critic(generator(inputs(i + 100))).mean()).backward()
                run.row(of_g)
                of_g.step()
    return model


@healthy()
def _wgan_with_clipped_weights(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    model = nn.ModuleList([generator, critic])
    with watch(model, of_d, of_g) as run:
        for i in range(STEPS):
            of_d.zero_grad()
            fake = generator(inputs(i + 100))
            (critic(fake.detach()).mean() - critic(inputs(i)).mean()).backward()
            run.row(of_d)
            of_d.step()
            for p in critic.parameters():
                p.data.clamp_(-0.1, 0.1)
            of_g.zero_grad()
            (-critic(fake).mean()).backward()
            run.row(of_g)
            of_g.step()
    return model


@healthy()
def _pix2pix_toggles_requires_grad(watch: Watch) -> Any:
    generator, critic, of_g, of_d = _gan()
    model = nn.ModuleList([generator, critic])
    with watch(model, of_d, of_g) as run:
        for i in range(STEPS):
            fake = generator(inputs(i + 100))
            critic.requires_grad_(True)
            of_d.zero_grad()
            (_bce(critic(fake.detach()), 0.0) + _bce(critic(inputs(i)), 1.0)).backward()
            run.row(of_d)
            of_d.step()
            critic.requires_grad_(False)
            of_g.zero_grad()
            _bce(critic(fake), 1.0).backward()
            run.row(of_g)
            of_g.step()
    return model


@healthy()
def _two_optimizers_after_one_backward(watch: Watch) -> Any:
    model = net()
    one, two = sgd(model[0]), adam(model[2])
    with watch(model, one, two) as run:
        for i in range(STEPS):
            model.zero_grad()
            loss_of(model, i).backward()
            for optimizer in (one, two):
                run.row(optimizer)
                optimizer.step()
    return model


@healthy()
def _two_optimizers_with_their_own_micro_batches(watch: Watch) -> Any:
    model = net()
    one, two = sgd(model[0]), adam(model[2])
    with watch(model, one, two) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row(one)
            one.step()
            one.zero_grad()
            if i % 3 == 2:  # of the head, which sees three batches a step
                run.row(two, 3)
                two.step()
                two.zero_grad()
    return model


@healthy()
def _alternating_optimizers(watch: Watch) -> Any:
    model = net()
    one, two = sgd(model[0]), adam(model[2])
    with watch(model, one, two) as run:
        for i in range(STEPS):
            optimizer = (one, two)[i % 2]
            model.zero_grad()  # also what the last backward left for the other one
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _actor_and_critic(watch: Watch) -> Any:
    actor, critic = net(1), net(2)
    of_actor, of_critic = adam(actor), sgd(critic)
    model = nn.ModuleDict({"actor": actor, "critic": critic})
    with watch(model, of_critic, of_actor) as run:
        for i in range(STEPS):
            of_critic.zero_grad()
            loss_of(critic, i).backward()
            run.row(of_critic)
            of_critic.step()
            of_actor.zero_grad()
            x = inputs(i)  # through the critic, whose gradients of this backward nobody wants
            (-critic(torch.cat([x[:, :3], actor(x)], 1)).mean()).backward()
            run.row(of_actor)
            of_actor.step()
    return model


@healthy()
def _delayed_policy_updates(watch: Watch) -> Any:
    actor, critic = net(1), net(2)
    target = copy.deepcopy(critic)  # its parameters require gradients, and never receive one
    of_actor, of_critic = adam(actor), sgd(critic)
    model = nn.ModuleDict({"actor": actor, "critic": critic, "target": target})
    with watch(model, of_critic, of_actor) as run:
        for i in range(STEPS):
            with torch.no_grad():
                wanted = target(inputs(i))
            of_critic.zero_grad()
            (critic(inputs(i + 1)) - wanted - 0.1).square().mean().backward()
            run.row(of_critic)
            of_critic.step()
            if i % 2:
                of_actor.zero_grad()
                x = inputs(i)
                (-critic(torch.cat([x[:, :3], actor(x)], 1)).mean()).backward()
                run.row(of_actor)
                of_actor.step()
                for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                    slow.data.mul_(0.99).add_(fast.data, alpha=0.01)
    return model


@healthy()
def _architecture_search(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": net(1), "two": net(2), "mix": nn.ParameterList([torch.zeros(2)])})
    of_weights, of_mix = sgd(model["one"], model["two"]), adam(model["mix"])

    def mixed(x: Tensor) -> Tensor:
        shares = model["mix"][0].softmax(0)
        return shares[0] * model["one"](x) + shares[1] * model["two"](x)

    with watch(model, of_mix, of_weights) as run:
        for i in range(STEPS):
            of_mix.zero_grad()  # also what the last backward of the weights left there
            loss_of(mixed, i + 100).backward()
            run.row(of_mix)
            of_mix.step()
            of_weights.zero_grad()
            loss_of(mixed, i).backward()
            run.row(of_weights)
            of_weights.step()
    return model


@healthy()
def _layers_trained_by_their_own_losses(watch: Watch) -> Any:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    optimizers = [sgd(layer) for layer in layers]
    with watch(layers, *optimizers) as run:
        for i in range(STEPS):
            x = inputs(i)
            for layer, optimizer in zip(layers, optimizers, strict=True):
                x = layer(x.detach()).tanh()
                optimizer.zero_grad()
                (x.square().sum(1) - 1).square().mean().backward()
                run.row(optimizer)
                optimizer.step()
    return layers


@healthy(ways=("found",))
def _a_fresh_optimizer_for_each_task(watch: Watch) -> Any:
    model = net()
    with watch(model) as run:
        for _ in range(3):
            optimizer = adam(model)
            for i in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                optimizer.step()
    return model


@healthy()
def _one_optimizer_after_the_other(watch: Watch) -> Any:
    model = net()
    with watch(model, *(phases := [adam(model), sgd(model)])) as run:
        for optimizer in phases:
            for i in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                optimizer.step()
    return model


# -- optimizers that are more than an optimizer ------------------------------------------------------


@healthy()
def _sam_by_hand(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                offsets = [p.grad * (0.05 / norm) for p in model.parameters()]
                for p, offset in zip(model.parameters(), offsets, strict=True):
                    p.add_(offset)
            optimizer.zero_grad()
            loss_of(model, i).backward()
            with torch.no_grad():
                for p, offset in zip(model.parameters(), offsets, strict=True):
                    p.sub_(offset)
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return model


class SAM(torch.optim.Optimizer):
    """The two-step class that most projects carry."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        scale = 0.05 / (norm_of(parameters_of(self)) + 1e-12)
        for p in parameters_of(self):
            if p.grad is not None:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=scale)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in parameters_of(self):
            if p.grad is not None:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


@healthy()
def _sam_in_two_steps(watch: Watch) -> Any:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            optimizer.first_step()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.second_step()
    return model


@healthy()
def _sam_whose_base_optimizer_is_named(watch: Watch) -> Any:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    with watch(model, optimizer.base_optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            optimizer.first_step()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.second_step()
    return model


@healthy()
def _sam_through_a_closure(watch: Watch) -> Any:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    norms: list[float] = []
    with watch(model, optimizer) as run:
        for i in range(STEPS):

            def closure(i: int = i) -> Tensor:
                loss = loss_of(model, i)
                loss.backward()
                norms.append(norm_of(model.parameters()))
                return loss

            closure()
            optimizer.step(closure)
            run.row(optimizer, norm=norms[-1])
            optimizer.zero_grad()
    return model


class Lookahead(torch.optim.Optimizer):
    """Has the shape of timm's: on purpose super().__init__() is not called."""

    def __init__(self, base: torch.optim.Optimizer, every: int = 3) -> None:
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self.base_optimizer = base
        self.param_groups, self.defaults = base.param_groups, base.defaults
        self.state = defaultdict(dict)
        self.every, self.steps = every, 0
        self.slow = [p.detach().clone() for p in parameters_of(base)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base_optimizer.step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            for slow, p in zip(self.slow, parameters_of(self), strict=True):
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)


@healthy()
def _lookahead(watch: Watch) -> Any:
    model = net()
    optimizer = Lookahead(sgd(model))
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


class Wrapped(torch.optim.Optimizer):
    """Has the shape of accelerate's: an Optimizer that never calls Optimizer.__init__."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


@healthy()
def _wrapped_as_by_a_framework(watch: Watch) -> Any:
    model = net()
    optimizer = Wrapped(adam(model))
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


class Accumulating(Wrapped):
    """Steps and zeroes at every n-th call only, as accelerate's does inside accumulate()."""

    calls, every = 0, 3

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % self.every == 0:
            self.optimizer.zero_grad(set_to_none)


@healthy()
def _accumulated_as_by_a_framework(watch: Watch) -> Any:
    model = net()
    optimizer = Accumulating(sgd(model))
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i, 1 / 3).backward()
            if i % 3 == 2:
                run.row(optimizer, 3)
            optimizer.step()
            optimizer.zero_grad()
    return model


class WithWarmUp:
    """Has the shape of the annotated transformer's NoamOpt: no Optimizer at all."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 * min(self.steps**-0.5, self.steps * 4**-1.5)
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


@healthy()
def _noam(watch: Watch) -> Any:
    model = net()
    optimizer = WithWarmUp(adam(model))
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return model


@healthy()
def _lbfgs(watch: Watch) -> Any:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    norms: list[float] = []
    with watch(model, optimizer) as run:
        for i in range(STEPS):

            def closure(i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                norms.append(norm_of(model.parameters()))
                return loss

            optimizer.step(closure)
            run.row(optimizer, norm=norms[-1])
    return model


@healthy()
def _closure_of_a_first_order_optimizer(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):

            def closure(i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                run.row(optimizer)
                return loss

            optimizer.step(closure)
    return model


# -- gradients that do not come from one backward ------------------------------------------------------


@healthy()
def _pcgrad(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            tasks = []
            for task in range(3):
                optimizer.zero_grad()
                loss_of(model, 3 * i + task).backward()
                tasks.append([p.grad.clone() for p in model.parameters()])
            optimizer.zero_grad()
            for p, *gradients in zip(model.parameters(), *tasks, strict=True):
                p.grad = torch.stack(gradients).mean(0)
            run.row(optimizer, 0)
            optimizer.step()
    return model


@healthy()
def _pcgrad_that_overwrites_the_last_task(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            tasks = []
            for task in range(3):
                optimizer.zero_grad()
                loss_of(model, 3 * i + task).backward()
                tasks.append([p.grad.clone() for p in model.parameters()])
            for p, *gradients in zip(model.parameters(), *tasks, strict=True):
                p.grad = torch.stack(gradients).mean(0)
            run.row(optimizer, None, norm=None)
            optimizer.step()
    return model


@healthy()
def _differentially_private_sgd(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    noise = torch.Generator().manual_seed(3)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for example in inputs(i, rows=5):
                optimizer.zero_grad()
                model(example).square().sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                for total, p in zip(sums, model.parameters(), strict=True):
                    total.add_(p.grad)
            optimizer.zero_grad()
            for total, p in zip(sums, model.parameters(), strict=True):
                p.grad = (total + 0.1 * torch.randn(p.shape, generator=noise)) / 5
            run.row(optimizer, 0)
            optimizer.step()
            optimizer.zero_grad()
    return model


@healthy()
def _gradients_from_functional_transforms(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    with watch(model, optimizer) as run:
        for i in range(STEPS):
            values = {name: p.detach() for name, p in model.named_parameters()}
            gradients = torch.func.grad(loss)(values, inputs(i))
            for name, p in model.named_parameters():
                p.grad = gradients[name]
            run.row(optimizer, 0)
            optimizer.step()
    return model


@healthy()
def _maml(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)

    def call(weights: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, weights, (x,))

    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            weights = dict(model.named_parameters())
            for _ in range(2):
                inner = loss_of(lambda x, w=weights: call(w, x), i)
                slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
                pairs = zip(weights.items(), slopes, strict=True)
                weights = {name: w - 0.01 * slope for (name, w), slope in pairs}
            loss_of(lambda x, w=weights: call(w, x), i + 100).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _first_order_maml(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            learner = copy.deepcopy(model)
            inner = sgd(learner, lr=0.01)
            loss_of(learner, i).backward()
            inner.step()
            inner.zero_grad()
            loss_of(learner, i + 100).backward()
            for p, q in zip(model.parameters(), learner.parameters(), strict=True):
                p.grad = q.grad.clone()
            run.row(optimizer, 0)
            optimizer.step()
            optimizer.zero_grad()
    return model


@healthy()
def _gradients_taken_from_a_worker(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    worker = copy.deepcopy(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            worker.load_state_dict(model.state_dict())
            worker.zero_grad()
            loss_of(worker, i).backward()
            for p, q in zip(model.parameters(), worker.parameters(), strict=True):
                p.grad = q.grad  # A3C: the very tensor
            run.row(optimizer, 0)
            optimizer.step()
    return model


@healthy()
def _gradient_penalty(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss = loss_of(model, i)
            slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            optimizer.zero_grad()
            (loss + 0.01 * sum(s.square().sum() for s in slopes)).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _adversarial_training(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            x = inputs(i)
            for _ in range(3):
                x.requires_grad_()
                (slope,) = torch.autograd.grad(model(x).square().mean(), x)
                x = (x + 0.01 * slope.sign()).detach()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _backward_into_chosen_parameters(watch: Watch) -> Any:
    model = net()
    one, two = sgd(model[0]), adam(model[2])
    with watch(model, one, two) as run:
        for i in range(STEPS):
            loss = loss_of(model, i)
            for part, optimizer in ((model[0], one), (model[2], two)):
                optimizer.zero_grad()
                loss.backward(inputs=list(part.parameters()), retain_graph=part is model[0])
                run.row(optimizer)
            one.step()
            two.step()
    return model


# -- models --------------------------------------------------------------------------------------------


@healthy()
def _frozen_backbone(watch: Watch) -> Any:
    model = net()
    model[0].requires_grad_(False)
    optimizer = sgd(model[2])
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _frozen_backbone_in_the_optimizer(watch: Watch) -> Any:
    model = net()
    model[0].requires_grad_(False)
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _gradual_unfreezing(watch: Watch) -> Any:
    model = net()
    model[0].requires_grad_(False)
    optimizer = sgd(model[2])
    with watch(model, optimizer) as run:
        for i in range(2 * STEPS):
            if i == STEPS:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _unfreezing_what_the_optimizer_has(watch: Watch) -> Any:
    model = net()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(2 * STEPS):
            if i == STEPS:
                model[0].requires_grad_(True)
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _moving_average_and_teacher(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    teacher = copy.deepcopy(model).requires_grad_(False)
    average = torch.optim.swa_utils.AveragedModel(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            x = inputs(i)
            (model(x) - teacher(x) - 1).square().mean().backward()
            run.row(optimizer)
            optimizer.step()
            average.update_parameters(model)
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
    return model


@healthy()
def _averaged_weights_swapped_in_to_evaluate(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    average = [p.detach().clone() for p in model.parameters()]
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            with torch.no_grad():
                for slow, p in zip(average, model.parameters(), strict=True):
                    slow.lerp_(p, 0.1)
            if i % 4 == 3:
                with torch.no_grad():
                    backup = [p.clone() for p in model.parameters()]
                    for slow, p in zip(average, model.parameters(), strict=True):
                        p.copy_(slow)
                    loss_of(model, 99)
                    for old, p in zip(backup, model.parameters(), strict=True):
                        p.copy_(old)
    return model


@healthy()
def _momentum_encoder_inside_the_model(watch: Watch) -> Any:
    model = nn.ModuleDict({"online": net(), "target": net().requires_grad_(False)})
    optimizer = sgd(model["online"])
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            with torch.no_grad():  # before the first backward too
                pairs = zip(model["target"].parameters(), model["online"].parameters(), strict=True)
                for slow, fast in pairs:
                    slow.mul_(0.9).add_(fast, alpha=0.1)
                wanted = model["target"](inputs(i))
            optimizer.zero_grad()
            (model["online"](inputs(i)) - wanted - 1).square().mean().backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _target_network_that_requires_gradients(watch: Watch) -> Any:
    model = nn.ModuleDict({"online": net(), "target": net()})
    optimizer = adam(model["online"])
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            wanted = 0.9 * model["target"](inputs(i)).detach() + 1
            optimizer.zero_grad()
            (model["online"](inputs(i + 1)) - wanted).square().mean().backward()
            run.row(optimizer)
            optimizer.step()
            if i % 5 == 4:
                model["target"].load_state_dict(model["online"].state_dict())
    return model


@healthy()
def _tied_weights(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            tokens = torch.arange(8) * (i + 2) % 7
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[:-1]), tokens[1:]).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _sparse_embedding(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1))
    sparse, dense = torch.optim.SparseAdam(list(model[0].parameters())), adam(model[1])
    with watch(model, sparse, dense) as run:
        for i in range(STEPS):
            sparse.zero_grad()
            dense.zero_grad()
            model(torch.tensor([i % 9, (i + 2) % 9])).square().mean().backward()
            for optimizer in (sparse, dense):
                run.row(optimizer)
                optimizer.step()
    return model


@healthy(events=["no_gradient"])
def _mixture_with_seldom_used_experts(watch: Watch) -> Any:
    experts = nn.ModuleList([net(seed) for seed in range(3)])
    optimizer = adam(experts)
    with watch(experts, optimizer) as run:
        for i in range(2 * STEPS):
            optimizer.zero_grad()
            chosen = 2 if i % 8 == 7 else i % 2
            loss_of(experts[chosen], i).backward()
            run.row(optimizer)
            optimizer.step()
    return experts


@healthy()
def _gradient_checkpointing(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout()), nn.Tanh())
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            hidden = checkpoint(model[1], model[0](inputs(i)), use_reentrant=i % 2 == 1)
            model[2](hidden).square().mean().backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _batch_norm_and_dropout(watch: Watch) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            model.train()
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            model.eval()
            with torch.no_grad():
                loss_of(model, 99)
    return model


@healthy()
def _bfloat16_autocast(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, i)
            loss.backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy(events=["nan", "inf", "overflow", "skipped"])
def _scaler_whose_first_steps_overflow(watch: Watch) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-4)
    with watch(model, optimizer, scaler=scaler) as run:
        for i in range(STEPS):
            scaler.scale(loss_of(model, i, 40.0)).backward()
            scaler.unscale_(optimizer)
            good = all(p.grad.isfinite().all() for p in model.parameters())
            outcome, norm = ("applied", math.nan) if good else ("skipped_scaler", None)
            run.row(optimizer, outcome=outcome, norm=norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert len({row.outcome for row in run.rows[id(optimizer)]}) == 2
    return model


@healthy(events=["nan", "inf", "overflow", "skipped"])
def _scaler_that_is_found(watch: Watch) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-4)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i, 40.0)).backward()
            good = all(p.grad.isfinite().all() for p in model.parameters())
            outcome, norm = ("applied", math.nan) if good else ("skipped_scaler", None)
            run.row(optimizer, outcome=outcome, norm=norm, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    return model


@healthy(events=["nan", "inf", "overflow", "skipped"])
def _scaler_with_accumulation_and_clip(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8)
    with watch(model, optimizer, scaler=scaler) as run:
        for i in range(2 * STEPS):
            scaler.scale(loss_of(model, i, 40.0)).backward()
            if i % 2:
                scaler.unscale_(optimizer)
                good = all(p.grad.isfinite().all() for p in model.parameters())
                outcome, norm = ("applied", math.nan) if good else ("skipped_scaler", None)
                run.row(optimizer, 2, outcome=outcome, norm=norm)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return model


@healthy()
def _multi_task_with_uncertainty_weights(watch: Watch) -> Any:
    model, weights = net(), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([{"params": model.parameters()}, {"params": [weights], "lr": 0.1}])
    with watch(nn.ModuleList([model, nn.ParameterList([weights])]), optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            losses = torch.stack([loss_of(model, i), loss_of(model, i + 100)])
            (losses * (-weights).exp() + weights).sum().backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy(ways=("found",))
def _an_optimizer_of_more_than_the_watched_model(watch: Watch) -> Any:
    body, head = net(1), net(2)
    optimizer = adam(body, head)
    with watch(body, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(lambda x: body(x) + head(x), i).backward()
            run.row(optimizer)
            optimizer.step()
    return body, head


@healthy()
def _criterion_with_parameters_and_an_optimizer_of_its_own(watch: Watch) -> Any:
    model, centers = net(), nn.Parameter(torch.ones(1))
    optimizer, of_centers = adam(model), torch.optim.SGD([centers], lr=0.5)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            of_centers.zero_grad()
            (model(inputs(i)) - centers).square().mean().backward()
            run.row(optimizer)
            optimizer.step()
            of_centers.step()
    return model


# -- the course of a training ---------------------------------------------------------------------------


@healthy()
def _warm_up_from_a_rate_of_zero(watch: Watch) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: i / 4 if i < 4 else 0.5 + 0.5 * math.cos(math.pi * (i - 4) / (STEPS - 5)),
    )
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            scheduler.step()
    return model


@healthy()
def _one_cycle(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            scheduler.step()
    return model


@healthy()
def _groups_with_and_without_weight_decay(watch: Watch) -> Any:
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _weight_decay_by_hand(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.999)
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _evaluation_between_epochs(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for epoch in range(3):
            for i in range(5):
                optimizer.zero_grad()
                loss_of(model, 5 * epoch + i).backward()
                run.row(optimizer)
                optimizer.step()
            model.eval()
            with torch.inference_mode():
                loss_of(model, 99)
            model.train()
    return model


@healthy()
def _resumed_from_a_checkpoint(watch: Watch) -> Any:
    first = net(5)
    before = adam(first)
    for i in range(3):
        before.zero_grad()
        loss_of(first, i).backward()
        before.step()
    model = net()
    optimizer = adam(model)
    model.load_state_dict(first.state_dict())
    optimizer.load_state_dict(before.state_dict())
    with watch(model, optimizer) as run:
        for i in range(3, STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _back_to_the_best_weights(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        best = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            if i % 5 == 4:  # also how a search for the learning rate ends
                model.load_state_dict(best[0])
                optimizer.load_state_dict(best[1])
    return model


@healthy()
def _state_of_the_optimizer_saved_on_the_way(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        get_optimizer_state_dict(model, optimizer)  # steps, to make the state
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            if i % 5 == 4:
                get_optimizer_state_dict(model, optimizer)
    return model


@healthy()
def _state_of_a_stateless_optimizer_saved_on_the_way(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)  # has no state, so that each saving steps anew
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            get_optimizer_state_dict(model, optimizer)
    return model


@healthy()
def _a_backward_before_watching(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    loss_of(model, 0).backward()  # warms up kernels
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _two_fits_one_after_the_other(watch: Watch) -> Any:
    model = net()
    for lr in (0.05, 0.01):
        optimizer = sgd(model, lr=lr)
        with watch(model, optimizer) as run:
            for i in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                optimizer.step()
    return model


@healthy()
def _folds_with_a_model_each(watch: Watch) -> Any:
    models = []
    for fold in range(3):
        model = net(fold)
        optimizer = adam(model)
        with watch(model, optimizer) as run:
            for i in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                optimizer.step()
        models.append(model)
    return models


@healthy()
def _several_watchers_side_by_side(watch: Watch) -> Any:
    models = [net(seed) for seed in range(3)]
    optimizers = [sgd(models[0]), adam(models[1]), sgd(models[2])]
    with (
        watch(models[0], optimizers[0]) as one,
        watch(models[1], optimizers[1]) as two,
        watch(models[2], optimizers[2]) as three,
    ):
        for i in range(5 * STEPS):  # one after the other, as an ensemble is trained
            for model, optimizer, run in zip(models, optimizers, (one, two, three), strict=True):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                optimizer.step()
    return models


@healthy()
def _ppo_with_an_early_stop(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model, lr=0.1)
    with watch(model, optimizer) as run:
        for i in range(4):
            with torch.no_grad():
                old = model(inputs(i))
            for _ in range(8):
                new = model(inputs(i))
                if (new - old).square().mean() > 0.05:
                    break
                optimizer.zero_grad()
                (new - 1).square().mean().backward()
                run.row(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    return model


@healthy()
def _reinforce(watch: Watch) -> Any:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            policy = torch.distributions.Normal(model(inputs(i)), 1.0)
            action = policy.sample()
            optimizer.zero_grad()
            (-policy.log_prob(action) * (1 - action.square())).mean().backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _curriculum_that_leaves_batches_out(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(2 * STEPS):
            if inputs(i).abs().max() > 2 + i / STEPS:
                continue
            loss = loss_of(model, i)
            if not loss.isfinite() or i % 7 == 6:  # a guard where it belongs: before the backward
                continue
            optimizer.zero_grad()
            loss.backward()
            run.row(optimizer)
            optimizer.step()
    return model


@healthy()
def _a_first_batch_whose_gradient_is_zero_at_a_rate_of_zero(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 3))
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i, float(i > 0)).backward()  # no valid target: still a step
            run.row(optimizer)
            optimizer.step()
            scheduler.step()
    return model


@healthy()
def _batches_whose_gradient_is_zero(watch: Watch) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(2 * STEPS):
            optimizer.zero_grad()
            loss_of(model, i, float(i % 5 != 3)).backward()
            run.row(optimizer)
            optimizer.step()
    return model


# -- without an optimizer, and inside the backward ------------------------------------------------------


@healthy(ways=("found",))
def _updates_by_hand(watch: Watch) -> Any:
    model = net()
    with watch(model) as run:
        for i in range(STEPS):
            model.zero_grad()
            loss_of(model, i).backward()
            run.row()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.05 * p.grad)
    return model


@healthy(ways=("found",))
def _updates_by_hand_through_data(watch: Watch) -> Any:
    model = net()
    with watch(model) as run:
        for i in range(STEPS):
            model.zero_grad()
            loss_of(model, i).backward()
            run.row()
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.05)
    return model


@healthy(ways=("found",))
def _updates_by_hand_that_zero_in_place(watch: Watch) -> Any:
    model = net()
    with watch(model) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
            run.row()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.05 * p.grad)
                    p.grad.zero_()
    return model


@healthy(ways=("found",))
def _master_weights(watch: Watch) -> Any:
    model = net()
    masters = [p.detach().double().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.Adam(masters, lr=0.01)
    with watch(model) as run:
        for i in range(STEPS):
            model.zero_grad()
            loss_of(model, i).backward()
            run.row()
            for master, p in zip(masters, model.parameters(), strict=True):
                master.grad = p.grad.double()
            optimizer.step()
            for master, p in zip(masters, model.parameters(), strict=True):
                p.data.copy_(master.data)
    return model


@healthy(ways=("found",))
def _a_few_backwards_to_look_at(watch: Watch) -> Any:
    model = net()
    with watch(model) as run:
        for i in range(5):
            model.zero_grad()
            loss_of(model, i).backward()
            run.row()
    return model


@healthy()
def _an_optimizer_for_each_parameter_in_the_backward(watch: Watch) -> Any:
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
    order: list[Tensor] = []
    handles = [p.register_post_accumulate_grad_hook(order.append) for p in model.parameters()]
    loss_of(model, 0).backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()

    def step(parameter: Tensor) -> None:
        run.row(optimizers[parameter])
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with watch(model, *[optimizers[p] for p in order]) as run:
        for i in range(STEPS):
            loss_of(model, i).backward()
    return model


@healthy(ways=("found",))
def _updates_by_hand_in_the_backward(watch: Watch) -> Any:
    model = net()
    squares: list[float] = []

    def update(parameter: Tensor) -> None:
        squares.append(norm_of([parameter]) ** 2)
        with torch.no_grad():
            parameter -= 0.05 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    with watch(model) as run:
        for i in range(STEPS):
            squares.clear()
            loss_of(model, i).backward()
            run.row(norm=math.sqrt(sum(squares)))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model(way: str) -> None:
    """A compiled model is recorded as any other, and nothing is told."""

    def compiled(watch: Watch) -> Any:
        model = net()
        fast = torch.compile(model, backend="aot_eager")
        optimizer = adam(model)
        with watch(fast, optimizer) as run:
            for i in range(STEPS):
                optimizer.zero_grad()
                loss_of(fast, i).backward()
                run.row(optimizer)
                optimizer.step()
        return model

    watch, told, state = _train(compiled, way)
    wrong = _wrong(watch, told, frozenset())
    wrong += differences(_train(compiled, "unwatched")[2], state)
    assert not wrong, "\n".join(wrong)


# -- the judges ------------------------------------------------------------------------------------------


def _train(loop: Loop, way: str) -> tuple[Watch, list[str], Any]:
    watch = Watch(way)
    with warnings_of_gradwatch() as told:
        torch.manual_seed(0)
        models = loop(watch)
        models = models if isinstance(models, (list, tuple)) else [models]
    return watch, told, [pieces(model.state_dict()) for model in models]


@functools.cache
def _trained(name: str, way: str) -> tuple[Watch, list[str], Any]:
    return _train(LOOPS[name].loop, way)


def _wrong(watch: Watch, told: list[str], events: frozenset[str]) -> list[str]:
    wrong = [f"warned: {message}" for message in told]
    for run in watch.runs:
        wrong += run.differences()
        seen = [event for event in run.watcher.events if event.kind not in events]
        wrong += [f"event {e.kind} of step {e.step}, {e.optimizer}: {e.message}" for e in seen]
        findings = run.watcher.report().findings
        allowed = OF_TOYS | events
        wrong += [f"finding {f.kind}: {f.title}" for f in findings if f.kind not in allowed]
    return wrong


ALL = [pytest.param(name, way, id=f"{name}-{way}") for name, loop in LOOPS.items() for way in loop.ways]  # fmt: skip


@pytest.mark.parametrize(("name", "way"), ALL)
def test_a_healthy_loop_is_recorded_and_nothing_is_told(name: str, way: str) -> None:
    """One row per step with its micro-batches and its norm; no warning, no event, no finding."""
    watch, told, _ = _trained(name, way)
    wrong = _wrong(watch, told, LOOPS[name].events)
    assert not wrong, "\n".join([f"{name}, optimizers {way}:", *wrong])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), ALL)
def test_a_healthy_loop_trains_as_if_unwatched(name: str, way: str) -> None:
    """The weights are bit-identical to those of the same loop without a watcher."""
    wrong = list(differences(_trained(name, "unwatched")[2], _trained(name, way)[2]))
    assert not wrong, f"{name}, optimizers {way}: {wrong[:3]}"


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if loop.ways == WAYS])
def test_a_healthy_loop_has_the_same_record_named_or_not(name: str) -> None:
    """Steps, parameters and events are the same, whether the optimizers were named or found."""
    named, found = (_trained(name, way)[0] for way in WAYS)
    for one, other in zip(named.runs, found.runs, strict=True):
        histories = [run.watcher.history for run in (one, other)]
        for frame in ("steps", "parameters", "events"):
            left, right = (getattr(history, frame)() for history in histories)
            left, right = (table.drop(columns="time_s", errors="ignore") for table in (left, right))
            assert left.equals(right), f"{name}, {frame}(): named\n{left}\nfound\n{right}"
