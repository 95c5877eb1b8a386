"""One scored file for everyone: `lm.score` and `lm.export` write it, our trainer, TRL's, `lm.diagnose` and `lm.bias`
read it, and a method has one loss whoever trains it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lm import export
from lm import score as score_command
from lm.base.files import write_jsonl
from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ProbeConfig,
    ReferenceScoring,
    SamplingConfig,
    TrainingConfig,
)
from lm.data import rewards, scored
from lm.data.lengths import bias_file
from lm.data.rows import read_rows, write_rows
from lm.data.tokens import load
from lm.logprobs.completions import CompletionModel
from lm.models.loading import load_tokenizer
from lm.objectives import DRDO, METHODS, PAPERS, Method
from lm.stages.run import Run
from lm.stages.scores import scored_pairs
from lm.studies import diagnosis
from lm.training import metrics
from lm.training.batches import pair_collator
from lm.training.loop import training_arguments
from lm.training.policy import PolicyTrainer
from tests.tiny import ExactHead, causal_lm, close, reward_model, training

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).parents[1]
WORDS = ("red", "blue", "green", "long", "short", "dog", "cat", "tree", "runs", "sleeps")
EIGHT: dict[str, Method] = {
    name: METHODS[name]() if name != "drdo" else DRDO(reward_estimate="implicit", beta=0.7)
    for name in (*PAPERS, "hull-dpo")
}
"""The methods of the papers, and hull-DPO; of DRDO the estimate that TRL's model can carry."""
SAMPLES = 2


@dataclass(frozen=True)
class Made:
    """A set, and what both commands made of it."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    files: dict[str, Path]
    run: Run
    """Which reads the file of `lm.score`, and of which the other is exported."""


def rows(count: int = 24) -> list[dict[str, Any]]:
    rng = random.Random(0)
    text = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    return [{"prompt": f"{text(4)} {i}?", "chosen": f" {text(6)}.", "rejected": f" {text(6)}!"} for i in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("scored")
    write_jsonl(folder / "pairs.jsonl", rows())
    tokenizer = load_tokenizer(
        "scratch:tiny", [f"{row['prompt']}{row['chosen']}{row['rejected']}" for row in rows()], False
    )
    models = {"policy": causal_lm("gpt2", vocab_size=len(tokenizer))}
    models |= {name: reward_model("gpt2", seed=seed, vocab_size=len(tokenizer)) for seed, name in enumerate("AB")}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    files = {"score": folder / "scored.jsonl", "export": folder / "exported.parquet"}
    options = ["--data", str(folder / "pairs.jsonl"), "--reward-model", str(folder / "A"), str(folder / "B")]
    options += ["--reference", str(folder / "policy"), "--samples", str(SAMPLES), "--sample-tokens", "6"]
    assert score_command.main([*options, "--device", "cpu", "--out", str(files["score"])]) == 0
    nothing, once = TrainingConfig(train="nothing"), training()
    run = Run(
        Config(
            output_dir=str(folder / "run"),
            model=str(folder / "policy"),
            dtype="float64",
            device="cpu",
            sft=nothing,
            oracle=once,
            reward=once,
            policy=once,
            methods=list(EIGHT),
            data=DataConfig(
                kind="preferences",
                path=str(files["score"]),
                rewards="given",
                labels="given",
                valid_fraction=0.1,
                test_fraction=0.1,
                max_completion_length=30,
            ),
            bias=BiasConfig(rho=None),
            sampling=SamplingConfig(reference_samples=SAMPLES),
            evaluation=EvaluationConfig(resamples=10),
            probe=ProbeConfig(pairs=0),
        )
    )
    export.export(run, files["export"], samples=True)
    return Made(folder, tokenizer, files, run)


def read(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(file))]


# ---------------------------------------------------------------- what is written


def test_both_commands_write_one_schema_and_the_same_numbers(made: Made) -> None:
    of_score, of_export = (read(made.files[name]) for name in ("score", "export"))
    every = {*scored.TEXTS, *scored.MEMBERS, *scored.REFERENCE} - {scored.SAMPLE_WEIGHTS}
    assert every == set(of_score[0]) - {f"{side}_{model}" for side in rewards.ONE for model in "AB"}
    assert every | {*rewards.ONE, rewards.MARGIN, "id", "split"} == set(of_export[0])
    assert len(of_score) == 24
    assert 12 < len(of_export) < 24, "the run's training pairs"
    by_text = {(row["prompt"], row["chosen"]): row for row in of_score}
    for row in of_export:
        other = by_text[row["prompt"], row["chosen"]]
        for name in (*scored.TOKENS, *scored.MEMBERS):
            assert row[name] == other[name], name
        for name in scored.REF_PAIR:
            assert row[name] == pytest.approx(other[name], rel=1e-12)
        for each in (row, other):
            assert len(each[scored.SAMPLE_IDS]) == len(each[scored.REF_SAMPLES]) == SAMPLES
            assert all(each[scored.SAMPLE_IDS])
            assert max(each[scored.REF_SAMPLES]) < 0


def test_the_log_probs_are_those_of_the_ids_under_the_reference(made: Made) -> None:
    """By transformers' own forward, a row a text."""
    model = AutoModelForCausalLM.from_pretrained(made.folder / "policy", dtype=torch.float64)
    end = made.tokenizer.eos_token_id

    def logp(prompt: list[int], completion: list[int]) -> float:
        with torch.no_grad():
            logps = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        return float(sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(completion)))

    drawn = set()
    for row in read(made.files["score"])[:6]:
        prompt, *sides = (row[name] for name in scored.TOKENS)
        for name, text, ids in zip(scored.REF_PAIR, scored.TEXTS[1:], sides, strict=True):
            assert made.tokenizer.decode(ids) == row[text] + made.tokenizer.eos_token
            assert row[name] == pytest.approx(logp(prompt, ids), rel=1e-10)
        for ids, value in zip(row[scored.SAMPLE_IDS], row[scored.REF_SAMPLES], strict=True):
            assert value == pytest.approx(logp(prompt, ids), rel=1e-10)
            assert len(ids) <= 6
            assert end not in ids[:-1]
            drawn.add(tuple(ids))
    assert len(drawn) > 6, "draws, not one completion"


def test_the_type_of_file_changes_nothing_and_a_seed_draws_anew(made: Made, tmp_path: Path) -> None:
    options = ["--data", str(made.files["score"]), "--reference", str(made.folder / "policy"), "--device", "cpu"]
    options += ["--samples", str(SAMPLES), "--sample-tokens", "6"]
    outs = {name: tmp_path / name for name in ("same.parquet", "other.jsonl.gz")}
    assert score_command.main([*options, "--out", str(outs["same.parquet"])]) == 0
    assert read(outs["same.parquet"]) == read(made.files["score"]), "also the rewards, which no model gave anew"
    assert score_command.main([*options, "--seed", "1", "--out", str(outs["other.jsonl.gz"])]) == 0
    for row, other in zip(read(outs["same.parquet"]), read(outs["other.jsonl.gz"]), strict=True):
        changed = {name for name in row if row[name] != other[name]}
        assert changed == {scored.SAMPLE_IDS, scored.REF_SAMPLES}


def test_without_options_a_file_has_no_ids_and_no_samples(made: Made, tmp_path: Path) -> None:
    for ids in (False, True):
        export.export(made.run, out := tmp_path / f"{ids}.jsonl", ids=ids)
        columns = set(read(out)[0])
        assert columns & {*scored.REFERENCE} == {*scored.REF_PAIR, *(scored.TOKENS if ids else ())}
    options = ["--data", str(made.folder / "pairs.jsonl"), "--device", "cpu", "--out", str(tmp_path / "scored.jsonl")]
    assert score_command.main([*options, "--reward-model", str(made.folder / "A")]) == 0
    assert not set(scored.REFERENCE) & set(read(tmp_path / "scored.jsonl")[0])


def test_a_pair_that_the_reference_has_no_positions_for_is_left_out_and_counted(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = causal_lm("gpt2", vocab_size=len(made.tokenizer), n_positions=40)
    short.save_pretrained(tmp_path / "short")
    made.tokenizer.save_pretrained(tmp_path / "short")
    given = [*rows(3), {"prompt": "Why?", "chosen": " red" * 60, "rejected": " no"}]
    write_jsonl(tmp_path / "pairs.jsonl", given)
    options = ["--data", str(tmp_path / "pairs.jsonl"), "--reference", str(tmp_path / "short"), "--device", "cpu"]
    assert score_command.main([*options, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == [row["prompt"] for row in given[:3]]
    said = capsys.readouterr().out
    assert "left out: 1 rows, longer than the 40 positions of the reference" in said
    assert "line 4" in said
    assert f"pi_ref: {tmp_path / 'short'}" in said
    assert score_command.main([*options, "--samples", "1", "--out", str(tmp_path / "more.jsonl")]) == 2
    assert "--sample-tokens 128 leaves no room for a prompt in the 40 positions of" in capsys.readouterr().err
    write_jsonl(tmp_path / "long.jsonl", given[3:])
    options[1] = str(tmp_path / "long.jsonl")
    assert score_command.main([*options, "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "no row is left, left out were {'longer than the 40" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "2", "--reward-model", "A"], "--samples 2 are drawn by pi_ref: name it by --reference"),
        (["--reference", "P", "--samples", "-1"], "--samples must be at least 0, got -1"),
        (["--reference", "P", "--samples", "1", "--sample-tokens", "0"], "--sample-tokens must be at least 1, got 0"),
        (["--reference", "P", "--samples", "1", "--seed", "-1"], "--seed must be >= 0, got -1"),
        (["--reference", "P", "--seed", "1"], "--seed goes with --samples"),
        (["--reference", "P", "--sample-tokens", "5"], "--sample-tokens goes with --samples"),
        (["--reference", "scratch:tiny"], "--reference must be a hub name or a folder, got 'scratch:tiny'"),
        ([], "name one or more models by --reward-model, or a judge by --judge-model, or pi_ref by --reference"),
        (["--reference", "A"], "a causal"),
    ],
)
def test_what_the_reference_cannot_do_is_refused(
    options: list[str], message: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"A": str(made.folder / "A"), "P": str(made.folder / "policy")}
    given = [named.get(option, option) for option in options]
    data = ["--data", str(made.folder / "pairs.jsonl"), "--device", "cpu", "--out", str(tmp_path / "out.jsonl")]
    try:
        status = score_command.main([*data, *given])
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_broken_scoring_goes_on_and_parts_of_another_reference_are_not_taken(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm.judging import reference, scored_sets

    monkeypatch.setattr(scored_sets, "SHARD", 10)
    asked: list[int] = []
    columns = reference.Reference.columns

    def counted(self: Any, given: Any, what: str, part: int) -> Any:
        asked.append(part)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return columns(self, given, what, part)

    monkeypatch.setattr(reference.Reference, "columns", counted)

    def scored_by(**options: Any) -> None:
        scored_sets.score_set(
            str(made.folder / "pairs.jsonl"),
            tmp_path / "out.jsonl",
            [],
            score_command.Scoring(device="cpu"),
            reference=ReferenceScoring(model=str(made.folder / "policy"), **options),
        )

    with pytest.raises(KeyboardInterrupt):
        scored_by()
    scored_by()
    assert asked == [0, 1, 1, 2], "the first part was there"
    assert len(read(tmp_path / "out.jsonl")) == 24
    (tmp_path / "out.jsonl").unlink()
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        scored_by()
    scored_by(samples=1, sample_tokens=4)
    assert asked == [0, 1, 0, 1, 2], "that had no samples"


# ---------------------------------------------------------------- who reads it


def test_a_run_reads_rewards_and_says_that_it_has_a_reference_of_its_own(made: Made, tmp_path: Path) -> None:
    found = load(made.run.config.data, 0, tmp_path)
    notes = [note for note in found.notes["preferences"] if "reference model" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"not read: columns {', '.join(n for n in scored.REFERENCE if n != 'sample_weights')}")
    assert {len(row[scored.MEMBERS[0]]) for row in found.preferences} == {2}


def test_a_biased_subset_keeps_every_column_and_nothing_in_it_looks_like_a_label(made: Made, tmp_path: Path) -> None:
    weighted = [{**row, scored.SAMPLE_WEIGHTS: [0.25, 0.75]} for row in read(made.files["score"])]
    write_rows(tmp_path / "weighted.jsonl", weighted)
    report = bias_file(str(tmp_path / "weighted.jsonl"), tmp_path / "out.parquet", BiasConfig(rho=0.5), seed=0)
    assert not report.get("notes"), report
    kept = read(tmp_path / "out.parquet")
    assert 0 < len(kept) < len(weighted)
    assert all(row in weighted for row in kept)
    found = diagnosis.read(str(tmp_path / "weighted.jsonl"))
    assert found.notes == []
    assert list(found.margins) == [scored.MEMBERS]


OF_FIRST_EDITION = {
    rewards.ONE[0]: "score_chosen",
    rewards.ONE[1]: "score_rejected",
    rewards.MEMBERS[0]: "chosen_rewards",
    rewards.MEMBERS[1]: "rejected_rewards",
    rewards.MARGIN: "margin",
}


def test_a_file_of_the_first_edition_is_read_as_the_same_with_a_remark(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert {old: new for new, old in OF_FIRST_EDITION.items()} == scored.OLDER
    today = [{**row, "split": "train"} for row in read(made.files["export"])]
    write_rows(tmp_path / "today.jsonl", today)
    old = [{OF_FIRST_EDITION.get(name, name): value for name, value in row.items()} for row in today]
    write_rows(tmp_path / "old.jsonl", old)
    config = DataConfig(kind="preferences", path=str(tmp_path / "old.jsonl"), labels="given", rewards="given")
    loaded = {
        name: load(replace(config, path=str(tmp_path / f"{name}.jsonl")), 0, tmp_path) for name in ("old", "today")
    }
    for name in (*rewards.ONE, *rewards.MEMBERS):
        assert loaded["old"].preferences[name][:] == loaded["today"].preferences[name][:]
    said = [note for note in loaded["old"].notes["preferences"] if "older names" in note]
    assert len(said) == 1
    assert all(f"{old} is read as {new}" in said[0] for new, old in OF_FIRST_EDITION.items())
    assert not any("older names" in note for note in loaded["today"].notes["preferences"])
    assert any("older names" in note for note in diagnosis.read(str(tmp_path / "old.jsonl")).notes)
    trl = pytest.importorskip("lm.integrations.trl")
    for name in ("d-dpo", "e-dpo"):
        caplog.clear()
        one, other = (trl.with_margins(Dataset.from_list(each), METHODS[name](), "train") for each in (old, today))
        assert [record.getMessage()[:24] for record in caplog.records] == ["train: older names of co"]
        assert one.column_names == other.column_names
        assert one[:] == other[:]


def test_the_page_names_every_column() -> None:
    page = (ROOT / "docs" / "scored-files.md").read_text(encoding="utf-8")
    missing = [name for name in (*scored.COLUMNS, *scored.OLDER) if f"`{name}`" not in page]
    assert missing == []
    for other in ("trl.md", "reward-models.md"):
        assert "scored-files.md" in (ROOT / "docs" / other).read_text(encoding="utf-8"), other


# ---------------------------------------------------------------- file -> TRL's trainer


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CI", "1")  # else TRL reports a trainer's construction to its makers
    return pytest.importorskip("lm.integrations.trl")


@pytest.fixture
def exact(trl: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactHead)
    return trl


def moved(made: Made) -> PreTrainedModel:
    """A policy that is not pi_ref any more, so that no term of a loss is 0."""
    model = AutoModelForCausalLM.from_pretrained(made.folder / "policy", dtype=torch.float64)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def as_users_load(file: Path, folder: Path) -> Dataset:
    kind = "parquet" if file.suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=str(file), split="train", cache_dir=str(folder / "cache"))


def trl_options(folder: Path, **options: Any) -> Any:
    from trl import DPOConfig

    same = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    size = {"per_device_train_batch_size": 64, "max_steps": 1, "logging_steps": 1, "activation_checkpointing": False}
    return DPOConfig(str(folder), **{**same, **size, "lr_scheduler_type": "constant", **options})


def in_trl(trl: Any, made: Made, method: Method, data: Dataset, folder: Path, **options: Any) -> Any:
    return trl.RewardDistillationTrainer(
        moved(made),
        method=method,
        train_dataset=data,
        args=trl_options(folder, beta=metrics.scale_of(method), precompute_ref_log_probs=True, **options),
        processing_class=made.tokenizer,
    )


def ours(made: Made, method: Method, data: Dataset, folder: Path, **options: Any) -> PolicyTrainer:
    return PolicyTrainer(
        model=CompletionModel(moved(made)),
        args=training_arguments(training(batch_size=64, **options), folder, seed=0, device="cpu"),
        train_dataset=data,
        data_collator=pair_collator(sample=method.needs_samples),
        method=method,
    )


def pairs_of(made: Made, command: str, name: str) -> Dataset:
    """The same pairs as our trainer has them: of `lm.export` the run's own artifact; of `lm.score`, which knows no run,
    the file, with the margins that `data.rewards given` has."""
    if command == "export":
        return scored_pairs(made.run, EIGHT[name], name)
    reader, found = rewards.Reader(), []
    for number, (where, row) in enumerate(read_rows(str(made.files["score"]))):
        one, members = rewards.margins(reader(row, where))
        kept = {column: row[column] for column in scored.REFERENCE if column in row}
        found.append({"id": str(number), **kept, rewards.MARGIN: one, rewards.MEMBER_MARGINS: members})
    return Dataset.from_list(found)


CASES = [(command, name) for command in ("score", "export") for name in EIGHT]
ALWAYS = {("score", "e-dpo"), ("export", "dp-dpo")}


@pytest.mark.parametrize(
    ("command", "name"),
    [pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.thorough]) for case in CASES],
)
def test_of_a_file_trls_trainer_has_our_trainers_loss(
    command: str, name: str, made: Made, tmp_path: Path, exact: Any
) -> None:
    method, data = EIGHT[name], as_users_load(made.files[command], tmp_path)
    theirs = in_trl(exact, made, method, data, tmp_path / "trl")
    mine = ours(made, method, pairs_of(made, command, name), tmp_path / "ours")
    for trainer in (mine, theirs):
        trainer.state.max_steps, trainer.state.global_step = 5, 2
    batch = pair_collator(sample=method.needs_samples)(list(mine.train_dataset))
    expected = mine.losses(mine.model, batch)[0].mean()
    loss = theirs.compute_loss(theirs.model, exact.collate(list(theirs.train_dataset)))
    assert loss.dtype == torch.float64
    close(loss, expected, what=f"{command}, {name}")
    assert expected.detach().abs() > 1e-3
    if method.needs_samples:  # control: other samples are another loss
        assert theirs.train_dataset[scored.SAMPLE_IDS][:] == data[scored.SAMPLE_IDS][:]
        other = data.map(lambda row: {scored.REF_SAMPLES: [value - 1 for value in row[scored.REF_SAMPLES]]})
        turned = in_trl(exact, made, method, other, tmp_path / "other")
        turned.state.max_steps, turned.state.global_step = 5, 2
        changed = turned.compute_loss(turned.model, exact.collate(list(turned.train_dataset)))
        assert (changed - expected).abs() > 1e-6


def test_e_dpo_under_trl_logs_its_members_and_alpha(made: Made, tmp_path: Path, exact: Any) -> None:
    method, data = EIGHT["e-dpo"], as_users_load(made.files["score"], tmp_path)
    trainer = in_trl(exact, made, method, data, tmp_path / "trl", max_steps=2, learning_rate=1e-3)
    trainer.train()
    mine = ours(made, method, pairs_of(made, "score", "e-dpo"), tmp_path / "ours", max_steps=2, learning_rate=1e-3)
    mine.train()
    lines = [[line for line in one.state.log_history if "loss" in line] for one in (trainer, mine)]
    assert [len(each) for each in lines] == [2, 2]
    assert method.pessimism is not None
    assert [line["alpha"] for line in lines[0]] == pytest.approx(
        [method.pessimism.alpha_start, method.pessimism.alpha_end]
    )
    for theirs, own in zip(*lines, strict=True):
        assert sorted(theirs[f"member_weight_{k}"] for k in range(2)) == [0, 1]
        shared = own.keys() - {"step", "epoch", "loss", "grad_norm", "learning_rate"}
        assert shared - theirs.keys() == set()
        assert {name: theirs[name] for name in shared} == pytest.approx({name: own[name] for name in shared}, rel=1e-4)


@pytest.mark.usefixtures("trl")
def test_by_trls_names_our_trainer_logs_what_trls_own_does(made: Made, tmp_path: Path) -> None:
    """TRL's stock DPOTrainer, with its own loss: all values that need no logits, to TRL's float32."""
    from trl import DPOTrainer

    data = as_users_load(made.files["score"], tmp_path)
    stock = DPOTrainer(
        moved(made),
        ref_model=AutoModelForCausalLM.from_pretrained(made.folder / "policy", dtype=torch.float64),
        args=trl_options(tmp_path / "stock", beta=0.3),
        train_dataset=data.select_columns(list(scored.TEXTS)),
        processing_class=made.tokenizer,
    )
    stock.train()
    method = METHODS["dpo"](beta=0.3)
    mine = ours(made, method, pairs_of(made, "score", "dpo"), tmp_path / "ours", micro_batch_size=5)
    mine.train()
    one, other = (next(line for line in each.state.log_history if "loss" in line) for each in (stock, mine))
    names = {name for name in one if name.startswith(("rewards/", "logps/"))}
    assert names == {"logps/chosen", "logps/rejected"} | {
        f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")
    }
    assert names == {name for name in other if name.startswith(("rewards/", "logps/"))}
    for name in names:
        assert other[name] == pytest.approx(one[name], rel=1e-5), name
    assert 0 < one["rewards/accuracies"] < 1
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.usefixtures("trl")
def test_trls_own_trainer_takes_the_file_as_it_is(made: Made, tmp_path: Path) -> None:
    from trl import DPOTrainer

    for command in ("score", "export"):
        trainer = DPOTrainer(
            moved(made),
            ref_model=moved(made),
            args=trl_options(tmp_path / command, beta=0.3),
            train_dataset=as_users_load(made.files[command], tmp_path),
            processing_class=made.tokenizer,
        )
        trainer.train()
        assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == pytest.approx(
            [0.6931], rel=1e-3
        )
