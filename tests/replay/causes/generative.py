"""Autoencoders, flows, diffusion, policies and linear algebra."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.replay.causes import formulas
from tests.replay.causes.cause import Lambda, Net, Training, batch, cause, square


@cause("exp", module="", phase="forward", examples=(2,), loop="operation")
def variance_that_overflows():
    """An exp of a log variance, before the random numbers of the reparametrization."""

    def sample(mean, log_variance):
        deviation = torch.exp(0.5 * log_variance)  # <- born
        return mean + deviation * torch.randn_like(deviation)

    def forward(self, x):
        return self.decoder(sample(x, self.fc(x).abs()))

    model = Net(forward, decoder=nn.Linear(4, 4))
    return Training(model, batch(2, 1e4), loss=square)


@cause("log", phase="forward", examples=(1,), loop="operation")
def divergence_of_no_variance():
    """An exp in the model underflows; the log of its 0 is taken in the loss."""

    def forward(self, x):
        mean = self.fc(x)
        return mean, torch.exp(-mean.abs())

    def loss(output):
        mean, scale = output
        return (mean**2 + scale**2 - 2 * torch.log(scale)).mean()  # <- born

    return Training(Net(forward), batch(1, 1e4), loss=loss)


@cause("log", module="density", phase="forward", examples=(3,), at=formulas.log_density)
def scale_of_zero_in_a_helper():
    """A function in another file takes the log of a scale that is 0."""

    def density(scale, y):
        return -formulas.log_density(y, torch.zeros_like(y), scale)

    def forward(self, x, y):
        return self.density(F.relu(self.fc(x)), y)

    model = Net(forward, density=Lambda(density))
    with torch.no_grad():
        model.fc.weight.abs_().add_(0.1)
    return Training(model, batch(3, 0.0, draw=torch.rand), torch.rand(4, 4), loss=square)


@cause("logit", module="layers.1", phase="forward", examples=(3,))
def logit_of_one():
    """A flow of several layers in a ModuleList, each of which returns two tensors."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale, self.scale.log().sum()

    def logit(x):
        z = torch.logit(x)  # <- born
        return z, F.softplus(z).sum() + F.softplus(-z).sum()

    def forward(self, x):
        total = self.fc(x).sum() * 0
        for layer in self.layers:
            x, change = layer(x)
            total = total + change
        return x.square().sum() - total

    x = torch.rand(4, 4) * 0.8 + 0.1
    x[3, 0] = 1
    return Training(Net(forward, layers=nn.ModuleList([Scale(), Lambda(logit), Scale()])), x)


@cause("div", module="", phase="forward", examples=(3,), loop="operation")
def last_step_of_a_noise_schedule():
    """A buffer is 0 at the time step of one example, and is divided by."""

    class Diffusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = nn.Linear(4, 4)
            self.register_buffer("signal", torch.linspace(1, 0, 11))

        def forward(self, x, time):
            a, noise = self.signal[time][:, None], torch.randn_like(x)
            noisy = a.sqrt() * x + (1 - a).sqrt() * noise
            guess = (noisy - (1 - a).sqrt() * self.noise(noisy)) / a.sqrt()  # <- born
            return F.mse_loss(guess, x)

    return Training(Diffusion(), torch.randn(4, 4), torch.tensor([1, 3, 2, 10]))


@cause("exp", module="", phase="forward", examples=(2,), loop="operation")
def ratio_of_policies():
    """A ratio of probabilities, of which the logarithms come from torch.distributions."""

    def forward(self, state, action, old, advantage):
        policy = torch.distributions.Normal(self.fc(state), 1.0)
        new = policy.log_prob(action).sum(-1)
        ratio = torch.exp(new - old)  # <- born
        return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    old = torch.tensor([0.0, 0.0, -500.0, 0.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0])
    return Training(Net(forward), torch.randn(4, 4), torch.randn(4, 4), old, advantage)


@cause("acos", module="", phase="backward", examples=(1,))
def angle_between_equal_vectors():
    """An inverse cosine has an infinite gradient at 1."""

    def forward(self, x):
        cosine = (self.gain.weight * x).clamp(-1, 1)
        return torch.acos(cosine)  # <- born

    model = Net(forward, gain=nn.Linear(1, 1, bias=False))
    nn.init.ones_(model.gain.weight)
    x = torch.rand(4, 4) * 0.9
    x[1, 2] = 1
    return Training(model, x, loss=square)


@cause("lgamma", module="", phase="forward", examples=(1,))
def count_model_without_dispersion():
    """A logarithm of the gamma function at 0, between two that are finite."""

    def forward(self, x, count):
        r = F.relu(self.fc(x))
        return torch.lgamma(count + r) - torch.lgamma(r) - torch.lgamma(count + 1)  # <- born

    model = Net(forward)
    nn.init.ones_(model.fc.weight)
    return Training(model, batch(1, -1.0, draw=torch.rand), torch.ones(4, 4), loss=square)


@cause("linalg_eigh", module="", phase="backward")
def eigenvectors_of_equal_eigenvalues():
    """The gradient of an eigenvector divides by differences of eigenvalues."""

    def forward(self, x):
        values, vectors = torch.linalg.eigh(self.fc.weight @ self.fc.weight.T)  # <- born
        return (vectors.sum(0) * x).sum().square() + values.sum()

    model = Net(forward)
    nn.init.eye_(model.fc.weight)
    return Training(model, torch.randn(4))
