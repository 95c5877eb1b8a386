"""Models and tokenizers: checked, loaded, adapted, opened."""
