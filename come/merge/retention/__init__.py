"""Rules for how much each layer of a group keeps, one a file."""
