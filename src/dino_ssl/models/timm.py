"""Every timm network as a Backbone: ResNet-50 and XCiT as in the paper, and whatever else timm has.

State dicts carry timm's own names, so that what is saved here loads in timm and the other way round. timm
itself is imported when a network is built: it takes seconds, and most commands do not need it.
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from torch import Tensor, nn

from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.models.backbone import Attentive, Backbone, BackboneConfig, Features


@dataclass(frozen=True, kw_only=True)
class Timm(BackboneConfig):
    """A network of timm by its name there: resnet50, convnext_tiny, swin_tiny_patch4_window7_224, ..."""

    name: str = "resnet50"
    """timm's name of the network; `timm.list_models("*xcit*")` finds them."""
    drop_path: float = 0.0
    """Stochastic depth, for the networks that have it. The teacher has none."""
    pretrained: bool = False
    """Start from timm's pretrained weights, which are downloaded."""
    args: tuple[tuple[str, str], ...] = ()
    """Further arguments of timm's create_model, as pairs of a name and a Python value: img_size 96."""

    def build(self, *, drop_path: float | None = None) -> Backbone:
        """The network, without its classifier; `drop_path` overrides the setting (0 for a teacher)."""
        rate = self.drop_path if drop_path is None else drop_path
        net = create(self.name, drop_path=rate, pretrained=self.pretrained, args=dict(self.args))
        return TimmViT(net) if attends(net) else TimmNetwork(net)

    def describe(self) -> str:
        """Return timm's name of the network."""
        return self.name

    def overrides(self) -> str:
        """Return the further arguments, such as `layers 1 1 1 1`."""
        return ", ".join(f"{name} {value.strip('()[]').replace(',', '')}" for name, value in self.args)

    @property
    def spec(self) -> str:
        """`timm:NAME`."""
        return f"timm:{self.name}"

    def untrained(self) -> Self:
        """Return the same network without timm's pretrained weights."""
        return replace(self, pretrained=False)


class TimmNetwork(Backbone):
    """A ConvNet, or any network that timm can ask for a feature map or for tokens.

    The vector is timm's own: the global average of a ConvNet (through the norm that ConvNeXt and others have
    there), the [CLS] token of XCiT. Where timm has a hidden layer after the average (MobileNetV3), D is that
    layer's, and the spatial map keeps its own width.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.embed_dim = getattr(net, "head_hidden_size", None) or self.net.num_features
        self.patch = stride(net)
        own_names(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(whole_patches(self.net, images)), pre_logits=True)

    def set_grad_checkpointing(self, on: bool) -> None:
        set_grad_checkpointing(self.net, on)

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """The last of timm's stages or blocks, each with its own width in a ConvNet; the final one as in
        `forward`.

        Earlier ones have no norm and no [CLS]: their vector is the average of their map.
        """
        images = whole_patches(self.net, images)
        if layers == 1:
            final, earlier = self.final(images), []
        else:
            try:
                final, stages = self.net.forward_intermediates(images, indices=layers, output_fmt="NCHW")
            except (AssertionError, AttributeError) as error:
                raise UserError(f"This network cannot give its last {layers} layers: {error}.") from error
            earlier = stages[:-1]
        cls = self.net.forward_head(final, pre_logits=True)
        maps = [stage.permute(0, 2, 3, 1) for stage in earlier]
        return [*(Features(x.mean((1, 2)), x) for x in maps), Features(cls, self.spatial(final, images))]

    def layer_ids(self) -> dict[str, int]:
        return layer_ids(self.net)

    def final(self, images: Tensor) -> Tensor:
        """What timm calls the features, before pooling."""
        try:
            return self.net.forward_features(images)
        except AssertionError as error:  # timm's networks of one image size refuse others so
            height, width = images.shape[-2:]
            raise UserError(
                f"{type(self.net).__name__} does not take images of {height} x {width}: {error} "
                "Views of several sizes need a network of any size; for one size, give img_size in args."
            ) from error

    def spatial(self, x: Tensor, images: Tensor) -> Tensor:
        """What forward_features gives, [B, D, h, w], [B, h, w, D] or tokens [B, N, D], as [B, h, w, D]."""
        if x.ndim == 4:
            return x if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
        if x.ndim == 3:
            patches = x[:, getattr(self.net, "num_prefix_tokens", 0) :]
            for rounded in (math.ceil, math.floor):
                h, w = (rounded(side / self.patch) for side in images.shape[-2:])
                if h * w == patches.shape[1]:
                    return patches.unflatten(1, (h, w))
        raise UserError(
            f"{type(self.net).__name__} has no spatial map: expected one token for each {self.patch} x "
            f"{self.patch} pixels, got {tuple(x.shape)} for images of {tuple(images.shape[-2:])}."
        )


class TimmViT(Attentive):
    """timm's Vision Transformers with a [CLS] token and plain attention; further prefix tokens count as
    registers.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.embed_dim = self.net.num_features
        self.num_blocks = len(self.net.blocks)
        self.registers = self.net.num_prefix_tokens - 1
        self.patch = stride(net)
        own_names(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(whole_patches(self.net, images)), pre_logits=True)

    def set_grad_checkpointing(self, on: bool) -> None:
        set_grad_checkpointing(self.net, on)

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        if not 1 <= layers <= self.num_blocks:
            raise UserError(f"Expected 1 to {self.num_blocks} layers (blocks of this network), got {layers}.")
        last = self.net.forward_intermediates(
            whole_patches(self.net, images),
            indices=layers,
            norm=True,
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return [Features(prefix[:, 0], patches.permute(0, 2, 3, 1)) for patches, prefix in last]

    def layer_ids(self) -> dict[str, int]:
        return layer_ids(self.net)

    def attention(self, images: Tensor, layer: int = -1) -> Tensor:
        if not -self.num_blocks <= layer < self.num_blocks:
            last = self.num_blocks - 1
            raise UserError(f"Expected a layer in 0 .. {last} (or -1, the last, to {-last - 1}), got {layer}.")
        attn, entering = self.net.blocks[layer].attn, []
        watch = attn.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        try:
            self.net.forward_features(whole_patches(self.net, images))
        finally:
            watch.remove()
        q, k, _ = attn.qkv(entering[0]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return ((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)).float().softmax(dim=-1)


def create(name: str, *, drop_path: float, pretrained: bool, args: Mapping[str, str]) -> nn.Module:
    """timm's network without a classifier, for images of any size where the network can.

    Networks differ in the arguments that they take. What the project would like to set is left out where timm
    says that it is unexpected; what the user asked for is not.
    """
    import timm

    if not timm.is_model(name):
        every = timm.list_models() + timm.list_pretrained()
        raise UserError(f"timm {timm.__version__} has no network {name!r}{did_you_mean(name, every) or '.'}")
    wanted = {key: literal(value) for key, value in args.items()}
    liked: dict[str, Any] = {"drop_path_rate": drop_path, "dynamic_img_size": True, "strict_img_size": False}
    liked = {key: value for key, value in liked.items() if key not in wanted}
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **liked, **wanted)
        except TypeError as error:
            listed = str(error).partition("unexpected keyword argument")[2]
            refused = set(re.findall(r"'(\w+)'", listed)) & set(liked)
            if not refused:
                raise UserError(f"timm cannot build {name} with {wanted}: {error}") from error
            if "drop_path_rate" in refused and drop_path > 0:
                raise UserError(f"{name} has no stochastic depth: expected drop_path 0, got {drop_path}.") from error
            liked = {key: value for key, value in liked.items() if key not in refused}
        except Exception as error:
            if not pretrained:
                raise UserError(f"timm cannot build {name} with {wanted}: {error}") from error
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                f"Cannot get pretrained weights of {name}: {reason}\n"
                "They are downloaded once and then kept. Check the connection, take pretrained=False, or "
                f"choose among timm.list_pretrained('{name.split('.')[0]}*')."
            ) from error


def literal(value: str) -> Any:
    """The Python value that a text spells (96, 0.1, True, (96, 128)); or the text itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def attends(net: Any) -> bool:
    """Whether this is a ViT whose vector is the normalised [CLS] token and whose attention is a plain
    softmax.
    """
    from timm.models.vision_transformer import Attention, VisionTransformer  # pyright: ignore[reportPrivateImportUsage]

    return (
        type(net) is VisionTransformer  # the distilled ones, a subclass, average two tokens
        and net.cls_token is not None
        and net.global_pool == "token"
        and isinstance(net.fc_norm, nn.Identity)
        and all(type(getattr(block, "attn", None)) is Attention for block in net.blocks)
    )


def stride(net: Any) -> int:
    """Pixels per place of the last feature map."""
    if info := getattr(net, "feature_info", None):
        return info[-1]["reduction"]
    return patch_size(net)[0] or 1


def layer_ids(net: Any) -> dict[str, int]:
    """timm's own numbers of layers, by the names of `named_parameters` of what holds the network as `net`."""
    from timm.models import group_parameters

    if not hasattr(net, "group_matcher"):
        raise UserError(
            f"timm does not say how deep the parameters of {type(net).__name__} lie: layer_decay must be 1."
        )
    numbers: Any = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    return {f"net.{name}": number for name, number in numbers.items()}


def patch_size(net: Any) -> tuple[int, int]:
    """(height, width) of the patches that the network cuts an image into; (0, 0) for a ConvNet."""
    size = getattr(getattr(net, "patch_embed", None), "patch_size", 0)
    return (size, size) if isinstance(size, int) else tuple(size)


def whole_patches(net: Any, images: Tensor) -> Tensor:
    """The images without what fills no patch at their right and lower border: timm would refuse it."""
    height, width = images.shape[-2:]
    h, w = patch_size(net)
    if not h or not w:
        return images
    if height < h or width < w:
        raise UserError(f"An image of {height} x {width} is smaller than one patch ({h} x {w} pixels).")
    return images[..., : height - height % h, : width - width % w]


def own_names(module: nn.Module) -> None:
    """Let the state dict of `module` have the names of `module.net`'s: no prefix `net.`, on saving and on
    loading.
    """

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}net.")]:
            state[prefix + name.removeprefix(f"{prefix}net.")] = state.pop(name)

    def add(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}net.{name.removeprefix(prefix)}"] = state.pop(name)

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(add)


def set_grad_checkpointing(net: nn.Module, on: bool) -> None:
    """timm's own activation checkpointing. Raises UserError for a network that has none."""
    if on:
        try:
            cast(Any, net).set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"timm's {type(net).__name__} cannot compute its blocks again: --recompute False."
            ) from error
