"""Distillation methods and their objectives; one file per method."""
