"""Merge operators: how the tensors of a span become one layer, one per file."""
