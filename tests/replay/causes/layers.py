"""Normalization, recurrent networks, images, sound and graphs."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.replay.causes.cause import Lambda, Net, Training, batch, cause, square


@cause("div", module="norm", phase="forward", examples=(1,), loop="operation")
def layer_norm_of_a_constant_row():
    """0 divided by a standard deviation of 0, in a batch that is a dict."""

    def normalize(x):
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / deviation  # <- born

    def forward(self, batch):
        return self.fc(self.norm(batch["x"]))

    return Training(Net(forward, norm=Lambda(normalize)), {"x": batch(1, 2.0)}, loss=square)


@cause("sqrt", module="", phase="forward", examples=(2,))
def variance_by_moments():
    """A difference of two means of squares that rounding makes negative."""

    def variance(x):
        return (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2

    def forward(self, x):
        return self.head(x / (variance(x).sqrt() + 1e-3))  # <- born

    rows = torch.linspace(1000, 1001, 99)[:, None].repeat(1, 8)
    x = batch(2, rows[variance(rows).argmin()], 4, 8)
    return Training(Net(forward, head=nn.Linear(8, 2)), x, loss=square)


@cause("rsqrt", module="layers.1", phase="forward", examples=(0,))
def root_mean_square_norm_without_epsilon():
    """An activation has made a row 0 that the next layer divides by."""

    def normalize(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))  # <- born

    def forward(self, x):
        return self.layers(x) + self.fc(x)

    layers = nn.Sequential(nn.ReLU(), Lambda(normalize), nn.Linear(4, 4))
    return Training(Net(forward, layers=layers), batch(0, -1.0), loss=square)


@cause("std", module="", phase="forward")
def deviation_of_one_example():
    """A standard deviation over one example has no degree of freedom."""

    def forward(self, x):
        h = self.fc(x)
        return h.square().mean() + F.relu(1 - h.std(dim=0)).mean()  # <- born

    return Training(Net(forward), torch.randn(1, 4))


@cause("layer_norm", module="norm", examples=(3,), loop="operation")
def layer_norm_of_torch_without_epsilon():
    """The line is that of the call of torch's own module."""

    def forward(self, x):
        return self.fc(self.norm(x))  # <- born

    return Training(Net(forward, norm=nn.LayerNorm(4, eps=0.0)), batch(3, 2.0), loss=square)


@cause("log", module="", phase="forward", examples=(2,), loop="operation")
def network_that_changes_its_buffers():
    """Batch norm, dropout, spectral norm and a counter change in the forward that is replayed."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        h = self.drop(self.bn(self.spectral(x)))
        return h.mean() - torch.log(self.fc(x).square().sum(1)).mean()  # <- born

    spectral = parametrizations.spectral_norm(nn.Linear(4, 4))
    model = Net(forward, spectral=spectral, bn=nn.BatchNorm1d(4), drop=nn.Dropout(0.3))
    return Training(model, batch(2, 0.0))


@cause("div", module="", phase="forward", examples=(1,), loop="operation")
def pooling_of_a_packed_sequence():
    """The rows of a packed sequence are in another order than the examples."""

    def forward(self, x, lengths, keep):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)  # <- born

    keep = batch(1, 0.0, 3, 6, draw=torch.ones)
    model = Net(forward, rnn=nn.LSTM(4, 5, batch_first=True))
    return Training(model, torch.randn(3, 6, 4), torch.tensor([6, 2, 3]), keep, loss=square)


@cause("sqrt", module="", phase="backward", examples=())
def root_of_packed_rows():
    """A packed sequence lies time step by time step: its rows are no examples, and none is named."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.fc(packed.data).pow(2).sum(-1).sqrt().mean()  # <- born

    x = torch.randn(3, 3, 4)
    x[1, 0] = 0
    return Training(Net(forward), x, torch.tensor([1, 3, 2]))


@cause("exp", module="cell", phase="forward", examples=(0,))
def exponential_gate_of_a_cell():
    """A cell that is called at every time step, at one of which its gate overflows."""

    def step(i, h):
        i = torch.exp(i)  # <- born
        return (h + i) / (1 + i)

    def forward(self, x):
        h, outputs = torch.zeros(4, 4), []
        for one in x.unbind(1):
            h = self.cell(self.fc(one), h)
            outputs.append(h)
        return torch.stack(outputs, 1)

    x = torch.randn(4, 6, 4)
    x[0, 2] = 1e4
    return Training(Net(forward, cell=Lambda(step)), x, loss=square)


@cause("mm", module="fc", phase="forward", examples=(1,))
def recurrence_that_explodes():
    """One linear layer, called again and again, overflows in the end."""

    def forward(self, x):
        for _ in range(6):
            x = self.fc(x)  # <- born
        return x * 1e-20

    model = Net(forward)
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(4) * 1e3)
    x = torch.randn(4, 4)
    x[1] *= 1e22
    return Training(model, x, loss=square)


@cause("pow", module="gamma", phase="backward", examples=(2,))
def gamma_of_a_black_pixel():
    """A power below 1 has an infinite gradient at 0."""

    class Gamma(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, image):
            return (image * self.gain) ** (1 / 2.2)  # <- born

    images = torch.rand(4, 3, 8, 8) + 0.05
    images[2, :, 3, 3] = 0
    model = nn.Sequential()
    model.add_module("gamma", Gamma())
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    return Training(model, images, loss=square)


@cause("convolution", module="features.1", phase="forward", examples=(2,))
def convolution_that_overflows():
    """A layer of torch in a Sequential: the line is that of the call of the Sequential."""

    def forward(self, x):
        return self.features(x)  # <- born

    features = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU())
    with torch.no_grad():
        features[1].weight.abs_().mul_(1e4)
    images = batch(2, 1e37, 4, 3, 6, 6)
    return Training(Net(forward, features=features), images, loss=square)


@cause("mean", module="", phase="forward")
def mean_of_an_empty_crop():
    """A slice beyond the image has no pixel."""

    def forward(self, x, top):
        return self.conv(x)[:, :, top:].mean((2, 3))  # <- born

    model = Net(forward, conv=nn.Conv2d(3, 4, 3))
    return Training(model, torch.randn(2, 3, 8, 8), 6, loss=square)


@cause("log", module="spectrogram", phase="forward", examples=(2,))
def spectrogram_of_silence():
    """A log of a power that a complex Fourier transform gave."""

    class Spectrogram(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("window", torch.hann_window(16))

        def forward(self, wave):
            s = torch.stft(wave, 16, 8, window=self.window, return_complex=True)
            return torch.log(s.abs() ** 2)  # <- born

    class Sound(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.spectrogram = Spectrogram()

        def forward(self, wave):
            return self.spectrogram(wave * self.gain)

    return Training(Sound(), batch(2, 0.0, 4, 64), loss=square)


@cause("pow", module="conv", phase="forward")
def node_without_neighbors():
    """A degree of 0 to the power -1/2, of which 0 times Inf is made."""

    def propagate(h, edges):
        scale = edges.sum(1).pow(-0.5)  # <- born
        return (scale[:, None] * edges * scale) @ h

    def forward(self, x, edges):
        return self.conv(self.fc(x), edges)

    edges = torch.ones(6, 6)
    edges[3] = edges[:, 3] = 0
    model = Net(forward, conv=Lambda(propagate))
    return Training(model, torch.randn(6, 4), edges, loss=square)
