"""GradientsPlugin: the HTTP routes of the "Gradients" tab."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard import errors
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from gradwatch_dashboard.answers import curve, describe, event_page, heatmap
from gradwatch_dashboard.arguments import LIMIT, Arguments
from gradwatch_dashboard.binning import Cells
from gradwatch_dashboard.provider import Provider
from gradwatch_dashboard.sessions import Timeline
from gradwatch_dashboard.store import RunCache, RunStore, RunView
from gradwatch_dashboard.untrusted import shown
from gradwatch_dashboard.wire import PLUGIN

_logger = logging.getLogger(__name__)
_STATIC = Path(__file__).parent / "static"
_NO_PROVIDER = "this TensorBoard has no data provider; version 2.14 or newer has one"
_FAILED = "The Gradients tab has failed. The log of TensorBoard has the details."
_NO_RUN = "there is no run {run} with gradients"
_NO_OPTIMIZER = "run {run} has no optimizer {optimizer} with gradients"
_JSON = "application/json"
_BINARY = "application/octet-stream"

ENTRY = "index.js"
"""The JavaScript module that TensorBoard loads."""

_STATIC_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_STATIC_NAME = re.compile(r"[A-Za-z0-9_.-]+")

MAX_EVENTS = 20_000
DEFAULT_EVENTS = 2000

App = Callable[[Any, Any], Any]
Answer = Callable[[Arguments, Provider], "tuple[str | bytes | dict[str, Any], str]"]


class _StaticFile(NamedTuple):
    """A file of the front end, with its media type."""

    content: bytes
    content_type: str


class GradientsPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """Answers the requests of the tab. It only reads, through TensorBoard's data provider."""

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        """Loads the files of the front end.

        Raises:
            FileNotFoundError: If the front end is missing.
            RuntimeError: If TensorBoard is too old to have a data provider.
        """
        if not hasattr(context.data_provider, "list_tensors"):
            raise RuntimeError(_NO_PROVIDER)
        self._data_provider = context.data_provider
        self._runs = RunCache()
        self._files = _read_static_files(_STATIC)

    def get_plugin_apps(self) -> dict[str, App]:
        """Returns the WSGI application of each route."""
        answers: dict[str, Answer] = {
            "runs": self._list_runs,
            "layout": self._layout,
            "heatmap": self._heatmap,
            "curve": self._curve,
            "events": self._events,
        }
        files = {
            f"/{name}": _application(partial(_respond_with_file, file))
            for name, file in self._files.items()
        }
        routes = {f"/{name}": _application(self._ask(answer)) for name, answer in answers.items()}
        return files | routes

    def is_active(self) -> bool:
        """Returns False: TensorBoard shows the tab by itself once there is data of this plugin."""
        return False

    def data_plugin_names(self) -> tuple[str, ...]:
        """Returns the plugin names whose data makes the tab appear."""
        return (PLUGIN,)

    def frontend_metadata(self) -> Any:
        """Returns the tab's name and entry module."""
        return base_plugin.FrontendMetadata(es_module_path=f"/{ENTRY}", tab_name="Gradients")

    def _ask(self, answer: Answer) -> Callable[[Any], Any]:
        def respond(request: Any) -> Any:
            provider = Provider(self._data_provider, request.environ)
            content, content_type = answer(Arguments(request.args), provider)
            return http_util.Respond(request, content, content_type)

        return respond

    def _list_runs(self, arguments: Arguments, provider: Provider) -> tuple[dict[str, Any], str]:
        del arguments
        return {"runs": self._runs.summaries(provider)}, _JSON

    def _layout(self, arguments: Arguments, provider: Provider) -> tuple[dict[str, Any], str]:
        optimizer = arguments.text("optimizer")
        _, timeline = self._timeline(arguments, provider, optimizer)
        return describe(timeline), _JSON

    def _heatmap(self, arguments: Arguments, provider: Provider) -> tuple[bytes, str]:
        run, optimizer = arguments.text("run"), arguments.text("optimizer")
        cells, timeline = self._timeline(arguments, provider, optimizer, with_cells=True)
        return heatmap(run, timeline, cells, arguments), _BINARY

    def _curve(self, arguments: Arguments, provider: Provider) -> tuple[str, str]:
        optimizer = arguments.text("optimizer")
        cells, timeline = self._timeline(arguments, provider, optimizer, with_cells=True)
        return curve(timeline, cells, arguments), _JSON

    def _events(self, arguments: Arguments, provider: Provider) -> tuple[str, str]:
        with self._open(arguments, provider) as (_, view):
            events = view.events
        first, last = arguments.range(-LIMIT, LIMIT)
        limit = arguments.integer("limit", DEFAULT_EVENTS, 0, MAX_EVENTS)
        return event_page(events, first, last, limit), _JSON

    def _timeline(
        self, arguments: Arguments, provider: Provider, optimizer: str, *, with_cells: bool = False
    ) -> tuple[Cells, Timeline]:
        with self._open(arguments, provider) as (store, view):
            timeline = view.timelines.get(optimizer)
            if timeline is None:
                names = {"run": shown(arguments.text("run")), "optimizer": shown(optimizer)}
                raise errors.NotFoundError(_NO_OPTIMIZER.format(**names))
            return store.cells(provider, timeline) if with_cells else [], timeline

    @contextmanager
    def _open(self, arguments: Arguments, provider: Provider) -> Iterator[tuple[RunStore, RunView]]:
        # The view is immutable once made, so answers can be built after the lock is released.
        run = arguments.text("run")
        with self._runs.open(provider, run) as found:
            if found is None:
                raise errors.NotFoundError(_NO_RUN.format(run=shown(run)))
            yield found


def _read_static_files(folder: Path) -> dict[str, _StaticFile]:
    """Reads all scripts, styles and images in the folder, not in its subfolders."""
    # Read once into a dictionary, so that no request can make the server open a path.
    files = {
        path.name: _StaticFile(path.read_bytes(), _STATIC_TYPES[path.suffix])
        for path in sorted(folder.glob("*"))
        if path.suffix in _STATIC_TYPES and _STATIC_NAME.fullmatch(path.name) and path.is_file()
    }
    if ENTRY not in files:
        raise FileNotFoundError(f"its front end is missing, no {ENTRY} in {folder}")
    return files


def _respond_with_file(file: _StaticFile, request: Any) -> Any:
    return http_util.Respond(request, file.content, file.content_type)


def _application(respond: Callable[[Any], Any]) -> App:
    """Makes a WSGI application that only reads."""

    @wrappers.Request.application
    def application(request: wrappers.Request) -> Any:
        # Read-only on purpose: a route that changes something would need protection against
        # cross-site request forgery.
        if request.method not in ("GET", "HEAD"):
            allowed = [("Allow", "GET, HEAD")]
            text = "Only GET is answered: the tab reads, and changes nothing."
            return http_util.Respond(request, text, "text/plain", code=405, headers=allowed)
        try:
            return respond(request)
        except errors.PublicError:  # TensorBoard turns it into a response with its code and text
            raise
        except Exception:  # TensorBoard would not log it
            _logger.exception("The Gradients tab has failed at %s", shown(request.path))
            return http_util.Respond(request, _FAILED, "text/plain", code=500)

    return application
