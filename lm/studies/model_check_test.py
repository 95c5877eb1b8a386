"""What `python -m lm.check` says of models that are whole, and of those that are broken in one way each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertLMHeadModel, PreTrainedTokenizerBase

from lm.check import main
from lm.models import noise
from lm.models.checks import Check
from lm.studies import model_check
from lm.studies.architectures import build, of_type
from tests import tiny
from tests.tiny import causal_lm, reward_model

CHECK = {"name", "ok", "value", "limit", "advice"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer()


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A whole model."""
    place = tmp_path / "model"
    causal_lm(vocab_size=len(tokenizer)).float().save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def checked(folder: Path | str, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and what the JSON has."""
    file = Path("found.json")
    file.write_text("of an earlier check")
    status = main([str(folder), "--json", str(file), "--force", "--device", "cpu", *options])
    report = json.loads(file.read_text())
    assert all(check.keys() == CHECK and type(check["ok"]) is bool for check in report["checks"])
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    return status, report


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def failing(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["advice"] for check in report["checks"] if not check["ok"]}


# ---------------------------------------------------------------- whole models


@pytest.mark.slow
def test_a_whole_model_holds_in_every_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = checked(folder)
    assert (status, failing(report)) == (0, {})
    assert report["model"] == str(folder)
    assert report["route"] == "packed"
    assert report["opened"].startswith("whole, ")
    found = {check["name"]: check for check in report["checks"]}
    assert list(found) == [
        "adapters",
        "quantisation",
        "weights whole",
        "weights complete",
        "tokenizer within the embedding",
        "causal",
        "train = eval",
        "route",
        *(f"log-probs, {many}, {route}" for route in ("packed", "padded") for many in MANY),
        "gradients, packed",
        "samples",
        "end token",
        "reward head",
        "LoRA targets",
    ]
    assert 0 <= found["log-probs, several completions, packed"]["value"] < 1e-4
    assert found["reward head"]["value"] == "transformers' LlamaForSequenceClassification"
    assert {"q_proj", "down_proj"} <= set(found["LoRA targets"]["value"])
    shown = capsys.readouterr().out
    assert f"{folder}: whole, " in shown
    assert "all hold" in shown


MANY = ("one completion", "several completions")


@pytest.mark.slow
def test_what_cannot_be_packed_says_by_how_much(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    causal_lm("bloom", vocab_size=len(tokenizer)).float().save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    status, report = checked(tmp_path / "bloom")
    assert (status, report["route"]) == (0, "padded")
    found = {check["name"]: check for check in report["checks"]}
    assert re.search(r"logps .* instead of", found["route"]["advice"])
    other = found["log-probs, one completion, packed"]
    assert other["ok"]
    assert other["value"] > 1e-2
    assert other["advice"] == model_check.NOT_TAKEN
    assert found["log-probs, one completion, padded"]["value"] < 1e-4


@pytest.mark.slow
def test_a_model_from_scratch_is_checked_too() -> None:
    status, report = checked("scratch:tiny")
    assert (status, report["route"]) == (0, "packed")
    assert report["opened"].startswith("from scratch, ")


def test_a_model_that_does_not_fit_is_checked_as_a_small_copy_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[torch.nn.Module] = []
    monkeypatch.setattr(model_check, "_measure", lambda _, model, tokens: seen.append(model))
    monkeypatch.setattr(model_check, "free_memory", lambda _: 1000)
    assert checked(folder)[0] == 0
    assert re.search(r"a small copy of its config, as the checks of the whole take .* GB, and 0.0 GB are free on cpu",
                     capsys.readouterr().out)  # fmt: skip
    monkeypatch.setattr(model_check, "free_memory", lambda _: 10**12)
    assert checked(folder, "--small")[1]["opened"] == "a small copy of its config, as asked for"
    assert checked(folder)[1]["opened"].startswith("whole")
    widths = [model.config.hidden_size for model in seen]  # type: ignore[union-attr]
    assert widths == [64, 64, 16]


@pytest.mark.slow
def test_a_reward_model_is_checked_by_its_rewards(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    reward_model(vocab_size=len(tokenizer)).float().save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    status, report = checked(tmp_path / "judge", "--reward-model")
    assert (status, failing(report)) == (0, {})
    names = [check["name"] for check in report["checks"]]
    assert "rewards, several completions, packed" in names
    assert "LoRA targets" not in names


# ---------------------------------------------------------------- broken ones


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def headless(folder: Path, _: PreTrainedTokenizerBase) -> None:
    causal_lm(vocab_size=len(_)).float().base_model.save_pretrained(folder)


def deeper(folder: Path, _: PreTrainedTokenizerBase) -> None:
    edit(folder, num_hidden_layers=3)


def shallower(folder: Path, _: PreTrainedTokenizerBase) -> None:
    edit(folder, num_hidden_layers=1)


def wider(folder: Path, _: PreTrainedTokenizerBase) -> None:
    edit(folder, intermediate_size=48)


def biased(folder: Path, _: PreTrainedTokenizerBase) -> None:
    file = folder / "model.safetensors"
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32), **load_file(file)}
    save_file(more, file, metadata={"format": "pt"})


def overflown(folder: Path, _: PreTrainedTokenizerBase) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})


def few_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    causal_lm(vocab_size=len(tokenizer) - 7).float().save_pretrained(folder)


def truncated(folder: Path, _: PreTrainedTokenizerBase) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def no_weights(folder: Path, _: PreTrainedTokenizerBase) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapted(folder: Path, _: PreTrainedTokenizerBase) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))


def quantised(folder: Path, _: PreTrainedTokenizerBase) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def endless(folder: Path, _: PreTrainedTokenizerBase) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))


BROKEN: dict[str, tuple[Callable[[Path, PreTrainedTokenizerBase], None], str, str]] = {
    "headless": (headless, "weights complete", r"lack lm_head\.weight, .* at random; .*with its head"),
    "a layer more than the weights": (deeper, "weights complete", r"lack .*layers\.2\..*at random"),
    "a layer less than the weights": (shallower, "weights complete", "more layers than its config says"),
    "a bias that its config has not": (biased, "weights complete", r"have .*q_proj\.bias, for which .* no place"),
    "a weight that is no number": (overflown, "weights loaded", r"not all finite: model\.norm\.weight has NaN"),
    "of another shape": (wider, "weights complete", r"another shape than its config says"),
    "tokenizer larger than the embedding": (few_ids, "tokenizer within the embedding", "resize_token_embeddings"),
    "truncated": (truncated, "weights whole", "truncated or damaged .*; copy or download the folder again"),
    "without safetensors": (no_weights, "weights whole", "safetensors weights are needed"),
    "an adapter beside it": (adapted, "adapters", "remove adapter_config.json to train the full weights"),
    "quantised": (quantised, "quantisation", r"quantised \(gptq.*; name the model that it was quantised from"),
    "a tokenizer without end": (endless, "end token", "set eos_token in tokenizer_config.json"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_fails_in_its_row_with_what_to_do(
    how: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The passes of the model are left out: what they say does not hang on what is broken."""
    monkeypatch.setattr(model_check, "_measure", lambda *_: None)
    breaking, name, advice = BROKEN[how]
    breaking(folder, tokenizer)
    status, report = checked(folder)
    assert status == 1
    assert re.search(advice, failing(report)[name]), failing(report)
    shown = capsys.readouterr().out
    assert f"FAILS {name}: {failing(report)[name]}" in shown
    assert re.search(rf"do not hold: .*{name}", shown)
    if how not in ("a tokenizer without end", "a weight that is no number"):
        assert report["opened"] == "a small copy of its config, as it cannot be opened as it is"


def test_an_encoder_is_not_causal(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    build(BertConfig(vocab_size=len(tokenizer), is_decoder=False, **shape)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    status, report = checked(tmp_path / "bert")
    assert status == 1
    assert f"{BertLMHeadModel.__name__} is not causal" in failing(report)["causal"]
    assert "no route is exact for this model" in failing(report)["route"]
    assert report["route"] is None


@pytest.mark.slow
def test_rows_that_depend_on_their_padding_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = of_type("doge")
    config.vocab_size = len(tokenizer)
    build(config).save_pretrained(tmp_path / "doge")
    tokenizer.save_pretrained(tmp_path / "doge")
    status, report = checked(tmp_path / "doge")
    assert (status, report["route"]) == (1, None)
    assert "beyond 8 the keys that are attended to (keep_window_size" in failing(report)["route"]


def test_noise_in_training_mode_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, attention_dropout=0.5)
    monkeypatch.setattr(model_check, "route_report", lambda *_: (_ for _ in ()).throw(ValueError("not tried")))
    monkeypatch.setattr("lm.models.noise.turn_off", lambda _: None)
    status, report = checked(folder)
    assert status == 1
    assert "is not the same in training and in evaluation" in failing(report)["train = eval"]


def test_what_a_model_raises_is_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise ValueError("cannot be sampled from: off by 3 nats")

    monkeypatch.setattr(model_check, "generation_of", cannot)
    monkeypatch.setattr(model_check, "_of_the_route", lambda *_: ())
    status, report = checked(folder)
    assert (status, failing(report)) == (1, {"samples": "cannot be sampled from: off by 3 nats"})


@pytest.mark.parametrize(
    ("labels", "causal", "name", "advice"),
    [(2, False, "reward head", "2 labels"), (1, True, "weights complete", "name a trained reward model")],
)
def test_only_a_trained_head_with_one_label_judges(
    labels: int,
    causal: bool,
    name: str,
    advice: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_check, "_measure", lambda *_: None)
    model = causal_lm(vocab_size=len(tokenizer)) if causal else None
    if model is None:
        config = causal_lm(vocab_size=len(tokenizer)).config
        config.num_labels = labels
        model = build(config, auto=AutoModelForSequenceClassification)
    model.float().save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    status, report = checked(tmp_path / "judge", "--reward-model")
    assert status == 1
    assert advice in failing(report)[name]


def test_ends_that_differ_are_told(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "_measure", lambda *_: None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    template = "{% for m in messages %}{{ m.content }}<|padding|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    status, report = checked(folder)
    end = next(check for check in report["checks"] if check["name"] == "end token")
    assert (status, end["ok"]) == (0, True)
    assert end["value"] == {
        "tokenizer": "<|endoftext|>",
        "generation_config.json": ["<|endoftext|>", "<|padding|>"],
        "chat template": ["<|padding|>"],
    }
    assert "its own files say <|padding|> (chat template)" in end["advice"]


def test_numbers_that_are_not_finite_are_told_in_json_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Check("log-probs, one completion, packed", False, float("nan"), float("inf"), "off by nan")
    monkeypatch.setattr(model_check, "_measure", lambda report, *_: report.checks.append(found))
    status, report = checked(folder)
    row = next(check for check in report["checks"] if check["name"] == found.name)
    assert (status, row["value"], row["limit"]) == (1, "nan", "inf")


def test_what_is_no_causal_model_at_all_is_opened_in_no_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 16, "num_layers": 1}))
    status, report = checked(folder)
    assert (status, report["route"], report["opened"]) == (1, None, "not at all")
    assert {"weights complete", "small copy"} <= failing(report).keys()
    assert "do not hold" in capsys.readouterr().out


def test_weights_that_do_not_load_leave_a_small_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise ValueError("model 'x' cannot be loaded: no space left")

    monkeypatch.setattr(model_check, "open_weights", cannot)
    monkeypatch.setattr(model_check, "_measure", lambda *_: None)
    status, report = checked(folder)
    assert (status, report["opened"]) == (1, "a small copy of its config, as its weights cannot be loaded")
    assert failing(report) == {"weights loaded": "model 'x' cannot be loaded: no space left"}


# ---------------------------------------------------------------- of the hub


def test_a_name_of_the_hub_is_downloaded_and_checked_as_a_folder_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for the hub: it has not been tried with the hub itself."""
    asked: list[str] = []

    def downloaded(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name == "owner/none":
            raise LocalEntryNotFoundError("cannot find it in the cache\nand more")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    monkeypatch.setattr(model_check, "_measure", lambda *_: None)
    status, report = checked("owner/name")
    assert (status, report["model"], asked) == (0, "owner/name", ["owner/name"])
    capsys.readouterr()
    assert main(["owner/none"]) == 2
    assert capsys.readouterr().err.endswith("the hub does not give it (cannot find it in the cache)\n")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a MODEL, or --architectures"),
        (["scratch:tiny", "--architectures"], "--architectures tries all of transformers' and not 'scratch:tiny'"),
        (["scratch:tiny", "--markdown", "x.md"], "--markdown is for --architectures"),
        (["scratch:tiny", "--tokens", "3"], "--tokens must be at least 8, got 3"),
        (["scratch:tiny", "--json", "no/where.json"], "there is no folder no"),
    ],
)
def test_a_mistake_in_the_line_is_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_there_is_overwritten_by_force_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("found.json").write_text("mine")
    for words in (["scratch:tiny"], ["--architectures"]):
        assert main([*words, "--json", "found.json"]) == 2
        assert "--json found.json exists; name another file, or remove it, or" in capsys.readouterr().err
    assert Path("found.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("mpt", {"max_seq_len": 24}), ("opt", {"max_position_embeddings": 24}), ("gpt2", {"n_positions": 24})],
)
def test_rows_and_samples_stay_within_the_positions(
    architecture: str,
    options: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = of_type(architecture)
    for name, value in {"vocab_size": len(tokenizer), **options}.items():
        setattr(config, name, value)
    model = build(config)
    noise.turn_off(model)
    report = model_check.Report("it")
    model_check._measure(report, model, 64)
    assert {check.name: check.advice for check in report.checks if not check.ok} == {}
    assert "samples" in [check.name for check in report.checks]
    model.save_pretrained(tmp_path / "it")
    tokenizer.save_pretrained(tmp_path / "it")
    assert main([str(tmp_path / "it"), "--tokens", "25"]) == 2
    assert "--tokens 25 is more than the 24 positions of model" in capsys.readouterr().err


def test_what_is_no_model_is_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["./nowhere"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["scratch:tinny"]) == 2
    assert "the models from scratch are scratch:tiny" in capsys.readouterr().err
    (folder / "config.json").write_text("{")
    assert main([str(folder)]) == 2
    assert "its config.json cannot be read" in capsys.readouterr().err
    (folder / "config.json").unlink()
    assert main([str(folder)]) == 2
    assert "config.json" in capsys.readouterr().err
