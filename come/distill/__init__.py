"""Distillation after the merge: trains the merged model on the dense one, and baselines."""
