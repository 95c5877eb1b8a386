"""Trains every method in a language small enough to list, and measures how far each ends from the optimum of theory.

    python -m lm.exact

A completion is a string of at most three of four tokens; a shorter one ends with end-of-text, one of full length ends
by itself. So there are 85, their probabilities sum to one for every network, and the optimum of a method over *all*
policies can be computed without training (`bandits.solve`). Data, scoring, packing and Trainer are those of `lm.train`.

Arrays: P prompts, n completions (the same for every prompt), K ensemble members. A preference graph a prompt.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import singledispatch
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from rich import box
from rich.table import Table
from scipy import optimize, stats
from scipy.special import logsumexp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lm.base import progress
from lm.base.command import quieten
from lm.config import Config, DataConfig, ExactConfig, SamplingConfig, TrainingConfig
from lm.data.rewards import MARGIN, MEMBER_MARGINS
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_rows
from lm.models.loading import END, load_policy
from lm.models.opening import open_policy
from lm.objectives import DPO, IPO, DistilledDPO, EnsembleDPO, HullDPO, Method, looks
from lm.training.batches import pair_collator, sft_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import SFTTrainer
from theory import losses
from theory.certificates import simplex_kkt
from theory.preferences import PreferenceGraph

Floats = npt.NDArray[np.float64]
Graphs = list[PreferenceGraph]
MODEL = "scratch:tiny"
EXACT, SAMPLED, FAR = 1e-3, 1e-2, 0.4
"""Acceptance: the largest total variation with an exact and with a sampled KL term, and the least that pi_ref has."""
CERTIFIED = ("d-dpo", "ipo", "p-dpo", "dp-dpo", "hull-dpo")
"""The methods whose optimum is unique, and so has to be reached."""
GUARANTEED = ("p-dpo", "dp-dpo")
"""The methods of which `bandits.certify` has a guarantee prompt by prompt, and a bound of J."""
STRAY = 1e-2
"""Acceptance: by how much a trained network's residual may loosen its guarantee, reward units a nat, and its bound of
J, nats."""
_MASS_ERROR = 1e-5  # of 85 float32 probabilities' sum
_WEIGHT_ERROR = 1e-6
_ROUNDING = 1e-9  # of what holds at every policy


# ---------------------------------------------------------------- the language


def completions(tokens: int, max_length: int, *, closed: bool = True) -> list[list[int]]:
    """Every string of at most `max_length` tokens 0 ... tokens - 1, end-of-text being `tokens`.

    closed: a string of full length is a completion as it is, so that the probabilities of all sum to one. Otherwise it
    is followed by end-of-text too, and what goes on instead is not listed.
    """
    return [
        [*string, *([] if closed and length == max_length else [tokens])]
        for length in range(max_length + 1)
        for string in itertools.product(range(tokens), repeat=length)
    ]


def prompts(tokens: int, count: int) -> list[list[int]]:
    """Prompts of unequal length, none a prefix of another, so that no context belongs to two.

    They start with end-of-text, as with GPT-2. Without it a context of one repeated token has the same attention output
    at any length, whatever rotary positions say: no weights could give its positions different distributions.
    """
    return [[tokens, first, *reversed(range(first))] for first in range(count)]


@dataclass(frozen=True, eq=False)
class World:
    """A language with rewards."""

    config: Config
    """The pipeline's options that this amounts to."""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    completions: list[list[int]]
    target: Floats
    """[P, n], the random distributions that pi_ref learns."""
    rewards: Floats
    """[P, n]."""
    member_rewards: Floats
    """[K, P, n]."""

    @property
    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and completion of every entry of a [P, n] array."""
        pairs = list(itertools.product(self.prompts, self.completions))
        return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]

    def log_probs(self, model: CompletionModel) -> Floats:
        """log pi of every completion, [P, n], nats."""
        scores = score_rows(model, *self.rows, "log-probs").numpy()
        return np.asarray(scores.reshape(len(self.prompts), -1), dtype=np.float64)


def make_world(config: ExactConfig, *, closed: bool = True) -> World:
    """Draws the distributions and rewards; the open language has the same ones."""
    rng = np.random.default_rng([config.seed, 0])
    listed = completions(config.tokens, config.max_length, closed=closed)
    shape = config.prompts, len(listed)
    target = rng.dirichlet(np.ones(shape[1]), size=shape[0])
    rewards = rng.uniform(-config.reward_range, config.reward_range, shape)
    noise = rng.uniform(-config.disagreement, config.disagreement, (config.members, *shape))
    questions = prompts(config.tokens, config.prompts)
    words = {chr(ord("a") + token): token for token in range(config.tokens)} | {END: config.tokens}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=END)), eos_token=END, pad_token=END
    )
    inner = Config(
        output_dir=config.output_dir,
        model=MODEL,
        device="cpu",
        seed=config.seed,
        sft=config.sft,
        oracle=config.sft,
        reward=config.sft,
        policy=config.policy,
        data=DataConfig(max_prompt_length=max(map(len, questions)), max_completion_length=max(map(len, listed))),
        sampling=SamplingConfig(batch_size=8192),
    )
    return World(inner, tokenizer, questions, listed, target, rewards, rewards + noise)


def train_reference(world: World, folder: Path) -> CompletionModel:
    """pi_ref, trained on draws from the target and saved."""
    config, rng = world.config, np.random.default_rng([world.config.seed, 1])
    count = config.sft.batch_size * 100
    of_prompt = rng.integers(len(world.prompts), size=count)
    drawn = [int(rng.choice(len(world.completions), p=world.target[x])) for x in of_prompt]
    rows = [
        {"id": f"{i}", "prompt_ids": world.prompts[x], "completion_ids": world.completions[y]}
        for i, (x, y) in enumerate(zip(of_prompt, drawn, strict=True))
    ]
    torch.manual_seed(config.seed)
    model = CompletionModel(load_policy(MODEL, world.tokenizer, config))
    _fit(SFTTrainer, model, rows, sft_collator(), config.sft, config.seed)
    model.model.save_pretrained(folder)
    return open_policy(folder, world.tokenizer, config)


def _fit(trainer: Any, model: CompletionModel, rows: Any, collator: Any, training: Any, seed: int, **extra: Any) -> Any:
    # Without a terminal the Trainer would print every log line.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        arguments = training_arguments(training, Path(scratch), seed=seed, device="cpu")
        return fit(trainer, model, Dataset.from_list(rows), collator, arguments, **extra)


def distributions(logps: Floats) -> Floats:
    """[P, n] log-probs of a closed language to probabilities that sum to one exactly; ValueError where they do not."""
    sums = np.exp(logps).sum(1)
    if not np.abs(sums - 1).max() <= _MASS_ERROR:
        raise ValueError(
            f"the listed completions have probabilities that sum to {sums.tolist()}, not to 1: some are missing"
        )
    return np.asarray(np.exp(logps) / sums[:, None])


# ---------------------------------------------------------------- pairs


def all_pairs(rewards: Floats) -> PreferenceGraph:
    """Every two completions; the one of larger reward is preferred, here and below. rewards [n]."""
    return _oriented(rewards, itertools.combinations(range(len(rewards)), 2))


def sparse_pairs(rewards: Floats, among: npt.NDArray[np.intp], rng: np.random.Generator) -> PreferenceGraph:
    """Two random cycles through some of the completions: connected, about four pairs a completion, and any two a few
    steps apart, so that no combination of log-ratios is left nearly free."""
    cycles = [rng.permutation(among) for _ in range(2)]
    return _oriented(rewards, [edge for c in cycles for edge in zip(c, np.roll(c, 1), strict=True)])


def disjoint_pairs(rewards: Floats, among: npt.NDArray[np.intp], rng: np.random.Generator) -> PreferenceGraph:
    """Each of some completions in one pair (but for the last of an odd number)."""
    order = rng.permutation(among[: len(among) // 2 * 2])
    return _oriented(rewards, zip(order[::2], order[1::2], strict=True))


def _oriented(rewards: Floats, edges: Any) -> PreferenceGraph:
    ordered = {tuple(sorted((int(a), int(b)), key=lambda y: -rewards[y])) for a, b in edges}
    return PreferenceGraph(len(rewards), sorted(ordered))


def pair_rows(world: World, ref_logps: Floats, graphs: Graphs, samples: Floats | None) -> list[dict[str, Any]]:
    """Scored pairs as the policy trainer reads them.

    samples [P, n] are the weights of the KL term's completions: pi_ref for the exact KL, or how often each was drawn.
    What enters the loss is the mean of the pairs' KL estimates over the mini-batch, so each completion is given to one
    pair of its prompt (or a few) with the weight that makes this mean the sum over all completions.
    """
    rows = []
    n = len(world.completions)
    each = -(-n // min(map(len, graphs)))  # as many for every pair, also of a prompt with more pairs: rows are stacked
    for x, graph in enumerate(graphs):
        slots = np.arange(len(graph) * each) % n
        counts = np.bincount(slots, minlength=n)
        for i, (winner, loser) in enumerate(graph.edges.tolist()):
            row = {
                "id": f"prompt{x}-{winner}-{loser}",
                "prompt_ids": world.prompts[x],
                "chosen_ids": world.completions[winner],
                "rejected_ids": world.completions[loser],
                "ref_chosen_logps": ref_logps[x, winner],
                "ref_rejected_logps": ref_logps[x, loser],
                MARGIN: world.rewards[x, winner] - world.rewards[x, loser],
                MEMBER_MARGINS: (world.member_rewards[:, x, winner] - world.member_rewards[:, x, loser]).tolist(),
            }
            if samples is not None:
                own = slots[i * each : (i + 1) * each]
                row["sample_ids"] = [world.completions[y] for y in own]
                row["ref_sample_logps"] = ref_logps[x, own].tolist()
                row["sample_weights"] = (samples[x, own] * len(graph) / counts[own]).tolist()
            rows.append(row)
    return rows


# ---------------------------------------------------------------- optima, none of them from our training


def kl_weight(method: Method) -> float | None:
    """alpha of a method with a constant KL term, None for one without."""
    return None if method.pessimism is None else method.pessimism.alpha_end


def scale(method: Method) -> float:
    """beta of a method that has an implicit reward."""
    assert method.implicit_scale is not None, f"{type(method).__name__} has none"
    return method.implicit_scale


def optimum(method: Method, world: World, ref: Floats, graphs: Graphs, weights: Floats | None = None) -> Floats:
    """log of the method's exact optimum over all policies, [P, n]; `weights` [K] mix the members of an ensemble.

    The prompts share nothing but these weights, so each is a bandit of its own. ValueError where there is no optimum.
    """
    return np.array([found.log_probs for found in _optima(method, world, ref, graphs, weights)])


def _optima(method: Method, world: World, ref: Floats, graphs: Graphs, weights: Floats | None = None) -> list[Any]:
    from bandits.solve import Optimum, solve

    found = []
    for x, graph in enumerate(graphs):
        solution = solve(_objective(method, world, x, graph, weights), graph, ref[x], alpha=kl_weight(method))
        if not isinstance(solution, Optimum) or not solution.unique:
            raise ValueError(f"{type(method).__name__} has no unique optimum on the pairs of prompt {x}: {solution}")
        found.append(solution)
    return found


def _objective(method: Method, world: World, x: int, graph: PreferenceGraph, weights: Floats | None = None) -> Any:
    """The method on the pairs of prompt x, as `bandits` has it; an ensemble's members are mixed by `weights` [K]."""
    if "members" in method.needs:
        assert weights is not None
        return _in_bandits(method, graph.margins(weights @ world.member_rewards[:, x]))
    return _in_bandits(method, graph.margins(world.rewards[x]))


@singledispatch
def _in_bandits(method: Method, margins: Floats) -> Any:
    """The objective of `bandits` with the method's loss, given the reward margins that it distils, [N]."""
    raise ValueError(f"{type(method).__name__} has no optimum in closed form or as a convex problem")


@_in_bandits.register(DistilledDPO)
@_in_bandits.register(EnsembleDPO)
def _(method: DistilledDPO | EnsembleDPO, margins: Floats) -> Any:
    from bandits.objectives import Distillation

    return Distillation(beta=method.beta, reward_margins=margins)


@_in_bandits.register
def _(method: IPO, margins: Floats) -> Any:
    from bandits import objectives

    return objectives.IPO(tau=method.tau)


@_in_bandits.register
def _(method: DPO, margins: Floats) -> Any:
    from bandits import objectives

    return objectives.DPO(beta=method.beta)


def ensemble_optimum(method: Method, world: World, ref: Floats, graphs: Graphs) -> tuple[Floats, Floats]:
    """log of e-DPO's or hull-DPO's optimum, [P, n], and the members' weights, [K].

    The trainer chooses the member, or the mixture, once for the whole mini-batch, hence for all prompts.
    """

    def value(weights: Floats) -> tuple[float, Floats]:
        """The objective at the best policies for a mixture, and its gradient (envelope theorem)."""
        solved = _optima(method, world, ref, graphs, weights)
        slopes = []
        for x, (graph, found) in enumerate(zip(graphs, solved, strict=True)):
            members = graph.margins(world.member_rewards[:, x])
            residuals = weights @ members - scale(method) * graph.margins(found.logratios)
            slopes.append(2 * members @ residuals / len(graph))
        return float(np.mean([found.value for found in solved])), np.mean(slopes, axis=0)

    vertices = np.eye(len(world.member_rewards))
    if isinstance(method, HullDPO):
        weights = minimise_on_simplex(value, len(vertices))
    else:
        weights = min(vertices, key=lambda vertex: value(vertex)[0])
    return optimum(method, world, ref, graphs, weights), weights


def max_min(world: World, ref: Floats, beta: float) -> tuple[Floats, Floats]:
    """The max-min policy of [F] Theorem 2 over mixtures of the members, as log-probs [P, n], and their weights [K]:
    of all mixtures' target policies the closest to pi_ref in forward KL, averaged over prompts."""
    from bandits.maxmin import target_policy

    def targets(weights: Floats) -> Floats:
        mixed = np.tensordot(weights, world.member_rewards, 1)
        return np.array([target_policy(r, p, beta=beta) for r, p in zip(mixed, ref, strict=True)])

    def divergence(weights: Floats) -> tuple[float, Floats]:
        logps = targets(weights)
        slope = ((np.exp(logps) - ref) * world.member_rewards).sum(2).mean(1) / beta
        return float(forward_kl(ref, logps).mean()), slope

    weights = minimise_on_simplex(divergence, len(world.member_rewards))
    return targets(weights), weights


def minimise_on_simplex(value: Callable[[Floats], tuple[float, Floats]], size: int) -> Floats:
    """argmin of a convex function, given with its gradient, over the simplex; RuntimeError where that fails."""
    sum_is_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(size)}
    found = optimize.minimize(
        value,
        np.full(size, 1 / size),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * size,
        constraints=sum_is_one,
        options={"ftol": 1e-16, "maxiter": 200},
    )
    weights = np.clip(found.x, 0, None) / np.clip(found.x, 0, None).sum()
    gradient = value(weights)[1]
    residual = simplex_kkt(weights, gradient).worst / max(float(np.abs(gradient).max()), 1.0)
    if residual > _WEIGHT_ERROR:
        raise RuntimeError(f"weights {weights} of the ensemble miss their optimality conditions by {residual:.1e}")
    return np.asarray(weights)


def worst_case(world: World, ref: Floats, logps: Floats, beta: float) -> float:
    """min over the members of E[r(pi) - r(pi_ref)] - beta KL(pi || pi_ref), mean over prompts, reward units."""
    probs = np.exp(logps)
    gains = ((probs - ref) * world.member_rewards).sum(2).mean(1)
    return float(gains.min() - beta * (probs * (logps - np.log(ref))).sum(1).mean())


# ---------------------------------------------------------------- measures


def total_variation(p: Floats, q: Floats) -> Floats:
    """[..., n] probabilities -> [...]."""
    return np.asarray(np.abs(p - q).sum(-1) / 2)


def forward_kl(probs: Floats, logps: Floats) -> Floats:
    """KL(p || q) of probabilities p and log-probs log q, [..., n] -> [...], nats."""
    return np.asarray((probs * losses.forward_kl(logps - np.log(probs))).sum(-1))


def comparison(logps: Floats, ref: Floats, best: Floats) -> dict[str, Any]:
    """Distances of a trained policy and of pi_ref from the optimum; arguments [P, n], log-probs but for `ref`.

    `tv` and `forward_kl` are the largest over prompts, `tv_ref` and `forward_kl_ref` the smallest.
    """
    rows = {
        "tv": total_variation(np.exp(logps), np.exp(best)),
        "forward_kl": forward_kl(np.exp(best), logps),
        "tv_ref": total_variation(ref, np.exp(best)),
        "forward_kl_ref": forward_kl(np.exp(best), np.log(ref)),
    }
    overall = {name: float(v.min() if name.endswith("_ref") else v.max()) for name, v in rows.items()}
    return {**overall, "by_prompt": {name: values.tolist() for name, values in rows.items()}}


def guarantees(method: Method, world: World, ref: Floats, graphs: Graphs, logps: Floats) -> dict[str, list[float]]:
    """What pessimism promises at a policy, a number a prompt; `logps` [P, n], trained or an optimum's.

    The rows `pessimism-certificate` and `alpha-budget` of the ledger, with what a policy that is no optimum adds (g is
    its objective's gradient in the logits, u its log-ratios). Rewards are the world's true ones:

    - `divergence`: J, with `forward_kl` and `reverse_kl`, nats; `bound`: what J is at most at an optimum;
      `bound_stray`: g.u / alpha, by how much more (or less) it may be here.
    - `level`: lambda, the data's loss of the implicit reward; `true_loss`: of the true reward.
    - `promised`: beta J less the price of a true reward that fits worse than lambda, reward units; `guaranteed`: the
      same with the residual's share, which `advantage`, E_pi[r] - E_ref[r], is never below.
    - `residual`: by how much the promise can fail a reward at most, reward units for each nat of range of r / beta - u.
    """
    from bandits.certify import certify

    alpha = kl_weight(method)
    assert alpha is not None, f"{type(method).__name__} has no KL term"
    rows = []
    for x, (graph, own) in enumerate(zip(graphs, np.log(distributions(logps)), strict=True)):
        found = certify(_objective(method, world, x, graph), graph, ref[x], alpha=alpha, log_probs=own)
        rewards = world.rewards[x]
        price = found.beta / alpha * (found.loss(rewards) - found.level)
        rows.append(
            {
                "divergence": found.divergence,
                "forward_kl": found.forward_kl,
                "reverse_kl": found.reverse_kl,
                "bound": found.divergence_bound,
                "bound_stray": float(found.gradient @ found.logratios) / alpha,
                "level": found.level,
                "true_loss": found.loss(rewards),
                "promised": found.advantage - price,
                "guaranteed": found.for_reward(rewards),
                "advantage": found.true_advantage(rewards),
                "residual": found.residual,
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _broken(what: str, entry: dict[str, list[float]]) -> list[str]:
    """The guarantees that do not hold as they should, in words."""
    found = []
    for x, (stray, residual, promised, held, j, bound, real) in enumerate(
        zip(
            *(entry[name] for name in ("bound_stray", "residual", "promised", "guaranteed", "divergence", "bound")),
            entry["advantage"],
            strict=True,
        )
    ):
        where = f"{what}, prompt {x}"
        if not real >= held - _ROUNDING:
            found.append(f"{where}: advantage {real:.6g} under the true reward, below the guaranteed {held:.6g}")
        if not j <= bound + stray + _ROUNDING:
            found.append(f"{where}: J is {j:.6g} nats, above the bound {bound:.6g} and its residual {stray:.2g}")
        if not residual <= STRAY:
            found.append(
                f"{where}: residual {residual:.2g} of the promise {promised:.4g}, at most {STRAY:g} is allowed"
            )
        if not abs(stray) <= STRAY:
            found.append(f"{where}: residual {stray:.2g} nats of the bound of J, at most {STRAY:g} is allowed")
    return found


def failures(report: dict[str, Any]) -> list[str]:
    """What of the acceptance is not met, in words; empty when all of it is."""
    found = []
    for name in CERTIFIED:
        checks = [(name, report[name], EXACT)]
        if "sampled" in report[name]:
            checks.append((f"{name}, sampled KL", report[name]["sampled"], SAMPLED))
        if "sparse" in report[name]:
            checks.append((f"{name}, sparse pairs", report[name]["sparse"], EXACT))
        for what, entry, most in checks:
            if not entry["tv"] <= most:
                found.append(f"{what}: total variation {entry['tv']:.2g} from the optimum, at most {most:g} is allowed")
            if not entry["tv_ref"] >= FAR:
                found.append(
                    f"{what}: pi_ref is only {entry['tv_ref']:.4g} from the optimum, {FAR:g} is needed to show anything"
                )
    for name in GUARANTEED:
        for which, entry in report[name].get("guarantees", {}).items():
            found += _broken(f"{name}, guarantee, {which}", entry)
    return found


def kl_estimators(world: World, ref: Floats, logps: Floats, shares: Floats, draws: int) -> dict[str, Any]:
    """KL(pi_ref || pi) and its two estimators from one completion of pi_ref: -u_y, and the sum over tokens of the
    relative entropy of the next token.

    Means and variances are taken over all completions, so they have no error; `drawn` is the mean over the completions
    that the sampled KL term uses (shares [P, n], of `draws` each), `error` its standard error. A number a prompt, nats.
    """
    contexts = sorted({tuple(y[:t]) for y in world.completions for t in range(len(y))})
    row_of = {context: i for i, context in enumerate(contexts)}

    def next_tokens(probs: Floats) -> Floats:
        """log of the distribution after every context, [contexts, tokens], from the completions' probabilities."""
        mass = np.zeros((len(contexts), len(world.tokenizer)))
        for y, p in zip(world.completions, probs, strict=True):
            for t, token in enumerate(y):
                mass[row_of[tuple(y[:t])], token] += p
        return np.asarray(np.log(mass / mass.sum(1, keepdims=True)))

    visits = np.zeros((len(world.completions), len(contexts)))
    for i, y in enumerate(world.completions):
        visits[i, [row_of[tuple(y[:t])] for t in range(len(y))]] = 1
    result: dict[str, Any] = {"exact": forward_kl(ref, logps).tolist()}
    for name, values in {
        "sampled": losses.forward_kl(logps - np.log(ref)),
        "token_level": np.array(
            [
                visits @ losses.forward_kl_tokens(next_tokens(p), next_tokens(q))
                for p, q in zip(ref, np.exp(logps), strict=True)
            ]
        ),
    }.items():
        mean = (ref * values).sum(1)
        variance = (ref * (values - mean[:, None]) ** 2).sum(1)
        result[name] = {
            "mean": mean.tolist(),
            "variance": variance.tolist(),
            "drawn": (shares * values).sum(1).tolist(),
            "error": np.sqrt(variance / draws).tolist(),
        }
    return result


# ---------------------------------------------------------------- runs


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One policy to train."""

    config: ExactConfig
    reference: Path
    """pi_ref, as `lm.sft` saves it."""
    method: Method
    graphs: Graphs
    training: TrainingConfig
    samples: Floats | None = None
    """[P, n], weights of the KL term's completions, see `pair_rows`."""
    closed: bool = True
    from_reference: bool = True
    """False: from random weights. The log-ratios are to pi_ref all the same."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run left behind."""

    logps: Floats
    """log pi of the listed completions, [P, n]."""
    loss: float
    """Mean over the last logged steps."""
    margins: list[tuple[float, float]]
    """(step, mean log-ratio margin) over training."""
    rewards: Floats | None
    """The policy's own estimates, [P, n], where it has a reward head."""
    alpha: float | None = None
    """The KL term's weight at the last logged step, of a method that has one."""


def train(run: Run) -> Trained:
    """Trains a policy with the trainer of `lm.train` and scores every completion."""
    world = make_world(run.config, closed=run.closed)
    config = world.config
    reference = open_policy(run.reference, world.tokenizer, config)
    rows = pair_rows(world, world.log_probs(reference), run.graphs, run.samples)
    torch.manual_seed(config.seed)
    start = load_policy(run.reference if run.from_reference else MODEL, world.tokenizer, config)
    model = CompletionModel(start, reward_head=run.method.needs_reward_head)
    collator = pair_collator(sample=run.method.needs_samples)
    history = _fit(PolicyTrainer, model, rows, collator, run.training, config.seed, method=run.method)
    logged = [line for line in history if "chosen_logratio" in line]
    return Trained(
        logps=world.log_probs(model),
        loss=logged[-1]["loss"],
        margins=[(line["step"], line["chosen_logratio"] - line["rejected_logratio"]) for line in logged],
        rewards=_head_rewards(model, world) if model.reward_head is not None else None,
        alpha=logged[-1].get("alpha"),
    )


def _head_rewards(model: CompletionModel, world: World) -> Floats:
    batch = collate(world.prompts, [world.completions for _ in world.prompts])
    with torch.inference_mode():
        rewards = model.eval()(**batch).rewards
    assert rewards is not None
    return np.asarray(rewards.double().numpy().reshape(len(world.prompts), -1))


def draw_samples(config: ExactConfig, reference: Path) -> Floats:
    """Share of each completion among those drawn from pi_ref by the pipeline's sampler, [P, n]."""
    world = make_world(config)
    index = {tuple(y): i for i, y in enumerate(world.completions)}
    policy = open_policy(reference, world.tokenizer, world.config)
    shares = []
    for x, prompt in enumerate(world.prompts):
        drawn = sample_completions(
            policy,
            [prompt] * config.reference_samples,
            world.tokenizer,
            world.config,
            seed=config.seed + x,
            what="reference samples",
        )
        shares.append(np.bincount([index[tuple(y)] for y in drawn], minlength=len(index)) / len(drawn))
    return np.array(shares)


def reference_of(config: ExactConfig, folder: Path, closed: bool) -> Floats:
    """Trains and saves pi_ref; log-probs of the listed completions, [P, n]."""
    world = make_world(config, closed=closed)
    return world.log_probs(train_reference(world, folder))


def experiment(config: ExactConfig, scratch: Path) -> dict[str, Any]:
    """Everything, as exact.json has it."""
    started, used = time.perf_counter(), _processor_seconds()
    world = make_world(config)
    rng = np.random.default_rng([config.seed, 2])
    n, everything = len(world.completions), np.arange(len(world.completions))
    closed, opened = scratch / "closed", scratch / "open"
    with workers() as pool:
        references = [pool.submit(reference_of, config, closed, True), pool.submit(reference_of, config, opened, False)]
        ref_logps = references[0].result()
        ref = distributions(ref_logps)

        # Where some completions are in no pair, those that pi_ref likes best are in one: enough mass moves to be seen.
        likely = [np.argsort(-p, kind="stable")[: round(config.compared * n)] for p in ref]
        halves = np.array_split(rng.permutation(n), 2)
        complete = [all_pairs(r) for r in world.rewards]
        sparse = [sparse_pairs(r, everything, rng) for r in world.rewards]
        partial = [sparse_pairs(r, among, rng) for r, among in zip(world.rewards, likely, strict=True)]
        split = [_union(sparse_pairs(r, half, rng) for half in halves) for r in world.rewards[:1]]  # one prompt will do
        disjoint = [disjoint_pairs(r, among, rng) for r, among in zip(world.rewards, likely, strict=True)]

        def start(
            method: Method,
            graphs: Graphs,
            share: float,
            *,
            every_pair: bool = True,
            schedule: Literal["constant_with_warmup"] | None = None,
            **options: Any,
        ) -> Any:
            """`share` of the configured steps, for what has less to reach."""
            assert config.policy.max_steps is not None
            training = replace(
                config.policy,
                max_steps=max(1, round(share * config.policy.max_steps)),
                batch_size=sum(map(len, graphs)) if every_pair else config.policy.batch_size,
                schedule=schedule or config.policy.schedule,
            )
            run = Run(
                config=config, method=method, graphs=graphs, training=training, **{"reference": closed, **options}
            )
            return pool.submit(train, run)

        sampling = pool.submit(draw_samples, config, closed)
        runs = {
            "d-dpo": start(config.method("d-dpo"), complete, 1, every_pair=False),
            "dp-dpo": start(config.method("dp-dpo"), partial, 1, samples=ref),
            "p-dpo": start(config.method("p-dpo"), partial, 1, samples=ref),
            "hull-dpo": start(config.method("hull-dpo"), sparse, 0.85, samples=ref),
            "d-dpo sparse": start(config.method("d-dpo"), sparse, 0.65),
            "ipo": start(config.method("ipo"), sparse, 0.65),
            "e-dpo": start(config.method("e-dpo"), sparse, 0.4, samples=ref),
            "split": start(config.method("d-dpo"), split, 0.65),
            "split again": start(config.method("d-dpo"), split, 0.65, from_reference=False),
            "dpo": start(
                config.method("dpo"), disjoint, 0.5, schedule="constant_with_warmup"
            ),  # it has nowhere to arrive
            "drdo": start(config.method("drdo"), sparse[:1], 0.65),
            "open": start(config.method("d-dpo"), complete, 0.5, every_pair=False, reference=opened, closed=False),
        }
        shares = sampling.result()
        for name, method, graphs in (
            ("dp-dpo", config.method("dp-dpo"), partial),
            ("p-dpo", config.method("p-dpo"), partial),
            ("hull-dpo", config.method("hull-dpo"), sparse),
        ):
            runs[f"{name} sampled"] = start(method, graphs, 0.65, samples=shares)
        awaited = progress.bar("training", runs.items(), unit="run")
        trained: dict[str, Trained] = {name: run.result() for name, run in awaited}
        opened_logps = references[1].result()

    unseen = np.array([~np.isin(everything, among) for among in likely])
    best = optimum(config.method("d-dpo"), world, ref, complete)
    report: dict[str, Any] = {
        "d-dpo": {
            **_against(best, ref, trained["d-dpo"]),
            "sparse": _against(best, ref, trained["d-dpo sparse"], points=False),
            "two_components": _two_components(best[:1], halves, trained["split"], trained["split again"]),
            "unlisted": _unlisted(opened_logps, config, world, trained["open"]),
        },
        "ipo": _against(optimum(config.method("ipo"), world, ref, sparse), ref, trained["ipo"]),
    }
    for name, method in (("p-dpo", config.method("p-dpo")), ("dp-dpo", config.method("dp-dpo"))):
        best = optimum(method, world, ref, partial)
        report[name] = {
            **_against(best, ref, trained[name]),
            "unseen": _unseen(ref, trained[name], unseen),
            "sampled": _against(best, ref, trained[f"{name} sampled"], points=False),
            "guarantees": {
                which: guarantees(method, world, ref, partial, logps)
                for which, logps in (("optimum", best), ("trained", trained[name].logps))
            },
        }
    report |= _ensembles(config, world, ref, sparse, trained)
    report["dpo"] = _divergence(world, ref, disjoint, unseen, trained["dpo"])
    report["drdo"] = _drdo(world, ref[:1], sparse[:1], trained["drdo"])
    report["looks"] = looks(report)
    report["estimators"] = kl_estimators(world, ref, trained["p-dpo"].logps, shares, config.reference_samples)
    report["reference"] = {
        "tv_to_target": total_variation(ref, world.target).tolist(),
        "largest_mass_error": float(np.abs(np.exp(ref_logps).sum(1) - 1).max()),
        "tv_of_draws": total_variation(shares, ref).tolist(),
    }
    report["seconds"] = {"wall": time.perf_counter() - started, "processor": _processor_seconds() - used}
    return report


def _processor_seconds() -> float:
    """Of this process and its finished children: what a busy machine does not stretch."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextlib.contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process a core. Where the block ends by an error or a signal they are ended too: the pool would wait for all
    that it was given."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=_one_thread) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def _one_thread() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all: the first ends the others
    # Matrices this small gain nothing from a second thread; a second run does.
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # its own is a semaphore of the system, which a process that is ended leaves behind
    quieten()
    progress.be_quiet()


def _union(graphs: Any) -> PreferenceGraph:
    parts = list(graphs)
    return PreferenceGraph(parts[0].n, np.concatenate([graph.edges for graph in parts]))


# ---------------------------------------------------------------- what each method shows


def _against(best: Floats, ref: Floats, run: Trained, *, points: bool = True) -> dict[str, Any]:
    """Distances from the optimum; with `points`, both distributions for the figure."""
    distributions = {"optimum": _rounded(np.exp(best)), "trained": _rounded(np.exp(run.logps))} if points else {}
    return {**comparison(run.logps, ref, best), "loss": run.loss, **distributions}


def _rounded(values: Floats) -> list[list[float]]:
    return [[float(f"{v:.4g}") for v in row] for row in values]


def _unseen(ref: Floats, run: Trained, unseen: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Of completions in no pair: by how much the probability of one, and of all, differs from pi_ref's."""
    moved = np.where(unseen, np.exp(run.logps) - ref, 0)
    return {
        "largest_change": float(np.abs(moved).max()),
        "mass": (ref * unseen).sum(1).tolist(),
        "mass_change": moved.sum(1).tolist(),
    }


def _two_components(best: Floats, halves: Sequence[Any], one: Trained, other: Trained) -> dict[str, Any]:
    """Theorem 1 on two components of pairs: within each the optimum, between them anything."""
    result = {}
    for name, run in (("from_reference", one), ("from_random_weights", other)):
        logps = run.logps[: len(best)]
        within = [total_variation(_conditional(logps[:, half]), _conditional(best[:, half])).max() for half in halves]
        result[name] = {
            "loss": run.loss,
            "tv_within_components": float(max(within)),
            "first_component_mass": np.exp(logps[:, halves[0]]).sum(1).tolist(),
        }
    result["optimum"] = {"first_component_mass": np.exp(best[:, halves[0]]).sum(1).tolist()}
    return result


def _conditional(logps: Floats) -> Floats:
    return np.asarray(np.exp(logps - logsumexp(logps, axis=1, keepdims=True)))


def _unlisted(ref_logps: Floats, config: ExactConfig, world: World, run: Trained) -> dict[str, Any]:
    """Theorem 1 where pi_ref goes on beyond the listed completions, which no pair mentions."""
    best = _conditional(ref_logps + world.rewards / scale(config.method("d-dpo")))
    return {
        "loss": run.loss,
        "mass_ref": (1 - np.exp(ref_logps).sum(1)).tolist(),
        "mass": (1 - np.exp(run.logps).sum(1)).tolist(),
        "tv_within_listed": float(total_variation(_conditional(run.logps), best).max()),
    }


def _ensembles(
    config: ExactConfig, world: World, ref: Floats, graphs: Graphs, trained: dict[str, Trained]
) -> dict[str, Any]:
    """e-DPO and hull-DPO: their optima, and the worst case over the members against the max-min value."""
    ideal, ideal_weights = max_min(world, ref, scale(config.method("hull-dpo")))
    result: dict[str, Any] = {}
    for name in ("hull-dpo", "e-dpo"):
        method, beta = config.method(name), scale(config.method(name))
        best, weights = ensemble_optimum(method, world, ref, graphs)
        result[name] = {
            **_against(best, ref, trained[name]),
            "weights": weights.tolist(),
            "worst_case": worst_case(world, ref, trained[name].logps, beta),
            "worst_case_optimum": worst_case(world, ref, best, beta),
            "max_min_value": worst_case(world, ref, ideal, beta),
            "max_min_weights": ideal_weights.tolist(),
        }
        if name == "hull-dpo":
            result[name]["sampled"] = _against(best, ref, trained[f"{name} sampled"], points=False)
    # Gradient descent on a minimum may end at a member that is not the best: the distance to each one's optimum.
    result["e-dpo"]["tv_to_members"] = [
        float(
            total_variation(
                np.exp(trained["e-dpo"].logps), np.exp(optimum(config.method("e-dpo"), world, ref, graphs, vertex))
            ).max()
        )
        for vertex in np.eye(config.members)
    ]
    return result


def _divergence(
    world: World, ref: Floats, graphs: Graphs, unseen: npt.NDArray[np.bool_], run: Trained
) -> dict[str, Any]:
    """DPO on disjoint pairs ([F] Prop 1, Corollary 1): where the mass goes, and how the margin grows."""
    probs = np.exp(run.logps)
    roles = {name: np.zeros(ref.shape, dtype=bool) for name in ("winners", "losers")}
    for x, graph in enumerate(graphs):
        roles["winners"][x, graph.winners] = True
        roles["losers"][x, graph.losers] = True
    steps, margins = np.array(run.margins).T
    late = steps > steps[-1] / 2
    power = stats.linregress(np.log(steps[late]), np.log(margins[late]))
    logarithm = stats.linregress(np.log(steps[late]), margins[late])
    return {
        "loss": run.loss,
        "mass": {name: (probs * who).sum(1).tolist() for name, who in {**roles, "unseen": unseen}.items()},
        "mass_ref": {name: (ref * who).sum(1).tolist() for name, who in {**roles, "unseen": unseen}.items()},
        "largest_unseen_change": _unseen(ref, run, unseen)["largest_change"],
        "margin": [[int(step), float(f"{margin:.4g}")] for step, margin in run.margins],
        "growth": {
            "power": float(power.slope),
            "power_r2": float(power.rvalue**2),
            "per_log_step": float(logarithm.slope),
            "per_log_step_r2": float(logarithm.rvalue**2),
        },
    }


def _drdo(world: World, ref: Floats, graphs: Graphs, run: Trained) -> dict[str, Any]:
    """DRDO: errors of its reward differences, and what becomes of the policy, for which there is no closed form."""
    assert run.rewards is not None
    logps, errors = run.logps[: len(graphs)], (run.rewards - world.rewards)[: len(graphs)]
    pairs = np.concatenate([graph.margins(e) for graph, e in zip(graphs, errors, strict=True)])
    probs = np.exp(logps)
    won = [np.bincount(graph.winners, minlength=graph.n) for graph in graphs]
    lost = [np.bincount(graph.losers, minlength=graph.n) for graph in graphs]
    unbeaten = np.array([(w > 0) & (el == 0) for w, el in zip(won, lost, strict=True)])
    return {
        "loss": run.loss,
        "reward_margin_error_rms": float(np.sqrt((pairs**2).mean())),
        "reward_margin_error_largest": float(np.ptp(errors, axis=1).max()),
        "tv_from_ref": total_variation(probs, ref).tolist(),
        "forward_kl_from_ref": forward_kl(ref, logps).tolist(),
        "entropy": (-probs * logps).sum(1).tolist(),
        "entropy_ref": (-ref * np.log(ref)).sum(1).tolist(),
        "unbeaten_mass": (probs * unbeaten).sum(1).tolist(),
        "unbeaten_mass_ref": (ref * unbeaten).sum(1).tolist(),
    }


# ---------------------------------------------------------------- the command


def table(report: dict[str, Any]) -> Table:
    """The distances from the optima as a rich table."""
    view = Table(title="Trained policy against the exact optimum (worst prompt)", box=box.SIMPLE, padding=0)
    for heading in ("run", "total\nvariation", "of\npi_ref", "KL from\noptimum", "of\npi_ref"):
        view.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for name in (*CERTIFIED, "e-dpo"):
        for suffix, entry in (
            ("", report[name]),
            (", sparse pairs", report[name].get("sparse")),
            (", sampled KL", report[name].get("sampled")),
        ):
            if entry is not None:
                cells = [f"{entry['tv']:.1e}", f"{entry['tv_ref']:.3f}"]
                cells += [f"{entry['forward_kl']:.1e}", f"{entry['forward_kl_ref']:.3f}"]
                view.add_row(name + suffix, *cells)
    return view


def remarks(report: dict[str, Any]) -> list[str]:
    """What the methods without a unique optimum did, and what pessimism guarantees, a line each."""
    split, unlisted, dpo = report["d-dpo"]["two_components"], report["d-dpo"]["unlisted"], report["dpo"]
    drdo, hull, least = report["drdo"], report["hull-dpo"], report["e-dpo"]
    kl, sampled, by_token = (report["estimators"][name] for name in ("exact", "sampled", "token_level"))
    masses = [split[run]["first_component_mass"][0] for run in ("from_reference", "from_random_weights", "optimum")]
    within = max(split[run]["tv_within_components"] for run in ("from_reference", "from_random_weights"))
    return [
        "d-dpo, two components: mass of the first {:.3f}, from random weights {:.3f}, in the optimum {:.3f}; ".format(
            *masses
        )
        + f"total variation within components at most {within:.1e}",
        f"d-dpo, unlisted completions: mass {max(unlisted['mass_ref']):.4f} under pi_ref, up to "
        f"{max(unlisted['mass']):.3f} after, loss {unlisted['loss']:.1e}",
        f"worst case over the members: hull-dpo {hull['worst_case']:+.4f}, e-dpo {least['worst_case']:+.4f}, "
        f"max-min value {hull['max_min_value']:+.4f}",
        f"completions in no pair: largest change in probability {report['p-dpo']['unseen']['largest_change']:.1e} "
        f"(p-dpo), {report['dp-dpo']['unseen']['largest_change']:.1e} (dp-dpo), "
        f"{dpo['largest_unseen_change']:.1e} (dpo)",
        f"dpo: losers' mass from {max(dpo['mass_ref']['losers']):.3f} to {max(dpo['mass']['losers']):.1e}, margin "
        f"{dpo['margin'][-1][1]:.1f} nats and growing as step^{dpo['growth']['power']:.2f}",
        f"estimators of KL(pi_ref || p-dpo) = {kl[0]:.4f}: {sampled['drawn'][0]:.4f} by completions (variance "
        f"{sampled['variance'][0]:.2f} a draw), {by_token['drawn'][0]:.4f} by tokens ({by_token['variance'][0]:.2f})",
        f"drdo: reward margins to {drdo['reward_margin_error_rms']:.1e} (root mean square), total variation from "
        f"pi_ref up to {max(drdo['tv_from_ref']):.3f}",
        *(_promise(name, report[name]["guarantees"]) for name in GUARANTEED if "guarantees" in report[name]),
    ]


def _promise(name: str, found: dict[str, Any]) -> str:
    def means(what: str) -> tuple[float, float]:
        """Over prompts: of the trained network, of the optimum."""
        return float(np.mean(found["trained"][what])), float(np.mean(found["optimum"][what]))

    real, held, j = means("advantage"), means("guaranteed"), means("divergence")
    return (
        f"{name}, mean over prompts, trained (optimum): true advantage {real[0]:.4f} ({real[1]:.4f}), guaranteed "
        f"{held[0]:.4f} ({held[1]:.4f}) with a residual of at most {max(found['trained']['residual']):.1e} a nat; J "
        f"{j[0]:.4f} ({j[1]:.4f}) nats, at most {means('bound')[1]:.4f} by alpha"
    )
