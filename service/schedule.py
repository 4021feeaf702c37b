"""
Which images run next: fresh ones, or those that are between two experts.

Finishing one batch before the next begins answers soonest. But the later experts see fewer and fewer images, and a
device that takes as long for 4 images as for 64 is then mostly idle: survivors of one batch had better wait for those
of the next and run together with them. Waiting costs each of them the time T that the fresh batch needs to come as
far; running together saves the device the time

    S = t(a) + t(b) - t(a + b)      of `a` survivors and of the `b` that the fresh batch is expected to leave,

by which everyone behind is answered earlier. So survivors let a fresh batch go first where

    S * (images that wait) > T * a

that is, where it lowers the mean latency. They let only one batch pass, so that nobody waits for ever. All times are
measured when the service warms up. On a processor t grows in step with the number of images, S is next to nothing,
and survivors never wait; on a GPU they do as soon as there is a queue.
"""

from collections.abc import Mapping, Sequence

import numpy as np


class Profile:
    """
    Seconds of each stage for each number of images: of trunk, expert 0, expert 1, ..., router included.

    Attributes:
        measured: stage -> batch size -> seconds.
    """

    def __init__(self, seconds: Mapping[str, Mapping[int, float]]) -> None:
        """
        Args:
            seconds: stage ("trunk", "expert_0", ...) -> batch size -> seconds.
        """
        self.measured = seconds
        self._points = {
            stage: (np.array(sorted(sizes), float), np.array([sizes[size] for size in sorted(sizes)]))
            for stage, sizes in seconds.items()
        }

    def seconds(self, stage: str, images: float) -> float:
        """Of a batch of this size, at most the largest that was measured: measured, or between two; 0 for none."""
        if images <= 0:
            return 0.0
        return float(np.interp(images, *self._points[stage]))

    def longest_step(self, images: int) -> float:
        """Seconds of the longest step that a batch of this size can take: trunk and first expert, or a later expert."""
        first, *later = [self.seconds(stage, images) for stage in self._points if stage != "trunk"]
        return max(self.seconds("trunk", images) + first, *later, 0.0)


class Schedule:
    """
    The policy, for one cascade.

    Attributes:
        max_batch: images in a batch.
        merges: whether survivors of different batches may run together.
    """

    def __init__(
        self, max_batch: int, *, merges: bool = False, profile: Profile | None = None, reach: Sequence[float] = ()
    ) -> None:
        """
        Args:
            profile: needed where `merges`.
            reach: share of the images that reach expert 0, 1, ..., as calibration expects it; needed where `merges`.
        """
        self.max_batch = max_batch
        self.merges = merges
        self._profile = profile
        self._reach = reach

    def fresh_first(self, expert: int, survivors: int, waiting: int) -> int:
        """How many of the `waiting` fresh images go before the `survivors`, which wait for `expert`; 0: none."""
        fresh = min(waiting, self.max_batch)
        if not self.merges or not fresh or survivors >= self.max_batch:
            return 0
        assert self._profile is not None
        stage = f"expert_{expert}"
        company = min(self._reach[expert] * fresh, self.max_batch - survivors)
        saved = (
            self._profile.seconds(stage, survivors)
            + self._profile.seconds(stage, company)
            - self._profile.seconds(stage, survivors + company)
        )
        delay = self._profile.seconds("trunk", fresh) + sum(
            self._profile.seconds(f"expert_{earlier}", self._reach[earlier] * fresh) for earlier in range(expert)
        )
        return fresh if saved * waiting > delay * survivors else 0
