"""What calibration measures of every layer."""
