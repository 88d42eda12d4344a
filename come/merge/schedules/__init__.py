"""Schedules: the order in which spans are chosen, one per file."""
