"""Trains the reward models that the methods distil; prints how well each orders held-out pairs, and is calibrated."""

import sys

from lm.stages.run import Run, command

CLASSES = ("all", "longer", "shorter", "neither")
HOW_SURE = {"loss": "loss", "error": "calibration_error"}


def work(run: Run) -> None:
    """Trains what is missing. Prints the folder of each model, which `lm.score --reward-model` takes, the share of
    validation pairs that it orders as labelled, of all and by which completion is preferred, its Bradley-Terry loss on
    them, nats, and its expected calibration error."""
    from lm.base import ranks
    from lm.stages.rewards import asked, reward_artifact
    from lm.stages.trainings import as_reported

    if not (models := [reward_artifact(run, name) for name in asked(run)]):
        raise ValueError(f"methods {', '.join(run.config.methods)} distil no rewards: no reward model is asked for")
    if not ranks.is_first():
        return
    # Not a rich table, which would cut paths to the terminal's width.
    width = max(len(str(model.path)) for model in models)
    print(
        "Share of validation pairs ordered as labelled, by which completion is preferred; Bradley-Terry loss in nats;"
    )
    print("expected calibration error")
    print(f"{'':<{width}}", *(f"{name:>8}" for name in (*CLASSES, *HOW_SURE)))
    for model in models:
        told = as_reported(model.metrics)
        values = [told[name]["accuracy"] for name in CLASSES]
        values += [told.get("calibration", {}).get(key) for key in HOW_SURE.values()]
        print(f"{model.path!s:<{width}}", *(f"{'-' if value is None else format(value, '.3f'):>8}" for value in values))


if __name__ == "__main__":
    sys.exit(command("lm.reward", work))
