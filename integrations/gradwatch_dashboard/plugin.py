"""GradientsPlugin: the routes of the "Gradients" tab; each turns a request into an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tensorboard import errors
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from gradwatch_dashboard.arguments import LIMIT, Arguments, shown
from gradwatch_dashboard.binning import Cells, curve, heatmap
from gradwatch_dashboard.event_log import page
from gradwatch_dashboard.provider import Provider
from gradwatch_dashboard.sessions import Timeline
from gradwatch_dashboard.static_files import ENTRY, StaticFile, read_static_files
from gradwatch_dashboard.store import Runs, Store, View
from gradwatch_dashboard.wire import PLUGIN

_logger = logging.getLogger(__name__)
_STATIC = Path(__file__).parent / "static"
_NO_PROVIDER = "this TensorBoard has no data provider; version 2.14 or newer has one"
_FAILED = "The Gradients tab has failed. The log of TensorBoard says how."
_NO_RUN = "there is no run {run} with gradients"
_NO_OPTIMIZER = "run {run} has no optimizer {optimizer} with gradients"
_JSON = "application/json"
_BINARY = "application/octet-stream"

MAX_EVENTS = 20_000
DEFAULT_EVENTS = 2000

App = Callable[[Any, Any], Any]
Answer = Callable[[Arguments, Provider], "tuple[str | bytes | dict[str, Any], str]"]


class GradientsPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """Answers what the tab asks for; reads only, and only through TensorBoard's data provider."""

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        """Reads the front end.

        Args:
            context: What TensorBoard gives to its plugins.

        Raises:
            FileNotFoundError: If the front end is missing.
            RuntimeError: If TensorBoard is too old.
        """
        if not hasattr(context.data_provider, "list_tensors"):
            raise RuntimeError(_NO_PROVIDER)
        self._data_provider = context.data_provider
        self._runs = Runs()
        self._files = read_static_files(_STATIC)

    def get_plugin_apps(self) -> dict[str, App]:
        """Returns the routes."""
        answers: dict[str, Answer] = {
            "runs": self._list_runs,
            "layout": self._layout,
            "heatmap": self._heatmap,
            "curve": self._curve,
            "events": self._events,
        }
        files = {f"/{name}": _application(_serve_file(file)) for name, file in self._files.items()}
        routes = {f"/{name}": _application(self._ask(answer)) for name, answer in answers.items()}
        return files | routes

    def is_active(self) -> bool:
        """Returns False: TensorBoard shows the tab itself as soon as there is data of ours."""
        return False

    def data_plugin_names(self) -> tuple[str, ...]:
        """Returns whose data it is that makes the tab appear."""
        return (PLUGIN,)

    def frontend_metadata(self) -> Any:
        """Returns what TensorBoard shows of the tab."""
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
        _, track = self._track(arguments, provider, optimizer)
        return _describe(track), _JSON

    def _heatmap(self, arguments: Arguments, provider: Provider) -> tuple[bytes, str]:
        run, optimizer = arguments.text("run"), arguments.text("optimizer")
        cells, track = self._track(arguments, provider, optimizer, with_cells=True)
        return heatmap(run, track, cells, arguments), _BINARY

    def _curve(self, arguments: Arguments, provider: Provider) -> tuple[str, str]:
        optimizer = arguments.text("optimizer")
        cells, track = self._track(arguments, provider, optimizer, with_cells=True)
        return curve(track, cells, arguments), _JSON

    def _events(self, arguments: Arguments, provider: Provider) -> tuple[str, str]:
        view = self._in_store(arguments, provider, lambda store, view: view)
        first, last = arguments.range(-LIMIT, LIMIT)
        limit = arguments.integer("limit", DEFAULT_EVENTS, 0, MAX_EVENTS)
        return page(view.events, first, last, limit), _JSON

    def _track(
        self, arguments: Arguments, provider: Provider, optimizer: str, *, with_cells: bool = False
    ) -> tuple[Cells, Timeline]:
        def take(store: Store, view: View) -> tuple[Cells, Timeline]:
            track = view.tracks.get(optimizer)
            if track is None:
                names = {"run": shown(arguments.text("run")), "optimizer": shown(optimizer)}
                raise errors.NotFoundError(_NO_OPTIMIZER.format(**names))
            return store.cells(provider, track) if with_cells else [], track

        found: tuple[Cells, Timeline] = self._in_store(arguments, provider, take)
        return found

    def _in_store(
        self, arguments: Arguments, provider: Provider, take: Callable[[Store, View], Any]
    ) -> Any:
        """Takes something out of a run as it is now."""
        run = arguments.text("run")
        with self._runs.open(provider, run) as found:
            if found is None:
                raise errors.NotFoundError(_NO_RUN.format(run=shown(run)))
            return take(*found)


def _describe(track: Timeline) -> dict[str, Any]:
    return {
        "optimizer": track.layout.optimizer,
        "parameters": track.layout.parameters,
        "modules": track.layout.modules,
        "shapes": track.layout.shapes,
        "first_step": track.first_step,
        "last_step": track.last_step,
        "windows": len(track.table),
    }


def _serve_file(file: StaticFile) -> Callable[[Any], Any]:
    return partial(_respond_with_file, file)


def _respond_with_file(file: StaticFile, request: Any) -> Any:
    return http_util.Respond(request, file.content, file.content_type)


def _application(respond: Callable[[Any], Any]) -> App:
    """Makes a WSGI application that only reads."""

    @wrappers.Request.application
    def application(request: wrappers.Request) -> Any:
        if request.method not in ("GET", "HEAD"):
            allowed = [("Allow", "GET, HEAD")]
            text = "Only GET is answered: the tab reads, and changes nothing."
            return http_util.Respond(request, text, "text/plain", code=405, headers=allowed)
        try:
            return respond(request)
        except errors.PublicError:
            raise
        except Exception:  # TensorBoard would say so nowhere
            _logger.exception("The Gradients tab has failed at %s", shown(request.path))
            return http_util.Respond(request, _FAILED, "text/plain", code=500)

    return application
