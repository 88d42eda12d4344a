"""Trackers, which record the metrics of a run."""
