"""A method, or a reward model, trained on pairs by transformers' Trainer."""
