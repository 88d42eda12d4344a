"""Statistics of decoder layers, measured on the calibration windows."""
