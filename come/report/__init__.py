"""Tables, figures and cards made from a run's results."""
