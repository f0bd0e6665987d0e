"""Scaled dot-product attention by the fastest kernel for the device, precision and number of tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 256
"""Tokens up to which plain matrix products in bfloat16 beat the fused kernel on a processor with AMX: at 37 tokens they
were 7 times as fast, at 785 the fused kernel was 1.7 times. In float32 (AVX2) the fused kernel is never behind."""


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `models.blocks.scaled_dot_product`: softmax(q k^T / sqrt(d)) v for each head, [B, heads, N, d] each."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= FEW:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.float().softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
