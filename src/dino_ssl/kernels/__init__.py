"""Optimized implementations of reference functions with the same signatures and values, checked by parity tests.

This file chooses the implementations; callers pass them on.
"""

from collections.abc import Callable
from typing import Any

from dino_ssl.data.transforms.base import Views
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.kernels.attention import scaled_dot_product
from dino_ssl.kernels.loss import batch_center, loss_from_bottleneck
from dino_ssl.kernels.packed_vit import forward_views
from dino_ssl.kernels.small_conv import conv2d


def optimized() -> dict[str, Callable[..., Any]]:
    """Return the implementations by name, for `methods.method.Implementations`."""
    return {
        "loss_from_bottleneck": loss_from_bottleneck,
        "batch_center": batch_center,
        "attention": scaled_dot_product,
        "forward_views": forward_views,
        "conv2d": conv2d,
    }


def fastest_transform(views: Views) -> Views:
    """Return the compiled implementation of a transform, or the transform itself if it has none.

    Compiling takes some seconds on first use. Without numba the reference implementation is used.
    """
    if type(views) is not MultiCrop:
        return views
    try:
        from dino_ssl.kernels.multi_crop import CompiledMultiCrop
    except ImportError:
        return views
    return CompiledMultiCrop(views)
