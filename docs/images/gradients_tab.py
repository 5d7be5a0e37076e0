"""Makes the pictures of the Gradients tab: ``python -m docs.images.gradients_tab``.

Trains what ``make demo`` trains, opens TensorBoard in Chromium, and takes one picture in each
theme. Takes about a minute; needs ``gradwatch[dev]`` and Chromium.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tests.integrations.dashboard.browser.conftest import CHROMIUMS
from tests.integrations.dashboard.browser.tab import Tab
from tests.support.board import Board

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POISON_STEP = 150
WHOLE_RUN = (1, 300)
AROUND_IT = (120, 220)
UNFOLDED = ["blocks", "blocks.0", "blocks.0.feed", "blocks.1", "blocks.1.qkv", "head"]


def train(logdir: Path) -> None:
    """Trains the small GPT of ``make demo``, with one poisoned batch."""
    script = ROOT / "examples" / "plain_loop.py"
    options = ["--logdir", logdir, "--steps", str(WHOLE_RUN[1]), "--poison-step", str(POISON_STEP)]
    subprocess.run([sys.executable, script, *options], check=True)


def take(
    browser: Browser, address: str, name: str, row: str, view: tuple[int, int], **shown: Any
) -> None:
    """Takes one picture, with the pointer on a row at the poisoned step.

    Args:
        browser: Chromium.
        address: TensorBoard's base URL.
        name: File name; one that ends in ``-dark.png`` is taken in the dark theme.
        row: Label of the row.
        view: First and last step in view.
        shown: The rest of the tab's state, spelled as in its links.
    """
    page = browser.new_page(viewport={"width": 1400, "height": 830})
    tab = Tab(page, address).open(steps="{}-{}".format(*view), **shown)
    if name.endswith("-dark.png"):
        page.evaluate("document.body.classList.add('dark-mode')")
    tab.ready()
    first, last = view
    tab.hover_step(tab.labels.index(row), POISON_STEP, last - first + 1, first)
    tab.ready()
    page.screenshot(path=HERE / name)
    page.close()


def main() -> None:
    """Trains, and takes both pictures."""
    chromium = next(filter(None, map(shutil.which, CHROMIUMS)))
    # Chromium has no sandbox for root, in a container for instance.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "gpt")
        with Board(folder) as board, sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=arguments)
            unfolded = json.dumps([f"m:{name}" for name in UNFOLDED])
            modules = {"rows": "modules", "open": unfolded}
            name = "gradients-tab.png"
            take(browser, board.base_url, name, "attention_norm", WHOLE_RUN, **modules)
            curve = {"rows": "parameters", "curve": "p:blocks.1.qkv.weight"}
            name = "gradients-tab-dark.png"
            take(browser, board.base_url, name, "blocks.0.qkv.weight", AROUND_IT, **curve)
            browser.close()


if __name__ == "__main__":
    main()
