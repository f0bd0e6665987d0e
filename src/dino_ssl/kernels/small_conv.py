"""Convolution of tiny feature maps as one matrix product, on a CPU.

If the kernel is so large that every output pixel depends on every input pixel, as a kernel of 3 x 3 on a map of 2 x 2
or 1 x 1, the convolution is a fully connected layer. The last stages of a ConvNet see such maps in small crops, where
oneDNN's backward pass is slow (docs/performance.md).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]
"""Along the height and the width."""
MAX_TAPS = 16
"""Pairs of an output and an input: a map of 2 x 2 with stride 1. The products for larger maps have more terms than the
convolution, and were slower (LOG.md)."""


def conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the layer's output as `nn.Conv2d.forward`, [B, C, h, w] -> [B, D, H, W].

    Under autocast it is the convolution: in bfloat16 it was not measured.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or x.ndim != 4 or not _is_plain(layer):
        return nn.Conv2d.forward(layer, x)
    height, width = x.shape[2:]
    taps = _taps((height, width), layer.kernel_size, layer.stride, layer.padding)
    if taps is None:
        return nn.Conv2d.forward(layer, x)
    count, channels = taps.shape[0] * taps.shape[1], layer.out_channels
    weight = layer.weight.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, taps.flatten())  # [D, H W h w, C]
    bias = None if layer.bias is None else layer.bias.repeat_interleave(count)
    out = F.linear(x.permute(0, 2, 3, 1).flatten(1), weight.view(count * channels, -1), bias)
    return out.view(len(x), channels, *taps.shape[:2]).contiguous(memory_format=torch.channels_last)


def _is_plain(layer: nn.Conv2d) -> bool:
    """Return True without groups, dilation, and padding by other values than zeros.

    A kernel of 1 x 1 would gain nothing, and its gradient would have other strides than those that DDP expects.
    """
    padding = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return padding and layer.groups == 1 and layer.dilation == (1, 1) and layer.kernel_size != (1, 1)


@lru_cache
@torch.inference_mode(False)  # an evaluation may call it first, and training use the same tensor
def _taps(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor | None:
    """Return the index in the flattened kernel between each output and each input pixel, [H, W, h, w] int64.

    None if an output does not depend on all inputs, or for more than MAX_TAPS.
    """
    axes = [*zip(size, kernel, stride, padding, strict=True)]
    counts = [max(0, (n + 2 * p - k) // s + 1) for n, k, s, p in axes]
    if not 0 < counts[0] * counts[1] * size[0] * size[1] <= MAX_TAPS:
        return None
    rows, columns = (
        torch.arange(n, device="cpu")[None] - (torch.arange(count, device="cpu") * s - p)[:, None]
        for count, (n, _, s, p) in zip(counts, axes, strict=True)
    )
    if any((taps < 0).any() or (taps >= k).any() for taps, k in zip((rows, columns), kernel, strict=True)):
        return None
    return rows[:, None, :, None] * kernel[1] + columns[None, :, None, :]
