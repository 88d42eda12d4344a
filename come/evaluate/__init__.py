"""Evaluation of a model: perplexity, zero-shot tasks, speed and memory, sample continuations."""
