"""ride-profile: how long each graph takes, before anything is served."""

import time

import pytest

from model_export.bundle import read_bundle
from service import shares
from service.engine import EngineError, OnnxEngine, open_engine
from service.profile import main
from service.settings import Settings
from service.warm_up import measure_profile, warm_up
from tests.service.conftest import WatchedEngine

pytestmark = pytest.mark.usefixtures("_logging_restored")


def test_every_graph_is_timed_at_every_batch_size(tiny_bundle, capsys):
    """Milliseconds, a row for each power of two up to the largest batch, under what runs them."""
    assert main(["--bundle", str(tiny_bundle), "--variant", "fp32", "--max-batch", "6", "--workers", "1"]) == 0
    title, _, head, _, *rows = capsys.readouterr().out.splitlines()

    assert "variant fp32, provider cpu" in title
    assert head == "| images | trunk | expert_0 | expert_1 | expert_2 |"
    table = [[float(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in table] == [1, 2, 4, 6]
    assert all(0 < time < 1000 for row in table for time in row[1:])


def test_the_warm_up_spares_requests_what_is_slow_at_first(tiny_bundle):
    """It also runs a batch of which half stops early; first runs are no measure of a graph's time."""

    class Cold(WatchedEngine):
        def trunk(self, images):
            if ("trunk", len(images)) not in self.runs:
                time.sleep(0.2)
            return super().trunk(images)

    bundle = read_bundle(tiny_bundle)
    engine = Cold(open_engine(bundle, None, provider="cpu", threads=1))
    profile = measure_profile(engine, bundle.manifest, "router", 6, on_gpu=False)

    assert ("expert_1", 3) in engine.runs
    assert profile.longest_step(6) < 0.2


@pytest.mark.parametrize(
    ("precision", "given", "largest"), [("fp32", None, 16), ("int8", None, 24), ("int8", 5, 5), ("fp32", 40, 40)]
)
def test_batches_are_as_large_as_the_precision_gains_by(make_bundle, precision, given, largest):
    """Unless a size is given."""
    bundle = read_bundle(make_bundle(losses={"fp32": 0.0, "int8": 0.0}))
    engine = open_engine(bundle, precision, provider="cpu", threads=1)
    warm = warm_up(engine, bundle.manifest, Settings(max_batch=given), "router")

    assert warm.max_batch == max(warm.profile.measured["trunk"]) == largest


def test_the_warm_up_joins_survivors_of_two_batches(tiny_bundle):
    """They meet on a GPU, where that fails as a batch may."""

    class Joining(WatchedEngine):
        def join(self, features):
            joined.append([len(one) for one in features])
            return super().join(features)

    bundle, joined = read_bundle(tiny_bundle), []
    engine = Joining(open_engine(bundle, None, provider="cpu", threads=1))
    measure_profile(engine, bundle.manifest, "router", 6, on_gpu=False)
    assert joined == [[3, 3]]

    engine.join = lambda features: 1 / 0
    with pytest.raises(EngineError, match="a batch of 6 images fails on cpu: division by zero"):
        measure_profile(engine, bundle.manifest, "router", 6, on_gpu=False)


@pytest.mark.parametrize(("shared_engine", "threads"), [("on", 4), ("off", 2)])
def test_the_threads_are_those_of_the_process_that_would_run_the_graphs(
    tiny_bundle, capsys, monkeypatch, shared_engine, threads
):
    """Of two workers on four cores each has two; an engine that they share has all four."""
    monkeypatch.setattr(shares, "available_cores", lambda: 4)
    options = ["--max-batch", "1", "--workers", "2", "--shared-engine", shared_engine]

    assert main(["--bundle", str(tiny_bundle), *options]) == 0
    assert f"provider cpu, threads {threads};" in capsys.readouterr().out


def test_want_of_memory_is_said_in_a_line(tiny_bundle, capsys, monkeypatch):
    """Behind the stack trace, with the size of the batch and what may help; misspelt variables before."""
    whole = OnnxEngine._run

    def short_of_memory(self, graph, inputs, outputs):
        if len(next(iter(inputs.values()))) > 4:
            raise RuntimeError("CUDA failure 2: out of memory")
        return whole(self, graph, inputs, outputs)

    monkeypatch.setattr(OnnxEngine, "_run", short_of_memory)
    monkeypatch.setenv("RIDE_MAX_BATHC", "4")
    assert main(["--bundle", str(tiny_bundle), "--threads", "1"]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "is RIDE_MAX_BATCH meant?" in first
    assert last.startswith("ride-profile: a batch of 8 images fails on cpu: CUDA failure 2: out of memory; ")
    assert last.endswith("lower RIDE_MAX_BATCH")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--provider", "cuda"], 1, "ride-profile: RIDE_PROVIDER is cuda, this onnxruntime"),
        (["--bundle", "nowhere"], 2, "ride-profile: nowhere"),
        (["--max-batch", "0"], 2, "ride-profile: RIDE_MAX_BATCH (--max-batch) is '0'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options, code, message, tiny_bundle, capsys):
    """With the exit code of whose mistake it is."""
    assert main(["--bundle", str(tiny_bundle), *options]) == code
    assert capsys.readouterr().err.startswith(message)
