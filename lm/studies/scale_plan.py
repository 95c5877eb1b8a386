"""What `lm.studies.scale` measures, and what a worker is told and tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGES = ("diagnose", "bias", "prepare", "confidence", "score", "export", "load", "trl")
"""In this order: the first two read the file alone, then the later ones stand on the earlier; the last is TRL's
preparation."""


@dataclass(frozen=True)
class Job:
    """What one process does."""

    stage: str
    folder: Path
    """With the pairs, the model, and what earlier stages made."""


@dataclass(frozen=True)
class Measured:
    """What a stage took, its imports left out."""

    seconds: float
    cpu_seconds: float
    """User and system, of all threads."""
    peak_mb: float
    """Largest resident memory, 10^6 bytes: interpreter, libraries and pages of mapped files among it."""
    anonymous_mb: float
    """Largest without pages of files, which the system takes back when it needs them."""
    base_mb: float
    """Of which after the imports."""
    file_mb: float
    """What it wrote, and leaves."""
