"""Projection heads h, and the network g = h after f that a method trains (Sec. 3.1, Fig. 9, App. C)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_ssl.errors import UserError
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.vit import init_weights

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class DINOHead(nn.Module):
    """[n, D] -> [n, K]: an MLP to a narrow bottleneck, l2 norm, then one weight-normalised layer of K
    prototypes.

    With `bottleneck=None` there is neither the bottleneck nor its norm (App. C): `layers` plain linear
    layers, the last of which gives the K outputs; `norm_last` then means nothing.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        layers: int = 3,
        hidden: int = 2048,
        bottleneck: int | None = 256,
        norm: Literal["none", "batch"] = "none",
        act: Literal["gelu", "relu"] = "gelu",
        norm_last: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"DINOHead: expected at least 1 layer, got {layers}.")
        self.normalised = bool(bottleneck)
        if bottleneck:
            self.mlp = mlp([in_dim, *[hidden] * (layers - 1), bottleneck], norm=norm, act=act)
            self.last_layer = WeightNormLinear(bottleneck, out_dim, learn_scale=not norm_last)
        else:
            widths = [in_dim, *[hidden] * (layers - 1)]
            self.mlp = mlp(widths, norm=norm, act=act, act_last=True)
            self.last_layer = nn.Linear(widths[-1], out_dim)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, d]: what the last layer compares with its K prototypes."""
        x = self.mlp(x)
        return l2_norm(x) if self.normalised else x


class MLPHead(nn.Module):
    """[n, D] -> [n, d]: the projection of BYOL, MoCo-v2 and SwAV, `layers` linear layers with norm and activation
    between them. The last one has neither: what comes out is taken at unit length where it is compared.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        layers: int = 2,
        hidden: int = 2048,
        norm: Literal["none", "batch"] = "batch",
        act: Literal["gelu", "relu"] = "relu",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"MLPHead: expected at least 1 layer, got {layers}.")
        self.mlp = mlp([in_dim, *[hidden] * (layers - 1), out_dim], norm=norm, act=act)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class WeightNormLinear(nn.Module):
    """x -> (g v / |v|) x, one length g and one direction v per output, no bias (Salimans and Kingma, 2016).

    The lengths begin at 1 and, unless `learn_scale`, stay there: the outputs are then cosines to K
    prototypes.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_scale: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=learn_scale)
        # The directions start as the weights of a linear layer do: uniform, of any scale, since |v| is
        # divided out.
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """g v / |v|, the K prototypes [K, d]."""
        v = self.weight_v.float()
        return v * (self.weight_g.float() / v.norm(dim=-1, keepdim=True))


def mlp(
    widths: Sequence[int],
    *,
    norm: Literal["none", "batch"] = "none",
    act: Literal["gelu", "relu"] = "gelu",
    act_last: bool = False,
) -> nn.Module:
    """Linear layers from each width to the next, with norm and activation between them (and after the last).

    One layer alone is a plain `nn.Linear`, as in the authors' head, so that their files' names fit.
    """
    modules: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(before, after))
        if act_last or i < len(widths) - 2:
            modules += [nn.BatchNorm1d(after)] if norm == "batch" else []
            modules.append(ACTIVATIONS[act]())
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def l2_norm(x: Tensor) -> Tensor:
    """x / |x| along the last axis, in float32 whatever the precision around it: half floats lose the small
    ones.
    """
    return F.normalize(x.float(), dim=-1)


class Predictor(nn.Module):
    """q of BYOL (Grill et al., 2020, Sec. 3.2; Tables 7 and 14): [n, K] -> [n, K], an MLP of one hidden layer that the
    student alone has, to guess the teacher's outputs from its own."""

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 4096,
        norm: Literal["none", "batch"] = "batch",
        act: Literal["gelu", "relu"] = "relu",
    ) -> None:
        super().__init__()
        self.mlp = mlp([dim, hidden, dim], norm=norm, act=act)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Network(nn.Module):
    """g = h after f: a backbone, then a head, over stacked views (Sec. 3.1); a student may have a predictor after."""

    def __init__(self, backbone: Backbone, head: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.predictor = backbone, head, predictor

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """One [n, B, 3, H, W] per resolution -> [sum of n, B, K], views in the order given.

        The backbone runs once per resolution, head and predictor once on everything: a batch norm in them sees
        all views.
        """
        outputs = self.head(self.backbone.forward_views(views))
        if self.predictor is not None:
            outputs = self.predictor(outputs)
        return outputs.unflatten(0, (-1, views[0].shape[1]))
