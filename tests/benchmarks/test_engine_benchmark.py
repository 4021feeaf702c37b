"""The benchmark of the engine by itself: what it runs, and as what it counts it."""

import dataclasses

import numpy as np
import pytest

from benchmarks import engine as benchmark
from benchmarks.engine import beyond_tolerance, measure_engine, random_bundle, table
from model_export.bundle import read_bundle

REACH = [1.0, 0.7, 0.3]


@pytest.fixture
def measure(tiny_bundle):
    """measure(**options): a short measurement of the tiny bundle on the CPU."""

    def run(**options):
        return measure_engine(
            read_bundle(tiny_bundle), provider="cpu", variant=None, threads=1, batches=(1, 8), seconds=0.01, seed=0,
            **options,
        )  # fmt: skip

    return run


def test_every_figure_is_of_what_the_thresholds_let_run(measure):
    """The bound is made of the stages' best times, as often as each runs."""
    result = measure(like=REACH)

    assert result.mean_experts == pytest.approx(sum(REACH), abs=0.02)
    assert set(result.stages) == {"trunk", "expert_0", "expert_1", "expert_2"}
    best = [min(times.values()) for times in result.stages.values()]
    assert 1e6 / result.bound == pytest.approx(np.dot([1, *REACH], best), rel=0.02)
    assert all(list(rates) == [1, 8] for rates in (result.routed, result.merged, result.all_experts))
    assert all(rate > 0 for rates in (result.routed, result.merged, result.all_experts) for rate in rates.values())
    assert result.agreement["same_first_class"] == result.agreement["same_experts_used"] == 1
    assert result.agreement["largest_difference"] < 1e-5


@pytest.mark.parametrize(
    ("change", "told"),
    [({}, None), ({"largest_difference": 2e-3}, "largest_difference 2.0e-03, at most 0.001"),
     ({"largest_difference": float("nan")}, "largest_difference nan"),
     ({"same_first_class": 0.98}, "same_first_class 0.980, at least 0.99"),
     ({"same_experts_used": 0.5}, "same_experts_used 0.500")],
)  # fmt: skip
def test_answers_that_are_not_the_cpus_fail_the_command(measure, change, told):
    """In fp32; of int8 the parity of its export speaks."""
    result = measure(like=REACH)
    other = dataclasses.replace(result, provider="cuda", agreement=result.agreement | change)

    failure = beyond_tolerance(other)
    assert failure is None if told is None else f"fp32 on cuda is not what fp32 is on the CPU: {told}" in failure
    assert beyond_tolerance(dataclasses.replace(other, variant="int8")) is None


def test_an_expert_that_no_image_reaches_is_not_measured(measure):
    """Nor can survivors meet for it."""
    result = measure(like=[1.0, 0.5, 0.0])

    assert set(result.stages) == {"trunk", "expert_0", "expert_1"}
    assert not result.merged
    assert table(result).count("–") == 2


def test_an_untrained_network_becomes_a_bundle(tmp_path, monkeypatch):
    """Of any recipe, with the network's true size; its routers are there."""
    monkeypatch.setattr(benchmark, "RANDOM_CLASSES", 6)
    bundle = read_bundle(random_bundle("ride-2-cifar100", tmp_path, seed=0))

    assert (bundle.manifest.n_experts, len(bundle.manifest.classes)) == (2, 6)
    assert bundle.manifest.macs.trunk == pytest.approx(24.3e6, rel=0.02)
    assert set(bundle.manifest.variants) == {"fp32", "fp16"}
    assert len(bundle.manifest.variants["fp32"].routers) == 1
