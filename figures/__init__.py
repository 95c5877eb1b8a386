"""Figures and tables drawn from saved results; no module here computes or imports a trainer."""
