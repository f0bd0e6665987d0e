"""What every golden check shares: comparisons of one file, collected into one line.

A check is a function `check(path) -> Result` that reads one golden file, recomputes what it holds with the
project's code, and says how far apart the two are:

    def loss(path: Path) -> Result:
        from dino_ssl.objectives import dino_loss  # inside: a missing module is `todo`, not a crash of the others

        data, check = read(path), Check()
        check.close("loss/0", dino_loss(...), data["loss/0"])
        return check.result()
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SINGLE = 1e-5
"""One forward pass, loss or schedule."""
TRAJECTORY = 2e-4
"""The weights at the end of a training trajectory."""


@dataclass(frozen=True)
class Result:
    """The comparison of a file that came nearest to failing, or the first that failed."""

    max_abs_error: float
    tolerance: float
    ok: bool
    where: str = ""
    """The entry of the file that the two numbers are about, and what was wrong with it."""


@dataclass
class Check:
    """Comparisons of one golden file; `result()` is the one with the largest error for its tolerance."""

    results: list[Result] = field(default_factory=list)

    def close(self, where: str, actual: Any, expected: Any, tolerance: float | np.ndarray = SINGLE) -> None:
        """|actual - expected| <= tolerance everywhere; `tolerance` is a number or one number per element.

        Another shape, or a NaN on either side, fails with an infinite error.
        """
        actual, expected = _array(actual), _array(expected)
        if actual.shape != expected.shape:
            wrong = f"{where}: shape {actual.shape}, expected {expected.shape}"
            self.results.append(Result(float("inf"), float(np.max(tolerance)), False, wrong))
            return
        if actual.size == 0:
            return
        with np.errstate(invalid="ignore"):
            error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        error = np.where(actual == expected, 0.0, np.where(np.isfinite(error), error, np.inf))
        limit = np.broadcast_to(np.asarray(tolerance, np.float64), error.shape)
        worst = np.argmax(error / np.maximum(limit, 1e-300))  # the element nearest to failing, or failing by most
        value, bound = float(error.flat[worst]), float(limit.flat[worst])
        self.results.append(Result(value, bound, value <= bound, where))

    def equal(self, where: str, actual: Any, expected: Any) -> None:
        """Labels, masks, ranks and names: exactly the same. The error is the largest difference."""
        if isinstance(expected, np.ndarray | torch.Tensor | int | float | bool):
            self.close(where, actual, expected, tolerance=0.0)
            return
        same = actual == expected
        wrong = where if same else f"{where}: got {_short(actual)}, expected {_short(expected)}"
        self.results.append(Result(0.0 if same else float("inf"), 0.0, same, wrong))

    def result(self) -> Result:
        if not self.results:
            return Result(float("inf"), 0.0, False, "nothing was compared")
        return max(self.results, key=lambda r: (not r.ok, r.max_abs_error / r.tolerance if r.tolerance else 0.0))


def tensors(data: Any, prefix: str) -> dict[str, torch.Tensor]:
    """The entries of an .npz file below `prefix/`, as tensors under the rest of their names: a state dict."""
    names = [name for name in data.files if name.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): torch.from_numpy(data[name]) for name in names}


def read(path: Path) -> Any:
    """An .npz file; strings in it (`config`) are JSON text: `json.loads(str(data["config"]))`."""
    return np.load(path, allow_pickle=False)


def network_of(data: Any) -> Any:
    """The Vision Transformer that vit.npz describes, with its weights."""
    from dino_ssl.models.vit import VisionTransformer

    config = json.loads(str(data["config"]))
    network = VisionTransformer(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        image_size=config["img_size"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        norm_eps=config["layer_norm_eps"],
    )
    network.load_state_dict(tensors(data, "weights"))
    network.eval()
    return network


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
