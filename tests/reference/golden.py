"""Comparisons of one reference file, collected into one result.

A check is a function that recomputes the content of a file with the project's code. Imports of the project are inside,
so that an import error fails one check only:

    def loss(path: Path) -> Result:
        from dino_ssl.objectives import dino_loss

        data, check = read(path), Check()
        check.close("loss/0", dino_loss(...), data["loss/0"])
        return check.result()
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

SINGLE = 1e-5
"""Tolerance of one forward pass, loss or schedule."""
TRAJECTORY = 2e-4
"""Tolerance of the weights at the end of a training trajectory."""


@dataclass(frozen=True)
class Result:
    """The comparison of a file with the largest error relative to its tolerance, or the first that failed."""

    max_abs_error: float
    tolerance: float
    ok: bool
    where: str = ""
    """The entry of the file, and the reason of a failure."""
    by_tolerance: tuple["Result", ...] = ()
    """The comparison with the largest error at each tolerance of the file."""


@dataclass
class Check:
    """The comparisons of one reference file."""

    results: list[Result] = field(default_factory=list)

    def close(self, where: str, actual: Any, expected: Any, tolerance: float | np.ndarray = SINGLE) -> None:
        """Compare |actual - expected| with the tolerance, a number or one number per element.

        A difference in shape, or a nan on either side, fails with an infinite error.
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
        for bound in np.unique(limit).tolist():
            largest = float(error[limit == bound].max())
            self.results.append(Result(largest, bound, largest <= bound, where))

    def equal(self, where: str, actual: Any, expected: Any) -> None:
        """Compare labels, masks, ranks or names exactly."""
        if isinstance(expected, np.ndarray | torch.Tensor | int | float | bool):
            self.close(where, actual, expected, tolerance=0.0)
            return
        same = actual == expected
        wrong = where if same else f"{where}: got {_short(actual)}, expected {_short(expected)}"
        self.results.append(Result(0.0 if same else float("inf"), 0.0, same, wrong))

    def result(self) -> Result:
        """Return the worst comparison; a failure if there is none."""
        if not self.results:
            return Result(float("inf"), 0.0, False, "nothing was compared")
        worst = max(self.results, key=lambda r: (not r.ok, r.max_abs_error / r.tolerance if r.tolerance else 0.0))
        largest = {r.tolerance: r for r in sorted(self.results, key=lambda r: (r.tolerance, r.max_abs_error))}
        return replace(worst, by_tolerance=tuple(largest.values()))


def tensors(data: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries `prefix/NAME` of an .npz file as a state dict."""
    names = [name for name in data.files if name.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): torch.from_numpy(data[name]) for name in names}


def read(path: Path) -> Any:
    """Open an .npz file; strings in it (`config`) are JSON: `json.loads(str(data["config"]))`."""
    return np.load(path, allow_pickle=False)


def network_of(data: Any) -> Any:
    """Return the Vision Transformer of vit.npz with its weights."""
    from dino_ssl.models.vit import ViT

    config = json.loads(str(data["config"]))
    network = ViT(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        image_size=config["img_size"],
        mlp_ratio=config["mlp_ratio"],
    ).build(drop_path=0.0)
    network.load_state_dict(tensors(data, "weights"))
    network.eval()
    return network


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
