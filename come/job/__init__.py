"""One job: identity, folder, stages, estimate."""
