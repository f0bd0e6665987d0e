"""Adapter that makes any timm network a Backbone, including the ResNet-50 and XCiT of the paper.

State dicts use timm's parameter names, so saved weights load in timm and vice versa. timm is imported when a
network is built, because the import takes seconds.
"""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.models.backbone import Attentive, Backbone, BackboneConfig, Features, Projections
from dino_ssl.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Timm(BackboneConfig):
    """A timm model by name: resnet50, convnext_tiny, swin_tiny_patch4_window7_224, ..."""

    name: str = "resnet50"
    """The timm model name, as listed by `timm.list_models("*xcit*")`."""
    drop_path: float = 0.0
    """Stochastic depth rate, for networks that support it. The teacher has none."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded."""
    args: tuple[tuple[str, str], ...] = ()
    """Additional arguments of timm's create_model as (name, value) pairs, e.g. (img_size, 96)."""

    def build(self, *, drop_path: float | None = None) -> Backbone:
        """Return the network without its classifier; `drop_path` overrides the setting (0 for a teacher)."""
        rate = self.drop_path if drop_path is None else drop_path
        net = create(self.name, drop_path=rate, pretrained=self.pretrained, args=dict(self.args))
        network = TimmViT(net) if _is_plain_vit(net) else TimmNetwork(net)
        network.config = self
        return network

    def describe(self) -> str:
        """Return timm's name, with the additional arguments in parentheses, such as `(layers 1 1 1 1)`."""
        args = [f"{name} {value.strip('()[]').replace(',', '')}" for name, value in self.args]
        return self.name + (f" ({', '.join(args)})" if args else "")

    @property
    def spec(self) -> str:
        """A name such as `timm:resnet50`."""
        return f"timm:{self.name}"

    def untrained(self) -> Self:
        """Return the same network without timm's pretrained weights."""
        return replace(self, pretrained=False)


class TimmBackbone(Backbone):
    """The part of the interface that all timm models share."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.embed_dim = getattr(net, "head_hidden_size", None) or self.net.num_features
        size = getattr(getattr(net, "patch_embed", None), "patch_size", 1)  # ConvNets have no patches
        self.patch_size = (size, size) if isinstance(size, int) else tuple(size)
        info = getattr(net, "feature_info", None)
        self.patch = info[-1]["reduction"] if info else self.patch_size[0]
        _drop_net_prefix(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return timm's pooled features before the classifier, [B, 3, H, W] -> [B, D]."""
        return self.net.forward_head(self.forward_features(images), pre_logits=True)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return timm's features before pooling. Raise UserError if the network does not accept this image size."""
        try:
            return self.net.forward_features(self.crop(images))
        except AssertionError as error:  # timm's networks of a fixed image size
            raise UserError(
                f"{type(self.net).__name__} does not accept images of {tuple(images.shape[-2:])}: {error} Views of "
                "several sizes need a network for any size; for one size, set `img_size` in `backbone.args`."
            ) from error

    def crop(self, images: Tensor) -> Tensor:
        """Return the images without incomplete patches at the right and bottom edge, which timm would not accept."""
        height, width = images.shape[-2:]
        h, w = self.patch_size
        if height < h or width < w:
            raise UserError(f"An image of {height} x {width} is smaller than one patch ({h} x {w} pixels).")
        return images[..., : height - height % h, : width - width % w]

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Enable timm's activation checkpointing."""
        try:
            self.net.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            super().set_grad_checkpointing(enable)

    def pretrained_transform(self) -> Preprocessing:
        """Return the preprocessing of timm's pretrained weights of this network."""
        from timm.data.config import resolve_model_data_config

        known: Any = resolve_model_data_config(self.net)
        size = known["input_size"][-1]
        return Preprocessing(
            size=size,
            crop=size / math.floor(size / known["crop_pct"]),  # timm rounds the resized side down
            mean=known["mean"],
            std=known["std"],
            interpolation="bilinear" if known["interpolation"] == "bilinear" else "bicubic",
        )

    def convert_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of the official XCiT with timm's names, and those of other networks unchanged."""
        from timm.models.xcit import Xcit, checkpoint_filter_fn

        # it would remove the position embeddings of other networks, as pos_embed1
        return checkpoint_filter_fn(dict(state), self.net) if isinstance(self.net, Xcit) else state

    def layer_ids(self) -> dict[str, int]:
        """Return timm's layer numbers by parameter name."""
        from timm.models import group_parameters

        if not hasattr(self.net, "group_matcher"):
            return super().layer_ids()
        layers: Any = group_parameters(self.net, self.net.group_matcher(coarse=False), reverse=True)
        return {f"net.{name}": layer for name, layer in layers.items()}


class TimmNetwork(TimmBackbone):
    """A ConvNet, or any timm model with a feature map or patch tokens.

    The feature vector is timm's: the global average of a ConvNet (normalized in ConvNeXt and others), the [CLS] token
    of XCiT. If timm has a hidden layer after pooling (MobileNetV3), D is its width, and the spatial map has another
    width.
    """

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """Return the outputs of timm's last stages or blocks, which differ in width in a ConvNet.

        The last one is as in `forward`. Earlier ones have no norm and no [CLS]; their vector is the average of their
        map.
        """
        if layers == 1:
            final, earlier = self.forward_features(images), []
        else:
            try:
                final, (*earlier, _) = self.net.forward_intermediates(
                    self.crop(images), indices=layers, output_fmt="NCHW"
                )
            except (AssertionError, AttributeError) as error:
                raise UserError(
                    f"{type(self.net).__name__} cannot return its last {layers} layers: {error}."
                ) from error
        cls = self.net.forward_head(final, pre_logits=True)
        maps = [stage.permute(0, 2, 3, 1) for stage in earlier]
        return [*(Features(x.mean((1, 2)), x) for x in maps), Features(cls, self._spatial_map(final, images))]

    def _spatial_map(self, x: Tensor, images: Tensor) -> Tensor:
        """Return features before pooling, [B, D, h, w], [B, h, w, D] or tokens [B, N, D], as [B, h, w, D]."""
        if x.ndim == 4:
            return x if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
        size = self.crop(images).shape[-2:]
        if x.ndim == 3:
            patches = x[:, getattr(self.net, "num_prefix_tokens", 0) :]
            for rounded in (math.ceil, math.floor):
                h, w = (rounded(side / self.patch) for side in size)
                if h * w == patches.shape[1]:
                    return patches.unflatten(1, (h, w))
        raise UserError(
            f"{type(self.net).__name__} has no spatial map: expected one token per {self.patch} x {self.patch} pixels, "
            f"got {tuple(x.shape)} for images of {tuple(size)}."
        )


class TimmViT(TimmBackbone, Attentive):
    """timm's Vision Transformers with a [CLS] token and standard attention; other prefix tokens count as registers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.num_blocks = len(self.net.blocks)
        self.registers = self.net.num_prefix_tokens - 1

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """Return the [CLS] token and the patch tokens of the last `layers` blocks, each after the final norm."""
        self.check_layers(layers)
        outputs = self.net.forward_intermediates(
            self.crop(images),
            indices=layers,
            norm=True,
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return [Features(prefix[:, 0], patches.permute(0, 2, 3, 1)) for patches, prefix in outputs]

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """Return the attention weights of a block, [B, 3, H, W] -> [B, heads, N, N] in float32."""
        q, k, _ = self.projections(images, layer)
        scale = self.net.blocks[self.block_index(layer)].attn.scale
        return ((q * scale) @ k.transpose(-2, -1)).float().softmax(dim=-1)

    def projections(self, images: Tensor, layer: int = -1) -> Projections:
        """Return queries, keys and values of a block; queries and keys after their norms, if it has some."""
        attn, inputs = self.net.blocks[self.block_index(layer)].attn, []
        hook = attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            self.forward_features(images)
        finally:
            hook.remove()
        q, k, v = attn.qkv(inputs[0]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return Projections(attn.q_norm(q), attn.k_norm(k), v)


def create(name: str, *, drop_path: float, pretrained: bool, args: Mapping[str, str]) -> nn.Module:
    """Return timm's network without a classifier, for images of any size if the network supports it.

    Networks accept different arguments. Defaults of this project are omitted if timm reports them as unexpected; the
    given `args` are not.
    """
    import timm

    if not timm.is_model(name):
        known = timm.list_models() + timm.list_pretrained()
        raise UserError(f"timm {timm.__version__} has no network {name!r}{did_you_mean(name, known) or '.'}")
    given = {key: _literal(value) for key, value in args.items()}
    options: dict[str, Any] = {"drop_path_rate": drop_path, "dynamic_img_size": True, "strict_img_size": False} | given
    while True:
        try:
            with _cached_if_offline() if pretrained else nullcontext():
                return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except Exception as error:
            unexpected = str(error).partition("unexpected keyword argument")[2]
            refused = set(re.findall(r"'(\w+)'", unexpected)) & (options.keys() - given.keys())
            if "drop_path_rate" in refused and drop_path > 0:
                raise UserError(f"{name} has no stochastic depth: expected drop_path 0, got {drop_path}.") from error
            if not refused:
                hint = f"\nCheck the connection, give a file, or see timm.list_pretrained('{name.split('.')[0]}*')."
                what = f"get pretrained weights of {name}" if pretrained else f"build {name} with {given}"
                reason = str(error).partition(". ")[0] + "." if pretrained else error  # the hub's has a paragraph
                raise UserError(f"timm cannot {what}: {reason}{hint if pretrained else ''}") from error
            options = {key: value for key, value in options.items() if key not in refused}


@contextmanager
def _cached_if_offline() -> Iterator[None]:
    """Use only cached weights if the Hugging Face Hub cannot be reached: its library would retry for 85 seconds."""
    from huggingface_hub import constants, errors, get_session

    is_set = constants.HF_HUB_OFFLINE  # by the environment, which is read only once, on import
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # its type depends on the library's version
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if is_set else f"{constants.ENDPOINT} cannot be reached"
        cache = f"{constants.HF_HUB_CACHE}, which can be copied from another computer"
        raise ConnectionError(f"{reason}, and they are not in the cache {cache}") from error
    finally:
        constants.HF_HUB_OFFLINE = is_set


def _literal(value: str) -> Any:
    """Return the Python value that a string spells (96, 0.1, True, (96, 128)), or the string itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _is_plain_vit(net: Any) -> bool:
    """Return True for a ViT whose feature vector is the normalized [CLS] token and whose attention is a softmax."""
    from timm.models.vision_transformer import Attention, VisionTransformer  # pyright: ignore[reportPrivateImportUsage]

    return (
        type(net) is VisionTransformer  # the distilled ones, a subclass, average two tokens
        and net.cls_token is not None
        and net.global_pool == "token"
        and isinstance(net.fc_norm, nn.Identity)
        and all(type(getattr(block, "attn", None)) is Attention for block in net.blocks)
    )


def _drop_net_prefix(module: nn.Module) -> None:
    """Remove the prefix `net.` from the names in the state dict of `module`, in saving and in loading."""

    def rename(state: dict[str, Any], old: str, new: str) -> None:
        for name in [name for name in state if name.startswith(old)]:
            state[new + name.removeprefix(old)] = state.pop(name)

    module.register_state_dict_post_hook(lambda _, state, prefix, __: rename(state, f"{prefix}net.", prefix))
    module.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: rename(state, prefix, f"{prefix}net."))
