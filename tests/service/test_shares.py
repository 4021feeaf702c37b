"""How many workers there are, and what each of them gets."""

import sys

import pytest

from service.cores import CUDA_LIBRARY, has_cuda
from service.settings import Settings, SettingsError
from service.shares import choose_shared_engine, choose_workers, engine_share_of, share_of


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many cores, and with a GPU or without."""

    def make(cores, cuda):
        monkeypatch.setattr("service.shares.available_cores", lambda: cores)
        monkeypatch.setattr("service.shares.has_cuda", lambda: cuda)

    return make


@pytest.mark.parametrize(
    ("given", "cores", "cuda", "workers"),
    [
        ({}, 8, False, 8),
        ({}, 16, True, 15),
        ({}, 4, True, 3),
        ({}, 3, True, 1),
        ({}, 1, True, 1),
        ({"provider": "cpu"}, 8, True, 8),
        ({"provider": "cuda"}, 8, False, 7),
        ({"provider": "tensorrt"}, 2, False, 1),
        ({"provider": "openvino"}, 8, True, 8),
        ({"workers": 3}, 8, True, 3),
        ({"workers": 9}, 2, False, 9),
    ],
)
def test_there_is_a_worker_for_each_core_that_no_gpu_is_fed_by(machine, given, cores, cuda, workers):
    """Or one alone, where few cores feed a GPU; unless the settings say how many."""
    machine(cores, cuda)

    assert choose_workers(Settings(**given)) == workers


@pytest.mark.parametrize(
    ("given", "workers", "threads", "queue", "inflight"),
    [
        ({}, 1, 8, 256, 512 * 2**20),
        ({}, 2, 4, 128, 256 * 2**20),
        ({}, 3, 2, 128, -(-512 * 2**20 // 3)),
        ({"max_queue": 256}, 3, 2, 86, -(-512 * 2**20 // 3)),
        ({}, 8, 1, 128, 64 * 2**20),
        ({"max_queue": 512}, 8, 1, 64, 64 * 2**20),  # the largest request just fits
        ({}, 32, 1, 128, 32 * 2**20),
        ({"threads": 5, "max_queue": 800}, 8, 5, 100, 64 * 2**20),
    ],
)
def test_limits_are_divided_among_the_workers(machine, given, workers, threads, queue, inflight):
    """Rounded up; where nobody set them, at least what the largest request needs, of the queue twice that."""
    machine(8, cuda=False)
    share = share_of(Settings(**given), workers)

    assert (share.threads, share.max_queue, share.max_inflight_bytes) == (threads, queue, inflight)


def test_a_limit_that_cannot_be_divided_is_refused():
    """With what would do, where somebody set it."""
    with pytest.raises(SettingsError) as refusal:
        share_of(Settings(max_queue=256), 8)
    assert str(refusal.value) == (
        "RIDE_MAX_QUEUE is 256, 32 for each of 8 workers, RIDE_MAX_IMAGES is 64: a request that large would never be "
        "let in; raise the first, lower the second, or set RIDE_WORKERS to fewer"
    )


@pytest.mark.parametrize(
    ("given", "workers", "cuda", "shared"),
    [
        ({}, 8, True, True),
        ({}, 1, True, False),
        ({}, 8, False, False),
        ({"provider": "cpu"}, 8, True, False),
        ({"shared_engine": "on"}, 1, False, True),
        ({"shared_engine": "off"}, 8, True, False),
    ],
)
def test_workers_on_a_gpu_share_its_engine(machine, given, workers, cuda, shared):
    """Unless the settings say otherwise; there is nothing to share for one."""
    machine(8, cuda)

    assert choose_shared_engine(Settings(**given), workers) == shared


def test_a_shared_engine_has_all_cores_and_leaves_the_limits_to_the_workers(machine):
    """It never refuses what they let in."""
    machine(8, cuda=False)

    assert engine_share_of(Settings()).threads == 8
    assert engine_share_of(Settings(threads=3)).threads == 3
    assert engine_share_of(Settings()).max_queue == sys.maxsize


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], False),
        (["dev/nvidiactl"], False),
        ([f"runtime/capi/{CUDA_LIBRARY}"], False),
        (["dev/nvidiactl", f"runtime/capi/{CUDA_LIBRARY}"], True),
        (["dev/dxg", f"runtime/capi/{CUDA_LIBRARY}"], True),
    ],
)
def test_a_gpu_counts_where_it_is_seen_and_onnxruntime_is_made_for_it(tmp_path, monkeypatch, files, found):
    """Without opening either."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    runtime = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "runtime")]})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: runtime)

    assert has_cuda(tmp_path) == found
