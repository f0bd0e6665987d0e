"""What was computed before, on disk: by the weights, the pictures and what was asked of them."""

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
    """16 hex digits over the weights: the same wherever they lie, and on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def key_of(*parts: str) -> str:
    """24 hex digits that stand for these words: the name of a file."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def cached(file: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `file` holds, or compute(), which all ranks call together; then `file` holds it.

    A damaged file is computed anew. Where it cannot be written (a full disk, a folder for reading only) the
    result is given all the same: what is lost is time.
    """
    before = distributed.run_on_rank0(lambda: _read(file))
    if before is not None:
        return before
    fresh = compute()
    if distributed.is_rank0():
        whole = {name: value.contiguous() for name, value in fresh.items()}
        with suppress(UserError):
            atomic_write(file, lambda aside: save_file(whole, aside))
    return fresh


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file)
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
