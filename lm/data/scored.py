"""The scored file: the names of its columns. docs/scored-files.md says what each means, who writes and who reads it.

A row is a pair with what others have found out about it. `lm.score` and `lm.export` write such files, JSON Lines or
Parquet; `data.rewards given`, `lm.integrations.trl`, `lm.diagnose`, `lm.bias` and `lm.score` read them. The columns
of rewards, and what they mean together, are of `lm.data.rewards`; what labels mean is in `lm.data.votes`.
"""

from __future__ import annotations

from collections.abc import Iterable

from lm.data.rewards import MARGIN as MARGIN
from lm.data.rewards import MEMBER_MARGINS as MEMBER_MARGINS
from lm.data.rewards import MEMBERS as MEMBERS
from lm.data.rewards import OLDER_MARGIN, OLDER_MEMBERS, OLDER_ONE
from lm.data.rewards import ONE as ONE

TEXTS = ("prompt", "chosen", "rejected")
PROBABILITY, WEIGHT = "chosen_probability", "weight"

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Token ids of the texts; completions end with end-of-text."""
SAMPLE_IDS = "sample_ids"
"""Completions that pi_ref drew of the prompt: a list of lists of ids."""
REF_PAIR = ("ref_chosen_logps", "ref_rejected_logps")
"""Log-probs of the completions under pi_ref, nats, summed over their tokens."""
REF_SAMPLES = "ref_sample_logps"
"""Likewise of each of SAMPLE_IDS."""
SAMPLE_WEIGHTS = "sample_weights"
"""What each of SAMPLE_IDS counts in their mean; 1/S where there are none."""

SAMPLED = (SAMPLE_IDS, REF_SAMPLES, SAMPLE_WEIGHTS)
REFERENCE = (*TOKENS, *REF_PAIR, *SAMPLED)
"""Everything that holds for one pi_ref, and one tokenizer, alone."""
NUMBERS = (MARGIN, MEMBER_MARGINS, *REF_PAIR, REF_SAMPLES, SAMPLE_WEIGHTS, PROBABILITY, WEIGHT)
"""What reaches a loss beside tokens: [N], the members' [N, K], those of samples [N, S]."""
COLUMNS = (*TEXTS, *ONE, *MEMBERS, MARGIN, MEMBER_MARGINS, PROBABILITY, WEIGHT, *REFERENCE)
"""Every column of the schema."""

OLDER = dict(zip((*OLDER_ONE, *OLDER_MEMBERS, OLDER_MARGIN), (*ONE, *MEMBERS, MARGIN), strict=True))
"""What files of the first edition, and some sets of the hub, call a column -> its name here."""


def older_names(columns: Iterable[str]) -> list[str]:
    """A remark, where there are older names among the columns of a set."""
    found = [name for name in columns if name in OLDER]
    if not found:
        return []
    named = ", ".join(f"{name} is read as {OLDER[name]}" for name in found)
    return [f"older names of columns: {named}"]


def of_another_reference(columns: Iterable[str]) -> list[str]:
    """A remark for whoever has a pi_ref of its own, where a set's columns hold for another."""
    found = [name for name in columns if name in REFERENCE]
    if not found:
        return []
    return [
        f"not read: columns {', '.join(found)}, which hold for the reference model that made them; this run tokenises, "
        "samples and scores by its own"
    ]
