"""Scores for groups of layers, one a file."""
