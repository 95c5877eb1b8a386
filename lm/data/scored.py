"""The scored file: the names of its columns. docs/scored-files.md says what each means, who writes and who reads it.

A row is a pair with what others have found out about it. `lm.score` and `lm.export` write such files, JSON Lines or
Parquet; `data.rewards given`, `lm.integrations.trl`, `lm.diagnose`, `lm.bias` and `lm.score` read them. What rewards
mean together is in `lm.data.rewards`, what labels mean in `lm.data.votes`.
"""

from __future__ import annotations

from collections.abc import Iterable

TEXTS = ("prompt", "chosen", "rejected")

ONE = ("chosen_reward", "rejected_reward")
MEMBERS = ("chosen_member_rewards", "rejected_member_rewards")
MARGIN, MEMBER_MARGINS = "reward_margin", "member_margins"

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

OLDER = {
    "score_chosen": ONE[0],
    "score_rejected": ONE[1],
    "margin": MARGIN,
    "chosen_rewards": MEMBERS[0],
    "rejected_rewards": MEMBERS[1],
}
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
