"""Our methods in TRL: a `DPOTrainer` whose loss is a `lm.objectives.Method` on a scored preference set.

TRL loads the models, tokenises, computes log-probs (in float32: its fused head knows nothing finer) and keeps the
reference; ours are the loss, its mean over the *global* mini-batch, and e-DPO's choice of a member there. An option
that this would have to ignore is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from lm.data import rewards, scored, votes
from lm.data.messages import is_missing
from lm.data.prompts import refuse_others
from lm.data.scored import REF_PAIR, REF_SAMPLES, SAMPLE_IDS, SAMPLE_WEIGHTS, SAMPLED, TOKENS
from lm.data.sets import survey
from lm.data.tokens import completion_ids, prompt_ids
from lm.logprobs.kernels import widest
from lm.objectives import METHODS, Method, PairBatch
from lm.training import metrics

try:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import pad
except ImportError as error:
    raise ImportError("lm.integrations.trl needs TRL: pip install 'reward-distillation[trl]'") from error

log = logging.getLogger(__name__)

HONOURED = frozenset(
    {
        "activation_offloading",
        "beta",
        "dataset_num_proc",
        "disable_dropout",
        "learning_rate",
        "max_length",
        "model_init_kwargs",
        "pad_to_multiple_of",
        "pad_token",
        "precompute_ref_batch_size",
        "precompute_ref_log_probs",
        "router_aux_loss_coef",
        "trust_remote_code",
    }
)
"""Fields of `DPOConfig` that mean here what they mean in TRL. Every other field that it adds to transformers'
arguments has to keep its default: the method says what the loss is."""

SCORES = scored.NUMBERS
"""Columns that reach the loss, [N], the members' [N, K], those of samples [N, S]; in float64 until the log-probs' type
is known."""


class RewardDistillationTrainer(DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` with one of our methods for its loss.

    Args:
        model: as in TRL.
        method: a name of `lm.objectives.METHODS`, whose beta (IPO: tau) is then `args.beta`, or a
            `Method` with that same beta. A method that needs samples of pi_ref wants `sample_ids`; without them,
            give the method `kl=Pessimism(samples="preferences")`.
        train_dataset: a scored file (`lm.data.scored`), as `python -m lm.score` writes it of any set and `python -m
            lm.export` of a run's pairs: text or messages, or the token ids prompt_ids, chosen_ids, rejected_ids with
            end-of-text, which are taken where they are there. The rewards that the method needs are as
            `lm.data.rewards` has them; without a one reward, it is the members' mean, as with `data.rewards given`.
            Samples of pi_ref are in sample_ids (S completions a row; token ids only). Soft labels and weights are in
            chosen_probability and weight (`lm.data.votes`). With `args.precompute_ref_log_probs`, the columns
            ref_chosen_logps, ref_rejected_logps (and ref_sample_logps) are taken where they are there.
        args: TRL's options. Nothing is cut: a pair longer than `max_length` is an error.
        eval_dataset: likewise; not with an ensemble, whose member is chosen on a training mini-batch.
        options: `ref_model`, `processing_class`, `callbacks`, `optimizers`, `quantization_config`, `peft_config`.

    Raises:
        ValueError, TypeError: an option that could not be honoured, a column that is missing or not finite.
        FloatingPointError: in training, a loss that is not finite.
    """

    loss_is_scaled_for_ga = True
    _name = "Reward distillation"
    _tag_names = ["trl", "reward-distillation"]  # noqa: RUF012  (TRL's own attributes)
    _paper = {  # noqa: RUF012
        "title": "Robust Preference Optimization through Reward Model Distillation",
        "id": "2405.19316",
        "citation": "Adam Fisch et al. Robust Preference Optimization through Reward Model Distillation. 2024.",
    }

    def __init__(
        self,
        model: Any,
        *,
        method: Method | str,
        train_dataset: Dataset,
        args: DPOConfig | None = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        args = DPOConfig() if args is None else args
        self.method = resolve(method, args.beta)
        refuse_ignored(args)
        for name in ("data_collator", "compute_metrics"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name} cannot be honoured: the batches and the loss are the method's; leave it out")
        if eval_dataset is not None:
            self._refuse_evaluation_of_ensembles()
        self._has_reference = options.get("ref_model") is not None
        self._gram: Tensor | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=partial(collate, pad_to_multiple_of=args.pad_to_multiple_of),
            **options,
        )
        if self._is_vlm:
            raise TypeError("processing_class must be a tokenizer, got a processor; pairs with images have no rewards")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef {self.router_aux_loss_coef} of a mixture-of-experts model would be ignored; "
                "set DPOConfig(router_aux_loss_coef=0.0)"
            )

    # ------------------------------------------------------------ data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Tokenised by TRL unless it is already; every score and length checked."""
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"{dataset_name}: scores can be checked of a datasets.Dataset only, got {type(dataset).__name__}"
            )
        dataset = with_margins(dataset, self.method, dataset_name)
        self._check_references(dataset, args, dataset_name)
        if not self.method.needs_samples:
            dataset = dataset.remove_columns([column for column in SAMPLED if column in dataset.column_names])
        if not set(TOKENS) <= set(dataset.column_names):
            check_prompts(dataset, dataset_name)
            uncut = copy.copy(args)  # with a limit, TRL drops pairs without a word
            uncut.max_length = None
            tokenised = super()._prepare_dataset(dataset, processing_class, uncut, dataset_name)
            if set(REF_PAIR) <= set(dataset.column_names):
                check_tokens(dataset, tokenised, self._tokenizer, dataset_name)
            dataset = tokenised
        check_lengths(dataset, args.max_length, dataset_name)
        return dataset

    def _check_references(self, dataset: Dataset, args: DPOConfig, name: str) -> None:
        wanted = [*REF_PAIR]
        if self.method.needs_samples:
            wanted.append(REF_SAMPLES)
            missing = [column for column in (*TOKENS, SAMPLE_IDS) if column not in dataset.column_names]
            if missing:
                kind, option = type(self.method).__name__, self.method.pessimism_option
                without = f'; or let the pairs be the samples, with {kind}({option}=Pessimism(samples="preferences"))'
                raise ValueError(
                    f"{name}: {kind} with samples of the reference needs {', '.join(missing)}; `python -m lm.score "
                    "--reference MODEL --samples 1` writes them of any set, `python -m lm.export --samples` of a "
                    f"run's pairs{without if option else ''}"
                )
        given = [column for column in wanted if column in dataset.column_names]
        if given and not args.precompute_ref_log_probs:
            raise ValueError(
                f"{name} has {', '.join(given)}, which precompute_ref_log_probs=False would ignore; set it to True, "
                "or remove them"
            )
        if given and self._has_reference:
            raise ValueError(f"{name} has {', '.join(given)}, so ref_model would be ignored; leave one of them out")
        if given and given != wanted:
            raise ValueError(f"{name} has {', '.join(given)} of {', '.join(wanted)}; all of them are needed, or none")
        if args.precompute_ref_log_probs and self.method.needs_samples and not given:
            raise ValueError(
                f"{name}: TRL precomputes log-probs of pairs, not of samples; give {', '.join(wanted)}, or set "
                "precompute_ref_log_probs=False"
            )

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The columns that are there, else TRL's."""
        if set(REF_PAIR) <= set(dataset.column_names):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        """What `remove_unused_columns` keeps."""
        self._signature_columns = [*TOKENS, SAMPLE_IDS, *SCORES]

    # ------------------------------------------------------------ the loss

    def _prepare_input(self, data: Any) -> Any:
        """On the device; scores, float64, as wide as it has them."""
        if isinstance(data, Tensor) and data.dtype == torch.float64:
            data = data.to(widest(self.args.device))
        return super()._prepare_input(data)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one step. For an ensemble, a pass without gradient comes first where there are several:
        the member, or the mixture, is chosen on the global mini-batch and not on a part of it."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._gram = None
        if "members" in self.method.needs and batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            self._gram = self._global_gram(batches, count)
        return batches, count

    def _global_gram(self, batches: list[Any], count: Any) -> Tensor:
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        grams = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                pairs = self._pairs(model, self._prepare_inputs(batch))
                weights = weights_in(batch)
                gram = self.method.gram(pairs, weights.to(pairs.logratio_margin))
                grams.append(gram * weights.sum())
        model.train(was_training)
        mean: Tensor = self.accelerator.reduce(torch.stack(grams).sum(0), "sum") / count
        return mean

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Pairs in the global mini-batch, or the sum of their weights."""
        units = (
            pairs_in(batch) if votes.WEIGHT not in batch else float(weights_in(batch).sum()) for batch in batch_samples
        )
        pairs = torch.tensor(sum(units), device=device)
        total: Tensor = self.accelerator.reduce(pairs, "sum")
        return total

    def _pairs(self, model: Any, inputs: dict[str, Any]) -> PairBatch:
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
        output = model(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
        )
        # Prompt-learning adapters put virtual tokens before the real ones.
        logps = output.log_probs[:, -labels.shape[1] + 1 :].sum(1)
        scores = {name: inputs[name].to(logps.dtype) for name in SCORES if name in inputs}
        count = pairs_in(inputs)
        chosen, rejected, samples = logps[:count], logps[count : 2 * count], logps[2 * count :].view(count, -1)
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = (scores[name] for name in REF_PAIR)
            ref_samples = scores.get(REF_SAMPLES)
        else:
            ref_logps = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, rows)).to(logps.dtype)
            ref_chosen, ref_rejected = ref_logps[:count], ref_logps[count : 2 * count]
            ref_samples = ref_logps[2 * count :].view(count, -1)
        lengths = rows["completion_mask"].sum(1).to(logps.dtype)
        members = scores.get(rewards.MEMBER_MARGINS)
        return PairBatch(
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_lengths=lengths[:count],
            rejected_lengths=lengths[count : 2 * count],
            reward_margin=scores.get(rewards.MARGIN),
            member_margins=None if members is None else members.T,
            sample_logratios=(
                (scores[SAMPLE_WEIGHTS] * (samples - ref_samples)).sum(1) if self.method.needs_samples else None
            ),
            gram=self._gram,
            progress=self.state.global_step / max(self.state.max_steps - 1, 1),
            chosen_probability=scores.get(votes.PROBABILITY),
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """In training this micro-batch's share of the global mini-batch's mean loss, in evaluation its own mean."""
        if return_outputs:
            raise ValueError("return_outputs cannot be honoured: TRL's fused head makes no logits")
        pairs = self._pairs(model, inputs)
        weights = weights_in(inputs).to(pairs.logratio_margin)
        if self.method.weighs_members and pairs.gram is None:
            pairs = dataclasses.replace(pairs, gram=self.method.gram(pairs, weights))
        loss = self.method.expected(pairs)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(f"a loss at step {self.state.global_step} is not finite: {loss.tolist()}")
        self._record(pairs, inputs)
        loss = loss * weights
        if num_items_in_batch is None:
            share: Tensor = loss.sum() / weights.sum()
            return share
        # DDP and FSDP average gradients over ranks; the mean over pairs has to be a sum over ranks.
        share = loss.sum() * (self.accelerator.num_processes / num_items_in_batch)
        return share

    def _record(self, pairs: PairBatch, inputs: dict[str, Any]) -> None:
        """What our own trainer logs, by our names and by TRL's; and alpha, where the method has a KL term."""
        kept = self._metrics["train" if self.model.training else "eval"]
        for name, value in metrics.of_pairs(self.method, pairs).items():
            kept[name].append(self.accelerator.gather(value.detach().contiguous()).mean().item())
        if self.method.pessimism is not None:
            kept["alpha"].append(self.method.pessimism.alpha(pairs.progress))
        if self.model.training:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        kept["num_tokens"] = [self._total_train_tokens]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, not with an ensemble."""
        self._refuse_evaluation_of_ensembles()
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def _refuse_evaluation_of_ensembles(self) -> None:
        if "members" in self.method.needs:
            raise ValueError(
                f"{type(self.method).__name__} chooses on a training mini-batch, so its loss on eval_dataset would "
                "depend on the evaluation's batch size; leave it out and compare policies by their rewards"
            )


# ---------------------------------------------------------------- options


def resolve(method: Method | str, beta: float) -> Method:
    """The method of this name with beta (IPO: tau) from TRL's option, or the method that was given.

    Raises ValueError for an unknown name, for one that needs a reward head, trains an oracle of its own or holds the KL
    at a target, and where the two scales differ.
    """
    by_name = isinstance(method, str)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, or a Method, got {method!r}")
        method = METHODS[method]()
    if not isinstance(method, Method):
        raise TypeError(f"method must be a name or an lm.objectives.Method, got {type(method).__name__}: {method!r}")
    if method.needs_reward_head:
        raise ValueError(
            f"{method} needs a reward head, which TRL's model does not have; train it with `python -m lm.policy`"
            + (f", or give {type(method).__name__}({method.without_reward_head})" if method.without_reward_head else "")
        )
    if method.own_oracle is not None:
        raise ValueError(
            f"{method} distils an oracle of its own, which is not trained here; train it with `python -m lm.policy`, "
            "or leave the oracle out to distil the rewards of the set"
        )
    if method.pessimism is not None and method.pessimism.target is not None:
        raise ValueError(
            f"{type(method).__name__}.{method.pessimism_option}.target is held by `python -m lm.policy` alone; here "
            "alpha has a schedule: give alpha_start and alpha_end"
        )
    options = dataclasses.asdict(method)
    scale = method.scale_option
    if scale not in options:
        return method
    if by_name:
        return dataclasses.replace(method, **{scale: beta})
    if options[scale] != beta:
        raise ValueError(
            f"{type(method).__name__}.{scale} is {options[scale]}, but DPOConfig.beta is {beta}; give both the same "
            "value, or name the method"
        )
    return method


def refuse_ignored(args: DPOConfig) -> None:
    """ValueError where an option is set that has no meaning with our losses."""
    transformers_own = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(DPOConfig):
        if field.name in transformers_own or field.name in HONOURED:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(args, field.name) != default:
            raise ValueError(
                f"DPOConfig.{field.name} is {getattr(args, field.name)!r}, which this trainer would ignore: the loss "
                f"is the method's; leave it at {default!r}"
            )
    for name, kept, why in (
        ("label_smoothing_factor", 0, "it is for next-token losses"),
        ("average_tokens_across_devices", True, "pairs are averaged over all ranks"),
    ):
        if getattr(args, name) != kept:
            raise ValueError(
                f"DPOConfig.{name} is {getattr(args, name)!r}, which would be ignored: {why}; leave it at {kept!r}"
            )


# ---------------------------------------------------------------- data


def with_margins(dataset: Dataset, method: Method, name: str) -> Dataset:
    """The dataset with the reward margins that the method reads, and no other reward columns; the other scores checked.

    Args:
        dataset: rewards as `lm.data.rewards.Reader` takes them, under today's names or older ones.
        method: whose `needs` say which.
        name: of the dataset, for messages.

    Raises:
        ValueError: a column is missing, a value, with its row, is missing or not finite, or two columns contradict
            each other.
    """
    there = [column for column in rewards.EVERY if column in dataset.column_names]
    for remark in scored.older_names(there) if method.needs else ():
        log.warning("%s: %s", name, remark)
    made: dict[str, list[Any]] = {}
    if method.needs:
        needs = f"{type(method).__name__} needs {' and '.join(sorted(method.needs))}"
        read = rewards.Reader(needs)
        rows = enumerate(dataset.select_columns(there)) if there else ()
        margins = [rewards.margins(read(row, f"{name}, row {i}")) for i, row in rows]
        if not there or ("members" in method.needs and any(len(members) < 2 for _, members in margins)):
            sources: tuple[rewards.Source, ...] = (rewards.MEMBERS, (rewards.MEMBER_MARGINS,))
            if "members" not in method.needs:
                sources = (rewards.ONE, (rewards.MARGIN,), *sources)
            raise ValueError(
                f"{name}: {needs}, in {rewards.either(sources)}; there are {', '.join(dataset.column_names)}. `python "
                "-m lm.score` writes them of any set, `python -m lm.export` of a run's pairs"
            )
        if "rewards" in method.needs:
            made[rewards.MARGIN] = [margin for margin, _ in margins]
        if "members" in method.needs:
            made[rewards.MEMBER_MARGINS] = [members for _, members in margins]
    dataset = dataset.remove_columns(there)
    for column, values in made.items():
        dataset = dataset.add_column(column, values)
    for column in SCORES:
        if column in dataset.column_names and column not in made:
            found = numbers(dataset, column, name)
            wrong = {votes.PROBABILITY: (found < 0) | (found > 1), votes.WEIGHT: found <= 0}.get(column)
            if wrong is not None and wrong.any():
                what = "between 0 and 1" if column == votes.PROBABILITY else "above 0"
                row = int(wrong.argmax())
                raise ValueError(f"{name}, row {row}: {column} must be {what}, got {found[row]:g}")
    return dataset


def numbers(dataset: Dataset, column: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column as [N] or [N, K]; ValueError, with the row, where a value is not finite or rows differ in K."""
    values = list(dataset[column])
    for row, value in enumerate(values):
        listed = value if isinstance(value, list) else [value]
        if not listed or len(listed) != len(values[0] if isinstance(values[0], list) else [0]):
            raise ValueError(f"{name}, row {row}: {column} has {len(listed)} values, row 0 has {values[0]!r}")
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) < float("inf") for v in listed):
            raise ValueError(f"{name}, row {row}: {column} must be finite numbers, got {value!r}")
    return np.asarray(values, dtype=np.float64)


def check_prompts(dataset: Dataset, name: str) -> None:
    """ValueError where TRL would read the prompts otherwise than they are meant: invent one while another column may
    hold it, in rows that lack it, or put one before sides that begin with it."""
    rows = [(f"{name}, row {i}", row) for i, row in enumerate(dataset)]
    of_set = survey(rows, name, kind="preferences")
    if of_set.layout.repeated:
        raise ValueError(f"{name}: {of_set.notes[0].partition(', which')[0]}; take it off, or leave 'prompt' out")
    for where, row in rows:
        if is_missing(row.get("prompt")):
            if of_set.layout.prompted:
                raise ValueError(f"{where}: 'prompt' is empty, and other rows have one")
            refuse_others(row, where, of_set.layout, "any" if isinstance(row.get("chosen"), str) else "slip")


def check_tokens(texts: Dataset, tokenised: Dataset, tokenizer: Any, name: str) -> None:
    """ValueError where log-probs of pi_ref stand beside text that TRL reads as other tokens than `lm.export` and
    `lm.score` do: it is not known whose they are. What TRL makes of messages is taken for what they are of, and said.
    """
    columns = [list(texts[column]) if column in texts.column_names else [] for column in scored.TEXTS]
    if not all(columns) or not all(isinstance(value, str) for column in columns for value in column):
        log.warning(
            "%s: %s are taken to be of the tokens that TRL makes of the rows; %s would say",
            name,
            ", ".join(REF_PAIR),
            ", ".join(TOKENS),
        )
        return
    apart = prompt_ids(tokenizer, columns[0]), *(completion_ids(tokenizer, column) for column in columns[1:])
    joined = (tokenised[column][:] for column in TOKENS)
    for row, (own, trls) in enumerate(zip(zip(*apart, strict=True), zip(*joined, strict=True), strict=True)):
        if list(own) != list(trls):
            raise ValueError(
                f"{name}, row {row}: {', '.join(REF_PAIR)} are of tokens that the row does not name, and TRL, which "
                "tokenises prompt and completion as one text, makes others of it than we do; write the file with "
                f"{', '.join(TOKENS)} (`python -m lm.export --ids`), or remove the log-probs"
            )


def check_lengths(dataset: Dataset, max_length: int | None, name: str) -> None:
    """ValueError where a prompt or completion is empty, a row has another number of samples, or a pair would be cut."""
    longest = 0
    samples = list(dataset[SAMPLE_IDS]) if SAMPLE_IDS in dataset.column_names else [[]] * len(dataset)
    for row, (prompt, chosen, rejected, sampled) in enumerate(
        zip(*(dataset[column] for column in TOKENS), samples, strict=True)
    ):
        if sampled is None or not all([prompt, chosen, rejected, *sampled]):
            raise ValueError(f"{name}, row {row}: prompt and completions need at least one token each")
        if len(sampled) != len(samples[0]) or not all(isinstance(completion, list) for completion in sampled):
            raise ValueError(f"{name}, row {row}: sample_ids must be {len(samples[0])} lists of tokens, as in row 0")
        longest = max(longest, len(prompt) + max(map(len, [chosen, rejected, *sampled])))
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"{name}: the longest prompt with a completion has {longest} tokens, which max_length={max_length} would "
            "cut, and its reward is that of the whole; filter the set, or raise max_length"
        )


def collate(rows: list[dict[str, Any]], pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
    """Rows padded on the right (masked and read by nothing): all chosen, all rejected, then each pair's samples.

    Returns:
        input_ids, attention_mask, completion_mask [(2 + S) N, T], and those of SCORES that the rows have, float64;
        sample_weights are 1 / S where the rows have none.
    """
    pairs = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    pairs += [(row["prompt_ids"], completion) for row in rows for completion in row.get(SAMPLE_IDS, [])]
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in pairs]
    masks = [torch.tensor([0] * len(prompt) + [1] * len(completion)) for prompt, completion in pairs]
    batch = {
        name: pad(values, padding_value=value, padding_side="right", pad_to_multiple_of=pad_to_multiple_of)
        for name, values, value in (
            ("input_ids", ids, 0),
            ("attention_mask", [torch.ones_like(row) for row in ids], 0),
            ("completion_mask", masks, 0),
        )
    }
    batch |= {n: torch.tensor([row[n] for row in rows], dtype=torch.float64) for n in SCORES if n in rows[0]}
    count = len(rows[0].get(SAMPLE_IDS, []))
    if count and SAMPLE_WEIGHTS not in batch:
        batch[SAMPLE_WEIGHTS] = torch.full((len(rows), count), 1 / count, dtype=torch.float64)
    return batch


def weights_in(batch: dict[str, Any]) -> Tensor:
    """What each pair of a batch weighs, [N]; 1 where the rows have no weights."""
    given = batch.get(votes.WEIGHT)
    return torch.ones(pairs_in(batch), dtype=torch.float64) if given is None else given


def pairs_in(batch: dict[str, Any]) -> int:
    """N of a batch of (2 + S) N rows."""
    samples = batch[SAMPLE_WEIGHTS].shape[1] if SAMPLE_WEIGHTS in batch else 0
    return int(batch["input_ids"].shape[0] // (2 + samples))
