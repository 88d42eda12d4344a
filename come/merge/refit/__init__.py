"""Closed-form repair: output maps solved for on calibration data."""
