"""Selection scores of spans of layers, one per file."""
