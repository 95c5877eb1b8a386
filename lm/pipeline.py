"""The stages of an experiment, each made when first asked for.

Data, pi_ref, oracle, labels, bias, reward models, scores, policies; `lm.evaluate` adds the evaluations. Every stage is
an artifact (see `lm.artifacts`) keyed by its own options and by the artifacts it was made from.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lm import confidence, data, ranks, trackers, world
from lm.artifacts import Artifact, Store
from lm.bias import LengthClass, biased_subset, largest_feasible, length_class, length_report
from lm.config import Config, TrainingConfig
from lm.io import link_or_copy, sha256_of, write_json
from lm.logprobs import CompletionModel
from lm.lora import add_adapter, is_adapted, merged, save_adapter
from lm.models import (
    SCRATCH,
    check_lora,
    check_model,
    check_reward_model,
    is_sharded,
    load_policy,
    load_reward_model,
    load_tokenizer,
    reward_tokenizer,
    same_tokenizer,
    state_of,
)
from lm.objectives import Method
from lm.score import open_policy, open_reward_model, sample_completions, score_pairs, score_rows
from lm.trainer import (
    CompletionArguments,
    DRDOOracleTrainer,
    PolicyTrainer,
    RewardTrainer,
    SFTTrainer,
    Snapshots,
    fit,
    pair_collator,
    sft_collator,
    training_arguments,
)

MAIN = "rho"
"""Name of the reward model that is trained on all of D_rho."""
DRDO = "drdo"


class Pipeline:
    """One run: a config and the store in its output folder.

    Args:
        config: every option.
        read_only: stages that have to be finished already (see `lm.artifacts.Store`).

    Raises:
        ValueError: a model or data path that cannot work, before anything is computed.
    """

    def __init__(self, config: Config, *, read_only: frozenset[str] = frozenset()) -> None:
        trackers.check(config.report_to)
        check_model(config.model, config.trust_remote_code)
        check_lora(config.model, config.lora, config.trust_remote_code)
        if config.oracle_model is not None:
            check_reward_model(config.oracle_model, config.trust_remote_code)
        self.config = config
        self._policies: dict[str, list[Artifact]] = {}
        self.store = Store(Path(config.output_dir), seed=config.seed, read_only=read_only)

    def seed(self, *what: str) -> int:
        """A seed of its own for everything that draws, from the run's seed and the drawer's name."""
        return (self.config.seed * 1_000_003 + zlib.crc32("/".join(what).encode())) % 2**31

    # ------------------------------------------------------------ data

    @cached_property
    def data(self) -> Artifact:
        """Tokenised preferences and reference completions, with the tokenizer."""
        config = self.config.data
        inputs = {
            "data": replace(config, rewards="models") if config.rewards == "oracle" else config,  # alike until then
            "content": [content_of(path) for path in (config.path, config.sft_path)],
            "model": content_of(self.config.model),
            "seed": self.config.seed,
        }

        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            source, own = None, None
            if config.kind == "world":
                source = folder / "source"
                source.mkdir()
                world.generate(config.world, self.config.seed, source)
            if self.config.model not in SCRATCH:
                own = load_tokenizer(self.config.model, (), self.config.trust_remote_code)
            render = data.chat_renderer(own, self.config.model)
            loaded = data.load(config, self.config.seed, scratch, world=source, render=render)
            texts = (
                row[column]
                for rows in (loaded.references, loaded.preferences)
                for row in rows
                if row["split"] == "train"
                for column in ("prompt", "completion", "chosen", "rejected")
                if column in row
            )
            tokenizer = own
            if tokenizer is None:
                tokenizer = load_tokenizer(self.config.model, texts, self.config.trust_remote_code)
            tokenizer.save_pretrained(folder / "tokenizer")
            report: dict[str, Any] = {}
            for name, rows in (("preferences", loaded.preferences), ("references", loaded.references)):
                dataset, too_long = data.tokenise(rows, tokenizer, config, scratch / f"{name}-ids.arrow")
                _save(dataset, folder / name)
                splits = Counter(dataset["split"])
                report[name] = {"kept": dict(splits), "dropped": {**loaded.dropped[name], **too_long}}
                if "confidence" in dataset.column_names:
                    report[name]["without_confidence"] = dataset["confidence"][:].count(None)
                if config.rewards == "given" and name == "preferences":
                    report["members"] = len(dataset[0][data.REWARDS[0]]) - 1
            report["vocabulary"] = len(tokenizer)
            return report

        artifact = self.store.get("data", config.kind, inputs, make, alone=True)
        self._checked_tokenizer(artifact)  # before anything reads the ids, and not when it is first decoded
        ensembles = [name for name in self.config.methods if "members" in self.config.method(name).needs]
        if config.rewards == "given" and artifact.metrics["members"] < 2 and ensembles:
            raise ValueError(
                f"methods {', '.join(ensembles)} need an ensemble, two or more entries in chosen_rewards and "
                f"rejected_rewards; {config.path} has one reward a completion, so leave these methods out"
            )
        if config.rewards == "oracle" and ensembles:
            raise ValueError(
                f"methods {', '.join(ensembles)} need an ensemble, but with data.rewards oracle there is one reward a "
                "completion, so leave these methods out"
            )
        return artifact

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the policy, and so of every model of the run."""
        return self._checked_tokenizer(self.data)

    def _checked_tokenizer(self, prepared: Artifact) -> PreTrainedTokenizerBase:
        """ValueError where a given oracle would read the token ids by another tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(prepared.path / "tokenizer")
        if self.config.oracle_model is not None:
            theirs = load_tokenizer(self.config.oracle_model, (), self.config.trust_remote_code)
            if not same_tokenizer(tokenizer, theirs):
                raise ValueError(
                    f"oracle_model {self.config.oracle_model!r}: its tokenizer differs from that of model "
                    f"{self.config.model!r}; rewards are read from the same token ids, so both need the same one"
                )
        return tokenizer

    def references(self) -> Dataset:
        """Reference completions of the training split."""
        return _split(self.data.path / "references", "train")

    def given_pairs(self, split: str) -> Dataset:
        """Preferences of a split with the labels that they came with."""
        return _split(self.data.path / "preferences", split)

    def labelled_pairs(self, split: str) -> Dataset:
        """Preferences of a split with the oracle's labels."""
        return _split(self.labels.path / "preferences", split)

    # ------------------------------------------------------------ training

    def _training(self, stage: str, training: TrainingConfig, **inputs: Any) -> dict[str, Any]:
        """What decides a trained model, beside its data: not what only saves memory, or says how far it is."""
        decides = replace(
            training,
            micro_batch_size=None,
            micro_batch_tokens=None,
            activation_checkpointing=False,
            logging_steps=1,
            save_steps=None,
        )
        keys = {"training": decides, "seed": self.seed(stage), "precision": self._precision}
        if self._has_adapters(stage):
            keys["lora"] = {name: value for name, value in asdict(self.config.lora).items() if name != "stages"}
        return {**keys, "base": content_of(self.config.model), **inputs}

    def _has_adapters(self, stage: str) -> bool:
        """Whether adapters are trained in this stage, and not all parameters."""
        return self.config.lora.rank is not None and stage in self.config.lora.stages

    def _adapted(self, stage: str, model: PreTrainedModel) -> PreTrainedModel:
        """What the stage trains: the model, with adapters where the stage has them."""
        if self._has_adapters(stage):
            # A path that is no hub name, and the same whatever the run's folder is called.
            base = self.config.model if stage == "sft" else f"./{self.sft.path.relative_to(self.store.root)}"
            add_adapter(model, self.config.lora, base=base)
        return model

    def _arguments(self, training: TrainingConfig, scratch: Path, seed: int, probes: int = 0) -> CompletionArguments:
        """One training in transformers' terms, which trackers call as its artifact is called."""
        name = scratch.parent.name
        return training_arguments(
            training,
            scratch,
            seed=seed,
            device=self.config.device,
            probes=probes,
            report_to=self.config.report_to,
            logs=self.store.root / "logs" / name,
        )

    @property
    def _precision(self) -> str:
        """One numeric path: log-probs and rewards of another precision are other artifacts."""
        return self.config.dtype + (" autocast" if self.config.logprobs.autocast else "")

    def _save_model(self, model: CompletionModel, folder: Path) -> None:
        """A model that transformers loads, its reward head beside it; of adapters, merged into its weights, a copy."""
        state = state_of(model)  # of all ranks, where it is sharded
        if not ranks.is_first():
            return
        own, plain = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}, model.model
        if is_adapted(plain):
            save_adapter(plain, own, folder / "adapter")
            plain = merged(plain, own)
            own = plain.state_dict()
        tokenizer = reward_tokenizer(plain, self.tokenizer) if model.is_reward_model else self.tokenizer
        plain.save_pretrained(folder, state_dict=own)
        tokenizer.save_pretrained(folder)
        if model.reward_head is not None:
            save_file({"weight": state["reward_head.weight"].contiguous()}, folder / "reward_head.safetensors")

    def _whole(
        self, model: CompletionModel, folder: Path, reopen: Callable[[Path], CompletionModel]
    ) -> CompletionModel:
        """A trained model, read again from where it was saved if it is sharded: ranks score at their own paces."""
        if not is_sharded(model):
            return model.eval()
        return reopen(ranks.from_first(lambda: folder))

    @cached_property
    def sft(self) -> Artifact:
        """pi_ref: the base model trained on the reference completions."""

        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            seed = self.seed("sft")
            torch.manual_seed(seed)
            base = load_policy(self.config.model, self.tokenizer, self.config)
            model = CompletionModel(self._adapted("sft", base), options=self.config.logprobs)
            arguments = self._arguments(self.config.sft, scratch, seed)
            collator = sft_collator()
            history = fit(SFTTrainer, model, self.references(), collator, arguments)
            self._save_model(model, folder)
            return {"parameters": sum(p.numel() for p in model.parameters()), "history": history}

        return self.store.get("sft", "policy", self._training("sft", self.config.sft, data=self.data), make)

    def _reward_model(
        self, stage: str, name: str, training: TrainingConfig, pairs: Callable[[], Dataset], inputs: dict[str, Any]
    ) -> Artifact:
        """A Bradley-Terry model on these pairs, which are read only where it is trained, started from pi_ref."""

        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            seed = self.seed(stage, name)
            torch.manual_seed(seed)
            base = load_reward_model(self.sft.path, self.config)
            model = CompletionModel(self._adapted(stage, base), options=self.config.logprobs)
            arguments = self._arguments(training, scratch, seed)
            history = fit(RewardTrainer, model, pairs(), pair_collator(), arguments)
            self._save_model(model, folder)
            held_out = self.given_pairs("valid") if stage == "oracle" else self.labelled_pairs("valid")
            scorer = self._whole(model, folder, lambda saved: open_reward_model(saved, self.config))
            chosen, rejected = score_pairs(scorer, held_out, f"{name} on validation pairs")
            return {"accuracy": self._accuracy(held_out, chosen > rejected), "history": history}

        return self.store.get(stage, name, inputs, make)

    def _accuracy(self, pairs: Dataset, right: torch.Tensor) -> dict[str, Any]:
        """Share of pairs ordered right, in all and by which completion is preferred."""
        classes = self._length_classes(pairs)
        result: dict[str, Any] = {}
        for name in ("all", "longer", "shorter", "neither"):
            rows = [name in ("all", c) for c in classes]
            count = sum(rows)
            share = float(right[torch.tensor(rows)].float().mean()) if count else None
            result[name] = {"accuracy": share, "pairs": count}
        return result

    def _length_classes(self, pairs: Dataset) -> list[LengthClass]:
        ratio, both = self.config.bias.length_ratio, (pairs["chosen_ids"][:], pairs["rejected_ids"][:])
        return [length_class(len(c), len(r), ratio) for c, r in zip(*both, strict=True)]

    # ------------------------------------------------------------ oracle and labels

    @cached_property
    def oracle(self) -> Artifact:
        """The oracle reward model, trained on the training split's own labels."""
        inputs = self._training("oracle", self.config.oracle, data=self.data, start=self.sft)
        return self._reward_model("oracle", "oracle", self.config.oracle, lambda: self.given_pairs("train"), inputs)

    def open_oracle(self) -> CompletionModel:
        """The given oracle, or the trained one, ready to score."""
        return open_reward_model(self.config.oracle_model or self.oracle.path, self.config)

    @property
    def oracle_input(self) -> Artifact | str | None:
        """What the oracle counts as in an artifact's key."""
        return content_of(self.config.oracle_model) if self.config.oracle_model is not None else self.oracle

    @cached_property
    def labels(self) -> Artifact:
        """Every pair of every split with the oracle's labels, or with the set's own (`data.labels`)."""
        name = self.config.data.labels

        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            pairs = _open(self.data.path / "preferences")
            metrics: dict[str, Any] = {}
            if name == "oracle":
                pairs, metrics = self._relabelled(pairs, scratch / f"relabelled-{ranks.index()}.arrow")
            _save(pairs, folder / "preferences")
            classes = Counter(self._length_classes(pairs))
            return {**metrics, "longer_preferred": classes["longer"] / max(classes["longer"] + classes["shorter"], 1)}

        inputs = {"data": self.data, "length_ratio": self.config.bias.length_ratio}
        if name == "oracle":
            inputs |= {"oracle": self.oracle_input, "precision": self._precision}
        return self.store.get("labels", name, inputs, make)

    def _relabelled(self, pairs: Dataset, path: Path) -> tuple[Dataset, dict[str, Any]]:
        """The pairs with the better one by the oracle as chosen, kept in the file `path`; ties are dropped and counted.

        ValueError where ties leave nothing of a split.
        """
        first, second = score_pairs(self.open_oracle(), pairs, "oracle rewards")
        count = Counter[str]()

        def rows() -> Iterator[dict[str, Any]]:
            for row, a, b in zip(pairs, first.tolist(), second.tolist(), strict=True):
                if a == b:
                    count["ties"] += 1
                    continue
                if b > a:
                    count["flipped"] += 1
                    for one in [name for name in row if name.startswith("chosen")]:
                        other = one.replace("chosen", "rejected")
                        row[one], row[other] = row[other], row[one]
                count[row["split"]] += 1
                yield {**row, "oracle_chosen_reward": max(a, b), "oracle_rejected_reward": min(a, b)}

        rewards = {f"oracle_{side}_reward": datasets.Value("float64") for side in ("chosen", "rejected")}
        relabelled = data.mapped(rows(), {**pairs.features, **rewards}, path)
        for split in ("train", "valid", "test"):
            if not count[split]:
                raise ValueError(
                    f"no pairs are left in the {split} split: the oracle rewards both completions alike in "
                    f"{count['ties']} of {len(pairs)} pairs; look at oracle_model, or set data.labels to given"
                )
        return relabelled, {"agreement": 1 - count["flipped"] / len(relabelled), "ties_dropped": count["ties"]}

    # ------------------------------------------------------------ bias, reward models

    @cached_property
    def bias(self) -> Artifact:
        """D_rho and each member's subset of it, as row ids. Without subsets where no reward models are trained."""
        config, rewards = self.config.bias, self.config.data.rewards

        def make(folder: Path, _: Path) -> dict[str, Any]:
            pairs = self.labelled_pairs("train")
            ids, classes = pairs["id"][:], self._length_classes(pairs)
            seed = self.seed("bias")
            rows, selection = confidence.subset(
                config.pairs,
                pairs["confidence"][:] if "confidence" in pairs.column_names else [None] * len(ids),
                pairs["chosen_ids"][:],
                pairs["rejected_ids"][:],
            )
            if config.rho is not None:
                candidates = [classes[i] for i in rows]
                drawn = biased_subset(candidates, config.rho, config.size, seed=seed, what="bias.size")
                rows = [rows[i] for i in drawn]
            inside = [classes[i] for i in rows]
            fractions = config.member_fractions if rewards == "models" else []
            size = config.member_size or min((largest_feasible(inside, share) for share in fractions), default=0)
            members = {
                f"b{share:g}": biased_subset(
                    inside, share, size, seed=self.seed("bias", f"{share:g}"), what="bias.member_size"
                )
                for share in fractions
            }
            subsets = {MAIN: rows, **{name: [rows[i] for i in member] for name, member in members.items()}}
            write_json(folder / "rows.json", {name: [ids[i] for i in subset] for name, subset in subsets.items()})
            chosen, rejected = ([len(row) for row in pairs[f"{side}_ids"][:]] for side in ("chosen", "rejected"))
            report = {name: length_report(classes, chosen, rejected, subset) for name, subset in subsets.items()}
            return {**report, **({"selection": selection} if selection else {})}

        inputs = {"labels": self.labels, "bias": config, "seed": self.seed("bias")}
        return self.store.get("bias", "rows", inputs | ({} if rewards == "models" else {"rewards": rewards}), make)

    def subset(self, name: str) -> Dataset:
        """The pairs of D_rho ("rho") or of a member's subset ("b0.2", ...), in the order of the labels."""
        ids = set(json.loads((self.bias.path / "rows.json").read_text())[name])
        subset = _where(_open(self.labels.path / "preferences"), "id", lambda row: row in ids)
        if len(subset) != len(ids):
            raise RuntimeError(f"subset {name}: {len(ids)} row ids, but {len(subset)} rows were found")
        return subset

    @property
    def members(self) -> list[str]:
        """Names of the ensemble's members, in the order of every length-K list."""
        if self.config.data.rewards == "given":
            return [f"given{k}" for k in range(self.data.metrics["members"])]
        if self.config.data.rewards == "oracle":
            return []
        return [f"b{share:g}" for share in self.config.bias.member_fractions]

    @property
    def distilled(self) -> list[str]:
        """Names of all reward models that some method may distil, for `reward_accuracy`."""
        own = DRDO in self.config.methods and self.config.drdo_oracle_alpha is not None
        return [MAIN, *self.members, *([DRDO] if own else [])]

    def reward(self, name: str) -> Artifact:
        """The reward model of D_rho ("rho"), or of a member's subset. ValueError where none are trained."""
        if (rewards := self.config.data.rewards) != "models":
            whose = "set" if rewards == "given" else "oracle"
            raise ValueError(f"data.rewards is {rewards}: the {whose}'s own rewards are distilled, no model is trained")
        inputs = self._training("reward", self.config.reward, bias=self.bias, subset=name, start=self.sft)
        return self._reward_model("reward", name, self.config.reward, lambda: self.subset(name), inputs)

    def reward_accuracy(self, name: str) -> dict[str, Any]:
        """How often a reward model, or the reward distilled in its place, orders validation pairs as labelled."""
        if name == DRDO:
            own: dict[str, Any] = self.drdo_oracle.metrics["accuracy"]
            return own
        if self.config.data.rewards == "models":
            accuracy: dict[str, Any] = self.reward(name).metrics["accuracy"]
            return accuracy
        pairs, names = self.labelled_pairs("valid"), [MAIN, *self.members]
        rewards = self._rewards(pairs, names)
        chosen, rejected = (torch.tensor(rewards[column])[:, names.index(name)] for column in data.REWARDS)
        return self._accuracy(pairs, chosen > rejected)

    def _rewards(self, pairs: Dataset, names: list[str]) -> dict[str, list[list[float]]]:
        """Rewards of the chosen and of the rejected completions, a list a pair."""
        if self.config.data.rewards == "given":
            return {column: pairs[column][:] for column in data.REWARDS}
        if self.config.data.rewards == "oracle":
            own = {side: pairs[f"oracle_{side}_reward"][:] for side in ("chosen", "rejected")}
            return {column: [[reward] for reward in own[column.removesuffix("_rewards")]] for column in data.REWARDS}
        scores = [
            score_pairs(open_reward_model(self.reward(n).path, self.config), pairs, f"rewards of {n}") for n in names
        ]
        return {
            column: torch.stack(side, 1).tolist()
            for column, side in zip(data.REWARDS, zip(*scores, strict=True), strict=True)
        }

    @cached_property
    def drdo_oracle(self) -> Artifact:
        """DRDO's own oracle on D_rho, [N] eq 5: pi_ref with a reward head, trained jointly."""
        alpha = self.config.drdo_oracle_alpha
        if alpha is None:
            raise ValueError("drdo_oracle_alpha is null: DRDO has no oracle of its own; 0.01 in [N]")

        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            seed = self.seed("reward", DRDO)
            torch.manual_seed(seed)
            policy = self._adapted("reward", load_policy(self.sft.path, self.tokenizer, self.config))
            model = CompletionModel(policy, reward_head=True, options=self.config.logprobs)
            arguments = self._arguments(self.config.reward, scratch, seed)
            history = fit(DRDOOracleTrainer, model, self.subset(MAIN), pair_collator(), arguments, alpha=alpha)
            self._save_model(model, folder)
            held_out = self.labelled_pairs("valid")
            scorer = self._whole(
                model, folder, lambda saved: open_policy(saved, self.tokenizer, self.config, reward_head=True)
            )
            chosen, rejected = score_pairs(scorer, held_out, "DRDO's oracle on validation pairs", rewards=True)
            return {"accuracy": self._accuracy(held_out, chosen > rejected), "history": history}

        inputs = self._training("reward", self.config.reward, bias=self.bias, alpha=alpha, start=self.sft)
        return self.store.get("reward", DRDO, inputs, make)

    # ------------------------------------------------------------ scores

    @cached_property
    def scores(self) -> Artifact:
        """The pairs of D_rho with every model's rewards, reference log-probs, and samples of pi_ref for each prompt."""
        names = [MAIN, *self.members]
        models = [self.reward(name) for name in names] if self.config.data.rewards == "models" else []

        def make(folder: Path, _: Path) -> dict[str, Any]:
            probe = _drawn(self.labelled_pairs("valid"), self.config.probe.pairs, self.seed("probe"))
            of_training = self.subset(MAIN)
            pairs = datasets.concatenate_datasets([of_training, probe])
            policy = open_policy(self.sft.path, self.tokenizer, self.config)
            ref_chosen, ref_rejected = score_pairs(policy, pairs, "reference log-probs")
            prompts = dict(zip(pairs["prompt"][:], pairs["prompt_ids"][:], strict=True))
            each = self.config.sampling.reference_samples
            repeated = [ids for ids in prompts.values() for _ in range(each)]
            samples = sample_completions(
                policy,
                repeated,
                self.tokenizer,
                self.config,
                seed=self.seed("score"),
                what="reference samples",
            )
            ref_samples = score_rows(policy, repeated, samples, "samples' log-probs").tolist()
            of_prompt = {prompt: slice(i * each, (i + 1) * each) for i, prompt in enumerate(prompts)}
            rows = [of_prompt[prompt] for prompt in pairs["prompt"][:]]
            scored = pairs.select_columns(["id", "prompt_ids", "chosen_ids", "rejected_ids"])
            scored = scored.flatten_indices(keep_in_memory=True)  # as add_column would, into a file, see _where
            for column, values in {
                "ref_chosen_logps": ref_chosen.tolist(),
                "ref_rejected_logps": ref_rejected.tolist(),
                "sample_ids": [samples[i] for i in rows],
                "ref_sample_logps": [ref_samples[i] for i in rows],
                **self._rewards(pairs, names),
            }.items():
                scored = scored.add_column(column, values)
            _save(scored.select(range(len(of_training))), folder / "pairs")
            if len(probe):
                _save(scored.select(range(len(of_training), len(scored))), folder / "probe")
            return {"reward_models": names, "pairs": len(of_training), "probe": len(probe), "prompts": len(prompts)}

        inputs = {
            "bias": self.bias,
            "policy": self.sft,
            "rewards": models,
            "sampling": self.config.sampling,
            "probe": self.config.probe.pairs,
            "seed": self.seed("score"),
        }
        return self.store.get("score", "pairs", inputs, make)

    def scored_pairs(self) -> Dataset:
        """Training pairs as `lm.trainer.pair_collator` reads them: reward margins instead of rewards.

        Raises ValueError where a score is missing, or not finite.
        """
        return margins(_open(self.scores.path / "pairs"), self.scores.metrics["reward_models"])

    def probe_pairs(self) -> Dataset | None:
        """The validation pairs that a policy is probed on while it trains, likewise; None where none are asked for."""
        if not self.config.probe.pairs:
            return None
        return margins(_open(self.scores.path / "probe"), self.scores.metrics["reward_models"])

    @cached_property
    def drdo_scores(self) -> Artifact:
        """The rewards of D_rho's pairs by DRDO's own oracle."""

        def make(folder: Path, _: Path) -> dict[str, Any]:
            pairs = self.subset(MAIN)
            model = open_policy(self.drdo_oracle.path, self.tokenizer, self.config, reward_head=True)
            chosen, rejected = score_pairs(model, pairs, "rewards of DRDO's oracle", rewards=True)
            scored = {"id": pairs["id"][:], "chosen_rewards": chosen.tolist(), "rejected_rewards": rejected.tolist()}
            _save(Dataset.from_dict(scored), folder / "pairs")
            return {"pairs": len(pairs)}

        return self.store.get("score", DRDO, {"oracle": self.drdo_oracle, "bias": self.bias}, make)

    def _pairs_for(self, name: str) -> Dataset:
        """The scored pairs, with the margins of DRDO's own oracle where the method is DRDO and has one."""
        pairs = self.scored_pairs()
        if name != DRDO or self.config.drdo_oracle_alpha is None:
            return pairs
        scored = _open(self.drdo_scores.path / "pairs")
        rewards = zip(scored["id"][:], scored["chosen_rewards"][:], scored["rejected_rewards"][:], strict=True)
        margin = {row: chosen - rejected for row, chosen, rejected in rewards}
        own = [margin[row] for row in pairs["id"][:]]
        return pairs.remove_columns("reward_margin").add_column("reward_margin", own)

    # ------------------------------------------------------------ policies

    def policies(self, name: str) -> list[Artifact]:
        """The named method's policy in each of its settings, see `lm.config.Config.settings`.

        Kept, as every stage is here: evaluation asks for them often, and opening one reads all of its weights.
        """
        if name not in self._policies:
            self._policies[name] = [self.policy(name, method) for method in self.config.settings(name)]
        return self._policies[name]

    def policy(self, name: str, method: Method | None = None) -> Artifact:
        """A policy trained by the named method on D_rho, in a setting other than the configured one where it is given.

        The folder is the last step's model; the snapshots before it are in `step-<n>` below.
        """
        method = self.config.method(name) if method is None else method
        training = self.config.policy

        def make(folder: Path, scratch: Path) -> dict[str, Any]:
            seed = self.seed("policy")  # the same for every method: they see the same batches
            torch.manual_seed(seed)
            model = self._adapted("policy", load_policy(self.sft.path, self.tokenizer, self.config))
            wrapped = CompletionModel(model, reward_head=method.needs_reward_head, options=self.config.logprobs)
            probe = self.probe_pairs()
            probes = self.config.probe.times if probe is not None else 0
            arguments = self._arguments(training, scratch, seed, probes)
            kept = scratch / "snapshots"  # they outlive a crash, as the checkpoints do

            def save(step: int) -> None:
                final, half = kept / f"step-{step}", kept / ".half"
                if ranks.is_first():
                    shutil.rmtree(half, ignore_errors=True)
                self._save_model(wrapped, half)
                if ranks.is_first():
                    shutil.rmtree(final, ignore_errors=True)
                    half.rename(final)

            history = fit(
                PolicyTrainer,
                wrapped,
                self._pairs_for(name),
                pair_collator(sample=method.needs_samples),
                arguments,
                method=method,
                eval_dataset=probe,
                callbacks=[Snapshots(self.config.snapshots, save)],
            )
            self._save_model(wrapped, folder)
            if ranks.is_first():
                for snapshot in sorted(kept.glob("step-*")):  # not moved: the artifact is not finished yet
                    shutil.copytree(snapshot, folder / snapshot.name, copy_function=link_or_copy)
            return {"history": history, "steps": history[-1]["step"]}

        inputs = self._training(
            "policy",
            training,
            scores=self.scores,
            method=method,
            start=self.sft,
            snapshots=self.config.snapshots,
            probes=self.config.probe.times,
        )
        if name == DRDO and self.config.drdo_oracle_alpha is not None:
            inputs["oracle"] = self.drdo_scores
        return self.store.get("policy", name, inputs, make)


def margins(pairs: Dataset, names: list[str]) -> Dataset:
    """Replaces the reward lists by reward_margin (of the first model) and member_margins (of the others, if any).

    Raises ValueError, with the row's id, for a missing column, or a reward or reference log-prob that is missing, not
    finite, or not one for each reward model.
    """
    needed = ["ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps", "chosen_rewards", "rejected_rewards"]
    absent = [name for name in needed if name not in pairs.column_names]
    if absent:
        raise ValueError(f"scored pairs lack {', '.join(absent)}; there are {', '.join(pairs.column_names)}")
    columns = {name: pairs[name][:] for name in needed}
    for name, values in columns.items():
        for row, value in zip(pairs["id"][:], values, strict=True):
            listed = value if isinstance(value, list) else [value]
            if any(v is None or not abs(v) < float("inf") for v in listed):
                raise ValueError(f"row {row}: {name} is {value}; every value must be there and finite")
            if name.endswith("_rewards") and len(listed) != len(names):
                raise ValueError(f"row {row}: {name} has {len(listed)} values, there are {len(names)} reward models")
    difference = [
        [c - r for c, r in zip(chosen, rejected, strict=True)]
        for chosen, rejected in zip(columns["chosen_rewards"], columns["rejected_rewards"], strict=True)
    ]
    pairs = pairs.remove_columns(list(data.REWARDS)).add_column("reward_margin", [row[0] for row in difference])
    return pairs.add_column("member_margins", [row[1:] for row in difference]) if len(names) > 1 else pairs


def _drawn(dataset: Dataset, size: int, seed: int) -> Dataset:
    """So many rows in their order, or all where they are fewer."""
    size = min(size, len(dataset))
    return dataset.select(sorted(np.random.default_rng(seed).choice(len(dataset), size, replace=False)))


def _save(dataset: Dataset, folder: Path) -> None:
    dataset.save_to_disk(str(folder))


def _open(folder: Path) -> Dataset:
    """Memory-mapped."""
    opened = datasets.load_from_disk(str(folder))
    assert isinstance(opened, Dataset)
    return opened


def _split(folder: Path, split: str) -> Dataset:
    return _where(_open(folder), "split", lambda name: name == split)


def _where(dataset: Dataset, column: str, holds: Callable[[Any], bool]) -> Dataset:
    """The rows of which it holds. Their numbers stay in memory: a file of them in the artifact's folder, as `datasets`
    would leave, has no checksum there, and would be believed."""
    return dataset.filter(holds, input_columns=column, keep_in_memory=True)


def content_of(path: str | Path | None) -> str | None:
    """What a path stands for in an artifact's key: a digest of local content, a name otherwise."""
    if path is None or str(path) in SCRATCH or not Path(path).exists():
        return None if path is None else str(path)
    return sha256_of(Path(path))
