"""What pi_ref adds to a scored file: token ids, log-probs of both sides, and samples of each prompt with theirs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, cast

from transformers import AutoConfig

from lm.config import (
    DTYPES,
    Config,
    DataConfig,
    LogprobsConfig,
    ReferenceScoring,
    SamplingConfig,
    Scoring,
    TrainingConfig,
)
from lm.data.control_tokens import Names
from lm.data.prompts import ALONE, Layout
from lm.data.schemas import any_pair
from lm.data.scored import REF_PAIR, REF_SAMPLES, SAMPLE_IDS, TOKENS
from lm.data.templates import chat_renderer
from lm.data.tokens import EARLY, completion_ids, ends_early, prompt_ids
from lm.judging.reward_models import Placed, _kept
from lm.logprobs.completions import CompletionModel
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_rows
from lm.models import checks
from lm.models.loading import SCRATCH, check_model, load_policy, load_tokenizer
from lm.models.opening import device_of

Columns = dict[str, list[Any]]
"""Column -> a value for each row, None of all columns where LEFT_OUT says why."""
LEFT_OUT = "left_out"


def check_reference(options: ReferenceScoring) -> None:
    """ValueError, before anything is computed, for what cannot be pi_ref, or has no positions for its samples."""
    if options.model is None:
        return
    if options.model in SCRATCH:
        raise ValueError(f"--reference must be a hub name or a folder, got {options.model!r}")
    check_model(options.model, False)
    config = AutoConfig.from_pretrained(options.model)
    if other := [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]:
        raise ValueError(f"--reference {options.model!r}: a causal LM is needed, it is a {other[0]}")
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if options.samples and most is not None and options.sample_tokens + 2 > most:
        raise ValueError(
            f"--sample-tokens {options.sample_tokens} leaves no room for a prompt in the {most} positions of "
            f"--reference {options.model!r}"
        )


class Reference:
    """A causal LM as pi_ref, and its own tokenizer and way to write a conversation.

    Args:
        options: which model, and what is drawn of it.
        scoring: how it is run.
        layout: how the rows are read.

    Raises:
        ValueError: the model cannot be loaded, or is not causal.
    """

    def __init__(self, options: ReferenceScoring, scoring: Scoring, layout: Layout = ALONE) -> None:
        assert options.model is not None
        self.options, self.spec, self.layout = options, options.model, layout
        self.tokenizer = load_tokenizer(self.spec, (), False)
        self.config = _config(options, scoring)
        policy = load_policy(self.spec, self.tokenizer, self.config)
        self.model = CompletionModel(policy, options=self.config.logprobs).to(device_of(self.config)).eval()
        self.names = Names.by(self.tokenizer, "text")
        """What it found of control tokens in texts."""
        self.most = getattr(policy.config.get_text_config(), "max_position_embeddings", None)

    def columns(self, rows: Sequence[Placed], what: str, part: int) -> Columns:
        """The columns of these rows, and LEFT_OUT: a reason, or None, for each.

        Args:
            rows: comparisons.
            what: is scored, for the progress bar and errors.
            part: which part of a set they are: each has draws of its own. One prompt of a part has one set of samples.

        Raises:
            FloatingPointError: a log-prob is not finite.
        """
        read = self.names.reading(
            lambda row, at, marked: any_pair(row, at, marked, self.layout), chat_renderer(self.tokenizer, self.spec)
        )
        pairs = [_kept(read(row, where), where) for where, row in rows]
        prompts = prompt_ids(self.tokenizer, [pair["prompt"] for pair in pairs])
        sides = [completion_ids(self.tokenizer, [pair[side] for pair in pairs]) for side in ("chosen", "rejected")]
        embedded = checks.embedding_rows(self.model.model)
        for (where, _), *parts in zip(rows, prompts, *sides, strict=True):
            checks.ids_fit(where, self.tokenizer, embedded, [token for ids in parts for token in ids])
        reasons = [self._unfit(*parts) for parts in zip(prompts, *sides, strict=True)]
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        asked = [prompts[i] for i in kept]
        logps = score_rows(
            self.model, asked * 2, [side[i] for side in sides for i in kept], f"log-probs of {what}"
        ).tolist()
        found: Columns = {name: [None] * len(rows) for name in (*TOKENS, *REF_PAIR)}
        if self.options.samples:
            found |= {name: [None] * len(rows) for name in (SAMPLE_IDS, REF_SAMPLES)}
            samples = self._samples(asked, what, part)
        for at, row in enumerate(kept):
            values = (prompts[row], sides[0][row], sides[1][row], logps[at], logps[len(kept) + at])
            own: dict[str, Any] = dict(zip((*TOKENS, *REF_PAIR), values, strict=True))
            if self.options.samples:
                own |= zip((SAMPLE_IDS, REF_SAMPLES), samples[tuple(prompts[row])], strict=True)
            for name, value in own.items():
                found[name][row] = value
        return {**found, LEFT_OUT: reasons}

    def _unfit(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> str | None:
        """Why pi_ref cannot score a pair, or draw beside it; nothing is cut."""
        if any(ends_early(completion, self.tokenizer) for completion in (chosen, rejected)):
            return EARLY
        longest = max(len(chosen), len(rejected), self.options.sample_tokens if self.options.samples else 0)
        if not prompt or (self.most is not None and len(prompt) + longest > self.most):
            return f"longer than the {self.most} positions of the reference" if prompt else "empty prompt"
        return None

    def _samples(
        self, prompts: Sequence[list[int]], what: str, part: int
    ) -> dict[tuple[int, ...], tuple[list[list[int]], list[float]]]:
        """Prompt -> its samples and their log-probs."""
        each, different = self.options.samples, list(dict.fromkeys(map(tuple, prompts)))
        repeated = [list(prompt) for prompt in different for _ in range(each)]
        seed = (self.options.seed * 1_000_003 + zlib.crc32(f"reference/{part}".encode())) % 2**31
        drawn = sample_completions(
            self.model, repeated, self.tokenizer, self.config, seed=seed, what=f"samples of {what}"
        )
        logps = score_rows(self.model, repeated, drawn, f"log-probs of samples of {what}").tolist()
        parts = {prompt: slice(i * each, (i + 1) * each) for i, prompt in enumerate(different)}
        return {prompt: (drawn[at], logps[at]) for prompt, at in parts.items()}


def _config(options: ReferenceScoring, scoring: Scoring) -> Config:
    """A run's options, as far as loading, scoring and sampling read them."""
    dtype, longest = scoring.dtype, options.sample_tokens if options.samples else 1
    if dtype == "auto":
        saved = str(AutoConfig.from_pretrained(options.model).get_text_config().dtype).removeprefix("torch.")
        dtype = saved if saved in DTYPES else "float32"
    none = TrainingConfig(max_steps=1)
    return Config(
        output_dir="unused",
        model=cast(str, options.model),
        methods=["dpo"],
        dtype=cast(Any, dtype),
        device=cast(Any, scoring.device),
        data=DataConfig(max_prompt_length=1, max_completion_length=longest),  # rows are looked at one by one
        sft=none,
        oracle=none,
        reward=none,
        policy=none,
        sampling=SamplingConfig(reference_samples=max(options.samples, 1)),
        logprobs=LogprobsConfig(scoring_tokens=scoring.batch_tokens),
    )
