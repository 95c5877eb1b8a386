"""Writes the scored pairs of D_rho for other trainers to --out FILE (.jsonl, .jsonl.gz or .parquet).

All other options are the run's, as for `lm.score`. A row has prompt, chosen and rejected as the set had them: text, or
messages (and tools), which another model's own template then writes; beside messages, the ids of the tokens that this
run's template made of them (prompt_ids, chosen_ids, rejected_ids). Further the reward of each side by the model of
D_rho (chosen_reward, rejected_reward), their difference (reward_margin), the rewards by the ensemble's members
(chosen_member_rewards, rejected_member_rewards: lists in the order of `bias.member_fractions`), each where a method of
`methods` distils it, and the summed log-probs of both sides under pi_ref (ref_chosen_logps, ref_rejected_logps), in
nats, with end-of-text. `split` is the run's, "train" of every row: `data.kind preferences` with `data.rewards given`
and `data.split own` reads the file back, and holds out some of its rows, on which the run's own models were trained.
Drawn anew by the seed of that run, all rows would be for training again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.stages.run import Run, command


def export(run: Run, out: Path) -> None:
    """Writes `lm.stages.scores.export_rows` to a .jsonl, .jsonl.gz or .parquet file. ValueError for another type."""
    from lm.base import progress, ranks
    from lm.data.rows import check_suffix, write_rows
    from lm.stages.scores import export_rows

    check_suffix(out)
    rows = export_rows(run)  # by all ranks
    if not ranks.is_first():
        return
    write_rows(out, rows)
    progress.say(f"written: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    own, rest = parser.parse_known_args(arguments)
    if own.out is None and not {"-h", "--help"} & set(rest):
        print("error: --out FILE is needed: .jsonl, .jsonl.gz or .parquet", file=sys.stderr)
        return 2
    examples = ("--out scored.jsonl", "--out scored.parquet --config runs/demo/config.yaml")
    return command("lm.export", lambda run: export(run, own.out), examples=examples, arguments=rest)


if __name__ == "__main__":
    sys.exit(main())
