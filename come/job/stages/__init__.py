"""The stages of a job: prepare, merge, distill, evaluate."""
