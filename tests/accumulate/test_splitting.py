"""Splitting a batch into parts of equal size."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from gradwatch.accumulate.splitting import batch_length, split_batch

Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping with attributes."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Unregistered:
    x: torch.Tensor


@dataclass
class Registered:
    x: torch.Tensor
    note: str


@dataclass
class RegisteredWithoutKeys:
    x: torch.Tensor


pytree.register_pytree_node(
    Registered,
    lambda r: ([r.x], r.note),
    lambda leaves, note: Registered(*leaves, note),
    serialized_type_name="gradwatch.tests.Registered",
    flatten_with_keys_fn=lambda r: ([(pytree.GetAttrKey("x"), r.x)], r.note),
)
pytree.register_pytree_node(
    RegisteredWithoutKeys,
    lambda r: ([r.x], None),
    lambda leaves, _: RegisteredWithoutKeys(*leaves),
    serialized_type_name="gradwatch.tests.RegisteredWithoutKeys",
)


def _only(batch, size=2):
    return [part for part, _ in split_batch(batch, size)]


@given(length=st.integers(1, 40), size=st.integers(1, 45), width=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_parts_put_together_are_the_batch(length, size, width):
    """Joined again the parts are the batch; none is above the size, and they differ by one at most."""
    x = torch.arange(length * width).reshape(length, width)
    names = [str(index) for index in range(length)]
    parts = split_batch({"x": x, "deep": (x.numpy(), names)}, size)
    counts = [count for _, count in parts]
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), x)
    assert np.array_equal(np.concatenate([part["deep"][0] for part, _ in parts]), x.numpy())
    assert [name for part, _ in parts for name in part["deep"][1]] == names
    assert [len(part["x"]) for part, _ in parts] == counts
    assert sum(counts) == length
    assert counts[0] <= size
    assert counts[0] == max(counts) <= min(counts) + 1
    assert len(parts) == -(-length // size)


def test_a_last_example_is_no_part_of_its_own():
    """Nine examples by eight at most are five and four rather than eight and one."""
    assert [count for _, count in split_batch(torch.zeros(9), 8)] == [5, 4]


def test_parts_share_the_memory_of_the_batch():
    """Tensors and arrays are not copied."""
    x, y = torch.zeros(4, 2), np.zeros((4, 2))
    for part_x, part_y in _only((x, y)):
        part_x.add_(1)
        np.add(part_y, 1, out=part_y)
    assert x.eq(1).all()
    assert (y == 1).all()


def test_a_batch_that_fits_is_passed_on_as_it_is():
    """One part is the batch itself."""
    batch = {"x": torch.zeros(4)}
    ((part, count),) = split_batch(batch, 4)
    assert part is batch
    assert count == batch_length(batch) == 4


def test_gradients_flow_through_the_parts():
    """The parts of a tensor that requires a gradient leave the gradient of the whole in it."""
    x = torch.arange(5.0, requires_grad=True)
    for part in _only(x):
        part.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(4), torch.zeros(4, 2)),
        [torch.zeros(4), torch.zeros(4, 2)],
        ((torch.zeros(4), torch.zeros(4)), torch.zeros(4)),
        {"input_ids": torch.zeros(4, 7), "labels": torch.zeros(4)},
        OrderedDict(b=torch.zeros(4), a=torch.zeros(4)),
        Pair(torch.zeros(4), torch.zeros(4)),
        Registered(torch.zeros(4), "note"),
        {"deep": [{"x": RegisteredWithoutKeys(torch.zeros(4))}]},
        Encoding(input_ids=torch.zeros(4, 7), attention_mask=torch.zeros(4, 7)),
        (Encoding(x=torch.zeros(4)), torch.zeros(4)),
    ],
)
def test_the_structure_is_kept(batch):
    """Each part is of the classes of the batch, with the same names in the same order."""
    for part in _only(batch):
        assert type(part) is type(batch)
        if isinstance(batch, (dict, UserDict)):
            assert list(part) == list(batch)
        assert pytree.tree_structure(part) == pytree.tree_structure(batch)
        assert batch_length(part) == 2
    assert batch_length(batch) == 4


def test_an_encoding_keeps_its_attributes():
    """A mapping of another class can be used as before, and the batch's own is not changed."""
    batch = Encoding(input_ids=torch.arange(4))
    first, second = _only(batch)
    assert first.input_ids.tolist() == [0, 1]
    assert second.input_ids.tolist() == [2, 3]
    assert batch.input_ids.tolist() == [0, 1, 2, 3]


def test_a_mapping_that_cannot_be_written_becomes_a_dict():
    """A read-only mapping is split too."""
    assert _only(MappingProxyType({"x": torch.zeros(4)}))[0].keys() == {"x"}


def test_what_is_not_per_example_is_in_each_part():
    """Numbers, strings, None, tensors without a dimension and shorter lists stay as they are."""
    same = {
        "none": None,
        "text": "four",
        "number": 4,
        "scalar": torch.tensor(4.0),
        "array": np.array(4.0),
        "numpy": np.float32(4.0),
        "type": torch.float16,
        "shape": torch.Size([4, 4]),
        "names": ["cat", "dog", "cow"],
        "empty": [],
    }
    for part in _only({"x": torch.zeros(4), **same}):
        assert {key: part[key] for key in same} == same


def test_a_list_with_an_item_per_example_is_cut():
    """Strings and numbers in a list or a tuple go with their examples."""
    batch = {"x": torch.zeros(3), "text": ["a", "b", "c"], "id": (1, 2, 3)}
    first, second = _only(batch)
    assert (first["text"], first["id"]) == (["a", "b"], (1, 2))
    assert (second["text"], second["id"]) == (["c"], (3,))


@pytest.mark.parametrize("length", [2, 3])
def test_columns_of_strings_are_not_mistaken_for_examples(length):
    """What default_collate makes of pairs of strings is cut inside, whatever the batch size."""
    samples = [(torch.zeros(1), (f"a{i}", f"b{i}")) for i in range(length)]
    parts = _only(default_collate(samples), size=1)
    assert [part[1] for part in parts] == [[(f"a{i}",), (f"b{i}",)] for i in range(length)]


def test_a_list_of_token_lists_is_cut_outside():
    """Lists of different lengths in a list are one item per example."""
    first, second = _only((torch.zeros(3), [["a"], ["b", "c", "d"], []]))
    assert first[1] == [["a"], ["b", "c", "d"]]
    assert second[1] == [[]]


def test_a_list_of_objects_is_cut():
    """Items may be anything, such as images or records that gradwatch does not know."""
    items = [Unregistered(torch.zeros(index)) for index in range(4)]
    assert _only((items, torch.zeros(4)))[1][0] == items[2:]


def test_a_batch_of_strings_alone_is_cut():
    """Without any tensor the lists say how many examples there are."""
    assert _only(["a", "b", "c", "d"]) == [["a", "b"], ["c", "d"]]
    assert _only({"x": ["a", "b"], "y": [0, 1], "task": "qa"}, size=1)[1] == {
        "x": ["b"],
        "y": [1],
        "task": "qa",
    }


def test_a_sparse_tensor_is_cut():
    """A sparse COO tensor is split by rows."""
    x = torch.eye(4).to_sparse()
    assert torch.equal(torch.cat([part.to_dense() for part in _only(x)]), torch.eye(4))


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"x": torch.zeros(4), "labels": torch.zeros(3)}, ("batch['x']", "batch['labels']")),
        ((torch.zeros(4), (torch.zeros(4), np.zeros(5))), ("batch[0]", "batch[1][1]")),
        ([Registered(torch.zeros(4), ""), torch.zeros(3)], ("batch[0].x", "batch[1]")),
        (Encoding(a=torch.zeros(4), b=torch.zeros(3)), ("batch['a']", "batch['b']")),
        ({"a": ["x", "y"], "b": ["x"]}, ("batch['a']", "batch['b']")),
        (
            [RegisteredWithoutKeys(torch.zeros(1)), torch.zeros(3)],
            ("batch[0][0]", "batch[1]"),
        ),
    ],
)
def test_different_lengths_are_refused_by_name(batch, names):
    """The message says where the two tensors are and how long."""
    with pytest.raises(ValueError, match="examples and") as caught:
        split_batch(batch, 2, name="watcher.run_batch")
    assert "watcher.run_batch() got a batch" in str(caught.value)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("batch", "error", "text"),
    [
        (torch.zeros(0, 3), ValueError, "of no examples: batch has length 0"),
        ({"x": torch.zeros(0)}, ValueError, r"batch\['x'\] has length 0"),
        (torch.tensor(1.0), TypeError, "of type Tensor without a tensor"),
        ({"x": 1, "y": None}, TypeError, "of type dict without a tensor"),
        (None, TypeError, "of type NoneType without"),
        ("text", TypeError, "of type str without"),
        ([], TypeError, "of type list without"),
        (
            (torch.zeros(2), pack_sequence([torch.zeros(3), torch.zeros(2)])),
            TypeError,
            r"a PackedSequence at batch\[1\].*padded",
        ),
        (
            (torch.zeros(2), Unregistered(torch.zeros(2))),
            TypeError,
            r"a Unregistered at batch\[1\]",
        ),
        ((torch.zeros(2), {1, 2}), TypeError, r"a set at batch\[1\]"),
    ],
)
@pytest.mark.parametrize("size", [1, 8])
def test_what_cannot_be_cut_is_refused(batch, error, text, size):
    """The message names the place; so it does where the batch would not have to be cut."""
    with pytest.raises(error, match=text):
        split_batch(batch, size)


@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
def test_layouts_without_rows_are_refused():
    """Nested and compressed tensors cannot be cut along dimension 0."""
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    for tensor, layout in [(nested, "nested"), (torch.eye(2).to_sparse_csr(), "sparse_csr")]:
        with pytest.raises(TypeError, match=f"{layout} tensor at batch, which cannot be cut"):
            split_batch(tensor, 1)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)]
)
def test_a_size_is_a_positive_whole_number(size, error):
    """Anything else is refused, with the value and what to write."""
    with pytest.raises(error, match=rf"at least 1, got {size!r} .*Write 1 or more"):
        split_batch(torch.zeros(2), size)
