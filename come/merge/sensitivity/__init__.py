"""Channel sensitivity metrics, one per file."""
