"""
From a run's JSON to a page in Markdown and a plot: the aims beside what was measured, then every figure.

    python -m benchmarks.report results/full.json             # writes full.md and full.png beside it
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.contestants.catalogue import CONTESTANTS
from benchmarks.images import LARGE, SMALL
from benchmarks.load import CONCURRENCIES

FP32: Final = "all experts, fp32, CPU provider"
ROUTED_FP32: Final = "routed, fp32, CPU provider"
MB: Final = 250
THEIRS: Final = [contestant.title for contestant in CONTESTANTS]


@dataclass(frozen=True)
class Aim:
    """A line of the aims' table."""

    measure: str
    aim: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Spread:
    """A figure's median over the rounds, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 2
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


class Figures:
    """Looks things up in a run's document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def row(
        self, system: str, name: str, *, size: str = SMALL, clients: int = 64, encoding: str | None = None
    ) -> Spread:
        """A figure of a system under a closed loop."""
        return _spread(
            row[name] if row[name] is not None else float("inf")
            for row in self.document["rows"]
            if (row["system"], row["size"], row["connections"]) == (system, size, clients)
            and row["encoding"] == (encoding or ("its own" if system in THEIRS else "raw"))
        )

    def has(self, system: str, **where: Any) -> bool:
        """Whether it was measured."""
        try:
            self.row(system, "rate", **where)
        except statistics.StatisticsError:
            return False
        return True

    def floor(self, name: str, *, size: str = SMALL, routed: bool = True, variant: str | None = None) -> Spread:
        """A figure of the bare loop, of the variant that the service takes by itself where no other is named."""
        where = (size, routed, variant or self.document["measured"]["served"]["variant"])
        return _spread(
            floor[name]
            for floor in self.document["floors"]
            if (floor["loop"]["size"], floor["loop"]["routed"], floor["loop"]["variant"]) == where
        )

    def theirs(self, name: str, best: Callable[..., str], **where: Any) -> str | None:
        """The contestant whose figure is the best, by `max` or `min`; None where none took part."""
        present = [title for title in THEIRS if self.has(title, **where)]
        return best(present, key=lambda title: self.row(title, name, **where).median) if present else None


def aims(figures: Figures) -> list[Aim]:
    """Every line of the aims, in their order."""
    document = figures.document
    routed, everything = figures.row("routed", "rate"), figures.row("all experts", "rate")
    floor = figures.floor("rate")
    lines = [
        _ratio("routed over HTTP (raw, 64 clients, 32x32) against the better bare loop", routed, floor, 0.85),
        _ratio(
            "the same in fp32", figures.row(ROUTED_FP32, "rate"),
            figures.floor("rate", variant="fp32"), 0.85,
        ),
        *_against_contestants(figures, routed),
        _ratio(
            "640x480, 64 clients, against its better bare loop (scaled decoding in both)",
            figures.row("routed", "rate", size=LARGE), figures.floor("rate", size=LARGE), 0.85,
        ),
    ]  # fmt: skip
    alone, one_image = figures.row("routed", "p50_ms", clients=1).median, figures.floor("one_image_ms").median
    lines.append(
        Aim(
            "p50 at concurrency 1 above decode + graph time", "at most 0.5 ms",
            f"{alone - one_image:.2f} ms: {alone:.2f} - {one_image:.2f}", alone - one_image <= 0.5,
        )
    )  # fmt: skip
    macs = figures.floor("mean_macs", routed=False).median / figures.floor("mean_macs").median
    gain = routed.median / everything.median
    lines.append(
        Aim(
            "routing saves: throughput routed / all experts, as a share of the ratio of MACs", "at least 0.9",
            f"{gain / macs:.2f}: {gain:.2f} of {macs:.2f}", gain / macs >= 0.9,
        )
    )  # fmt: skip
    footprint, sigterm, burst = document["footprint"], document["sigterm"], document["burst"]
    resident = max(process["rss_mb"] for process in footprint["processes"])
    before, after = burst["before"]["p50_ms"], burst["after"]["p50_ms"]
    return [
        *lines,
        Aim("memory per worker, resident, after a load", f"below {MB} MB", f"{resident:.0f} MB", resident < MB),
        _below("start-up to ready", footprint["median_start_s"], 3, "s"),
        _below("idle CPU", footprint["idle_cores"], 0.01, "core"),
        Aim(
            "SIGTERM under load", "no accepted request lost, no process left, status 0",
            f"{sigterm['lost']} of {sum(sigterm['before'].values())} lost, {sigterm['processes_left']} left, "
            f"status {sigterm['exit_status']}; sent after it: {_outcomes(sigterm['after'])}",
            (sigterm["lost"], sigterm["processes_left"], sigterm["exit_status"]) == (0, 0, 0),
        ),
        Aim(
            "p50 at concurrency 1 after a burst of 64 clients", "as before it, within 10 %",
            f"{after:.2f} ms after, {before:.2f} ms before", after <= 1.1 * before,
        ),
    ]  # fmt: skip


def _against_contestants(figures: Figures, routed: Spread) -> list[Aim]:
    best = figures.theirs("rate", max)
    if best is None:
        return [Aim("against the contestants", "faster", "no contestant could take part", False)]
    rate = figures.row(best, "rate")
    lines = [
        _ratio(f"routed against the best contestant with all experts ({best})", routed, rate, 4),
        _ratio(f"all experts, fp32, CPU provider, against the best contestant ({best})", figures.row(FP32, "rate"),
               rate, 1.2),
    ]  # fmt: skip
    p99s = [
        (figures.row("routed", "p99_ms", clients=clients).median,
         min(figures.row(title, "p99_ms", clients=clients).median for title in THEIRS
             if figures.has(title, clients=clients)))
        for clients in CONCURRENCIES
    ]  # fmt: skip
    pairs = "; ".join(f"{our:.1f} against {their:.1f} ms" for our, their in p99s)
    p99 = Aim(
        "p99 of routed at 1, 8 and 64 clients, against the contestant whose p99 is lowest", "lower at each", pairs,
        all(our < their for our, their in p99s),
    )  # fmt: skip
    return [lines[0], p99, lines[1]]


def _ratio(measure: str, ours: Spread, theirs: Spread, aim: float) -> Aim:
    ratio = ours.median / theirs.median
    return Aim(measure, f"at least {aim:g}", f"{ratio:.2f}: {ours.median:,.0f} / {theirs.median:,.0f}", ratio >= aim)


def _below(measure: str, value: float, aim: float, unit: str) -> Aim:
    return Aim(measure, f"below {aim:g} {unit}", f"{value:.3g} {unit}", value < aim)


def _spread(values: Iterable[float]) -> Spread:
    """Raises statistics.StatisticsError where nothing was measured."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


def write_report(document: dict[str, Any], directory: Path, name: str) -> str:
    """Write NAME.md and NAME.png; the page."""
    figures = Figures(document)
    plot(figures, directory / f"{name}.png")
    page = "\n\n".join(
        [
            f"# Serving, {name} run",
            _circumstances(document["measured"]),
            _table(
                ("measure", "aim", "measured", ""),
                [(aim.measure, aim.aim, aim.measured, "met" if aim.met else "**missed**") for aim in aims(figures)],
            ),
            f"![Throughput against latency]({name}.png)",
            "Closed loops, medians of the rounds (lowest to highest); the contestants have all experts in one graph. "
            "640x480 JPEGs are decoded scaled by all.",
            _closed_loops(figures),
            "The bare loops, images per second.",
            _floors(figures),
            "Open loops on 32x32, raw; latency counts from the moment a request was due.",
            _open_loops(document["open_loop"]),
            *[f"{title} failed: {' '.join(reason.split())[-400:]}" for title, reason in document["absent"].items()],
        ]
    )
    (directory / f"{name}.md").write_text(page + "\n")
    return page


def _circumstances(measured: dict[str, Any]) -> str:
    settings = "; ".join(f"{title}: {setting}" for title, setting in measured["settings"].items())
    versions = ", ".join(f"{package} {version}" for package, version in measured["versions"].items())
    theirs = "; ".join(f"{title}: {' '.join(packages)}" for title, packages in measured["requirements"].items())
    uncommitted = " with uncommitted changes" if measured["uncommitted"] else ""
    return "\n".join([
        f"- `{measured['command']}`, commit {measured['commit']}{uncommitted}, seed {measured['seed']}, "
        f"{measured['date']}, {measured['minutes']:g} minutes, {measured['plan']['rounds']} rounds of "
        f"{measured['plan']['load_s']:g} s loads",
        f"- {measured['cores']} cores of {measured['cpu']} ({' '.join(measured['cpu_flags'])}), {measured['system']}, "
        f"Python {measured['python']}",
        f"- {measured['model']}, served as {measured['served']['variant']} on {measured['served']['provider']}; "
        f"{measured['images']}, JPEG, decoded with {measured['decoder']} by everybody",
        f"- {versions}",
        f"- contestants' settings: {settings}",
        f"- contestants' versions: {theirs}",
    ])  # fmt: skip


def _closed_loops(figures: Figures) -> str:
    keys = dict.fromkeys(
        (row["system"], row["size"], row["encoding"], row["connections"]) for row in figures.document["rows"]
    )
    lines = []
    for system, size, encoding, clients in sorted(keys, key=lambda key: (key[1], key[3], key[0], key[2])):
        where = {"size": size, "clients": clients, "encoding": encoding}
        rows = [
            row for row in figures.document["rows"]
            if (row["system"], row["size"], row["encoding"], row["connections"]) == (system, size, encoding, clients)
        ]  # fmt: skip
        errors = sum(count for row in rows for outcome, count in row["outcomes"].items() if outcome != "200")
        generator = statistics.median(row["generator_cpu_s"] / row["seconds"] for row in rows)
        latencies = [f"{figures.row(system, name, **where).median:.2f}" for name in ("p50_ms", "p99_ms")]
        rate = str(figures.row(system, "rate", **where))
        lines.append((size, str(clients), system, encoding, rate, *latencies, str(errors), f"{generator:.2f}"))
    heads = ("JPEGs", "clients", "system", "body", "requests/s", "p50 ms", "p99 ms", "errors", "generator's cores")
    return _table(heads, lines)


def _floors(figures: Figures) -> str:
    lines = []
    loops = [floor["loop"] for floor in figures.document["floors"]]
    for variant, size, routed in dict.fromkeys((loop["variant"], loop["size"], loop["routed"]) for loop in loops):
        where = {"size": size, "routed": routed, "variant": variant}
        found = [figures.floor(name, **where) for name in ("one_process", "process_per_core")]
        alone, experts = (figures.floor(name, **where).median for name in ("one_image_ms", "mean_experts"))
        lines.append((variant, size, "routed" if routed else "all", *map(str, found), f"{alone:.2f}", f"{experts:.2f}"))
    return _table(
        (
            "variant",
            "JPEGs",
            "experts",
            "one process, a thread per core",
            "a process per core",
            "one image ms",
            "mean experts",
        ),
        lines,
    )


def _open_loops(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ("share of saturation", "asked/s", "answered/s", "answers",
         "p50 ms", "p90 ms", "p99 ms", "max ms", "sent late p99 ms"),
        [
            (f"{row['share']:.0%}", f"{row['asked_rate']:.0f}", f"{row['rate']:.0f}", _outcomes(row["outcomes"]),
             *(f"{row[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms", "late_p99_ms")))
            for row in rows
        ],
    )  # fmt: skip


def _outcomes(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {outcome}" for outcome, count in sorted(counts.items())) or "none"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(figures: Figures, path: Path) -> None:
    """Throughput against latency: a point for each number of clients, and the open loops."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (closed, open_) = pyplot.subplots(1, 2, figsize=(11, 5), width_ratios=(3, 2))
    for system in ("routed", "all experts", FP32, *THEIRS):
        if not figures.has(system):
            continue
        points = [
            (figures.row(system, "rate", clients=clients).median, figures.row(system, "p50_ms", clients=clients).median)
            for clients in CONCURRENCIES
        ]
        closed.plot(*zip(*points, strict=True), marker="o", markersize=4, label=system,
                    linestyle="--" if system in THEIRS else "-")  # fmt: skip
    closed.axvline(figures.floor("rate").median, color="grey", linewidth=1)
    closed.annotate("bare loop, routed", (figures.floor("rate").median, 1), rotation=90, fontsize=7, ha="right")
    closed.set(yscale="log", xlabel="requests/s", ylabel="p50, ms", title="1, 8 and 64 clients, 32x32")
    closed.set_xlim(left=0)
    closed.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    rows = figures.document["open_loop"]
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        open_.plot(
            [row["asked_rate"] for row in rows], [row[name] for row in rows], marker="o", markersize=4, label=name
        )
    open_.set(yscale="log", xlabel="requests/s asked for", ylabel="ms since due", title="routed, Poisson arrivals")
    open_.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Write the page and the plot of a run anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON that a run wrote")
    path = parser.parse_args().results
    print(write_report(json.loads(path.read_text()), path.parent, path.stem))


if __name__ == "__main__":
    main()
