"""Orders in which groups are chosen, one a file."""
