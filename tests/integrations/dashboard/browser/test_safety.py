"""Names in a log are a stranger's."""

import json
import re

from . import data
from .tab import READY


def test_hostile_names_are_text(tab):
    """Run, parameters and messages with markup are shown as they are, and nothing runs."""
    tab.open(run=data.HOSTILE_RUN, curve=f"p:{data.HOSTILE[0]}")
    assert tab.frame.locator(".panel-title").text_content() == data.HOSTILE_RUN
    assert tab.labels[:3] == data.HOSTILE[:3]
    assert tab.labels[3] == "evil\ufffdtxet\ufffdline"
    assert data.HOSTILE_MESSAGE in tab.frame.locator(".event").text_content()
    tab.hover(1, 0.5)
    assert tab.tooltip()["title"] == data.HOSTILE[1]
    tab.frame.get_by_role("button", name="Modules", exact=True).click()
    tab.ready()
    tab.frame.locator(".event").click()
    tab.ready()
    stray = (
        "document.querySelectorAll('#voice *, .label img, .label b, body img, body b[onmouseover]')"
    )
    assert tab.frame.evaluate(f"{stray}.length") == 0
    assert tab.frame.evaluate("document.querySelectorAll('body script').length") <= 1


def test_hostile_answers_and_links_are_text(tab):
    """A filter with markup in the address stays in its field."""
    tab.open(run="known/a", filter="<img src=x onerror=alert(1)>|attn", hide='["<b>"]')
    assert tab.frame.locator(".filter").input_value().startswith("<img")
    assert len(tab.labels) == 8


def test_nothing_violates_tensorboards_security_policy(tab):
    """No inline handler, no foreign script, no blob worker: the browser has nothing to report."""
    tab.page.add_init_script(
        "window.violations = [];"
        "addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
    )
    tab.open(run="known/a", compare="known/b", curve="p:h.0.attn.q", marker="5")
    tab.page.mouse.move(*tab.point(0, 0.3))
    assert tab.frame.evaluate("window.violations") == []


def test_only_the_routes_of_the_plugin_are_asked(tab):
    """The tab reads its own routes, by relative addresses."""
    asked = []
    tab.page.on("request", lambda request: asked.append((request.method, request.url)))
    tab.open_alone(run="known/a")
    tab.drag(0.2, 0.4)
    own = f"{tab.base_url}data/plugin/gradwatch/"
    others = [url for _, url in asked if not url.startswith(own) and "plugin_entry" not in url]
    assert [url for url in others if not url.endswith("favicon.ico")] == []
    assert {method for method, _ in asked} == {"GET"}


def answer(tab, route, **reply):
    """Gives an answer in the server's place."""
    address = re.compile(rf"/data/plugin/gradwatch/{route}(\?|$)")
    tab.page.route(address, lambda call: call.fulfill(**reply))


def test_a_log_directory_without_gradients_says_what_to_write(tab):
    """The code to add to a training, as text."""
    answer(tab, "runs", body=json.dumps({"runs": []}), content_type="application/json")
    tab.open_alone()
    text = tab.frame.locator(".empty").text_content()
    assert "No gradients yet" in text
    assert 'gradwatch.watch(model, optimizer, sinks=[TensorBoardWriter("runs/first")])' in text


def test_an_error_of_the_server_is_told_and_can_be_tried_again(tab):
    """Its text is shown, as text."""
    answer(tab, "runs", status=500, body="<b>out of memory</b>", content_type="text/plain")
    tab.open_alone()
    text = tab.frame.locator(".empty").text_content()
    assert "TensorBoard answered 500" in text
    assert "<b>out of memory</b>" in text
    tab.page.unroute_all()
    tab.frame.get_by_role("button", name="Try again").click()
    tab.wait_for_text(".panel-title", "known/a")
    tab.ready()
    tab.problems[:] = [text for text in tab.problems if "500" not in text]


def test_an_error_while_zooming_leaves_the_picture(tab):
    """What was there stays, with a note."""
    tab.open_alone(run="wide")
    answer(tab, "heatmap", status=500, body="broken", content_type="text/plain")
    tab.drag(0.2, 0.4)
    tab.wait_for_text(".server-note", "500")
    assert tab.row_pixels(0).any()
    tab.page.unroute_all()
    tab.drag(0.2, 0.4)
    tab.frame.wait_for_selector(READY)
    assert not tab.frame.locator(".server-note").is_visible()
    tab.problems[:] = [text for text in tab.problems if "500" not in text]
