"""Several workers are one service: killing one costs its own connections and nothing else, and none is left behind."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from model_export.bundle import read_bundle
from service.app import create_app
from service.classifier import Classifier
from service.counters import BEAT, DEAD_CPU_S, OWN_CELLS, PID, READY, WAITING, WAS_READY
from service.engine import open_engine
from service.metrics import shared_counters
from service.server import DrainingServer
from service.settings import Settings
from tests.service.conftest import PATIENCE_S, until
from tests.service.server import COMMAND, SLOW, PersistentClient, alive, ask, hammer, servers, wait


@pytest.fixture
def serve(slow_bundle, tmp_path):
    """Start ride-serve with several workers, and wait until all of them are ready."""
    with servers(slow_bundle, tmp_path) as start:
        yield lambda *options, workers=3: start("--workers", str(workers), *options)


def test_all_workers_answer_and_any_of_them_tells_the_sum(serve):
    """Of 300 requests each gets some; /metrics says 300 whoever is asked, and the log says who is who."""
    server = serve()
    results = hammer(server.port, 8, lambda: wait(lambda: server.answered() >= 300))
    total = results[200]

    assert results.keys() == {200}
    scraped = [httpx.get(f"{server.url}/metrics").text.splitlines() for _ in range(12)]  # by different workers
    for lines in scraped:
        assert f'ride_requests_total{{code="200"}} {total:.1f}' in lines
        assert {"ride_workers 3.0", "ride_ready 3.0", "ride_worker_restarts_total 0.0"} <= set(lines)
        assert "ride_queue_limit_images 384.0" in lines  # in three equal parts, two of the largest requests each
        assert sum(line.startswith("ride_model_info{") for line in lines) == 1
    assert all(cpu_seconds(pid) > 0.05 for pid in server.children())
    assert sorted(line["worker"] for line in server.log() if line["event"] == "worker_ready") == [0, 1, 2]
    assert [line["workers"] for line in server.log() if line["event"] == "ready"] == [3]
    assert len([line for line in server.log() if line["event"] == "listening"]) == 1
    assert server.end() == 0


def cpu_seconds(pid):
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_workers_share_the_memory_of_what_is_imported(serve):
    """Each has less than half of its resident memory to itself."""
    for pid in serve().children():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
        assert sizes["Private_Dirty"] + sizes["Private_Clean"] < 0.5 * sizes["Rss"]
        assert sizes["Private_Dirty"] < 64 * 1024


def test_a_killed_worker_costs_only_its_own_connections(serve):
    """Of 16 clients under load none meets a closed door; at most theirs break. Its successor goes on counting."""
    server = serve()
    figures = []

    def answered():
        figures.append(server.answered())
        return figures[-1]

    def kill_two():
        for kills in (1, 2):
            enough = answered() + 100
            wait(lambda: answered() > enough)  # noqa: B023
            victim = server.children()[kills - 2]  # the first worker, which started last, and another one
            os.kill(victim, signal.SIGKILL)
            wait(lambda: answered() and not alive(victim))  # noqa: B023
            wait(lambda: answered() and server.metric("ride_worker_restarts_total") == kills)  # noqa: B023
            wait(lambda: answered() and server.metric("ride_ready") == 3)
        enough = answered() + 100
        wait(lambda: answered() > enough)

    # What is asked here must not be lost itself: ask until somebody answers.
    server.client = PersistentClient(server.url)
    began = server.metric("process_start_time_seconds")
    results = hammer(server.port, 16, kill_two)

    assert results.keys() <= {200, "lost"}
    assert results["lost"] <= 2 * 16
    assert figures == sorted(figures)
    assert server.answered() >= results[200]
    assert server.metric("ride_workers") == server.metric("ride_ready") == 3
    assert server.metric("process_start_time_seconds") == began  # of the service
    died = [line for line in server.log() if line["event"] == "worker_died"]
    assert [(line["cause"], line["level"]) for line in died] == [("SIGKILL", "error")] * 2
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert server.end() == 0


def test_a_connection_waits_for_the_successor_of_a_dead_worker(serve):
    """With both workers killed at once, whoever comes before their successors are ready gets an answer of theirs."""
    server = serve(workers=2)
    for pid in server.children():
        os.kill(pid, signal.SIGKILL)
    answers = [asyncio.run(ask(server.port)) for _ in range(8)]

    assert set(answers) <= {200, 503}  # 503: the first of them listens while it starts, so that /healthz is answered
    wait(lambda: server.metric("ride_ready") == 2)
    assert server.metric("ride_worker_restarts_total") == 2
    assert [asyncio.run(ask(server.port)) for _ in range(8)] == 8 * [200]


@pytest.mark.parametrize("shared", ["off", "on"])
def test_a_worker_that_is_told_to_stop_by_others_has_a_successor_that_listens(serve, shared):
    """As when memory is short and somebody ends a process of many: every connection is answered afterwards."""
    server = serve("--shared-engine", shared, workers=2)
    server.client = PersistentClient(server.url)
    workers = server.children()[shared == "on" :]  # the engine's process comes first
    for restarts, worker in enumerate(workers, 1):
        os.kill(worker, signal.SIGTERM)
        wait(lambda: server.metric("ride_worker_restarts_total") == restarts)  # noqa: B023
        wait(lambda: server.metric("ride_ready") == 2)

    assert restarts == 2
    assert [asyncio.run(ask(server.port)) for _ in range(20)] == 20 * [200]
    assert server.end() == 0


def test_sigterm_under_load_loses_nobody(serve):
    """64 clients: every request that got a connection gets an answer, 200 or 503, and the exit code is 0."""
    server = serve()
    codes = []

    def stop():
        wait(lambda: server.answered() > 200)
        codes.append(server.end())

    results = hammer(server.port, 64, stop)

    assert codes == [0]
    assert results.keys() <= {200, 503, "refused"}
    assert "before this image's turn came" not in server.log_path.read_text()  # 503 is for those who come later
    assert results[200] > 200


def test_every_worker_drains(serve):
    """Slow requests in all of them are answered after SIGTERM; then nothing of the service is left."""
    server = serve("--max-batch", "1", "--timeout-s", "60", "--drain-s", "60")
    pids = server.children()
    with ThreadPoolExecutor(9) as clients:
        accepted = [clients.submit(server.post, SLOW) for _ in range(9)]
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 9)
        assert server.end() == 0
        assert [request.result().status_code for request in accepted] == [200] * 9
    assert sorted(line["worker"] for line in server.log() if line["event"] == "draining") == [0, 1, 2]
    assert not any(map(alive, pids))


def test_a_worker_that_still_drains_gets_the_connections_of_those_that_have_ended(serve):
    """Whoever comes is told at once that the service stops; nobody knocks at the door of a worker that is gone."""
    server = serve("--max-batch", "1", "--timeout-s", "60", "--drain-s", "60")
    files = [("file", ("slow.png", SLOW))] * 4
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(httpx.post, f"{server.url}/classify", files=files, timeout=PATIENCE_S)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 4)
        server.process.send_signal(signal.SIGTERM)
        wait(lambda: len(server.children()) == 1)

        assert [asyncio.run(ask(server.port)) for _ in range(12)] == 12 * [503]
        assert accepted.result().status_code == 200
    assert server.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_says_counts_once(serve, sig):
    """Ctrl-C, or that it was closed, reaches every process of the group; what was accepted is answered, exit code 0."""
    server = serve("--timeout-s", "60", "--drain-s", "60")
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        os.killpg(server.process.pid, sig)
        assert server.process.wait(PATIENCE_S) == 0
        assert accepted.result().status_code == 200


def test_a_second_sigterm_changes_nothing(serve):
    """Only a second Ctrl-C is impatient: what was accepted is answered, exit code 0."""
    server = serve("--timeout-s", "60", "--drain-s", "60")
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        assert server.end() == 0
        assert accepted.result().status_code == 200


def test_under_nohup_a_terminal_may_close(serve):
    """All processes of the service go on ignoring SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = serve(workers=2)
    finally:
        signal.signal(signal.SIGHUP, before)

    for pid in (server.process.pid, *server.children()):
        (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert int(mask, 16) >> (signal.SIGHUP - 1) & 1


def test_a_second_ctrl_c_ends_it_at_once(serve):
    """With exit code 1, long before the work is done."""
    server = serve("--timeout-s", "3600", "--drain-s", "3600", "--max-batch", "1")
    with ThreadPoolExecutor(30) as clients:
        lost = [clients.submit(server.post, SLOW) for _ in range(30)]
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 30)
        os.killpg(server.process.pid, signal.SIGINT)
        wait(lambda: len([line for line in server.log() if line["event"] == "draining"]) == 3)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 1
        assert any(isinstance(request.exception(), httpx.TransportError) for request in lost)


def test_work_that_does_not_end_in_the_time_to_drain_is_left_behind(serve):
    """Exit code 1 where any worker lost work."""
    server = serve("--drain-s", "0.1", "--timeout-s", "30")
    with ThreadPoolExecutor(1) as clients:
        lost = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        assert server.end() == 1
        assert isinstance(lost.exception(), httpx.TransportError)


def test_a_worker_that_is_stuck_is_killed(serve):
    """It cannot even notice SIGTERM; the others end well, the exit code is 1, and nothing is left."""
    server = serve("--drain-s", "0.5")
    pids = server.children()
    os.kill(pids[1], signal.SIGSTOP)

    assert server.end() == 1
    assert server.wait_for("worker_killed")["pid"] == pids[1]
    assert not any(map(alive, pids))


def test_workers_do_not_survive_their_supervisor(serve):
    """kill -9 of it ends all of them."""
    server = serve()
    pids = server.children()
    server.end(signal.SIGKILL)

    wait(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("workers", [1, 2])
def test_two_services_on_one_port_do_not_share_its_traffic(serve, tiny_bundle, workers):
    """The second one ends with exit code 1 and says which address is taken; the first serves on."""
    server = serve(workers=2)
    run = subprocess.run(
        [*COMMAND, "--bundle", str(tiny_bundle), "--port", str(server.port), "--workers", str(workers)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip

    assert run.returncode == 1
    assert f"cannot listen on ('127.0.0.1', {server.port}): Address already in use" in run.stderr
    assert server.post().status_code == 200


def test_more_workers_than_cores_work_too(serve):
    """Each with one thread and its part of the limits."""
    server = serve("--max-queue", "320", workers=5)

    assert hammer(server.port, 5, lambda: wait(lambda: server.answered() > 50)).keys() == {200}
    assert server.metric("ride_queue_limit_images") == 320
    assert server.end() == 0


SUPERVISED = """
import os, signal, sys, time
from service import supervisor
from service.counters import BEAT, DEAD_CPU_S, OWN_CELLS, READY, WAITING, WAS_READY, Counters
from service.logs import set_up
supervisor.RESTART_PAUSES_S, supervisor.STUCK_S, supervisor.LOOK_EVERY_S = (0.0, 0.1, 0.2), 0.5, 0.05
set_up("info")
counters = Counters(2, OWN_CELLS)
def work(number, sockets):
    supervisor.unblock_signals()
    counters.own[WAS_READY] = 1
    {life}
    time.sleep(60)
sys.exit(supervisor.Supervisor(work, [[], []], counters, drain_s=1).run())
"""


def supervise(life, *changes):
    """Run a supervisor over two workers that live so, in a changed script; its exit code and what it said."""
    script = SUPERVISED.format(life=life)
    for old, new in changes:
        assert old in script
        script = script.replace(old, new, 1)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return run.returncode, [json.loads(line) for line in run.stderr.splitlines()]


def setting(**values):
    """A change: these of the supervisor's numbers."""
    return "set_up(", "".join(f"supervisor.{name} = {value}; " for name, value in values.items()) + "set_up("


def test_a_worker_that_keeps_dying_ends_the_service():
    """It is restarted at once, then after longer and longer pauses, then no more: exit code 1, and the log says why."""
    code, lines = supervise("if number: os.kill(os.getpid(), signal.SIGSEGV)", setting(LOOK_EVERY_S=60))

    died = [(line["worker"], line["cause"], line["restart_in_s"]) for line in lines if line["event"] == "worker_died"]
    assert died == [(1, "SIGSEGV", 0.0), (1, "SIGSEGV", 0.1), (1, "SIGSEGV", 0.2)]
    (end,) = [line["reason"] for line in lines if line["event"] == "gave_up"]
    assert end == "worker 1 failed 4 times, each time within 60 s of its start, at last of SIGSEGV"
    assert code == 1


def test_a_pause_of_everything_kills_nobody():
    """Stopped and continued all together, as a container is: the workers get the time to show that they live."""
    life = "while True: counters.own[BEAT], counters.own[READY] = time.monotonic(), 1; time.sleep(0.02)"
    script = SUPERVISED.format(life=life).replace("set_up(", "supervisor.PAUSE_S = 0.2; set_up(")
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        try:
            time.sleep(1.5)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            everything = [process.pid, *map(int, workers)]
            for pid in everything:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(1.5)  # three times as long as a worker may stand still
            for pid in everything:  # the supervisor looks before the workers can show that they live
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.2)
            time.sleep(1)
        finally:
            process.terminate()
        _, log = process.communicate(timeout=PATIENCE_S)

    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert len(everything) == 3
    assert "worker_killed" not in events
    assert "worker_died" not in events


def test_a_worker_that_raises_is_logged_with_its_trace():
    """By itself, in its own name; it counts as dead."""
    code, lines = supervise("if number: raise ValueError('no such thing')")

    failed = [line for line in lines if line["event"] == "worker_failed"]
    assert {(line["worker"], line["exception"].splitlines()[-1]) for line in failed} == {
        (1, "ValueError: no such thing")
    }
    assert {line["cause"] for line in lines if line["event"] == "worker_died"} == {"exit code 1"}
    assert code == 1


def test_a_worker_whose_event_loop_stands_still_is_replaced():
    """The kernel would go on giving it connections; only who has been ready is meant to be prompt."""
    code, lines = supervise("counters.own[BEAT] = time.monotonic(); counters.own[READY] = number")

    killed = [line["worker"] for line in lines if line["event"] == "worker_killed" and line["worker"] == 1]
    died = [(line["worker"], line["cause"]) for line in lines if line["event"] == "worker_died"]
    assert killed == [1] * 4
    assert died == [(1, "SIGKILL")] * 3
    assert code == 1


def test_a_worker_that_never_gets_ready_is_replaced():
    """It would keep its share of the connections waiting for ever; in its first start or in a later one."""
    code, lines = supervise(
        "counters.own[READY] = 1 - number; counters.own[WAS_READY] = 1 - number",
        setting(STARTING_S=0.3, STUCK_S=60),
    )

    assert {line["worker"] for line in lines if line["event"] == "worker_killed" and "SIGKILL" not in line} == {1}
    assert [line["cause"] for line in lines if line["event"] == "worker_died"] == ["SIGKILL"] * 3
    assert code == 1


def test_a_successor_that_never_gets_ready_is_replaced():
    """However ready the one before it was."""
    life = f"""own = counters.own
    own[READY] = own[BEAT] = not own[supervisor.RESTARTS] and time.monotonic()
    number and not own[supervisor.RESTARTS] and (time.sleep(0.2), os._exit(1))
    own[supervisor.RESTARTS] < 2 or {STOP}"""
    _, lines = supervise(life, setting(STARTING_S=1, STUCK_S=60))

    died = [line["cause"] for line in lines if line["event"] == "worker_died" and line["worker"] == 1]
    assert died == ["exit code 1", "SIGKILL"]


def test_a_worker_that_drains_is_not_late():
    """Told to stop by itself, long after its start, it is ready no more but still has work to answer."""
    life = "counters.own[READY] = 1; time.sleep(0.3); counters.own[READY] = 0; time.sleep(1); os.kill(os.getppid(), 15)"
    _, lines = supervise(life + "; sys.exit(0)", setting(STARTING_S=0.5, STUCK_S=60))

    assert "worker_killed" not in {line["event"] for line in lines}


def test_a_worker_that_cannot_start_is_not_tried_again():
    """Another one would fail as well."""
    code, lines = supervise("counters.own[WAS_READY] = 0; os._exit(supervisor.START_FAILED)")

    assert code == 1
    assert not [line for line in lines if line["event"] == "worker_died"]


def test_a_worker_that_cannot_start_again_is_tried_a_few_times():
    """One could, before it: what keeps this one from it, such as memory, may pass."""
    code, lines = supervise("os._exit(supervisor.START_FAILED) if number else None")

    assert [line["cause"] for line in lines if line["event"] == "worker_died"] == ["exit code 3"] * 3
    assert code == 1


STOP = "os.kill(os.getppid(), signal.SIGTERM)"
FORKS_THAT_FAIL = """
fork, calls = os.fork, []
def fork_or_fail():
    calls.append(0)
    if len(calls) in {fail}:
        raise OSError(12, "Cannot allocate memory")
    return fork()
os.fork = fork_or_fail
def work("""


def test_a_worker_for_which_there_is_no_memory_is_tried_again():
    """The others serve on meanwhile."""
    life = f"os._exit(1) if number and not counters.own[supervisor.RESTARTS] else number and {STOP}"
    _, lines = supervise(life, ("def work(", FORKS_THAT_FAIL.replace("{fail}", "(3, 4)")))

    died = [(line["cause"], line["restart_in_s"]) for line in lines if line["event"] == "worker_died"]
    assert died == [("exit code 1", 0.0)]
    failed = [(line["cause"], line["retry_in_s"]) for line in lines if line["event"] == "worker_not_started"]
    assert failed == [("fork: Cannot allocate memory", 0.1), ("fork: Cannot allocate memory", 0.2)]
    assert "gave_up" not in {line["event"] for line in lines}


def test_no_memory_for_long_ends_the_service_as_other_deaths_do():
    """In order, and the log says why."""
    code, lines = supervise("pass", ("def work(", FORKS_THAT_FAIL.replace("{fail}", "range(2, 99)")))

    (end,) = [line["reason"] for line in lines if line["event"] == "gave_up"]
    assert end.endswith("at last of fork: Cannot allocate memory")
    assert code == 1


def test_deaths_far_apart_do_not_add_up():
    """Whoever has lived long enough is replaced at once, however many died before."""
    life = f"(time.sleep(0.1), os._exit(1)) if number else (time.sleep(2), {STOP})"
    _, lines = supervise(life, setting(SHORT_LIFE_S=0.05))

    pauses = [line["restart_in_s"] for line in lines if line["event"] == "worker_died"]
    assert len(pauses) > 4
    assert set(pauses) == {0.0}
    assert "gave_up" not in {line["event"] for line in lines}


def test_a_dead_worker_is_not_ready_and_has_no_queue():
    """What it counted stays, and so does the processor time that it took, beside that of those before it."""
    earlier = ("def work(", "counters.row(1)[DEAD_CPU_S] = 100\ndef work(")
    dies = "[sum(range(10**5)) for _ in iter(lambda: time.process_time() > 0.2, True)], os._exit(1)"
    looks = "[time.sleep(0.1) for _ in range(100) if row[DEAD_CPU_S] == 100], time.sleep(0.2)"
    tells = "print(list(row), file=sys.stderr)"
    life = f"""own, row = counters.own, counters.row(1)
    own[READY], own[WAITING], own[OWN_CELLS] = number, 5, 7
    ({dies}) if number else ({looks}, {tells}, {STOP})"""
    _, said = supervise(life, ("(0.0, 0.1, 0.2), 0.5", "(30,), 60"), ("(2, OWN_CELLS)", "(2, OWN_CELLS + 1)"), earlier)

    (row,) = [line for line in said if isinstance(line, list)]
    assert (row[PID], row[READY], row[WAITING], row[OWN_CELLS]) == (0, 0, 0, 7)
    assert row[DEAD_CPU_S] > 100.1


def test_ready_is_told_when_the_last_worker_is():
    """Once."""
    life = f"time.sleep(0.5 * number); counters.own[WAS_READY] = 1; number or (time.sleep(1), {STOP})"
    _, lines = supervise(life, ("    counters.own[WAS_READY] = 1\n", ""), setting(LOOK_EVERY_S=60))

    (ready,) = [line for line in lines if line["event"] == "ready"]
    assert ready["seconds"] >= 0.5


def test_workers_get_the_time_to_drain():
    """And only then the supervisor loses its patience."""
    drains = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.6), os._exit(0)))"
    code, lines = supervise(f"{drains}; number or (time.sleep(0.3), {STOP})", setting(PATIENCE_S=0.1))

    assert "worker_killed" not in {line["event"] for line in lines}
    assert code == 0


def test_a_second_ctrl_c_leaves_workers_no_time_to_drain():
    """Neither those that are stuck and hear of nothing."""
    stuck = "signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.STOP_SIGNALS)"
    ctrl_c = "os.kill(os.getppid(), signal.SIGINT)"
    code, lines = supervise(
        f"{stuck}; number or ({ctrl_c}, time.sleep(0.3), {ctrl_c})",
        setting(PATIENCE_S=0.1),
        ("drain_s=1", "drain_s=600"),
    )

    assert 0 in {line["worker"] for line in lines if line["event"] == "worker_killed"}
    assert code == 1


@pytest.mark.anyio
async def test_a_worker_shows_again_and_again_that_it_lives(tiny_bundle):
    """Or it would be killed half a minute after its start, unless somebody looks at /metrics."""
    bundle = read_bundle(tiny_bundle)
    counters, before = shared_counters(bundle.manifest, 2), time.monotonic()
    classifier = Classifier(bundle, Settings(threads=1), CollectorRegistry(), open_engine, counters)

    assert not await DrainingServer(classifier, []).on_tick(1)
    assert counters.own[BEAT] >= before


@pytest.mark.anyio
async def test_the_service_is_ready_when_every_worker_has_been(tiny_bundle):
    """/readyz is 503 until then; afterwards one that is restarted does not close the door of the others."""
    bundle = read_bundle(tiny_bundle)
    counters = shared_counters(bundle.manifest, 2)
    classifier = Classifier(bundle, Settings(threads=1), CollectorRegistry(), open_engine, counters)
    app = create_app(classifier)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
    async with app.api.router.lifespan_context(app.api), client:
        await until(lambda: classifier.state == "ready")
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.json()["error"]["message"] == "1 workers are still starting; retry in 1 s"
        counters.row(1)[WAS_READY] = 1
        assert (await client.get("/readyz")).status_code == 200
