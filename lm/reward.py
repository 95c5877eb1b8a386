"""Trains the reward models that the methods distil, and prints how well each orders held-out pairs."""

import sys

from lm.stages.run import Run, command

CLASSES = ("all", "longer", "shorter", "neither")


def work(run: Run) -> None:
    """Trains what is missing. Prints the folder of each model, which `lm.score --reward-model` takes, and the share of
    validation pairs that it orders as labelled: of all, and by which completion is preferred."""
    from lm.base import ranks
    from lm.stages.rewards import asked, reward_artifact

    if not (models := [reward_artifact(run, name) for name in asked(run)]):
        raise ValueError(f"methods {', '.join(run.config.methods)} distil no rewards: no reward model is asked for")
    if not ranks.is_first():
        return
    # Not a rich table, which would cut paths to the terminal's width.
    width = max(len(str(model.path)) for model in models)
    print("Share of validation pairs ordered as labelled, by which completion is preferred")
    print(f"{'':<{width}}", *(f"{name:>8}" for name in CLASSES))
    for model in models:
        shares = [model.metrics["accuracy"][name]["accuracy"] for name in CLASSES]
        print(f"{model.path!s:<{width}}", *(f"{'-' if share is None else format(share, '.3f'):>8}" for share in shares))


if __name__ == "__main__":
    sys.exit(command("lm.reward", work))
