"""Low-rank methods in vision: LoLA-SpecViT, LESS ViT and LoRA-Composer on one adapter core."""

__version__ = "0.1.0"
