"""Writes scored pairs to --out FILE (.jsonl, .jsonl.gz or .parquet) for others, with --ids or --samples of pi_ref.

--force overwrites FILE; all other options are the run's, as for `lm.score`. A row has the columns of
docs/scored-files.md: prompt, chosen and rejected as the set had them: text, or messages (and tools), which another
model's own template then writes; beside messages, or by --ids, the ids of the tokens that this run's template made of
them (prompt_ids, chosen_ids, rejected_ids); by --samples these, and what pi_ref drew of each prompt (sample_ids,
ref_sample_logps), which p-DPO, dp-DPO, e-DPO and hull-DPO need. Further its split in the run ("train", of every row),
the reward of each side by the model of D_rho (chosen_reward, rejected_reward), their difference (reward_margin), the
rewards by the ensemble's members (chosen_member_rewards, rejected_member_rewards: lists in the order of
`bias.member_fractions`), each where a method of `methods` distils it, and the summed log-probs of both sides under
pi_ref (ref_chosen_logps, ref_rejected_logps), in nats, with end-of-text; of a set with soft labels, votes, weights or
groups also the labels, chosen_probability and weight (`lm.data.votes`). `data.kind preferences` with `data.rewards
given` and `data.split own` reads it back, and holds out some of its rows, on which the run's own models were trained.
Drawn anew by the seed of that run, all rows would be for training again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.base.command import add_force, as_command, check_free, own_options
from lm.base.files import expanded
from lm.stages.run import Run, command
from theory.shell import Parser


def export(run: Run, out: Path, *, ids: bool = False, samples: bool = False) -> None:
    """Writes `lm.stages.scores.export_rows` to a .jsonl, .jsonl.gz or .parquet file. ValueError for another type."""
    from lm.base import progress, ranks
    from lm.data.rows import check_suffix, write_rows
    from lm.stages.scores import export_rows

    check_suffix(out)
    rows = export_rows(run, ids=ids, samples=samples)  # by all ranks
    if not ranks.is_first():
        return
    write_rows(out, progress.bar("writing", rows))
    progress.say(f"written: {out}")


def _check(own: argparse.Namespace) -> None:
    if own.out is None:
        raise ValueError("--out FILE is needed: .jsonl, .jsonl.gz or .parquet")
    own.out = Path(expanded(own.out))
    check_free("--out", own.out, force=own.force)


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = Parser(prog="python -m lm.export", usage="%(prog)s --out FILE [OPTION OF lm.train ...]", add_help=False)
    parser.add_argument("--out", metavar="FILE", help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--ids", action="store_true", help="also the ids of the tokens that the log-probs are of")
    parser.add_argument("--samples", action="store_true", help="also pi_ref's samples, as many as the run has, and ids")
    add_force(parser)
    own, rest = own_options(parser, arguments, _check)
    examples = (
        "--out scored.jsonl",
        "--out scored.parquet --config runs/demo/config.yaml",
        "--out scored.parquet --samples --config runs/demo/config.yaml",
    )
    action = lambda run: export(run, own.out, ids=own.ids, samples=own.samples)  # noqa: E731
    return command("lm.export", action, examples=examples, arguments=rest)


if __name__ == "__main__":
    sys.exit(main())
