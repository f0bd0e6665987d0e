"""Compiled views equal the reference implementation: each operation, and whole views with the same parameters."""

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_ssl.data.loader import sample_rng
from dino_ssl.data.transforms import pixel_ops
from dino_ssl.data.transforms.multi_crop import JITTER_OPS, MultiCrop, ViewParams
from dino_ssl.data.transforms.pixel_ops import gaussian
from dino_ssl.kernels import fastest_transform
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.preprocessing import resize
from dino_ssl.run import Run

pytest.importorskip("numba", reason="needs numba")
from numba import types

from dino_ssl.kernels import view as view_kernel
from dino_ssl.kernels.multi_crop import CompiledMultiCrop

SMALL = MultiCrop(global_size=48, local_size=19, local=3)
IDENTITY = ViewParams(0, 0, 60, 90, False, (1.0, 1.0, 1.0, 0.0), (), False, 0.0, False)


def photo(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    """An image with smooth colors, hard edges and noise."""
    rng = np.random.default_rng(seed)
    image = resize(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), height, width).astype(float)
    image[height // 4 : height // 2, width // 3 : width // 2] = (250, 30, 10)
    return (image + rng.normal(size=image.shape) * 6).clip(0, 255).astype(np.uint8)


PHOTO = photo()


def compiled(draw: ViewParams, size: int, image: np.ndarray = PHOTO, **settings) -> np.ndarray:
    return CompiledMultiCrop(MultiCrop(**settings)).view(image.reshape(len(image), -1), draw, size)


def reference(draw: ViewParams, size: int, image: np.ndarray = PHOTO, **settings) -> np.ndarray:
    return MultiCrop(**settings)._view(image, draw, size)


def cubic(d: float) -> float:
    """Keys' kernel with a = -0.5."""
    d = abs(d)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic in float64, weight by weight, rounded once."""

    def matrix(length: int) -> np.ndarray:
        wide = max(length / size, 1.0)
        weights = np.array(
            [[cubic((i + 0.5 - (x + 0.5) * length / size) / wide) for i in range(length)] for x in range(size)]
        )
        return weights / weights.sum(1, keepdims=True)

    exact = np.einsum("yi,xj,ijc->yxc", matrix(image.shape[0]), matrix(image.shape[1]), image.astype(float))
    return exact.clip(0, 255)


@pytest.mark.parametrize("box", [(0, 0, 60, 90), (5, 7, 48, 48), (3, 60, 57, 4), (10, 20, 1, 30), (59, 89, 1, 1)])
@pytest.mark.parametrize("size", [1, 19, 65, 130])
@pytest.mark.parametrize("flip", [False, True])
def test_resize_is_exact_to_the_nearest_gray_level(box: tuple, size: int, flip: bool) -> None:
    top, left, height, width = box
    draw = IDENTITY._replace(top=top, left=left, height=height, width=width, flip=flip)
    exact = resized(PHOTO[top : top + height, left : left + width], size)
    ours = compiled(draw, size)
    assert ours.shape == (size, size, 3)
    assert ours.flags.c_contiguous
    assert np.abs(ours.astype(float) - (exact[:, ::-1] if flip else exact)).max() < 0.501


@pytest.mark.parametrize("size", [19, 48, 130])
def test_resize_equals_pillow_to_a_gray_level(size: int) -> None:
    """Pillow rounds and clips between its two passes, so it may differ more if the cubic overshoots."""
    reference = Image.fromarray(PHOTO).resize((size, size), Image.Resampling.BICUBIC)
    difference = np.abs(compiled(IDENTITY, size).astype(int) - np.asarray(reference))
    assert difference.mean() < 0.3
    assert (difference <= 1).mean() > 0.99


def test_crop_of_the_views_size_is_copied() -> None:
    draw = IDENTITY._replace(top=9, left=30, height=33, width=33)
    np.testing.assert_array_equal(compiled(draw, 33), PHOTO[9:42, 30:63])


@pytest.mark.parametrize("size", [8, 33, 64])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.85, 1.0, 1.2, 1.4])
def test_each_color_operation_equals_the_reference(size: int, factor: float) -> None:
    """Without a resize. OpenCV rounds the factors of saturation to 1/1024."""
    image = photo(size, size)
    draw = IDENTITY._replace(height=size, width=size, factors=(factor, factor, factor, (factor - 0.7) / 4))
    for number, change in enumerate(JITTER_OPS):
        ours = compiled(draw._replace(order=(number,)), size, image)
        difference = np.abs(ours.astype(int) - reference(draw._replace(order=(number,)), size, image))
        assert difference.max() <= 1, change.__name__
        assert difference.mean() < (0.1 if change is pixel_ops.adjust_saturation else 0.002), change.__name__


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.003, 0.1, 0.5])
def test_hue_shift_equals_the_reference_for_all_kinds_of_colors(turn: float) -> None:
    levels = np.array([0, 1, 2, 60, 127, 128, 200, 254, 255], np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    draw = IDENTITY._replace(height=27, width=27, factors=(1.0, 1.0, 1.0, turn), order=(3,))
    difference = np.abs(compiled(draw, 27, colors).astype(int) - pixel_ops.adjust_hue(colors, turn))
    assert difference.max() <= 1
    assert difference.mean() < 0.002


@pytest.mark.parametrize("size", [5, 32, 50])
def test_grayscale_blur_and_solarize_equal_the_reference(size: int) -> None:
    image = photo(size, size)
    draw = IDENTITY._replace(height=size, width=size)
    np.testing.assert_array_equal(compiled(draw._replace(gray=True), size, image), pixel_ops.gray(image))
    for sigma in (0.1, 0.4, 1.0, 2.0):
        assert len(gaussian(round(256 * sigma))) <= 13
        np.testing.assert_array_equal(compiled(draw._replace(sigma=sigma), size, image), pixel_ops.blur(image, sigma))
    for threshold in (0, 100, 128, 256):
        ours = compiled(draw._replace(solarize=True), size, image, solarize_threshold=threshold)
        np.testing.assert_array_equal(ours, pixel_ops.solarize(image, threshold))


@pytest.mark.parametrize(("height", "width"), [(60, 90), (200, 150), (31, 400), (12, 9)])
def test_views_equal_the_reference_to_rounding(height: int, width: int) -> None:
    image, made = photo(height, width), fastest_transform(SMALL)
    assert isinstance(made, CompiledMultiCrop)
    assert (made.size, made.repeats, made.view_shapes) == (SMALL.size, SMALL.repeats, SMALL.view_shapes)
    assert made.decode_scale(4000, 3000) == SMALL.decode_scale(4000, 3000) > 1
    differences = []
    for number in range(30):
        ours, reference = (views(image, sample_rng(0, 0, number)) for views in (made, SMALL))
        assert [view.shape for view in ours] == [view.shape for view in reference]
        differences += [np.abs(a.astype(int) - b) for a, b in zip(ours, reference, strict=True)]
    assert np.mean([d.mean() for d in differences]) < 0.4
    assert max(d.mean() for d in differences) < 2.0
    assert np.mean(np.concatenate([d.ravel() for d in differences]) <= 2) > 0.985


def test_images_may_be_read_only_or_not_contiguous() -> None:
    made, wide = fastest_transform(SMALL), np.repeat(PHOTO, 2, axis=1)
    read_only = PHOTO.copy()
    read_only.flags.writeable = False
    expected = made(PHOTO, sample_rng(0, 0, 1))
    for image in (read_only, wide[:, ::2]):
        for ours, view in zip(made(image, sample_rng(0, 0, 1)), expected, strict=True):
            np.testing.assert_array_equal(ours, view)


def test_every_order_of_color_operations_equals_the_reference() -> None:
    image, seen = photo(16, 16), set()
    for number in range(400):
        draw = SMALL.sample_params(16, 16, sample_rng(0, 0, number))[0]
        seen.add(draw.order)
        difference = np.abs(compiled(draw, 16, image).astype(int) - reference(draw, 16, image))
        assert difference.mean() < 3
    assert len(seen) == 25


def test_compiled_views_are_used_for_multi_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    views = Run(method=BYOLConfig()).views
    assert isinstance(fastest_transform(views), CompiledMultiCrop)


def test_reference_is_used_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest, **more):
        if name.startswith("numba"):
            raise ImportError(name)
        return real(name, *rest, **more)

    for module in ("multi_crop", "view"):
        monkeypatch.delitem(sys.modules, f"dino_ssl.kernels.{module}")
    monkeypatch.setattr(builtins, "__import__", without)
    assert fastest_transform(SMALL) is SMALL


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), EOFError("out of input")])
def test_function_is_compiled_again_if_its_cache_fails(error: Exception, monkeypatch, tmp_path: Path) -> None:
    """And damaged files of the cache are removed, so that the next process writes new ones."""
    cached, real = [], view_kernel.njit
    files = [tmp_path / "__pycache__" / name for name in ("view.double-1.py311.nbi", "view.other-1.py311.nbi")]
    files[0].parent.mkdir()
    for file in files:
        file.touch()

    def double(number):
        return 2 * number

    def failing(*signature, cache: bool = False, **options):
        cached.append(cache)
        if cache:
            raise error
        return real(*signature, **options)

    monkeypatch.setattr(view_kernel, "njit", failing)
    monkeypatch.setattr(view_kernel, "__file__", str(tmp_path / "view.py"))
    assert view_kernel.compiled_to_disk(types.int64(types.int64))(double)(21) == 42
    assert cached == [True, False]
    assert [file.exists() for file in files] == [False, True]
