"""The exact core: log-probs and rewards of completions, packed, and samples."""
