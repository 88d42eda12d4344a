"""Refits: fit the merged layer to reconstruction targets on calibration data, one per file."""
