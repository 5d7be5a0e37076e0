"""docs/reference.md and all that is made from the lists that the code declares."""

import inspect
import runpy
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

import gradwatch
from gradwatch.adapters import EVENT_KINDS, REDUCTIONS, SCALARS, STATISTICS, STEP_COLUMNS
from gradwatch.options import CHECKS, Options
from gradwatch.record.columns import STEP_DTYPES
from gradwatch.record.records import EventKind
from gradwatch.record.schema import column, columns_of

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_what_the_code_declares():
    """The page is not older than the lists: `make reference` writes it."""
    pytest.importorskip("gradwatch_tensorboard")
    page = runpy.run_path(str(DOCS / "reference.py"))["page"]()
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == page


def test_every_name_is_on_the_page():
    """No option, column, statistic, kind of event or tag is missing."""
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    steps = [one.name for one in fields(gradwatch.StepRecord) if one.name != "global_step"]
    events = [one.name for one in fields(gradwatch.Event) if one.name != "global_step"]
    options = list(typing.get_type_hints(gradwatch.adapters.SharedOptions))
    tags = [f"gradwatch/{name}" for name in SCALARS]
    names = [*steps, *events, *options, *STATISTICS, *EVENT_KINDS, *tags]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("record", [gradwatch.StepRecord, gradwatch.Event])
def test_every_field_declares_its_column(record):
    """Each has a meaning, without a full stop, and help() shows it."""
    declared = columns_of(record)
    assert declared.keys() == {one.name for one in fields(record)}
    for name, one in declared.items():
        assert one.meaning.strip()
        assert not one.meaning.endswith(".")
        assert f"        {name}: {one.meaning}." in record.__doc__


def test_a_field_in_no_list_is_an_error():
    """A field that declares nothing is named, with what to write."""

    @dataclass
    class Record:
        grad_norm: float = field(default=0.0, metadata=column("norm"))
        forgotten: float = 0.0

    with pytest.raises(TypeError, match=r"Record\.forgotten declares no column\. Write field\("):
        columns_of(Record)


def test_every_kind_of_event_is_declared():
    """The type and the list name the same kinds, each with a color and a shape."""
    assert tuple(EVENT_KINDS) == typing.get_args(EventKind)
    assert len({(kind.color, kind.shape) for kind in EVENT_KINDS.values()}) >= 7
    assert all(kind.color == kind.color.lower() for kind in EVENT_KINDS.values())


def test_what_is_logged_is_a_number():
    """Only columns of numbers are scalars, in the tooltip of the tab or have a heading in tail."""
    for name, one in STEP_COLUMNS.items():
        if one.scalar or one.tail or one.tab:
            assert STEP_DTYPES[name] is not None
        if one.tab:
            assert one.scalar is not None
            assert one.scalar.reduction in {"largest", "smallest", "newest"}
    assert all(scalar.reduction in REDUCTIONS for scalar in SCALARS.values())


def test_conditions_are_said():
    """A scalar that is not always logged says when it is, in words."""
    assert all(bool(scalar.when) == bool(scalar.condition) for scalar in SCALARS.values())


def test_every_option_is_declared_and_checked():
    """watch(), its options and their checks name the same, so that none is passed over in silence."""
    signature = inspect.signature(gradwatch.watch).parameters.values()
    keywords = {one.name for one in signature if one.kind is one.KEYWORD_ONLY}
    assert {one.name for one in fields(Options)} == keywords
    assert CHECKS.keys() == keywords
    shared = typing.get_type_hints(gradwatch.adapters.SharedOptions).keys()
    assert shared == keywords - {"accumulate", "scaler"}


def test_watch_names_every_statistic():
    """Its docstring lists all that it knows."""
    assert [name for name in STATISTICS if f'``"{name}"``' not in gradwatch.watch.__doc__] == []
