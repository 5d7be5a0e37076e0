"""Measures how soon the "Gradients" tab shows a large run, and the memory of TensorBoard.

    python -m benchmarks.dashboard --parameters 3000 --steps 10000

Generates a run, starts TensorBoard on it and opens the tab in a headless Chromium. It measures the
time from opening the tab to the first picture, with TensorBoard just started and after it has read
the run, and from releasing the mouse to the zoomed picture. Needs `gradwatch[dev]` and a Chromium.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Frame, Page, sync_playwright

from benchmarks.memory import resident_bytes
from benchmarks.synthetic_run import batches
from gradwatch_tensorboard import TensorBoardWriter

START_S, DRAW_MS = 120.0, 60_000
WINDOW = {"width": 1600, "height": 1000}
FIRST = "performance.getEntriesByName('gradwatch: first drawn')[0].startTime"
DRAWN = "performance.getEntriesByName('gradwatch: drawn').at(-1).startTime"


def write_run(folder: Path, steps: int, parameters: int) -> None:
    """Writes a synthetic run with a few NaN; each parameter's norms have their own level."""
    writer = TensorBoardWriter(folder)
    levels = np.random.default_rng(1).normal(-3, 1, parameters)
    for batch in batches(steps, parameters, levels=levels, max_norm=5.0, nan_every=50):
        writer.write(batch)
    writer.close()


@contextmanager
def tensorboard(logdir: Path, load_fast: str) -> Iterator[tuple[str, int]]:
    """Starts TensorBoard on the loopback interface; yields its address and its pid."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast", load_fast]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + START_S
            while time.monotonic() < end:
                log.seek(0)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", log.read()):
                    yield found.group(), process.pid
                    return
                time.sleep(0.1)
            raise TimeoutError(f"TensorBoard did not start within {START_S:.0f} s")
        finally:
            process.terminate()
            process.wait()


def open_tab(page: Page, address: str) -> Frame:
    """Opens the tab and waits for its picture."""
    page.goto(f"{address}#gradwatch")
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        for frame in page.frames:
            if "plugin_entry" in frame.url:
                ready(frame)
                return frame
        page.wait_for_timeout(20)
    raise TimeoutError("TensorBoard shows no Gradients tab")


def ready(frame: Frame) -> None:
    """Waits until everything has been loaded and drawn."""
    frame.wait_for_selector(".app[data-state=ready]", timeout=DRAW_MS)


def zoom_ms(page: Page, frame: Frame) -> float:
    """Zooms by dragging over a tenth of the picture; returns milliseconds until it is redrawn."""
    frame.evaluate(
        "addEventListener('pointerup', (e) => { window.released = e.timeStamp }, {once: true})"
    )
    box: Any = frame.locator("canvas.heat").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.5 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=4)
    page.mouse.up()
    ready(frame)
    return float(frame.evaluate(f"{DRAWN} - window.released"))


def measure(address: str, pid: int) -> Iterator[tuple[str, str]]:
    """Measures the tab; yields the name of each measurement and its text."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for state in ("TensorBoard fresh", "TensorBoard warm"):
            page = browser.new_page(viewport=WINDOW)
            frame = open_tab(page, address)
            first = frame.evaluate(FIRST)
            yield f"tab opened to first picture, {state}", f"{first:.0f} ms"
            times = []
            for _ in range(3):
                times.append(zoom_ms(page, frame))
                frame.locator("canvas.heat").dblclick()
                ready(frame)
            yield f"zoom to the fine picture, {state}", f"{statistics.median(times):.0f} ms"
            page.close()
        browser.close()
    yield "memory of TensorBoard", f"{resident_bytes(pid) / 1e6:.0f} MB"


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dashboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--parameters", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--load-fast", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--logdir", type=Path, help="log folder of an earlier run of this script")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        logdir = arguments.logdir or Path(temporary)
        if not arguments.logdir or not arguments.logdir.exists():
            write_run(logdir / "run", arguments.steps, arguments.parameters)
        size = sum(path.stat().st_size for path in logdir.rglob("*") if path.is_file())
        print(f"{arguments.parameters} parameters, {arguments.steps} steps, {size / 1e6:.0f} MB")
        with tensorboard(logdir, arguments.load_fast) as (address, pid):
            # TensorBoard shows a tab only after it has seen data for it.
            time.sleep(10)
            for what, value in measure(address, pid):
                print(f"{what:60} {value:>10}")


if __name__ == "__main__":
    main()
