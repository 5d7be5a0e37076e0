"""The thread that delivers: nobody waits for it, nothing is lost in silence, and it ends."""

import contextvars
import os
import signal
import threading
import time

import pytest

import gradwatch
from gradwatch_loggers import background
from gradwatch_loggers.background import Background
from tests.support import processes


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """Failures are tried again at once."""
    monkeypatch.setattr(background, "PAUSE_S", 0.0)


class Service:
    """Takes items while it is open, and fails as often as it is told to."""

    def __init__(self, failures=0, refuses=()):
        self.open, self.began = threading.Event(), threading.Event()
        self.open.set()
        self.failures, self.refuses = failures, refuses
        self.calls, self.seen, self.threads = 0, [], set()

    def __call__(self, group):
        self.began.set()
        self.open.wait()
        self.calls += 1
        self.threads.add(threading.current_thread())
        if self.failures:
            self.failures -= 1
            raise OSError("no route")
        if set(group) & set(self.refuses):
            raise ValueError("refused")
        self.seen += group


def threads_of(name):
    """The threads with a name that are there now."""
    return [one for one in threading.enumerate() if one.name == name]


def test_items_come_in_order_from_another_thread():
    """All items arrive, oldest first, in one daemon thread that is not ours and ends at close()."""
    service = Service()
    delivery = Background(service, "Test", at_once=3)
    assert threads_of("Test") == []
    for start in range(0, 100, 10):
        delivery.put(range(start, start + 10))
    delivery.close()
    assert service.seen == list(range(100))
    (thread,) = service.threads
    assert thread is not threading.current_thread()
    assert thread.daemon
    thread.join(10)
    assert threads_of("Test") == []


def test_an_empty_one_starts_no_thread():
    """Without an item there is no thread, and close() returns."""
    delivery = Background(Service(), "Test")
    delivery.close()
    delivery.close()
    assert threads_of("Test") == []


def test_put_does_not_wait_and_the_oldest_are_lost():
    """While the function is busy put() returns; beyond the limit the oldest go, which is told twice."""
    service = Service()
    service.open.clear()
    delivery = Background(service, "Test", most=10)
    delivery.put([0])
    service.began.wait()
    delivery.put(range(1, 11))
    with pytest.warns(gradwatch.GradwatchWarning, match="more slowly than the training"):
        delivery.put(range(11, 16))
    delivery.put([16])  # a second warning would be an error
    service.open.set()
    with pytest.warns(gradwatch.GradwatchWarning, match="Test lost 6 of 17 records"):
        delivery.close()
    assert service.seen == [0, *range(7, 17)]


def test_a_failure_is_tried_again():
    """A group at which the function raises is passed again; one warning says so, one that all is there."""
    service = Service(failures=2)
    failing = threading.Event()
    delivery = Background(service, "Test")
    delivery._pause = failing.wait
    delivery.put([1, 2])
    while not delivery._failures:
        time.sleep(0.001)
    with pytest.warns(
        gradwatch.GradwatchWarning, match="failed in the background with OSError: no"
    ):
        delivery.put([3])
    delivery.put([4])
    failing.set()
    with pytest.warns(gradwatch.GradwatchWarning, match="works again and has received all 4"):
        delivery.close()
    assert service.seen == [1, 2, 3, 4]


def test_a_failure_that_costs_nothing_and_is_over_is_not_told():
    """Nobody is bothered with a single failed request."""
    service = Service(failures=1)
    delivery = Background(service, "Test")
    delivery.put([1])
    assert delivery.flush(60)
    delivery.put([2])
    delivery.close()
    assert service.seen == [1, 2]


def test_an_item_that_is_always_refused_costs_itself_only():
    """After three attempts it is lost, and what comes behind it arrives."""
    service = Service(refuses=[2])
    delivery = Background(service, "Test")
    delivery.put([1, 2, 3])
    with pytest.warns(gradwatch.GradwatchWarning, match="lost 1 of 3.*ValueError: refused"):
        delivery.close()
    assert service.seen == [1, 3]
    assert service.calls == 5


def test_a_function_that_always_fails_is_given_up_at_the_end(monkeypatch):
    """close() does not try every single item of a service that is down."""
    monkeypatch.setattr(background, "END_S", 0.0)
    service = Service(failures=10_000)
    service.open.clear()
    delivery = Background(service, "Test")
    delivery.put(range(1000))
    threading.Timer(0.05, service.open.set).start()
    with pytest.warns(gradwatch.GradwatchWarning, match=r"lost 1,000 of 1,000.*OSError: no route"):
        delivery.close()
    assert service.calls == background.MOST_AT_END


def test_a_function_that_fails_for_a_moment_at_the_end_is_tried_on(monkeypatch):
    """Only the items are lost that were refused three times; the others arrive."""
    monkeypatch.setattr(background, "PAUSE_AT_END_S", 0.0)
    monkeypatch.setattr(background, "END_S", 600.0)
    service = Service(failures=3 * 20)
    service.open.clear()
    delivery = Background(service, "Test")
    delivery.put(range(100))
    threading.Timer(0.05, service.open.set).start()
    with pytest.warns(gradwatch.GradwatchWarning, match="lost 20 of 100"):
        delivery.close()
    assert service.seen == list(range(20, 100))


def test_of_an_error_of_many_lines_the_first_is_told():
    """Those of a database repeat the whole statement."""

    def fail(group):
        raise OSError("no table\n[SQL: SELECT ...]")

    delivery = Background(fail, "Test")
    delivery.put([1])
    with pytest.warns(gradwatch.GradwatchWarning) as told:
        delivery.close()
    assert "OSError: no table" in str(told[-1].message)
    assert "SQL" not in str(told[-1].message)


def test_close_waits_for_a_limited_time():
    """A function that does not return is left behind when the time is up, and what waits is lost."""
    service = Service()
    service.open.clear()
    delivery = Background(service, "Test", wait_s=0.05)
    delivery.put([1, 2, 3])
    with pytest.warns(gradwatch.GradwatchWarning, match=r"lost 3 of 3.*wait_s=0.05 s"):
        delivery.close()
    service.open.set()
    for thread in threads_of("Test"):
        thread.join(10)
    assert threads_of("Test") == []
    assert service.calls == 1


def test_flush_tells_whether_all_is_there():
    """flush() returns False when its time is up, and True when all has arrived."""
    service = Service()
    service.open.clear()
    delivery = Background(service, "Test")
    delivery.put([1])
    assert not delivery.flush(0.01)
    service.open.set()
    assert delivery.flush(60)
    delivery.close()


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt: a framework of another test may have left its handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows has other signals")
def test_an_interrupt_in_close_comes_through(interruptible):
    """Ctrl-C ends the wait, says what is lost, and the thread ends with its call."""
    service = Service()
    delivery = Background(service, "Test", wait_s=60)
    interrupted = threading.Event()

    def interrupt(group):
        service.began.set()
        interrupted.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        service.open.wait()

    service.open.clear()
    delivery._call = interrupt
    delivery.put([1, 2])
    service.began.wait()
    threading.Timer(0.05, interrupted.set).start()
    with (
        pytest.warns(gradwatch.GradwatchWarning, match="lost 2 of 2"),
        pytest.raises(KeyboardInterrupt),
    ):
        delivery.close()
    service.open.set()
    for thread in threads_of("Test"):
        thread.join(10)
    assert threads_of("Test") == []


def test_a_function_that_exits_does_not_end_the_thread():
    """SystemExit from the function is a failure like any other."""
    service = Service()
    delivery = Background(service, "Test")

    def leave(group):
        if group == [1]:
            raise SystemExit(3)
        service(group)

    delivery._call = leave
    delivery.put([1, 2])
    with pytest.warns(gradwatch.GradwatchWarning, match="lost 1 of 2.*SystemExit: 3"):
        delivery.close()
    assert service.seen == [2]


def test_nothing_can_be_put_after_close():
    """A closed one says what to do."""
    delivery = Background(Service(), "Test")
    delivery.close()
    with pytest.raises(RuntimeError, match="Test is closed and takes no more steps"):
        delivery.put([1])


def test_pauses_grow(monkeypatch):
    """Each further failure in a row doubles the pause, up to a minute; a success ends that."""
    monkeypatch.setattr(background, "PAUSE_S", 1.0)
    delivery = Background(Service(), "Test")
    pauses = []
    monkeypatch.setattr(
        delivery._changed, "wait_for", lambda condition, seconds: pauses.append(seconds)
    )
    for delivery._failures in (1, 2, 3, 7, 500):
        delivery._pause()
    assert pauses == [1.0, 2.0, 4.0, 60.0, 60.0]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_forked_child_delivers_nothing():
    """In a child put() and close() return at once; the parent delivers everything once."""
    done = processes.run(
        code="""
        import os, warnings
        from gradwatch_loggers.background import Background

        warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
        def show(group):
            os.write(1, f"{os.getpid() == parent} {group}\\n".encode())

        parent = os.getpid()
        delivery = Background(show, "Test")
        delivery.put([1])
        assert delivery.flush(60)
        child = os.fork()
        delivery.put([2])
        delivery.flush(60)
        delivery.close()
        if child:
            assert os.waitpid(child, 0)[1] == 0
        else:
            os._exit(0)
        """
    )
    assert done.stderr == ""
    assert sorted(done.stdout.split("\n")) == ["", "True [1]", "True [2]"]


def test_a_thread_that_cannot_start_is_no_loss(monkeypatch):
    """Where no thread can start, as while the interpreter exits, close() delivers."""

    def cannot(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    service = Service()
    delivery = Background(service, "Test")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        delivery.put([1, 2])
    delivery.close()
    assert service.seen == [1, 2]
    assert service.threads == {threading.current_thread()}


def test_without_a_thread_close_is_limited_as_well(monkeypatch):
    """A slow function that close() calls itself is not called again when the time is up."""

    def cannot(thread):
        raise RuntimeError("can't start new thread")

    seen = []
    delivery = Background(lambda group: (seen.extend(group), time.sleep(0.05)), "Test", wait_s=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        delivery.put([1, 2, 3])
    with pytest.warns(gradwatch.GradwatchWarning, match="lost 2 of 3"):
        delivery.close()
    assert seen == [1]


def test_the_function_has_the_context_of_the_training():
    """Context variables are those of the caller of the first put(): loggers find their runs there."""
    run, seen = contextvars.ContextVar("run"), []
    run.set("mine")
    delivery = Background(lambda group: seen.append(run.get()), "Test")
    delivery.put([1])
    delivery.close()
    assert seen == ["mine"]
