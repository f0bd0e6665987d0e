"""Motion of an object in a synthetic video."""

import math
from typing import NamedTuple

import numpy as np

from dino_ssl.data.synthetic.painting import Pose


class Trajectory(NamedTuple):
    """Smooth path: sinusoidal change of position, rotation and size around a central pose."""

    center: Pose
    amplitude: tuple[float, float, float, float]
    phase: tuple[float, float, float, float]

    @staticmethod
    def sample(rng: np.random.Generator, size: float, rotation: float) -> "Trajectory":
        """Return a random path of an object of this mean size, rotated by at most `rotation` / 2 degrees."""
        x, y = rng.uniform(-0.1, 0.1, 2)
        half = math.radians(rotation) / 2
        center = Pose(float(x), float(y), float(rng.uniform(-half, half)), size)
        swing = rng.uniform(0.12, 0.22, 2).tolist()
        amplitude = (*swing, float(rng.uniform(0.3, 1) * half), float(rng.uniform(0.05, 0.15) * size))
        return Trajectory(center, amplitude, tuple(rng.uniform(0, 2 * np.pi, 4).tolist()))

    def at(self, time: float) -> Pose:
        """Return the pose at a time from -0.5 to 0.5, which covers two thirds of a period."""
        terms = zip(self.center, self.amplitude, self.phase, strict=True)
        return Pose(*(c + a * math.sin(p + time * 4 * math.pi / 3) for c, a, p in terms))
