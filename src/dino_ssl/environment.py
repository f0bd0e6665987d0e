"""What must stand in the environment before torch is loaded. The command line calls it first; it imports nothing."""

import os

QUIET = 0.5
"""Of the processors: where others use no more of them, threads that wait may spin."""


def prepare() -> None:
    """Threads that wait for each other sleep where others use the machine, unless somebody chose otherwise.

    A spinning thread goes on at once, and holds a core meanwhile that somebody else may need, or the very thread it
    waits for. Measured on two cores: with nobody else, `small` and the process that crops for it get 100 pictures/s
    with OpenMP's default, which spins, and 75 with threads that sleep; beside one busy process 40 and 70; with a load
    of seven a step of a small ViT took 6 to 13 s and 2.1 s.
    """
    if "GOMP_SPINCOUNT" not in os.environ and used_by_others() > QUIET:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def used_by_others() -> float:
    """Processes that wanted a processor in the last minute, for each that there is; all where nobody says."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 1.0
