"""Writes in place, views, reordered rows, complex and sparse tensors."""

import torch
from torch import nn

from tests.replay.causes.cause import Net, Training, batch, cause, square


@cause("log_", module="", phase="forward", examples=(3,), loop="operation")
def log_in_place():
    """The operand is gone when the result is there."""

    def forward(self, x):
        h = self.fc(x).square()
        h.log_()  # <- born
        return h.mean()

    return Training(Net(forward), batch(3, 0.0))


@cause("div_", module="", phase="forward", examples=(2,), loop="operation")
def division_in_place():
    """An augmented assignment."""

    def forward(self, x):
        h = self.fc(x)
        h /= x.abs().sum(-1, keepdim=True)  # <- born
        return h

    return Training(Net(forward), batch(2, 0.0), loss=square)


@cause("sqrt", module="", phase="forward", examples=(1,))
def root_that_is_written_into_a_slice():
    """A NaN that is copied into a part of another tensor."""

    def forward(self, x):
        out = torch.zeros_like(x)
        out[:, :2] = x[:, :2]
        out[:, 2:] = torch.sqrt(x[:, 2:] + 5)  # <- born
        return out * self.fc(x).sigmoid()

    return Training(Net(forward), batch(1, -9.0), loss=square)


@cause("div_", module="", phase="forward")
def division_of_a_view():
    """A view is written, and its base is used."""

    def forward(self, x):
        h = torch.sigmoid(self.fc(x)) * 1
        half = h.view(len(x), 2, 2)[:, 0]
        half.div_((x[:, :2] * 1).sum(-1, keepdim=True))  # <- born
        return h

    return Training(Net(forward), batch(2, 0.0), loss=square)


@cause("pow", module="", phase="backward")
def power_of_selected_elements():
    """A mask selects the elements, and an assignment puts them back."""

    def forward(self, x):
        h = self.fc(x).abs()
        out, small = h.clone(), h < 0.05
        out[small] = h[small] ** 0.5  # <- born
        return out

    return Training(Net(forward), batch(2, 0.0, 9, 4), loss=square)


@cause("exp", module="", phase="forward", examples=(0,))
def scores_that_are_put_elsewhere():
    """index_put with accumulation, in an order that is not that of the examples."""

    def forward(self, x, places):
        scores = self.fc(x).abs().amax(1)
        grid = torch.zeros(4).index_put((places,), torch.exp(scores), accumulate=True)  # <- born
        return grid / grid.sum()

    places = torch.tensor([2, 0, 3, 1])
    return Training(Net(forward), batch(0, 1e4), places, loss=square)


def root_of_rows(h):
    """Return a mean of the roots of sums of squares."""
    return h.pow(2).sum(-1).sqrt().mean()  # <- born


@cause("sqrt", module="", phase="backward", examples=(2,), at=root_of_rows, loop="operation")
def rows_that_are_sorted():
    """The example is told through the sorting of the batch by length."""

    def forward(self, x, lengths):
        return root_of_rows(self.fc(x[lengths.argsort(descending=True)]))

    return Training(Net(forward), batch(2, 0.0), torch.tensor([1, 2, 9, 4]))


@cause("sqrt", module="", phase="backward", examples=(1,), at=root_of_rows)
def rows_of_two_views():
    """Two views of each example are concatenated, so that there are twice as many rows."""

    def forward(self, first, second):
        return root_of_rows(self.fc(torch.cat([first, second])))

    return Training(Net(forward), torch.randn(3, 4), batch(1, 0.0, 3, 4))


@cause("sqrt", module="", phase="backward", examples=(1,), at=root_of_rows)
def rows_with_the_time_first():
    """The batch is transposed and flattened."""

    def forward(self, x):
        return root_of_rows(self.fc(x.transpose(0, 1).reshape(-1, 4)))

    return Training(Net(forward), batch((1, 2), 0.0, 3, 6, 4))


@cause("sqrt", module="", phase="backward", examples=(0,), at=root_of_rows)
def rows_of_several_experts():
    """Rows are routed by masks and concatenated in the order of the experts."""

    def forward(self, x, expert):
        return root_of_rows(self.fc(torch.cat([x[expert == 0], x[expert == 1]])))

    return Training(Net(forward), batch(0, 0.0), torch.tensor([1, 0, 1, 0]))


@cause("log", module="", phase="forward", examples=())
def parameter_as_long_as_the_batch():
    """A vector of the model has as many elements as there are examples, and names none."""

    def forward(self, x):
        return self.fc(x).square().mean() - self.scale.weight[0].log().sum()  # <- born

    model = Net(forward, scale=nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model.scale.weight.copy_(torch.tensor([[1.0, 0.0, 2.0, 3.0]]))
    return Training(model, torch.randn(4, 4))


@cause("div", module="", phase="forward", examples=(1,))
def phase_of_a_complex_zero():
    """A complex number divided by its absolute value."""

    def forward(self, x):
        z = torch.fft.fft(self.fc(x))
        return (z / z.abs()).real  # <- born

    return Training(Net(forward), batch(1, 0.0), loss=square)


@cause("log", module="", phase="forward", examples=(2,), loop="operation")
def product_of_a_sparse_matrix():
    """A sparse argument and a sparse gradient of an embedding."""

    def forward(self, ids, edges):
        h = torch.sparse.mm(edges, self.embed(ids))
        return torch.log(h.square().sum(-1)).mean() + self.fc(h).mean()  # <- born

    model = Net(forward, embed=nn.Embedding(9, 4, sparse=True))
    with torch.no_grad():
        model.embed.weight[7] = 0
    return Training(model, torch.tensor([0, 1, 7, 2]), torch.eye(4).to_sparse())
