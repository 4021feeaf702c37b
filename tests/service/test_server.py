"""ride-serve as a process of its own under load and under abuse: nobody is lost, nothing is left behind."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from model_export.bundle import read_bundle, sha256_of
from service.classifier import Classifier
from service.engine import open_engine
from service.server import DrainingServer
from service.settings import Settings
from service.supervisor import START_FAILED
from tests.service.conftest import PATIENCE_S
from tests.service.server import COMMAND, IMAGE, SLOW, USUAL, request_for, servers, wait


@pytest.fixture
def serve(slow_bundle, tmp_path):
    """Start ride-serve with some options, and wait until it is ready."""
    with servers(slow_bundle, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def shared(slow_bundle, tmp_path_factory):
    """A server that several tests treat badly and that ends as it should nevertheless; it takes 100 kB at most."""
    with servers(slow_bundle, tmp_path_factory.mktemp("shared")) as start:
        server = start("--max-bytes", "100KB")
        yield server
        assert server.end() == 0


def test_it_serves_until_told_to_stop(serve):
    """Answers on one connection, one after another; then SIGTERM, and exit code 0. Its log is JSON, line by line."""
    server = serve()
    for _ in range(3):
        assert server.client.post("/classify", content=IMAGE).json()["results"][0]["experts_used"] >= 1
    assert server.client.get("/readyz").status_code == 200

    assert server.end() == 0
    events = [line["event"] for line in server.log()]
    assert {"starting", "listening", "ready", "draining"} <= set(events)


def test_on_sigterm_accepted_work_is_answered_and_new_work_refused(serve):
    """Four requests are in the house, one of them running: all get 200; who comes now gets 503; exit code 0."""
    server = serve("--max-batch", "1", "--timeout-s", "60", "--drain-s", "60")
    with ThreadPoolExecutor(4) as clients:
        accepted = [clients.submit(server.post, SLOW) for _ in range(4)]
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 4)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")

        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/healthz").status_code == 200
        assert not all(request.done() for request in accepted)
        assert [request.result().status_code for request in accepted] == [200] * 4
    assert server.process.wait(PATIENCE_S) == 0


def test_under_constant_load_every_request_gets_an_answer_or_a_refusal(serve):
    """Six clients post without a pause while SIGTERM comes: 200 until then, 503 after, and nobody is cut off."""
    server = serve()
    stop = threading.Event()

    def keep_posting():
        statuses = []
        while not stop.is_set():
            try:
                statuses.append(server.post().status_code)
            except httpx.TransportError:  # it has ended; but nobody may be cut off before it began to
                assert "draining" in [line["event"] for line in server.log()]
                break
        return statuses

    with ThreadPoolExecutor(6) as clients:
        running = [clients.submit(keep_posting) for _ in range(6)]
        try:
            wait(lambda: server.metric('ride_requests_total{code="200"}') > 30)
            code = server.end()
        finally:
            stop.set()
        histories = [client.result() for client in running]
    assert code == 0
    for statuses in histories:
        assert set(statuses) <= {200, 503}
        assert statuses == sorted(statuses)


def test_whoever_has_connected_and_not_asked_yet_is_let_ask(serve):
    """For a while after the service has stopped listening: 503, instead of a closed connection."""
    server = serve()
    with server.connect() as late:
        server.process.send_signal(signal.SIGTERM)
        wait(lambda: not is_listening(server.port))
        time.sleep(0.5)  # in which it would end, had it nobody to wait for
        late.sendall(request_for(IMAGE))
        assert read_all(late).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(PATIENCE_S) == 0


def is_listening(port):
    """Whether anybody does so on an IPv4 port."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in sockets)


def read_all(connection):
    """What comes until the other side closes."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("processes", [["--workers", "2"], ["--shared-engine", "on"]])
def test_a_service_that_still_warms_up_ends_at_once(processes):
    """However long that would take: nothing was accepted, so that nothing is lost, and the exit code is 0."""
    command = [*COMMAND, "--port", "0", "--max-batch", "4096", *processes]  # takes a minute and more
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        url = next(line["url"] for line in map(json.loads, lines) if line["event"] == "listening")
        wait(lambda: answers(url, "/healthz") == 200)
        assert answers(url, "/readyz") == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert not {"worker_lost", "worker_ready", "ready"} & {json.loads(line)["event"] for line in lines}


SIGNALLED_EARLY = """
import os, signal, sys
from service import __main__ as command
command.read_bundle = lambda _: os.kill(os.getpid(), signal.{name})
sys.exit(command.main([]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_service_that_has_not_read_its_bundle_yet_ends_at_once(name):
    """Exit code 0 and not a word, also as a container's first process, which the kernel protects from SIGTERM."""
    run = subprocess.run(
        [sys.executable, "-c", SIGNALLED_EARLY.format(name=name)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(("code", "returned"), [(0, 0), (3, START_FAILED)])
def test_a_signal_before_the_server_handles_any_is_no_failed_start(tiny_bundle, code, returned):
    """The handler of main ends the process with 0, in the midst of whatever, and uvicorn with 3 if it cannot start."""

    class Ended(DrainingServer):
        async def startup(self, sockets=None):
            sys.exit(code)

    classifier = Classifier(read_bundle(tiny_bundle), Settings(threads=1), CollectorRegistry(), open_engine)
    assert Ended(classifier, []).serve_until_told() == returned


def answers(url, path):
    """The status of a GET; None where nobody answers yet."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}{path}", timeout=PATIENCE_S).status_code


def test_an_interrupt_from_the_keyboard_drains_too(serve):
    """Ctrl-C once: the running request is answered, exit code 0."""
    server = serve("--timeout-s", "60", "--drain-s", "60")
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        assert server.end(signal.SIGINT) == 0
        assert accepted.result().status_code == 200


def test_a_second_interrupt_ends_it_at_once(serve):
    """Exit code 1, long before the work is done."""
    server = serve("--timeout-s", "60", "--drain-s", "60")
    with ThreadPoolExecutor(1) as clients:
        lost = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("draining")
        assert server.end(signal.SIGINT) == 1
        assert isinstance(lost.exception(), httpx.TransportError)


def test_work_that_does_not_end_in_the_time_to_drain_is_left_behind(serve):
    """Exit code 1, and a line that says how much."""
    server = serve("--drain-s", "0.1", "--timeout-s", "30")
    with ThreadPoolExecutor(1) as clients:
        lost = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        assert server.end() == 1
        assert isinstance(lost.exception(), httpx.TransportError)
    assert server.wait_for("drain_incomplete")["requests"] == 1


def test_an_upload_that_trickles_is_ended_by_the_time_limit(serve):
    """504 for it, which a client that goes on sending can read; then the connection ends. Others are answered."""
    server = serve("--timeout-s", "0.5")
    with server.connect() as slow:
        slow.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + IMAGE[:10])
        assert server.post().status_code == 200
        answer = slow.recv(1)
        for _ in range(5):  # reset, the second piece could not be sent
            slow.sendall(b"x")
            time.sleep(0.05)
        answer += read_all(slow)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b"not received within 0.5 s (RIDE_TIMEOUT_S)" in answer
    assert b"connection: close" in answer.lower()


def test_a_client_that_is_gone_is_not_worked_for(serve):
    """It is counted as 499, its image never runs, and the others are answered."""
    server = serve("--max-batch", "1", "--timeout-s", "60")
    with ThreadPoolExecutor(1) as clients:
        running = clients.submit(server.post, SLOW)
        wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 1)
        with server.connect() as impatient:
            impatient.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE)
            wait(lambda: server.metric('ride_stage_seconds_count{stage="decode"}') == 2)
        wait(lambda: server.metric('ride_requests_total{code="499"}') == 1)
        assert running.result().status_code == 200
    assert server.post().status_code == 200
    assert server.metric('ride_batch_images_count{stage="trunk"}') == 2
    assert server.end() == 0


def test_a_refused_client_that_is_still_sending_gets_to_read_why(shared):
    """413 for a body above the limit, with and without a declared length, though its sender listens only afterwards."""
    for body in (bytes(199_000), iter([bytes(1000)] * 199)):
        response = httpx.post(f"{shared.url}/classify", content=body, timeout=PATIENCE_S)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_hangs_up_in_the_midst_of_its_upload_harms_nobody(shared):
    """Whether it was welcome or is just being refused: it is counted, and the next one is served."""
    for query, code in (("", "499"), ("?nonsense=1", "422")):
        before = shared.metric(f'ride_requests_total{{code="{code}"}}')
        with shared.connect() as hasty:
            hasty.sendall(f"POST /classify{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf".encode())
        wait(lambda: shared.metric(f'ride_requests_total{{code="{code}"}}') == before + 1)  # noqa: B023
        assert shared.post().status_code == 200


def test_a_client_that_asks_first_is_spared_the_upload(shared):
    """Expect: 100-continue is answered with 413 at once where the declared length is too much, else with 100."""
    head = (
        b"POST /classify HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    )
    with shared.connect() as connection:
        connection.sendall(head % 10**9)
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")
    with shared.connect() as connection:
        connection.sendall(head % len(IMAGE))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n")
        connection.sendall(IMAGE)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: minus one\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    ],
)
def test_what_is_not_http_ends_its_connection_and_nothing_else(shared, garbage):
    """With a 4xx."""
    with shared.connect() as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 4")
    assert shared.post().status_code == 200


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bundle", "nowhere"], 2, "ride-serve: nowhere: no manifest.json there; expected a bundle"),
        (["--colour", "red"], 2, "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_start_is_exit_code_2_with_one_clear_line(tiny_bundle, options, code, words):
    """And no stack trace."""
    run = subprocess.run(
        [*COMMAND, "--bundle", str(tiny_bundle), *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert run.returncode == code
    assert words in run.stderr
    assert "Traceback" not in run.stderr


def test_a_host_that_is_no_name_is_exit_code_1(tiny_bundle):
    """With the reason in the log, and no stack trace."""
    run = subprocess.run(
        [*COMMAND, "--bundle", str(tiny_bundle), "--port", "0", "--host", ".."],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    last = json.loads(run.stderr.splitlines()[-1])
    assert last["event"] == "cannot_listen"
    assert last["reason"].startswith("'..' has no address")
    assert "Traceback" not in run.stderr


def test_a_port_in_use_is_exit_code_1(tiny_bundle, monkeypatch):
    """With the address in the log, which holds what is as severe as wished and warns of a misspelt setting."""
    monkeypatch.setenv("RIDE_PROT", "80")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run(
            [*COMMAND, "--bundle", str(tiny_bundle), "--port", str(port), "--log-level", "warning"],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert run.returncode == 1
    warning, error = map(json.loads, run.stderr.splitlines())
    assert warning["message"].endswith("is RIDE_PORT meant?")
    assert f"('127.0.0.1', {port})" in error["reason"]


@pytest.mark.parametrize("processes", [["--workers", "2"], ["--shared-engine", "on"]])
def test_graphs_that_cannot_be_opened_are_exit_code_1(make_bundle, processes):
    """The manifest is in order, the graph is not: it stops by itself, with the reason in the log."""
    path = make_bundle()
    old = sha256_of(path / "trunk.onnx")
    (path / "trunk.onnx").write_bytes(b"not a graph")
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace(old, sha256_of(path / "trunk.onnx")))
    run = subprocess.run(
        [*COMMAND, "--bundle", str(path), "--port", "0", *processes],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert run.returncode == 1
    failures = [line["reason"] for line in map(json.loads, run.stderr.splitlines()) if line["event"] == "start_failed"]
    assert any(reason.startswith("trunk.onnx: onnxruntime") for reason in failures)


def test_as_many_connections_are_let_in_as_the_system_allows(serve):
    """Shells and systemd begin with far fewer open files, which each process may raise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        server = serve()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as connections:
        for _ in range(100):
            connections.enter_context(server.connect())
        assert server.post().status_code == 200
        assert server.metric("process_max_fds") == 2 * hard  # of supervisor and worker


LARGE_BODIES = """
from pathlib import Path
from service.__main__ import _return_memory

def print_resident_pages():
    print(Path("/proc/self/statm").read_text().split()[1])

_return_memory()
bytes(30 << 20)  # from now on, glibc by itself would take what is smaller from its heap
print_resident_pages()
bodies = [b"1" * (8 << 20) for _ in range(8)]
stays = b"2" * (2 << 20)
print_resident_pages()
del bodies
print_resident_pages()
"""


def test_the_memory_of_large_bodies_goes_back_to_the_system():
    """Although something that came after them stays."""
    run = subprocess.run([sys.executable, "-c", LARGE_BODIES], capture_output=True, text=True, check=True)

    before, full, after = (int(pages) * resource.getpagesize() for pages in run.stdout.split())
    assert full - before > 60 << 20
    assert after - before < 10 << 20


def test_a_log_that_nobody_reads_stops_neither_service_nor_signals(tiny_bundle):
    """Lines are lost instead, and counted once there is room again."""
    process = subprocess.Popen([*COMMAND, *USUAL, "--bundle", str(tiny_bundle)], stderr=subprocess.PIPE)
    try:
        lines = (json.loads(process.stderr.readline()) for _ in range(99))
        url = next(line["url"] for line in lines if line["event"] == "listening")
        next(line for line in lines if line["event"] == "ready")
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            for _ in range(400):  # more than a pipe holds
                assert client.post("/classify", content=b"nonsense").status_code == 415
            assert client.post("/classify", content=IMAGE).status_code == 200
            for _ in range(100):
                process.stderr.readline()
            client.post("/classify", content=b"nonsense")
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        assert any(json.loads(line).get("lines_lost_before", 0) > 0 for line in process.stderr)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("closed", ["<&- >&-", ">&- 2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_it_runs_and_ends_without_standard_streams(tiny_bundle, closed):
    """As some daemons start theirs."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [*COMMAND, "--bundle", str(tiny_bundle), "--port", str(port)]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command])
    try:
        wait(lambda: is_ready(port))
    finally:
        process.terminate()
    assert process.wait(PATIENCE_S) == 0


def is_ready(port):
    """Whether there is a service at this port that says so."""
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200


def test_it_runs_with_more_open_files_than_select_takes(tiny_bundle):
    """A careless parent hands its own on; so do hundreds of workers on several addresses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        open_files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        files = [open_files.enter_context(open(os.devnull)) for _ in range(1100)]
        process = subprocess.Popen(
            [*COMMAND, "--bundle", str(tiny_bundle), "--port", "0", "--workers", "2"],
            stderr=subprocess.PIPE, text=True, pass_fds=[file.fileno() for file in files],
        )  # fmt: skip
    assert process.stderr is not None
    ready = any(json.loads(line)["event"] == "ready" for line in process.stderr)
    process.terminate()
    process.stderr.close()
    assert ready
    assert process.wait(PATIENCE_S) == 0


def test_the_command_is_installed():
    """ride-serve is the module's main."""
    command = Path(sys.executable).parent / "ride-serve"
    run = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=PATIENCE_S, check=True)

    assert run.stdout.startswith("ride-serve ")
