"""The tab in a browser, as a person meets it."""

import json
from urllib.parse import quote, urlencode

import numpy as np

PREFIX = "p.gradwatch."
BAD = (0xFF, 0x33, 0xFF)
BAD_LINE = (0xA8, 0x00, 0xB8)
READY = ".app[data-state=ready]"
CALM_FRAMES = 4
"""What has been done shows in the next frame or the one after it, and may ask the server there."""

_IS_CALM = """
([ready, frames]) => {
  window.calmFrames = document.querySelector(ready) ? window.calmFrames + 1 : 0;
  return window.calmFrames > frames;
}
"""
_ROW = """
(at) => {
  const canvas = document.querySelectorAll("canvas.heat")[at.panel];
  const ratio = canvas.width / canvas.clientWidth;
  const y = Math.floor(at.y * ratio);
  return [...canvas.getContext("2d").getImageData(0, y, canvas.width, 1).data];
}
"""
_COLUMN = """
(at) => {
  const canvas = document.querySelectorAll("canvas.heat")[at.panel];
  return [...canvas.getContext("2d").getImageData(at.x, 0, 1, canvas.height).data];
}
"""


def link(**state):
    """The hash of a state."""
    parts = {PREFIX + name: value for name, value in state.items()}
    return "#gradwatch" + ("&" + urlencode(parts, quote_via=quote) if parts else "")


class Tab:
    """The "Gradients" tab.

    Args:
        page: A page of the browser.
        base_url: Of TensorBoard.
    """

    def __init__(self, page, base_url):
        self.page = page
        self.base_url = base_url
        self.frame = page
        self.problems = []
        self.hosts = set()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def _console(self, message):
        address = message.location.get("url", "")
        if address.endswith("favicon.ico"):
            return
        # TensorBoard's own page warns about its own scripts.
        if message.type == "error" or "gradwatch" in address:
            self.problems.append(f"console: {message.text} ({address})")

    def _dialog(self, dialog):
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, wait=READY, **state):
        """Opens TensorBoard's page at the tab."""
        return self.open_at(link(**state), wait)

    def open_at(self, address, wait=READY):
        """Opens TensorBoard's page at an address below the base URL."""
        self.page.goto(self.base_url + address)
        iframe = self.page.wait_for_selector("iframe[src*=gradwatch]", state="attached")
        self.frame = iframe.content_frame()
        self.frame.wait_for_selector(wait)
        return self

    def open_alone(self, wait=READY, **state):
        """Opens the tab's own page, without TensorBoard's around it: that is quicker."""
        self.page.goto(f"{self.base_url}data/plugin_entry.html?name=gradwatch{link(**state)}")
        self.frame = self.page
        self.frame.wait_for_selector(wait)
        return self

    def ready(self):
        """Waits until everything is there and drawn, and stays so for some frames."""
        self.frame.evaluate("() => { window.calmFrames = 0 }")
        self.frame.wait_for_function(_IS_CALM, arg=[READY, CALM_FRAMES])
        return self

    def box(self, panel=0):
        """Where the heat map is on the screen."""
        return self.frame.locator("canvas.heat").nth(panel).bounding_box()

    @property
    def labels(self):
        """What the rows in sight say."""
        return self.frame.locator(".panel").first.locator(".label span").all_text_contents()

    @property
    def row_height(self):
        """Of a row, CSS pixels."""
        box = self.box()
        return box["height"] / len(self.labels)

    def point(self, row, share, panel=0):
        """The middle of a row on the screen, at a share of the width."""
        box = self.box(panel)
        return box["x"] + share * box["width"], box["y"] + (row + 0.5) * self.row_height

    def hover(self, row, share, panel=0):
        """Points at a cell; what the tooltip says."""
        self.page.mouse.move(*self.point(row, share, panel))
        return self.tooltip()

    def hover_step(self, row, step, steps, first=1):
        """Points at a step of those from the first on."""
        return self.hover(row, (step - first + 0.5) / steps)

    def tooltip(self):
        """What the tooltip says."""
        tip = self.frame.locator(".tip")
        if not tip.is_visible():
            return {}
        names, texts = (tip.locator(tag).all_text_contents() for tag in ("dt", "dd"))
        title = tip.locator(".tip-title").text_content()
        return {"title": title} | dict(zip(names, texts, strict=True))

    def drag(self, start, end, row=0, key=None):
        """Drags over shares of the width."""
        self.page.mouse.move(*self.point(row, start))
        if key:
            self.page.keyboard.down(key)
        self.page.mouse.down()
        self.page.mouse.move(*self.point(row, (start + end) / 2))
        self.page.mouse.move(*self.point(row, end))
        self.page.mouse.up()
        if key:
            self.page.keyboard.up(key)
        return self.ready()

    @property
    def seen(self):
        """The steps in view: first, last."""
        text = self.frame.locator(".seen").text_content()
        return tuple(int(part.replace(",", "")) for part in text.split(" ")[1].split("\u2013"))

    def row_pixels(self, row, panel=0):
        """Colours ``[width, 3]`` along the middle of a row."""
        y = (row + 0.5) * self.row_height
        found = self.frame.evaluate(_ROW, {"y": y, "panel": panel})
        return np.array(found, np.uint8).reshape(-1, 4)[:, :3]

    def column_pixels(self, x, panel=0):
        """Colours ``[height, 3]`` down a column of pixels."""
        found = self.frame.evaluate(_COLUMN, {"x": int(x), "panel": panel})
        return np.array(found, np.uint8).reshape(-1, 4)[:, :3]

    def hash_state(self):
        """What the address of TensorBoard's page says."""
        parts = self.page.evaluate("location.hash").removeprefix("#").split("&")
        pairs = (part.split("=") for part in parts if part.startswith(PREFIX))
        decode = "(text) => decodeURIComponent(text)"
        return {name.removeprefix(PREFIX): self.page.evaluate(decode, text) for name, text in pairs}

    def wait_for(self, expression, argument=None):
        """Waits until JavaScript in the tab is true."""
        self.frame.wait_for_function(expression, arg=argument)

    def wait_for_text(self, selector, text):
        """Waits until an element holds a text."""
        script = (
            f"(text) => document.querySelector({json.dumps(selector)})?.textContent.includes(text)"
        )
        self.wait_for(script, text)


def bad_pixels(colours):
    """Which colours say NaN or Inf."""
    return (colours == BAD).all(-1) | (colours == BAD_LINE).all(-1)
