"""Cache of computed tensors on disk, keyed by the weights, the images and the computation."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino_ssl import distributed
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write


def weights_hash(network: nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 of the weights; the same on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_key(*parts: str) -> str:
    """Return 24 hex digits for these strings, to name a cache file."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def cached(file: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors in `file`, or call `compute` on all ranks and save its result there.

    A damaged file is computed again. A file that cannot be written (full disk, read-only folder) is not an error.
    """
    stored = distributed.run_on_rank0(lambda: _read(file))
    if stored is not None:
        return stored
    tensors = compute()
    if distributed.is_rank0():
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        with suppress(UserError):
            atomic_write(file, lambda temporary: save_file(contiguous, temporary))
    return tensors


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file)
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
