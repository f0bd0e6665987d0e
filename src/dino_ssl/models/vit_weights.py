"""Weights of ViTs with the names of other libraries: Hugging Face (two generations), DINOv2 and timm.

Layer scale is multiplied into the linear layer before it, which is the same function. Mask tokens and poolers are not
used.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_ssl.errors import UserError

NAMES = (
    (r"embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"reg_token$", "register_tokens"),
    (r"layernorm\.", "norm."),
    (r"(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # DINOv2 trains its blocks in chunks
)
"""Beginnings of names, and those of `VisionTransformer`."""
NAMES_IN_BLOCKS = {
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "attention.o_proj.": "attn.proj.",
    "attention.attention.query.": "attn.q.",
    "attention.attention.key.": "attn.k.",
    "attention.attention.value.": "attn.v.",
    "attention.q_proj.": "attn.q.",
    "attention.k_proj.": "attn.k.",
    "attention.v_proj.": "attn.v.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
UNUSED = re.compile(r"(embeddings\.)?mask_token$|pooler\.")
LAYER_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
"""Layer scales in a block, and the linear layers before them."""


def convert_vit_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the names and layout of `VisionTransformer`; its own are returned unchanged.

    Raises UserError if tensors have the names of a ViT, but not its shapes.
    """
    state = {_own_name(name): value for name, value in state.items() if not UNUSED.match(name)}
    try:
        _join_qkv(state)
        _multiply_layer_scale(state)
        _add_cls_position(state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"Weights with the names of a ViT do not have its shapes: {error}") from error
    return state


def _join_qkv(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if re.match(r"blocks\.\d+\.attn\.q\.", name)]:
        parts = [state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)


def _multiply_layer_scale(state: dict[str, Tensor]) -> None:
    for scale, linear in LAYER_SCALES.items():
        for name in [name for name in state if name.endswith(f".{scale}")]:
            gamma, layer = state.pop(name), name.replace(scale, linear)
            state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma[:, None]
            state[f"{layer}.bias"] = state[f"{layer}.bias"] * gamma


def _add_cls_position(state: dict[str, Tensor]) -> None:
    """Add a position embedding of zeros for [CLS] to a ViT of timm with registers, which has none."""
    if "pos_embed" in state and "register_tokens" in state:
        positions = state["pos_embed"]
        if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
            state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _own_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    if block := re.match(r"blocks\.\d+\.", name):
        for other, own in NAMES_IN_BLOCKS.items():
            if name.startswith(other, block.end()):
                return block[0] + own + name[block.end() + len(other) :]
    return name
