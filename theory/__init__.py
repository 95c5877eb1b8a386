"""Losses and statements of reward-distillation preference optimisation, checked by machine."""
