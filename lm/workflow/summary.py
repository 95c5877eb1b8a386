"""Sums the grid's records up as one small JSON file, from which figures and tables are drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, fields, is_dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from scipy import stats

from figures.studies import VERSION
from lm.base import progress
from lm.base.command import argument_parser, as_command, path
from lm.base.store import provenance
from lm.config import SFT, Config
from lm.judging.statistics import wald, win_rates
from lm.models.gguf import is_kept
from lm.objectives import MAIN, METHODS, looks, option_of
from lm.workflow.record import ALPHAS, Record, read, rho_name
from lm.workflow.rules import at_edge, still_learning
from lm.workflow.stage_tables import told
from theory.records import write_text

MODELS = ("model", "oracle_model", "oracle_base", "reward_base")
"""Options that name one."""
Differences = dict[str, list[np.ndarray]]
"""Of each method, oracle rewards minus those of pi_ref: [N] of the test prompts, an array a seed."""


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Everything of a grid that is reported, floats to six significant digits.

    `advantages` are means over the test prompts of all seeds. Their intervals come from a bootstrap over prompts within
    seeds: they cover the choice of prompts and the draw of completions, and not what another seed's world and training
    would give; `by_seed` shows that. `wald` and `wins` pool the prompts of all seeds likewise.

    `less_dpo` is each method less DPO: log-ratios to pi_ref of the test pairs' winners and losers, nats, and accuracy,
    pair by pair, and the advantage, prompt by prompt. The bootstrap draws prompts with all their pairs. Its seeds are
    those whose cells all have pairs, which records of earlier versions lack; it is None where there are none. Seeds
    split one set anew, so that a pair may be in several: by_seed shows what each gives.

    Args:
        records: of `lm.workflow.job`, in any order.

    Raises:
        ValueError: a record is missing, there twice, of other options than the first, or of other test samples of
            pi_ref than the other cells of its seed.
    """
    check_options(records)
    cells = _by(records, "cell", "seed", "rho", "method")
    if not cells:
        raise ValueError("there are no cells among the records")
    seeds, rhos = sorted({key[0] for key in cells}), sorted({key[1] for key in cells}, key=_last_if_none)
    methods = [name for name in METHODS if any(key[2] == name for key in cells)]
    bases, scores = _by(records, "base", "seed"), _by(records, "scores", "seed", "rho")
    _check_complete("cell", cells, ((s, r, m) for s in seeds for r in rhos for m in methods))
    _check_complete("base", bases, ((s,) for s in seeds))
    _check_complete("scores", scores, ((s, r) for s in seeds for r in rhos))
    _check_paired(cells)
    _check_settled(cells)

    def pooled(rho: float | None, of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Differences:
        """of(rewards of the method, rewards of pi_ref) by method and seed."""
        rewards = {name: [cells[seed, rho, name]["rewards"] for seed in seeds] for name in methods}
        return {name: [of(np.array(r[name]), np.array(r[SFT])) for r in rewards[name]] for name in methods}

    in_order = sorted(scores.items(), key=lambda item: (item[0][0], _last_if_none(item[0][1])))
    config = dict(records[0]["config"]["evaluation"])
    differences = {rho: pooled(rho, np.subtract) for rho in rhos}
    rewards = {rho: pooled(rho, lambda own, _: own) for rho in rhos}
    reference = np.concatenate([cells[seed, rhos[0], methods[0]]["rewards"][SFT] for seed in seeds])
    document = {
        "seeds": seeds,
        "rhos": rhos,
        "methods": methods,
        "looks": looks(methods),
        "members": [
            name
            for name in scores[seeds[0], rhos[0]]["reward_models"]
            if name != MAIN and all(name in record["reward_models"] for record in scores.values())
        ],
        "confidence": config["confidence"],
        "sft": {str(seed): bases[seed,]["sft"] for seed in seeds},
        "base": {str(seed): _base(bases[seed,]) for seed in seeds},
        "advantages": {
            rho_name(rho): {name: _mean(values, config, "advantage") for name, values in differences[rho].items()}
            for rho in rhos
        },
        "less_dpo": _less_dpo(cells, seeds, rhos, methods),
        "wald": {rho_name(rho): _wald(differences[rho]) for rho in rhos},
        "wins": {rho_name(rho): _wins(rewards[rho], reference) for rho in rhos},
        "reward_models": [
            {"seed": seed, "rho": rho, "name": name, **model}
            for (seed, rho), record in in_order
            for name, model in record["reward_models"].items()
        ],
        "sets": [
            {"seed": seed, "rho": rho, **record["set"], "teacher": record["teacher"]}
            for (seed, rho), record in in_order
            if "set" in record
        ],
        "alpha": _alphas(_by(records, "alpha", "seed", "rho", "method", "alpha"), cells),
        "cells": [_cell(cells[s, r, m]) for s in seeds for r in rhos for m in methods],
        "stages": _spent(records),
        "config": _shared(records),
        "provenance": _provenance(records, seeds),
    }
    whole: dict[str, Any] = rounded(_without_places(document, records))
    return whole


def _without_places(value: Any, records: Sequence[Record]) -> Any:
    """With files and folders of the options, which are of no use elsewhere, by their last names."""
    options = [record["config"] for record in records]
    files = [one for each in options for one in (each.get("data") or {}).values()]
    named = [*files, *(each.get(name) for each in options for name in MODELS)]
    places = {f"{Path(one).parent}/" for one in named if isinstance(one, str) and Path(one).is_absolute()}

    def shortened(value: Any) -> Any:
        if isinstance(value, str):
            place = max((one for one in places if value.startswith(one)), key=len, default="")
            return value.removeprefix(place)
        if isinstance(value, Mapping):
            return {key: shortened(item) for key, item in value.items()}
        return [shortened(item) for item in value] if isinstance(value, list | tuple) else value

    return shortened(value)


def _base(record: Record) -> dict[str, Any]:
    """What is kept of a seed's base."""
    return {key: record[key] for key in ("oracle", "labels", "data", "best_of_n") if key in record}


def _last_if_none(rho: float | None) -> tuple[bool, float]:
    return rho is None, rho or 0.0


def _by(records: Iterable[Record], job: str, *names: str) -> dict[tuple[Any, ...], Record]:
    """Records of one job by what tells them apart."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record["job"] == job:
            key = tuple(record[name] for name in names)
            if key in found:
                raise ValueError(f"there are two {job} records of {_named(key)}; one is needed")
            found[key] = record
    return found


def _named(key: Iterable[Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(("seed", "rho", "method", "alpha"), key, strict=False))


def _check_complete(job: str, found: Mapping[Any, Record], needed: Iterable[tuple[Any, ...]]) -> None:
    for key in needed:
        if key not in found:
            raise ValueError(f"the {job} record of {_named(key)} is missing; run the workflow to its end")


def _without_own(record: Record) -> dict[str, Any]:
    """The options of a record but for those in which a grid's records may differ. Seeds may be run elsewhere: a model
    that was read from a GGUF file, whose folder is named by its content, is named by that alone."""
    own = {"seed", "methods", "output_dir", "report_to"}
    options = {name: value for name, value in record["config"].items() if name not in own}
    for name, value in options.items():
        if name in MODELS and value is not None and is_kept(value, record["config"]["output_dir"]):
            options[name] = Path(value).name
    return {**options, "bias": {name: value for name, value in options["bias"].items() if name != "rho"}}


def _shared(records: Sequence[Record]) -> dict[str, Any]:
    """The options of a grid: those that all its records have in common, and each method's own as in its cells."""
    methods = {option_of(name) for name in METHODS}
    options = {name: value for name, value in _without_own(records[0]).items() if name not in methods}
    sweep: dict[str, Any] = {}
    for record in records:
        if name := record.get("method"):
            options |= {key: record["config"][key] for key in (option_of(name),) if key in record["config"]}
            sweep |= {key: tried for key, tried in record["config"].get("sweep", {}).items() if key == name}
    return {**options, "sweep": sweep}


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record, as `Config.as_dict` gives them, with those that have come since it was written, at the
    defaults, which change nothing, and without those that did nothing and are no more.

    Raises:
        ValueError: an option that is no more, and did something.
    """
    import yaml

    from lm.base.documents import without_retired  # here, as it needs an extra, which a message then names

    try:
        whole = _filled(Config, without_retired(deepcopy(dict(options))))
    except yaml.YAMLError as error:
        raise ValueError(f"a record cannot be summed up: {error}") from None
    del whole["options"]
    return whole | {option_of(name): _filled(kind, whole.get(option_of(name), {})) for name, kind in METHODS.items()}


def _filled(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of a dataclass, at every level."""
    hints, whole = get_type_hints(kind), dict(options)
    for option in fields(kind):
        name = option.name
        if is_dataclass(hints[name]) and isinstance(whole.get(name), Mapping):
            whole[name] = _filled(hints[name], whole[name])
        elif name not in whole:
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if default is not MISSING:
                whole[name] = json.loads(json.dumps(default, default=asdict))  # as a record has it
    return whole


def check_options(records: Sequence[Record]) -> None:
    """Of a method's own options, its sweep among them, only its cells are asked: no number of others depends on them.

    Raises:
        ValueError: there are no records, or one was made with other options than the first that it is to agree with.
    """
    if not records:
        raise ValueError("a summary needs the records of a grid, got none")
    for record in records:
        if record["job"] == "rewards":
            raise ValueError(f"{_told(record)} is of reward models alone, which are no part of a grid; leave it out")
    found: dict[str | None, tuple[Record, dict[str, Any]]] = {}
    for record in records:
        common, own = _options(record)
        of_kinds: list[tuple[str | None, dict[str, Any]]] = [(None, common)]
        of_kinds += [(record["method"], own)] if own else []
        for kind, options in of_kinds:
            first, expected = found.setdefault(kind, (record, options))
            if options != expected:
                raise ValueError(
                    f"{_told(record)} was made with other options ({_differences(expected, options)}) than "
                    f"{_told(first)}; make one of them again, or leave it out"
                )


def _told(record: Record) -> str:
    which = ", ".join(f"{key} {record[key]}" for key in ("seed", "rho", "method", "alpha") if key in record)
    return f"the {record['job']} record of {which}"


def _differences(expected: Mapping[str, Any], options: Mapping[str, Any], within: str = "") -> str:
    """The options that differ, with both values."""
    told = []
    for name in dict.fromkeys((*expected, *options)):
        first, here = (one.get(name, MISSING) for one in (expected, options))
        if isinstance(first, Mapping) and isinstance(here, Mapping):
            if first != here:
                told.append(_differences(first, here, f"{within}{name}."))
        elif first != here:
            values = " and not ".join("nothing" if one is MISSING else f"{one!r}" for one in (here, first))
            told.append(f"{within}{name} {values}")
    return ", ".join(told)


def _options(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all records of a grid have in common, and what those of its method have, which is nothing without one."""
    try:
        common = with_defaults(_without_own(record))
    except ValueError as error:
        raise ValueError(f"the {record['job']} record of seed {record['seed']}: {error}") from None
    methods = {name: common.pop(option_of(name)) for name in METHODS}
    sweep = common.pop("sweep")
    name = record.get("method")
    return common, {} if name is None else {option_of(name): methods[name], f"sweep.{name}": sweep.get(name)}


def _check_paired(cells: Mapping[tuple[Any, ...], Record]) -> None:
    """The same samples of pi_ref mean the same prompts in the same order; of pairs there is a digest."""
    first: dict[tuple[str, int], Any] = {}
    for (seed, rho, method), record in cells.items():
        here = _named((seed, rho, method))
        if record["rewards"][SFT] != first.setdefault((SFT, seed), record["rewards"][SFT]):
            raise ValueError(f"the cell of {here} has other test samples of pi_ref than others")
        pairs = record.get("pairs")
        own = pairs and (pairs["digest"], pairs["prompt"])
        if pairs and own != first.setdefault(("pairs", seed), own):
            raise ValueError(f"the cell of {here} has other test pairs (pairs.digest, pairs.prompt) than others")


def _check_settled(cells: Mapping[tuple[Any, ...], Record]) -> None:
    """Where one cell was settled, each is that the rules doubt."""
    if not any("settled" in record for record in cells.values()):
        return
    for key, record in cells.items():
        if "settled" not in record and (at_edge(record) or still_learning(record)):
            raise ValueError(
                f"the cell of {_named(key)} chose an end of its sweep or still learns, and others were gone on with; "
                "go on from it with `python -m lm.workflow.job cell --settle --like RECORD`"
            )


def _cell(record: Record) -> Record:
    """What is kept of a cell: no rewards, and of the settings tried no group of options that all have in common."""
    settings = [row["setting"] for row in record["validation"]]
    common = {
        name
        for name, value in (settings[0] if settings else {}).items()
        if isinstance(value, dict) and all(setting[name] == value for setting in settings)
    }
    tried = [
        {**row, "setting": {key: value for key, value in row["setting"].items() if key not in common}}
        for row in record["validation"]
    ]
    kept = {key: record[key] for key in ("seed", "rho", "method", "chosen", "test")}
    more = [key for key in ("students", "settled") if key in record]
    return {**kept, "validation": tried, "probe": record["probe"], **{key: record[key] for key in more}}


def _mean(
    by_seed: Sequence[np.ndarray],
    config: Mapping[str, Any],
    name: str = "mean",
    groups: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Over the values of all seeds, [N] a seed: the mean, by this name, its interval by a bootstrap within seeds, and
    the means of the seeds. With groups, [N] a seed, numbered from 0, it draws these, each with all its values."""
    pooled = np.concatenate(by_seed)
    if np.ptp(pooled) == 0:
        interval = [float(pooled[0])] * 2
    else:
        of = [np.asarray(own) for own in groups or [range(len(values)) for values in by_seed]]
        sums = [np.bincount(own, values) for own, values in zip(of, by_seed, strict=True)]
        counts = [np.bincount(own) for own in of]

        def mean(*drawn: np.ndarray, axis: int) -> np.ndarray:
            total, count = (
                sum(values[own].sum(axis) for values, own in zip(each, drawn, strict=True)) for each in (sums, counts)
            )
            return np.asarray(total / count)

        low, high = stats.bootstrap(
            [np.arange(len(values)) for values in sums],
            mean,
            confidence_level=config["confidence"],
            n_resamples=config["resamples"],
            batch=1000,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        ).confidence_interval
        interval = [float(low), float(high)]
    return {
        name: float(pooled.mean()),
        "ci": interval,
        "by_seed": [float(values.mean()) for values in by_seed],
        "n": len(pooled),
    }


OF_PAIRS = ("chosen_logratio", "rejected_logratio", "accuracy")
"""What a cell's record has of each test pair."""


def _less_dpo(
    cells: Mapping[tuple[Any, ...], Record], seeds: Sequence[int], rhos: Sequence[float | None], methods: Sequence[str]
) -> dict[str, Any] | None:
    without = {seed for (seed, _, _), record in cells.items() if record.get("pairs") is None}
    seeds = [seed for seed in seeds if seed not in without]
    if "dpo" not in methods or not seeds:
        return None

    def less(rho: float | None, method: str) -> dict[str, Any]:
        records = [(cells[seed, rho, method], cells[seed, rho, "dpo"]) for seed in seeds]
        prompts = [own["pairs"]["prompt"] for own, _ in records]
        found = {key: [np.subtract(*(record["pairs"][key] for record in both)) for both in records] for key in OF_PAIRS}
        rewards = [np.subtract(own["rewards"][method], dpo["rewards"]["dpo"]) for own, dpo in records]
        of_pairs = {key: _mean(values, config, groups=prompts) for key, values in found.items()}
        return {**of_pairs, "advantage": _mean(rewards, config)}

    config = next(iter(cells.values()))["config"]["evaluation"]
    others = [method for method in methods if method != "dpo"]
    return {"seeds": seeds, "rhos": {rho_name(rho): {method: less(rho, method) for method in others} for rho in rhos}}


def _wald(differences: Differences) -> dict[str, Any]:
    pooled = {name: np.concatenate(values) for name, values in differences.items()}
    return {f"{one} - {other}": wald(pooled[one] - pooled[other]) for one, other in combinations(pooled, 2)}


def _wins(rewards: Differences, reference: np.ndarray) -> dict[str, Any]:
    """Win, tie and loss by the oracle, against pi_ref and against the chosen DPO."""
    pooled = {name: np.concatenate(values) for name, values in rewards.items()}
    against = {SFT: reference, **({"dpo": pooled["dpo"]} if "dpo" in pooled else {})}
    return {
        name: {other: win_rates(values, baseline) for other, baseline in against.items() if other != name}
        for name, values in pooled.items()
    }


def _alphas(constants: Mapping[tuple[Any, ...], Record], cells: Mapping[tuple[Any, ...], Record]) -> list[Any]:
    """Figure B.5: cells with a constant alpha, each group after the cell whose annealed alpha they replace."""
    order = sorted(constants, key=lambda key: (key[0], _last_if_none(key[1]), *key[2:]))
    groups = dict.fromkeys(key[:3] for key in order)
    _check_complete("cell", cells, groups)
    for key in order:
        ours, theirs = (_without_alphas(record) for record in (constants[key], cells[key[:3]]))
        if ours != theirs:
            raise ValueError(
                f"the alpha record of {_named(key)} is of the setting {ours}, but its cell chose {theirs}; delete it, "
                "and run the workflow again"
            )
    chosen = [cells[group] for group in groups] + [constants[key] for key in order]
    return [
        {
            **{key: record[key] for key in ("seed", "rho", "method")},
            "alpha": {key: _term(record)[key] for key in ALPHAS},
            "chosen": record["chosen"],
            "test": record["test"],
        }
        for record in sorted(chosen, key=lambda r: (r["seed"], _last_if_none(r["rho"]), r["method"]))
    ]


def _spent(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What each stage took, over all artifacts that the jobs asked for, each counted once: how many, wall and CPU
    hours, the largest peak of memory, bytes. Those that were not measured are left out."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for one in told(records):
        stages.setdefault(one["stage"], []).append(one)
    return [
        {
            "stage": stage,
            "artifacts": len(every),
            "wall_hours": sum(one["wall_seconds"] for one in every) / 3600,
            "cpu_hours": sum(one["cpu_seconds"] for one in every) / 3600,
            "peak_bytes": max(one["peak_bytes"] for one in every),
        }
        for stage, every in stages.items()
    ]


def _without_alphas(record: Record) -> dict[str, Any]:
    """The chosen setting but for the weights of its KL term."""
    term = _term(record)
    rest = {name: value for name, value in term.items() if name not in ALPHAS}
    return {name: rest if value is term else value for name, value in record["chosen"]["setting"].items()}


def _term(record: Record) -> dict[str, Any]:
    """The KL term of a cell's chosen setting."""
    option = METHODS[record["method"]]().pessimism_option
    term: dict[str, Any] = record["chosen"]["setting"][option]
    return term


def _provenance(records: Sequence[Record], seeds: list[int]) -> dict[str, Any]:
    """Of this process, and what the jobs' own say."""
    jobs = [record["provenance"] for record in records]
    return {
        **provenance(seeds[0]),
        "seed": seeds,
        "command": ["python", "-m", "lm.workflow.summary", f"{len(records)} records"],
        "jobs": {
            "commits": sorted({str(job["commit"]) for job in jobs}),
            "machines": sorted({f"{job['machine']['processor']}, {job['machine']['cores']} cores" for job in jobs}),
            "first": min(job["date"] for job in jobs),
            "last": max(job["date"] for job in jobs),
        },
    }


def rounded(value: Any) -> Any:
    """JSON values with floats to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def as_text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of the lists of objects, which keeps it small and its changes readable."""

    def has_rows(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(map(has_rows, value.values()))
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    def one_line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    def of(value: Any) -> str:
        if not has_rows(value):
            return one_line(value)
        if isinstance(value, Mapping):
            return "{\n" + ",\n".join(f"{json.dumps(key)}: {of(own)}" for key, own in value.items()) + "\n}"
        return "[\n" + ",\n".join(map(one_line, value)) + "\n]"

    return of(document) + "\n"


def whole_seeds(records: Sequence[Record]) -> list[Record]:
    """Records of the seeds that have all that the seed with most has; says which are left out.

    A grid that goes on can be summed up so: a seed is whole, or it is not there.
    """
    kinds = ("job", "rho", "method", "alpha")
    of_seed: dict[int, set[tuple[Any, ...]]] = {}
    for record in records:
        of_seed.setdefault(record["seed"], set()).add(tuple(record.get(kind) for kind in kinds))
    most = max(of_seed.values(), key=len, default=set())
    for seed, found in sorted(of_seed.items()):
        if lacking := len(most - found):
            progress.say(f"seed {seed} is left out: it lacks {lacking} of {len(most)} records so far")
    return [record for record in records if of_seed[record["seed"]] >= most]


def with_study(path: Path, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """A file of several studies, with this one in place of an earlier of its name, as `figures.studies.RealText` has
    it; beside it each study's summary, without the probes, under `studies`.

    Args:
        path: the file, if there is one.
        name: the study's; its presets are called after it, and after rho where one was imposed.
        document: its summary.

    Raises:
        ValueError: the file has something else, or its studies have intervals of another level.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"presets": {}, "studies": {}}
    if not isinstance(known, dict) or not {"presets", "studies"} <= known.keys():
        raise ValueError(f"{path} has no presets and studies; name another file with --out")
    if known.get("confidence", document["confidence"]) != document["confidence"]:
        raise ValueError(
            f"{path} has intervals of level {known['confidence']:g}, and {name} of {document['confidence']:g}; one is "
            "needed"
        )
    presets: dict[str, Any] = {own: of for own, of in known["presets"].items() if of["study"] != name}
    for cell in document["cells"]:
        own = name if cell["rho"] is None else f"{name}, rho {cell['rho']:g}"
        seeds = presets.setdefault(own, {"study": name, "seeds": {}})["seeds"]
        methods = seeds.setdefault(str(cell["seed"]), {"methods": {}})["methods"]
        methods[cell["method"]] = {"setting": cell["chosen"]["setting"], "probe": cell["probe"]}
    bare = [{key: value for key, value in cell.items() if key != "probe"} for cell in document["cells"]]
    studies = {**known["studies"], name: {**document, "cells": bare}}
    every = [method for method in METHODS if any(method in study["methods"] for study in studies.values())]
    return {
        "version": VERSION,
        "confidence": document["confidence"],
        "looks": looks(every),
        "provenance": document["provenance"],
        "presets": presets,
        "studies": studies,
    }


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.workflow.summary", __doc__, "runs/grid/cells/*.json --out grid.json")
    parser.add_argument("records", nargs="+", type=path, metavar="RECORD", help="JSON file of a job")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="where the summary goes")
    parser.add_argument("--so-far", action="store_true", help="leave out seeds that lack records, and say so")
    parser.add_argument(
        "--study", metavar="NAME", help="FILE is of several studies by name: write, or replace, the one of this name"
    )
    options = parser.parse_args(arguments)
    records = [read(path) for path in options.records]
    document = summary(whole_seeds(records) if options.so_far else records)
    if options.study is None:
        write_text(options.out, as_text(document))
    else:
        write_text(options.out, as_text(with_study(options.out, options.study, document)))


if __name__ == "__main__":
    sys.exit(main())
