"""Each rule of a report's warnings fires on one side of its threshold, and not on the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from figures.record import Results, of, read
from lm.objectives import DPO, IPO, DistilledDPO, EnsembleDPO
from lm.reporting.cautions import RULES, Caution, cautions
from tests.recorded import recorded

Edit = Callable[[dict[str, Any]], Any]
POLICY = {"oracle_reward": 1.0, "length": 20.0, "finished": 1.0, "kl": 1.0, "accuracy": 0.7, "n": 400}


def sound() -> dict[str, Any]:
    """The record of a run of which nothing is to be said."""
    values = recorded({"dpo": DPO(beta=0.3), "ipo": IPO(), "e-dpo": EnsembleDPO()})
    fine: dict[str, Any] = {"accuracy": 0.75, "pairs": 500}
    classes = dict.fromkeys(("all", "longer", "shorter", "neither"), fine)
    values["sft"] |= {**POLICY, "chosen_logratio": 0.0, "rejected_logratio": 0.0, "kl": 0.0, "utility": 1.0}
    for i, row in enumerate(values["methods"].values()):
        row |= {**POLICY, "chosen_logratio": 0.5, "rejected_logratio": -1.5, "utility": 1.2, "utility_ci": [0.1, 0.3]}
        row |= {"advantage": 0.6 - i / 10, "ci": [0.4 - i / 10, 0.8 - i / 10], "pairs_seen": 6000, "step": 200}
        row |= {"validation": [], "probe": []}
    for test in values["wald"].values():
        test["p"] = 1e-4
    for wins in values["wins"].values():
        wins["sft"] = {"win": 0.6, "tie": 0.1, "loss": 0.3, "n": 400}
    values["reward_models"] = dict.fromkeys(values["reward_models"], classes)
    values["oracle"] = classes
    values["labels"] = {"agreement": 0.75, "ties_dropped": 3, "longer_preferred": 0.5}
    for row in values["bias"].values():
        row["pairs"] = 3000
    kept = {"kept": {"train": 4000, "valid": 500, "test": 500}, "dropped": {"empty completion": 9}}
    values["data"] |= {"preferences": kept, "references": kept}
    values["provenance"]["commit"] = "0123456789abcdef"
    return values


def found(edit: Edit) -> list[Caution]:
    values = sound()
    edit(values)
    return cautions(of(Results, values))


def method(name: str, **changed: Any) -> Edit:
    return lambda values: values["methods"][name].update(changed)


def tried(advantages: list[float], *, half: float = 0.05, betas: tuple[float, ...] = (), chosen: int = -1) -> Edit:
    """What DPO was chosen from: one setting at growing steps, or several settings at the last step."""

    def edit(values: dict[str, Any]) -> None:
        rows = [
            {
                "setting": {"beta": betas[i] if betas else 0.3},
                "step": 200 if betas else 50 * (i + 1),
                "advantage": advantage,
                "ci": [advantage - half, advantage + half],
            }
            for i, advantage in enumerate(advantages)
        ]
        values["methods"]["dpo"] |= {
            "validation": rows,
            **{key: rows[chosen][key] for key in ("setting", "step")},
        }

    return edit


def probed(margins: list[float]) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        entry = dict.fromkeys(("chosen_logps", "rejected_logps", "forward_kl_reference"), 0.0)
        values["methods"]["dpo"]["probe"] = [
            {
                **entry,
                "step": 20 * i,
                "accuracy": 0.5,
                "forward_kl_preferences": 0.0,
                "chosen_logratio": margin,
                "rejected_logratio": 0.0,
            }
            for i, margin in enumerate(margins)
        ]

    return edit


def model(longer: float, shorter: float, pairs: int = 500, name: str = "b0.2") -> Edit:
    def edit(values: dict[str, Any]) -> None:
        classes = {
            "all": {"accuracy": 0.7, "pairs": 2 * pairs},
            "longer": {"accuracy": longer, "pairs": pairs},
            "shorter": {"accuracy": shorter, "pairs": pairs},
            "neither": {"accuracy": None, "pairs": 0},
        }
        if name == "oracle":
            values["oracle"] = classes
        else:
            values["reward_models"] = {**values["reward_models"], name: classes}

    return edit


def oracle(accuracy: float) -> Edit:
    fine = {"accuracy": 0.75, "pairs": 500}
    classes = {**dict.fromkeys(("longer", "shorter", "neither"), fine), "all": {"accuracy": accuracy, "pairs": 500}}
    return lambda values: values.update(oracle=classes)


def given_oracle(agreement: float | None) -> Edit:
    return lambda values: (values.update(oracle=None), values["labels"].update(agreement=agreement))


def kept(**counts: int) -> Edit:
    return lambda values: values["data"].update(
        preferences={"kept": {"train": 4000, "valid": 500, "test": 500} | counts, "dropped": {}}
    )


def dropped(count: int) -> Edit:
    rows = {"kept": {"train": 100, "valid": 100, "test": 100}, "dropped": {"prompt longer": count, "other": 1}}
    return lambda values: values["data"].update(references=rows)


def pair(name: str, p: float | None, difference: float = 0.1) -> Edit:
    return lambda values: values["wald"][name].update(p=p, difference=difference)


def ties(share: float) -> Edit:
    return lambda values: values["wins"]["ipo"]["sft"].update(tie=share)


def subset(name: str, pairs: int) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        values["bias"] = {**values["bias"], name: {**values["bias"][name], "pairs": pairs}}

    return edit


def n(count: int) -> Edit:
    return lambda values: values["sft"].update(n=count)


def commit(name: str | None) -> Edit:
    return lambda values: values["provenance"].update(commit=name)


BOTH_SIDES: list[tuple[str, str, str, Edit, Edit]] = [
    # rule, about, words, what fires, what just does not
    ("utility", "ipo", "loses true utility", method("ipo", utility=0.9, utility_ci=[-0.2, -0.01]),
     method("ipo", utility=0.9, utility_ci=[-0.2, 0.01])),
    ("utility", "dpo", "from 1.000 to 0.990", method("dpo", utility=0.99, utility_ci=None),
     method("dpo", utility=1.0, utility_ci=None)),
    ("utility", "dpo", "gains oracle reward (+0.010)", method("dpo", utility=0.5, utility_ci=None, advantage=0.01),
     method("dpo", utility=None, utility_ci=None)),
    ("only length", "b0.2", "learnt only to prefer the longer", model(0.9, 0.2), model(0.9, 0.21)),
    ("only length", "b0.8", "learnt only to prefer the shorter", model(0.1, 0.95, name="b0.8"),
     model(0.3, 0.95, name="b0.8")),
    ("only length", "rho", "no more than a coin once length is held fixed", model(0.5, 0.55, name="rho"),
     model(0.6, 0.55, name="rho")),
    ("only length", "oracle", "learnt only to prefer the longer", model(1.0, 0.0, name="oracle"),
     model(1.0, 0.5, name="oracle")),
    ("only length", "b0.2", "prefer the longer", model(1.0, 0.0, pairs=20), model(1.0, 0.0, pairs=19)),
    ("unfinished", "sft", "6% of the samples are cut off", lambda v: v["sft"].update(finished=0.94),
     lambda v: v["sft"].update(finished=0.96)),
    ("unfinished", "e-dpo", "50% of the samples", method("e-dpo", finished=0.5), method("e-dpo", finished=0.95)),
    ("worse", "ipo", "worse than SFT", method("ipo", advantage=-0.2, ci=[-0.3, -0.1], utility=1.2),
     method("ipo", advantage=-0.2, ci=[-0.5, 0.1])),
    ("winners fell", "dpo", "fell by 5.1 nats", method("dpo", chosen_logratio=-5.1),
     method("dpo", chosen_logratio=-4.9)),
    ("length", "dpo", "1.50 times as long", method("dpo", length=30.0), method("dpo", length=29.0)),
    ("length", "ipo", "0.60 times as long", method("ipo", length=12.0), method("ipo", length=14.0)),
    ("under-trained", "dpo", "200 steps saw 2,999 of 3,000 pairs", method("dpo", pairs_seen=2999),
     method("dpo", pairs_seen=3000)),
    ("under-trained", "dpo", "validation rose to the last step (+0.300 at 50, +0.400 at 100)", tried([0.3, 0.4]),
     tried([0.38, 0.4])),
    ("under-trained", "dpo", "grew at 100% of its mean pace", probed([0, 1, 2, 3]), probed([0, 2, 3, 3.2])),
    ("under-trained", "e-dpo", "0.004 nats from pi_ref and has hardly moved",
     method("e-dpo", kl=0.004, chosen_logratio=0.02, rejected_logratio=-0.05),
     method("e-dpo", kl=0.004, chosen_logratio=0.02, rejected_logratio=-0.5)),
    ("under-trained", "ipo", "writes as SFT does for 60% of the prompts", ties(0.6), ties(0.5)),
    ("edge", "dpo", "beta 1 is the greatest of the 3 that were tried (0.1 to 1)",
     tried([0.1, 0.2, 0.3], betas=(0.1, 0.3, 1.0)), tried([0.1, 0.3, 0.2], betas=(0.1, 0.3, 1.0), chosen=1)),
    ("edge", "dpo", "beta 0.1 is the least of the 2", tried([0.9, 0.3], betas=(0.1, 0.3), chosen=0),
     tried([0.3, 0.9])),
    ("close choice", "dpo", "1 of the 2 others", tried([0.1, 0.26, 0.3], betas=(0.1, 0.3, 1.0)),
     tried([0.1, 0.24, 0.3], betas=(0.1, 0.3, 1.0))),
    ("not told apart", "", "dpo has the greatest advantage, but 400 test prompts do not tell it from ipo",
     pair("dpo - ipo", 0.06), pair("dpo - ipo", 0.04)),
    ("not told apart", "", "do not tell it from e-dpo", pair("dpo - e-dpo", None, difference=0.0),
     pair("dpo - e-dpo", None, difference=0.3)),
    ("few", "", "999 training pairs are few", subset("rho", 999), subset("rho", 1000)),
    ("few", "b0.8", "an ensemble member's subset has 99 pairs", subset("b0.8", 99), subset("b0.8", 100)),
    ("few", "", "25 test prompts: win rates are known to +-20 points", n(25), n(100)),
    ("few", "", "4 validation pairs", kept(valid=4), kept(valid=100)),
    ("few", "", "0 validation pairs: accuracies of reward models are known to nothing", kept(valid=0), kept(valid=101)),
    ("ties", "ipo", "ties with SFT on 21%", ties(0.21), ties(0.2)),
    ("ties", "", "alike in 1,001 of 5,000 pairs", lambda v: v["labels"].update(ties_dropped=1001),
     lambda v: v["labels"].update(ties_dropped=None)),
    ("left out", "", "302 of 602 rows of references were left out, 301 for: prompt longer", dropped(301), dropped(299)),
    ("oracle", "oracle", "orders 59% of 500 validation pairs", oracle(0.59), oracle(0.6)),
    ("oracle", "oracle", "the given one agrees with 55%", given_oracle(0.55), given_oracle(0.61)),
    ("oracle", "oracle", "and a coin with half", given_oracle(0.1), given_oracle(None)),
    ("commit", "", "is not known", commit(None), commit("abc")),
    ("commit", "", "had changes that commit 0123456789ab has not", commit("0123456789abcdef-dirty"), commit("0" * 40)),
]  # fmt: skip


def test_of_a_sound_run_nothing_is_said() -> None:
    assert found(lambda _: None) == []


@pytest.mark.parametrize(("kind", "about", "words", "fires", "quiet"), BOTH_SIDES)
def test_a_rule_fires_on_one_side_of_its_threshold(kind: str, about: str, words: str, fires: Edit, quiet: Edit) -> None:
    said = [one for one in found(fires) if one.kind == kind and one.about == about]
    assert [words in one.text for one in said] == [True], f"{said}"
    assert "\n" not in said[0].line
    assert not [one for one in found(quiet) if one.kind == kind and one.about == about]


def test_every_rule_is_tried() -> None:
    assert {kind for kind, *_ in BOTH_SIDES} == RULES.keys() - {"not finite"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_wherever_it_is_and_no_rule_falls_over_it(value: float) -> None:
    whole = of(Results, sound())
    row = whole.methods["ipo"]
    changed: dict[str, Any] = dict.fromkeys(
        ("kl", "length", "utility", "chosen_logratio", "finished", "oracle_reward"), value
    )
    everywhere = replace(row, **changed)
    broken = replace(whole, methods={**whole.methods, "ipo": replace(everywhere, advantage=value, ci=(value, 1.0))})
    first = cautions(broken)[0]
    assert (first.kind, first.about) == ("not finite", "")
    assert first.text.startswith(
        "not finite: methods.ipo.oracle_reward, methods.ipo.length, methods.ipo.finished, methods.ipo.kl and 4 more"
    )
    one = replace(whole, wald={**whole.wald, "dpo - ipo": replace(whole.wald["dpo - ipo"], z=value)})
    assert [each.text.split(";")[0] for each in cautions(one)] == ["not finite: wald.dpo - ipo.z"]


def test_members_of_small_subsets_are_one_line() -> None:
    def edit(values: dict[str, Any]) -> None:
        subset("b0.2", 12)(values)
        subset("b0.8", 40)(values)

    assert [one.line for one in found(edit)] == [
        "b0.2, b0.8: an ensemble member's subset has 12 pairs: members may differ by chance more than by bias"
    ]


def test_members_that_no_method_distils_are_not_spoken_of() -> None:
    def edit(values: dict[str, Any]) -> None:
        subset("b0.2", 12)(values)
        del values["reward_models"]["b0.2"]

    assert found(edit) == []


def test_equal_advantages_are_not_called_the_greatest() -> None:
    def edit(values: dict[str, Any]) -> None:
        for name in ("dpo", "ipo"):
            values["methods"][name]["advantage"] = 0.6
        pair("dpo - ipo", 0.5)(values)

    (said,) = [one.text for one in found(edit) if one.kind == "not told apart"]
    assert said.startswith("dpo has the same advantage as others, and 400 test prompts do not tell it from ipo")


def test_a_step_before_the_last_was_chosen_so_more_steps_are_not_asked_for() -> None:
    def edit(values: dict[str, Any]) -> None:
        tried([0.4, 0.2], chosen=0)(values)
        method("dpo", pairs_seen=100)(values)

    assert [one for one in found(edit) if one.kind == "under-trained"] == []


def test_holm_asks_more_of_many_tests_than_of_one() -> None:
    def edit(values: dict[str, Any]) -> None:
        pair("dpo - ipo", 0.03)(values)
        pair("dpo - e-dpo", 0.04)(values)

    assert [one.text for one in found(edit) if one.kind == "not told apart"] == [
        "dpo has the greatest advantage, but 400 test prompts do not tell it from ipo, e-dpo (95%, Holm over 2 tests)"
    ]


def test_one_method_is_compared_with_none() -> None:
    values = recorded({"d-dpo": DistilledDPO()})
    assert not [one for one in cautions(of(Results, values)) if one.kind == "not told apart"]


def test_the_demo_is_warned_of_its_drdo_which_wins_by_the_oracle_alone() -> None:
    said = cautions(read(Path(__file__).parents[2] / "figures/results/demo.json"))
    assert any(one.kind == "utility" and one.about == "drdo" for one in said)
