"""Exact optima of preference objectives on bandits, with certificates."""
