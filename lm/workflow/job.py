"""One job of the grid: makes what is still missing of its artifacts, and writes a record of them as JSON.

A record has everything that the summary reads, so that no artifact is opened twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lm.base import ranks
from lm.base.command import Help, as_command, epilog, path
from lm.base.store import provenance
from lm.config import SFT, Config
from lm.stages.run import Run, command
from lm.workflow.record import ALPHAS, VERSION, Record, read
from lm.workflow.rules import MOST, around_end, at_edge, still_learning
from theory.records import write_json
from theory.shell import Parser


def base(run: Run) -> Record:
    """What all cells of a seed share: data, pi_ref and its evaluations, the oracle, labels."""
    from lm.stages.data import data
    from lm.stages.evaluations import check_prompts, chooses, evaluation, validation
    from lm.stages.labels import labels, oracle_held_out
    from lm.stages.predictors import shared_states
    from lm.stages.scores import unlabelled_scores
    from lm.stages.trainings import sft
    from lm.stages.unlabelled import distils_unlabelled
    from lm.stages.yardstick import best_of_n

    check_prompts(run)
    if chooses(run.config):
        validation(run, SFT, sft(run))  # here, as no two jobs may make one artifact
    if any(distils_unlabelled(run, method) for name in run.config.methods for method in run.config.settings(name)):
        unlabelled_scores(run)  # likewise: they are of no rho
    if _is_studied(run):
        shared_states(run)  # likewise
    drawn = run.config.evaluation.best_of is not None
    return {
        "seed": run.config.seed,
        "sft": evaluation(run, SFT).metrics,
        "oracle": oracle_held_out(run),
        "labels": labels(run).metrics,
        "data": data(run).metrics,
        **({"best_of_n": best_of_n(run)} if drawn else {}),
    }


def rewards(run: Run) -> Record:
    """The reward models alone, by which ways to train them are compared; of methods' own oracles nothing.

    Raises:
        ValueError: no method distils one.
    """
    made = _reward_models(run)
    if not made["reward_models"]:
        raise ValueError(f"methods {', '.join(run.config.methods)} distil no reward model; name one that does")
    return made


def _reward_models(run: Run) -> Record:
    from lm.stages.rewards import asked, reward_held_out
    from lm.stages.scores import on_test_pairs
    from lm.stages.subsets import bias

    of_subsets = bias(run).metrics
    return {
        "seed": run.config.seed,
        "rho": run.config.bias.rho,
        "reward_models": {
            name: {"accuracy": reward_held_out(run, name), **on_test_pairs(run, name), **of_subsets[name]}
            for name in asked(run)
            if name in of_subsets
        },
    }


def scores(run: Run) -> Record:
    """What all cells of a seed and a rho share: D_rho, the reward models, scores; and of the predictors what needs no
    policy."""
    from lm.stages.predictors import described, teacher
    from lm.stages.scores import everything

    everything(run)
    told = {"set": described(run), "teacher": teacher(run)} if _is_studied(run) else {}
    return {**_reward_models(run), **told}


def one_cell(run: Run) -> Record:
    """One method: trained in each of its settings, chosen on validation prompts, evaluated on test prompts."""
    from lm.reporting.results import cell
    from lm.stages.predictors import STUDENT, students

    made = cell(run, _method(run))
    told = _is_studied(run) and made["method"] == STUDENT
    return {**made, **({"students": students(run)} if told else {})}


def settled(run: Run, like: Record | None = None) -> Record:
    """`one_cell`, gone on with where `lm.workflow.rules` doubt it: with settings beyond an end of its sweep that it
    chose, at most MOST of them, and with twice the steps, once, where its student still learns.

    Args:
        run: its options.
        like: a record of the same cell, instead of making it; of what it chose all is made again.

    Returns:
        The record, of the grid's options; `settled` says what was added to them. `students` are of the first training.

    Raises:
        ValueError: the other record is of another cell, of other options, or settled already.
    """
    from lm.reporting.results import cell
    from lm.workflow.summary import check_options

    name, config = _method(run), run.config
    if like is not None:
        _check_same_cell(run, like)
        if "settled" in like:
            raise ValueError(f"--like is a cell that is settled already ({like['settled']}); name one that is not")
        own = json.loads(json.dumps(config.as_dict()))  # as a record has it
        check_options([like, {"job": "cell", "seed": config.seed, "method": name, "config": own}])
    made = dict(one_cell(run) if like is None else like)
    added: list[dict[str, Any]] = []
    while at_edge(made) and len(added) < MOST:
        end, beyond = around_end(made)
        more = cell(run.like(replace(config, sweep={name: [end, beyond]})), name)  # it chose the end of all others
        known = [(one["setting"], one["step"]) for one in made["validation"]]
        tried = [one for one in more["validation"] if (one["setting"], one["step"]) not in known]
        made |= {**more, "validation": [*made["validation"], *tried]}
        added.append(beyond)
    if longer := still_learning(made):
        every = [*config.sweep.get(name, [{}]), *added]
        made |= cell(run.like(_longer(replace(config, sweep={name: every}))), name)
    kept = {key: made[key] for key in made if key not in COMMON}
    return {**kept, "settled": {"settings": added, "longer": longer}}


def _longer(config: Config) -> Config:
    """With twice the steps."""
    length = {name: getattr(config.policy, name) for name in ("epochs", "max_steps")}  # one of them is None
    twice = {name: 2 * value for name, value in length.items() if value is not None}
    return replace(config, policy=replace(config.policy, **twice))


def _check_same_cell(run: Run, like: Record) -> None:
    name, config = _method(run), run.config
    if like["job"] != "cell":
        raise ValueError(f"--like must be the record of a cell, got one of {like['job']}")
    here, there = (name, config.seed, config.bias.rho), (like["method"], like["seed"], like["rho"])
    if here != there:
        raise ValueError(f"--like is a cell of {there} (method, seed, rho), but the options ask for {here}")


def constant_alpha(run: Run, like: Record, alpha: float) -> Record:
    """The method of another cell in the setting chosen there, but with a constant weight of the KL term.

    Args:
        run: the other cell's options.
        like: the other cell's record.
        alpha: weight of the KL term throughout training, >= 0.

    Raises:
        ValueError: the record is no cell's, the cell is of another method, seed or rho, or holds its KL at a target, or
            the method has no KL term.
    """
    from lm.reporting.results import cell

    _check_same_cell(run, like)
    name, config = _method(run), run.config
    option, chosen = config.method(name).pessimism_option, like["chosen"]["setting"]
    if option is None:
        raise ValueError(f"--constant goes with a method that has a KL term, which {name} has not")
    if (target := chosen[option].get("target")) is not None:
        raise ValueError(
            f"--like is a cell whose KL is held at {option}.target {target:g}; a constant alpha replaces a schedule"
        )
    setting = {**chosen, option: {**chosen[option], **dict.fromkeys(ALPHAS, alpha)}}
    same = replace(config, sweep={name: [setting]})
    if like.get("settled", {}).get("longer"):
        same = _longer(same)
    return {**cell(run.like(same), name), "alpha": alpha}


def _is_studied(run: Run) -> bool:
    """Whether predictors are told: of the embedded world alone, where rules are learnt, and on a small model."""
    return run.config.data.kind == "world"


def _method(run: Run) -> str:
    names = run.config.methods
    if len(names) != 1:
        raise ValueError(f"methods must name the cell's one method, got {names}")
    return names[0]


JOBS: dict[str, Callable[[Run], Record]] = {"base": base, "rewards": rewards, "scores": scores, "cell": one_cell}
COMMON = ("config", "stages", "provenance", "version", "job")
"""What every record has."""


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = Parser(
        prog="python -m lm.workflow.job",
        usage="%(prog)s {base,rewards,scores,cell,alpha} --out FILE [--settle] [--like FILE --constant ALPHA] "
        "[OPTION OF lm.train ...]",
        description=__doc__,
        epilog="All options of `python -m lm.train` may follow; it explains them with --help.\n\n"
        + epilog("lm.workflow.job", ("cell --out cell.json --seed 1 --bias.rho 0.2 --methods '[e-dpo]'",)),
        formatter_class=Help,
    )
    parser.add_argument(
        "job", choices=[*JOBS, "alpha"], help="which part of the grid; rewards: the reward models alone"
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="where the record goes")
    parser.add_argument(
        "--like",
        type=path,
        metavar="FILE",
        help="record of a cell: alpha takes its setting, --settle goes on from it instead of making it",
    )
    parser.add_argument("--constant", type=float, metavar="ALPHA", help="weight of the KL term; alpha only")
    parser.add_argument(
        "--settle",
        action="store_true",
        help="go on where the sweep ends at the setting that was chosen, and where the student still learns; cell only",
    )
    ours, options = parser.parse_known_args(arguments)
    if (ours.constant is not None) != (ours.job == "alpha") or (ours.job == "alpha" and ours.like is None):
        parser.error("--constant goes with alpha, and alpha with --like and --constant")
    if ours.settle and ours.job != "cell":
        parser.error(f"--settle goes with cell, and not with {ours.job}")
    if ours.like is not None and ours.job != "alpha" and not ours.settle:
        parser.error("--like goes with alpha, or with cell --settle")

    def record(run: Run) -> None:
        like = None if ours.like is None else read(ours.like)
        if like is not None and ours.job == "alpha":
            made = constant_alpha(run, like, ours.constant)
        else:
            made = settled(run, like) if ours.settle else JOBS[ours.job](run)
        if not ranks.is_first():
            return
        config = run.config
        before = like.get("stages") if like is not None and ours.settle else None
        spent = [*(before or []), *run.store.costs()]
        common = {"config": config.as_dict(), "stages": spent, "provenance": provenance(config.seed)}
        write_json(ours.out, {"version": VERSION, "job": ours.job, **made, **common})

    return command("lm.workflow.job", record, shared=True, arguments=options)


if __name__ == "__main__":
    sys.exit(main())
