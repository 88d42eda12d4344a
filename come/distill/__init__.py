"""Healing after the merge: training against the dense model, and baselines of it."""
