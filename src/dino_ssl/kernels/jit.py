"""numba's compiler with the options of this package. Importing this module raises ImportError without numba."""

import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

f32 = np.float32
u64 = np.uint64  # for indices: numba checks every signed index for a negative value

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "nnan", "ninf"},  # sums in any order; all values are finite
}
compiled = njit(**OPTIONS)


def compiled_to_disk(signature: Any) -> Callable[[Callable], Any]:
    """Return a decorator that compiles a function eagerly and caches the machine code in `__pycache__`.

    The name of the cache file has a hash of this package's sources, because numba does not detect changes of functions
    that are called from another file.
    """

    def decorator(function: Callable) -> Any:
        name = f"{function.__name__}_{_source_hash():08x}"
        function.__qualname__ = name
        try:
            return njit(signature, cache=True, **OPTIONS)(function)
        except Exception:  # no writable folder, a full disk, a damaged file: numba raises many types
            source = Path(function.__code__.co_filename)
            for damaged in source.parent.glob(f"__pycache__/{source.stem}.{name}*.nb*"):
                with suppress(OSError):
                    damaged.unlink()
            return njit(signature, **OPTIONS)(function)

    return decorator


def _source_hash() -> int:
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
