"""What crosses packages: the pipeline end to end, invariance, faults, the structure."""
