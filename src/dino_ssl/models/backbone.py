"""The contract that every network meets: evaluations, figures and methods need nothing else of it.

Legend of the shapes, here and in every network: B images, H x W pixels, h x w places of the spatial map, N
tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_ssl.errors import UserError


class Features(NamedTuple):
    """What a network says about an image as a whole, and about each place in it."""

    cls: Tensor
    """[B, D]: the [CLS] token of a ViT, the global average of a ConvNet."""
    patches: Tensor
    """[B, h, w, D]: the spatial map, whatever the network."""


class Backbone(nn.Module, ABC):
    """A network f of the paper: images in, one vector each out (Sec. 3.1).

    Images are float [B, 3, H, W], normalised with ImageNet's mean and deviation, of any height and width.
    """

    embed_dim: int
    """D, the width of the vector."""
    patch: int
    """Pixels per place of the spatial map: the patch of a ViT, the total stride of a ConvNet."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]."""

    @abstractmethod
    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """The last `layers` blocks, the last one last, each through the final norm where there is one (App.
        F.2).
        """

    def forward_views(self, views: Sequence[Tensor]) -> Tensor:
        """One [n, B, 3, H, W] per resolution -> [sum of n B, D], by one forward pass per resolution."""
        return torch.cat([self(stack.flatten(0, 1)) for stack in views])

    def use_kernels(
        self,
        *,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        forward_views: Callable[[Any, Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        """Use optimized implementations of attention (q, k, v) and of `forward_views`, if this network has any."""

    def set_grad_checkpointing(self, on: bool) -> None:
        """In training, whether only what enters each block is kept, and the rest computed again for the gradients."""
        if on:
            raise UserError(f"{type(self).__name__} cannot compute its blocks again: recompute must be off.")

    def layer_ids(self) -> dict[str, int]:
        """How deep each parameter lies, by its name: 0 in the stem, then the number of its block, from 1.

        A norm after the last block counts as that block's, as in timm. Layer-wise learning rates need it.
        """
        raise UserError(f"{type(self).__name__} does not say how deep its parameters lie: layer_decay must be 1.")


class Attentive(Backbone):
    """A network of self-attention over [CLS], registers and patches, in this order (Fig. 1, 3, 8 and 10)."""

    num_blocks: int
    registers: int
    """Tokens between [CLS] and the patches that belong to no place; 0 in the paper."""

    @abstractmethod
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """[B, 3, H, W] -> [B, heads, queries, keys]: softmax(q k / sqrt(d)) of one block."""
