"""
The floor: a bare loop of the service's own decoding and the graphs, without HTTP, on the bundle that is served.

    python -m benchmarks.floor --size 640x480 --draft

In one process with a thread per core, and in one process per core with one thread each; routed (the bundle's
thresholds, finished rows leave the batch between experts) or with all experts. The better of the two is what a service
is measured against. Also how long one image takes by itself.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import service.images
from benchmarks.images import SIZES, SMALL, make_images
from benchmarks.machine import describe
from benchmarks.runtimes import PROVIDERS, open_graph
from model_export.bundle import Bundle, Rule, read_bundle
from service.cores import available_cores
from service.engine import choose_variant
from service.metrics import image_macs
from service.settings import DEFAULT_BUNDLE

BATCH: Final = 32
MAX_PIXELS: Final = 10**7


@dataclass(frozen=True)
class Loop:
    """What a bare loop is to run."""

    bundle: Path
    variant: str
    provider: str
    draft: bool
    size: str
    routed: bool
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class FloorResult:
    """
    A bare loop's figures.

    Attributes:
        one_process, process_per_core: images per second.
        one_image_ms: median of decoding and graphs for one image at a time, with 1 thread or one per core, whichever is
            faster.
        mean_experts, mean_macs: of the images in the loop.
    """

    loop: dict[str, Any]
    one_process: float
    process_per_core: float
    one_image_ms: float
    mean_experts: float
    mean_macs: float

    @property
    def rate(self) -> float:
        """Images per second of the better way."""
        return max(self.one_process, self.process_per_core)


class BareModel:
    """A variant's graphs, run one after another in plain numpy."""

    def __init__(self, bundle: Bundle, variant: str, provider: str, threads: int) -> None:
        if bundle.manifest.rule != "router":
            raise ValueError(
                f"the bundle exits by {bundle.manifest.rule!r}; the bare loop knows the learned router only"
            )
        graphs = bundle.manifest.variants[variant]
        self._n_classes = len(bundle.manifest.classes)
        self._thresholds = np.array(bundle.manifest.thresholds, np.float32)
        opened = [open_graph(bundle.graph_path(graph), provider, graphs.precision, threads) for graph in graphs.graphs]
        n_experts = len(graphs.experts)
        self._trunk, self._experts, self._routers = opened[0], opened[1 : n_experts + 1], opened[n_experts + 1 :]

    def run(self, images: NDArray[np.uint8], *, routed: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(B, H, W, 3) to probabilities (B, C) and experts used (B,)."""
        (features,) = self._trunk({"images": images})
        rows = np.arange(len(images))
        logits_sum = np.zeros((len(images), self._n_classes), np.float32)
        logits, used = logits_sum.copy(), np.full(len(images), len(self._experts))
        for index, expert in enumerate(self._experts):
            logits_sum, expert_feature = expert({"features": features, "logits_sum": logits_sum})
            logits[rows] = logits_sum / (index + 1)
            if routed and index < len(self._routers):
                (score,) = self._routers[index]({"expert_feature": expert_feature, "logits_sum": logits_sum})
                goes_on = score >= self._thresholds[index]
                used[rows[~goes_on]] = index + 1
                rows, features, logits_sum = rows[goes_on], features[goes_on], logits_sum[goes_on]
                if not len(rows):
                    break
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True), used


def measure_floor(loop: Loop) -> FloorResult:
    """Run one bare loop in both ways, each in processes of its own."""
    cores = available_cores()
    with_all = _run(loop, processes=1, threads=cores)
    per_core = _run(loop, processes=cores, threads=1)
    parts = with_all + per_core
    return FloorResult(
        loop={name: value for name, value in asdict(loop).items() if name != "bundle"},
        one_process=round(sum(part["rate"] for part in with_all), 1),
        process_per_core=round(sum(part["rate"] for part in per_core), 1),
        one_image_ms=round(min(part["one_image_ms"] for part in parts if "one_image_ms" in part), 3),
        mean_experts=round(parts[0]["mean_experts"], 4),
        mean_macs=round(parts[0]["mean_macs"]),
    )


def _run(loop: Loop, processes: int, threads: int) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        context.Process(target=_work, args=(loop, threads, number, barrier, pipe[1]))
        for number, pipe in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    for _, sender in pipes:
        sender.close()  # so that a worker that dies ends the wait for its result
    results = [receiver.recv() for receiver, _ in pipes]
    for worker in workers:
        worker.join()
    return results


def _work(loop: Loop, threads: int, number: int, barrier: Barrier, results: Connection) -> None:
    """In a process of its own: the first measures one image at a time, then all of them loop over batches at once."""
    bundle = read_bundle(loop.bundle)
    manifest = bundle.manifest
    jpegs = make_images(loop.size, seed=loop.seed).jpegs
    decode = partial(service.images.decode, spec=manifest.input, max_pixels=MAX_PIXELS, scaled=loop.draft)
    model = BareModel(bundle, loop.variant, loop.provider, threads)
    batches = [jpegs[first : first + BATCH] for first in range(0, len(jpegs) - BATCH + 1, BATCH)]

    def answer(batch: list[bytes]) -> NDArray[np.int64]:
        return model.run(np.stack([decode(jpeg) for jpeg in batch]), routed=loop.routed)[1]

    used = np.concatenate([answer(batch) for batch in batches])  # warms everything up, too
    rule: Rule = "router" if loop.routed else "depth"
    spent = [image_macs(manifest, count, rule) for count in range(manifest.n_experts + 1)]
    result = {"mean_experts": float(used.mean()), "mean_macs": float(np.array(spent)[used].mean())}
    if number == 0:
        result["one_image_ms"] = _one_image_ms(answer, jpegs, loop.seconds / 2)
    barrier.wait()
    began, done, turn = time.perf_counter(), 0, number
    while (now := time.perf_counter()) < began + loop.seconds:
        done += len(answer(batches[turn % len(batches)]))
        turn += 1
    result["rate"] = done / (now - began)
    results.send(result)


def _one_image_ms(answer: Any, jpegs: list[bytes], seconds: float) -> float:
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        answer([jpegs[len(times) % len(jpegs)]])
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    """Measure one bare loop, routed and with all experts, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="[default: the one we ship]")
    parser.add_argument("--variant", metavar="NAME", help="[default: what ride-serve would choose]")
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu", help="[default: %(default)s]")
    parser.add_argument("--draft", action="store_true", help="let libjpeg shrink large images while it decodes")
    parser.add_argument("--size", choices=SIZES, default=SMALL, help="of the JPEGs [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loop [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the images [default: 0]")
    options = parser.parse_args()
    variant = options.variant or choose_variant(read_bundle(options.bundle).manifest, options.provider)
    routed = Loop(
        options.bundle, variant, options.provider, options.draft, options.size, True, options.seconds,
        options.seed,
    )  # fmt: skip
    loops = {"routed": routed, "all experts": replace(routed, routed=False)}
    results = {name: asdict(measure_floor(loop)) for name, loop in loops.items()}
    json.dump({"floor": results, "measured": describe(options.seed)}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
