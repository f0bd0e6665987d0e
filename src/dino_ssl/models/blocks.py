"""The layers of a Vision Transformer: patch embedding, attention, MLP, block, stochastic depth."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.init import trunc_normal_

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """A linear projection of the pixels of each patch, [B, 3, H, W] -> [B, h w, D]."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Return one token per patch, in row-major order."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """3 x 3 convolutions of stride 2 instead of the linear projection of patches, [B, 3, H, W] -> [B, h w, D].

    log2(patch) of them reduce the image to one position per patch, each with twice the channels of the previous one,
    batch norm and ReLU; a 1 x 1 convolution follows ("Early Convolutions Help Transformers See Better", Xiao et al.,
    2021). As in ConvNets, a token's receptive field of 2 patch - 1 pixels ends at the last row and column of its patch.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch, num_convs = patch, patch.bit_length() - 1
        channels = [3, *(width >> shift for shift in reversed(range(num_convs)))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width, kernel_size=1))

    def forward(self, images: Tensor) -> Tensor:
        """Return one token per complete patch, in row-major order."""
        height, width = (side - side % self.patch for side in images.shape[-2:])
        return self.layers(images[..., :height, :width]).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch with stochastic depth in training."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the first `num_queries` output tokens (None: all), which attend to all N tokens: [B, N, D]."""
        rate = self.drop_path if self.training else 0.0
        x = x[:, :num_queries] + drop_path(self.attn(self.norm1(x), num_queries), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for each head, [B, heads, N, d] each.

    In float32 on an AVX2 core the fused kernel was as fast as matrix products at 17 to 65 tokens, 1.2 times as fast at
    197, and 2 to 3 times at 785.
    """
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v in each head, d = D / heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = scaled_dot_product
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the outputs of the first `num_queries` tokens (None: all), [B, N, D] -> [B, num_queries, D]."""
        x = self.attend(*self.split_heads(x, num_queries))
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights in float32, [B, N, D] -> [B, heads, N, N]."""
        q, k, _ = self.split_heads(x)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k).float() * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1)

    def split_heads(self, x: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (of the first `num_queries` tokens), keys and values, [B, N, D] -> [B, heads, N, d] each."""
        if num_queries is None:
            q, k, v = self.project_qkv(x).permute(2, 0, 3, 1, 4)
        else:
            q = self.project_qkv(x[:, :num_queries], slice(0, 1)).permute(2, 0, 3, 1, 4)[0]
            k, v = self.project_qkv(x, slice(1, 3)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def project_qkv(self, x: Tensor, parts: slice = slice(0, 3)) -> Tensor:
        """Return queries, keys and values, or the given slice of them: [..., D] -> [..., 3, heads, d].

        The bias of the keys is omitted: it adds q . b to all scores of a query, which softmax cancels. Its gradient is
        rounding error, which AdamW would scale up to a random walk.
        """
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)
        bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
        bias = bias.unflatten(0, (3, -1))[parts].flatten()
        weight = self.qkv.weight.unflatten(0, (3, -1))[parts].flatten(0, 1)
        return F.linear(x, weight, bias).unflatten(-1, (parts.stop - parts.start, self.heads, -1))


class MLP(nn.Module):
    """Two linear layers with GELU in between, applied to each token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, [..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Return a residual branch with each image's values zeroed with probability `rate`, rescaled to the same mean."""
    if rate == 0:
        return x
    keep = torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * (keep / (1 - rate))


def init_weights(module: nn.Module) -> None:
    """Initialize linear layers: truncated normal of deviation 0.02, bias 0. Other modules keep torch's default."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
