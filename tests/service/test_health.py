"""An engine that is broken for good ends its process, which failed every request until then and called itself ready."""

import re
import signal
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest

from service import health
from service.health import LONGEST_STEP_S, MOST_FAILURES, EngineWatch
from tests.service.conftest import encode
from tests.service.server import PersistentClient, servers, wait
from tests.tiny import FAILING_COLOUR, plain

FAILING = encode(plain(FAILING_COLOUR))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(health.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def serve(tiny_bundle, tmp_path):
    """Start ride-serve on the tiny bundle."""
    with servers(tiny_bundle, tmp_path) as start:
        yield start


def test_failures_in_a_row_are_trouble(clock):
    """One less may pass."""
    steps = SimpleNamespace(failures=MOST_FAILURES - 1, step_began=None)
    watch = EngineWatch(steps)

    assert watch.trouble() is None
    steps.failures += 1
    assert watch.trouble() == "the engine failed 20 times in a row"


def looks(watch, clock, seconds, every=1.0):
    """What is found at regular looks."""
    found = []
    for _ in range(int(seconds / every)):
        clock.seconds += every
        found.append(watch.trouble())
    return found


def test_a_step_that_does_not_end_is_trouble(clock):
    """Many that do are none, however long they take together."""
    steps = SimpleNamespace(failures=0, step_began=clock.seconds)
    watch = EngineWatch(steps)

    assert not any(looks(watch, clock, LONGEST_STEP_S))
    steps.step_began = clock.seconds
    assert not any(looks(watch, clock, LONGEST_STEP_S))
    steps.step_began = None
    assert not any(looks(watch, clock, LONGEST_STEP_S))
    steps.step_began = clock.seconds
    assert looks(watch, clock, LONGEST_STEP_S + 2)[-1] == "a step of the engine has not ended for 61 s"


def test_a_step_may_take_as_long_as_a_request(clock):
    """Where that is more than usual."""
    watch = EngineWatch(SimpleNamespace(failures=0, step_began=clock.seconds), 3 * LONGEST_STEP_S)

    assert not any(looks(watch, clock, 3 * LONGEST_STEP_S))
    assert looks(watch, clock, 2)[-1] == "a step of the engine has not ended for 181 s"


def test_a_pause_is_no_step_that_hangs(clock):
    """The container stood still for an hour, and the step with it."""
    watch = EngineWatch(SimpleNamespace(failures=0, step_began=clock.seconds))
    watch.trouble()
    clock.seconds += 3600

    assert watch.trouble() is None


def fail(server):
    """Ask for what fails; the process may end meanwhile."""
    with suppress(httpx.TransportError):
        server.post(FAILING)


def test_one_image_that_comes_through_shows_that_an_engine_is_not_broken(serve):
    """It fails 19 times in a row, twice; the worker that did is still there."""
    server = serve()
    (worker,) = server.children()
    for _ in range(2):
        assert {server.post(FAILING).status_code for _ in range(MOST_FAILURES - 1)} == {500}
        assert server.post().status_code == 200

    assert server.children() == [worker]
    assert server.end() == 0
    server.log_path.write_text("")  # the stack traces belong there


@pytest.mark.parametrize(
    "options", [["--workers", "1"], ["--workers", "2"], ["--workers", "2", "--shared-engine", "on"]]
)
def test_a_worker_or_engine_that_is_broken_is_replaced(serve, options):
    """The others serve on meanwhile, or find the new engine; a lone worker's successor answers those who waited."""
    server = serve(*options)
    wait(lambda: fail(server) or any(line["event"] == "engine_broken" for line in server.log()))
    assert re.match("the engine failed [0-9]+ times in a row; only another", server.wait_for("engine_broken")["reason"])
    server.wait_for("worker_died")
    server.client = PersistentClient(server.url)
    wait(lambda: server.metric("ride_ready") == server.metric("ride_workers_configured"))

    wait(lambda: server.post().status_code == 200)  # a front may be about to find the new engine
    assert server.end(signal.SIGTERM) == 0
    server.log_path.write_text("")  # the stack traces belong there
