"""Subsets of a preference set by how sure its annotators were and how much the two completions differ.

[N] trains on all pairs (D_all), on those with high confidence and a high edit distance (D_hc,he), and on those with low
confidence and a low edit distance (D_lc,le), whose preferences are close to a coin's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm.config import Pairs
from lm.data.columns import Floats, Ints

LEAST, UNDECIDED, MOST = 1, 5, 9
"""The annotators' scale: 1 is sure of the first completion, 9 of the second."""


def certainty(confidence: float) -> float:
    """How sure an annotator was, 0 (undecided) to 4: the distance from the middle of the scale.

    In openai/summarize_from_feedback 1 to 4 go with the first of the two as the better one, 6 to 9 with the second, and
    5 does not occur (in all 1,097 rows of its batch 13). ValueError off the scale.
    """
    if not LEAST <= confidence <= MOST:
        raise ValueError(f"confidence must be between {LEAST} and {MOST}, got {confidence!r}")
    return abs(confidence - UNDECIDED)


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levenshtein distance of two completions, in tokens."""
    return int(Levenshtein.distance(one, other))


def subset(
    pairs: Pairs,
    confidences: Floats | Sequence[float | None],
    chosen_ids: Iterable[Sequence[int]],
    rejected_ids: Iterable[Sequence[int]],
) -> tuple[Ints, dict[str, Any]]:
    """Indices of the pairs of D_all, D_hc,he or D_lc,le, in increasing order, and what was left out.

    Both medians are over the pairs that have a confidence; a pair has to be above both, or below both. One that is at a
    median is in neither subset, and so is one without a confidence.

    Args:
        pairs: which subset; "all" asks nothing of the confidences.
        confidences: of N annotators, or None (or NaN) where one gave none.
        chosen_ids: N completions, tokens; each is read once, so that they may come from a file as they are asked for.
        rejected_ids: likewise.

    Raises:
        ValueError: no pair has a confidence, one is off its scale, or nothing is left.
    """
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs must be one of {', '.join(get_args(Pairs))}, got {pairs!r}")
    if pairs == "all":
        return np.arange(len(confidences)), {}
    given = np.array(confidences, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(given))
    if not len(known):
        raise ValueError(
            f'bias.pairs "{pairs}" selects by the annotators\' confidence, but none of the {len(confidences)} pairs '
            "has one: a column `confidence` (or `extra.confidence` in the schema of openai/summarize_from_feedback) is "
            'needed; use "all"'
        )
    sure = np.fromiter(map(certainty, map(float, given[known])), dtype=np.float64)
    has_one = (~np.isnan(given)).tolist()
    each = zip(chosen_ids, rejected_ids, has_one, strict=True)
    far = np.fromiter((edit_distance(one, other) for one, other, counts in each if counts), dtype=np.int64)
    middle_sure, middle_far = float(np.median(sure)), float(np.median(far))
    inside = (
        (sure > middle_sure) & (far > middle_far) if pairs == "hc_he" else (sure < middle_sure) & (far < middle_far)
    )
    kept = known[inside]
    if not len(kept):
        side = "above" if pairs == "hc_he" else "below"
        raise ValueError(
            f'bias.pairs "{pairs}": no pair is {side} the median certainty {middle_sure:g} (0 to 4) and {side} the '
            f'median edit distance {middle_far:g}; too many annotators were equally sure; use "all"'
        )
    return kept, {
        "pairs": len(kept),
        "of": len(confidences),
        "without_confidence": len(confidences) - len(known),
        "median_certainty": middle_sure,
        "median_edit_distance": middle_far,
        "mean_certainty": float(sure[inside].mean()),
        "mean_edit_distance": float(far[inside].mean()),
    }
