"""One job: its hash, its folder, its stages and its cost estimate."""
