"""Architectures as plain torch modules; importing this package registers them with timm."""

from vision_lowrank.models.lola_specvit import LolaSpecViT, lola_specvit_base, lola_specvit_small, lola_specvit_tiny

__all__ = ["LolaSpecViT", "lola_specvit_base", "lola_specvit_small", "lola_specvit_tiny"]
