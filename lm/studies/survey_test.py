"""Architectures of transformers through our routes: none wrong without a word, and the page says what they do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lm.check import main
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.packing import Layout
from lm.models.heads import without_weights
from lm.studies import survey
from lm.studies.architectures import TYPES, VOCABULARY, build, of_type, small
from lm.studies.parity import Difference, difference, examples, plain_logps, values
from lm.studies.survey import NOT_BUILT, PACKED, PADDED, REFUSED, WRONG, Row, row_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
QUICK = {
    "llama": PACKED,
    "gemma3_text": PACKED,
    "mixtral": PACKED,
    "bloom": PADDED,
    "mamba": PADDED,
    "bert": REFUSED,
}


def on_the_page() -> dict[str, tuple[str, ...]]:
    """Type -> class, route, nats off, reward head, of the table's rows."""
    rows = re.findall(r"(?m)^\| (\S+) +\| (\w+) +\| (\w+) +\| (\S*) +\| ([^|]*?) +\|", PAGE.read_text())
    return {name: tuple(rest) for name, *rest in rows if name in TYPES}


@pytest.mark.parametrize("model_type", QUICK)
def test_a_kind_of_architecture_is_exact_or_refused(model_type: str) -> None:
    row = row_of(model_type)
    assert row.outcome == QUICK[model_type], row
    assert on_the_page()[model_type][:2] == (row.name, row.outcome)
    if row.outcome == REFUSED:
        assert "not causal" in row.why
        assert row.difference is None
    else:
        assert row.difference is not None
        assert row.limit is not None
        assert row.control is not None
        assert row.difference < row.limit < row.control / 10
        assert bool(row.why) == (row.outcome == PADDED)


@pytest.mark.thorough
def test_no_architecture_is_wrong_without_a_word() -> None:
    rows = survey.survey_of()
    assert [row for row in rows if row.outcome == WRONG] == []
    exact = [row for row in rows if row.outcome in (PACKED, PADDED)]
    assert len(exact) >= 140
    for row in exact:
        assert row.control is not None
        assert row.limit is not None
        assert row.control > 2 * row.limit, f"{row.type} shows nothing: {row}"
    page = on_the_page()
    assert {row.type: row.outcome for row in rows if row.outcome != NOT_BUILT} == {n: r[1] for n, r in page.items()}


def test_the_page_has_architectures_by_the_dozen_and_none_that_is_wrong() -> None:
    outcomes = [row[1] for row in on_the_page().values()]
    assert sum(outcome in (PACKED, PADDED) for outcome in outcomes) >= 60
    assert WRONG not in outcomes
    assert "`python -m lm.check --architectures" in PAGE.read_text()


def test_a_leak_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: where the trial is kept from noticing, the survey does."""

    def sees(self: Layout, query: int, key: int, window: int | None = None) -> object:
        return self.positions_T[query] >= self.positions_T[key]

    monkeypatch.setattr(Layout, "sees", sees)
    assert row_of("llama").outcome == PADDED
    monkeypatch.setattr("lm.logprobs.trial.Trial.packed", lambda *_: None)
    row = row_of("llama")
    assert row.outcome == WRONG
    assert row.difference is not None
    assert row.difference > 0.1


def test_a_traceback_is_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("'tuple' object has no attribute 'new_zeros'")

    monkeypatch.setattr("lm.logprobs.completions.Trial", broken)
    row = row_of("llama")
    assert (row.outcome, row.why) == (WRONG, "AttributeError: 'tuple' object has no attribute 'new_zeros'")


def test_a_text_part_keeps_its_own_attention() -> None:
    """A vision part may know one attention only, and the whole says that one: what is put back is each part's own."""
    model = CompletionModel(build(of_type("got_ocr2")))
    own = model.model.config._attn_implementation, model.model.config.get_text_config()._attn_implementation
    assert own == ("eager", "sdpa")
    rows = examples(range(3, VOCABULARY), 1, completions=3, prompt=20)
    batch = collate([prompt for prompt, _ in rows], [completions for _, completions in rows])
    with torch.no_grad():
        right = plain_logps(model.model, rows)
        assert model.settle(batch["input_ids"], batch["lengths"]) == "packed"
        with model.stock() as plain:
            assert (plain.config._attn_implementation, plain.config.get_text_config()._attn_implementation) == own
        assert difference(values(model, rows, "packed"), right, rows).ok


def test_a_choice_of_keys_that_padding_changes_is_noticed_in_beginnings_of_the_longest_row() -> None:
    """With two heads many keys score 0 alike, and which of them are taken depends on how many tokens follow. In the
    longest row, in one a little shorter, and in a short one this model shows it not."""
    config = of_type("deepseek_v32")
    config.index_n_heads = 2
    model = CompletionModel(build(config, seed=3))
    batch = collate([[3] * 24], [[[4] * 6]])
    with pytest.raises(ValueError, match="a row's numbers depend on the rows that it is padded to"):
        model.settle(batch["input_ids"], batch["lengths"])


def test_a_class_without_a_head_for_the_last_state_makes_no_reward_model() -> None:
    """transformers has a class, whose head reads something else: known before SFT is trained, not after it."""
    for kind in ("ctrl", "modernbert-decoder", "bart"):
        with pytest.raises(ValueError, match="has no `score` head"):
            without_weights(of_type(kind))
    assert type(without_weights(of_type("llama"))).__name__ == "LlamaForSequenceClassification"


def test_a_config_that_was_in_use_makes_a_reward_model_too() -> None:
    """transformers writes the experts' implementation into a config, and asks a class's module whether it may."""
    model = build(of_type("olmoe"))
    assert type(without_weights(model.config)).__name__ == "OlmoeForSequenceClassification"


def test_not_a_number_is_no_small_difference() -> None:
    rows = examples(range(3, 9), 1, completions=1, prompt=8)
    found = difference(torch.tensor([0.0, float("nan"), 0.0]), torch.zeros(3), rows)
    assert not found.ok
    assert Difference(1e-9, 1e-6).ok


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_next", "zamba2", "dbrx", "gemma3"])
def test_a_small_config_shows_every_kind_of_layer_and_keeps_a_vocabulary(model_type: str) -> None:
    given = CONFIG_MAPPING[model_type]()
    made = small(given, keep_vocabulary=True)
    before, after = given.get_text_config(), made.get_text_config()
    assert after.vocab_size == before.vocab_size
    assert (after.eos_token_id, after.hidden_size) == (before.eos_token_id, 64)
    assert set(getattr(after, "layer_types", None) or ()) == set(getattr(before, "layer_types", None) or ())
    assert 2 <= after.num_hidden_layers <= 6
    assert small(given).get_text_config().vocab_size == VOCABULARY


def test_what_takes_too_long_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: str) -> None:
        while True:
            pass

    monkeypatch.setattr(survey, "SECONDS", 1)
    monkeypatch.setattr(survey, "of_type", slow)
    assert [row.why for row in survey.survey_of(["llama"])] == ["TimeoutError: took more than 1 s"]


def test_the_command_writes_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row("llama", "LlamaForCausalLM", PACKED, "", 1e-6, 1e-4, 3.0, "transformers'"),
        Row("bert", "BertLMHeadModel", REFUSED, "not | causal", None, None, None, "none"),
        Row("gemma3n", "", NOT_BUILT, "needs timm", None, None, None, ""),
    ]
    monkeypatch.setattr(survey, "survey_of", lambda: rows)
    page, file = tmp_path / "page.md", tmp_path / "rows.json"
    assert main(["--architectures", "--markdown", str(page)]) == 2
    assert "the file must have a line '<!-- lm.check: begin -->'" in capsys.readouterr().err
    page.write_text("before\n<!-- lm.check: begin -->\n<!-- lm.check: end -->\nafter\n")
    assert main(["--architectures", "--markdown", str(page), "--json", str(file)]) == 0
    assert "3 architectures: 1 packed, 0 padded, 1 refused, 1 not built, 0 WRONG" in capsys.readouterr().out
    text = page.read_text()
    assert "| llama | LlamaForCausalLM | packed | 1.0e-06 | transformers' |" in text
    assert "- `gemma3n`: needs timm" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert [row["type"] for row in json.loads(file.read_text())["rows"]] == ["llama", "bert", "gemma3n"]
    monkeypatch.setattr(survey, "survey_of", lambda: [Row("x", "X", WRONG, "", 3.0, 1e-4, 3.0, "")])
    assert main(["--architectures"]) == 1
