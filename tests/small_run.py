"""`lm.train` with a model of next to no size, for tests that start processes. Takes its options.

NAN_AT=<step> in the environment: the second rank's loss at that step of e-DPO's training is not a number.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor

from lm.models import loading as models
from lm.reporting.results import report
from lm.stages.run import command
from lm.training.policy import PolicyTrainer

SMALL = {**models.SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400}


def fail_at(step: int) -> None:
    """As NAN_AT says."""
    losses = PolicyTrainer.losses

    def losses_or_nan(trainer: PolicyTrainer, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        fails = (trainer.state.global_step, trainer.args.process_index) == (step, 1)
        each, logged = losses(trainer, *arguments)
        return each * (float("nan") if fails else 1.0), logged

    PolicyTrainer.losses = losses_or_nan  # type: ignore[method-assign]


if __name__ == "__main__":
    models.SCRATCH["scratch:tiny"] = SMALL
    if "NAN_AT" in os.environ:
        fail_at(int(os.environ["NAN_AT"]))
    sys.exit(command("lm.train", report))
