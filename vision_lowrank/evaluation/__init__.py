"""Scores of predictions, and tables over seeds and methods; everything here takes arrays, not models."""
