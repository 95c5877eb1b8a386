"""Every option of the pipeline, typed and documented; `--help` is made from this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from math import inf
from string import Formatter
from typing import Any, ClassVar, Literal

from lm.objectives import METHODS, PAPERS, Method, option_of

Kind = Literal["world", "tldr", "hh", "preferences"]
ControlTokens = Literal["auto", "text", "control", "drop", "refuse"]
KINDS = ("preferences", "hh", "tldr")
"""Of sets that are read."""
Pairs = Literal["all", "hc_he", "lc_le"]
GroupWeight = Literal["prompt", "pair"]
DTYPES = ("auto", "float32", "bfloat16", "float64")
TASKS = ("summary", "helpfulness")
"""What an LLM can be asked to compare, see `lm.judging.llm`."""
SFT = "sft"
"""pi_ref's name among the policies."""
OWN_SET: Mapping[str, Any] = {
    "data": {"labels": "given", "max_prompt_length": None, "max_completion_length": None},
    "bias": {"rho": None},
}
"""Options of a command where the data is a set that is read, and neither a file nor the command line says them: its own
labels, every pair, and limits from the data. The embedded world has the dataclasses' defaults."""


def _check(owner: object, condition: str, **values: tuple[Any, bool]) -> None:
    for name, (value, good) in values.items():
        if not good:
            raise ValueError(f"{type(owner).__name__}.{name} must be {condition}, got {value!r}")


def check_seed(seed: int, option: str) -> None:
    """ValueError for what no generator takes."""
    if seed < 0:
        raise ValueError(f"{option} must be >= 0, got {seed}")


def _positive(owner: object, *names: str) -> None:
    _check(owner, "> 0", **{name: (getattr(owner, name), getattr(owner, name) > 0) for name in names})
    _check(owner, "finite", **{name: (getattr(owner, name), getattr(owner, name) != inf) for name in names})


def _placed(template: str) -> list[str] | None:
    """The names in a template's braces; None where it cannot be filled, or not with the texts as they are."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError:
        return None
    return None if any(spec or conversion for *_, spec, conversion in parts) else [str(name) for _, name, *_ in parts]


def _share(owner: object, *names: str) -> None:
    _check(owner, "between 0 and 1", **{name: (getattr(owner, name), 0 <= getattr(owner, name) <= 1) for name in names})


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The embedded world.

    Args:
        posts: number of posts, each with one reference summary.
        pairs_per_post: compared pairs of summaries a post.
        min_events: fewest events a post.
        max_events: most events a post, at most 16.
        annotator_sharpness: scale of the annotators' Bradley-Terry choice; larger is less noisy.
        length_preference: what one more word is worth to the annotators, in units of utility.
    """

    posts: int = 6000
    pairs_per_post: int = 4
    min_events: int = 4
    max_events: int = 8
    annotator_sharpness: float = 3.0
    length_preference: float = 0.05

    def __post_init__(self) -> None:
        _positive(self, "posts", "pairs_per_post", "min_events", "annotator_sharpness")
        bounds = self.min_events <= self.max_events <= 16
        _check(self, "at least min_events and at most 16", max_events=(self.max_events, bounds))


@dataclass(frozen=True, kw_only=True)
class UnlabelledConfig:
    """Pairs without labels, which reward models score and only methods learn from that distil rewards and read no
    labels ([F] 5.1); the others see D_rho alone. Prompts of the validation and test splits are left out.

    Args:
        completions: of pi_ref for each prompt, 2 or more, of which all pairs are taken, see `group_weight`; null for
            the pairs of `path`.
        path: hub name, local file or folder, as of `data`: of rows with `prompt`, text or messages, where completions
            are sampled, else of pairs (HH dialogues where `data` is "hh"; else prompt, chosen and rejected), whose
            labels are not read. null: the prompts of the training split.
        prompts: how many of the prompts, drawn by the seed; null for all.
    """

    completions: int | None = None
    path: str | None = None
    prompts: int | None = None

    @property
    def is_asked(self) -> bool:
        """Whether there are such pairs."""
        return self.completions is not None or self.path is not None

    def __post_init__(self) -> None:
        good = self.completions is None or self.completions >= 2
        _check(self, "at least 2, or null for the pairs of path", completions=(self.completions, good))
        if self.prompts is not None:
            _positive(self, "prompts")
            if not self.is_asked:
                raise ValueError(
                    f"UnlabelledConfig.prompts {self.prompts} go with completions or a path; both are null"
                )


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Pairs of the training split that pi_ref samples and the judge labels.

    Args:
        pairs: "beside" the given pairs of the training split, or "instead" of them; null for none.
        completions: of pi_ref for each prompt of the training split, 2 or more, of which all pairs are taken, see
            `group_weight`.
    """

    pairs: Literal["beside", "instead"] | None = None
    completions: int = 2

    def __post_init__(self) -> None:
        _check(self, "at least 2", completions=(self.completions, self.completions >= 2))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preferences and reference completions.

    Args:
        kind: "world" generates the embedded world; "tldr" reads comparisons in the schema of
            openai/summarize_from_feedback and a TL;DR reference set; "hh" reads Anthropic HH dialogues
            (`chosen` and `rejected` sharing a prefix); "preferences" reads TRL-style sets: prompt, chosen and rejected
            as text or as messages (the model's chat template is applied), and rewards in the columns that `rewards`
            names.
        path: hub name (owner/name, or owner/name/folder for one folder of it, and @revision after it), or a local
            file of type .jsonl, .json, .csv, .tsv (each also .gz) or .parquet, or a folder of them. Not read by
            "world".
        sft_path: reference completions, likewise; needed by "tldr", and read by "preferences" (prompt and completion,
            or messages) where given. Without it the chosen completions are the references.
        prompt: where the prompts of "preferences" stand. "auto": in `prompt`; in sets without it, in `conversations` or
            `messages`, or in messages or dialogues of which both sides begin alike; and in sets of text that have no
            other column of text, it is what both sides begin with. "inferred": it is that whatever else there is.
            Anything else is the column's name.
        labels: "oracle" relabels every pair by the oracle; "given" keeps the set's own labels. The oracle judges the
            policies either way. Of a command's options, "given" for every kind but "world", see `OWN_SET`.
        rewards: "models" trains reward models; "given" distils the set's own rewards ("preferences" only), in the
            columns that `lm.data.rewards` lists: the one reward is chosen_reward and rejected_reward, or
            reward_margin, or else the members' mean; the members of the ensemble, two or more, are the entries of
            chosen_member_rewards and rejected_member_rewards.
            "oracle" distils the judge's own rewards, as a control: what is left to gain by better reward models. No
            ensemble, and labels must be "oracle".
        reward_noise: standard deviation of normal noise that is added to the judge's rewards where `rewards` is
            "oracle", once a completion: a reward model that is as good as one likes.
        prompt_template: how a "tldr" or "world" prompt is written, with {subreddit}, {title} and {post}.
        max_prompt_length: longest prompt, tokens; longer rows are dropped and counted. Null takes it from the data: the
            least that 99% of the rows keep to, see `lm.data.limits`.
        max_completion_length: longest completion, tokens, end-of-text included; likewise.
        valid_fraction: share of the prompts held out for validation.
        test_fraction: share of the prompts held out for evaluation.
        limit: use only this many preference rows, of a group its pairs, drawn by the seed; null for all.
        split: "drawn" puts all of a set's own splits together, which is said, and draws anew: by a hash of what was
            asked and the seed (see `lm.data.splits`). "own" keeps the set's splits, named by its column `split`, by the
            hub, or by files and folders (train, valid, test and their like); of valid and test, what the set has not is
            drawn from its train.
        control_tokens: what is done where a text of the set names a control token of the tokenizer, such as
            <|im_end|>. "text" reads it as the characters that it is made of, and counts; "control" reads it as the
            token, for texts that a chat template has written, and counts; "drop" leaves such rows out; "refuse" stops.
            "auto" is "text", but refused where most prompts are text that begins with a control token, as chat
            templates write it. A prompt may begin with beginning-of-text and a completion end with end-of-text.
        group_weight: what the pairs of one row with more than two completions weigh: "prompt", together as much as one
            pair, 1 / (number of pairs) each; or "pair", 1 each. So are those of completions that pi_ref samples.
        unlabelled: pairs that only reward models score.
        on_policy: pairs that pi_ref samples and the judge labels.
        world: the embedded world; "world" only.
    """

    kind: Kind = "world"
    path: str | None = None
    sft_path: str | None = None
    prompt: str = field(default="auto", metadata={"keyed": "unless default"})
    labels: Literal["oracle", "given"] = "oracle"
    rewards: Literal["models", "given", "oracle"] = "models"
    prompt_template: str = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    max_prompt_length: int | None = 512
    max_completion_length: int | None = 128
    valid_fraction: float = 0.05
    test_fraction: float = 0.1
    limit: int | None = None
    split: Literal["drawn", "own"] = "drawn"
    control_tokens: ControlTokens = "auto"
    group_weight: GroupWeight = field(default="prompt", metadata={"keyed": "unless default"})
    unlabelled: UnlabelledConfig = field(default_factory=UnlabelledConfig, metadata={"keyed": False})
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig, metadata={"keyed": False})
    reward_noise: float = field(default=0.0, metadata={"keyed": False})
    world: WorldConfig = field(default_factory=WorldConfig)

    RETIRED: ClassVar[Mapping[str, Any]] = {"subset": None}
    """Options that are no more, with the one value that the keys of artifacts still have of them."""

    def sampled(self, prompts: int) -> tuple[int, int]:
        """(on-policy, unlabelled) pairs at most that pi_ref samples, of so many training prompts. Those of a file are
        not known before it is read, and are counted as if it had as many."""

        def most(completions: int | None, of: int) -> int:
            return 0 if completions is None else of * completions * (completions - 1) // 2

        on_policy = self.on_policy.completions if self.on_policy.pairs is not None else None
        return most(on_policy, prompts), most(self.unlabelled.completions, self.unlabelled.prompts or prompts)

    @property
    def limits(self) -> tuple[int, int]:
        """max_prompt_length and max_completion_length. ValueError where one is still to be taken from the data."""
        if self.max_prompt_length is None or self.max_completion_length is None:
            raise ValueError(
                "DataConfig.max_prompt_length and max_completion_length must be numbers here, where no data is read; "
                f"got {self.max_prompt_length} and {self.max_completion_length}"
            )
        return self.max_prompt_length, self.max_completion_length

    def __post_init__(self) -> None:
        limits = ("max_prompt_length", "max_completion_length")
        _positive(self, *(name for name in limits if getattr(self, name) is not None))
        _share(self, "valid_fraction", "test_fraction")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                "DataConfig.valid_fraction + test_fraction must leave a training split (sum below 1), got "
                f"{self.valid_fraction} + {self.test_fraction}"
            )
        if self.kind == "world" and (self.path or self.sft_path):
            given = self.path or self.sft_path
            raise ValueError(
                f'DataConfig.path and sft_path go with kinds other than "world", got {given!r} for "world"'
            )
        if not self.prompt or (self.prompt != "auto" and self.kind != "preferences"):
            raise ValueError(
                'DataConfig.prompt must be "auto", "inferred" or a column\'s name, and other than "auto" for kind '
                f'"preferences" only; got {self.prompt!r} for "{self.kind}"'
            )
        if self.kind != "world" and not self.path:
            raise ValueError(f'DataConfig.path is needed for kind "{self.kind}": a hub name or a local file or folder')
        if (self.kind == "tldr" and not self.sft_path) or (self.kind == "hh" and self.sft_path):
            raise ValueError(
                f'DataConfig.sft_path is needed for kind "tldr", and not read by "hh"; got {self.sft_path!r} for '
                f'"{self.kind}"'
            )
        if self.rewards == "given" and self.kind != "preferences":
            raise ValueError(f'DataConfig.rewards "given" goes with kind "preferences" only, got kind "{self.kind}"')
        if self.rewards == "oracle" and self.labels != "oracle":
            raise ValueError(f'DataConfig.rewards "oracle" goes with labels "oracle", got labels "{self.labels}"')
        _check(self, ">= 0 and finite", reward_noise=(self.reward_noise, 0 <= self.reward_noise < inf))
        if self.reward_noise and self.rewards != "oracle":
            raise ValueError(
                f'DataConfig.reward_noise goes with rewards "oracle", got {self.reward_noise:g} with "{self.rewards}"'
            )
        if self.unlabelled.is_asked and self.rewards == "given":
            raise ValueError(
                'DataConfig.unlabelled needs rewards "models" or "oracle", which score what no set has scored; got '
                '"given"'
            )
        if self.on_policy.pairs is not None and (self.labels, self.rewards == "given") != ("oracle", False):
            raise ValueError(
                'DataConfig.on_policy needs labels "oracle" and rewards "models" or "oracle": nobody has labelled or '
                f'scored what pi_ref samples; got labels "{self.labels}" and rewards "{self.rewards}"'
            )
        if self.limit is not None:
            _positive(self, "limit")
        if self.split == "own" and self.kind == "world":
            raise ValueError('DataConfig.split "own" goes with kinds that are read, got kind "world"')
        placed = _placed(self.prompt_template) or []
        if placed.count("post") != 1 or not {"subreddit", "title", "post"} >= set(placed):
            raise ValueError(
                "DataConfig.prompt_template must have {post} once, and beside it only {subreddit} and {title} in "
                f"braces, got {self.prompt_template!r}"
            )


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges the policies, and labels the pairs where `data.labels` is "oracle".

    Args:
        kind: "model" is a reward model, `oracle_model` or one that is trained; "exact" is the taste of the embedded
            world's annotators itself, without their noise: utility * (true utility) + length_preference * words. Other
            sets have no judge that is known exactly.
        utility: what a unit of true utility is worth to the exact judge, > 0.
        length_preference: what one more word is worth to it; null for what it is worth to the annotators,
            `data.world.length_preference`.
        sharpness: the judge's labels are drawn: of two completions the first is preferred with probability
            sigmoid(sharpness * (difference of their rewards)), [F] eq 2, > 0. So in the training and the validation
            split; test pairs have the judge's own preference, so that accuracies there are not of the noise. null: all
            pairs have it, and ties are left out.
        unfinished: the reward of a policy's sample that reached data.max_completion_length before end-of-text, on the
            judge's scale. null: the judge reads it as though it had ended there.
    """

    kind: Literal["model", "exact"] = "model"
    utility: float = 1.0
    length_preference: float | None = None
    sharpness: float | None = None
    unfinished: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "utility", *(["sharpness"] if self.sharpness is not None else []))
        for name in ("length_preference", "unfinished"):
            value = getattr(self, name)
            _check(self, "a finite number or null", **{name: (value, value is None or abs(value) < inf)})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run.

    Args:
        epochs: passes over the data; null where max_steps says it.
        max_steps: optimiser steps; null where epochs says it.
        batch_size: examples in the global mini-batch of one optimiser step (over all ranks and micro-batches).
        micro_batch_size: most examples a forward pass and rank; null for no limit. Changes memory and speed only.
        micro_batch_tokens: most tokens a forward pass and rank, prompts counted once; null for no limit. An example
            that is longer goes alone. Changes memory and speed only.
        activation_checkpointing: compute activations again in the backward instead of keeping them; slower, smaller.
        learning_rate: peak learning rate of AdamW.
        schedule: learning-rate schedule after warm-up.
        warmup_fraction: share of the steps that warm up linearly.
        weight_decay: AdamW's.
        max_grad_norm: gradient-norm clip.
        logging_steps: steps between log lines; null for a tenth of the steps, so that there are ten lines
            or more, but at most 25.
        save_steps: steps between resumable checkpoints; null for none.
        train: of sft, "nothing" where the model is pi_ref as it is, which `sft: null` stands for; else null. Of
            reward and oracle, "all" parameters; "lora", adapters as the group `lora` says, and the
            head; "head", a linear head on the last hidden states of a frozen body, which are computed once for all
            pairs: each model is then one convex problem, which is solved, with the strength of its L2 penalty chosen on
            validation pairs, and epochs and max_steps are null, unless a method trains a reward model of its own by
            them (DRDO). null: "lora" where lora.stages names the stage, else "all".
        evaluations: of reward and oracle: times that the loss of validation pairs is computed, evenly spaced over the
            steps, the last among them; the model of the step where it is least is kept. 0: none, and the last step's
            is kept. null: 10 of a reward model and of the oracle; 0 of sft and policy, which take nothing else (a
            policy's step is chosen by the judge, see `snapshots`). [set]
        evaluation_pairs: validation pairs that it is computed on, evenly spaced over them, or all there are where they
            are fewer; null for all. [set]
        patience: evaluations in a row without a lesser loss after which a training ends; null: it takes all its steps.
            The schedule of the learning rate is of all steps either way. [set]
    """

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    activation_checkpointing: bool = False
    learning_rate: float = 1e-6
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    logging_steps: int | None = None
    save_steps: int | None = None
    train: Literal["all", "lora", "head", "nothing"] | None = field(default=None, metadata={"keyed": False})
    evaluations: int | None = field(default=None, metadata={"keyed": False})
    evaluation_pairs: int | None = field(default=500, metadata={"keyed": False})
    patience: int | None = field(default=3, metadata={"keyed": False})

    EVALUATIONS: ClassVar[int] = 10
    """Of a reward model, where `evaluations` is null."""
    INDIFFERENT: ClassVar[dict[str, Any]] = {
        "micro_batch_size": None,
        "micro_batch_tokens": None,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_steps": None,
    }
    """What only saves memory or says how far it is: no model changes by it, and keys count it at these values."""
    ONE_LENGTH: ClassVar[str] = "TrainingConfig needs exactly one of epochs and max_steps, and null for the other"

    @property
    def is_given(self) -> bool:
        """Whether it says how long to train, which a head needs not: a training that nothing asks for can be left
        out."""
        return self.train == "head" or self.has_steps

    @property
    def has_steps(self) -> bool:
        """Whether it says how long to take gradient steps."""
        return self.epochs is not None or self.max_steps is not None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"{self.ONE_LENGTH}; got {self.epochs} and {self.max_steps}")
        optional = (
            *("epochs", "max_steps", "micro_batch_size", "micro_batch_tokens", "logging_steps", "save_steps"),
            *("evaluation_pairs", "patience"),
        )
        given = [name for name in optional if getattr(self, name) is not None]
        _positive(self, *given, "batch_size", "learning_rate", "max_grad_norm")
        _share(self, "warmup_fraction")
        at_least_0 = self.evaluations is None or self.evaluations >= 0
        _check(self, ">= 0 or null", evaluations=(self.evaluations, at_least_0))

    @property
    def stopping(self) -> dict[str, int | None] | None:
        """How the step of a reward model that is kept is chosen, by the options' names; None where it is the last. What
        counts in its key."""
        times = self.EVALUATIONS if self.evaluations is None else self.evaluations
        chosen = {"evaluations": times, "evaluation_pairs": self.evaluation_pairs, "patience": self.patience}
        return chosen if times else None

    def check_keeps_last(self, name: str) -> None:
        """ValueError, of a training that always keeps its last step, where the options ask for another."""
        for option in ("evaluations", "evaluation_pairs", "patience"):
            default = next(each.default for each in fields(self) if each.name == option)
            if (value := getattr(self, option)) not in (default, *([0] if option == "evaluations" else [])):
                raise ValueError(
                    f"{name}.{option} is of reward models and the oracle only, got {value}; leave it out here (a "
                    "policy's step is chosen by the judge, see snapshots)"
                )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) trained in place of a model's own parameters: a linear
    layer W becomes W + (alpha / rank) B A. pi_ref is the model without them. Reward heads are trained whole. There is
    no dropout: the completions of a prompt share its one forward pass, and would share its noise.

    Args:
        rank: rows of A and columns of B; null trains all parameters.
        alpha: scale of the update, over rank.
        target_modules: names of the layers that get an adapter, as q_proj; null for every linear layer but the head.
        stages: which trainings use adapters, of sft, oracle, reward and policy.
    """

    rank: int | None = None
    alpha: float = 16.0
    target_modules: list[str] | None = None
    stages: list[Literal["sft", "oracle", "reward", "policy"]] = field(default_factory=lambda: ["policy"])

    RETIRED: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}
    """As of `DataConfig`."""

    def __post_init__(self) -> None:
        if self.rank is not None:
            _positive(self, "rank")
        _positive(self, "alpha")
        named = self.target_modules is None or (bool(self.target_modules) and all(self.target_modules))
        _check(self, "one or more names of layers, or null", target_modules=(self.target_modules, named))
        each_once = 0 < len(set(self.stages)) == len(self.stages)
        _check(self, "one or more of sft, oracle, reward and policy, none twice", stages=(self.stages, each_once))


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """The length-biased training set D_rho, and the subsets that the reward ensemble learns from.

    Args:
        rho: share of D_rho in which the longer completion is preferred; null for the unbiased training split.
        size: pairs in D_rho; null for the largest feasible.
        length_ratio: a completion is longer if it has at least this many times the other's tokens. [set]
        member_fractions: for each ensemble member, the share of its subset in which the longer is preferred. [set]
        member_size: pairs in each member's subset; null for the largest that is feasible for all of them.
        pairs: which training pairs there are to draw from: "all", or by the annotators' confidence and the token edit
            distance of the completions: "hc_he" for both above their medians, "lc_le" for both below.
    """

    rho: float | None = 0.2
    size: int | None = None
    length_ratio: float = 1.1
    member_fractions: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.5, 0.6, 0.8])
    member_size: int | None = None
    pairs: Pairs = "all"

    def __post_init__(self) -> None:
        if self.rho is not None:
            _share(self, "rho")
        elif self.size is not None:
            raise ValueError(f"BiasConfig.size goes with a rho; got size {self.size} and rho null")
        _check(self, "> 1 and finite", length_ratio=(self.length_ratio, 1 < self.length_ratio < float("inf")))
        good = len(self.member_fractions) >= 2 and all(0 <= b <= 1 for b in self.member_fractions)
        _check(self, "two or more shares between 0 and 1", member_fractions=(self.member_fractions, good))
        once = len({f"{b:g}" for b in self.member_fractions}) == len(self.member_fractions)
        _check(self, "shares that differ: one twice is one member", member_fractions=(self.member_fractions, once))
        for name in ("size", "member_size"):
            if getattr(self, name) is not None:
                _positive(self, name)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling completions.

    Args:
        engine: what samples: "transformers" (on a CPU our own loop around its models, else its `generate`), or vLLM (to
            be installed; see `lm.logprobs.sampling.sample_completions`).
        temperature: softmax temperature, > 0.
        batch_size: completions at once, fewer where their caches would not fit the free memory. The loop draws the same
            whatever it is, `generate` does not (what is cut is said); vLLM schedules by itself.
        reference_samples: completions of pi_ref for each training prompt, which estimate the forward KL.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    temperature: float = 1.0
    batch_size: int = 256
    reference_samples: int = 1

    def __post_init__(self) -> None:
        _positive(self, "temperature", "batch_size", "reference_samples")


@dataclass(frozen=True, kw_only=True)
class OutOfDomainConfig:
    """Prompts of another kind than any that was trained on. No reward model learns from them: the in-domain oracle
    judges.

    Args:
        path: hub name, local file or folder, as of `data`, of rows with an `article`; null for none, or for the
            embedded world its own: posts with more events than any it trains on.
        prompt_template: how a prompt is written, with {article}. Not read by the world.
        prompts: how many, drawn by the seed; null for all.
        events: fewest and most events of the world's posts.
    """

    path: str | None = None
    prompt_template: str = "ARTICLE: {article}\n\nTL;DR:"
    prompts: int | None = 500
    events: tuple[int, int] = (12, 16)

    def __post_init__(self) -> None:
        if self.prompts is not None:
            _positive(self, "prompts")
        _check(
            self,
            "a text with {article} once",
            prompt_template=(self.prompt_template, _placed(self.prompt_template) == ["article"]),
        )
        low, high = self.events
        _check(self, "fewest and most, between 1 and 16", events=(self.events, 1 <= low <= high <= 16))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on held-out prompts.

    Args:
        prompts: test prompts; null for all.
        valid_prompts: validation prompts, read where settings or steps are chosen; null for all.
        best_of: samples of pi_ref on each validation prompt, 2 or more, whose best of n by the judge, n = 1, 2, 4, ...
            to all, are a yardstick for policies; null: it is made of the samples that the KL term has on the probe's
            prompts, where there are 2 or more.
        confidence: level of the bootstrap interval.
        resamples: bootstrap resamples over prompts.
        temperatures: sampling temperatures, one or more; `lm.nondeterministic` only.
        out_of_domain: prompts from another set; `lm.nondeterministic` only.
    """

    prompts: int | None = None
    valid_prompts: int | None = None
    best_of: int | None = None
    confidence: float = 0.95
    resamples: int = 10_000
    temperatures: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    out_of_domain: OutOfDomainConfig = field(default_factory=OutOfDomainConfig)

    def __post_init__(self) -> None:
        _check(self, "at least 2, or null", best_of=(self.best_of, self.best_of is None or self.best_of >= 2))
        good = 0 < len(set(self.temperatures)) == len(self.temperatures) and all(t > 0 for t in self.temperatures)
        _check(self, "one or more, each > 0, none twice", temperatures=(self.temperatures, good))
        given = [name for name in ("prompts", "valid_prompts") if getattr(self, name) is not None]
        _positive(self, *given, "resamples")
        _check(self, "between 0 and 1", confidence=(self.confidence, 0 < self.confidence < 1))


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is logged of every policy while it trains: log-probs of held-out winners and losers, the forward KL by both
    distributions, and which ensemble member the implicit rewards match best.

    Args:
        pairs: validation pairs, or all there are where they are fewer; 0 for no probe.
        train_pairs: training pairs, likewise, of which the same is logged: what a policy does to pairs that it has
            learnt, next to those that it has not. They need pairs, too.
        times: probes over the training, evenly spaced, beside one before it.
    """

    pairs: int = 200
    train_pairs: int = field(default=0, metadata={"keyed": "unless default"})
    times: int = 10

    def __post_init__(self) -> None:
        _check(
            self, ">= 0", **{name: (getattr(self, name), getattr(self, name) >= 0) for name in ("pairs", "train_pairs")}
        )
        if self.train_pairs and not self.pairs:
            raise ValueError(
                f"ProbeConfig.train_pairs {self.train_pairs} go with pairs held out: pairs must be > 0, got 0"
            )
        _positive(self, "times")


@dataclass(frozen=True, kw_only=True)
class LogprobsConfig:
    """How log-probs and rewards are computed. Changes speed and memory; results only by rounding.

    Args:
        route: "packed" computes a prompt once for all its completions, without padding; "padded" is the plain forward;
            "auto" takes packed where a trial with rows as long shows the plain forward's numbers, and says where not.
        onednn: float32 matrix products through oneDNN on the CPU; "auto" where that gains (AMD with AVX-512, models
            whose hidden states are 512 wide or more) and no layers are compiled, which have products of their own.
        compile: torch.compile each layer but the last; pays off on long runs. Not with onednn "on".
        autocast: bfloat16 activations and products over float32 parameters; log-probs are summed in float32.
        allocator: let the C library keep freed memory on the CPU, which saves page faults every step; what is more than
            a gigabyte is given back between stages. Whatever it is, large tensors begin at a page in a process that
            imports lm before torch makes its first tensor, unless the environment has THP_MEM_ALLOC_ENABLE=0.
        scoring_tokens: most tokens a forward pass of scoring.
    """

    route: Literal["auto", "packed", "padded"] = "auto"
    onednn: Literal["auto", "on", "off"] = "auto"
    compile: bool = False
    autocast: bool = False
    allocator: bool = True
    scoring_tokens: int = 8192

    def __post_init__(self) -> None:
        _positive(self, "scoring_tokens")
        if self.onednn == "on" and self.compile:
            raise ValueError(
                'logprobs.onednn "on" and logprobs.compile true do not go together: compiled layers have products of '
                'the compiler\'s; use onednn "auto" or "off", or compile false'
            )


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How reward models of any kind are loaded and run, see `lm.judging.reward_models`.

    Args:
        dtype: of the parameters; "auto" as they are saved.
        device: "auto" (accelerator if there is one), or "cpu".
        batch_tokens: most tokens a forward pass, where one pair has no more.
        max_length: longest text, tokens; None for the model's positions.
    """

    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int = LogprobsConfig.scoring_tokens
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("batch_tokens", self.batch_tokens, 1), ("max_length", self.max_length, 2)):
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ReferenceScoring:
    """What pi_ref adds to a scored file, see `lm.judging.reference`. A sample is drawn at temperature 1, as it stands
    for pi_ref.

    Args:
        model: the causal LM, hub name or folder; null for none.
        samples: completions to draw of each prompt.
        sample_tokens: longest sample, tokens, end-of-text included.
        seed: of the samples.
    """

    model: str | None = None
    samples: int = 0
    sample_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("samples", self.samples, 0), ("sample-tokens", self.sample_tokens, 1)):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        check_seed(self.seed, "--seed")
        if self.model is None and self.samples:
            raise ValueError(f"--samples {self.samples} are drawn by pi_ref: name it by --reference")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run: data, upstream models, methods, evaluation.

    Args:
        output_dir: where everything goes. Finished stages found there are reused.
        model: base model: a hub name, a local folder, a .gguf file, "real:smollm2" or "real:gemma3" (files that
            packages of the index have, see docs/own-data.md), or "scratch:tiny" or "scratch:small" (Llama-type models
            of 2 layers of width 64, and of 4 of width 128, from random weights with a BPE tokenizer trained on the
            data).
        methods: which methods to train and compare; by default those of both papers, and hull-DPO.
        oracle_model: a reward model to judge by (hub name or local folder, one label); null to train the oracle on the
            full training split. With another tokenizer than that of `model` it reads the texts, see
            `lm.judging.reading`.
        oracle_base: what a trained oracle starts from, named as `model` is; null for `reward_base`, and else pi_ref.
            So the judge can be another, larger model than the policies; it may have another tokenizer.
        seed: seed of everything that is drawn.
        dtype: parameter dtype of training and scoring.
        device: "auto" (accelerator if there is one), or "cpu".
        host_timeout: of a run on several machines: seconds for which one may be silent before the others end, 5 or
            more (docs/many-gpus.md).
        threads: of the CPU, that torch computes with; null: one where all models of the run are so small that several
            wait for each other longer than they compute (files of 4 MiB in all, or from scratch), else torch's own
            number, of OMP_NUM_THREADS or the cores. Results change by rounding.
        trust_remote_code: let a hub model run its own code. Off: such a model is refused.
        report_to: trackers that every training reports to as well, by transformers' own support: tensorboard, wandb,
            trackio, mlflow and others (see `lm.training.trackers`).
        data: preferences and reference completions.
        judge: who judges and labels, and how noisily.
        sft: training of pi_ref on the reference completions; null where the model is pi_ref as it is.
        reward_base: what reward models start from, likewise, and the oracle where `oracle_base` is null; null for
            pi_ref.
        oracle: training of the oracle reward model on the full training split; left out where none is trained.
        bias: the biased training set and the ensemble's subsets.
        reward: training of the reward models on the biased set and its subsets; left out where none is trained.
        policy: training of the policies, the same for every method.
        lora: low-rank adapters in place of full-parameter training; off by default.
        snapshots: evenly spaced steps, the last among them, whose policies validation chooses from.
        sweep: for a method, settings that validation chooses from, each a mapping of options that replace the method's
            own, such as {d-dpo: [{beta: 0.3}, {beta: 1.0}]}. A method that is not named has its own options only.
        train_together: "auto" trains the settings of a method's sweep as one model with several copies of each layer,
            where the model is small (up to a million parameters) and a trial shows that copies are what models alone
            are, and says where it is not so; "off" trains one after the other. Policies differ by rounding.
        probe: what is logged while a policy trains.
        logprobs: how log-probs and rewards are computed, in training and scoring alike.
        sampling: sampling from pi_ref (for the KL term) and from the policies (for evaluation).
        evaluation: evaluation on held-out prompts.
        options: hyper-parameters of the methods, by name; the defaults where a method is not named. As options they are
            the method's group: --dpo.beta, --hull_dpo.kl.alpha_end.
    """

    output_dir: str
    model: str
    sft: TrainingConfig
    policy: TrainingConfig
    oracle: TrainingConfig = field(default_factory=TrainingConfig)
    reward: TrainingConfig = field(default_factory=TrainingConfig)
    reward_base: str | None = None
    oracle_base: str | None = None
    methods: list[str] = field(default_factory=lambda: list(PAPERS))
    oracle_model: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    host_timeout: float = 300.0
    threads: int | None = None
    trust_remote_code: bool = False
    report_to: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    bias: BiasConfig = field(default_factory=BiasConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    snapshots: int = 1
    sweep: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    train_together: Literal["auto", "off"] = "auto"
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    logprobs: LogprobsConfig = field(default_factory=LogprobsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    options: dict[str, Method] = field(default_factory=dict)

    KNOWN: ClassVar[Mapping[str, type[Method]]] = METHODS
    """The methods that have options here."""

    def __post_init__(self) -> None:
        _check_options(self.KNOWN, self, self.options)
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"Config.methods must name one or more of {', '.join(METHODS)}; got {self.methods}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"Config.methods names a method twice: {self.methods}")
        check_seed(self.seed, "Config.seed")
        if self.threads is not None:
            _positive(self, "threads")
        if not self.output_dir or not self.model:
            raise ValueError("Config.output_dir and Config.model must not be empty")
        _check(self, "at least 5, and finite", host_timeout=(self.host_timeout, 5 <= self.host_timeout < inf))
        self._check_judge()
        self._check_on_policy()
        self._check_member()
        self._check_trainings()
        if self.sampling.engine == "vllm" and self.dtype == "float64":
            raise ValueError(
                'Config.dtype must be float32 or bfloat16 with sampling.engine "vllm", which has no float64; got '
                f"{self.dtype!r}"
            )
        _positive(self, "snapshots")
        if self.policy.max_steps is not None:
            few = self.snapshots <= self.policy.max_steps
            _check(self, "at most policy.max_steps", snapshots=(self.snapshots, few))
        for name, settings in self.sweep.items():
            if name not in METHODS or not settings:
                raise ValueError(
                    f"Config.sweep maps any of {', '.join(METHODS)} to one or more settings; got {name!r}: {settings!r}"
                )
            tried = self.settings(name)
            if any(one in tried[:i] for i, one in enumerate(tried)):
                raise ValueError(f"Config.sweep names a setting of {name} twice: {settings}")

    def _check_judge(self) -> None:
        """ValueError for an exact judge where none is known."""
        if self.judge.kind == "exact" and self.data.kind != "world":
            raise ValueError(
                'Config.judge.kind "exact" goes with data.kind "world", of which the annotators\' taste is known; got '
                f'data.kind "{self.data.kind}": give oracle_model, or leave judge.kind out to train an oracle'
            )
        if self.judge.kind == "exact" and self.oracle_model is not None:
            raise ValueError(
                f'Config.judge.kind "exact" and oracle_model {self.oracle_model!r} are two judges: leave one out'
            )

    def _check_member(self) -> None:
        """ValueError for a method that distils one member of an ensemble which is not trained, or does not have it."""
        for name in self.methods:
            for method in self.settings(name):
                share = method.distilled_member
                if share is None:
                    continue
                if self.data.rewards != "models":
                    raise ValueError(
                        f'Config.methods: {name} distils a member of the ensemble, which data.rewards "models" trains; '
                        f'got "{self.data.rewards}": leave the method out'
                    )
                if f"{share:g}" not in (known := [f"{b:g}" for b in self.bias.member_fractions]):
                    raise ValueError(
                        f"Config.{option_of(name)}.member must be one of bias.member_fractions ({', '.join(known)}), "
                        f"got {share:g}"
                    )

    def _check_on_policy(self) -> None:
        """ValueError for heads on states that are computed of the set's own pairs alone."""
        heads = [stage for stage in ("oracle", "reward") if getattr(self, stage).train == "head"]
        asked = {"oracle": self.trains_oracle, "reward": self.data.rewards == "models"}
        if self.data.on_policy.pairs is not None and (wrong := [stage for stage in heads if asked[stage]]):
            raise ValueError(
                f'Config.data.on_policy.pairs "{self.data.on_policy.pairs}" and {wrong[0]}.train "head" do not go '
                'together: hidden states are those of the set\'s own pairs; train "all" or "lora"'
            )

    @property
    def trains_oracle(self) -> bool:
        """Whether the judge is a reward model of the run's own, where anything asks for a judge."""
        return self.judge.kind == "model" and self.oracle_model is None

    def _check_trainings(self) -> None:
        """ValueError for a training without a length that something asks for."""
        needed = {"policy": "policies are trained"}
        if self.sft.train != "nothing":
            needed["sft"] = "pi_ref is trained; sft null says that the model is pi_ref as it is"
        elif self.sft.has_steps:
            raise ValueError(
                'Config.sft.train "nothing" takes no steps: epochs and max_steps must be null, got '
                f"{self.sft.epochs} and {self.sft.max_steps}"
            )
        elif self.model.startswith("scratch:"):
            raise ValueError(f"Config.sft must say how pi_ref is trained, as {self.model} is random; got null")
        elif self.lora.rank is not None and "sft" in self.lora.stages:
            raise ValueError("Config.lora.stages has sft, and sft is null: nothing is trained there; leave it out")
        if self.trains_oracle and self.data.labels == "oracle":
            needed["oracle"] = 'with data.labels "oracle" and no oracle_model the oracle is trained'
        distilling = [name for name in self.methods if self.method(name).needs]
        if self.data.rewards == "models" and distilling:
            needed["reward"] = f'with data.rewards "models" {", ".join(distilling)} distil trained reward models'
        own = [name for name in self.methods if any(method.own_oracle is not None for method in self.settings(name))]
        if own:
            needed["reward"] = f"{', '.join(own)} trains an oracle of its own as reward models are trained"
        for stage, why in needed.items():
            training: TrainingConfig = getattr(self, stage)
            if not (training.has_steps if stage == "reward" and own else training.is_given):
                raise ValueError(f"{TrainingConfig.ONE_LENGTH}; got None and None for {stage}: {why}")
        for stage in ("oracle", "reward"):
            self._check_train(stage, getattr(self, stage), stepped=stage == "reward" and bool(own))
        for stage, allowed in (("sft", ("nothing",)), ("policy", ())):
            getattr(self, stage).check_keeps_last(f"Config.{stage}")
            if (train := getattr(self, stage).train) not in (None, *allowed):
                raise ValueError(
                    f"Config.{stage}.train must be {' or '.join((*allowed, 'null'))}, got {train!r}; adapters of this "
                    "training are named in lora.stages"
                )

    def _check_train(self, stage: str, training: TrainingConfig, *, stepped: bool) -> None:
        """ValueError where what is to be trained and how do not go together."""
        adapters = self.lora.rank is not None and stage in self.lora.stages
        if training.train == "nothing":
            raise ValueError(f'Config.{stage}.train must be all, lora, head or null, got "nothing"')
        if training.train == "lora" and self.lora.rank is None:
            raise ValueError(f'Config.{stage}.train "lora" needs lora.rank; got null')
        if training.train in ("all", "head") and adapters:
            raise ValueError(f'Config.{stage}.train is "{training.train}", and lora.stages has {stage}: leave one out')
        if training.train == "head" and training.has_steps and not stepped:
            raise ValueError(
                f'Config.{stage}.train "head" solves for the head and takes no steps: epochs and max_steps must be '
                f"null, got {training.epochs} and {training.max_steps}"
            )
        if training.train == "head" and training.evaluations and not stepped:
            raise ValueError(
                f'Config.{stage}.train "head" solves for the head, and there is no step to keep: evaluations must be '
                f"null, got {training.evaluations}"
            )

    def adapts(self, stage: str) -> bool:
        """Whether adapters are trained in this stage, and not all parameters."""
        if stage in ("oracle", "reward") and getattr(self, stage).train is not None:
            return bool(getattr(self, stage).train == "lora")
        return self.lora.rank is not None and stage in self.lora.stages

    def method(self, name: str) -> Method:
        """The method of this name with its configured hyper-parameters."""
        return self.options[name] if name in self.options else METHODS[name]()

    def with_options(self, **methods: Method) -> Config:
        """The same with other hyper-parameters of these methods, named as their options are (d_dpo)."""
        names = {option_of(name): name for name in METHODS}
        return replace(self, options={**self.options, **{names[name]: method for name, method in methods.items()}})

    def as_dict(self) -> dict[str, Any]:
        """Every option as JSON values, methods' as groups of their own, as on the command line."""
        plain = asdict(self)
        del plain["options"]
        return plain | {option_of(name): asdict(self.method(name)) for name in METHODS}

    def settings(self, name: str) -> list[Method]:
        """The method of this name in every setting that validation chooses from."""
        base = self.method(name)
        return [_replaced(base, setting, f"Config.sweep: {name}") for setting in self.sweep.get(name, [{}])]


def _check_options(known: Mapping[str, type[Method]], owner: object, options: Mapping[str, Method]) -> None:
    for name, method in options.items():
        if name not in known or type(method) is not known[name]:
            raise ValueError(
                f"{type(owner).__name__}.options maps any of {', '.join(known)} to its hyper-parameters; got "
                f"{name!r}: {method!r}"
            )


def _replaced(base: Any, options: dict[str, Any], where: str) -> Any:
    """A copy of a dataclass with these fields replaced, the nested ones as well."""
    known = {f.name for f in fields(base)}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise ValueError(f"{where}: a mapping of any of {', '.join(sorted(known))} is needed, got {options!r}")
    values = {}
    for name, value in options.items():
        old = getattr(base, name)
        if is_dataclass(old):
            value = _replaced(old, value, f"{where}: {name}")
        elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(old) and old is not None:
            raise ValueError(f"{where}: {name} must be of type {type(old).__name__}, got {value!r}")
        values[name] = value
    return replace(base, **values)


@dataclass(frozen=True, kw_only=True)
class ExactConfig:
    """The exact world: a language whose every completion is listed, so that trained policies have known optima.

    Args:
        output_dir: where exact.json, exact.png and the resolved options go.
        sft: training of pi_ref on draws from a random distribution.
        policy: training of the policies. Its batch_size is read only where the pairs are all pairs of completions;
            elsewhere a mini-batch is all pairs, so that the KL term is exact and the gradient has no noise.
        seed: seed of everything that is drawn.
        tokens: vocabulary beside end-of-text, at least 2.
        max_length: longest completion, tokens; one of this length ends without end-of-text.
        prompts: number of prompts, at most `tokens`.
        reward_range: rewards are uniform between minus this and this.
        disagreement: members of the ensemble are the rewards plus uniform noise of this half-width.
        members: members of the ensemble, at least 2.
        compared: share of the completions that some pair mentions, where mass transfer is shown.
        reference_samples: draws from pi_ref for each prompt that the sampled KL is estimated from.
        kl_target: what the KL of a second p-DPO and dp-DPO is held at by their alpha, nats.
        options: hyper-parameters of the methods, as of `Config`.
    """

    output_dir: str
    sft: TrainingConfig
    policy: TrainingConfig
    options: dict[str, Method] = field(default_factory=dict)
    seed: int = 0
    tokens: int = 4
    max_length: int = 3
    prompts: int = 3
    reward_range: float = 2.0
    disagreement: float = 1.5
    members: int = 3
    compared: float = 0.5
    reference_samples: int = 200_000
    kl_target: float = 0.3

    KNOWN: ClassVar[Mapping[str, type[Method]]] = {name: METHODS[name] for name in PAPERS}
    """The methods that have options here: those that are trained."""

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("ExactConfig.output_dir must not be empty")
        check_seed(self.seed, "ExactConfig.seed")
        _positive(self, "max_length", "prompts", "reward_range", "disagreement", "reference_samples", "kl_target")
        _check(self, "at least 2", tokens=(self.tokens, self.tokens >= 2), members=(self.members, self.members >= 2))
        _check(self, "at most tokens", prompts=(self.prompts, self.prompts <= self.tokens))
        _share(self, "compared")
        if self.policy.max_steps is None or self.sft.max_steps is None:
            raise ValueError(
                "ExactConfig.sft and .policy need max_steps, got epochs: an exact world has no size to pass"
            )
        for stage in ("sft", "policy"):
            getattr(self, stage).check_keeps_last(f"ExactConfig.{stage}")
        _check_options(self.KNOWN, self, self.options)
        for name in self.KNOWN:
            self.method(name).check_stated(f"ExactConfig.{option_of(name)}")

    def method(self, name: str) -> Method:
        """As `Config.method`."""
        return self.options[name] if name in self.options else self.KNOWN[name]()
