"""What `lm.advise` fits on a set: a frozen reward head and a short DPO, from which it reads the predictors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset

from figures.paths import RESULTS
from figures.studies import StudyResults, read_study
from lm.data import votes
from lm.data.columns import digests, numbered, numbers
from lm.objectives import MAIN
from lm.stages.predictors import described, students, teacher
from lm.stages.run import Run
from lm.stages.subsets import bias, subset
from lm.studies.advice import Advice, advised, predictors
from lm.studies.agreement import agreement

STUDY = RESULTS / "study.json"
"""That comes with the package, once there is one."""


def study_of(path: Path | None) -> StudyResults | None:
    """The results of a study, those of STUDY where no file is named; None where that is not there.

    Raises FileNotFoundError or ValueError for a file that is not there, or is something else.
    """
    if path is None:
        return read_study(STUDY) if STUDY.is_file() else None
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; `python -m lm.workflow.regimes` writes one")
    return read_study(path)


def advice(run: Run, data: str, study: StudyResults | None, name: str | None) -> Advice:
    """Fits what is not fitted yet, and tells what follows.

    Args:
        run: of the one method DPO, on a set.
        data: what the set is called.
        study: with whose worlds it is compared; None where there is none.
        name: what that is called.

    Raises ValueError where no training pair has a longer completion.
    """
    counts = bias(run).metrics[MAIN]
    longer, shorter = counts["longer_preferred"], counts["shorter_preferred"]
    if not longer + shorter:
        raise ValueError(f"{data}: no training pair has a longer completion, and lengths are what predictors are about")
    of_set = described(run)
    if of_set["disagreement"] is None:
        of_set["disagreement"] = repeated_disagreement(subset(run, MAIN))
    of_teacher, (student, *_) = teacher(run), students(run)
    found = predictors(of_set, of_teacher, student, longer / (longer + shorter))
    return Advice(
        data=data,
        model=run.config.model,
        pairs=of_set["pairs"],
        prompts=of_set["prompts"],
        predictors=found,
        teacher=of_teacher,
        student=student,
        study=name,
        effects=[] if study is None else advised(found, study.sets, study.regimes),
    )


def repeated_disagreement(pairs: Dataset) -> float | None:
    """How likely two labels of one pair differ, as of `lm.studies.agreement.agreement`, by rows with the same
    prompt and the same two completions; None where no pair stands there twice."""
    keys, first = [], []
    soft = votes.PROBABILITY in pairs.column_names
    chances = numbers(pairs, votes.PROBABILITY) if soft else np.ones(len(pairs))
    columns = (pairs[name][:] for name in ("prompt", *votes.SIDES))
    for prompt, one, other, chance in zip(*columns, chances.tolist(), strict=True):
        keys.append("\0".join((prompt, *sorted((one, other)))))
        first.append(chance if one <= other else 1 - chance)
    which, _ = numbered(digests(keys))
    return agreement(which, np.array(first), np.ones(len(pairs)), chances).disagreement
