"""The study on a very small world; DRDO's own oracle; prompts out of domain; the focal curves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from lm.base.files import read_jsonl
from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LogprobsConfig,
    OutOfDomainConfig,
    ProbeConfig,
    TrainingConfig,
    WorldConfig,
)
from lm.data.world import events_of
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_pairs
from lm.models.loading import SCRATCH
from lm.models.opening import open_policy
from lm.nondeterministic import work
from lm.objectives import DRDO, JointOracle
from lm.stages.data import opened, tokenizer
from lm.stages.labels import labelled_pairs
from lm.stages.policies import policies, policy
from lm.stages.rewards import asked, own_oracle
from lm.stages.run import Run
from lm.stages.scores import PAIRS, own_scores, scored_pairs, scores
from lm.stages.subsets import subset
from lm.studies.nondeterministic import SPLITS, _split_report, contenders, focal_curves, judged, out_of_domain, study
from lm.training.batches import pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.trainer import JointOracleTrainer
from tests.tiny import causal_lm, close, pairs, training
from theory import losses

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.studies.nondeterministic.IMPLICIT_BETAS", (0.3,))
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


def config(folder: Path, **options: Any) -> Config:
    steps = TrainingConfig(max_steps=3, batch_size=8, learning_rate=1e-3)
    return Config(
        **{
            "output_dir": str(folder),
            "model": "scratch:tiny",
            "device": "cpu",
            **dict.fromkeys(("sft", "oracle", "reward", "policy"), steps),
            "methods": ["dpo", "drdo"],
            "options": {"drdo": DRDO(oracle_alpha=0.01)},
            "bias": BiasConfig(rho=None, member_fractions=[0.4, 0.6]),
            "probe": ProbeConfig(pairs=10, times=2),
            "data": DataConfig(
                labels="given",
                prompt_template="{post}\n\nTL;DR:",
                max_prompt_length=100,
                max_completion_length=24,
                valid_fraction=0.1,
                test_fraction=0.15,
                world=WorldConfig(posts=100, annotator_sharpness=1.0),
            ),
            "evaluation": EvaluationConfig(
                resamples=50, temperatures=[0.5, 1.0], out_of_domain=OutOfDomainConfig(prompts=12, events=(12, 14))
            ),
            **options,
        }
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    run = Run(config(tmp_path_factory.mktemp("study")))
    return run, json.loads(json.dumps(study(run), allow_nan=False))


Done = tuple[Run, dict[str, Any]]


def of_split(run: Run, split: Any) -> Run:
    return Run(replace(run.config, bias=replace(run.config.bias, pairs=split)))


# ---------------------------------------------------------------- the study


@pytest.mark.thorough
def test_the_command_writes_the_results_and_draws_them(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the study as it was made; the figures are drawn from the values by modules that have tests of their own."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("lm.studies.nondeterministic.study", lambda run: done[1])
    monkeypatch.setattr(
        "figures.registry.redraw", lambda name, folder, values: drawn.update({name: values}) or [folder / f"{name}.png"]
    )
    work(Run(replace(done[0].config, output_dir=str(tmp_path))))
    written = json.loads((tmp_path / "nondeterministic.json").read_text())
    assert written == json.loads(json.dumps(done[1]), parse_float=lambda text: float(f"{float(text):.6g}"))
    assert drawn == dict.fromkeys(("n_figure_2", "n_figure_3", "n_figure_4", "n_figure_5"), written)
    shown = capsys.readouterr()
    assert all(name in shown.out for name in (*SPLITS, "drdo"))
    assert f"written: {tmp_path / 'nondeterministic.json'}, {tmp_path / 'n_figure_2.png'}" in shown.err


@pytest.mark.thorough
def test_every_split_trains_on_its_own_pairs(done: Done) -> None:
    run, report = done
    trained = {split: set(subset(of_split(run, split), "rho")["id"]) for split in SPLITS}
    assert trained["hc_he"] | trained["lc_le"] < trained["all"]
    assert not trained["hc_he"] & trained["lc_le"]
    for split in SPLITS:
        assert report["splits"][split]["pairs"]["pairs"] == len(trained[split])
    sure = {split: report["splits"][split]["selection"] for split in ("hc_he", "lc_le")}
    for what in ("certainty", "edit_distance"):
        median = sure["hc_he"][f"median_{what}"]
        assert sure["lc_le"][f"mean_{what}"] < median < sure["hc_he"][f"mean_{what}"]


@pytest.mark.thorough
def test_focal_weights_before_training_are_by_length(done: Done) -> None:
    run, report = done
    rows = list(opened(scores(of_split(run, "lc_le")).path / PAIRS))
    found = report["splits"]["lc_le"]["focal_weights"]
    margins = np.array([row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in rows])
    longer = np.array([len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows])
    weights = (1 / (1 + np.exp(margins))) ** 2
    assert found["longer"] == pytest.approx({"weight": weights[longer > 0].mean(), "pairs": (longer > 0).sum()})
    assert sum(found[name]["pairs"] for name in ("longer", "shorter", "equal")) == len(rows)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(margins, longer)[0, 1])
    assert found["longer_above_half"] == pytest.approx((longer[weights > 0.5] > 0).mean())
    assert found["length_correlation"] < -0.5, "an almost untrained model: a token more is a few nats less"


@pytest.mark.thorough
def test_wins_are_of_the_samples(done: Done) -> None:
    run, report = done
    where = {"split": "lc_le", "domain": "out_of_domain", "temperature": 0.5}
    run = of_split(run, "lc_le")
    made = {name: judged(run, name, "out_of_domain", 0.5) for name in ("dpo", "drdo")}
    rows = {name: [row for _, row in read_jsonl(one.path / "samples.jsonl")] for name, one in made.items()}
    for judge, column in (("oracle", "oracle_reward"), ("utility", "utility")):
        (win,) = [w for w in report["wins"] if w | where | {"policy": "drdo", "against": "dpo", "judge": judge} == w]
        difference = [a[column] - b[column] for a, b in zip(rows["drdo"], rows["dpo"], strict=True)]
        assert win["win"] == pytest.approx(np.mean([d > 0 for d in difference]))
        assert win["rate"] == pytest.approx(win["win"] + win["tie"] / 2)
        assert win["difference"] == pytest.approx(np.mean(difference))
        assert win["ci"][0] <= win["rate"] <= win["ci"][1]
    cells = 3 * 2 * 2  # splits, domains, temperatures
    assert report["methods"] == ["dpo", "drdo", "drdo-implicit"]
    assert len(report["outcomes"]) == cells * 4
    assert len(report["wins"]) == cells * 6 * 2
    temperatures = {
        (r["split"], r["domain"], r["policy"]): r["length"] for r in report["outcomes"] if r["temperature"] == 1
    }
    assert any(r["length"] != temperatures[r["split"], r["domain"], r["policy"]] for r in report["outcomes"])


@pytest.mark.thorough
def test_histograms_count_every_prompt_and_training_is_probed(done: Done) -> None:
    _, report = done
    for row in report["histograms"]["counts"]:
        outcome = next(o for o in report["outcomes"] if o["domain"] == row["domain"] and o["policy"] == "sft")
        assert sum(row["counts"]) == outcome["n"]
    for split in SPLITS:
        assert [entry["step"] for entry in report["training"][split]["drdo"]] == [0, 2, 3]


@pytest.mark.thorough
def test_prompts_out_of_domain_are_longer_than_any_that_is_trained_on(done: Done) -> None:
    run, report = done
    other = out_of_domain(run)
    assert other is not None
    posts = [row["prompt"].removesuffix("\n\nTL;DR:") for _, row in read_jsonl(other.path / "prompts.jsonl")]
    trained = [text.removesuffix("\n\nTL;DR:") for text in labelled_pairs(run, "train")["prompt"]]
    assert len(set(posts)) == 12 == report["out_of_domain"]["prompts"]
    assert {len(events_of(post)) for post in posts} <= {12, 13, 14}
    assert max(len(events_of(post)) for post in trained) < 12


# ---------------------------------------------------------------- articles


def articles(path: Path, count: int, words: int = 3) -> str:
    path.write_text("".join(json.dumps({"article": f"News {i} " + "fire " * words}) + "\n" for i in range(count)))
    return str(path)


def outside(run: Run, **options: Any) -> Run:
    asked = replace(run.config.evaluation, out_of_domain=OutOfDomainConfig(**options))
    return Run(replace(run.config, evaluation=asked))


@pytest.mark.thorough
def test_articles_become_prompts_and_those_too_long_are_counted(done: Done, tmp_path: Path) -> None:
    path = Path(articles(tmp_path / "news.jsonl", 5))
    path.write_text(path.read_text() + json.dumps({"article": "fire " * 200}) + "\n")
    run = outside(done[0], path=str(path), prompts=None, prompt_template="NEWS: {article}\nTL;DR:")
    made = out_of_domain(run)
    assert made is not None
    assert (made.metrics["prompts"], made.metrics["too_long"]) == (5, 1)
    rows = [row for _, row in read_jsonl(made.path / "prompts.jsonl")]
    assert {row["prompt"] for row in rows} == {f"NEWS: News {i} fire fire fire\nTL;DR:" for i in range(5)}
    sample = next(read_jsonl(judged(run, "sft", "out_of_domain", 1.0).path / "samples.jsonl"))[1]
    assert "oracle_reward" in sample
    assert "utility" not in sample, "an article is no post of the world"


@pytest.mark.thorough
def test_what_cannot_be_asked_out_of_domain(done: Done, tmp_path: Path) -> None:
    path = articles(tmp_path / "news.jsonl", 5)
    with pytest.raises(ValueError, match=r"prompts is 9, but of the 5 prompts of .*news.jsonl only 5 have at most 100"):
        out_of_domain(outside(done[0], path=path, prompts=9))
    Path(path).write_text('{"artcle": "News."}\n')
    with pytest.raises(
        ValueError, match=r"news.jsonl, line 1: a column 'article' of text is needed, there are \['artcle'\]"
    ):
        out_of_domain(outside(done[0], path=path))
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"prompt_template": "{post}"}, "prompt_template must be a text with {article} once, got '{post}'"),
        ({"events": (9, 7)}, "events must be fewest and most, between 1 and 16"),
        ({"prompts": 0}, "prompts must be > 0, got 0"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            OutOfDomainConfig(**wrong)
    for temperatures in ([], [0.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="temperatures must be one or more, each > 0, none twice"):
            EvaluationConfig(temperatures=temperatures)


# ---------------------------------------------------------------- DRDO's own oracle


def test_the_oracles_loss_is_equation_5_over_the_whole_mini_batch(tmp_path: Path) -> None:
    rows, steps = pairs(8), training(learning_rate=1e-3)

    def model() -> CompletionModel:
        torch.manual_seed(0)
        return CompletionModel(causal_lm(), reward_head=True, options=LogprobsConfig(route="padded"))

    before = model()
    chosen, rejected = score_pairs(before, rows, "", rewards=True)
    logps, _ = score_pairs(before, rows, "", rewards=False)
    histories, weights = {}, {}
    for name, alpha, micro in (("plain", 0.3, None), ("cut", 0.3, 3), ("bt", 0.0, None)):
        arguments = training_arguments(replace(steps, micro_batch_size=micro), tmp_path / name, seed=0, device="cpu")
        trained = model()
        oracle = JointOracle(alpha=alpha)
        histories[name] = fit(JointOracleTrainer, trained, rows, pair_collator(), arguments, oracle=oracle)
        weights[name] = trained.state_dict()
    loss = losses.drdo_oracle(chosen - rejected, logps, alpha=0.3).mean()
    assert histories["plain"][0]["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert histories["bt"][0]["loss"] != pytest.approx(float(loss), rel=1e-3)
    assert histories["plain"][0]["chosen_logps"] == pytest.approx(float(logps.mean()), rel=1e-6)
    for name, value in weights["plain"].items():
        close(weights["cut"][name], value, tolerance=1e-9, what=name)
    head = "model.lm_head.weight"
    start = model().state_dict()
    moved = {name: (weights[name][head] - start[head]).abs().max() for name in ("plain", "bt")}
    assert moved["plain"] > 0, "the LM head learns"
    assert moved["bt"] == 0, "without the LM term it does not"


@pytest.mark.thorough
def test_drdo_distils_its_own_oracle_and_nothing_else_changes(done: Done) -> None:
    run = of_split(done[0], "all")
    with_one = run.config.method("drdo")
    oracle = own_oracle(run, "drdo", with_one)
    scored = load_from_disk(str(own_scores(run, "drdo", with_one).path / "pairs"))
    policy_with_head = open_policy(oracle.path, tokenizer(run), run.config, reward_head=True)
    chosen, rejected = score_pairs(policy_with_head, subset(run, "rho"), "", rewards=True)
    assert scored["chosen_reward"] == pytest.approx(chosen.tolist())
    own = dict(zip(scored["id"], (chosen - rejected).tolist(), strict=True))
    drdo = scored_pairs(run, with_one, "drdo")
    assert drdo["reward_margin"] == pytest.approx([own[row] for row in drdo["id"]])
    accuracy = oracle.metrics["accuracy"]
    assert accuracy["all"]["pairs"] == sum(accuracy[name]["pairs"] for name in ("longer", "shorter", "neither"))
    shared = Run(run.config.with_options(drdo=DRDO()))
    without = shared.config.method("drdo")
    others = scored_pairs(shared, without, "drdo")
    assert others["reward_margin"] == scored_pairs(shared, shared.config.method("d-dpo"), "d-dpo")["reward_margin"]
    assert drdo["reward_margin"] != pytest.approx(others["reward_margin"])
    assert scores(shared).key == scores(run).key
    assert policy(shared, "dpo").key == policy(run, "dpo").key
    assert policy(shared, "drdo").key != policy(run, "drdo").key
    with pytest.raises(ValueError, match="drdo has no oracle of its own"):
        own_oracle(shared, "drdo", without)


@pytest.mark.thorough
def test_both_readings_of_drdo_are_trained(done: Done) -> None:
    run, report = done
    chosen = report["splits"]["all"]["chosen"]
    readings = {label: chosen[label]["setting"]["reward_estimate"] for label in ("drdo", "drdo-implicit")}
    assert readings == {"drdo": "head", "drdo-implicit": "implicit"}
    run, name = contenders(run)["drdo-implicit"]
    assert policies(run, name)[0].key != policy(run, "drdo").key
    implicit = run.config.with_options(drdo=DRDO(reward_estimate="implicit", beta=0.3))
    assert list(contenders(Run(implicit))) == ["sft", "dpo", "drdo"], "it is the one that is configured"


@pytest.mark.thorough
def test_reward_models_are_those_that_some_method_distils(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("asked for")

    assert asked(done[0]) == ["drdo"], "DRDO has its own, and DPO distils none"
    monkeypatch.setattr("lm.stages.rewards.own_oracle", refuse)
    run = Run(replace(done[0].config, methods=["dpo", "d-dpo"]))
    assert asked(run) == ["rho"]
    assert set(_split_report(run)["reward_models"]) == {"rho"}
    assert asked(Run(replace(done[0].config, methods=["e-dpo"]))) == ["b0.4", "b0.6"]
    with pytest.raises(AssertionError, match="asked for"):
        _split_report(Run(done[0].config))


def test_the_weight_is_a_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DRDO.oracle_alpha must be between 0 and 1, or null, got 1.5"):
        config(tmp_path, options={"drdo": DRDO(oracle_alpha=1.5)})


# ---------------------------------------------------------------- focal curves


@pytest.mark.thorough
def test_the_curves_are_the_losss(done: Done) -> None:
    curves = focal_curves(gammas=(0.0, 2.0), alpha=0.1, mean_logp=-3.0, width=4.0)
    margin = np.array(curves["margin"])
    chosen, rejected = -3 + margin / 2, -3 - margin / 2
    plain, focal = curves["curves"]
    assert plain["weight"] == [1.0] * len(margin)
    np.testing.assert_allclose(focal["weight"], (1 / (1 + np.exp(margin))) ** 2, rtol=1e-12)
    term = -0.1 * np.array(focal["weight"]) * (chosen - np.log1p(-np.exp(rejected)))
    np.testing.assert_allclose(focal["term"], term, rtol=1e-12)
    # d term / d margin, half by either log-prob, against differences of the curve itself.
    slope = (np.array(focal["chosen_gradient"]) - np.array(focal["rejected_gradient"])) / 2
    np.testing.assert_allclose(slope[1:-1], np.gradient(term, margin)[1:-1], rtol=2e-2, atol=1e-4)
    with pytest.raises(ValueError, match=r"width must be below -2 mean_logp.*; got 8.0, -3.0"):
        focal_curves(mean_logp=-3.0)


def test_drdo_is_as_in_the_paper_by_default() -> None:
    assert (DRDO().alpha, DRDO().gamma) == (0.1, 2.0)
