"""Retention rules: how much of each layer of a span is kept, one per file."""
