"""LoRA-Composer: several concepts, each in its own box, in one image (arXiv 2403.11627)."""
