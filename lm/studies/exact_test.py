"""The exact world: everything is listed, the optima are those of `bandits`, and training reaches them, or fails to for
the reasons that theory gives."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import numpy as np
import pytest
import torch

from bandits import maxmin, objectives
from bandits.solve import Optimum, solve
from lm import exact as door
from lm.config import ExactConfig
from lm.logprobs.completions import CompletionModel
from lm.models.loading import load_policy
from lm.objectives import DPO, DRDO, IPO, METHODS, PAPERS, DistilledDPO, Method, Pessimism, PessimisticDPO
from lm.studies import exact
from lm.studies.exact import EXACT, Floats, Graphs, Run, Trained, World
from tests.command_lines import over
from theory.preferences import PreferenceGraph


def small(*options: str) -> ExactConfig:
    """Two prompts, 13 completions of at most two of three tokens."""
    sizes = ["--tokens", "3", "--max_length", "2", "--prompts", "2", "--reference_samples", "2000"]
    return door.parse([*sizes, "--sft.max_steps", "60", "--sft.batch_size", "64", *options])[0]


@pytest.fixture(scope="module")
def trained_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Floats]:
    folder = tmp_path_factory.mktemp("reference")
    return folder, exact.distributions(exact.reference_of(small(), folder, closed=True))


@pytest.fixture(scope="module")
def world() -> World:
    return exact.make_world(small())


Trainer = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(trained_reference: tuple[Path, Floats]) -> Trainer:
    def call(method: Method, graphs: Graphs, *, steps: int = 160, **options: Any) -> Trained:
        training = replace(small().policy, max_steps=steps, batch_size=sum(map(len, graphs)))
        run = Run(config=small(), reference=trained_reference[0], method=method, graphs=graphs, training=training)
        return exact.train(replace(run, **options))

    return call


def distance(run: Trained, best: Floats) -> float:
    return float(exact.total_variation(np.exp(run.logps), np.exp(best)).max())


def every_pair(world: World) -> Graphs:
    return [exact.all_pairs(rewards) for rewards in world.rewards]


def connected(world: World, count: int = 13) -> Graphs:
    """Sparse pairs among the first `count` completions."""
    rng = np.random.default_rng(0)
    return [exact.sparse_pairs(rewards, np.arange(count), rng) for rewards in world.rewards]


# ---------------------------------------------------------------- the language


def test_every_completion_once_and_none_a_prefix_of_another() -> None:
    listed = [tuple(y) for y in exact.completions(4, 3)]
    assert len(set(listed)) == len(listed) == 85
    assert max(map(len, listed)) == 3
    assert not any(a != b and b[: len(a)] == a for a in listed for b in listed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_any_network_sum_to_one(world: World, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = CompletionModel(load_policy(exact.MODEL, world.tokenizer, world.config).to(dtype))
    np.testing.assert_allclose(np.exp(world.log_probs(model)).sum(1), 1, atol=1e-6)
    opened = exact.make_world(small(), closed=False)  # the negative control: what goes on is not listed
    assert np.exp(opened.log_probs(model)).sum(1).max() < 0.99
    with pytest.raises(ValueError, match="not to 1: some are missing"):
        exact.distributions(opened.log_probs(model))


def test_prompts_share_no_context() -> None:
    listed = exact.prompts(4, 4)
    assert len({len(p) for p in listed}) == 4
    assert not any(a != b and b[: len(a)] == a for a in listed for b in listed)


def test_why_prompts_start_with_end_of_text(world: World) -> None:
    """Rotary positions turn queries and keys; of equal values any average is the same."""
    torch.manual_seed(0)
    model = load_policy(exact.MODEL, world.tokenizer, world.config)
    with torch.inference_mode():
        repeated, marked = (model(torch.tensor([ids])).logits[0] for ids in ([2, 2, 2], [3, 2, 2]))
    torch.testing.assert_close(repeated[0], repeated[2], atol=1e-5, rtol=1e-5)
    assert (marked[1] - marked[2]).abs().max() > 1e-3


# ---------------------------------------------------------------- pairs and the KL term


def test_weights_of_the_samples_make_the_mean_over_pairs_the_sum_over_completions(world: World) -> None:
    rng = np.random.default_rng(0)
    few = [exact.disjoint_pairs(r, np.arange(13), rng) for r in world.rewards]  # more completions than pairs
    values = rng.normal(size=world.target.shape)
    index = {tuple(y): i for i, y in enumerate(world.completions)}
    uneven = [few[0], every_pair(world)[1]]  # a batch stacks them all
    for graphs in (few, every_pair(world), uneven):
        rows = exact.pair_rows(world, np.log(world.target), graphs, world.target)
        assert len({len(row["sample_ids"]) for row in rows}) == 1
        for x, prompt in enumerate(world.prompts):
            own = [row for row in rows if row["prompt_ids"] == prompt]
            estimates = [
                sum(w * values[x, index[tuple(y)]] for w, y in zip(r["sample_weights"], r["sample_ids"], strict=True))
                for r in own
            ]
            assert np.mean(estimates) == pytest.approx(world.target[x] @ values[x], abs=1e-12)
            plain = [np.mean([values[x, index[tuple(y)]] for y in row["sample_ids"]]) for row in own]
            assert abs(np.mean(plain) - world.target[x] @ values[x]) > 1e-3  # equal weights would not


def test_the_estimators_of_the_kl_agree_in_expectation(world: World) -> None:
    rng = np.random.default_rng(1)
    ref, other = world.target, rng.dirichlet(np.ones(13), size=2)
    report = exact.kl_estimators(world, ref, np.log(other), ref, 100)
    for name in ("sampled", "token_level"):
        np.testing.assert_allclose(report[name]["mean"], report["exact"], atol=1e-12)
    variances = [report[name]["variance"] for name in ("token_level", "sampled")]
    assert all(token < sample for token, sample in zip(*variances, strict=True))
    swapped = exact.kl_estimators(world, ref, np.log(other[::-1]), ref, 100)
    assert np.abs(np.array(swapped["exact"]) - report["exact"]).min() > 1e-3


# ---------------------------------------------------------------- optima


def test_optimum_of_distillation_is_the_closed_form(world: World) -> None:
    best = exact.optimum(small().method("d-dpo"), world, world.target, every_pair(world))
    closed = [
        maxmin.target_policy(r, p, beta=exact.scale(small().method("d-dpo")))
        for r, p in zip(world.rewards, world.target, strict=True)
    ]
    np.testing.assert_allclose(best, closed, atol=1e-9)


def test_ensembles_of_one_prompt_are_the_bandit_solvers(world: World) -> None:
    config = small()
    one = replace(
        world, prompts=world.prompts[:1], rewards=world.rewards[:1], member_rewards=world.member_rewards[:, :1]
    )
    ref, graphs = world.target[:1], every_pair(world)[:1]
    members = np.array([graphs[0].margins(r) for r in one.member_rewards[:, 0]])
    for method, objective in (
        (
            config.method("hull-dpo"),
            objectives.EnsembleHull(beta=exact.scale(config.method("hull-dpo")), reward_margins=members),
        ),
        (
            config.method("e-dpo"),
            objectives.EnsembleMin(beta=exact.scale(config.method("e-dpo")), reward_margins=members),
        ),
    ):
        best, weights = exact.ensemble_optimum(method, one, ref, graphs)
        solved = solve(objective, graphs[0], ref[0], alpha=exact.kl_weight(method))
        assert isinstance(solved, Optimum)
        assert solved.weights is not None
        np.testing.assert_allclose(best[0], solved.log_probs, atol=1e-5)
        np.testing.assert_allclose(weights, solved.weights, atol=1e-5)
    ideal, weights = exact.max_min(one, ref, 0.6)
    solved_max_min = maxmin.max_min(one.member_rewards[:, 0], ref[0], beta=0.6)
    np.testing.assert_allclose(ideal[0], solved_max_min.log_probs, atol=1e-5)
    assert exact.worst_case(one, ref, ideal, 0.6) == pytest.approx(solved_max_min.value, abs=1e-8)


def test_no_optimum_where_theory_has_none(world: World) -> None:
    rng = np.random.default_rng(0)
    parts = [exact.sparse_pairs(world.rewards[0], half, rng) for half in (np.arange(6), np.arange(6, 13))]
    two = PreferenceGraph(13, np.concatenate([part.edges for part in parts]))
    for method in (DPO(beta=1.0), DistilledDPO(beta=1.0)):
        with pytest.raises(
            ValueError, match=rf"{type(method).__name__} has no unique optimum on the pairs of prompt 0"
        ):
            exact.optimum(method, world, world.target, [two])
    with pytest.raises(ValueError, match="DRDO has no optimum"):
        exact.optimum(DRDO(), world, world.target, [two])


def test_a_minimum_on_the_simplex_is_checked() -> None:
    weights = exact.minimise_on_simplex(lambda w: (float((w - [1, 0, -1]) @ (w - [1, 0, -1])), 2 * (w - [1, 0, -1])), 3)
    np.testing.assert_allclose(weights, [1, 0, 0], atol=1e-7)
    with pytest.raises(RuntimeError, match="miss their optimality conditions"):
        exact.minimise_on_simplex(lambda w: (float(w @ w), np.array([5.0, 0.0, 0.0])), 3)


# ---------------------------------------------------------------- training reaches them


@pytest.mark.thorough
def test_distillation_reaches_its_optimum_and_no_other(
    world: World, trained_reference: tuple[Path, Floats], train: Trainer
) -> None:
    beta = exact.scale(small().method("d-dpo"))
    ref, method, graphs = trained_reference[1], DistilledDPO(beta=beta), connected(world)
    run = train(method, graphs)
    best = exact.optimum(method, world, ref, graphs)
    assert distance(run, best) <= EXACT
    assert exact.comparison(run.logps, ref, best)["tv_ref"] > 0.1
    wrong = exact.optimum(DistilledDPO(beta=1.05 * beta), world, ref, graphs)
    assert distance(run, wrong) > EXACT


@pytest.mark.thorough
def test_a_swapped_label_or_a_component_cut_off_is_seen(
    world: World, trained_reference: tuple[Path, Floats], train: Trainer
) -> None:
    ref, graphs = trained_reference[1], connected(world)
    best = exact.optimum(IPO(tau=0.2), world, ref, graphs)
    assert distance(train(IPO(tau=0.2), graphs), best) <= EXACT
    edges = graphs[0].edges.copy()
    edges[3] = edges[3, ::-1]
    assert distance(train(IPO(tau=0.2), [PreferenceGraph(13, edges), graphs[1]]), best) > EXACT
    inside = [PreferenceGraph(13, g.edges[(g.edges < 9).all(1) | (g.edges >= 9).all(1)]) for g in graphs]
    method = small().method("d-dpo")
    assert not inside[0].is_connected
    assert distance(train(method, inside, from_reference=False), exact.optimum(method, world, ref, graphs)) > EXACT


STRONG = Pessimism(alpha_start=0.4, alpha_end=0.4)
"""More curvature than the preset has, for fewer steps."""
PESSIMISTIC = PessimisticDPO(beta=0.7, kl=STRONG)


@pytest.fixture(scope="module")
def pessimistic(world: World, trained_reference: tuple[Path, Floats], train: Trainer) -> Trained:
    """PESSIMISTIC on `connected(world, 8)`, with the exact KL."""
    return train(PESSIMISTIC, connected(world, 8), samples=trained_reference[1])


@pytest.mark.thorough
def test_pessimism_keeps_what_no_pair_mentions(
    world: World, trained_reference: tuple[Path, Floats], train: Trainer, pessimistic: Trained
) -> None:
    ref, method, graphs, run = trained_reference[1], PESSIMISTIC, connected(world, 8), pessimistic
    assert distance(run, exact.optimum(method, world, ref, graphs)) <= EXACT
    assert np.abs(np.exp(run.logps) - ref)[:, 8:].max() <= EXACT
    drifting = train(DPO(beta=method.beta), graphs, steps=60)
    assert np.abs(np.exp(drifting.logps) - ref)[:, 8:].max() > 10 * EXACT


def test_samples_are_of_pi_ref(trained_reference: tuple[Path, Floats]) -> None:
    folder, ref = trained_reference
    shares = exact.draw_samples(small(), folder)
    errors = (shares - ref) / np.sqrt(ref * (1 - ref) / small().reference_samples)
    assert np.abs(errors).max() < 5
    assert (np.abs((shares - ref[::-1]) / np.sqrt(ref * (1 - ref) / 2000)).max(1) > 5).all()


# ---------------------------------------------------------------- guarantees


def test_a_trained_network_has_the_guarantee_of_its_optimum_but_for_its_residual(
    world: World, trained_reference: tuple[Path, Floats], pessimistic: Trained
) -> None:
    ref, graphs = trained_reference[1], connected(world, 8)
    best = exact.optimum(PESSIMISTIC, world, ref, graphs)
    solved, trained = (exact.guarantees(PESSIMISTIC, world, ref, graphs, p) for p in (best, pessimistic.logps))
    assert exact.failures(with_guarantees({"optimum": solved, "trained": trained})) == []
    assert max(solved["residual"]) < 1e-8 < min(trained["residual"])
    np.testing.assert_allclose(trained["promised"], solved["promised"], atol=exact.STRAY)
    np.testing.assert_allclose(trained["divergence"], solved["divergence"], atol=exact.STRAY)
    assert min(solved["divergence"]) > 10 * exact.STRAY, "there is something to be promised"

    probs = exact.distributions(pessimistic.logps)  # by hand, not by `bandits`
    np.testing.assert_allclose(trained["advantage"], ((probs - ref) * world.rewards).sum(1), rtol=1e-9)
    j = ((probs - ref) * np.log(probs / ref)).sum(1)
    np.testing.assert_allclose(trained["divergence"], j, rtol=1e-9)
    assert (j <= 0.27846454276 / STRONG.alpha_end + np.array(trained["bound_stray"])).all()


def test_distilled_rewards_fit_themselves_so_their_promise_is_more_than_beta_j(
    world: World, trained_reference: tuple[Path, Floats]
) -> None:
    ref, graphs, method = trained_reference[1], connected(world), small().method("dp-dpo")
    found = exact.guarantees(method, world, ref, graphs, exact.optimum(method, world, ref, graphs))
    assert found["true_loss"] == pytest.approx([0, 0], abs=1e-12)
    alpha, beta = exact.kl_weight(method), exact.scale(method)
    assert alpha is not None
    more = [beta * j + beta / alpha * level for j, level in zip(found["divergence"], found["level"], strict=True)]
    assert found["promised"] == pytest.approx(more, rel=1e-9)
    squares = [np.mean(g.margins(r) ** 2) for g, r in zip(graphs, world.rewards, strict=True)]
    assert found["bound"] == pytest.approx([s / 2 / alpha for s in squares], rel=1e-12)
    assert all(real >= least for real, least in zip(found["advantage"], found["guaranteed"], strict=True))


def test_a_policy_that_is_no_optimum_is_seen(world: World, trained_reference: tuple[Path, Floats]) -> None:
    ref, graphs = trained_reference[1], connected(world, 8)
    other = exact.optimum(replace(PESSIMISTIC, beta=1.0), world, ref, graphs)
    near = exact.guarantees(PESSIMISTIC, world, ref, graphs, other)
    assert min(near["residual"]) > exact.STRAY
    said = exact.failures(with_guarantees({"trained": near}))
    assert said[0].startswith("p-dpo, guarantee, trained, prompt 0: residual")
    # One that prefers what is worse: what its J would promise is false, what its residual leaves of that is true.
    found = exact.guarantees(PESSIMISTIC, world, ref, graphs, normalised(np.log(ref) - 0.3 * world.rewards))
    for real, promised, least in zip(found["advantage"], found["promised"], found["guaranteed"], strict=True):
        assert least <= real < 0 < promised
    spread = exact.guarantees(PESSIMISTIC, world, ref, graphs, normalised(10 * np.log(ref)))
    for j, bound, stray in zip(*(spread[name] for name in ("divergence", "bound", "bound_stray")), strict=True):
        assert bound < j <= bound + stray, "the budget is one of optima"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"advantage": [0.9]}, "advantage 0.9 under the true reward, below the guaranteed 1"),
        ({"divergence": [0.71]}, "J is 0.71 nats, above the bound 0.7 and its residual 0.001"),
        ({"residual": [0.02]}, "residual 0.02 of the promise 1.001"),
        ({"residual": [float("nan")]}, "residual nan of the promise"),
        ({"bound_stray": [0.02]}, "residual 0.02 nats of the bound of J"),
    ],
)
def test_each_broken_guarantee_is_told(change: dict[str, list[float]], said: str) -> None:
    good = {"advantage": [1.0], "guaranteed": [1.0], "promised": [1.001], "residual": [1e-3]}
    good |= {"divergence": [0.7], "bound": [0.7], "bound_stray": [1e-3]}
    assert exact.failures(with_guarantees({"trained": good})) == []
    (line,) = exact.failures(with_guarantees({"trained": {**good, **change}}))
    assert line.startswith(f"p-dpo, guarantee, trained, prompt 0: {said}")


def normalised(logits: Floats) -> Floats:
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def with_guarantees(found: dict[str, Any]) -> dict[str, Any]:
    """A report that is well otherwise."""
    report: dict[str, Any] = {name: {"tv": 1e-4, "tv_ref": 0.5} for name in exact.CERTIFIED}
    report["p-dpo"]["guarantees"] = found
    return report


# ---------------------------------------------------------------- acceptance and options


def test_acceptance_names_what_is_missed() -> None:
    good = {"tv": 1e-4, "tv_ref": 0.5}
    report: dict[str, Any] = {name: copy.deepcopy(good) for name in exact.CERTIFIED}
    report["p-dpo"]["sampled"] = {"tv": 5e-3, "tv_ref": 0.5}
    assert exact.failures(report) == []
    report["p-dpo"]["sampled"]["tv"] = 0.02
    report["ipo"]["tv"] = float("nan")
    report["d-dpo"]["tv_ref"] = 0.3
    assert [line.split(":")[0] for line in exact.failures(report)] == ["d-dpo", "ipo", "p-dpo, sampled KL"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "1"], "ExactConfig.tokens must be at least 2, got 1"),
        (["--prompts", "5"], "ExactConfig.prompts must be at most tokens, got 5"),
        (["--members", "1"], "ExactConfig.members must be at least 2, got 1"),
        (["--reference_samples", "0"], "ExactConfig.reference_samples must be > 0, got 0"),
        (["--compared", "1.5"], "ExactConfig.compared must be between 0 and 1, got 1.5"),
        (["--output_dir", ""], "ExactConfig.output_dir must not be empty"),
        (["--drdo.oracle_alpha", "0.1"], "ExactConfig.drdo.oracle_alpha must be null: the true rewards are distilled"),
        (["--ipo.length_normalised", "true"], "ExactConfig.ipo.length_normalised must be false"),
        (["--p_dpo.kl.alpha_end", "0.5"], "ExactConfig.p_dpo.kl must have alpha_start equal to alpha_end"),
        (["--policy.max_steps", "null", "--policy.epochs", "2"], "ExactConfig.sft and .policy need max_steps"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert door.main(over({"--output_dir": str(tmp_path)}, options)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class InThisProcess:
    """A pool whose work is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done


def test_options_of_methods_that_are_not_trained_here_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        door.parse(["--cdpo.label_smoothing", "0.2"])
    assert "--cdpo.label_smoothing" in capsys.readouterr().err
    assert door.parse(["--dpo.beta", "0.2"])[0].method("dpo") == DPO(beta=0.2)
    with pytest.raises(ValueError, match=f"ExactConfig.options maps any of {', '.join(PAPERS)} to its hyper"):
        replace(door.parse([])[0], options={"cdpo": METHODS["cdpo"]()})


@pytest.mark.thorough
def test_the_command_writes_its_results_and_says_what_they_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exact, "ProcessPoolExecutor", InThisProcess)
    options = ["--tokens", "2", "--max_length", "2", "--prompts", "2", "--reference_samples", "50"]
    options += ["--sft.max_steps", "2", "--policy.max_steps", "6", "--policy.logging_steps", "1"]
    assert door.main(["--output_dir", str(tmp_path), *options]) == 1  # six steps reach nothing
    said = capsys.readouterr()
    assert "missed: d-dpo: total variation" in said.err
    report = json.loads((tmp_path / "exact.json").read_text())
    assert set(PAPERS) <= set(report)
    assert {"tv", "tv_ref", "forward_kl"} <= set(report["d-dpo"])
    for name in exact.GUARANTEED:
        optimum, trained = (report[name]["guarantees"][which] for which in ("optimum", "trained"))
        assert all(len(values) == 2 for values in (*optimum.values(), *trained.values())), "a number a prompt"
        assert f"missed: {name}, guarantee, trained, prompt 0: residual" in said.err
        assert f"missed: {name}, guarantee, optimum" not in said.err
        assert f"{name}, mean over prompts, trained (optimum): true advantage" in said.out
        assert set(report["budget"][name]) == {"target", "kl", "alpha", "multiplier", "tv", "tv_ref"}
        assert f"missed: {name}, KL target: an alpha of" in said.err
        assert f"{name} with a KL target of 0.3 nats: KL" in said.out
    assert (tmp_path / "exact.png").stat().st_size > 0
    assert "tokens: 2" in (tmp_path / "config.yaml").read_text()


POOL = """
import os, sys, time
from multiprocessing import active_children
from lm.base.command import as_command
from lm.studies.exact import workers

@as_command
def main(arguments):
    with workers() as pool:
        pool.submit(os.getpid).result()  # one of them works by now
        endless = [pool.submit(time.sleep, 10**6) for _ in range(2 * os.cpu_count())]
        print(*(process.pid for process in active_children()), flush=True)
        endless[0].result()

sys.exit(main())
"""


@pytest.mark.thorough
def test_sigterm_ends_the_workers_whatever_they_have_left_to_do() -> None:
    command = [sys.executable, "-c", POOL]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == os.cpu_count()
        process.send_signal(SIGTERM)
        try:
            _, said = process.communicate(timeout=120)  # else for ever
        except subprocess.TimeoutExpired:
            for pid in (process.pid, *pids):
                os.kill(pid, SIGKILL)
            raise
    assert process.returncode == 143
    assert said == "terminated\n"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
