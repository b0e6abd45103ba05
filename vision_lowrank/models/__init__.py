"""Architectures as plain torch modules; importing this package registers them with timm."""

from vision_lowrank.models.hyper_mae import HyperMAE
from vision_lowrank.models.less_vit import LessViT, less_vit_base, less_vit_small, less_vit_tiny
from vision_lowrank.models.lola_specvit import LolaSpecViT, lola_specvit_base, lola_specvit_small, lola_specvit_tiny

__all__ = [
    "HyperMAE",
    "LessViT",
    "LolaSpecViT",
    "less_vit_base",
    "less_vit_small",
    "less_vit_tiny",
    "lola_specvit_base",
    "lola_specvit_small",
    "lola_specvit_tiny",
]
