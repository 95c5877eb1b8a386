"""Pairs that pi_ref samples: unlabelled ones for methods that distil, on-policy ones, and teachers with noise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.base.options import parse
from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    JudgeConfig,
    OnPolicyConfig,
    ProbeConfig,
    TrainingConfig,
    UnlabelledConfig,
    WorldConfig,
)
from lm.data.rewards import MARGIN, MEMBER_MARGINS, ORACLE
from lm.data.rows import Tally
from lm.data.scored import WEIGHT
from lm.data.world import Taste
from lm.models.loading import SCRATCH
from lm.objectives import MemberDPO
from lm.stages.data import given_pairs, tokenizer
from lm.stages.labels import labelled_pairs, labels
from lm.stages.policies import policy
from lm.stages.rewards import asked, stored_rewards
from lm.stages.run import Run
from lm.stages.scores import learnt_pairs, margin, scored_pairs
from lm.stages.unlabelled import _prompts, rows_of, unlabelled

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TASTE = Taste(1.0, 0.05)


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


def small(folder: Path, methods: list[str], data: dict[str, Any], **options: Any) -> Config:
    training = TrainingConfig(max_steps=2, batch_size=8, learning_rate=1e-3)
    known: dict[str, Any] = {
        "prompt_template": "{post}\n\nTL;DR:",
        "max_prompt_length": 120,
        "max_completion_length": 40,
        "valid_fraction": 0.1,
        "test_fraction": 0.2,
        "world": WorldConfig(posts=120),
    }
    return Config(
        **{
            "output_dir": str(folder),
            "model": "scratch:tiny",
            "sft": TrainingConfig(max_steps=150, batch_size=32, learning_rate=5e-3),  # so that samples end
            "policy": training,
            "reward": training,
            "device": "cpu",
            "methods": methods,
            "judge": JudgeConfig(kind="exact"),
            "data": DataConfig(**{**known, "rewards": "oracle", **data}),
            "bias": BiasConfig(rho=0.4, member_fractions=[0.4, 0.5, 0.6]),
            "probe": ProbeConfig(pairs=8, train_pairs=4, times=1),
            "evaluation": EvaluationConfig(resamples=100),
            **options,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs: they share their data and pi_ref."""
    return tmp_path_factory.mktemp("unlabelled")


def worth(prompt: str, completion: str) -> float:
    return TASTE(prompt.removesuffix("\n\nTL;DR:"), completion)


# ---------------------------------------------------------------- unlabelled


def test_all_pairs_of_a_group_are_scored_weigh_one_pair_and_are_seen_by_methods_that_distil_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = UnlabelledConfig(completions=4, prompts=30)
    run = Run(small(folder, ["dpo", "d-dpo", "dp-dpo", "drdo"], {"unlabelled": few}))
    rows = rows_of(run).to_list()
    weights = Counter[str]()
    for row in rows:
        weights[row["prompt"]] += row[WEIGHT]
        assert row["chosen_ids"] != row["rejected_ids"]
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1], "both ended"
    assert set(weights) <= set(given_pairs(run, "train")["prompt"])
    assert list(weights.values()) == pytest.approx([1.0] * len(weights))
    found = unlabelled(run).metrics
    assert (found["samples"], found["prompts"], found["pairs"], found["groups"]) == (120, 30, len(rows), len(weights))
    assert max(Counter(row["prompt"] for row in rows).values()) > 1, "there are groups of three or four"
    labelled = scored_pairs(run, run.config.method("d-dpo"), "d-dpo")
    learnt = learnt_pairs(run, run.config.method("d-dpo"), "d-dpo")
    more = learnt.select(range(len(labelled), len(learnt)))
    assert len(more) == len(rows)
    by_hand = [worth(row["prompt"], row["chosen"]) - worth(row["prompt"], row["rejected"]) for row in rows]
    np.testing.assert_allclose(more[MARGIN][:], by_hand)
    assert learnt[WEIGHT][: len(labelled)] == [1.0] * len(labelled)
    for name in ("dpo", "drdo"):
        method = run.config.method(name)
        assert learnt_pairs(run, method, name)["id"][:] == labelled["id"][:], "no label is made up"
        assert policy(run, name).key == policy(Run(small(folder, [name], {})), name).key, "and nothing is trained anew"
    capsys.readouterr()
    assert policy(run, "dp-dpo").metrics["steps"] == 2, "the KL term has its samples"
    assert (
        f"dp-dpo learns from {len(labelled):,} pairs with labels and {len(rows):,} unlabelled"
        in capsys.readouterr().err
    )
    assert policy(run, "d-dpo").key != policy(Run(small(folder, ["d-dpo"], {})), "d-dpo").key


def test_reward_models_score_them_each_member_too(folder: Path) -> None:
    few = UnlabelledConfig(completions=2, prompts=10)
    run = Run(small(folder, ["e-dpo", "member-dpo"], {"unlabelled": few, "rewards": "models"}))
    learnt = learnt_pairs(run, run.config.method("e-dpo"), "e-dpo")
    count = len(rows_of(run))
    margins = np.array(learnt[MEMBER_MARGINS][:])[-count:]
    for k, name in enumerate(("b0.4", "b0.5", "b0.6")):
        np.testing.assert_array_equal(margins[:, k], margin(run, name, "unlabelled"))
    assert asked(run) == ["b0.4", "b0.5", "b0.6"], "no model of all pairs is trained, which nobody distils"
    own = learnt_pairs(run, run.config.method("member-dpo"), "member-dpo")
    np.testing.assert_array_equal(np.array(own[MARGIN][:])[-count:], margins[:, 1])


def test_a_file_of_prompts_is_sampled_and_what_is_left_out_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Run(small(folder, ["d-dpo"], {}))
    held_out = labelled_pairs(plain, "test")["prompt"][0]
    file = tmp_path / "prompts.jsonl"
    new = [" fire vote picnic\n\nTL;DR:", " flood wedding fair\n\nTL;DR:"]
    texts = (*new, new[0], f"{held_out} !", " fire" * 200)
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    run = Run(small(folder, ["d-dpo"], {"unlabelled": UnlabelledConfig(completions=6, path=str(file))}))
    assert set(rows_of(run)["prompt"]) <= set(new)
    found = unlabelled(run).metrics
    long = "prompt longer than 120 tokens"
    assert (found["prompts"], found["held_out"], found["dropped"]) == (2, 1, {long: 1})
    said = capsys.readouterr().err
    assert f"unlabelled: left out: 1 rows, {long}" in said
    assert "prompts.jsonl, line 5" in said
    file.write_text(json.dumps({"prompt": " fire" * 200}) + "\n")
    run = Run(small(folder, ["d-dpo"], {"unlabelled": UnlabelledConfig(completions=6, path=str(file))}))
    with pytest.raises(ValueError, match=r"no prompt of .* is left: 1 are left out, and 0 stand in the validation"):
        unlabelled(run)


def test_control_tokens_in_a_file_of_prompts_are_read_as_the_sets_own(folder: Path, tmp_path: Path) -> None:
    file, left = tmp_path / "prompts.jsonl", Tally()
    words = tokenizer(Run(small(folder, ["d-dpo"], {})))
    text = f" fire {words.eos_token} vote"
    file.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in (text, " fire vote")))

    def read(how: Any) -> Any:
        few = UnlabelledConfig(completions=2, path=str(file))
        return _prompts(Run(small(folder, ["d-dpo"], {"unlabelled": few, "control_tokens": how})), left)

    found = read("text")
    assert list(found) == [text, " fire vote"]
    assert not any(words.eos_token_id in ids for ids, _ in found.values()), "its name is characters"
    assert list(read("drop")) == [" fire vote"]
    assert left == {"control tokens in a text": 1}
    with pytest.raises(ValueError, match="in a text, which the tokenizer reads as control tokens"):
        read("refuse")


def test_a_file_of_pairs_is_scored_and_its_labels_are_not_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Run(small(folder, ["d-dpo"], {}))
    held_out = labelled_pairs(plain, "valid")["prompt"][0]
    rows = [
        {"prompt": " fire vote picnic\n\nTL;DR:", "chosen": " picnic", "rejected": " fire vote"},
        {"prompt": " fire vote sale\n\nTL;DR:", "chosen": " fire", "rejected": " sale"},
        {"prompt": held_out, "chosen": " fire", "rejected": " sale"},
        {"prompt": " fire vote", "chosen": " fire" * 50, "rejected": " sale"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(small(folder, ["d-dpo"], {"unlabelled": UnlabelledConfig(path=str(file))}))
    assert rows_of(run)["prompt"][:] == [row["prompt"] for row in rows[:2]]
    np.testing.assert_allclose(margin(run, "rho", "unlabelled"), [-0.1 - 1.3 - 0.05, 1.0 - 0.3])
    left = {"completion longer than 40 tokens": 1}
    assert unlabelled(run).metrics == {"held_out": 1, "prompts": 2, "pairs": 2, "dropped": left}
    assert "unlabelled: left out: 1 rows, completion longer than 40 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------- on-policy pairs


@pytest.mark.parametrize("how", ["beside", "instead"])
def test_on_policy_pairs_are_labelled_by_the_judge_in_the_training_split_alone(how: Any, folder: Path) -> None:
    run = Run(small(folder, ["dpo"], {"on_policy": OnPolicyConfig(pairs=how, completions=3)}))
    given = Run(small(folder, ["dpo"], {}))
    for split in ("valid", "test"):
        assert labelled_pairs(run, split)["id"][:] == labelled_pairs(given, split)["id"][:]
    rows = labelled_pairs(run, "train").to_list()
    own = [row for row in rows if row["id"].startswith("on-policy-")]
    before = [row["id"] for row in labelled_pairs(given, "train")]
    assert [row["id"] for row in rows if row not in own] == (before if how == "beside" else [])
    assert len(own) > 20
    for row in own:
        assert (row[ORACLE[0]], row[ORACLE[1]]) == pytest.approx(
            (worth(row["prompt"], row["chosen"]), worth(row["prompt"], row["rejected"]))
        )
        assert row[ORACLE[0]] > row[ORACLE[1]]
    assert labels(run).metrics["on_policy"]["pairs"] >= len(own), "ties were left out"
    assert {row[WEIGHT] for row in rows if row not in own} <= {1.0}
    assert policy(run, "dpo").metrics["steps"] == 2


def test_what_pi_ref_samples_changes_no_given_label_and_is_in_no_agreement(folder: Path) -> None:
    noisy = {"judge": JudgeConfig(kind="exact", sharpness=1.0)}
    found = {}
    for how in (None, "beside", "instead"):
        on_policy: Any = OnPolicyConfig(pairs=how, completions=3)
        run = Run(small(folder, ["dpo"], {"on_policy": on_policy}, **noisy))
        rows = [*labelled_pairs(run, "train"), *labelled_pairs(run, "valid")]
        given = {row["id"]: row["chosen"] for row in rows if not row["id"].startswith("on-policy-")}
        found[how] = given, labels(run).metrics["agreement"]
    every, agreement = found[None]
    assert found["beside"] == (every, agreement)
    held_out, of_fewer = found["instead"]
    assert held_out.items() < every.items()
    assert of_fewer is not None


# ---------------------------------------------------------------- teachers


def test_a_teachers_noise_has_the_scale_asked_for_and_is_one_of_each_completion(folder: Path) -> None:
    exact, noisy = (Run(small(folder, ["d-dpo"], {"reward_noise": scale})) for scale in (0.0, 2.0))
    pairs = labelled_pairs(exact, "train")
    added = np.stack(stored_rewards(noisy, pairs, "rho")) - np.stack(stored_rewards(exact, pairs, "rho"))
    once = {
        (row["prompt"], row[side]): added[i, k]
        for k, row in enumerate(pairs.to_list())
        for i, side in enumerate(("chosen", "rejected"))
    }
    for k, row in enumerate(pairs.to_list()):
        assert once[row["prompt"], row["chosen"]] == pytest.approx(added[0, k], abs=1e-9), "whatever pair it stands in"
    drawn = np.array(list(once.values()))
    assert abs(drawn.mean()) < 4 * 2 / np.sqrt(len(drawn))
    assert drawn.std() == pytest.approx(2, rel=4 / np.sqrt(2 * len(drawn)))
    assert policy(exact, "d-dpo").key != policy(noisy, "d-dpo").key


def test_the_balanced_members_policy_learns_from_that_member_alone(folder: Path) -> None:
    run = Run(small(folder, ["d-dpo", "member-dpo"], {"rewards": "models"}))
    assert asked(run) == ["rho", "b0.5"]
    pairs = scored_pairs(run, run.config.method("member-dpo"), "member-dpo")
    np.testing.assert_array_equal(pairs[MARGIN][:], margin(run, "b0.5"))
    assert MEMBER_MARGINS not in pairs.column_names


# ---------------------------------------------------------------- what is refused


def grouped(data: dict[str, Any]) -> dict[str, Any]:
    """With mappings as the groups of options that they stand for."""
    groups: dict[str, Any] = {"unlabelled": UnlabelledConfig, "on_policy": OnPolicyConfig}
    return {name: groups[name](**of) if name in groups else of for name, of in data.items()}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"unlabelled": {"completions": 1}}, {}, r"UnlabelledConfig.completions must be at least 2, .* got 1"),
        ({"unlabelled": {"prompts": 5}}, {}, r"UnlabelledConfig.prompts 5 go with completions or a path"),
        ({"on_policy": {"completions": 1}}, {}, r"OnPolicyConfig.completions must be at least 2, got 1"),
        (
            {"rewards": "models", "reward_noise": 1.0},
            {},
            r'reward_noise goes with rewards "oracle", got 1 with "models"',
        ),
        ({"reward_noise": -1.0}, {}, r"DataConfig.reward_noise must be >= 0 and finite, got -1"),
        (
            {"on_policy": {"pairs": "beside"}, "labels": "given", "rewards": "models"},
            {},
            r'on_policy needs labels "oracle" .* got labels "given" and rewards "models"',
        ),
        (
            {"on_policy": {"pairs": "beside"}, "rewards": "models"},
            {"reward": TrainingConfig(train="head"), "methods": ["d-dpo"]},
            r'on_policy.pairs "beside" and reward.train "head" do not go together',
        ),
        ({}, {"methods": ["member-dpo"]}, r'member-dpo distils a member .* got "oracle": leave the method out'),
        (
            {"rewards": "models"},
            {"methods": ["member-dpo"], "options": {"member-dpo": MemberDPO(member=0.7)}},
            r"Config.member_dpo.member must be one of bias.member_fractions \(0.4, 0.5, 0.6\), got 0.7",
        ),
    ],
)
def test_what_cannot_be_is_refused(data: Any, options: Any, message: str, tmp_path: Path) -> None:
    methods, others = options.get("methods", ["dpo"]), {k: v for k, v in options.items() if k != "methods"}
    with pytest.raises(ValueError, match=message):
        small(tmp_path, methods, grouped(data), **others)


def test_sets_own_rewards_cannot_score_what_pi_ref_samples() -> None:
    with pytest.raises(ValueError, match=r'unlabelled needs rewards "models" or "oracle", .* got "given"'):
        DataConfig(kind="preferences", path="x", rewards="given", unlabelled=UnlabelledConfig(completions=2))


def test_more_prompts_than_there_are_and_rows_without_a_prompt_are_refused(folder: Path, tmp_path: Path) -> None:
    run = Run(small(folder, ["d-dpo"], {"unlabelled": UnlabelledConfig(completions=2, prompts=9999)}))
    with pytest.raises(ValueError, match=r"data.unlabelled.prompts is 9,999, but there are only \d+ prompts"):
        unlabelled(run)
    file = tmp_path / "none.jsonl"
    file.write_text('{"question": "who?"}\n')
    run = Run(small(folder, ["d-dpo"], {"unlabelled": UnlabelledConfig(completions=2, path=str(file))}))
    with pytest.raises(ValueError, match="needs a prompt, text or messages, in each row"):
        unlabelled(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "[dpo]", "--data.unlabelled.completions", "4"],
            "unlabelled.completions has no effect: .* learn",
        ),
        (["--data.on_policy.completions", "4"], r"on_policy.completions has no effect: data.on_policy.pairs is null"),
        (["--judge.utility", "2"], r"--judge.utility has no effect: judge.kind is model"),
        (["--judge.kind", "exact", "--oracle.epochs", "2"], r"oracle.epochs has no effect: judge.kind is exact"),
    ],
)
def test_an_option_that_would_be_passed_over_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse("lm.train", "", ["--config", "demo", *arguments])


def test_none_of_them_leaves_every_key_as_it_was(folder: Path) -> None:
    run = Run(small(folder, ["dpo"], {}))
    same = replace(run.config, data=replace(run.config.data, reward_noise=0.0, on_policy=OnPolicyConfig(completions=5)))
    assert labels(Run(same)).key == labels(run).key
