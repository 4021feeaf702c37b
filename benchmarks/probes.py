"""What a load alone does not show of ride-serve: bursts, start-up, memory, idling, its end under load, open loops."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.load import Sample, closed_loop, open_loop, trace
from benchmarks.messages import raw_requests
from benchmarks.ours import ride_serve

BURST: Final = 64
IDLE_S: Final = 10.0
SETTLE_S: Final = 1.0
SIGTERM_LOAD_S: Final = 3.0
SHARES_OF_SATURATION: Final = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1)


def burst(bundle: Path, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """The median of one client before, during and after 64 clients."""
    with ride_serve(bundle) as ours:
        requests = raw_requests(ours.target(), images)
        return {
            when: asdict(closed_loop(ours.target(), requests, connections=count, seconds=seconds))
            for when, count in (("before", 1), ("burst", BURST), ("after", 1))
        }


def footprint(bundle: Path, images: Sequence[bytes], starts: int, seconds: float) -> dict[str, Any]:
    """Seconds until ready, of several starts; after a load, memory of each process and the cores that idling takes."""
    seconds_to_ready = []
    for last in [False] * (starts - 1) + [True]:
        with ride_serve(bundle) as ours:
            seconds_to_ready.append(round(ours.start_s, 3))
            if not last:
                continue
            requests = raw_requests(ours.target(), images)
            closed_loop(ours.target(), requests, connections=BURST, seconds=seconds)
            memory = [asdict(process) for process in ours.server.memory()]
            time.sleep(SETTLE_S)
            before = ours.server.cpu_seconds()
            time.sleep(IDLE_S)
            idle = (ours.server.cpu_seconds() - before) / IDLE_S
    return {
        "start_s": seconds_to_ready,
        "median_start_s": statistics.median(seconds_to_ready),
        "processes": memory,
        "idle_cores": round(idle, 4),
    }


def sigterm(bundle: Path, images: Sequence[bytes]) -> dict[str, Any]:
    """
    SIGTERM while 64 clients are asking: what became of the requests sent before it and after it, the exit status, and
    processes left. The clients go on asking, on new connections if need be; who was sent later may find nobody there.
    """
    samples: list[Sample] = []
    with ride_serve(bundle) as ours:
        target = ours.target()
        requests = raw_requests(target, images)
        load = threading.Thread(
            target=lambda: samples.extend(trace(target, requests, connections=BURST, seconds=SIGTERM_LOAD_S))
        )
        load.start()
        time.sleep(SIGTERM_LOAD_S / 3)
        told = ours.server.terminate()
        status = ours.server.wait()
        left = len(ours.server.processes())
        load.join()
    before = Counter(sample.outcome for sample in samples if sample.sent < told)
    after = Counter(sample.outcome for sample in samples if sample.sent >= told)
    return {
        "before": dict(before),
        "after": dict(after),
        "lost": sum(count for outcome, count in before.items() if outcome not in ("200", "503")),
        "exit_status": status,
        "processes_left": left,
    }


def rising_rates(
    bundle: Path, images: Sequence[bytes], saturation: float, seconds: float, seed: int
) -> list[dict[str, Any]]:
    """Open loops at shares of the closed loop's throughput, up to where requests must be refused."""
    with ride_serve(bundle) as ours:
        requests = raw_requests(ours.target(), images)
        return [
            {"share": share}
            | asdict(open_loop(ours.target(), requests, rate=share * saturation, seconds=seconds, seed=seed))
            for share in SHARES_OF_SATURATION
        ]
