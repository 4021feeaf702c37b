"""
Installs the contestants, starts them, checks their answers and loads them.

    python -m benchmarks.contestants.run                      # all, with the settings that were best
    python -m benchmarks.contestants.run --tune litserve      # tries the settings again, and keeps the best

Each has an environment of its own under benchmarks/.venvs. Decoding is the service's own decoder, scaled. Before a
contestant is loaded, its first class for 100 images, asked for by 8 clients at once, must be what onnxruntime says.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import onnx

from benchmarks.contestants.catalogue import CONTESTANTS, CORES, FOLDER, Contestant, Setting
from benchmarks.contestants.merge import merge
from benchmarks.contestants.model import Model
from benchmarks.images import SIZES, SMALL, make_images
from benchmarks.load import CONCURRENCIES, LoadResult, closed_loop, fetch
from benchmarks.machine import ROOT, describe
from benchmarks.messages import Target, ask
from benchmarks.processes import Server, StartError, end_like_an_error, free_port
from model_export.bundle import read_bundle
from service.cores import available_cores
from service.settings import DEFAULT_BUNDLE

TUNED: Final = FOLDER / "tuned.json"
CHECKED: Final = 100
CHECK_CONNECTIONS: Final = 8
CHECK_S: Final = 1.0


class ContestantError(RuntimeError):
    """A contestant cannot take part; says why."""


def install(contestant: Contestant) -> None:
    """
    Make or refresh a contestant's environment.

    Raises:
        ContestantError: with pip's last line.
    """
    venv = contestant.python.parent.parent
    wanted = (contestant.folder / "requirements.txt").read_text()
    installed = venv / "installed.txt"
    if installed.is_file() and installed.read_text() == wanted:
        return
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(venv)],
        [str(contestant.python), "-m", "pip", "install", "-q", "-r", str(contestant.folder / "requirements.txt")],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ContestantError(f"cannot be installed: {(result.stderr or result.stdout).strip()[-300:]}")
    installed.write_text(wanted)


@contextmanager
def running(contestant: Contestant, setting: Setting, graph: Path) -> Iterator[Target]:
    """
    Started, its answers checked; stopped with all its children when the block is left.

    Raises:
        ContestantError: where it does not start, or answers otherwise than onnxruntime.
    """
    port = free_port()
    target = Target("127.0.0.1", port, contestant.path)
    jpegs = {size: make_images(size).jpegs[:CHECKED] for size in SIZES}
    requests = {size: contestant.requests(target, files) for size, files in jpegs.items()}

    def answers() -> bool:
        try:
            return ask(target, requests[SMALL][0])[0] == 200
        except OSError:
            return False

    with Server(
        contestant.command(setting, graph, port),
        contestant.environment(setting, graph),
    ) as server:
        try:
            server.wait_until(answers)
        except StartError as error:
            raise ContestantError(str(error)) from error
        for size, files in jpegs.items():
            check(contestant.labels, target, requests[size], first_labels(graph, files))
        yield target


def first_labels(graph: Path, jpegs: Sequence[bytes]) -> list[str]:
    """What onnxruntime says, one image at a time."""
    model = Model(graph, available_cores())
    return [model.classify([jpeg])[0][0]["label"] for jpeg in jpegs]


def check(
    labels: Callable[[bytes], list[str]], target: Target, requests: Sequence[bytes], expected: Sequence[str]
) -> None:
    """
    Raise ContestantError unless every image was answered, each time as expected.

    Args:
        labels: in the body of an answer, best first.
    """
    bodies = fetch(target, requests, connections=CHECK_CONNECTIONS, seconds=CHECK_S)
    wrong = {index for index, body in bodies if labels(body)[0] != expected[index]}
    missing = set(range(len(requests))) - {index for index, _ in bodies}
    if wrong or missing:
        raise ContestantError(f"{len(wrong)} of {len(requests)} images answered wrongly, {len(missing)} not at all")


def measure(
    contestant: Contestant, target: Target, size: str, connections: int, seconds: float, seed: int = 0
) -> LoadResult:
    """Load a running contestant."""
    requests = contestant.requests(target, make_images(size, seed=seed).jpegs)
    return closed_loop(target, requests, connections=connections, seconds=seconds)


def tune(contestant: Contestant, graph: Path, seconds: float) -> dict[str, Any]:
    """Try every setting with 64 clients; all rates, and the best setting."""
    tried = []
    for setting in contestant.settings:
        row: dict[str, Any] = {"setting": asdict(setting), "rate": 0.0}
        try:
            with running(contestant, setting, graph) as target:
                row["rate"] = measure(contestant, target, SMALL, max(CONCURRENCIES), seconds).rate
        except ContestantError as error:
            row["error"] = str(error).replace(f"{ROOT}/", "")
        print(f"{contestant.title}: {setting}: {row.get('error', row['rate'])}", file=sys.stderr)
        tried.append(row)
    best = max(tried, key=lambda row: row["rate"])
    if not best["rate"]:
        raise ContestantError(f"no setting works: {best['error']}")
    return {"best": best["setting"], "tried": tried}


def note_tuned(contestant: Contestant, tuned: dict[str, Any]) -> None:
    """Remember a contestant's best setting, and all that were tried."""
    document = {"contestants": _tuned() | {contestant.name: tuned}, "measured": describe(0)}
    TUNED.write_text(json.dumps(document, indent=1) + "\n")


def best_setting(contestant: Contestant) -> Setting:
    """The one that was best when the contestant was last tuned, on as many cores; the first, if it never was."""
    tuned = _tuned()
    if contestant.name in tuned:
        return Setting(**tuned[contestant.name]["best"])
    print(f"{contestant.title} was not tuned on {CORES} cores: it runs with {contestant.settings[0]}", file=sys.stderr)
    return contestant.settings[0]


def _tuned() -> dict[str, Any]:
    """By contestant, what was noted on a machine with as many cores."""
    document = json.loads(TUNED.read_text()) if TUNED.is_file() else {"measured": {"cores": None}}
    contestants: dict[str, Any] = document["contestants"] if document["measured"]["cores"] == CORES else {}
    return contestants


@contextmanager
def merged_graph(bundle: Path, variant: str) -> Iterator[Path]:
    """The single graph of a variant, as a file for the time of the block."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"all_experts_{variant}.onnx"
        onnx.save(merge(read_bundle(bundle), variant), path)
        yield path


def main() -> None:
    """Tune if asked to, load the contestants at each concurrency, print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} [default: all]")
    parser.add_argument("--graph", type=Path, metavar="FILE", help="[default: fp32, merged from our bundle]")
    parser.add_argument("--tune", action="store_true", help="try all settings first, and note the best in tuned.json")
    parser.add_argument("--size", choices=SIZES, default=SMALL, help="of the JPEGs [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load [default: %(default)s]")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"{min(unknown)!r} is no contestant; there are {', '.join(names)}")
    end_like_an_error()
    with merged_graph(DEFAULT_BUNDLE, "fp32") as merged:
        graph = (options.graph or merged).resolve()
        results: dict[str, Any] = {}
        for contestant in CONTESTANTS:
            if options.names and contestant.name not in options.names:
                continue
            try:
                install(contestant)
                if options.tune:
                    note_tuned(contestant, tune(contestant, graph, options.seconds))
                setting = best_setting(contestant)
                with running(contestant, setting, graph) as target:
                    results[contestant.name] = {"setting": str(setting)} | {
                        str(count): asdict(measure(contestant, target, options.size, count, options.seconds))
                        for count in CONCURRENCIES
                    }
            except ContestantError as error:
                results[contestant.name] = {"error": str(error)}
    json.dump({"contestants": results, "measured": describe(0)}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
