"""Scenes: cards, readers, splits, patches, preprocessing and Lightning data modules."""
