"""Attention: masks that are meant, and rows of which nothing is left."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.replay.causes.cause import Lambda, Net, Training, batch, cause, square

INF = math.inf


def padding(*empty):
    """A mask of padding, with examples in which everything is padding."""
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[:, -1] = True
    mask[list(empty)] = True
    return mask


class Attention(nn.Module):
    """Two heads, and a mask of keys that are left out."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, mask):
        """Attend from everywhere to where the mask is False."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(4)
        scores = scores.masked_fill(mask[:, None, None], -INF)
        p = F.softmax(scores, dim=-1)  # <- born
        return self.out((p @ v).transpose(1, 2).flatten(2))


@cause(
    "softmax", module="blocks.1", phase="forward", examples=(1, 4), at=Attention, loop="operation"
)
def row_without_any_key():
    """A softmax of a row that is all -Inf, in one block of three."""

    def forward(self, ids, masks):
        x = self.embed(ids)
        for block, mask in zip(self.blocks, masks, strict=True):
            x = x + block(x, mask)
        return x.square().mean()

    blocks = nn.ModuleList(Attention() for _ in range(3))
    model = Net(forward, embed=nn.Embedding(12, 8), blocks=blocks)
    masks = [padding(), padding(1, 4), padding()]
    return Training(model, torch.randint(0, 12, (6, 5)), masks)


@cause("softmax", module="attention", phase="forward", examples=(3,), loop="operation")
def multihead_attention_without_any_key():
    """The line is that of the call of torch's own attention."""

    def forward(self, x, mask):
        h, weights = self.attention(x, x, x, key_padding_mask=mask)  # <- born
        return h.square().mean() + weights.mean()

    model = Net(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True))
    return Training(model, torch.randn(6, 5, 8), padding(3))


@cause("log", module="bias", phase="forward", examples=(2,))
def bias_of_scaled_dot_product_attention():
    """A log of a distance of 0, of which a fused attention makes NaN."""

    class LogBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Linear(1, 2)

        def forward(self, distance):
            return self.heads(torch.log(distance)[..., None]).permute(0, 3, 1, 2)  # <- born

    def forward(self, x, distance):
        v = self.fc(x)[:, None].expand(-1, 2, -1, -1)
        out = F.scaled_dot_product_attention(v, v, v, attn_mask=self.bias(distance))
        return out.square().mean()

    distance = torch.rand(4, 5, 5) + 0.2
    distance[2, 0, 0] = 0
    return Training(Net(forward, bias=LogBias()), torch.randn(4, 5, 4), distance)


@cause("exp", module="", phase="forward", examples=(3,))
def softmax_by_hand():
    """An exp without the subtraction of the maximum."""

    def forward(self, x):
        e = torch.einsum("bid,bjd->bij", self.fc(x), x).exp()  # <- born
        return torch.bmm(e / e.sum(-1, keepdim=True), x)

    x = torch.randn(4, 5, 4)
    x[3] *= 100
    return Training(Net(forward), x, loss=square)


@cause("log", module="", phase="forward", examples=(2,))
def pointer_to_a_masked_place():
    """The mask is meant; the log of the probability that it made 0 is not."""

    def forward(self, x, mask, choice):
        scores = self.fc(self.rnn(x)[0])[..., 0].masked_fill(mask, -INF)
        p = scores.softmax(-1)  # <- possible
        return -torch.log(p.gather(1, choice)).mean()  # <- born

    choice = torch.zeros(6, 1, dtype=torch.long)
    choice[2] = 4
    model = Net(forward, rnn=nn.GRU(3, 4, batch_first=True))
    return Training(model, torch.randn(6, 5, 3), padding(), choice)


@cause("mul", module="", phase="forward")
def mask_by_multiplication():
    """0 times -Inf, where the mask keeps."""

    def forward(self, x, keep):
        scores = self.fc(x) + (1 - keep) * -INF  # <- born
        return scores.softmax(-1)[:, 0].square().mean()

    keep = torch.ones(4, 4)
    keep[2, 1] = 0
    return Training(Net(forward), torch.randn(4, 4), keep)


@cause("add", module="attention", phase="forward", examples=(1,), loop="operation")
def two_masks_of_the_smallest_half():
    """Twice the smallest float16 is -Inf, so that a row is all -Inf."""

    def attend(scores, keep):
        bias = (1 - keep)[:, None, :] * torch.finfo(scores.dtype).min
        scores = scores + bias + bias  # <- born
        return F.softmax(scores, dim=-1)

    def forward(self, x, keep):
        return self.attention(self.fc(x) @ x.mT, keep)

    model = Net(forward, attention=Lambda(attend)).half()
    keep = batch(1, 0.0, 3, 4, draw=torch.ones).half()
    return Training(model, torch.randn(3, 4, 4).half(), keep, loss=square)
