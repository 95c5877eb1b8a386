"""Writes the scored pairs of D_rho for other trainers to --out FILE (.jsonl, .jsonl.gz or .parquet).

All other options are the run's, as for `lm.score`. A row has prompt, chosen and rejected as text, the
reward of each side by the model of D_rho (score_chosen, score_rejected) and their margin, the rewards by the members of
the ensemble (chosen_rewards, rejected_rewards: lists, in the order of `bias.member_fractions`; absent without an
ensemble), and the summed log-probs of both sides under pi_ref (ref_chosen_logps, ref_rejected_logps), in nats, with
end-of-text. `data.kind preferences` with `data.rewards given` reads it back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from lm import progress, ranks
from lm.data import check_suffix, write_rows
from lm.pipeline import MAIN, Pipeline


def scored_rows(pipeline: Pipeline) -> Iterator[dict[str, Any]]:
    """The rows of D_rho, in the order of the scores; makes what is missing of the run up to these."""
    scores = datasets.load_from_disk(str(pipeline.scores.path / "pairs"))
    for text, score in zip(pipeline.subset(MAIN), scores, strict=True):
        if text["id"] != score["id"]:
            raise RuntimeError(f"row {text['id']} has the scores of {score['id']}")
        (chosen, *chosen_members), (rejected, *rejected_members) = score["chosen_rewards"], score["rejected_rewards"]
        ensemble = {"chosen_rewards": chosen_members, "rejected_rewards": rejected_members} if chosen_members else {}
        yield {
            **{name: text[name] for name in ("id", "prompt", "chosen", "rejected")},
            "score_chosen": chosen,
            "score_rejected": rejected,
            "margin": chosen - rejected,
            **ensemble,
            **{name: score[name] for name in ("ref_chosen_logps", "ref_rejected_logps")},
        }


def export(pipeline: Pipeline, out: Path) -> None:
    """Writes `scored_rows` to a .jsonl, .jsonl.gz or .parquet file. ValueError for another type of file."""
    check_suffix(out)
    _ = pipeline.scores  # by all ranks
    if not ranks.is_first():
        return
    write_rows(out, scored_rows(pipeline))
    progress.say(f"written: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    from lm.cli import run

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    own, rest = parser.parse_known_args(arguments)
    if own.out is None and not {"-h", "--help"} & set(rest):
        print("error: --out FILE is needed: .jsonl, .jsonl.gz or .parquet", file=sys.stderr)
        return 2
    examples = ("--out scored.jsonl", "--out scored.parquet --config runs/demo/config.yaml")
    return run("lm.export", lambda pipeline: export(pipeline, own.out), examples=examples, arguments=rest)


if __name__ == "__main__":
    sys.exit(main())
