"""The list of events."""

from . import data


def texts(tab):
    """What the entries say."""
    return tab.frame.locator(".event").all_text_contents()


def test_events_are_listed_with_step_kind_parameter_and_message(tab):
    """Oldest first, all of them."""
    tab.open_alone(run="known/a")
    found = texts(tab)
    assert len(found) == len(data.EVENTS)
    assert found[1] == "120nanh.1.attn.q3 of 32 elements are NaN"
    assert tab.frame.locator(".events .side-count").text_content() == "5"


def test_kinds_are_switched_off_and_on(tab):
    """A kind that is off leaves the list; the count says how many are left."""
    tab.open_alone(run="known/a")
    kind = tab.frame.get_by_role("button", name="nan 1", exact=True)
    kind.click()
    assert not any("nan" in text for text in texts(tab))
    assert tab.frame.locator(".events .side-count").text_content() == "4 of 5"
    assert kind.get_attribute("aria-pressed") == "false"
    kind.click()
    assert len(texts(tab)) == len(data.EVENTS)


def test_an_event_leads_to_its_step_and_row(tab):
    """The step lies in the middle with a line through it, and the cursor on the row."""
    tab.open_alone(run="known/a", steps="1-60")
    tab.frame.locator(".event", has_text="1 of 32 elements is Inf").click()
    tab.ready()
    first, last = tab.seen
    assert last - first == 59
    assert abs((first + last) / 2 - data.INF_STEP) <= 1
    marker, cell, box = (tab.frame.locator(name).bounding_box() for name in
                         (".line.marker", ".cell", "canvas.heat"))  # fmt: skip
    middle = box["x"] + (data.INF_STEP - first + 0.5) / 60 * box["width"]
    assert abs(marker["x"] + marker["width"] / 2 - middle) <= 2
    assert abs(cell["y"] + cell["height"] / 2 - tab.point(data.INF_ROW, 0)[1]) <= 2
    assert "h.0.mlp.up: " in tab.frame.locator("#voice").text_content()
    assert "norm Inf" in tab.frame.locator("#voice").text_content()


def test_an_event_opens_the_modules_around_its_parameter(tab):
    """A parameter in a closed module becomes a row that can be seen."""
    tab.open_alone(run="known/a", rows="modules", open="[]")
    tab.frame.locator(".event", has_text="3 of 32 elements are NaN").click()
    tab.ready()
    assert tab.labels[:4] == ["h", "0", "1", "attn"]
    assert "q" in tab.labels
    assert tab.frame.locator(".cell").is_visible()
