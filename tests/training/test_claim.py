"""One process at a time in a directory."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.__main__ import main
from training.claim import ClaimedError, claimed

HOLD = """
import os, sys, time
from pathlib import Path
from training.claim import claimed
with claimed(Path(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held_elsewhere(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work in a directory, and a worker of its own, whose number it prints."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        yield holder
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_killed_process_gives_its_directory_back_while_its_workers_still_end(tmp_path):
    """Those that decode images notice after seconds; --resume need not wait for them."""
    with held_elsewhere(tmp_path) as holder:
        with pytest.raises(ClaimedError, match="another process is at work there"), claimed(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with claimed(tmp_path):
            pass


def test_a_training_keeps_out_of_another_ones_directory(tiny_arguments, tmp_path, capsys):
    """Their checkpoints and log lines would mix."""
    with held_elsewhere(tmp_path):
        assert main([*tiny_arguments, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: another process is at work there" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
