"""The staircase of a run: each step is a function of the run that returns an artifact."""
