"""Text sources; one file per source."""
