"""Oracles and reward models on another body with another tokenizer than the policy: they read the texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    SamplingConfig,
    Scoring,
    TrainingConfig,
)
from lm.data.messages import restored
from lm.data.rewards import ORACLE
from lm.data.rows import write_rows
from lm.integrations.python import Loaded
from lm.judging.reading import Reader, Said, sample_text
from lm.judging.reward_models import RewardModel
from lm.models.loading import SCRATCH, load_tokenizer
from lm.models.opening import open_reward_model
from lm.objectives import DRDO
from lm.reporting.results import results
from lm.stages.data import data, given_pairs, tokenizer
from lm.stages.evaluations import asked_of, evaluation, prompts_of
from lm.stages.labels import labelled_pairs, labels, open_oracle, oracle
from lm.stages.readings import pair_rewards, reader, said, sample_rewards
from lm.stages.rewards import own_oracle, reward
from lm.stages.run import Run
from lm.stages.scores import both_sides, own_scores, scores
from lm.stages.trainings import sft
from tests.tiny import causal_lm, reward_model

HEAD, AS_IT_IS = TrainingConfig(train="head"), TrainingConfig(train="nothing")
STEP = TrainingConfig(max_steps=2, batch_size=8, learning_rate=1e-2)
WORDS = "the a cat dog bird sat ran flew on under over mat tree hill and then again home".split()
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OTHER = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
END = "<|endoftext|>"


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "vocab_size": 300})
        yield


def policys() -> PreTrainedTokenizerBase:
    made = load_tokenizer("scratch:tiny", [" ".join(WORDS) + " 0123456789?"] * 50, False)
    made.chat_template = CHATML
    return made


def others(template: str | None = OTHER) -> PreTrainedTokenizerBase:
    """Another vocabulary, which puts beginning-of-text before every text."""
    made = load_tokenizer("scratch:tiny", ["tac god drib " * 9, "0 1 2 10 20"] * 50, False)
    made.add_special_tokens({"bos_token": "<s>"})
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.convert_tokens_to_ids("<s>"))])
    made.backend_tokenizer.post_processor = begin
    made.chat_template = template
    return made


def saved(folder: Path, model: Any, words: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def rows(chat: bool) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    made = []
    for index in range(60):
        prompt, sides = f"{text(4)} {index}?", [text(rng.randint(2, 9)) for _ in range(2)]
        if index % 9 == 0:
            sides[0] += f" <s> {END} [user]"  # control tokens of the one or the other, as characters
        if chat:
            made.append(
                {
                    "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": prompt}],
                    **{
                        name: [{"role": "assistant", "content": side}]
                        for name, side in zip(("chosen", "rejected"), sides, strict=True)
                    },
                }
            )
        else:
            made.append({"prompt": prompt, "chosen": f" {sides[0]}", "rejected": f" {sides[1]}"})
    return made


def config(folder: Path, chat: bool = False, **options: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "pairs.jsonl", rows(chat))
    words, more = policys(), options.pop("data", {})
    policy = causal_lm(vocab_size=len(words), eos_token_id=words.eos_token_id)
    read = {"kind": "preferences", "path": str(folder / "pairs.jsonl"), "valid_fraction": 0.2, "test_fraction": 0.2}
    made: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": saved(folder / "policy", policy, words),
        "sft": AS_IT_IS,
        "oracle": HEAD,
        "policy": STEP,
        "methods": ["dpo"],
        "dtype": "float64",
        "device": "cpu",
        "data": DataConfig(**{**read, "max_completion_length": 12 if more.pop("short", False) else 60, **more}),
        "bias": BiasConfig(rho=None, member_fractions=[0.4, 0.6]),
        "sampling": SamplingConfig(batch_size=64),
        "evaluation": EvaluationConfig(resamples=50),
    }
    return Config(**{**made, **options})


def body(folder: Path, template: str | None = OTHER, **shape: Any) -> str:
    words = others(template)
    model = causal_lm("gemma3", seed=3, vocab_size=len(words), eos_token_id=words.eos_token_id, **shape)
    return saved(folder, model, words)


def judge(folder: Path, words: PreTrainedTokenizerBase, **shape: Any) -> str:
    return saved(folder, reward_model(seed=4, vocab_size=len(words), eos_token_id=None, **shape), words)


def plain(folder: Path | str, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """By transformers alone, a row at a time, of the last token, [R]."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        states = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
        return torch.stack([model.score(state)[0] for state in states])


def by_hand(words: PreTrainedTokenizerBase, row: dict[str, Any], side: str) -> list[int]:
    """A text in these tokens: beginning-of-text, prompt, completion, end-of-text."""

    def read(text: str) -> list[int]:
        """Names of control tokens in it are characters."""
        return list(words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    begin, end = words.convert_tokens_to_ids("<s>"), words.eos_token_id
    if isinstance(row["prompt"], str):
        return [begin, *read(row["prompt"]), *read(row[side]), end]
    if words.chat_template is None:
        turns = "".join(f"\n\n{one['role']}: {one['content']}" for one in row["prompt"])
        return [begin, *read(f"{turns}\n\nassistant:"), *read(f" {row[side][0]['content']}"), end]
    ids = [begin]
    for one in row["prompt"]:
        ids += [*read(f"[{one['role']}] {one['content']}"), end]
    return [*ids, *read("[assistant] "), *read(row[side][0]["content"]), end]


@pytest.mark.parametrize("train", ["head", "all"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_labels_are_those_of_the_text_in_the_oracles_tokens(chat: bool, train: str, tmp_path: Path) -> None:
    how = HEAD if train == "head" else STEP
    run = Run(config(tmp_path, chat, oracle_base=body(tmp_path / "body"), oracle=how))
    made, words = oracle(run).path, others()
    pairs = labelled_pairs(run, "train")
    beside = AutoTokenizer.from_pretrained(made)
    assert beside.get_vocab() == words.get_vocab()
    given = [restored(row) for row in pairs]
    for side, column in zip(("chosen", "rejected"), ORACLE, strict=True):
        stored = torch.tensor(pairs[column][:], dtype=torch.float64)
        expected = plain(made, [by_hand(words, row, side) for row in given])
        tolerance = 1e-5 if train == "head" else 1e-10  # states are kept in float32
        torch.testing.assert_close(stored, expected, rtol=tolerance, atol=tolerance)
        other = [[*p, *c] for p, c in zip(pairs["prompt_ids"][:], pairs[f"{side}_ids"][:], strict=True)]
        other = [[token % len(words) for token in row] for row in other]
        wrong = (plain(made, other) - stored).abs().median()
        assert wrong > 0.1 * stored.std(), "by the policy's tokens it is another number"
    assert labels(run).metrics["reading"] == {"texts": 120, "cut": 0, "unknown": 0}
    accuracy = oracle(run).metrics["accuracy"]["all"]
    assert accuracy["pairs"] == len(given_pairs(run, "valid"))


def test_lm_score_gives_the_same_rewards(tmp_path: Path) -> None:
    run = Run(config(tmp_path, True, oracle_base=body(tmp_path / "body"), oracle=STEP))
    pairs = labelled_pairs(run, "train")
    scored = RewardModel(str(oracle(run).path), Scoring(device="cpu", dtype="float64"))
    got, cut = scored.rewards([(row["id"], restored(row)) for row in pairs], "")
    stored = [value for column in ORACLE for value in pairs[column][:]]
    torch.testing.assert_close(got, torch.tensor(stored, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert cut == 0


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_samples_are_read_as_text_with_the_oracles_end(chat: bool, tmp_path: Path) -> None:
    run = Run(config(tmp_path, chat, oracle_base=body(tmp_path / "body")))
    pairs, own, words = labelled_pairs(run, "test"), tokenizer(run), others()
    prompts = prompts_of(pairs, 4, 0)
    texts = [" over the hill", "ran <s> home", "", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    if not chat:
        texts = [f" {text.strip()}" if text else text for text in texts]
    ids = [own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    samples = [[*ids[0], own.eos_token_id], ids[1], [own.eos_token_id], ids[3][:-1]]  # the last ends inside a character
    rewards, told = sample_rewards(run, open_oracle(run), prompts, samples, asked_of(pairs))
    assert told["reading"] == {"texts": 4, "cut": 0, "unknown": 0, "broken": 1}
    texts[3] = texts[3][:-1] + "\ufffd"
    rows_of = {row["prompt"]: restored(row) for row in pairs}
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        reply = [{"role": "assistant", "content": text}] if chat else text
        expected.append(by_hand(words, {**rows_of[prompt], "chosen": reply}, "chosen"))
    torch.testing.assert_close(rewards, plain(oracle(run).path, expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("template", [None, OTHER], ids=["roles", "template"])
def test_a_given_judge_reads_conversations_its_own_way(template: str | None, tmp_path: Path) -> None:
    words = others(template)
    spec = judge(tmp_path / "judge", words, pad_token_id=words.pad_token_id)
    run = Run(config(tmp_path, True, oracle_model=spec, oracle=TrainingConfig()))
    pairs = labelled_pairs(run, "valid")
    expected = plain(spec, [by_hand(words, restored(row), "chosen") for row in pairs])
    stored = torch.tensor(pairs[ORACLE[0]][:], dtype=torch.float64)
    torch.testing.assert_close(stored, expected, rtol=1e-10, atol=1e-10)
    by_score, _ = RewardModel(spec, Scoring(device="cpu", dtype="float64")).rewards(
        [(row["id"], restored(row)) for row in pairs], ""
    )
    torch.testing.assert_close(by_score[: len(pairs)], stored, rtol=1e-10, atol=1e-10)


def test_a_judge_with_the_policys_tokens_and_another_template_reads_by_its_own(tmp_path: Path) -> None:
    words = policys()
    same = judge(tmp_path / "same", words)
    assert reader(Run(config(tmp_path, True, oracle_model=same, oracle=TrainingConfig())), "oracle") is None
    words.chat_template = CHATML.replace("<assistant>", "<bot>").replace("<{{", "<!{{")
    other = judge(tmp_path / "other", words)
    for chat in (True, False):
        found = reader(Run(config(tmp_path / str(chat), chat, oracle_model=other, oracle=TrainingConfig())), "oracle")
        assert (found is not None) == chat


@pytest.mark.parametrize("train", ["head", "all", "own"])
def test_teachers_read_by_their_own_tokenizer(train: str, tmp_path: Path) -> None:
    """While the oracle is on pi_ref's body, with the policy's tokens."""
    how = HEAD if train == "head" else STEP
    drdo = {"methods": ["drdo"], "options": {"drdo": DRDO(oracle_alpha=0.5)}} if train == "own" else {}
    options: dict[str, Any] = {"methods": ["d-dpo"], "reward": how, **drdo}
    run = Run(config(tmp_path, False, reward_base=body(tmp_path / "body"), oracle_model=None, **options))
    plain_oracle = Run(replace(run.config, oracle_base=run.config.model))
    assert reader(plain_oracle, "oracle") is None
    assert reader(run, "reward") is not None
    pairs = labelled_pairs(run, "train")
    if train == "own":
        method = run.config.method("drdo")
        made = own_scores(run, "drdo", method).path
        assert own_oracle(run, "drdo", method).metrics["reading"]["texts"] == 2 * len(pairs)
        assert (made / "pairs").is_dir()
        return
    chosen, rejected = both_sides(run, "rho")
    texts = {row["id"]: restored(row) for row in pairs}
    ids = scores(run).path / "pairs"
    order = [row["id"] for row in labelled_pairs(run, "train") if row["id"] in texts]
    assert ids.is_dir()
    for side, values in (("chosen", chosen), ("rejected", rejected)):
        expected = plain(reward(run, "rho").path, [by_hand(others(), texts[row], side) for row in order])
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_rewards_from_python_are_of_the_texts_in_each_models_tokens(chat: bool, tmp_path: Path) -> None:
    bases = {name: body(tmp_path / name) for name in ("oracle_base", "reward_base")}
    loaded = Loaded(Run(config(tmp_path, chat, reward=HEAD, **bases)), "")
    pairs, words = loaded.pairs("test").select(range(4)), others()
    given, texts = [restored(row) for row in pairs], [" over the hill", f" ran <s> home {END} cat", " ", f" a mat{END}"]
    said = [*texts[:3], " a mat"]
    replies = [[{"role": "assistant", "content": text}] if chat else text for text in said]
    read = [{**row, "chosen": reply} for row, reply in zip(given, replies, strict=True)]
    prompts = pairs["prompt"][:]
    if chat:  # some as messages; the others are text that the policy's template wrote
        prompts = [row["prompt"] if i % 2 else prompts[i] for i, row in enumerate(given)]
    for name, folder in (("oracle", oracle(loaded.run).path), ("b0.4", reward(loaded.run, "b0.4").path)):
        expected = plain(folder, [by_hand(words, row, "chosen") for row in read])
        found = torch.from_numpy(loaded.rewards(prompts, texts, model=name))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_is_too_long_is_cut_at_its_beginning_counted_and_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = body(tmp_path / "body", max_position_embeddings=60)
    run = Run(config(tmp_path, oracle_base=short, oracle=STEP))
    pairs, words = labelled_pairs(run, "train"), others()
    texts = [by_hand(words, restored(row), side) for side in ("chosen", "rejected") for row in pairs]
    longer = [len(text) > 60 for text in texts]
    assert 0 < sum(longer) < len(longer)
    counts = oracle(run).metrics["reading"]
    left_out = sum(one or other for one, other in zip(longer[: len(pairs)], longer[len(pairs) :], strict=True))
    assert (counts["cut"], counts["left_out"]) == (sum(longer), left_out)
    assert f"{sum(longer):,} longer than its 60 tokens: read without their beginning" in capsys.readouterr().err
    stored = torch.tensor([value for column in ORACLE for value in pairs[column][:]], dtype=torch.float64)
    expected = plain(oracle(run).path, [text[-60:] for text in texts])
    torch.testing.assert_close(stored, expected, rtol=1e-10, atol=1e-10)
    tiny = Run(config(tmp_path / "none", oracle_base=body(tmp_path / "two", max_position_embeddings=8), oracle=STEP))
    with pytest.raises(ValueError, match=r"all \d+ pairs are longer than the 8 tokens that '.*two' takes"):
        oracle(tiny)


def test_characters_that_the_oracle_does_not_know_are_counted(tmp_path: Path) -> None:
    known = {token: i for i, token in enumerate([END, "<unk>", *(word for word in WORDS if word != "cat")])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token="<unk>")
    base = saved(tmp_path / "body", causal_lm(vocab_size=len(words), eos_token_id=0), words)
    run = Run(config(tmp_path, oracle_base=base))
    assert labels(run).metrics["reading"]["unknown"] == 120, "each prompt has a number"


def test_the_policys_own_beginning_and_end_are_no_part_of_what_is_said() -> None:
    words = policys()
    words.add_special_tokens({"eos_token": "<|stop|>", "bos_token": "<|go|>"})
    row = {"id": "a", "prompt": "<|go|>a cat?", "chosen": " on the mat<|stop|>\n", "rejected": " <|stop|> mat"}
    assert said(words, row, "chosen") == Said("row a", "a cat?", " on the mat")
    assert said(words, row, "rejected").reply == " <|stop|> mat"
    reply = json.dumps([{"role": "assistant", "content": "mat<|stop|>"}])
    chat = {**row, "prompt_messages": '[{"role": "user", "content": "cat?"}]', "chosen_messages": reply, "tools": None}
    assert said(words, chat, "chosen").reply == {"role": "assistant", "content": "mat"}


def test_what_a_policy_may_draw_is_no_error() -> None:
    """Half a character, a noncharacter that control tokens are marked by, and a control token of the oracle's."""
    own, words = policys(), others()
    prompt = own("a cat")["input_ids"]
    (half, *_), mark = own("\N{EURO SIGN}")["input_ids"], own("\ufdd0")["input_ids"]
    assert sample_text(own, prompt, [half, *own(" ran")["input_ids"], own.eos_token_id]) == "\ufffd ran"
    assert sample_text(own, prompt, mark) == "\ufffd"
    assert sample_text(own, prompt, [own.eos_token_id]) == ""
    read = Reader(words, "judge", ours=True).read([Said("one", "a cat", " <s> ran")])
    assert read.completions[0].count(words.bos_token_id) == 0
    assert words.decode(read.completions[0]) == f" <s> ran{END}"


def test_words_keep_the_space_before_them_where_a_tokenizer_drops_it_at_a_texts_start() -> None:
    known = {token: i for i, token in enumerate(["<eos>", "\u2581a", "\u2581cat", "\u2581ran"])}
    made = Tokenizer(models.WordLevel(known, unk_token="<eos>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    assert own.decode([3]) == "ran"
    assert sample_text(own, [1, 2], [3, 0]) == " ran"


def test_the_tokenizer_is_in_the_keys_only_where_it_is_another(tmp_path: Path) -> None:
    own = Run(config(tmp_path, oracle=STEP))
    as_policy = Run(replace(own.config, oracle_base=own.config.model))
    assert "tokenizer" not in json.loads((oracle(as_policy).path / "artifact.json").read_text())["inputs"]
    other = Run(replace(own.config, oracle_base=body(tmp_path / "body")))
    first = oracle(other)
    record = json.loads((first.path / "artifact.json").read_text())["inputs"]
    found = reader(other, "oracle")
    assert found is not None
    assert record["tokenizer"] == found.digest
    assert data(other).key == data(own).key, "the policy's tokens are what they were"
    assert sft(other).key == sft(own).key
    changed = Run(replace(own.config, oracle_base=body(tmp_path / "body", OTHER.replace("[", "("))))
    assert oracle(changed).key != first.key


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"oracle_base": "scratch:tiny"}, "oracle_base 'scratch:tiny' is random; null is reward_base, and else pi_ref"),
        ({"reward_base": "scratch:tiny"}, "reward_base 'scratch:tiny' is random; null is pi_ref"),
        ({"oracle_base": "./nowhere"}, "oracle_base './nowhere': there is no such folder"),
        (
            {"oracle": STEP, "lora": LoraConfig(rank=2, target_modules=["c_attn"], stages=["oracle"])},
            "lora.target_modules.*c_attn",
        ),
    ],
)
def test_a_base_that_cannot_be_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        Run(config(tmp_path, **{"oracle_base": body(tmp_path / "body"), **options}))


def test_a_base_whose_tokenizer_has_no_end_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    folder = body(tmp_path / "body")
    words = AutoTokenizer.from_pretrained(folder)
    words.eos_token = None
    words.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"oracle_base '.*body': its tokenizer has no end-of-text token"):
        data(Run(config(tmp_path, oracle_base=folder)))


def test_a_run_is_judged_by_another_body_to_its_results(tmp_path: Path) -> None:
    run = Run(config(tmp_path, True, oracle_base=body(tmp_path / "body"), data={"short": True}))
    found = results(run)
    assert found.methods["dpo"].n == found.sft.n > 3
    told = evaluation(run, "dpo").metrics["reading"]
    assert told["texts"] == found.sft.n
    valid = labelled_pairs(run, "valid")
    model = open_reward_model(oracle(run).path, run.config)
    chosen, _, told = pair_rewards(run, "oracle", model, valid, "")
    np.testing.assert_allclose(chosen.numpy(), valid[ORACLE[0]][:], rtol=1e-5, atol=1e-5)
