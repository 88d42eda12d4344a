"""Calibration text, the layer stream and the statistics that ride on it."""
