"""Reward-distillation preference optimisation of language models, trained on the losses of `theory.losses`."""
