"""Merge operators: how the tensors of a group become one layer, one a file."""
