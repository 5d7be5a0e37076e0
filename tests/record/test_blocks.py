"""Module blocks: their choice and their norms."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import Layout, RecordBatch, StepRecord
from gradwatch.record.blocks import MAX_BLOCKS, ROOT, Blocks, BlockScalars, assign_blocks


def gpt(layers):
    """Modules of the parameters of a GPT, as transformers names them."""
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1")
    inner = [f"transformer.h.{i}.{part}" for i in range(layers) for part in parts]
    return ["transformer.wte", "transformer.wpe", *inner, "transformer.ln_f", "lm_head"]


def distinct(modules, limit=MAX_BLOCKS):
    """The blocks of a model, in model order."""
    return list(dict.fromkeys(assign_blocks(modules, limit)))


def test_small_model_is_shown_module_by_module():
    """Where all modules fit, each is its own block."""
    modules = ["conv1", "conv1", "block.conv", "block.norm", "fc"]
    assert assign_blocks(modules) == modules


def test_takes_the_deepest_level_that_fits():
    """A GPT of 12 layers is shown as 12 layers, not as their 60 parts and not as one stack."""
    expected = ["transformer.wte", "transformer.wpe", *[f"transformer.h.{i}" for i in range(12)]]
    assert distinct(gpt(12)) == [*expected, "transformer.ln_f", "lm_head"]


def test_deep_stack_is_cut_in_equal_runs():
    """A GPT of 30 layers keeps its depth visible: runs of two layers rather than one block."""
    runs = [f"transformer.h.{i}-{i + 1}" for i in range(0, 30, 2)]
    expected = ["transformer.wte", "transformer.wpe", *runs, "transformer.ln_f", "lm_head"]
    assert distinct(gpt(30)) == expected


def test_last_run_may_be_shorter():
    """A run of one layer is named after that layer."""
    assert distinct([f"layers.{i}" for i in range(7)], limit=4) == [
        "layers.0-1", "layers.2-3", "layers.4-5", "layers.6",
    ]  # fmt: skip


def test_flat_sequential_is_cut_in_runs():
    """A Sequential of 150 linear layers has blocks although it has no level between."""
    blocks = distinct([str(2 * i) for i in range(150)])
    assert 10 <= len(blocks) <= MAX_BLOCKS
    assert blocks[0] == "0-15"


def test_named_children_are_never_merged_with_neighbours():
    """Thirty differently named children are one block: a range over names would say nothing."""
    assert distinct([f"net.part_{chr(97 + i)}" for i in range(26)]) == ["net"]


def test_parameters_of_the_model_itself_are_a_block():
    """A parameter that sits in no module has a name to be shown under."""
    assert assign_blocks(["", "fc"]) == [ROOT, "fc"]


def test_empty_layout_has_no_blocks():
    """Without parameters there is nothing to show."""
    assert assign_blocks([]) == []
    assert Blocks.of([]).norms(np.empty((3, 0))).shape == (3, 0)


names = st.lists(
    st.lists(st.sampled_from(["0", "1", "7", "31", "a", "b", "attn"]), max_size=4).map(".".join),
    max_size=80,
)


@given(modules=names, limit=st.integers(1, 25))
def test_never_more_than_the_limit(modules, limit):
    """Whatever the model looks like, there are at most as many blocks as asked for."""
    assigned = assign_blocks(modules, limit)
    assert len(assigned) == len(modules)
    assert len(set(assigned)) <= limit


@given(modules=names)
def test_a_module_is_in_one_block(modules):
    """Parameters of the same module stay together."""
    assigned = dict(zip(modules, assign_blocks(modules), strict=True))
    assert [assigned[module] for module in modules] == assign_blocks(modules)


def test_norms_are_roots_of_sums_of_squares():
    """Norms agree with a sum in float64, also where the parameters of a block are apart."""
    blocks = Blocks.of(["a", "b", "a", "c"])
    norms = np.array([[3.0, 7.0, 4.0, 1.0], [1.0, 1.0, 1.0, 2.0]], dtype=np.float32)
    assert blocks.names == ("a", "b", "c")
    np.testing.assert_allclose(blocks.norms(norms), [[5, 7, 1], [math.sqrt(2), 1, 2]], rtol=1e-12)


def test_missing_gradients_count_as_nothing():
    """A block is missing only where none of its parameters had a gradient."""
    blocks = Blocks.of(["a", "a", "b"])
    row = blocks.norms(np.array([[-1.0, 2.0, -1.0]])).tolist()[0]
    assert blocks.present(row) == {"a": 2.0}


def test_nonfinite_norms_stay_in_their_block():
    """A NaN or an Inf shows in its own block and in no other."""
    norms = Blocks.of(["a", "a", "b", "c"]).norms(np.array([[np.nan, 1.0, np.inf, 2.0]]))
    np.testing.assert_array_equal(norms, [[np.nan, np.inf, 2.0]])


def test_float32_norms_do_not_overflow():
    """Squares are summed in float64, so that a norm of 1e30 does not become Inf."""
    norms = Blocks.of(["a", "a", "b"]).norms(np.full((1, 3), 1e30, dtype=np.float32))
    np.testing.assert_allclose(norms, [[math.sqrt(2) * 1e30, 1e30]], rtol=1e-6)


def test_one_block_is_none():
    """The norm of the only block would be the total norm once more."""
    assert Blocks.of(["", ""]).names == ()


def test_leaves_the_batch_as_it_is():
    """The array of the batch belongs to all sinks and is not written to."""
    norms = np.array([[3.0, -1.0]])
    norms.flags.writeable = False
    Blocks.of(["a", "b"]).norms(norms)
    assert norms.tolist() == [[3.0, -1.0]]


def scalars_of(modules, norms, *, statistics=None):
    """The rows of some steps of a model."""
    names = tuple(f"p{index}" for index in range(len(modules)))
    norms = np.array(norms)
    batch = RecordBatch(
        Layout(names, tuple(modules)),
        [StepRecord(step=index) for index in range(len(norms))],
        norms,
        norms,
        statistics={name: np.array(values) for name, values in (statistics or {}).items()},
    )
    return BlockScalars(norms=True, statistics=True).of(batch)


def test_a_step_has_its_norms_and_statistics_by_block():
    """The norm of a block, and of a statistic the value that is largest in magnitude, with its sign."""
    rows = scalars_of(
        ["a", "a", "b"],
        [[3.0, 4.0, 1.0], [3.0, 4.0, -1.0]],
        statistics={"mean": [[0.5, -2.0, np.nan], [np.nan, np.nan, np.nan]]},
    )
    assert rows == [{"blocks/a": 5.0, "blocks/b": 1.0, "mean/a": -2.0}, {"blocks/a": 5.0}]


def test_the_statistics_of_one_block_are_those_of_the_model():
    """Its norm is that of the step, and left out."""
    rows = scalars_of(["", ""], [[3.0, 4.0]], statistics={"max": [[1.0, np.inf]]})
    assert rows == [{"max/(model)": np.inf}]
