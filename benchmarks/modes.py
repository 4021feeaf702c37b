"""
What each mode gives over HTTP: how many answers are right, what an image costs, and how many are answered per second.

    RIDE_DATA=path/to/sets python -m benchmarks.modes

Right or wrong are the answers to every CIFAR-100 test image, sent as the set has it (PNG); the load is of JPEGs, as in
the other benchmarks, and the modes take turns. Writes results/modes.json beside this file, and prints a table.
"""

import argparse
import json
import os
import statistics
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.images import SMALL, make_images
from benchmarks.load import closed_loop
from benchmarks.machine import describe
from benchmarks.messages import Target, ask, raw_requests
from benchmarks.ours import ride_serve
from benchmarks.processes import end_like_an_error
from model_export.bundle import SPLITS
from service.operating_point import MODES
from service.settings import DEFAULT_BUNDLE

RESULT: Final = Path(__file__).parent / "results" / "modes.json"
CLIENTS: Final = 64
ASKERS: Final = 8


@dataclass(frozen=True)
class Answers:
    """
    What a mode answers to labelled images.

    Attributes:
        accuracy: percent, by split and of "all": the mean over those of its classes that have images.
        mean_experts, mean_macs: per image.
    """

    accuracy: dict[str, float]
    mean_experts: float
    mean_macs: float


def judge(target: Target, images: Sequence[bytes], labels: NDArray[np.int64], splits: Sequence[str]) -> Answers:
    """
    Ask for every image and compare.

    Args:
        labels: (N,), of the images.
        splits: of each class, "many", "medium" or "few".

    Raises:
        RuntimeError: where an image is not answered.
    """

    def one(request: bytes) -> dict[str, Any]:
        status, body = ask(target, request)
        if status != 200:
            raise RuntimeError(f"{target.path} answers {status}: {body[:200]!r}")
        (result,) = json.loads(body)["results"]
        return dict(result)

    with ThreadPoolExecutor(ASKERS) as askers:
        results = list(askers.map(one, raw_requests(target, images)))
    right = np.array([result["predictions"][0]["index"] for result in results]) == labels
    by_class = {label: float(right[labels == label].mean()) for label in np.unique(labels).tolist()}
    shares = {"all": list(by_class.values())}
    shares |= {split: [share for label, share in by_class.items() if splits[label] == split] for split in SPLITS}
    return Answers(
        {split: round(100 * statistics.mean(of_classes), 2) for split, of_classes in shares.items() if of_classes},
        float(np.mean([result["experts_used"] for result in results])),
        float(np.mean([result["macs"] for result in results])),
    )


def measure(
    bundle: Path, images: Sequence[bytes], labels: NDArray[np.int64], *, rounds: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Every mode's answers and, in turns, its loads."""
    jpegs = make_images(SMALL, seed=seed).jpegs
    with ride_serve(bundle) as ours:
        with urllib.request.urlopen(f"{ours.url}/model", timeout=5) as answer:
            model = json.load(answer)
        splits = [one["split"] for one in model["classes"]]
        if labels.max() >= len(splits):
            raise SystemExit(
                f"{bundle} has {len(splits)} classes, the images have {labels.max() + 1}; name another bundle"
            )
        targets = {mode: ours.target(f"?mode={mode}") for mode in MODES}
        answers = {mode: asdict(judge(target, images, labels, splits)) for mode, target in targets.items()}
        loads: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for turn in range(rounds):
            for place in range(len(MODES)):
                mode = MODES[(turn + place) % len(MODES)]
                requests = raw_requests(targets[mode], jpegs)
                result = closed_loop(targets[mode], requests, connections=CLIENTS, seconds=seconds)
                loads[mode].append(asdict(result))
        served = {name: model[name] for name in ("name", "version", "variant", "provider", "thresholds", "modes")}
    return {"answers": answers, "images": len(images), "loads": loads, "served": served}


def table(document: dict[str, Any]) -> str:
    """The result in Markdown, medians of the loads."""
    lines = [
        f"| mode | {' | '.join(('all', *SPLITS))} | experts | M MACs | requests/s | p99 ms |",
        f"| --- |{' --- |' * (len(SPLITS) + 5)}",
    ]
    for mode, answers in document["answers"].items():
        loads = document["loads"][mode]
        accuracy = [f"{answers['accuracy'].get(split, float('nan')):.2f}" for split in ("all", *SPLITS)]
        rate, p99 = (statistics.median(load[name] for load in loads) for name in ("rate", "p99_ms"))
        cost = [f"{answers['mean_experts']:.2f}", f"{answers['mean_macs'] / 1e6:.1f}", f"{rate:,.0f}", f"{p99:.1f}"]
        lines.append(f"| {' | '.join([mode, *accuracy, *cost])} |")
    return "\n".join(lines)


def _test_set(path: Path) -> tuple[list[bytes], NDArray[np.int64]]:
    """The files of a Parquet set, and their labels."""
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(path, columns=["image", "label"])
    return columns["image"].to_pylist(), columns["label"].to_numpy().astype(np.int64)


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="[default: the one we ship]")
    parser.add_argument("--rounds", type=int, default=5, help="of loads [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the JPEGs [default: 0]")
    options = parser.parse_args()
    end_like_an_error()
    path = Path(os.environ.get("RIDE_DATA", "")) / "cifar100" / "test.parquet"
    if not path.is_file():
        raise SystemExit(f"{path} is not there; RIDE_DATA must name the folder that has cifar100/test.parquet")
    images, labels = _test_set(path)
    document = measure(
        options.bundle.resolve(), images, labels, rounds=options.rounds, seconds=options.seconds, seed=options.seed
    )
    document["measured"] = describe(options.seed)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
