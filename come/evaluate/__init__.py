"""Evaluation of a model: perplexity, tasks, agreement with dense, speed and memory, samples."""
