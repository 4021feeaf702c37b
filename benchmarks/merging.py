"""
Whether survivors of one batch should wait for those of the next: the service's own cascade and policy, simulated.

Images arrive at random, each goes as far as the bundle's calibration says, and a stage takes as long as its profile:
that of this processor, measured now, and that of an imagined GPU on which a stage takes 0.5 ms however few images it
has, and 2 us more for each.

    python -m benchmarks.merging [--seconds 20] [--seed 0]
"""

import argparse
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engine import NullObserver, default_share, reach_of
from model_export.bundle import Bundle, read_bundle
from service.cascade import Cascade, Floats, Job, Rows
from service.engine import open_engine
from service.schedule import Profile, Schedule
from service.settings import DEFAULT_BUNDLE, Settings
from service.warm_up import warm_up

LOADS = (0.5, 0.8, 0.95, 1.05, 1.3)  # of what the device can do when it finishes one batch before the next
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class SimulatedEngine:
    """Takes no time but on its own clock; an image's first pixel is how many experts it needs."""

    profile: Profile
    now: float = 0.0
    images_run: dict[str, list[int]] = field(default_factory=dict)

    def trunk(self, images: NDArray[np.uint8]) -> Any:
        self._pass("trunk", len(images))
        return images[:, 0, 0, 0]

    def expert(self, index: int, features: Any, logits_sum: Floats) -> tuple[Floats, Any]:
        self._pass(f"expert_{index}", len(features))
        return logits_sum, features

    def router(self, index: int, expert_feature: Any, logits_sum: Floats) -> Floats:
        return np.asarray(expert_feature > index + 1, np.float32)

    def take(self, features: Any, rows: Rows) -> Any:
        return features[rows]

    def join(self, features: Sequence[Any]) -> Any:
        return np.concatenate(features)

    def _pass(self, stage: str, images: int) -> None:
        self.now += self.profile.seconds(stage, images)
        self.images_run.setdefault(stage, []).append(images)


def simulate(
    profile: Profile, share: Sequence[float], rate: float, seconds: float, merges: bool, max_batch: int, seed: int
) -> dict[str, float]:
    """Latency in milliseconds (mean, p99), images per second, and images in a run of the last expert."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
    needs = random.choice(len(share), len(arrivals), p=np.array(share) / sum(share)) + 1
    engine = SimulatedEngine(profile)
    schedule = Schedule(max_batch, merges=merges, profile=profile, reach=reach_of(share))
    cascade = Cascade(
        engine, n_experts=len(share), n_classes=2, rule="router", schedule=schedule, observer=NullObserver()
    )  # fmt: skip
    waiting: deque[Job] = deque()
    arrived: dict[Job, float] = {}
    latencies: list[float] = []
    next_one = 0
    while next_one < len(arrivals) or waiting or cascade.busy:
        if not waiting and not cascade.busy:
            engine.now = max(engine.now, float(arrivals[next_one]))
        while next_one < len(arrivals) and arrivals[next_one] <= engine.now:
            job = Job(np.full((1, 1, 3), needs[next_one], np.uint8), (0.5,) * (len(share) - 1), len(share), 0.0, 1, 0.0)
            arrived[job] = float(arrivals[next_one])
            waiting.append(job)
            next_one += 1
        fresh = cascade.wants(len(waiting)) if waiting else 0
        finished = cascade.step([waiting.popleft() for _ in range(fresh)])
        latencies += [engine.now - arrived.pop(job) for job, _ in finished]
    last = engine.images_run.get(f"expert_{len(share) - 1}", [0])
    return {
        "mean": 1000 * float(np.mean(latencies)), "p99": 1000 * float(np.quantile(latencies, 0.99)),
        "rate": len(latencies) / engine.now, "last": float(np.mean(last)),
    }  # fmt: skip


def measure_profile(bundle: Bundle) -> Profile:
    """Of this processor, one thread, as the service measures it when it warms up."""
    engine = open_engine(bundle, None, provider="cpu", threads=1)
    return warm_up(engine, bundle.manifest, Settings(max_batch=SIZES[-1]), bundle.manifest.rule).profile


def imagined_gpu(stages: Sequence[str]) -> Profile:
    """Half a millisecond for any batch, and 2 us for each image."""
    one: Mapping[int, float] = {size: 0.5e-3 + 2e-6 * size for size in SIZES}
    return Profile(dict.fromkeys(stages, one))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of simulated time [default: 20]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundle = read_bundle(DEFAULT_BUNDLE)
    manifest = bundle.manifest
    share = default_share(manifest)
    stages = ["trunk", *(f"expert_{index}" for index in range(manifest.n_experts))]
    print(f"experts' shares {', '.join(f'{one:.3f}' for one in share)}; seed {options.seed}")
    print(
        "| device, largest batch | load | policy | images/s | mean ms | p99 ms | images in a run of the last expert |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, profile, max_batch in (
        ("this processor, 16", measure_profile(bundle), 16), ("imagined GPU, 64", imagined_gpu(stages), 64),
    ):  # fmt: skip
        reach = reach_of(share)
        full = profile.seconds("trunk", max_batch) + sum(
            profile.seconds(f"expert_{index}", reach[index] * max_batch) for index in range(len(share))
        )
        for load in LOADS:
            for merges in (False, True):
                found = simulate(
                    profile, share, load * max_batch / full, options.seconds, merges, max_batch, options.seed
                )
                print(
                    f"| {name} | {load:.2f} | {'may wait' if merges else 'finish first'} | {found['rate']:,.0f} "
                    f"| {found['mean']:.2f} | {found['p99']:.2f} | {found['last']:.1f} |"
                )


if __name__ == "__main__":
    main()
