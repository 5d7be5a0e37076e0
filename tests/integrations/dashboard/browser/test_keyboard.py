"""Everything without a mouse."""

import pytest

from . import data
from .test_rows import number


@pytest.fixture
def heat(tab):
    """A tab whose heat map has the focus."""
    tab.open_alone(run="known/a")
    tab.page.keyboard.press("Tab")
    for _ in range(40):
        if tab.frame.evaluate("document.activeElement.classList.contains('scroll')"):
            return tab
        tab.page.keyboard.press("Tab")
    return pytest.fail("The heat map is not reached with the tab key")


def voice(tab):
    """What is told to those who listen."""
    return tab.frame.locator("#voice").text_content()


def press(tab, *keys):
    """Presses keys one after the other."""
    for key in keys:
        tab.page.keyboard.press(key)
    tab.ready()


def test_the_heat_map_shows_its_focus_and_tells_the_cell(heat):
    """The tab key leads there; the cell is outlined, and its numbers are spoken."""
    assert heat.frame.locator(".cell").is_visible()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert heat.frame.evaluate(outline) == "solid"
    assert voice(heat).startswith("h.0.attn.q: module h.0.attn, shape 8 \u00d7 4, step ")
    assert heat.frame.locator("[aria-live=polite]").count() >= 1


def test_arrows_move_from_cell_to_cell(heat):
    """Down is the next row, right the next step, with shift ten."""
    press(heat, "Home")
    assert ", step 1, " in f"{voice(heat)},".replace("step 1,", "step 1, ")
    press(heat, "ArrowDown", "ArrowDown", "ArrowRight", "Shift+ArrowRight")
    assert voice(heat).startswith("h.0.mlp.up: ")
    assert "step 12," in voice(heat)
    norm = data.known()[11, 2]
    said = voice(heat).split("norm ")[1].split(",")[0]
    assert number(said) == pytest.approx(norm, rel=1e-4)
    press(heat, "ArrowUp", "End")
    assert voice(heat).startswith("h.0.attn.k: ")
    assert "step 300," in voice(heat)


def test_keys_zoom_pan_and_reset(heat):
    """+ and - zoom at the cursor, brackets move, 0 shows all, Escape goes back."""
    press(heat, "+")
    first, last = heat.seen
    assert last - first + 1 == 150
    press(heat, "]")
    assert heat.seen[0] > first
    press(heat, "Escape")
    assert heat.seen == (first, last)
    press(heat, "-")
    assert heat.seen == (1, data.STEPS)
    press(heat, "+", "+", "0")
    assert heat.seen == (1, data.STEPS)


def test_enter_draws_the_curve_and_space_opens_a_module(heat):
    """What a click does, a key does."""
    press(heat, "ArrowDown", "Enter")
    heat.wait_for_text(".curve-head", "h.0.attn.k")
    heat.frame.get_by_role("button", name="Modules", exact=True).click()
    heat.frame.get_by_role("button", name="Collapse all").click()
    heat.ready()
    heat.frame.locator(".scroll").focus()
    press(heat, "ArrowDown", "Space")
    assert heat.labels == ["h", "ln_f", "weight", "bias"]


def test_a_question_mark_shows_the_keys(heat):
    """The help is a dialog that Escape closes; the focus returns to where it was."""
    press(heat, "?")
    help_ = heat.frame.locator("dialog.help")
    assert help_.is_visible()
    assert "zoom at the cursor" in help_.text_content()
    press(heat, "Escape")
    assert not help_.is_visible()
    assert heat.frame.evaluate("document.activeElement.classList.contains('scroll')")


def test_every_control_has_a_name(tab):
    """Buttons, fields and pictures say what they are."""
    tab.open_alone(run="known/a", compare="known/b", curve="p:h.0.attn.q", rows="modules")
    unnamed = tab.frame.evaluate("""() => [...document.querySelectorAll("button, input, [role=img]")]
      .filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label")))
      .map((e) => e.outerHTML)""")
    assert unnamed == []
