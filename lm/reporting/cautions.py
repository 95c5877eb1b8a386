"""What a reviewer of a run would ask about first: each caution is a function of results.json alone.

A caution says that a number may not mean what it seems to; it is no error, and changes nothing. The thresholds stand
here, each with its reason, and `cautions` is the list that the report begins with and `lm.train` ends with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from figures.record import MAIN, SFT, Accuracies, MethodResult, Results, Tried
from lm.base.documents import flat

UNFINISHED = 0.05
"""Share of samples that are cut off: more, and lengths and rewards are those of another, shorter text. [set]"""
APART, AT_CHANCE = 0.5, 0.55
"""Of a reward model's accuracies on pairs whose winner is the longer and on those whose winner is the shorter: their
mean is 1/2 for whatever only looks at the length, which has one class as right as it has the other wrong. [set]"""
BARELY = 0.6
"""Accuracy of an oracle, which a coin has at 0.5: below it, most of what it tells of two samples is noise. [set]"""
FEW_PAIRS, FEW_HELD_OUT, FEW_PROMPTS, FEW_IN_CLASS = 1000, 100, 100, 20
"""Training pairs; held-out pairs, of which shares are known to +-10 points (95%); prompts, likewise for win rates; and
pairs of one length class that are too few to judge a reward model by. [set]"""
TIES, LEFT_OUT = 0.2, 0.5
"""Shares of ties, and of rows that were left out, that make the rest a selection. [set]"""
LONGER = 1.5
"""Ratio of mean lengths to pi_ref's, either way, from which a gain may be one of length. [set]"""
FELL = -5.0
"""Mean log-ratio of the pairs' winners, nats a completion: each has become e^5, 150 times less likely. [set]"""
STILL = 0.01
"""KL from pi_ref, nats, with log-ratios below ten times as much: a policy that has hardly moved. [set]"""
SAME = 0.5
"""Share of ties with pi_ref, whose samples are drawn by the same seed, likewise. [set]"""
RISING, PACE = 0.1, 0.5
"""Share of an advantage that came after the snapshot before the last; and pace at which the probe's margin still grew
before the end, over its mean pace. [set]"""


@dataclass(frozen=True)
class Caution:
    """One thing to know before a number is believed."""

    kind: str
    """One word or two for what it is about: the name of its rule."""
    about: str
    """A policy, a reward model, or "" for the run."""
    text: str
    """A sentence with its numbers, and what may help."""

    @property
    def line(self) -> str:
        """All of it, as one line."""
        return f"{self.about}: {self.text}" if self.about else self.text


Found = Iterator[tuple[str, str]]
"""Whom it is about, and the sentence."""


def cautions(results: Results) -> list[Caution]:
    """All that is to be known of a run, in the order of RULES, which is about that of weight."""
    return [Caution(kind, about, text) for kind, rule in RULES.items() for about, text in rule(results)]


# ---------------------------------------------------------------- numbers, and the judge


def not_finite(results: Results) -> Found:
    """A number of the record that is none: it has no meaning, and nor has what is compared with it."""
    names = [name for name, value in _numbers(results) if not math.isfinite(value)]
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield "", f"not finite: {', '.join(names[:4])}{more}; lower learning rates, or look at the training losses"


def weak_oracle(results: Results) -> Found:
    """A judge that hardly orders pairs as people did: advantages by it say little."""
    if results.oracle is not None:
        found, of = results.oracle.all.accuracy, f"{results.oracle.all.pairs:,} validation pairs"
        if found is not None and found < BARELY:
            yield (
                "oracle",
                f"orders {found:.0%} of {of} as labelled, and a coin half of them; all advantages are by it: give it "
                "more pairs or another body (oracle_base), or give oracle_model",
            )
    elif results.judge is not None and (results.judge.kind == "exact" or results.judge.sharpness is not None):
        return  # it is known, or the labels have noise of their own
    elif results.labels.agreement is not None and results.labels.agreement < BARELY:
        yield (
            "oracle",
            f"the given one agrees with {results.labels.agreement:.0%} of the labels, and a coin with half of them; "
            "all advantages are by it",
        )


def only_length(results: Results) -> Found:
    """A reward model that orders by length, or by nothing: right on pairs whose winner is longer just as often as it
    is wrong on those whose winner is shorter."""
    oracle = {} if results.oracle is None else {"oracle": results.oracle}
    for name, found in {**oracle, **results.reward_models}.items():
        longer, shorter = _by_length(found)
        if longer is None or shorter is None or (longer + shorter) / 2 > AT_CHANCE:
            continue
        both = f"orders {longer:.0%} of the pairs right whose winner is longer, {shorter:.0%} where it is shorter"
        if abs(longer - shorter) >= APART:
            which = "longer" if longer > shorter else "shorter"
            yield name, f"has learnt only to prefer the {which} completion: it {both}"
        else:
            yield name, f"tells no more than a coin once length is held fixed: it {both}"


def _by_length(found: Accuracies) -> tuple[float | None, float | None]:
    classes = (found.longer, found.shorter)
    longer, shorter = (each.accuracy if each.pairs >= FEW_IN_CLASS else None for each in classes)
    return longer, shorter


# ---------------------------------------------------------------- policies


def hacked(results: Results) -> Found:
    """Oracle reward gained and true utility lost: what was distilled was not the truth."""
    before = results.sft.utility
    for name, row in results.methods.items():
        if before is None or row.utility is None or not row.advantage > 0:
            continue
        lost = row.utility < before if row.utility_ci is None else row.utility_ci[1] < 0
        if lost:
            yield (
                name,
                f"gains oracle reward ({row.advantage:+.3f}) and loses true utility ({row.utility - before:+.3f}, from "
                f"{before:.3f} to {row.utility:.3f}): it is better by the oracle alone",
            )


def worse(results: Results) -> Found:
    """Less oracle reward than pi_ref, with the whole interval."""
    for name, row in results.methods.items():
        if row.ci[1] < 0:
            yield name, f"is worse than SFT: advantage {row.advantage:+.3f}, {_interval(results, row.ci)}"


def unfinished(results: Results) -> Found:
    """Samples that reached the limit before end-of-text."""
    fixed = None if results.judge is None else results.judge.unfinished
    judged = "judged so" if fixed is None else f"each of these is given {fixed:g}"
    for name, row in {SFT: results.sft, **results.methods}.items():
        if row.finished < 1 - UNFINISHED:
            yield (
                name,
                f"{1 - row.finished:.0%} of the samples are cut off, and {judged}; raise data.max_completion_length, "
                "or train pi_ref until it ends",
            )


def length(results: Results) -> Found:
    """Samples of quite another length than pi_ref's."""
    for name, row in results.methods.items():
        ratio = row.length / results.sft.length if results.sft.length else math.inf
        if ratio >= LONGER or ratio <= 1 / LONGER:
            yield (
                name,
                f"its samples are {ratio:.2f} times as long as SFT's ({row.length:.1f} tokens, not "
                f"{results.sft.length:.1f}); look whether the oracle pays for length",
            )


def winners_fell(results: Results) -> Found:
    """Winners have become unlikely too: mass went to completions that no pair has."""
    for name, row in results.methods.items():
        if row.chosen_logratio < FELL:
            yield (
                name,
                f"log π of the test pairs' winners fell by {-row.chosen_logratio:.1f} nats a completion (losers "
                f"{row.rejected_logratio:+.1f}); a KL term or a smaller step keeps them",
            )


def under_trained(results: Results) -> Found:
    """A policy that may be better after more steps."""
    for name, row in results.methods.items():
        reasons = [_hardly_moved(row, results.wins[name][SFT].tie)]
        if not any(one.setting == row.setting and one.step > row.step for one in row.validation):  # more steps lost
            reasons = [_few_pairs_seen(results, row), _last_is_best(row), _margin_grows(row), *reasons]
        if why := [reason for reason in reasons if reason]:
            yield name, f"may be under-trained: {'; '.join(why)}"


def _few_pairs_seen(results: Results, row: MethodResult) -> str | None:
    pairs = results.bias[MAIN].pairs if MAIN in results.bias else 0
    if row.pairs_seen is None or row.pairs_seen >= pairs:
        return None
    return f"{row.step:,} steps saw {row.pairs_seen:,} of {pairs:,} pairs"


def _last_is_best(row: MethodResult) -> str | None:
    same = sorted((one for one in row.validation if one.setting == row.setting), key=lambda one: one.step)
    if len(same) < 2 or row.step != same[-1].step:
        return None
    before, last = same[-2].advantage, same[-1].advantage
    if not (last > 0 and last - before >= RISING * last):
        return None
    return f"validation rose to the last step ({before:+.3f} at {same[-2].step:,}, {last:+.3f} at {row.step:,})"


def _margin_grows(row: MethodResult) -> str | None:
    margins = [(each.step, each.chosen_logratio - each.rejected_logratio) for each in row.probe]
    if len(margins) < 3:
        return None
    (first, start), (before, earlier), (last, end) = margins[0], margins[-2], margins[-1]
    if not first < before < last or abs(end - start) < 10 * STILL:
        return None
    pace = (end - earlier) / (last - before) / ((end - start) / (last - first))
    if not pace >= PACE:
        return None
    return f"the probe's margin still grew at {pace:.0%} of its mean pace at the end"


def _hardly_moved(row: MethodResult, ties: float) -> str | None:
    moved = max(abs(row.chosen_logratio), abs(row.rejected_logratio))
    if abs(row.kl) < STILL and moved < 10 * STILL:
        return f"it is {row.kl:.3f} nats from pi_ref and has hardly moved"
    return f"it writes as SFT does for {ties:.0%} of the prompts" if ties > SAME else None


# ---------------------------------------------------------------- choices


def edge(results: Results) -> Found:
    """A chosen value that is the least or the greatest of its sweep: a better one may lie beyond."""
    for name, row in results.methods.items():
        for key, values in _swept(row.validation).items():
            chosen = _of_numbers(row.setting).get(key)
            if chosen in (low := min(values), high := max(values)):
                yield (
                    name,
                    f"{key} {chosen:g} is the {'least' if chosen == low else 'greatest'} of the {len(values)} that "
                    f"were tried ({low:g} to {high:g}); a better one may lie beyond",
                )


def _swept(tried: list[Tried]) -> dict[str, set[float]]:
    """Numbers that were tried, by option, of those that vary."""
    found: dict[str, set[float]] = {}
    for one in tried:
        for key, value in _of_numbers(one.setting).items():
            found.setdefault(key, set()).add(value)
    return {key: values for key, values in found.items() if len(values) > 1}


def close_choice(results: Results) -> Found:
    """Validation chose, and could not have told: the runner-up lies in the interval of the chosen."""
    for name, row in results.methods.items():
        chosen = [one for one in row.validation if one.setting == row.setting and one.step == row.step]
        others = [one for one in row.validation if one not in chosen]
        if not chosen or not others:
            continue
        best, within = chosen[0], [one for one in others if one.advantage >= chosen[0].ci[0]]
        if within:
            yield (
                name,
                f"validation is too small to tell {len(within)} of the {len(others)} others from the chosen "
                f"({best.advantage:+.3f}, {_interval(results, best.ci)}); raise evaluation.valid_prompts",
            )


def not_told_apart(results: Results) -> Found:
    """The method of the greatest advantage, and those that a test cannot tell from it (Holm over these tests)."""
    if len(results.methods) < 2:
        return
    best = max(results.methods, key=lambda name: results.methods[name].advantage)
    chances: dict[str, float] = {}
    for name in results.methods:
        for pair in (f"{best} - {name}", f"{name} - {best}"):
            if pair in results.wald:
                found = results.wald[pair].p
                chances[name] = (1.0 if results.wald[pair].difference == 0 else 0.0) if found is None else found
    told, tests = set[str](), len(chances)
    for name, chance in sorted(chances.items(), key=lambda item: item[1]):
        if chance * (tests - len(told)) >= 1 - results.confidence:
            break
        told.add(name)
    if left := [name for name in chances if name not in told]:
        same = all(results.methods[name].advantage == results.methods[best].advantage for name in left)
        ahead = "the same advantage as others, and" if same else "the greatest advantage, but"
        others = f"{', '.join(left)} ({results.confidence:.0%}, Holm over {tests} test{'s' * (tests > 1)})"
        yield "", f"{best} has {ahead} {results.sft.n:,} test prompts do not tell it from {others}"


# ---------------------------------------------------------------- data


def few(results: Results) -> Found:
    """Too little data to learn from, or to measure by."""
    subsets = {name: row.pairs for name, row in results.bias.items() if name in {MAIN, *results.members}}
    if (pairs := subsets.pop(MAIN, FEW_PAIRS)) < FEW_PAIRS:
        yield "", f"{pairs:,} training pairs are few: another draw of them may order the methods otherwise"
    if small := [name for name, pairs in subsets.items() if pairs < FEW_HELD_OUT]:
        least = min(subsets[name] for name in small)
        yield (
            ", ".join(small),
            f"an ensemble member's subset has {least:,} pairs: members may differ by chance more than by bias",
        )
    if results.sft.n < FEW_PROMPTS:
        yield "", f"{results.sft.n:,} test prompts: win rates are known to +-{98 / math.sqrt(results.sft.n):.0f} points"
    held = results.data.preferences.kept.get("valid", 0)
    if held < FEW_HELD_OUT:
        known = f"+-{98 / math.sqrt(held):.0f} points" if held else "nothing"
        yield "", f"{held:,} validation pairs: accuracies of reward models are known to {known}"


def ties(results: Results) -> Found:
    """Pairs or samples that nobody can order."""
    dropped = results.labels.ties_dropped or 0
    pairs = sum(results.data.preferences.kept.values())
    if pairs and dropped / pairs > TIES:
        yield "", f"the oracle rewards both completions alike in {dropped:,} of {pairs:,} pairs, which were dropped"
    for name, _row in results.methods.items():
        share = results.wins[name][SFT].tie
        if share > TIES:
            yield name, f"ties with SFT on {share:.0%} of the prompts: the same samples, or an oracle that tells little"


def left_out(results: Results) -> Found:
    """Rows that were not used: the rest may not be like them."""
    for name in ("preferences", "references"):
        rows = getattr(results.data, name)
        dropped, kept = sum(rows.dropped.values()), sum(rows.kept.values())
        if dropped and dropped / (dropped + kept) > LEFT_OUT:
            reason, count = max(rows.dropped.items(), key=lambda item: item[1])
            yield "", f"{dropped:,} of {dropped + kept:,} rows of {name} were left out, {count:,} for: {reason}"


def no_commit(results: Results) -> Found:
    """Code that nobody else can have."""
    commit = results.provenance.commit
    if commit is None:
        yield "", "the commit of the code is not known; run from a checkout, or note the version"
    elif commit.endswith("-dirty"):
        yield "", f"the code had changes that commit {commit.removesuffix('-dirty')[:12]} has not"


RULES: Mapping[str, Callable[[Results], Found]] = {
    "not finite": not_finite,
    "oracle": weak_oracle,
    "utility": hacked,
    "only length": only_length,
    "unfinished": unfinished,
    "worse": worse,
    "winners fell": winners_fell,
    "length": length,
    "under-trained": under_trained,
    "edge": edge,
    "close choice": close_choice,
    "not told apart": not_told_apart,
    "few": few,
    "ties": ties,
    "left out": left_out,
    "commit": no_commit,
}
"""Every rule by the name of its cautions."""


# ---------------------------------------------------------------- helpers


def _interval(results: Results, ci: tuple[float, float]) -> str:
    return f"{results.confidence:.0%} interval {ci[0]:+.3f} to {ci[1]:+.3f}"


def _of_numbers(setting: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a setting by their dotted names."""
    return {
        name: float(value)
        for name, value in flat(setting)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record by its dotted name."""
    if is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{i}]")
