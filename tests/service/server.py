"""ride-serve as a process of its own."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.service.conftest import PATIENCE_S, encode
from tests.tiny import SLOW_COLOUR, noise, plain

IMAGE, SLOW = encode(noise(1)[0]), encode(plain(SLOW_COLOUR))
# Development mode tells of what is never closed or never awaited.
COMMAND = [sys.executable, "-X", "dev", "-m", "service"]
# A slow image, of which the warm-up knows nothing, would stop the event loop if the engine had no thread of its own.
USUAL = ["--port", "0", "--threads", "1", "--workers", "1", "--engine-thread", "on"]


def request_for(image):
    """POST /classify as it goes over the wire, on a connection of its own."""
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(image)
    return head + image


class Server:
    """A running ride-serve."""

    def __init__(self, process, log_path):
        self.process = process
        self.log_path = log_path
        self.url = self.wait_for("listening")["url"]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def log(self):
        """Its log so far, line by line."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, event):
        """The first line of this event."""
        return wait(lambda: next((line for line in self.log() if line["event"] == event), None))

    def metric(self, name):
        """The value of a metric, with its labels as /metrics writes them."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def post(self, image=IMAGE):
        """POST /classify on a connection of its own."""
        return httpx.post(f"{self.url}/classify", content=image, timeout=PATIENCE_S)

    def answered(self):
        """Requests that were answered with 200, by all workers together."""
        return self.metric('ride_requests_total{code="200"}')

    def children(self):
        """The process ids of its workers, oldest first."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        return [int(pid) for pid in (task / "children").read_text().split()]

    def connect(self):
        """A bare socket."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def end(self, sig=signal.SIGTERM):
        """Send a signal and return the exit code."""
        self.process.send_signal(sig)
        return self.process.wait(PATIENCE_S)


class PersistentClient:
    """Asks again where the connection breaks."""

    def __init__(self, url):
        self._url = url

    def get(self, path):
        for _ in range(9):
            with suppress(httpx.TransportError):
                return httpx.get(f"{self._url}{path}", timeout=PATIENCE_S)
        return httpx.get(f"{self._url}{path}", timeout=PATIENCE_S)

    def close(self):
        pass


def alive(pid):
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def ask(port, request=request_for(IMAGE)):  # noqa: B008, one for all
    """One request on a connection of its own: its status, "refused" where there was nobody, "lost" where it broke."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "refused"
    try:
        writer.write(request)
        answer = await reader.read()
    except OSError:
        return "lost"
    finally:
        writer.transport.abort()
    return int(answer.split(b" ", 2)[1]) if answer.endswith(b"}") else "lost"


def hammer(port, clients, meanwhile):
    """Ask without a pause from many clients while `meanwhile` runs in a thread; how often what came back."""

    async def run():
        done = asyncio.create_task(asyncio.to_thread(meanwhile))
        results = Counter()

        async def keep_asking():
            while not done.done() and results["refused"] < 10_000:
                results[await ask(port)] += 1

        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(keep_asking())
        await done
        return results

    return asyncio.run(run())


def wait(condition):
    """Poll for what happens in another process."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError(f"not within {PATIENCE_S} s")


@contextmanager
def servers(bundle, directory):
    """A function that starts servers, which are ended and whose logs are looked through in the end."""
    started = []

    def start(*options):
        log_path = directory / f"log{len(started)}"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                [*COMMAND, *USUAL, "--bundle", str(bundle), *options],
                stderr=log,
                start_new_session=True,
            )
        try:
            server = Server(process, log_path)
        except TimeoutError:
            process.kill()
            raise
        started.append(server)
        server.wait_for("ready")
        return server

    yield start
    for server in started:
        server.client.close()
        server.process.kill()
        server.process.wait()
        text = server.log_path.read_text()
        assert "Traceback" not in text
        assert "ResourceWarning" not in text
        assert "never awaited" not in text
