"""Experiments and measurements beside the pipeline: exact language, non-deterministic pairs, speed, cost, diagnosis."""
