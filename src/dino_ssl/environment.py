"""Environment variables that must be set before torch is imported. Imports nothing of the package."""

import os

IDLE_LOAD = 0.5
"""Load per core up to which OpenMP threads may spin while they wait."""


def prepare() -> None:
    """Set how OpenMP threads wait, and silence internal messages of torch.profiler, unless the user set them.

    Waiting threads sleep if other processes use the machine. A spinning thread continues without delay but occupies a
    core. Measured on two cores: on an idle machine `small` (then with crops of 64 and 32 px) and its worker reach 100
    images/s with spinning threads (OpenMP's default) and 75 with sleeping ones; next to one busy process 40 and 70; at
    a load of seven a step of a small ViT takes 6 to 13 s and 2.1 s.
    """
    try:
        load_per_core = os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):  # not known on this system
        load_per_core = 1.0
    if "GOMP_SPINCOUNT" not in os.environ and load_per_core > IDLE_LOAD:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
