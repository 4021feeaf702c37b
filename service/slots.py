"""Images in memory that the processes of one service share, so that none of them is ever sent."""

import math
import mmap

import numpy as np
from numpy.typing import NDArray


class Slots:
    """
    Places for images, so many for each front; made before the fork, which hands them on.

    Only the front writes into its slots, and only into one that the engine has answered. Memory is taken when a slot is
    first used.

    Attributes:
        pixels: (F, S, H, W, 3), uint8: F fronts, S slots each.
        per_front: S.
    """

    def __init__(self, fronts: int, per_front: int, height: int, width: int) -> None:
        shape = (fronts, per_front, height, width, 3)
        self.per_front = per_front
        self.pixels: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
