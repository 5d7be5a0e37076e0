"""In a plain loop the line in the loss is found, from the statements of the loop itself."""

import inspect

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import processes


class Net(nn.Module):
    """Its outputs are probabilities, which become exactly 0 for large inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.softmax(self.layer(x), 1)


def batch(step, bad):
    """Return a batch of five; the bad one makes probabilities of 0."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 4, generator=generator)
    if bad:
        x[2] *= 1e6
    return x, nn.functional.one_hot(torch.arange(5) % 3, 3).float()


def log_likelihood(probabilities, target):
    """Return the mean log likelihood, which log() makes infinite."""
    return (torch.log(probabilities) * target).sum(1).mean()  # the function


def through_a_function(model, optimizer, seen):
    """Call a function that makes the loss."""
    for step in range(4):
        x, y = batch(step, step == 2)
        optimizer.zero_grad()
        out = model(x)
        loss = -log_likelihood(out, y)
        seen.append(loss.item())
        loss.backward()
        optimizer.step()


def in_one_statement(model, optimizer, seen):
    """Make the loss where the backward is."""
    for step in range(4):
        x, y = batch(step, step == 2)
        (-(torch.log(model(x)) * y).sum(1).mean()).backward()  # here
        optimizer.step()
        optimizer.zero_grad()


def over_several_statements(model, optimizer, seen):
    """Make the loss in parts, with branches and a with block."""
    for step in range(4):
        x, y = batch(step, step == 2)
        with torch.autocast("cpu", enabled=False):
            out = model(x)
            parts = []
            for k in range(3):
                one = out[:, k].log() * y[:, k]  # here
                parts.append(one.mean())
                seen.append(k)
        loss = sum(parts)
        if step < 9:
            loss = -loss
        optimizer.zero_grad(set_to_none=True)
        (loss / 2).backward()
        optimizer.step()


def in_a_method(model, optimizer, seen):
    """Keep the loss in an attribute."""

    class Trainer:
        """A trainer."""

        def __init__(self):
            self.count = 0

        def log(self, value):
            seen.append(value)

        def step(self, x, y):
            optimizer.zero_grad()
            self.out = model(x)
            self.count += 1
            self.loss = -(torch.log(self.out) * y).mean()  # here
            self.log(self.count)
            self.loss.backward()
            optimizer.step()

    trainer = Trainer()
    for step in range(4):
        trainer.step(*batch(step, step == 2))
    assert trainer.count == 4


def in_two_micro_batches(model, optimizer, seen):
    """Accumulate; the second micro-batch is bad."""
    for step in range(3):
        for part in range(2):
            x, y = batch(step * 2 + part, step == 1 and part == 1)
            loss = -(torch.log(model(x)) * y).mean() / 2  # here
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_a_dict(model, optimizer, seen):
    """Keep outputs and loss in a dict."""
    for step in range(4):
        x, y = batch(step, step == 2)
        found = {"out": model(x)}
        found["loss"] = -(found["out"].log() * y).mean()  # here
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def by_torch_autograd(model, optimizer, seen):
    """Call the backward as a function."""
    for step in range(4):
        x, y = batch(step, step == 2)
        loss = -(torch.log(model(x)) * y).mean()  # here
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


LOOPS = [
    through_a_function,
    in_one_statement,
    over_several_statements,
    in_a_method,
    in_two_micro_batches,
    in_a_dict,
    by_torch_autograd,
]


def line_of(function):
    """Return the line that is marked, and what it says."""
    marked = "# here" if "# here" in inspect.getsource(function) else "# the function"
    of = function if marked == "# here" else log_likelihood
    lines, first = inspect.getsourcelines(of)
    (place,) = (i for i, line in enumerate(lines) if line.rstrip().endswith(marked))
    return first + place, lines[place].strip()


def run(loop, policy="explain"):
    """Run a loop under a watcher; return what it has seen, its weights and the explanations."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with gradwatch.watch(model, optimizer, on_nonfinite=policy) as watcher:
        loop(model, optimizer, seen)
    return seen, model.layer.weight.detach().clone(), watcher.explanations


@pytest.mark.parametrize("loop", LOOPS, ids=lambda one: one.__name__)
def test_the_line_in_the_loss_is_found(loop):
    """The operation is found at its line, with the example, though nobody gave a closure."""
    _, _, (explanation,) = run(loop)
    assert (explanation.line, explanation.source) == line_of(loop)
    assert explanation.operation == "log"
    assert explanation.examples == (2,)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda one: one.__name__)
def test_nothing_of_the_loop_happens_twice(loop):
    """What the loop counts, appends and trains is what it is without an explanation."""
    seen, weight, _ = run(loop)
    plainly, plain, _ = run(loop, policy="skip")
    assert repr(seen) == repr(plainly)
    assert torch.equal(weight, plain)


def test_a_script_that_is_no_function(tmp_path):
    """Statements of a module are found as well; what it prints is printed once."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from tests.replay.test_loop import Net, batch\n"
        "model = Net()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for step in range(4):\n"
        "    x, y = batch(step, step == 2)\n"
        "    out = model(x)\n"
        "    loss = -(out.log() * y).mean()\n"
        "    print(step, flush=True)\n"
        "    optimizer.zero_grad()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n",
        encoding="utf-8",
    )
    root = processes.Path(__file__).parents[2]
    command = ("-m", "gradwatch", "run", "--on-nonfinite", "explain", "train.py")
    done = processes.run(*command, cwd=tmp_path, env=processes.environment([root]))
    assert done.stdout == "0\n1\n2\n3\n"
    assert "train.py:8\ngradwatch:     loss = -(out.log() * y).mean()" in done.stderr


def explained(loop):
    """Return the only explanation of a loop."""
    _, _, (explanation,) = run(loop)
    return explanation


def test_a_batch_that_is_gone_is_not_taken_for_the_bad_one():
    """Once the loop has other data in its variables, its statements would make another loss."""

    def loop(model, optimizer, seen):
        for step in range(4):
            x, y = batch(step, step == 2)
            loss = -(torch.log(model(x)) * y).mean()
            loss.backward()
            x, y = batch(99, bad=False)
            optimizer.step()
            optimizer.zero_grad()

    assert explained(loop).origin == "output_gradient"


def test_an_earlier_micro_batch_is_not_taken_for_the_last_one():
    """Of several micro-batches the variables hold the last one only."""

    def loop(model, optimizer, seen):
        for _ in range(2):
            for part in range(2):
                x, y = batch(part, bad=part == 0)
                (-(torch.log(model(x)) * y).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        loop(model, optimizer, [])
    assert {one.origin for one in watcher.explanations} == {"output_gradient"}


def test_a_backward_in_a_function_that_has_returned():
    """Where the loop's variables are gone, the model's part is all that is told."""

    def backward_of(model, x, y):
        (-(torch.log(model(x)) * y).mean()).backward()

    def loop(model, optimizer, seen):
        for step in range(4):
            backward_of(model, *batch(step, step == 2))
            optimizer.step()
            optimizer.zero_grad()

    assert explained(loop).origin == "output_gradient"


def test_what_draws_from_an_iterator_is_not_run_again():
    """A statement that takes the batch from an iterator would take the next one."""

    def loop(model, optimizer, seen):
        batches = iter([batch(step, step == 2) for step in range(4)])
        for _ in range(4):
            loss = model.layer.weight.sum() * 0 - torch.log(model(next(batches)[0])).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert next(batches, None) is None

    assert explained(loop).origin == "output_gradient"


def test_a_source_that_is_not_there():
    """A loop of which there is no source is explained as far as the model goes."""
    source = inspect.getsource(in_one_statement)
    scope = {"batch": batch, "torch": torch}
    exec(compile(source, "nowhere.py", "exec"), scope)
    assert explained(scope["in_one_statement"]).origin == "output_gradient"


def test_a_critic_whose_loss_goes_bad_beside_a_generator():
    """Of two backwards in a loop the one of the bad step is run again."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    first = torch.optim.SGD(critic.parameters(), lr=0.1)
    second = torch.optim.SGD(generator.parameters(), lr=0.1)
    with gradwatch.watch_all(on_nonfinite="explain") as watching:
        for step in range(4):
            fake = generator(torch.randn(5, 2))
            real = torch.randn(5, 3) * (1e6 if step == 2 else 1.0)
            first.zero_grad()
            loss = -(critic(real).log() + (1 - critic(fake.detach())).log()).mean()  # here
            loss.backward()
            first.step()
            second.zero_grad()
            loss = -critic(fake).clamp(1e-3).log().mean()
            loss.backward()
            second.step()
    found = [one for watcher in watching.watchers for one in watcher.explanations]
    assert [(one.step, one.operation) for one in found] == [(3, "log")]
    assert found[0].source.endswith("# here")


def test_a_weight_that_makes_the_mean_of_a_loss_undefined():
    """0 / 0 in the mean over what is masked is found, and what it was made of."""

    def loop(model, optimizer, seen):
        for step in range(4):
            x, y = batch(step, bad=False)
            mask = torch.zeros(5) if step == 2 else torch.ones(5)
            each = (model(x) - y).square().sum(1)
            loss = (each * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    found = explained(loop)
    assert found.operation == "div"
    assert found.source == "loss = (each * mask).sum() / mask.sum()"
