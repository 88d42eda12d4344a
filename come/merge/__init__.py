"""The merge itself: plan, operators, the progressive loop."""
