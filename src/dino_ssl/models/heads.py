"""Projection heads h, and the network g(x) = h(f(x)) that a method trains (Sec. 3.1, Fig. 9, App. C)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_ssl.models.backbone import Backbone
from dino_ssl.models.blocks import init_weights
from dino_ssl.objectives import l2_normalize

Norm = Literal["none", "batch"]
Activation = Literal["gelu", "relu"]
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class DINOHead(nn.Module):
    """An MLP to a narrow bottleneck, l2 normalization, and a weight-normalized layer of K prototypes: [n, D] -> [n, K].

    With `bottleneck=0` (App. C) there is neither bottleneck nor normalization, but `layers` plain linear layers, the
    last of which gives the K outputs; `norm_last` has no effect then. `predictor` adds BYOL's predictor q between the
    MLP and the normalization.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        layers: int = 3,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: Norm = "none",
        act: Activation = "gelu",
        norm_last: bool = True,
        predictor: bool = False,
    ) -> None:
        super().__init__()
        self.normalized = bool(bottleneck)
        if bottleneck:
            self.mlp = mlp([in_dim, *[hidden] * (layers - 1), bottleneck], norm=norm, act=act)
            self.last_layer = WeightNormLinear(bottleneck, out_dim, learn_scale=not norm_last)
        else:
            widths = [in_dim, *[hidden] * (layers - 1)]
            self.mlp = mlp(widths, norm=norm, act=act, act_last=True)
            self.last_layer = nn.Linear(widths[-1], out_dim)
        dim = bottleneck or widths[-1]
        self.predictor = MLPHead(dim, dim, hidden=hidden) if predictor else nn.Identity()
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the K prototypes."""
        return self.last_layer(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Return the inputs of the last layer, [n, D] -> [n, d]."""
        x = self.predictor(self.mlp(x))
        return l2_normalize(x) if self.normalized else x


class MLPHead(nn.Module):
    """Linear layers with norm and activation in between, [n, D] -> [n, d]; the outputs are not normalized.

    The projection head of BYOL, MoCo-v2 and SwAV, and BYOL's predictor q (Grill et al., 2020, Sec. 3.2; Tables 7, 14).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        layers: int = 2,
        hidden: int = 2048,
        norm: Norm = "batch",
        act: Activation = "relu",
    ) -> None:
        super().__init__()
        self.mlp = mlp([in_dim, *[hidden] * (layers - 1), out_dim], norm=norm, act=act)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projections."""
        return self.mlp(x)


class WeightNormLinear(nn.Module):
    """A linear layer x -> (g v / |v|) x without bias, with one scale g and direction v per output.

    Weight normalization (Salimans and Kingma, 2016). The scales are 1, and constant unless `learn_scale`: the outputs
    are then cosine similarities to K prototypes.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_scale: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=learn_scale)
        # Initialized as the weights of nn.Linear; their scale does not matter, since |v| is divided out.
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, [..., d] -> [..., K]."""
        return F.linear(x, self.weight.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The K prototypes g v / |v|, [K, d]."""
        v = self.weight_v.float()
        return v * (self.weight_g.float() / v.norm(dim=-1, keepdim=True))


def mlp(widths: Sequence[int], *, norm: Norm = "none", act: Activation = "gelu", act_last: bool = False) -> nn.Module:
    """Return linear layers between consecutive widths, with norm and activation in between (and after the last).

    A single layer is a plain `nn.Linear` as in the authors' head, so that parameter names match.
    """
    modules: list[nn.Module] = []
    for i, (in_dim, out_dim) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(in_dim, out_dim))
        if act_last or i < len(widths) - 2:
            modules += [nn.BatchNorm1d(out_dim)] if norm == "batch" else []
            modules.append(ACTIVATIONS[act]())
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


class Network(nn.Module):
    """g(x) = h(f(x)): a backbone and a head over stacked views (Sec. 3.1), and a predictor after them if given."""

    def __init__(self, backbone: Backbone, head: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.predictor = backbone, head, predictor

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all views in order, one [n, B, 3, H, W] per resolution -> [sum of n, B, K].

        Head and predictor run once on all views, so batch norm in them uses the statistics of all views.
        """
        outputs = self.head(self.backbone.forward_views(views))
        if self.predictor is not None:
            outputs = self.predictor(outputs)
        return outputs.unflatten(0, (-1, views[0].shape[1]))
