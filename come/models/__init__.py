"""Loads causal language models, accesses their parts, and edits their layers and files."""
