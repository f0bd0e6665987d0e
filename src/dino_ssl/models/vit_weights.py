"""Weights of ViTs with the names of other libraries: Hugging Face (two generations), DINOv2 and timm.

Layer scale is multiplied into the linear layer before it, which is the same function. Mask tokens and poolers are not
used.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
    """Return the weights with the names and layout of `VisionTransformer`; its own are returned unchanged."""
    state = {_own_name(name): value for name, value in state.items() if not UNUSED.match(name)}
    for name in [name for name in state if re.match(r"blocks\.\d+\.attn\.q\.", name)]:
        parts = [state.pop(name.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
        if all(part is not None for part in parts):
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([part for part in parts if part is not None])
    for scale, linear in LAYER_SCALES.items():
        for name in [name for name in state if name.endswith(f".{scale}")]:
            gamma, layer = state.pop(name), name.replace(scale, linear)
            state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma[:, None]
            state[f"{layer}.bias"] = state[f"{layer}.bias"] * gamma
    positions = state.get("pos_embed")
    if (
        positions is not None
        and "register_tokens" in state
        and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]
    ):
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)  # timm: none for [CLS]
    return state


def _own_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    if block := re.match(r"blocks\.\d+\.", name):
        for other, own in NAMES_IN_BLOCKS.items():
            if name.startswith(other, block.end()):
                return block[0] + own + name[block.end() + len(other) :]
    return name
