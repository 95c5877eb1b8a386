"""Labels that say more than which side won: probabilities, ties, counts of votes, and more than two completions.

A label is a weight of each direction. A pair with the probability p that its chosen side is preferred, and the weight
w, stands for p w rows that prefer the chosen side and (1 - p) w rows that prefer the other, which is what the edges of
`theory.preferences` are. So several annotators may also stand in several rows: nothing adds them up, and nothing has
to. In a plain pair p and w are 1.

`Reader` turns the rows of a set, however they say it, into rows of two sides whose p and w stand in the columns
`chosen_probability` and `weight`; rows that say nothing pass as they are. docs/own-data.md lists what is read. No other
module spells one of these names.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from lm.config import GroupWeight
from lm.data import rewards, scored
from lm.data.rows import Row, Tally, column, number, shown
from lm.data.schemas import is_tldr
from lm.data.scored import PROBABILITY as PROBABILITY
from lm.data.scored import WEIGHT as WEIGHT

COLUMNS = (PROBABILITY, WEIGHT)
"""What everything after the reading knows a pair's label by."""
REFERENCE = "is_reference"
"""Whether a pair's chosen side is a reference completion, where none are given: of a group each best one, once."""

SIDES = ("chosen", "rejected")
UNNAMED = tuple(
    (f"{name}{first}", f"{name}{second}")
    for name in ("response", "output", "completion")
    for first, second in (("_a", "_b"), ("_1", "_2"), ("1", "2"))
)
"""Two sides of which no column's name says that it won: the label is about the first."""
GROUPS = ("completions", "responses")
"""Lists of two or more completions of one prompt."""
RANKS, SCORES = "ranks", "scores"
LABEL, PREFERENCE, WINNER, TIED = "label", "preference", "winner", "votes_tied"

_LIKE = re.compile(
    r"(?:^|_)(?:labels?|preferences?|preferred|votes?|winners?|rank(?:ing)?s?|ties?|tied|agreement|prob(?:ability)?|"
    r"better|strength|weights?)(?:_|$)",
    re.IGNORECASE,
)
"""Names of columns that somebody would expect to be read as a label."""


def _votes(sides: Sequence[str]) -> tuple[str, str]:
    """Where the counts of votes for each of two sides stand: votes_chosen, votes_a, votes_1."""
    names = [side if side in SIDES else side[-1] for side in sides]
    return f"votes_{names[0]}", f"votes_{names[1]}"


_KNOWN = (
    *(*COLUMNS, LABEL, PREFERENCE, WINNER, TIED, RANKS, SCORES),
    *dict.fromkeys(name for sides in (SIDES, *UNNAMED) for name in _votes(sides)),
)
"""Every column that is a label in some kind of row."""


class Reader:
    """The rows of one set with their labels in COLUMNS, the likelier side as chosen, and groups as all their pairs.

    Rows have to be alike: a label that some have and others lack is refused. Of a group of K completions, each of its
    pairs weighs 1 / (number of its pairs), so that a prompt counts once, or 1 by `group_weight`; equals are a tie.
    A tie has p = 1/2, and which of its sides is called chosen means nothing. Scores become `lm.data.rewards.ONE`.

    Args:
        group_weight: as of `lm.config.DataConfig`.
    """

    def __init__(self, group_weight: GroupWeight = "prompt") -> None:
        self.group_weight = group_weight
        self.counts = Counter[str]()
        """Of rows: "rows", and of labels that are none of plain pairs "soft" (1/2 < p < 1), "ties", "turned" (sides
        that changed places), "voted" (counts of votes), "votes", "weighted"; "groups", with their "pairs" and
        "tied pairs"."""
        self.unread: dict[str, str | None] = {}
        """Columns that look like labels and are not read, and a known one that each may be meant to be."""
        self.first_turned: str | None = None
        self.left_out = Tally()
        """Rows that are no comparison already by their number of completions, by reason."""
        self._alike: frozenset[str] | None = None
        self._seen = set[str]()

    def __call__(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """(where it stands, row). ValueError where a label cannot be read, or is ambiguous."""
        for where, row in rows:
            self.counts["rows"] += 1
            if not isinstance(row, Mapping):
                raise ValueError(f"{where}: an object with columns is needed, got {type(row).__name__}: {shown(row)}")
            yield from ((f"{where}{part}", one) for part, one in self._read(row, where))

    def _read(self, row: Row, where: str) -> Iterator[tuple[str, Row]]:
        form = _form(row)
        labels = _labels(row, form)
        alike = frozenset({*labels, *([form] if isinstance(form, str) else form)})
        self._note(row, alike)
        if self._alike is None:
            self._alike = alike
        elif alike != self._alike:
            more, less = sorted(alike - self._alike), sorted(self._alike - alike)
            told = [f"{' and '.join(map(repr, n))} {w}" for n, w in ((more, "here"), (less, "in the rows before")) if n]
            raise ValueError(
                f"{where}: a label has to be in all rows or in none: {', '.join(told)} only; where there is no label, "
                "leave the row out"
            )
        if isinstance(form, str):
            yield from self._group(row, form, labels, where)
            return
        unreadable = not set(SIDES) <= row.keys() and not is_tldr(row)  # it will be said what is missing
        if form == SIDES and (not labels or unreadable):
            yield "", row
            return
        yield "", self._pair(row, form, labels, where)

    # ------------------------------------------------------------ two sides

    def _pair(self, row: Row, sides: tuple[str, str], labels: set[str], where: str) -> Row:
        probability, votes = _probability(row, sides, labels, where)
        weight = votes or 1.0
        if WEIGHT in labels:
            weight = _positive(row[WEIGHT], WEIGHT, where)
        named = dict(zip(sides, SIDES, strict=True))
        plain = {named.get(name, name): value for name, value in row.items() if name not in labels}
        if probability < 0.5:
            self.counts["turned"] += 1
            self.first_turned = self.first_turned or where
            plain, probability = turned(plain), 1 - probability
        self.counts["soft"] += 0.5 < probability < 1
        self.counts["ties"] += probability == 0.5
        self.counts["weighted"] += WEIGHT in labels and weight != 1
        if votes:
            self.counts["voted"] += 1
            self.counts["votes"] += int(votes)
        return {**plain, PROBABILITY: probability, WEIGHT: weight}

    # ------------------------------------------------------------ more than two

    def _group(self, row: Row, name: str, labels: set[str], where: str) -> Iterator[tuple[str, Row]]:
        completions = column(row, name, list, where)
        values = _order(row, name, len(completions), labels, where)
        weight = _positive(row[WEIGHT], WEIGHT, where) if WEIGHT in labels else 1.0
        self.counts["groups"] += 1
        if len(completions) < 2:
            self.left_out.add("fewer than two completions", where)
            return
        kept = {key: value for key, value in row.items() if key not in (*labels, name)}
        texts = [_said(one) for one in completions]
        pairs = list(combinations(range(len(completions)), 2))
        usable = sum(1 for i, j in pairs if texts[i] != texts[j] and texts[i] and texts[j])
        share = weight / max(usable, 1) if self.group_weight == "prompt" else weight
        best, told = max(values), set[int]()
        for i, j in pairs:
            better, worse = (i, j) if values[i] >= values[j] else (j, i)
            tie = values[i] == values[j]
            reference = not tie and values[better] == best and better not in told
            told |= {better} if reference else set()
            self.counts["pairs"] += 1
            self.counts["tied pairs"] += tie
            pair = {**kept, **dict(zip(SIDES, (completions[better], completions[worse]), strict=True))}
            if SCORES in labels:
                pair |= zip(rewards.ONE, (float(row[SCORES][better]), float(row[SCORES][worse])), strict=True)
            pair |= {PROBABILITY: 0.5 if tie else 1.0, WEIGHT: share, REFERENCE: reference}
            yield f", {name} {i} and {j}", pair

    # ------------------------------------------------------------ what is said

    def _note(self, row: Row, alike: frozenset[str]) -> None:
        """Remembers columns that look like labels and are not read."""
        for name in [name for name, value in row.items() if name not in self._seen and value is not None]:
            self._seen.add(name)
            if name in alike or name in (*rewards.EVERY, *scored.REFERENCE):
                continue
            known = {*_KNOWN, *rewards.EVERY, *rewards.ORACLE, *GROUPS} - {name}
            close = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.75)
            meant = close[0] if close and close[0] in _KNOWN and name not in _KNOWN else None
            if meant or _LIKE.search(str(name)) or name in GROUPS:
                self.unread[str(name)] = meant

    @property
    def any(self) -> bool:
        """Whether some label is not that of a plain pair."""
        return any(self.counts[name] for name in ("soft", "ties", "turned", "voted", "weighted", "groups"))

    def says(self) -> list[str]:
        """What is odd about the labels, a sentence each: to be shown by whatever reads the set."""
        count, lines = self.counts, []
        if count["groups"]:
            how = "a prompt counts once" if self.group_weight == "prompt" else "each pair counts once"
            lines.append(
                f"{count['groups']:,} groups of completions are {count['pairs']:,} pairs, of which "
                f"{count['tied pairs']:,} are ties; {how}"
            )
        if count["voted"]:
            lines.append(
                f"{count['votes']:,} votes on {count['voted']:,} pairs; a pair counts as often as it has votes"
            )
        if count["soft"] or count["ties"]:
            lines.append(f"{count['soft']:,} rows have soft labels, {count['ties']:,} are ties")
        if count["weighted"]:
            lines.append(f"{count['weighted']:,} rows have weights other than 1")
        if count["turned"]:
            lines.append(
                f"in {count['turned']:,} rows the label prefers the second side, which is then called chosen; the "
                f"first: {self.first_turned}"
            )
        for name, meant in self.unread.items():
            hint = f"; is {meant!r} meant to be it?" if meant else ""
            lines.append(f"column {name!r} looks like a label and is not read{hint}")
        return lines


def label_of(row: Row, where: str) -> Row:
    """COLUMNS and REFERENCE of a row that `Reader` gave; those of a plain pair where it has none. A tie's chosen side
    is no reference completion."""
    probability = row.get(PROBABILITY, 1.0)
    reference = row.get(REFERENCE)
    if reference is None:
        reference = probability > 0.5
    if not isinstance(reference, bool):
        raise ValueError(f"{where}: {REFERENCE!r} must be true or false, got {shown(reference)}")
    return {PROBABILITY: probability, WEIGHT: row.get(WEIGHT, 1.0), REFERENCE: reference}


def turned(row: Row) -> Row:
    """A row with its sides in each other's place, and everything that is known of them: columns that are named after
    chosen and rejected change places, reward margins their sign."""
    result = dict(row)
    for one in row:
        other = one.replace("chosen", "rejected")
        if one != other and other in row:
            result[one], result[other] = row[other], row[one]
    for name in (rewards.MARGIN, rewards.MEMBER_MARGINS, rewards.OLDER_MARGIN):
        if (value := row.get(name)) is not None:
            numbers = value if isinstance(value, list) else [value]
            if all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
                result[name] = [-one for one in numbers] if isinstance(value, list) else -value
    return result


# ---------------------------------------------------------------- one row


def _said(completion: Any) -> Any:
    """What a completion says: text without white space around it, of one message its content."""
    if isinstance(completion, list) and len(completion) == 1:
        completion = completion[0]
    if isinstance(completion, Mapping) and completion.keys() <= {"role", "content"}:
        completion = completion.get("content")
    return completion.strip() if isinstance(completion, str) else completion


def _form(row: Row) -> tuple[str, str] | str:
    """The columns of the two sides, or of the list of completions; SIDES where there is neither, for whoever reads the
    row to say what is missing."""
    if set(SIDES) & row.keys() or is_tldr(row):
        return SIDES
    for sides in UNNAMED:
        if all(row.get(side) is not None for side in sides):
            return sides
    return next((name for name in GROUPS if isinstance(row.get(name), list)), SIDES)


def _labels(row: Row, form: tuple[str, str] | str) -> set[str]:
    """The label columns that the row has. Beside two sides, `scores` may be anything; and beside those that are named
    after who won, a winner or ranks say nothing more."""
    apart = {SCORES, WINNER, RANKS} if form == SIDES else set() if form in GROUPS else {SCORES}
    return {name for name in _KNOWN if row.get(name) is not None and name not in apart}


def _probability(row: Row, sides: tuple[str, str], labels: set[str], where: str) -> tuple[float, float]:
    """P(first side preferred), and how many votes say so, 0 where they were not counted. ValueError where there is no
    label that says it, or several say different things."""
    named = sides == SIDES
    if is_tldr(row):
        raise ValueError(
            f"{where}: 'choice' is the label of this schema, {', '.join(map(repr, sorted(labels)))} cannot be honoured "
            "beside it; remove it, or write the rows as prompt, chosen and rejected"
        )
    counts = _votes(sides)
    fit = {LABEL, PREFERENCE, WEIGHT, TIED, *counts, PROBABILITY if named else WINNER}
    if unfit := sorted(labels - fit):
        raise ValueError(
            f"{where}: {unfit[0]!r} does not go with {sides[0]} and {sides[1]}; what does: {', '.join(sorted(fit))}"
        )
    found: dict[str, float] = {}
    votes = 0.0
    if PROBABILITY in labels:
        found[PROBABILITY] = _within(row[PROBABILITY], PROBABILITY, 0, 1, where)
    if LABEL in labels:
        found[LABEL] = _label(row[LABEL], sides, where)
    if PREFERENCE in labels:
        found[PREFERENCE] = 2 - _within(
            row[PREFERENCE], PREFERENCE, 1, 2, where, f"1 for {sides[0]}, 2 for {sides[1]}, 1.5 for a tie"
        )
    if WINNER in labels:
        found[WINNER] = _winner(row[WINNER], sides, where)
    if labels & {*counts, TIED}:
        if WEIGHT in labels:
            raise ValueError(f"{where}: {WEIGHT!r} beside counts of votes, which are weights already: leave one out")
        first, second = (_count(row, name, where) for name in counts)
        tied = _count(row, TIED, where) if TIED in labels else 0
        votes = float(first + second + tied)
        if not votes:
            raise ValueError(f"{where}: {counts[0]!r} and {counts[1]!r} count no votes; leave the row out")
        found[" and ".join(counts)] = (first + tied / 2) / votes
    if not found and not named:
        raise ValueError(
            f"{where}: which of {sides[0]} and {sides[1]} is preferred? One of {', '.join(sorted(fit - {WEIGHT}))} is "
            f"needed; there are {shown(sorted(row))}"
        )
    values = list(found.values()) or [1.0]
    if max(values) - min(values) > 1e-6:
        raise ValueError(f"{where}: the labels contradict each other, probabilities of {sides[0]}: {found}; leave one")
    return values[0], votes


def _label(value: Any, sides: tuple[str, str], where: str) -> float:
    """P(first side preferred). An integer may as well be the place of the preferred side, and true may be about one
    side alone: both are refused where they do not mean the same."""
    if type(value) is int and (value, sides) != (1, SIDES) and value in (0, 1):
        cure = f"{value}.0 or {PROBABILITY!r}" if sides == SIDES else f"{value}.0, or 'winner'"
        raise ValueError(
            f"{where}: 'label' {value} may be the probability that {sides[0]} is preferred, or the place of the "
            f"preferred side; write {cure}"
        )
    return _within(value, LABEL, 0, 1, where, f"the probability that {sides[0]} is preferred, 0.5 for a tie")


def _winner(value: Any, sides: tuple[str, str], where: str) -> float:
    told = str(value).strip().lower() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    for probability, side in zip((1.0, 0.0), sides, strict=True):
        if told in (side, side[-1]):
            return probability
    if told == "tie":
        return 0.5
    raise ValueError(
        f"{where}: 'winner' must be {sides[0][-1]!r}, {sides[1][-1]!r}, {sides[0]!r}, {sides[1]!r} or 'tie', got "
        f"{shown(value)}"
    )


def _order(row: Row, name: str, count: int, labels: set[str], where: str) -> list[float]:
    """How good each completion of a group is, larger is better."""
    if unfit := sorted(labels - {RANKS, SCORES, WEIGHT}):
        raise ValueError(f"{where}: {unfit[0]!r} does not go with {name}; what does: {RANKS}, {SCORES}, {WEIGHT}")
    found: dict[str, list[float]] = {}
    for source in (RANKS, SCORES):
        if source in labels:
            values = column(row, source, list, where)
            if len(values) != count:
                raise ValueError(
                    f"{where}: {source!r} must have one entry for each of {count} {name}, got {len(values)}"
                )
            found[source] = [number(value, source, where) for value in values]
    if not found:
        close = [n for n in row if isinstance(n, str) and n.lower() in ("ranking", "rankings", "rank", "order")]
        hint = f"; {close[0]!r} may be an order of places instead, so it is not read" if close else ""
        raise ValueError(
            f"{where}: {name} need {RANKS!r} (the rank of each, 1 for the best) or {SCORES!r} (larger is better), a "
            f"list of {count}{hint}; there are {shown(sorted(row))}"
        )
    if RANKS in found:
        if count and min(found[RANKS]) != 1:
            raise ValueError(
                f"{where}: {RANKS!r} are the rank of each of {name}, 1 for the best, so that one has to be 1; got "
                f"{shown(row[RANKS])}"
            )
        found[RANKS] = [-rank for rank in found[RANKS]]
        both = found.get(SCORES, found[RANKS])
        for i, j in combinations(range(count), 2):
            orders = [(one[i] > one[j]) - (one[i] < one[j]) for one in (found[RANKS], both)]
            if orders[0] != orders[1]:
                raise ValueError(f"{where}: {RANKS!r} and {SCORES!r} order {name} {i} and {j} differently; leave one")
    return next(iter(found.values()))


def _within(value: Any, name: str, least: float, most: float, where: str, what: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(
            f"{where}: {name!r} must be a number between {least:g} and {most:g}{f' ({what})' if what else ''}, got "
            f"{shown(value)}"
        )
    return float(value)


HEAVIEST = 1e9
"""Of a pair's weight: beside a heavier one all others are lost in float32, and past 1e38 so is it. [set]"""


def _positive(value: Any, name: str, where: str) -> float:
    if not 0 < (result := number(value, name, where)) <= HEAVIEST:
        raise ValueError(f"{where}: {name!r} must be a number > 0, and {HEAVIEST:g} at most, got {shown(value)}")
    return result


def _count(row: Row, name: str, where: str) -> float:
    if row.get(name) is None:
        raise ValueError(f"{where}: votes are counted for one side only, {name!r} is missing")
    value = number(row[name], name, where)
    if value < 0 or value != int(value):
        raise ValueError(f"{where}: {name!r} must be a count, a whole number >= 0, got {shown(row[name])}")
    return value
