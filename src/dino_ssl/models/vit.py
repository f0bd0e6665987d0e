"""The Vision Transformer of the paper: pre-norm blocks over patches and a [CLS] token (Sec. 3.1, Table 1).

Parameters carry the names of the authors' released files, so that those load as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from dino_ssl.errors import UserError
from dino_ssl.models.backbone import Attentive, BackboneConfig, Features


class Size(NamedTuple):
    width: int
    depth: int
    heads: int


SIZES = {"tiny": Size(192, 12, 3), "small": Size(384, 12, 6), "base": Size(768, 12, 12)}
"""Table 1 and the authors' ViT-tiny: 64 channels per head in all of them."""


@dataclass(frozen=True, kw_only=True)
class ViT(BackboneConfig):
    """A Vision Transformer (Dosovitskiy et al., 2021) as the paper trains it."""

    size: Literal["tiny", "small", "base"] = "small"
    """tiny (5 M parameters), small (21 M, ViT-S of the paper), base (85 M, ViT-B)."""
    patch: int = 16
    """Side of a patch in pixels. Smaller is better and slower (Fig. 5): 16, 8, 5, ..."""
    image_size: int = 224
    """Side of the images whose positions are learned; for any other size they are interpolated."""
    registers: int = 0
    """Extra tokens that belong to no place (Darcet et al., 2024). 0 in the paper."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; grows linearly from 0 in the first. The teacher has none."""
    width: int | None = None
    """Overrides the width of `size`."""
    depth: int | None = None
    """Overrides the number of blocks of `size`."""
    heads: int | None = None
    """Overrides the number of attention heads of `size` (App. D: more heads, a little better)."""
    mlp_ratio: float = 4.0
    """Width of the blocks' MLP over the width of the network."""

    def __post_init__(self) -> None:
        width, _, heads = self.shape
        if self.patch < 1 or self.image_size < self.patch:
            raise UserError(f"ViT: expected 1 <= patch <= image_size, got {self.patch} and {self.image_size}.")
        if heads < 1 or width % heads:
            raise UserError(f"ViT: the width must be a multiple of the heads, got {width} and {heads}.")

    @property
    def shape(self) -> Size:
        """Width, depth and heads, after the overrides."""
        width, depth, heads = SIZES[self.size]
        return Size(self.width or width, self.depth or depth, self.heads or heads)

    def build(self, *, drop_path: float | None = None) -> "VisionTransformer":
        """A network with fresh weights; `drop_path` overrides the setting (0 for a teacher)."""
        width, depth, heads = self.shape
        return VisionTransformer(
            width=width,
            depth=depth,
            heads=heads,
            patch=self.patch,
            image_size=self.image_size,
            registers=self.registers,
            mlp_ratio=self.mlp_ratio,
            drop_path=self.drop_path if drop_path is None else drop_path,
        )

    def describe(self) -> str:
        """Return a name such as `ViT-small/16`."""
        return f"ViT-{self.size}/{self.patch}"

    def overrides(self) -> str:
        """Return the overrides of `size`, such as `depth 6, heads 4`."""
        return ", ".join(f"{name} {value}" for name in ("width", "depth", "heads") if (value := getattr(self, name)))

    @property
    def spec(self) -> str:
        """`vit_SIZE/PATCH`."""
        return f"vit_{self.size}/{self.patch}"

    @property
    def input_size(self) -> int:
        """Side of the images whose positions are learned."""
        return self.image_size

    @property
    def patch_multiple(self) -> int:
        """The patch size."""
        return self.patch

    def activation_bytes(self, image_size: int) -> float:
        """Estimate the bytes kept for the backward pass per image: 40 per channel of each token and block."""
        tokens = 2 * (image_size // self.patch) ** 2 + 400  # two global views and some local ones
        return 40 * tokens * self.shape.width * self.shape.depth

    def with_image_size(self, size: int) -> Self:
        """Return a copy whose positions are learned for images of `size`."""
        return replace(self, image_size=size)


class VisionTransformer(Attentive):
    """Images -> patches + [CLS] + positions -> blocks -> norm; the [CLS] token is the image's vector."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        image_size: int = 224,
        registers: int = 0,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_blocks = width, depth
        self.patch, self.registers = patch, registers
        self.grad_checkpointing = False
        self._forward_views: Callable[[VisionTransformer, Sequence[Tensor]], Tensor] | None = None
        self.side = image_size // patch  # of the grid whose positions are learned
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qkv_bias, norm_eps, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.apply(init_weights)
        for tokens in (self.cls_token, self.pos_embed, *([self.register_tokens] if registers else [])):
            trunc_normal_(tokens, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        for block in self.blocks:
            wanted = 1 if block is self.blocks[-1] else None  # [CLS] alone is read of what the last block makes
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, wanted, use_reentrant=False)
            else:
                tokens = block(tokens, wanted)
        return self.norm(tokens[:, 0])

    def forward_views(self, views: Sequence[Tensor]) -> Tensor:
        """As `Backbone.forward_views`, or by the implementation given to `use_kernels`."""
        return super().forward_views(views) if self._forward_views is None else self._forward_views(self, views)

    def use_kernels(
        self,
        *,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        forward_views: Callable[["VisionTransformer", Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        """Replace scaled dot-product attention and `forward_views`; None keeps the reference implementation."""
        self._forward_views = forward_views
        for part in self.modules():
            if isinstance(part, Attention):
                part.attend = attention or scaled_dot_product

    def set_grad_checkpointing(self, on: bool) -> None:
        self.grad_checkpointing = on

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        if not 1 <= layers <= self.num_blocks:
            raise UserError(f"Expected 1 to {self.num_blocks} layers (blocks of this network), got {layers}.")
        grid = self.grid(images)
        tokens, last = self.embed(images), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i >= self.num_blocks - layers:
                last.append(self.norm(tokens))
        return [Features(x[:, 0], x[:, 1 + self.registers :].unflatten(1, grid)) for x in last]

    def layer_ids(self) -> dict[str, int]:
        deep = {id(p): self.num_blocks for p in self.norm.parameters()}
        deep |= {id(p): number for number, block in enumerate(self.blocks, 1) for p in block.parameters()}
        return {name: deep.get(id(p), 0) for name, p in self.named_parameters()}

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        if not -self.num_blocks <= layer < self.num_blocks:
            last = self.num_blocks - 1
            raise UserError(f"Expected a layer in 0 .. {last} (or -1, the last, to {-last - 1}), got {layer}.")
        *earlier, block = list(self.blocks)[: layer % self.num_blocks + 1]
        assert isinstance(block, Block)
        tokens = self.embed(images)
        for other in earlier:
            tokens = other(tokens)
        return block.attn.weights(block.norm1(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + registers + h w, D]: every token that enters the first block."""
        positions = self.positions(*self.grid(images))
        patches = self.patch_embed(images) + positions[:, 1:]
        first = [self.cls_token + positions[:, :1], *([self.register_tokens] if self.registers else [])]
        return torch.cat([*(token.expand(len(images), -1, -1) for token in first), patches], dim=1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w), the whole patches in an image; what is left at the right and lower border is not seen."""
        height, width = images.shape[-2:]
        if min(height, width) < self.patch:
            raise UserError(f"An image of {height} x {width} is smaller than one patch ({self.patch} pixels).")
        return height // self.patch, width // self.patch

    def positions(self, h: int, w: int) -> Tensor:
        """The learned positions for a grid of h x w patches: [1, 1 + h w, D], bicubic where the grid is
        another.

        The scale is (h + 0.1) / side, as in the authors' code, and not h / side: the 0.1, there to keep
        rounding from losing a row, also moves the sampling points a little, and their released weights were
        trained so.
        """
        if (h, w) == (self.side, self.side):
            return self.pos_embed
        cls, places = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = places.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbed(nn.Module):
    """[B, 3, H, W] -> [B, h w, D]: one linear map of each patch's pixels."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch is left out at random in training."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, norm_eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, wanted: int | None = None) -> Tensor:
        """[B, N, D] -> the same, or the first `wanted` tokens of it: the others are attended to, and not renewed."""
        rate = self.drop_path if self.training else 0.0
        x = x[:, :wanted] + drop_path(self.attn(self.norm1(x), wanted), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for each head, [B, heads, N, d] each.

    Measured in float32 on an AVX2 core, the fused kernel is as fast as plain matrix products at 17 to 65 tokens, 1.2
    times as fast at 197 and 2 to 3 times at 785.
    """
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k / sqrt(d)) v in each head, d = D / heads."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = scaled_dot_product
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, wanted: int | None = None) -> Tensor:
        x = self.attend(*self.split_heads(x, wanted))
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, heads, N, N]: what `forward` weighs the values with, in float32."""
        q, k, _ = self.split_heads(x)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k).float() * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1)

    def split_heads(self, x: Tensor, wanted: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> queries (of the first `wanted` tokens), keys and values, each [B, heads, N, d]."""
        if wanted is None:
            q, k, v = self.project_qkv(x).permute(2, 0, 3, 1, 4)
        else:
            q = self.project_qkv(x[:, :wanted], slice(0, 1)).permute(2, 0, 3, 1, 4)[0]
            k, v = self.project_qkv(x, slice(1, 3)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def project_qkv(self, x: Tensor, which: slice = slice(0, 3)) -> Tensor:
        """[..., D] -> [..., 3, heads, d], or those of queries, keys and values that are asked for.

        The keys' bias is left out. It adds q . b to all scores of a query, which softmax takes away again, so
        its gradient is zero but for rounding; AdamW would blow that up into a walk at random.
        """
        bias = self.qkv.bias
        if bias is not None:
            for_q, for_k, for_v = bias.chunk(3)
            bias = torch.cat([for_q, torch.zeros_like(for_k), for_v])
            bias = bias.unflatten(0, (3, -1))[which].flatten()
        weight = self.qkv.weight.unflatten(0, (3, -1))[which].flatten(0, 1)
        return F.linear(x, weight, bias).unflatten(-1, (which.stop - which.start, self.heads, -1))


class MLP(nn.Module):
    """D -> hidden -> D with GELU, on every token alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: a residual branch is zero for a share `rate` of the images, and its mean stays what
    it was.
    """
    if rate == 0:
        return x
    keep = torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * (keep / (1 - rate))


def init_weights(module: nn.Module) -> None:
    """Linear layers: truncated normal of deviation 0.02, bias 0. Norms and the patches' convolution keep
    torch's.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
