"""The original systems exactly as they ran, defects included: to read their weights and to measure against them."""

from vision_lowrank.models.official.less import (
    OfficialHyperMAE,
    OfficialKroneckerAttention,
    OfficialLessViT,
    hyper_mae,
    kronecker_attention,
    less_vit,
)
from vision_lowrank.models.official.lola import (
    LolaSpecViTConfig,
    OfficialLolaSpecViT,
    build_lola_specvit,
    lola_specvit,
)

__all__ = [
    "LolaSpecViTConfig",
    "OfficialHyperMAE",
    "OfficialKroneckerAttention",
    "OfficialLessViT",
    "OfficialLolaSpecViT",
    "build_lola_specvit",
    "hyper_mae",
    "kronecker_attention",
    "less_vit",
    "lola_specvit",
]
