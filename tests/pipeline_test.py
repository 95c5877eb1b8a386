"""The whole pipeline on very small data: every stage, what is computed again, and faults before any training."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from figures.record import read
from lm import prepare
from lm import reward as reward_door
from lm.base.files import read_jsonl
from lm.base.store import Artifact
from lm.config import (
    SFT,
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LogprobsConfig,
    ProbeConfig,
    SamplingConfig,
    TrainingConfig,
    WorldConfig,
)
from lm.evaluate import UPSTREAM
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_pairs, score_rows
from lm.models.loading import SCRATCH, load_tokenizer
from lm.models.opening import open_policy
from lm.objectives import DPO, DRDO, MAIN, METHODS, PAPERS
from lm.reporting.cautions import cautions
from lm.reporting.results import report
from lm.reporting.results import results as record_of
from lm.stages.data import data, given_pairs, opened, references, tokenizer
from lm.stages.evaluations import choose, evaluation, pair_logratios
from lm.stages.labels import labelled_pairs, labels, open_oracle, oracle
from lm.stages.policies import policy
from lm.stages.rewards import reward
from lm.stages.run import Run, command
from lm.stages.scores import PROBE, scored_pairs, scores
from lm.stages.subsets import members, subset
from lm.stages.trainings import sft
from lm.stages.yardstick import best_of_n
from lm.workflow import job
from tests.tiny import causal_lm, reward_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="session", autouse=True)
def _tiny() -> Iterable[None]:
    """The pipeline is under test, not the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


def steps(count: int) -> TrainingConfig:
    return TrainingConfig(max_steps=count, batch_size=8, learning_rate=1e-3)


def config(output_dir: Path, data: DataConfig, **options: Any) -> Config:
    return Config(
        **{
            "output_dir": str(output_dir),
            "model": "scratch:tiny",
            "sft": steps(3),
            "oracle": steps(3),
            "reward": steps(3),
            "policy": steps(3),
            "device": "cpu",
            "data": data,
            "bias": BiasConfig(rho=0.4, member_fractions=[0.4, 0.5, 0.6]),
            "sampling": SamplingConfig(batch_size=64),
            "evaluation": EvaluationConfig(resamples=100),
            **options,
        }
    )


WORLD = DataConfig(
    prompt_template="{post}\n\nTL;DR:",
    max_prompt_length=120,
    max_completion_length=60,
    valid_fraction=0.1,
    test_fraction=0.15,
    world=WorldConfig(posts=120),
)


@pytest.fixture(scope="module")
def world_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """A finished run of every method of the papers on the embedded world."""
    done = config(tmp_path_factory.mktemp("world"), WORLD)
    return done, results(Run(done))


def results(run: Run) -> dict[str, Any]:
    """A run's record, as results.json has it."""
    return record_of(run).as_json()


def stages_made(capsys: pytest.CaptureFixture[str], run_config: Config) -> list[str]:
    """What a run computes, as it says itself."""
    capsys.readouterr()
    results(Run(run_config))
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]


# ---------------------------------------------------------------- validation


def test_validation_chooses_the_setting_and_the_step(world_run: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    """Three settings, one of which cannot leave pi_ref, by three steps, the first of which has hardly left it."""
    done, plain = world_run
    settings = [{"beta": 0.5}, {"beta": 1e-9}, {"beta": 0.1}]
    faster = replace(done.policy, learning_rate=1e-2)
    swept = replace(done, methods=["dpo", "ipo"], sweep={"dpo": settings}, snapshots=3, policy=faster)
    run = Run(swept)
    report = results(run)
    row = report["methods"]["dpo"]
    tried = row["validation"]
    assert [(one["setting"]["beta"], one["step"]) for one in tried] == [
        (setting["beta"], step) for setting in settings for step in (1, 2, 3)
    ]
    best = max(tried, key=lambda one: one["advantage"])
    assert (row["setting"], row["step"]) == (best["setting"], best["step"])
    assert len({one["advantage"] for one in tried}) > 3, "there was something to choose from"
    # By hand: the models behind two of the entries, on the same prompts.
    chosen = choose(run, "dpo")
    assert row["policy"] == str(chosen.model)
    held_out = labelled_pairs(run, "valid")
    prompts = list(dict(zip(held_out["prompt"], held_out["prompt_ids"], strict=True)).values())
    rewards, logps = [], []
    for model in (chosen.model, sft(run).path):
        policy_of = open_policy(model, tokenizer(run), swept)
        seed = run.seed("evaluate")
        samples = sample_completions(policy_of, prompts, tokenizer(run), swept, seed=seed, what="")
        end = tokenizer(run).eos_token_id
        ended = [sample if sample[-1] == end else [*sample, end] for sample in samples]
        rewards.append(score_rows(open_oracle(run), prompts, ended, ""))
        logps.append((policy_of, samples))
    assert best["advantage"] == pytest.approx(float((rewards[0] - rewards[1]).mean()), rel=1e-6)
    (policy_model, drawn), (reference, _) = logps
    ratios = score_rows(policy_model, prompts, drawn, "") - score_rows(reference, prompts, drawn, "")
    assert best["kl"] == pytest.approx(float(ratios.mean()), rel=1e-6)
    assert row["pairs_seen"] == row["step"] * 8
    # The method without settings has its own options only; a run without a choice validates nothing.
    assert {one["setting"]["tau"] for one in report["methods"]["ipo"]["validation"]} == {
        asdict(done.method("ipo"))["tau"]
    }
    assert plain["methods"]["dpo"]["validation"] == []


def test_a_snapshot_is_the_model_of_that_step(world_run: tuple[Config, dict[str, Any]]) -> None:
    done, _ = world_run
    several = policy(Run(replace(done, methods=["dpo"], snapshots=3)), "dpo")
    one = Run(replace(done, methods=["dpo"], policy=replace(done.policy, max_steps=2, schedule="constant_with_warmup")))
    three = Run(
        replace(done, methods=["dpo"], policy=replace(done.policy, schedule="constant_with_warmup"), snapshots=3)
    )
    ends = [
        load_file(path / "model.safetensors")
        for path in (policy(one, "dpo").path, policy(three, "dpo").path / "step-2")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert sorted(path.name for path in several.path.glob("step-*")) == ["step-1", "step-2"]
    last = load_file(policy(three, "dpo").path / "model.safetensors")
    assert not all(torch.equal(ends[0][name], last[name]) for name in last)


def test_every_policy_is_probed_while_it_trains(world_run: tuple[Config, dict[str, Any]]) -> None:
    _, report = world_run
    for name, row in report["methods"].items():
        assert [entry["step"] for entry in row["probe"]] == [0, 1, 2, 3]
        assert row["probe"][0]["chosen_logratio"] == pytest.approx(0, abs=1e-4), "pi_ref at the start"
        assert abs(row["probe"][0]["forward_kl_reference"]) < 1e-4
        assert ("member_shares" in row["probe"][0]) == ("members" in METHODS[name].needs)
        for entry in row["probe"]:
            assert sum(entry.get("member_shares", [1.0])) == pytest.approx(1)


def test_a_run_may_do_without_probes(world_run: tuple[Config, dict[str, Any]]) -> None:
    done, plain = world_run
    report = results(Run(replace(done, methods=["dpo"], probe=ProbeConfig(pairs=0))))
    assert report["methods"]["dpo"]["probe"] == []
    assert report["methods"]["dpo"]["advantage"] == plain["methods"]["dpo"]["advantage"]


# ---------------------------------------------------------------- the embedded world


def test_results_have_every_method_and_where_they_come_from(world_run: tuple[Config, dict[str, Any]]) -> None:
    _, report = world_run
    report = json.loads(json.dumps(report, allow_nan=False))
    assert list(report["methods"]) == list(PAPERS)
    prompts = report["sft"]["n"]
    for row in report["methods"].values():
        low, high = row["ci"]
        assert low <= row["advantage"] <= high
        assert row["n"] == prompts >= 5
        assert row["length"] > 0
        for name in ("kl", "chosen_logratio", "rejected_logratio", "utility"):
            assert np.isfinite(row[name])
    assert {"length", "kl", "oracle_reward", "utility"} <= report["sft"].keys()
    assert report["sft"]["kl"] == report["sft"]["chosen_logratio"] == 0, "pi_ref against itself"
    assert {"versions", "commit", "machine", "date", "seed", "command"} <= report["provenance"].keys()
    assert len(report["wald"]) == len(PAPERS) * (len(PAPERS) - 1) // 2
    assert set(report["reward_models"]) == {MAIN, "b0.4", "b0.5", "b0.6"}
    assert len({row["policy"] for row in report["methods"].values()}) == len(PAPERS)


def test_the_advantage_is_the_paired_difference_of_oracle_rewards(world_run: tuple[Config, dict[str, Any]]) -> None:
    run_config, report = world_run
    run = Run(run_config)
    rows = {
        name: [row for _, row in read_jsonl(evaluation(run, name).path / "samples.jsonl")] for name in ("sft", "ipo")
    }
    assert [row["prompt"] for row in rows["sft"]] == [row["prompt"] for row in rows["ipo"]]
    difference = np.mean(
        [a["oracle_reward"] - b["oracle_reward"] for a, b in zip(rows["ipo"], rows["sft"], strict=True)]
    )
    assert report["methods"]["ipo"]["advantage"] == pytest.approx(difference)
    assert report["methods"]["ipo"]["kl"] == pytest.approx(np.mean([row["log_ratio"] for row in rows["ipo"]]))
    tests = set(labelled_pairs(run, "test")["prompt"])
    assert {row["prompt"] for row in rows["sft"]} == tests
    assert not tests & set(labelled_pairs(run, "train")["prompt"])
    assert not tests & set(references(run)["prompt"])


def test_a_report_is_a_table_a_file_and_a_picture(
    world_run: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, values = world_run
    names = ["sft", *PAPERS]
    report(Run(run_config, read_only=UPSTREAM))
    folder = Path(run_config.output_dir)
    assert json.loads((folder / "results.json").read_text())["methods"] == values["methods"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(PAPERS)} methods on {values['sft']['n']}" in re.sub("<.*?>", "", (folder / "report.html").read_text())
    shown = capsys.readouterr().out
    first = [line.split()[0] for line in shown.splitlines() if line.split()]
    assert [word for word in first if word in names] == [*names, *PAPERS], "the results, then the comparisons"
    said = [line.removeprefix("warning: ") for line in shown.splitlines() if line.startswith("warning: ")]
    assert said == [one.line for one in cautions(read(folder / "results.json"))]
    assert any("saw 24 of" in line for line in said), "three steps of eight pairs"


def test_the_biased_set_has_the_asked_share_and_the_members_are_parts_of_it(
    world_run: tuple[Config, dict[str, Any]],
) -> None:
    run = Run(world_run[0])
    report = world_run[1]["bias"]
    whole = set(subset(run, MAIN)["id"])
    sizes = set()
    for name, share in ((MAIN, 0.4), ("b0.4", 0.4), ("b0.5", 0.5), ("b0.6", 0.6)):
        rows = subset(run, name)
        assert set(rows["id"]) <= whole
        lengths = [(len(c), len(r)) for c, r in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        longer = sum(c > r for c, r in lengths)
        assert longer == report[name]["longer_preferred"] == int(share * len(rows) + 0.5)
        assert all(10 * max(pair) >= 11 * min(pair) for pair in lengths)
        sizes.add((name == MAIN, len(rows)))
    assert len(sizes) == 2, "all members are of one size"


def test_labels_are_the_oracles(world_run: tuple[Config, dict[str, Any]]) -> None:
    run = Run(world_run[0])
    given = {row["id"]: row for row in given_pairs(run, "train")}
    labelled = list(labelled_pairs(run, "train"))
    assert all(row["oracle_chosen_reward"] > row["oracle_rejected_reward"] for row in labelled)
    kept = [row["chosen"] == given[row["id"]]["chosen"] for row in labelled]
    assert 0 < sum(kept) < len(kept), "some labels change and some do not"
    for row, same in zip(labelled, kept, strict=True):
        other = given[row["id"]]
        sides = ("chosen", "rejected") if same else ("rejected", "chosen")
        assert (row["chosen_ids"], row["rejected_ids"]) == tuple(other[f"{side}_ids"] for side in sides)


def test_reward_models_are_listed_with_their_folder_and_accuracy(
    world_run: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, reported = Run(world_run[0]), world_run[1]["reward_models"]
    reward_door.work(run)
    _, _, heading, *lines = capsys.readouterr().out.splitlines()
    classes = ["all", "longer", "shorter", "neither"]
    assert heading.split() == [*classes, "loss", "error"]
    for name, line in zip([MAIN, *members(run)], lines, strict=True):
        folder, *values = line.split()
        assert Path(folder) == reward(run, name).path
        expected = [reported[name][which]["accuracy"] for which in classes]
        expected += [reported[name]["calibration"][key] for key in ("loss", "calibration_error")]
        assert values == ["-" if value is None else f"{value:.3f}" for value in expected]
    assert len({tuple(line.split()[1:]) for line in lines}) > 1, "not one model several times"


def test_reward_models_can_be_compared_without_what_policies_need(
    world_run: tuple[Config, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reported = Run(world_run[0]), world_run[1]["reward_models"]
    monkeypatch.setattr("lm.stages.scores.scores", lambda run: pytest.fail("reference log-probs and samples"))
    made = job.rewards(run)["reward_models"]
    assert {name: model["accuracy"] for name, model in made.items()} == reported
    pairs = labelled_pairs(run, "test")
    for name, model in made.items():
        found = model["test_accuracy"]
        assert found["all"]["pairs"] == len(pairs), "on test pairs"
        assert found["calibration"] != reported[name]["calibration"], "which are others than the validation pairs"
        assert 0 < found["calibration"]["loss"] < 2


def test_a_job_of_reward_models_needs_a_method_that_distils_one(world_run: tuple[Config, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="methods dpo distil no reward model; name one that does"):
        job.rewards(Run(replace(world_run[0], methods=["dpo"])))


def test_what_pi_ref_says_of_test_pairs_is_computed_once_and_every_evaluation_is_against_it(
    world_run: tuple[Config, dict[str, Any]],
) -> None:
    run_config, report = world_run
    run, (file,) = Run(run_config), Path(run_config.output_dir).glob("evaluate/reference-*/logps.npy")
    pairs, sides = labelled_pairs(run, "test"), ("chosen", "rejected")
    reference = torch.from_numpy(np.load(file))

    def scored(model: Path) -> torch.Tensor:
        policy = open_policy(model, tokenizer(run), run.config)
        return torch.stack(score_pairs(policy, pairs, "again"))

    torch.testing.assert_close(scored(sft(run).path), reference, rtol=0, atol=1e-9)
    zero = evaluation(run, SFT).metrics
    assert (zero["kl"], zero["chosen_logratio"], zero["rejected_logratio"]) == (0, 0, 0)
    found = report["methods"]["ipo"]
    each = pair_logratios(run, "ipo")
    assert each is not None
    for side, ratios in zip(sides, scored(Path(found["policy"])) - reference, strict=True):
        assert found[f"{side}_logratio"] == pytest.approx(float(ratios.mean()), abs=1e-9)
        assert found[f"{side}_logratio"] != 0
        assert each[f"{side}_logratio"] == pytest.approx(ratios.tolist(), abs=6e-5), "of every pair"
    assert np.mean(each["accuracy"]) == pytest.approx(found["accuracy"])
    of_prompt: dict[str, int] = {}
    assert each["prompt"] == [of_prompt.setdefault(prompt, len(of_prompt)) for prompt in pairs["prompt"]]
    assert each["digest"] == (pair_logratios(run, "dpo") or {})["digest"]
    assert pair_logratios(run, SFT) is None, "which no method is held against"


def test_a_second_run_computes_nothing(
    world_run: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, report = world_run
    assert stages_made(capsys, run_config) == []
    again = results(Run(run_config, read_only=UPSTREAM))
    assert again["methods"] == report["methods"]


def test_another_beta_of_one_method_is_that_methods_business(
    world_run: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, _ = world_run
    changed = run_config.with_options(dpo=DPO(beta=0.5))
    assert stages_made(capsys, changed) == ["[policy] dpo", "[evaluate] dpo"]
    assert stages_made(capsys, run_config) == [], "what was there is still there"
    assert stages_made(capsys, replace(run_config, methods=["ipo"])) == []


def test_the_best_of_n_is_of_the_samples_of_held_out_prompts(world_run: tuple[Config, dict[str, Any]]) -> None:
    done, plain = world_run
    assert "best_of_n" not in plain, "of one sample a prompt there is no best"
    several = Run(replace(done, sampling=replace(done.sampling, reference_samples=3)))
    found = best_of_n(several)
    assert found is not None
    assert [one["n"] for one in found] == [1, 2, 3]
    assert found[0]["advantage"] == pytest.approx(0, abs=1e-12)
    # By hand, of three: the greatest of each prompt's rewards over their mean.
    rows = {tuple(row["prompt_ids"]): row["sample_ids"] for row in opened(scores(several).path / PROBE)}
    end = tokenizer(several).eos_token_id
    gains = []
    for prompt, samples in rows.items():
        ended = [sample if sample[-1] == end else [*sample, end] for sample in samples]
        rewards = score_rows(open_oracle(several), [list(prompt)] * 3, ended, "")
        gains.append(float(rewards.max() - rewards.mean()))
    assert found[2]["advantage"] == pytest.approx(np.mean(gains), rel=1e-5)
    assert found[2]["prompts"] == len(gains)
    assert found[2]["ci"][0] <= found[2]["advantage"] <= found[2]["ci"][1]
    no_probe = replace(several.config, probe=ProbeConfig(pairs=0))
    assert best_of_n(Run(no_probe)) is None


@pytest.mark.thorough
def test_what_saves_memory_recomputes_nothing_and_what_changes_numbers_does(
    world_run: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, _ = world_run
    frugal = replace(
        run_config.policy, micro_batch_tokens=200, micro_batch_size=2, activation_checkpointing=True, save_steps=1
    )
    assert stages_made(capsys, replace(run_config, policy=frugal)) == []
    assert stages_made(capsys, replace(run_config, logprobs=LogprobsConfig(route="padded"))) == []
    other = replace(run_config, methods=["p-dpo"], sampling=replace(run_config.sampling, reference_samples=3))
    assert [line for line in stages_made(capsys, other) if "evaluate" not in line] == [
        "[score] pairs",
        "[policy] p-dpo",
        "[yardstick] best-of-n",
    ]
    row = scored_pairs(Run(other), other.method("p-dpo"), "p-dpo")[0]
    assert len(row["sample_ids"]) == len(row["ref_sample_logps"]) == 3
    lower = replace(run_config, methods=["dpo"], logprobs=LogprobsConfig(autocast=True))
    assert "[sft] policy" in stages_made(capsys, lower)


def test_evaluation_does_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = command("lm.evaluate", results, read_only=UPSTREAM, arguments=["--output_dir", str(tmp_path)])
    assert status == 2
    assert "error: there is no finished data world in" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_more_evaluation_prompts_than_there_are_is_an_error(world_run: tuple[Config, dict[str, Any]]) -> None:
    """It is told before anything is trained for it."""
    run_config, _ = world_run
    greedy = replace(run_config, sft=replace(run_config.sft, learning_rate=0.1))
    folders = set(Path(run_config.output_dir).glob("*/*"))
    for options, split in (({"prompts": 10_000}, "test"), ({"valid_prompts": 10_000}, "valid")):
        asked = replace(greedy, snapshots=2, evaluation=EvaluationConfig(resamples=100, **options))
        with pytest.raises(ValueError, match=rf"prompts is 10000, but the {split} split has only \d+ prompts"):
            results(Run(asked))
    assert set(Path(run_config.output_dir).glob("*/*")) == folders


def test_an_infeasible_bias_names_the_largest_size(world_run: tuple[Config, dict[str, Any]]) -> None:
    run_config, _ = world_run
    greedy = replace(run_config, bias=replace(run_config.bias, size=10_000))
    with pytest.raises(ValueError, match=r"bias.size: 10000 pairs of which 40% .* the largest feasible size is \d+"):
        results(Run(greedy))


# ---------------------------------------------------------------- real schemas, local files


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(rng: random.Random, least: int, most: int) -> str:
    words = "cat dog sun tea red old big new ran sat saw ate".split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))


def comparisons(rng: random.Random) -> Iterable[dict[str, Any]]:
    """In the schema of openai/summarize_from_feedback, with the news articles that the set has too."""
    for number in range(80):
        info = {"id": f"t3_{number}", "subreddit": "pets", "title": sentence(rng, 2, 3), "post": sentence(rng, 8, 12)}
        for _ in range(4):
            texts = [sentence(rng, 2, 4), sentence(rng, 6, 9)]
            yield {
                "info": info,
                "summaries": [{"text": f" {text}", "policy": "sup", "note": None} for text in texts],
                "choice": rng.randrange(2),
                "worker": "w",
                "batch": "b",
                "split": "train",
                "extra": {"confidence": 5},
            }
    for number in range(3):
        news: dict[str, Any] = {
            "id": f"cnn_{number}",
            "site": "cnndm",
            "article": "News.",
            "post": None,
            "title": None,
            "subreddit": None,
        }
        yield {"info": news, "summaries": [{"text": "a"}, {"text": "b c"}], "choice": 0}


def posts(rng: random.Random) -> Iterable[dict[str, Any]]:
    for number in range(60):
        post = {"subreddit": "pets", "title": sentence(rng, 2, 3), "post": sentence(rng, 8, 12)}
        yield {"id": f"s{number}", **post, "summary": sentence(rng, 3, 6)}


def dialogues(rng: random.Random) -> Iterable[dict[str, str]]:
    for _ in range(300):
        prompt = f"\n\nHuman: {sentence(rng, 3, 6)}\n\nAssistant: {sentence(rng, 3, 6)}\n\nHuman: {sentence(rng, 3, 6)}"
        replies = [sentence(rng, 2, 4), sentence(rng, 6, 9)]
        rng.shuffle(replies)
        yield {
            side: f"{prompt}\n\nAssistant: {text}" for side, text in zip(("chosen", "rejected"), replies, strict=True)
        }
    yield {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    folder, rng = tmp_path_factory.mktemp("local"), random.Random(0)
    shape: dict[str, Any] = {
        "max_prompt_length": 200,
        "max_completion_length": 60,
        "valid_fraction": 0.1,
        "test_fraction": 0.2,
    }
    return {
        "tldr": DataConfig(
            kind="tldr",
            path=write_jsonl(folder / "comparisons.jsonl", comparisons(rng)),
            sft_path=write_jsonl(folder / "sft.jsonl", posts(rng)),
            **shape,
        ),
        "hh": DataConfig(kind="hh", path=write_jsonl(folder / "hh.jsonl", dialogues(rng)), **shape),
    }


def check_local(report: dict[str, Any], methods: list[str], rows: int, dropped: dict[str, int]) -> None:
    assert list(report["methods"]) == methods
    assert report["sft"]["n"] >= 5
    assert "utility" not in report["sft"]
    assert report["data"]["preferences"]["dropped"] == dropped
    assert sum(report["data"]["preferences"]["kept"].values()) == rows


def test_local_dialogues_go_all_the_way(
    local: dict[str, DataConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(config(tmp_path, local["hh"], methods=["dpo", "e-dpo"]))
    report = results(run)
    check_local(report, ["dpo", "e-dpo"], 300, {"identical completions": 1})
    prepare.work(run)
    kept = report["data"]["preferences"]["kept"]
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"preferences: {kept['train']:,} train, {kept['valid']:,} valid, {kept['test']:,} test",
        "  left out: 1 rows, identical completions",
    ]


def test_local_summaries_go_all_the_way_and_give_the_same_numbers_again(
    local: dict[str, DataConfig], tmp_path: Path
) -> None:
    one, two = (results(Run(config(tmp_path / name, local["tldr"], methods=["d-dpo"]))) for name in ("one", "two"))
    check_local(one, ["d-dpo"], 320, {"no Reddit post": 3})

    def numbers(report: dict[str, Any]) -> Any:
        rows = {name: {**row, "policy": None} for name, row in {**report["methods"], "sft": report["sft"]}.items()}
        return rows, report["wald"], report["reward_models"], report["bias"], report["labels"]

    assert numbers(one) == numbers(two)
    other_seed = Run(config(tmp_path / "three", local["tldr"], seed=1))
    assert data(other_seed).metrics != one["data"], "other prompts are held out"


# ---------------------------------------------------------------- what is asked for is made


def test_only_the_reward_models_that_a_method_distils_are_trained(
    world_run: tuple[Config, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("data", "sft", "oracle", "labels"):  # what all runs share
        shutil.copytree(Path(world_run[0].output_dir) / stage, tmp_path / stage)
    few = config(tmp_path, WORLD, methods=["dpo", "d-dpo"])
    made = stages_made(capsys, few)
    assert [line for line in made if line.startswith("[reward]")] == ["[reward] rho"]
    assert [line for line in made if line.startswith("[score]")] == ["[score] pairs", "[score] rho"]
    none = replace(few, methods=["dpo"], reward=TrainingConfig())
    assert not [line for line in stages_made(capsys, none) if line.startswith("[reward]")]
    more = stages_made(capsys, replace(few, methods=["d-dpo", "e-dpo"]))
    assert [line for line in more if line.startswith("[reward]")] == ["[reward] b0.4", "[reward] b0.5", "[reward] b0.6"]
    assert [line for line in more if line.startswith("[policy]")] == ["[policy] e-dpo"], "d-dpo is what it was"


def test_a_training_that_is_asked_for_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exactly one of epochs and max_steps.*for reward: .*d-dpo distil trained"):
        config(tmp_path, WORLD, methods=["dpo", "d-dpo"], reward=TrainingConfig())
    own: dict[str, Any] = {
        "methods": ["drdo"],
        "options": {"drdo": DRDO(oracle_alpha=0.01)},
    }
    with pytest.raises(ValueError, match=r"got None and None for reward: drdo trains an oracle of its own"):
        config(tmp_path, replace(WORLD, rewards="oracle"), reward=TrainingConfig(), **own)
    with pytest.raises(ValueError, match=r"got None and None for oracle: with data.labels"):
        config(tmp_path, WORLD, oracle=TrainingConfig())
    given = replace(WORLD, kind="preferences", path="pairs.jsonl", labels="given", rewards="given")
    nobody = config(tmp_path, given, methods=["d-dpo"], oracle=TrainingConfig(), reward=TrainingConfig())
    with pytest.raises(ValueError, match="policies are judged by an oracle, so give oracle_model, or say"):
        results(Run(nobody))
    assert not (tmp_path / "data").exists(), "before anything is computed"


# ---------------------------------------------------------------- the oracle's own rewards


def test_the_judges_own_rewards_can_be_distilled(world_run: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    """As a control: same data, pi_ref, oracle and D_rho as with reward models, of which none is trained."""
    done, plain = world_run
    control = replace(done, methods=["dpo", "d-dpo"], data=replace(done.data, rewards="oracle"))
    run, with_models = Run(control), Run(done)
    assert [part(run).path for part in (data, sft, oracle, labels)] == [
        part(with_models).path for part in (data, sft, oracle, labels)
    ]
    labelled = {row["id"]: row for row in labelled_pairs(run, "train")}
    method = control.method("d-dpo")
    scored = scored_pairs(run, method, "d-dpo")
    assert scored["id"][:] == scored_pairs(with_models, method, "d-dpo")["id"][:], "the same D_rho"
    for row in scored:
        judged = labelled[row["id"]]
        assert row["reward_margin"] == judged["oracle_chosen_reward"] - judged["oracle_rejected_reward"]
    report = results(run)
    assert report["reward_models"]["rho"]["all"]["accuracy"] == 1
    assert report["methods"]["dpo"]["advantage"] == plain["methods"]["dpo"]["advantage"], "DPO reads no reward"
    assert report["methods"]["d-dpo"]["advantage"] != plain["methods"]["d-dpo"]["advantage"]
    with pytest.raises(ValueError, match=r"data.rewards is oracle: the oracle's own rewards are distilled"):
        reward(run, "rho")
    with pytest.raises(ValueError, match=r"methods e-dpo need an ensemble, but with data.rewards oracle there is one"):
        data(Run(replace(control, methods=["e-dpo"])))
    with pytest.raises(ValueError, match=r'DataConfig.rewards "oracle" goes with labels "oracle", got labels "given"'):
        replace(done.data, rewards="oracle", labels="given")


# ---------------------------------------------------------------- a given oracle


def save_oracle(folder: Path, tokenizer: Any, **shape: Any) -> str:
    model = reward_model(vocab_size=len(tokenizer), **shape).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_policy(folder: Path, tokenizer: Any) -> str:
    causal_lm(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_given_oracle_judges_and_none_is_trained(
    local: dict[str, DataConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("scratch:tiny", [sentence(random.Random(1), 200, 200)], False)
    run_config = config(
        tmp_path / "run",
        local["hh"],
        model=save_policy(tmp_path / "policy", tokenizer),
        oracle_model=save_oracle(tmp_path / "oracle", tokenizer),
        methods=["d-dpo"],
    )
    made = stages_made(capsys, run_config)
    assert "[labels] oracle" in made
    assert not [line for line in made if line.startswith("[oracle]")]
    assert results(Run(run_config))["oracle"] is None


def test_an_oracle_that_cannot_judge_is_refused_before_anything(local: dict[str, DataConfig], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("scratch:tiny", ["words"] * 9, False)
    two = save_oracle(tmp_path / "two", tokenizer, num_labels=2)
    with pytest.raises(ValueError, match="a reward model has one label, it has 2"):
        Run(config(tmp_path / "run", local["hh"], oracle_model=two))
    policy = save_policy(tmp_path / "policy", tokenizer)
    with pytest.raises(ValueError, match="a sequence-classification model is needed"):
        Run(config(tmp_path / "run", local["hh"], oracle_model=policy))


# ---------------------------------------------------------------- scored pairs

ROW = {
    "id": "a",
    "prompt_ids": [3],
    "chosen_ids": [4, 1],
    "rejected_ids": [5, 1],
    "sample_ids": [[6, 1]],
    "ref_chosen_logps": -1.0,
    "ref_rejected_logps": -2.0,
    "ref_sample_logps": [-3.0],
}
REWARDS = {"chosen_reward": 1.0, "rejected_reward": 0.5}
NAMES = [MAIN, "b0.4", "b0.6"]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run whose scores are two pairs, "a" and "b", as given; `models` holds each reward model's rewards of "b",
    or `older` the second pair's lists as artifacts of the first edition have them."""

    def make(
        pair: dict[str, Any] | None = None, models: dict[str, Any] | None = None, older: dict[str, Any] | None = None
    ) -> Run:
        def artifact(name: str, rows: list[dict[str, Any]]) -> Artifact:
            Dataset.from_list(rows).save_to_disk(str(tmp_path / name / "pairs"))
            return Artifact(tmp_path / name, name, {"reward_models": NAMES, "probe": 0})

        first = ROW | ({"chosen_rewards": [1.0, 2.0, 0.0], "rejected_rewards": [0.5, 4.0, 1.0]} if older else {})
        pairs = artifact("scores", [first, {**first, "id": "b", **(pair or {}), **(older or {})}])
        of_model = {
            name: artifact(name, [{"id": "b", **REWARDS, **(models or {}).get(name, {})}, {"id": "a", **REWARDS}])
            for name in NAMES
        }
        monkeypatch.setattr("lm.stages.scores.scores", lambda run: pairs)
        monkeypatch.setattr("lm.stages.scores.model_scores", lambda run, name: of_model[name])
        return Run(config(tmp_path / "run", WORLD, bias=BiasConfig(rho=0.4, member_fractions=[0.4, 0.6])))

    return make


def test_margins_are_the_differences_of_the_rewards_of_the_models_that_a_method_distils(stored: Any) -> None:
    run = stored(
        models={MAIN: {"chosen_reward": 3.0}, "b0.4": {"chosen_reward": -1.0}, "b0.6": {"rejected_reward": 0.0}}
    )
    pairs = {name: scored_pairs(run, run.config.method(name), name) for name in ("dpo", "d-dpo", "e-dpo")}
    assert pairs["d-dpo"]["reward_margin"][:] == [0.5, 2.5]
    assert pairs["e-dpo"]["member_margins"][:] == [[0.5, 0.5], [-1.5, 1.0]]
    assert not {"reward_margin", "member_margins"} & set(pairs["dpo"].column_names)
    assert "member_margins" not in pairs["d-dpo"].column_names
    assert "reward_margin" not in pairs["e-dpo"].column_names


def test_scores_of_the_first_edition_are_read_as_they_are(stored: Any) -> None:
    run = stored(older={"chosen_rewards": [3.0, 3.0, 3.0], "rejected_rewards": [0.5, 4.0, 1.0]})
    assert scored_pairs(run, run.config.method("d-dpo"), "d-dpo")["reward_margin"][:] == [0.5, 2.5]
    members = scored_pairs(run, run.config.method("e-dpo"), "e-dpo")
    assert members["member_margins"][:] == [[-2.0, -1.0], [-1.0, 2.0]]
    assert not [name for name in members.column_names if name.endswith("_rewards")]


@pytest.mark.parametrize(
    ("pair", "rewards", "message"),
    [
        ({}, {"chosen_reward": float("nan")}, "row b: chosen_reward is nan; every value must be there"),
        ({}, {"rejected_reward": float("inf")}, "row b: rejected_reward is inf; every value"),
        ({}, {"rejected_reward": None}, "row b: rejected_reward is nan; every value must be there and finite"),
        ({}, {"id": "c"}, "row b has no reward; every pair must have been scored"),
        ({"ref_chosen_logps": None}, {}, "row b: ref_chosen_logps is None; every value must be there and finite"),
        ({"ref_sample_logps": [float("-inf")]}, {}, r"row b: ref_sample_logps is \[-inf\]; every value must be there"),
        ({"ref_sample_logps": [-1.0, -2.0]}, {}, "row b: ref_sample_logps has 2 values, row a has 1"),
    ],
)
def test_a_score_that_is_missing_or_not_finite_names_its_row(
    pair: dict[str, Any], rewards: dict[str, Any], message: str, stored: Any
) -> None:
    run = stored(pair, {MAIN: rewards})
    with pytest.raises(ValueError, match=message):
        scored_pairs(run, run.config.method("d-dpo"), "d-dpo")


def test_a_missing_column_is_named(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stored()
    lacking = Dataset.from_list([{name: value for name, value in ROW.items() if name != "ref_rejected_logps"}])
    lacking.save_to_disk(str(tmp_path / "lacking" / "pairs"))
    monkeypatch.setattr("lm.stages.scores.scores", lambda run: Artifact(tmp_path / "lacking", "", {}))
    with pytest.raises(ValueError, match="scored pairs lack ref_rejected_logps; there are id, "):
        scored_pairs(run, run.config.method("d-dpo"), "d-dpo")
