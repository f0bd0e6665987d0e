"""Abstract base classes of networks and their settings. Evaluations, figures and methods use only this interface.

Shapes, here and in every network: B images of H x W pixels, a spatial feature map of h x w cells (the patches of a
ViT), N tokens, embedding dimension D.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dino_ssl.errors import UserError
from dino_ssl.preprocessing import Preprocessing


class Features(NamedTuple):
    """The features of a batch of images."""

    cls: Tensor
    """[B, D]: the [CLS] token of a ViT, the global average pool of a ConvNet."""
    patches: Tensor
    """[B, h, w, D]: the spatial feature map."""


class Backbone(nn.Module, ABC):
    """The network f of the paper: images in, one feature vector per image out (Sec. 3.1).

    Images are float [B, 3, H, W] of any size, normalized as by `transform`.
    """

    embed_dim: int
    """D, the width of the feature vector."""
    patch: int
    """Pixels per cell of the spatial feature map: the patch size of a ViT, the total stride of a ConvNet."""
    transform: Preprocessing = Preprocessing()
    """The preprocessing of the images that the network was trained on; `load` reads it from the file."""
    config: "BackboneConfig | None" = None
    """The settings that built the network; None if they are unknown."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the feature vectors, [B, 3, H, W] -> [B, D]."""

    @abstractmethod
    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """Return the outputs of the last `layers` blocks, in order.

        Each is taken after the final norm, if there is one (App. F.2).
        """

    def forward_views(self, views: Sequence[Tensor]) -> Tensor:
        """Return the features of all views, one [n, B, 3, H, W] per resolution -> [sum of n B, D].

        The reference implementation makes one forward pass per resolution.
        """
        return torch.cat([self(stack.flatten(0, 1)) for stack in views])

    def use_kernels(
        self,
        *,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        forward_views: Callable[[Any, Sequence[Tensor]], Tensor] | None = None,
        conv2d: Callable[[nn.Conv2d, Tensor], Tensor] | None = None,
    ) -> None:
        """Use optimized implementations of attention (q, k, v) and of `forward_views` if this network supports them.

        conv2d: of `nn.Conv2d.forward`, for all layers of exactly this class. None: the reference implementation.
        """
        for layer in self.modules():
            if type(layer) is nn.Conv2d:
                vars(layer).pop("forward", None)
                if conv2d is not None:
                    vars(layer)["forward"] = partial(conv2d, layer)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Enable activation checkpointing: keep the inputs of each block, recompute the rest in the backward pass."""
        if enable:
            raise UserError(
                f"{type(self).__name__} does not support activation checkpointing: set `grad_checkpointing` to False."
            )

    def convert_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return published weights of this architecture with the names of this network; by default unchanged."""
        return state

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of each parameter by name: 0 for the stem, then the number of its block, from 1.

        A norm after the last block belongs to that block, as in timm. Layer-wise learning rates need it.
        """
        raise UserError(f"{type(self).__name__} does not define `layer_ids`: set `optim.layer_decay` to 1.")


class Projections(NamedTuple):
    """The inputs of self-attention in a block, [B, heads, N, d] each: [CLS], registers, patches in row-major order."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class Attentive(Backbone):
    """A network with self-attention over [CLS], register and patch tokens, in this order (Fig. 1, 3, 8 and 10)."""

    num_blocks: int
    registers: int
    """Number of tokens between [CLS] and the patches; 0 in the paper."""

    @abstractmethod
    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Return softmax(q k / sqrt(d)) of one block, [B, 3, H, W] -> [B, heads, queries, keys]."""

    def projections(self, images: Tensor, layer: int = -1) -> Projections:
        """Return queries, keys and values of one block, with their biases; images are [B, 3, H, W]."""
        raise UserError(f"{type(self).__name__} does not define `projections`, the keys of its patches.")

    def block_index(self, layer: int) -> int:
        """Return the index of a block, from the end if `layer` is negative. Raise UserError if there is none."""
        count = self.num_blocks
        if not -count <= layer < count:
            raise UserError(f"Expected a layer from 0 to {count - 1}, or from -1 (the last) to {-count}, got {layer}.")
        return layer % count

    def check_layers(self, layers: int) -> None:
        """Raise UserError if the network does not have this number of blocks."""
        if not 1 <= layers <= self.num_blocks:
            raise UserError(f"Expected 1 to {self.num_blocks} layers (blocks of this network), got {layers}.")


class BackboneConfig(ABC):
    """Settings of a backbone: a frozen dataclass whose fields become flags, and the properties that other modules need.

    A backbone from another module is one file with a `Backbone` and a subclass of this class.
    """

    @abstractmethod
    def build(self, *, drop_path: float | None = None) -> Backbone:
        """Return the network with initial weights; `drop_path` overrides the setting (0 for a teacher)."""

    def describe(self) -> str:
        """Return a short name for plans and reports, such as `ViT-small/16 (depth 6)`."""
        return type(self).__name__

    @property
    def spec(self) -> str:
        """The name that `models.backbone_named` accepts for these settings, without overrides."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @property
    def input_size(self) -> int:
        """Side in pixels of the images that the network is designed for."""
        return 224

    @property
    def patch_multiple(self) -> int:
        """The side of a crop in pixels should be a multiple of this."""
        return 8

    def activation_bytes(self, image_size: int) -> float:
        """Estimate the activation memory per image in bytes, for two views of `image_size` and several small ones."""
        return 3000 * image_size**2  # a ResNet: 1000 bytes per pixel of three global views

    def untrained(self) -> Self:
        """Return the same architecture without pretrained weights."""
        return self

    def with_image_size(self, size: int) -> Self:
        """Return a copy with position embeddings for images of `size`; unchanged if it has no learned ones."""
        return self

    def with_drop_path(self, rate: float) -> Self:
        """Return a copy with this drop-path rate; unchanged if the network has no drop-path."""
        known: Any = self
        has_drop_path = any(field.name == "drop_path" for field in dataclasses.fields(known))
        return dataclasses.replace(known, drop_path=rate) if has_drop_path else self
