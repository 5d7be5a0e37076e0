"""What is read, and what is kept: TensorBoard's own Python loader, with its reads counted."""

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from gradwatch_dashboard import provider as provider_module
from gradwatch_dashboard.provider import Provider, UnavailableError
from gradwatch_dashboard.store import RunCache

from .logs import LogFile, write_run

SESSION = "018000000001"


class CountingProvider(MultiplexerDataProvider):
    """Notes what is read."""

    def __init__(self, logdir):
        self.multiplexer = EventMultiplexer(tensor_size_guidance={"gradwatch": 0})
        self.multiplexer.AddRunsFromDirectory(str(logdir))
        super().__init__(self.multiplexer, str(logdir))
        self.reads, self.calls, self.failure = [], 0, None
        self.reload()

    def reload(self):
        self.multiplexer.Reload()
        self.reads, self.calls = [], 0

    def read_tensors(self, ctx=None, *, run_tag_filter=None, **options):
        if self.failure is not None:
            raise self.failure
        self.calls += 1
        self.reads += run_tag_filter.tags
        return super().read_tensors(ctx, run_tag_filter=run_tag_filter, **options)


class GrpcError(Exception):
    """As gRPC raises: it tells its code."""

    def __init__(self, name):
        super().__init__(name)
        self.name = name

    def code(self):
        """The code, which tells its name."""
        return self


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(provider_module, "FRESH_SECONDS", -1.0)


def cells(runs, provider, run="a"):
    """Reads all cells of a run."""
    with runs.open(provider, run) as (store, view):
        return store.cells(provider, view.timelines["AdamW"])


def test_only_what_has_grown_is_read_again(tmp_path):
    """The second look reads nothing, and after a new chunk only its segment is read."""
    write_run(tmp_path / "a", last=200, chunk=1)
    data = CountingProvider(tmp_path)
    runs, provider = RunCache(), Provider(data, {})
    cells(runs, provider)
    assert len(data.reads) == 1 + 3 * 2
    data.reload()
    cells(runs, provider)
    runs.summaries(provider)
    assert data.reads == []
    with LogFile(tmp_path / "a") as log:
        log.add_windows(SESSION, [[1.0, 2.0]], ([201], [201]), segment=1)
    data.reload()
    assert cells(runs, provider)[-1][0].stop == 201
    assert sorted(data.reads) == [
        f"gradwatch/{kind}/{SESSION}/0/0001" for kind in ("bad", "norms", "steps")
    ]


def test_many_runs_are_read_together(tmp_path):
    """The list of a hundred runs takes a few reads, not a hundred, and no cell."""
    for number in range(100):
        write_run(tmp_path / f"run{number:03d}", session=f"{number:012x}", last=3)
    data = CountingProvider(tmp_path)
    runs, provider = RunCache(), Provider(data, {})
    assert len(runs.summaries(provider)) == 100
    assert data.calls <= 5
    assert not any("norms" in tag for tag in data.reads)


def test_the_memory_is_bounded(tmp_path):
    """Beyond the bound the run that was longest unused is read again, the newest never."""
    for name in "abc":
        write_run(tmp_path / name)
    data = CountingProvider(tmp_path)
    with RunCache().open(Provider(data, {}), "a") as (store, view):
        store.cells(Provider(data, {}), view.timelines["AdamW"])
        size = store.nbytes
    runs, provider = RunCache(max_bytes=2 * size), Provider(data, {})
    for name in "abc":
        cells(runs, provider, name)
    data.reload()
    cells(runs, provider, "c")
    cells(runs, provider, "b")
    assert data.reads == []
    cells(runs, provider, "a")
    assert len(data.reads) == 4
    tiny = RunCache(max_bytes=0)
    assert len(cells(tiny, provider, "a")) == 1
    data.reload()
    cells(tiny, provider, "a")
    assert data.reads == []


def test_a_run_that_is_gone_is_forgotten(tmp_path):
    """What TensorBoard no longer lists takes no memory."""
    write_run(tmp_path / "a")
    data = CountingProvider(tmp_path)
    runs, provider = RunCache(), Provider(data, {})
    cells(runs, provider)
    data.multiplexer = data._multiplexer = EventMultiplexer()
    assert runs.summaries(provider) == []
    with runs.open(provider, "a") as found:
        assert found is None


def test_a_reply_that_is_too_large_costs_its_tag_only(tmp_path):
    """What gRPC refuses to carry is left out, the rest is read in smaller parts."""
    write_run(tmp_path / "a", last=200, chunk=1)
    data = CountingProvider(tmp_path)
    read = CountingProvider.read_tensors

    def refuse(self, ctx=None, *, run_tag_filter=None, **options):
        if any("norms" in tag and tag.endswith("/0001") for tag in run_tag_filter.tags):
            raise GrpcError("RESOURCE_EXHAUSTED")
        return read(self, ctx, run_tag_filter=run_tag_filter, **options)

    data.read_tensors = refuse.__get__(data)
    first, second = cells(RunCache(), Provider(data, {}))
    assert (first[1].norms >= 0).all()
    assert (second[1].norms == -2).all()


def test_a_data_server_that_is_away_is_no_damage(tmp_path):
    """While the data server is away the answer is 503, and all is well when it is back."""
    write_run(tmp_path / "a")
    data = CountingProvider(tmp_path)
    runs, provider = RunCache(), Provider(data, {})
    data.failure = GrpcError("UNAVAILABLE")
    with pytest.raises(UnavailableError) as raised, runs.open(provider, "a"):
        pass
    assert raised.value.http_code == 503
    with pytest.raises(UnavailableError):
        runs.summaries(provider)
    data.failure = None
    assert (cells(runs, provider)[0][1].norms > 0).all()


def test_requests_that_come_together_ask_once(tmp_path, monkeypatch):
    """A listing stands for half a second, that of all runs for each of them too."""
    write_run(tmp_path / "a")
    monkeypatch.setattr(provider_module, "FRESH_SECONDS", 0.5)
    now = [100.0]
    remembered, provider = (
        provider_module.ListingCache(lambda: now[0]),
        Provider(CountingProvider(tmp_path), {}),
    )
    first = remembered.get(provider)
    assert remembered.get(provider) is remembered.get(provider, "a") is first
    now[0] += 0.6
    assert remembered.get(provider, "a") is not first
    assert remembered.get(provider, "a") is remembered.get(provider, "a")
