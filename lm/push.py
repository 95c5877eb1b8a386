"""Uploads a policy of a finished run to the Hugging Face hub, with its model card as README.md.

One commit with what `transformers` reads, without snapshots of other steps and without artifact.json, which names this
machine. The token is the environment's HF_TOKEN, or that of `hf auth login`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm.base.command import argument_parser, as_command, path
from lm.objectives import METHODS


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser(
        "lm.push",
        __doc__,
        "runs/demo e-dpo --repo-id me/e-dpo-demo --private",
        "runs/helpfulness hull-dpo --repo-id my-lab/qwen-hull-dpo",
    )
    parser.add_argument("run", metavar="RUN", type=path, help="output_dir of a finished run")
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="repository on the hub, made if needed")
    parser.add_argument("--private", action="store_true", help="for nobody else; refused if it is there and public")
    options = parser.parse_args(arguments)
    from lm.reporting.hub import push

    print(push(options.run, options.method, options.repo_id, private=options.private))


if __name__ == "__main__":
    sys.exit(main())
