"""
This service, its floor and its contestants, taking turns on the same machine.

    python -m benchmarks.serving            # about 10 minutes (`make bench`)
    python -m benchmarks.serving --full     # longer loads, more rounds, every combination; tunes the contestants anew

In each round every system is started, loaded and stopped, in another order each time; the floor is measured before,
between and after the rounds. Writes results/NAME.json, NAME.md and NAME.png beside this file; NAME is quick or full.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import probes
from benchmarks.contestants.catalogue import CONTESTANTS, Contestant
from benchmarks.contestants.run import (
    CHECKED,
    ContestantError,
    best_setting,
    check,
    first_labels,
    install,
    measure,
    merged_graph,
    note_tuned,
    running,
    tune,
)
from benchmarks.floor import FloorResult, Loop, measure_floor
from benchmarks.images import LARGE, SMALL, make_images
from benchmarks.load import CONCURRENCIES, LoadResult, closed_loop
from benchmarks.machine import describe
from benchmarks.messages import multipart_requests, raw_requests
from benchmarks.ours import Running, our_labels, ride_serve
from benchmarks.processes import end_like_an_error
from benchmarks.report import FP32, ROUTED_FP32, write_report
from benchmarks.runtimes import PROVIDERS
from model_export.bundle import read_bundle
from service.settings import DEFAULT_BUNDLE

RESULTS: Final = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Plan:
    """How thoroughly to measure: a quick run leaves out what no aim needs."""

    name: str
    rounds: int
    load_s: float
    floor_s: float
    full: bool

    def clients(self, size: str) -> tuple[int, ...]:
        """Numbers of connections."""
        return CONCURRENCIES if self.full or size == SMALL else CONCURRENCIES[-1:]


QUICK: Final = Plan("quick", rounds=3, load_s=2.0, floor_s=1.5, full=False)
FULL: Final = Plan("full", rounds=5, load_s=6.0, floor_s=4.0, full=True)


@dataclass
class Bench:
    """One run: what is measured, and the rows so far."""

    plan: Plan
    bundle: Path
    graph: Path
    seed: int
    chosen: tuple[str, ...]  # options for ride-serve, measured besides its defaults
    rows: list[dict[str, Any]] = field(default_factory=list)
    floors: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # contestants that could not take part, and why
    served: dict[str, str] = field(default_factory=dict)  # variant and provider that ride-serve took by itself

    def add(self, system: str, size: str, encoding: str, round_number: int, result: LoadResult) -> None:
        """Keep a load's result."""
        row = {"system": system, "size": size, "encoding": encoding, "round": round_number, **asdict(result)}
        self.rows.append(row)
        print(
            f"round {round_number}  {system:32} {size:8} {encoding:9} {result.connections:3} clients "
            f"{result.rate:8.1f}/s  p50 {result.p50_ms} ms  p99 {result.p99_ms} ms  errors {result.errors}",
            file=sys.stderr,
        )

    def images(self, size: str) -> list[bytes]:
        """The JPEGs of one size."""
        return make_images(size, seed=self.seed).jpegs


def ours(bench: Bench, round_number: int) -> None:
    """The service as it comes: routed, and with all experts by request."""
    with ride_serve(bench.bundle) as running_service:
        for size in (SMALL, LARGE):
            _load_ours(bench, running_service, "routed", size, round_number)
            _load_ours(bench, running_service, "all experts", size, round_number, "?threshold=0")
            for count in bench.plan.clients(size):
                target = running_service.target()
                requests = multipart_requests(target, bench.images(size))
                result = closed_loop(target, requests, connections=count, seconds=bench.plan.load_s)
                bench.add("routed", size, "multipart", round_number, result)


def ours_fp32(bench: Bench, round_number: int) -> None:
    """In fp32 on onnxruntime's CPU provider: all experts, as the contestants serve and checked as they are; routed."""
    with ride_serve(bench.bundle, ("--provider", "cpu", "--variant", "fp32")) as running_service:
        for size in (SMALL, LARGE):
            target, jpegs = running_service.target("?threshold=0"), bench.images(size)[:CHECKED]
            check(our_labels, target, raw_requests(target, jpegs), first_labels(bench.graph, jpegs))
        _load_ours(bench, running_service, ROUTED_FP32, SMALL, round_number)
        for size in (SMALL, LARGE):
            _load_ours(bench, running_service, FP32, size, round_number, "?threshold=0")


def ours_chosen(bench: Bench, round_number: int) -> None:
    """The service with the provider or variant of the command line."""
    with ride_serve(bench.bundle, bench.chosen) as running_service:
        title = f"routed, {running_service.variant}, {running_service.provider}"
        _load_ours(bench, running_service, title, SMALL, round_number)


def _load_ours(
    bench: Bench, running_service: Running, title: str, size: str, round_number: int, query: str = ""
) -> None:
    target = running_service.target(query)
    requests = raw_requests(target, bench.images(size))
    for count in bench.plan.clients(size):
        result = closed_loop(target, requests, connections=count, seconds=bench.plan.load_s)
        bench.add(title, size, "raw", round_number, result)


def other(bench: Bench, contestant: Contestant, round_number: int) -> None:
    """A contestant, with its best setting; one that failed in an earlier round is not tried again."""
    if contestant.title in bench.absent:
        return
    try:
        with running(contestant, best_setting(contestant), bench.graph) as target:
            for size in (SMALL, LARGE):
                for count in bench.plan.clients(size):
                    result = measure(contestant, target, size, count, bench.plan.load_s, bench.seed)
                    bench.add(contestant.title, size, "its own", round_number, result)
    except (ContestantError, OSError) as error:  # or it died under the load
        bench.absent[contestant.title] = str(error)


def floors(bench: Bench) -> None:
    """The bare loops: routed and with all experts as the service runs them, routed in fp32; large images scaled."""
    provider, variant = bench.served["provider"], bench.served["variant"]
    if provider not in PROVIDERS:
        raise SystemExit(f"the service runs {provider!r}; the bare loop knows {PROVIDERS}")
    loops = [(variant, provider, *loop) for loop in ((SMALL, True), (SMALL, False), (LARGE, True))]
    for variant, provider, size, routed in dict.fromkeys([*loops, ("fp32", "cpu", SMALL, True)]):
        loop = Loop(
            bench.bundle, variant, provider, draft=size == LARGE, size=size, routed=routed,
            seconds=bench.plan.floor_s, seed=bench.seed,
        )  # fmt: skip
        result: FloorResult = measure_floor(loop)
        bench.floors.append(asdict(result) | {"rate": result.rate})
        print(
            f"floor    {variant} {'routed' if routed else 'all experts':25} {size:8} "
            f"{result.one_process:8.1f}/s in one process, {result.process_per_core:.1f}/s in one per core, "
            f"one image {result.one_image_ms} ms",
            file=sys.stderr,
        )


def prepare(bench: Bench) -> list[Contestant]:
    """Ask the service what it runs by itself; install the contestants, and tune them for a full run."""
    with ride_serve(bench.bundle) as running_service:
        bench.served.update(variant=running_service.variant, provider=running_service.provider)
    present = []
    for contestant in CONTESTANTS:
        try:
            install(contestant)
            if bench.plan.full:
                note_tuned(contestant, tune(contestant, bench.graph, bench.plan.load_s))
            present.append(contestant)
        except ContestantError as error:
            bench.absent[contestant.title] = str(error)
    return present


def run(bench: Bench) -> dict[str, Any]:
    """All rounds, then the probes; everything that was measured, as JSON."""
    began = time.monotonic()
    measured = describe(bench.seed)
    present = prepare(bench)
    floors(bench)
    for round_number in range(bench.plan.rounds):
        turns: list[Callable[[Bench, int], None] | Contestant] = [ours, ours_fp32]
        turns += [*([ours_chosen] if bench.chosen else []), *present]
        first = round_number * len(turns) // bench.plan.rounds
        for turn in turns[first:] + turns[:first]:
            if isinstance(turn, Contestant):
                other(bench, turn, round_number)
            else:
                turn(bench, round_number)
        floors(bench)
    small = bench.images(SMALL)
    rates = sorted(
        row["rate"]
        for row in bench.rows
        if (row["system"], row["size"], row["encoding"], row["connections"]) == ("routed", SMALL, "raw", 64)
    )
    saturation = rates[len(rates) // 2]
    document = {
        "rows": bench.rows,
        "floors": bench.floors,
        "absent": bench.absent,
        "burst": probes.burst(bench.bundle, small, bench.plan.load_s),
        "footprint": probes.footprint(bench.bundle, small, bench.plan.rounds, bench.plan.load_s),
        "sigterm": probes.sigterm(bench.bundle, small),
        "open_loop": probes.rising_rates(bench.bundle, small, saturation, bench.plan.load_s, bench.seed),
    }
    settings = {contestant.title: str(best_setting(contestant)) for contestant in present}
    more = {
        "plan": asdict(bench.plan), "served": bench.served, "decoder": "simplejpeg", "settings": settings,
        "images": make_images(SMALL, seed=bench.seed).source, "model": _model(bench.bundle),
        "requirements": _requirements(), "minutes": round((time.monotonic() - began) / 60, 1),
        "load_average": os.getloadavg(),
    }  # fmt: skip
    return document | {"measured": measured | more}


def _model(bundle: Path) -> str:
    manifest = read_bundle(bundle).manifest
    return f"{manifest.name} {manifest.version}, thresholds {', '.join(map(str, manifest.thresholds))}"


def _requirements() -> Mapping[str, list[str]]:
    return {
        contestant.title: (contestant.folder / "requirements.txt").read_text().split() for contestant in CONTESTANTS
    }


@contextmanager
def _graph(bundle: Path, given: Path | None) -> Iterator[Path]:
    if given:
        yield given.resolve()
        return
    with merged_graph(bundle, "fp32") as path:
        yield path


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="take the time for every combination")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="[default: the one we ship]")
    parser.add_argument("--provider", help="measure ride-serve with this provider, too")
    parser.add_argument("--variant", help="measure ride-serve with this variant, too")
    parser.add_argument("--graph", type=Path, metavar="FILE", help="what the contestants serve [default: merged fp32]")
    parser.add_argument("--seed", type=int, default=0, help="of images and arrivals [default: 0]")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="[default: results/ beside this]")
    options = parser.parse_args()
    end_like_an_error()
    chosen = [
        word
        for name in ("provider", "variant")
        if getattr(options, name)
        for word in (f"--{name}", getattr(options, name))
    ]
    with _graph(options.bundle, options.graph) as graph:
        plan = FULL if options.full else QUICK
        bench = Bench(plan, options.bundle.resolve(), graph, options.seed, tuple(chosen))
        document = run(bench)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{plan.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(write_report(document, options.output, plan.name))


if __name__ == "__main__":
    main()
