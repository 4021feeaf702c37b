"""What a benchmark starts, it finds and ends, whatever it has started itself."""

import subprocess
import sys

import psutil
import pytest

from benchmarks.processes import Server, StartError, free_port

FAMILY = """
import signal, subprocess, sys, time
child = '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("child", flush=True)
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", child])
sum(range(5_000_000))
print("parent", flush=True)
time.sleep(600)
"""


def test_children_are_found_measured_and_ended():
    """Even one that does not listen to SIGTERM, and whose parent is gone by then."""
    with Server([sys.executable, "-c", FAMILY], {}) as server:
        server.wait_until(lambda: {"parent", "child"} <= set(server.log().split()))
        family = server.processes()
        assert len(family) == 2
        assert [memory.rss_mb > memory.pss_mb / 2 > 0 for memory in server.memory()] == [True, True]
        assert server.cpu_seconds() > 0
        server.terminate()
        server.wait()
        assert len(server.processes()) == 1

    assert not any(psutil.pid_exists(process.pid) and process.is_running() for process in family)


def test_a_server_that_ends_at_once_says_why():
    """The last lines that it wrote are in the error."""
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with Server(command, {}) as server, pytest.raises(StartError, match=r"status 1: no such model"):
        server.wait_until(lambda: None)


def test_ending_a_benchmark_ends_its_servers(tmp_path):
    """SIGTERM leaves no server behind."""
    code = (
        "import sys\nfrom benchmarks.processes import Server, end_like_an_error\nend_like_an_error()\n"
        "with Server([sys.executable, '-c', 'import time; time.sleep(600)'], {}) as server:\n"
        "    print(server.processes()[0].pid, flush=True)\n    server.wait()\n"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with benchmark:
        served = psutil.Process(int(benchmark.stdout.readline()))
        benchmark.terminate()
        assert benchmark.wait(30) == 128 + 15
    psutil.wait_procs([served], timeout=10)
    assert not served.is_running()


def test_a_free_port_is_free():
    """Twice, and not the same one by habit."""
    assert all(1024 < free_port() < 65536 for _ in range(2))
