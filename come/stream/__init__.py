"""The layer stream: hidden states of the calibration windows at every layer boundary."""
