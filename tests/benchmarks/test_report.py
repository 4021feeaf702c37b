"""The aims are judged by the figures that they name."""

import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks.report import FP32, ROUTED_FP32, Figures, aims, write_report

RESULTS = Path(benchmarks.__file__).parent / "results"


def load_row(system, rate, *, clients=64, size="32x32", p50=2.0, p99=5.0, encoding="raw"):
    """One load's result."""
    return {
        "system": system, "size": size, "encoding": encoding, "connections": clients, "rate": rate, "p50_ms": p50,
        "p99_ms": p99,
    }  # fmt: skip


def floor_row(rate, macs, *, size="32x32", routed=True, one_image=1.0, variant="int8"):
    """One bare loop's result."""
    return {
        "loop": {"size": size, "routed": routed, "variant": variant},
        "rate": rate,
        "mean_macs": macs,
        "one_image_ms": one_image,
    }


def document(**changes):
    """A run in which every aim is met: rates are medians of three rounds."""
    rows = [
        *(load_row("routed", rate, clients=clients) for rate in (100, 900, 1000) for clients in (1, 8)),
        *(load_row("routed", rate) for rate in (890, 900, 2000)),
        load_row("all experts", 700),
        load_row(FP32, 300),
        load_row(ROUTED_FP32, 360),
        load_row("routed", 450, size="640x480"),
        *(load_row("LitServe", 200, clients=clients, p99=20.0, encoding="its own") for clients in (1, 8, 64)),
        *(load_row("MLServer", 150, clients=clients, p99=6.0, encoding="its own") for clients in (1, 8, 64)),
    ]
    floors = [
        floor_row(1000, 75, one_image=1.6), floor_row(800, 100, routed=False), floor_row(500, 75, size="640x480"),
        floor_row(400, 75, variant="fp32"),
    ]  # fmt: skip
    return {
        "measured": {"served": {"variant": "int8"}},
        "rows": rows, "floors": floors,
        "burst": {"before": {"p50_ms": 2.0}, "after": {"p50_ms": 2.1}},
        "footprint": {"processes": [{"rss_mb": 120.0}, {"rss_mb": 90.0}], "median_start_s": 1.2, "idle_cores": 0.002},
        "sigterm": {
            "lost": 0, "processes_left": 0, "exit_status": 0, "before": {"200": 90}, "after": {"503": 5}
        },
    } | changes  # fmt: skip


def missed(run):
    """The aims that a run misses."""
    return [aim.measure for aim in aims(Figures(run)) if not aim.met]


def test_a_run_that_meets_every_aim_is_told_so():
    """With the figures beside it: medians, and the best contestant by name."""
    table = aims(Figures(document()))

    assert [aim for aim in table if not aim.met] == []
    shown = {aim.measure: aim.measured for aim in table}
    assert shown["routed against the best contestant with all experts (LitServe)"] == "4.50: 900 / 200"
    assert "5.0 against 6.0 ms" in shown[next(name for name in shown if name.startswith("p99 of routed"))]


@pytest.mark.parametrize(
    ("changes", "measure"),
    [
        ({"floors": [floor_row(1100, 75, one_image=1.6), *document()["floors"][1:]]}, "routed over HTTP"),
        ({"floors": [*document()["floors"][:-1], floor_row(450, 75, variant="fp32")]}, "the same in fp32"),
        ({"floors": [floor_row(1000, 75, one_image=1.4), *document()["floors"][1:]]}, "p50 at concurrency 1 above"),
        ({"floors": [floor_row(1000, 60, one_image=1.6), *document()["floors"][1:]]}, "routing saves"),
        ({"burst": {"before": {"p50_ms": 2.0}, "after": {"p50_ms": 2.3}}}, "p50 at concurrency 1 after a burst"),
        ({"footprint": document()["footprint"] | {"processes": [{"rss_mb": 251.0}]}}, "memory per worker"),
        ({"footprint": document()["footprint"] | {"idle_cores": 0.02}}, "idle CPU"),
        ({"sigterm": document()["sigterm"] | {"lost": 1}}, "SIGTERM"),
        ({"rows": [*document()["rows"], load_row("BentoML", 260, encoding="its own")]}, "routed against the best"),
    ],
)
def test_an_aim_that_is_missed_is_told_so(changes, measure):
    """The one whose figure changed, and where a contestant grew faster, the other against it as well."""
    assert missed(document(**changes))[0].startswith(measure)


def test_without_contestants_nothing_is_claimed():
    """The comparison is missed, not left out."""
    rows = [row for row in document()["rows"] if row["encoding"] != "its own"]

    assert missed(document(rows=rows)) == ["against the contestants"]


@pytest.mark.parametrize("name", ["quick", "full", "quick-same-decoder"])
def test_the_pages_are_what_the_json_beside_them_gives(name, tmp_path):
    """Every figure on these is one that was measured."""
    page = write_report(json.loads((RESULTS / f"{name}.json").read_text()), tmp_path, name)

    assert page + "\n" == (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
