"""Where calibration and evaluation text comes from, and how it becomes token windows."""
