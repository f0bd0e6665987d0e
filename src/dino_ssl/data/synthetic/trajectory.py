"""How a thing of a drawn film goes through the picture."""

import math
from typing import NamedTuple

import numpy as np

from dino_ssl.data.synthetic.painting import Pose


class Trajectory(NamedTuple):
    """A smooth way through the picture: a slow ellipse, a swing, a breath."""

    middle: Pose
    swing: tuple[float, float, float, float]  # how far x, y, the turn and the size go
    phase: tuple[float, float, float, float]

    @staticmethod
    def drawn(rng: np.random.Generator, size: float, turn: float) -> "Trajectory":
        x, y = rng.uniform(-0.1, 0.1, 2)
        half = math.radians(turn) / 2
        middle = Pose(float(x), float(y), float(rng.uniform(-half, half)), size)
        swing = (
            *rng.uniform(0.12, 0.22, 2).tolist(),
            float(rng.uniform(0.3, 1) * half),
            float(rng.uniform(0.05, 0.15) * size),
        )
        return Trajectory(middle, swing, tuple(rng.uniform(0, 2 * np.pi, 4).tolist()))

    def at(self, time: float) -> Pose:
        """The pose at a time from -0.5 to 0.5: two thirds of a round."""
        return Pose(*(
            m + s * math.sin(p + time * 4 * math.pi / 3)
            for m, s, p in zip(self.middle, self.swing, self.phase, strict=True)
        ))  # fmt: skip
