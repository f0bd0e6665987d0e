"""Networks: backbones that meet one contract, heads, and the weights that others have trained."""

from dino_ssl.models.backbone import Attentive, Backbone, Features
from dino_ssl.models.heads import DINOHead, MLPHead, Network, Predictor
from dino_ssl.models.timm import Timm
from dino_ssl.models.vit import VisionTransformer, ViT

BackboneConfig = ViT | Timm
"""Every backbone that a Run can name; each has `build(drop_path=None) -> Backbone`."""

__all__ = [
    "Attentive",
    "Backbone",
    "BackboneConfig",
    "DINOHead",
    "Features",
    "MLPHead",
    "Network",
    "Predictor",
    "Timm",
    "ViT",
    "VisionTransformer",
]
