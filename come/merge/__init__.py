"""Layer merging: plans, operators, schedules, refits and the compression loop."""
