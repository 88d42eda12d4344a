"""Text sources, and token windows for calibration, training and evaluation."""
