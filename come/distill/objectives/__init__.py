"""What merged layers are trained to: one file, one method."""
