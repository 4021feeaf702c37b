"""The comparison of training steps: that each contestant can take one."""

import math

import pytest

from benchmarks.training_speed import Turns, contestant


@pytest.mark.parametrize(("precision", "plain"), [("fp32", True), ("fp32", False), ("bf16", False)])
def test_a_contestant_trains(precision, plain):
    """Not compiled, which would take a minute."""
    turns = Turns(*contestant(precision, compiled=False, plain=plain))

    assert 0 < turns.images_per_second(1) < math.inf
