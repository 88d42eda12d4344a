"""Tables, figures and model cards from the results of jobs."""
