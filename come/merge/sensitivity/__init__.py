"""Channel sensitivity metrics, one a file."""
