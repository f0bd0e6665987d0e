"""Multi-crop views by compiled code, on one CPU core.

Views have the same random parameters and the same steps as those of `MultiCrop`, and differ by a gray level or two from
rounding (more after a hue shift of nearly gray pixels). Importing this module compiles it, which takes about ten
seconds; the machine code is cached. Raises ImportError without numba.
"""

import numpy as np

from dino_ssl.data.transforms.multi_crop import MultiCrop, ViewParams
from dino_ssl.data.transforms.pixel_ops import gaussian
from dino_ssl.kernels.view import NO_SOLARIZE, make_view

NO_BLUR = np.ones(1, np.float32)
"""The identity blur kernel."""


class CompiledMultiCrop:
    """A MultiCrop whose views are made by compiled code, with the same random parameters."""

    def __init__(self, reference: MultiCrop) -> None:
        self.reference = reference
        self.repeats, self.size, self.view_shapes = reference.repeats, reference.size, reference.view_shapes
        self.decode_scale = reference.decode_scale

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the views of an image [H, W, 3] in the reference's order."""
        sides = [side for number, side in self.view_shapes for _ in range(number)]
        params = self.reference.sample_params(image.shape[0], image.shape[1], rng)
        rows = np.ascontiguousarray(image).reshape(len(image), -1)
        return [self.view(rows, view, side) for view, side in zip(params, sides, strict=True)]

    def view(self, image: np.ndarray, params: ViewParams, size: int) -> np.ndarray:
        """Return one view [size, size, 3] of an image [H, 3 W]."""
        out = np.empty((size, 3 * size), np.uint8)
        brightness, contrast, saturation, hue = params.factors
        make_view(
            image,
            params.top,
            params.left,
            params.height,
            params.width,
            params.flip,
            np.array(params.order, np.int64),
            brightness,
            contrast,
            saturation,
            int(hue * 255) % 256,
            params.gray,
            gaussian(round(params.sigma * 256)) if params.sigma else NO_BLUR,
            self.reference.solarize_threshold if params.solarize else NO_SOLARIZE,
            out,
        )
        return out.reshape(size, size, 3)
