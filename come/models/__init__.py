"""Loading, saving and changing causal language models."""
