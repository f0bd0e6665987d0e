"""The Vision Transformer of the paper: pre-norm blocks over patches and a [CLS] token (Sec. 3.1, Table 1).

Parameter names match those of the authors' released files and of timm, except for a stem of convolutions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from dino_ssl.errors import UserError, check_range
from dino_ssl.models.backbone import Attentive, BackboneConfig, Features, Projections
from dino_ssl.models.blocks import NORM_EPS, Attention, Block, ConvStem, PatchEmbed, init_weights, scaled_dot_product
from dino_ssl.models.vit_weights import convert_vit_weights
from dino_ssl.preprocessing import Preprocessing


class Size(NamedTuple):
    """The dimensions of a ViT."""

    width: int
    depth: int
    heads: int


SIZES = {"tiny": Size(192, 12, 3), "small": Size(384, 12, 6), "base": Size(768, 12, 12)}
"""Table 1 and the authors' ViT-tiny; 64 channels per head."""


@dataclass(frozen=True, kw_only=True)
class ViT(BackboneConfig):
    """A Vision Transformer (Dosovitskiy et al., 2021) as the paper trains it."""

    size: Literal["tiny", "small", "base"] = "small"
    """tiny (5 M parameters), small (21 M, ViT-S of the paper), base (85 M, ViT-B)."""
    patch: int = 16
    """Patch size in pixels. Smaller is better and slower (Fig. 5): 16, 8, 5, ..."""
    image_size: int = 224
    """Side of the images whose position embeddings are learned; they are interpolated for other sizes."""
    stem: Literal["patch", "conv"] = "patch"
    """patch: linear projection of each patch, as in the paper. conv: 3 x 3 convolutions with batch norm, which learn
    from fewer images; `patch` must then be a power of two, at most the width."""
    registers: int = 0
    """Number of register tokens (Darcet et al., 2024). 0 in the paper."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; grows linearly from 0 in the first. The teacher has none."""
    width: int | None = None
    """Overrides the width of `size`."""
    depth: int | None = None
    """Overrides the number of blocks of `size`."""
    heads: int | None = None
    """Overrides the number of attention heads of `size` (App. D: more heads are slightly better)."""
    mlp_ratio: float = 4.0
    """Width of the MLPs in the blocks divided by the width of the network."""

    def __post_init__(self) -> None:
        check_range(self, "width", "heads", "patch", "image_size", least=1, most=2**16)
        check_range(self, "depth", least=1, most=1000)  # in a file, they may have any value
        check_range(self, "registers", least=0, most=1000)
        check_range(self, "mlp_ratio", above=0, most=100)
        width, _, heads = self.shape
        if self.image_size < self.patch:
            raise UserError(f"ViT: expected patch <= image_size, got {self.patch} and {self.image_size}.")
        if self.stem == "conv" and (self.patch.bit_count() != 1 or not 1 < self.patch <= width):
            raise UserError(
                f"ViT: expected a patch size of 2, 4, 8, ... up to the width with stem conv, got {self.patch} and "
                f"{width}; stem patch takes any."
            )
        if width % heads:
            raise UserError(f"ViT: expected a width that is a multiple of the heads, got {width} and {heads}.")

    @property
    def shape(self) -> Size:
        """Width, depth and heads after the overrides."""
        width, depth, heads = SIZES[self.size]
        return Size(self.width or width, self.depth or depth, self.heads or heads)

    def build(self, *, drop_path: float | None = None) -> "VisionTransformer":
        """Return the network with initial weights; `drop_path` overrides the setting (0 for a teacher)."""
        return VisionTransformer(self, self.drop_path if drop_path is None else drop_path)

    def describe(self) -> str:
        """Return a name such as `ViT-small/16`, with the stem and the overrides of `size` in parentheses."""
        overrides = [f"{name} {value}" for name in ("width", "depth", "heads") if (value := getattr(self, name))]
        overrides += ["conv stem"] if self.stem == "conv" else []
        return f"ViT-{self.size}/{self.patch}" + (f" ({', '.join(overrides)})" if overrides else "")

    @property
    def spec(self) -> str:
        """A name such as `vit_small/16`."""
        return f"vit_{self.size}/{self.patch}"

    @property
    def input_size(self) -> int:
        """Side of the images whose position embeddings are learned."""
        return self.image_size

    @property
    def patch_multiple(self) -> int:
        """The patch size."""
        return self.patch

    def activation_bytes(self, image_size: int) -> float:
        """Estimate the bytes kept for the backward pass per image: 40 per channel of each token and block."""
        tokens = 2 * (image_size // self.patch) ** 2 + 400  # two global views and several local ones
        return 40 * tokens * self.shape.width * self.shape.depth

    def with_image_size(self, size: int) -> Self:
        """Return a copy whose position embeddings are for images of `size`."""
        return replace(self, image_size=size)


class VisionTransformer(Attentive):
    """Patch embedding, [CLS] and register tokens, positions, blocks, norm; [CLS] is the feature vector of an image."""

    def __init__(self, config: ViT, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config, self.transform = config, Preprocessing(size=config.image_size)
        width, depth, heads = config.shape
        self.embed_dim, self.num_blocks = width, depth
        self.patch, self.registers = config.patch, config.registers
        self.grad_checkpointing = False
        self._forward_views: Callable[[VisionTransformer, Sequence[Tensor]], Tensor] | None = None
        self.side = config.image_size // config.patch  # of the grid of position embeddings
        self.patch_embed = (ConvStem if config.stem == "conv" else PatchEmbed)(width, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        if self.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, config.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.apply(init_weights)
        for tokens in (self.cls_token, self.pos_embed, *([self.register_tokens] if self.registers else [])):
            trunc_normal_(tokens, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return the [CLS] tokens after the final norm, [B, 3, H, W] -> [B, D]."""
        tokens = self.embed(images)
        for block in self.blocks:
            num_queries = 1 if block is self.blocks[-1] else None  # only [CLS] of the last block is used
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, num_queries, use_reentrant=False)
            else:
                tokens = block(tokens, num_queries)
        return self.norm(tokens[:, 0])

    def forward_views(self, views: Sequence[Tensor]) -> Tensor:
        """Return the features of all views, by the implementation given to `use_kernels` or the reference one."""
        return super().forward_views(views) if self._forward_views is None else self._forward_views(self, views)

    def use_kernels(
        self,
        *,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        forward_views: Callable[["VisionTransformer", Sequence[Tensor]], Tensor] | None = None,
        conv2d: Callable[[nn.Conv2d, Tensor], Tensor] | None = None,
    ) -> None:
        """Replace scaled dot-product attention, `forward_views` and convolutions; None: reference implementation."""
        super().use_kernels(conv2d=conv2d)
        self._forward_views = forward_views
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.attend = attention or scaled_dot_product

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Enable activation checkpointing of the blocks."""
        self.grad_checkpointing = enable

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalized tokens of the last block as timm's `forward_features`: [B, 1 + registers + h w, D]."""
        return self.get_intermediate_layers(images)[0]

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Return the normalized tokens of the last n blocks as the authors' method: [B, 1 + registers + h w, D]."""
        self.check_layers(n)
        tokens, outputs = self.embed(images), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i >= self.num_blocks - n:
                outputs.append(self.norm(tokens))
        return outputs

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """Return the attention weights of the last block as the authors' method: [B, heads, N, N]."""
        return self.attention(images)

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """Return the [CLS] token and the patch tokens of the last `layers` blocks, each after the final norm."""
        outputs, grid = self.get_intermediate_layers(images, layers), self.grid(images)
        return [Features(x[:, 0], x[:, 1 + self.registers :].unflatten(1, grid)) for x in outputs]

    def convert_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of Hugging Face's, DINOv2's or timm's ViTs with the names of this network."""
        return convert_vit_weights(state)

    def layer_ids(self) -> dict[str, int]:
        """Return 0 for the embeddings, the number of the block from 1, and the last block's for the final norm."""
        layers = {id(p): self.num_blocks for p in self.norm.parameters()}
        layers |= {id(p): number for number, block in enumerate(self.blocks, 1) for p in block.parameters()}
        return {name: layers.get(id(p), 0) for name, p in self.named_parameters()}

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Return the attention weights of a block, [B, 3, H, W] -> [B, heads, N, N] in float32."""
        attention, tokens = self._attention_input(images, layer)
        return attention.weights(tokens)

    def projections(self, images: Tensor, layer: int = -1) -> Projections:
        """Return queries, keys and values of a block, with the bias of the keys, which `attention` does not need."""
        attention, tokens = self._attention_input(images, layer)
        qkv = attention.qkv(tokens).unflatten(-1, (3, attention.heads, -1))
        return Projections(*qkv.permute(2, 0, 3, 1, 4))

    def _attention_input(self, images: Tensor, layer: int) -> tuple[Attention, Tensor]:
        """Return the attention module of a block and its normalized input, [B, N, D]."""
        *earlier, block = list(self.blocks)[: self.block_index(layer) + 1]
        assert isinstance(block, Block)
        tokens = self.embed(images)
        for previous in earlier:
            tokens = previous(tokens)
        return block.attn, block.norm1(tokens)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens that enter the first block, [B, 3, H, W] -> [B, 1 + registers + h w, D]."""
        positions = self.positions(*self.grid(images))
        patches = self.patch_embed(images) + positions[:, 1:]
        prefix = [self.cls_token + positions[:, :1], *([self.register_tokens] if self.registers else [])]
        return torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return (h, w), the number of complete patches; remaining pixels at the right and bottom edge are ignored."""
        height, width = images.shape[-2:]
        if min(height, width) < self.patch:
            raise UserError(f"An image of {height} x {width} is smaller than one patch ({self.patch} pixels).")
        return height // self.patch, width // self.patch

    def positions(self, h: int, w: int) -> Tensor:
        """Return the position embeddings of h x w patches, [1, 1 + h w, D], by bicubic interpolation if necessary.

        The scale is (h + 0.1) / side as in the authors' code, instead of h / side. The 0.1 prevents rounding from
        losing a row; it also shifts the sampling points slightly, and the released weights were trained with it.
        """
        if (h, w) == (self.side, self.side):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = patches.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)
