"""What a run will cost on GPUs, by arithmetic and before it is started: tokens, operations, hours, memory, disk.

    python -m lm.estimate --parameters 7e9 [--gpu h100] [--utilisation 0.3] [--rhos 7] [options of lm.train]

Nothing is measured. Operations are counted as 2 a parameter and token of a forward pass; a backward is two forwards,
or one where only adapters are trained (`lora`), and activation checkpointing a third. The utilisation is an assumption
of the reader's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm.base.command import argument_parser, as_command
from lm.studies.estimate import GPUS, Cost, render


@as_command
def main(arguments: Sequence[str]) -> None:
    """Prints the estimate."""
    parser = argument_parser(
        "lm.estimate",
        "What a run will cost on GPUs, by arithmetic. Other options are lm.train's; see its --help.",
        "--parameters 1e9 --config tldr",
        "--parameters 7e9 --gpu a100 --rhos 7 --config helpfulness",
    )
    parser.add_argument("--parameters", type=float, required=True, metavar="N", help="of every model, e.g. 7e9")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default: %(default)s")
    parser.add_argument("--utilisation", type=float, default=0.3, metavar="SHARE", help="of its peak (%(default)s)")
    parser.add_argument("--rhos", type=int, default=1, metavar="COUNT", help="rho's of the grid (%(default)s)")
    own, rest = parser.parse_known_args(arguments)
    if not 0 < own.utilisation <= 1:
        raise ValueError(f"--utilisation must be above 0 and at most 1, got {own.utilisation}")
    for name in ("parameters", "rhos"):
        if not 1 <= getattr(own, name) < float("inf"):
            raise ValueError(f"--{name} must be a finite number >= 1, got {getattr(own, name)}")
    from lm.base.options import parse

    config, _ = parse("lm.estimate", parser.description or "", rest)
    cost = Cost(config=config, parameters=own.parameters, gpu=GPUS[own.gpu], utilisation=own.utilisation)
    print(render(cost, own.gpu, own.rhos))


if __name__ == "__main__":
    sys.exit(main())
