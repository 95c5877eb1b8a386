"""A route is taken because it was seen to be exact, and whatever is wrong with it is said."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lm.logprobs import copies
from lm.logprobs.completions import Route, collate
from lm.logprobs.copies import depth_of, layers_of, precise
from lm.logprobs.definition import examples_of, position_limit, rows_of, vocabulary_of
from lm.logprobs.packing import PACKED as ATTENTION
from lm.logprobs.packing import Layout
from lm.logprobs.scoring import score_rows
from lm.logprobs.trial import Trial, packed, padded, route_report
from tests.tiny import END, PADDED, VOCABULARY, WINDOW, causal_lm, close, reward_model, wrap

pytestmark = pytest.mark.filterwarnings("ignore")  # some architectures say that they lack a fast kernel

CPU = torch.device("cpu")
LEAKS = [name for name in PADDED if name != "stablelm"]
"""Architectures that compute packed rows without complaint, and wrong."""
SHOWN_AT_ONCE = ("gptj", "recurrent-gemma")
"""Whose positions are wrong even where the packed row is the plain one."""
ONE_EACH: list[tuple[list[int], list[int]]] = [
    ([3, 4, 5], [6, 7, END]),
    ([8, 9], [10, END]),
    ([11] * 5, [12, 13, 14, END]),
]


def alone(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """The definition, written again: no padding, no mask, all logits."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0].log_softmax(-1)
    return sum((logprobs[len(prompt) + i - 1, t] for i, t in enumerate(tokens)), torch.zeros((), dtype=logprobs.dtype))


def batch(data: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    return collate([prompt for prompt, _ in data], [[tokens] for _, tokens in data])


# ---------------------------------------------------------------- one completion a prompt


@pytest.mark.parametrize("architecture", LEAKS)
def test_examples_of_one_completion_settle_as_any_do(architecture: str) -> None:
    """SFT, and scores of one completion a prompt. Control: a trial of one such example sees nothing."""
    model = causal_lm(architecture)
    expected = torch.stack([alone(model, *row) for row in ONE_EACH])
    wrapped = wrap(model)
    one = [(prompt, [tokens]) for prompt, tokens in ONE_EACH]
    with torch.no_grad():
        as_packed, as_padded = packed(wrapped, one[:1], ATTENTION, False).logps, padded(wrapped, one[:1]).logps
        assert as_packed is not None
        assert as_padded is not None
        if architecture not in SHOWN_AT_ONCE:
            close(as_packed.double(), as_padded.double(), tolerance=1e-6, what="one example of one completion")
        leaked = packed(wrapped, one, ATTENTION, False).logps
    assert leaked is not None
    settled = wrapped(**batch(ONE_EACH)).logps  # lazily, by forward
    assert wrapped.route == "padded"
    close(settled.detach().double(), expected.double(), tolerance=1e-6)  # some compute a part in float32
    if architecture not in SHOWN_AT_ONCE:
        assert float((leaked - expected).abs().max()) > 1e-2
    scorer = wrap(causal_lm(architecture))
    scores = score_rows(scorer, [p for p, _ in ONE_EACH], [c for _, c in ONE_EACH], "scores")
    assert scorer.route == "padded"
    close(scores, expected.double(), tolerance=1e-6)


def test_the_examples_differ_and_one_is_as_long_as_asked_for() -> None:
    for tokens in (2, 3, 9, 40, 300):
        examples = examples_of(range(VOCABULARY), tokens)
        assert max(len(row) for row, _ in rows_of(examples)) == tokens
        assert len(examples) == 3
        assert all(len(own) == 2 for _, own in examples)
        if tokens > 8:
            prompts = [tuple(prompt) for prompt, _ in examples]
            assert len(set(prompts)) == 3
            assert all(len(one) != len(other) for _, (one, other) in examples)


def test_tokens_with_a_meaning_are_not_drawn() -> None:
    model = causal_lm()
    model.config.image_token_id, model.config.eos_token_id = 7, [1, 9]
    assert vocabulary_of(model) == [token for token in range(VOCABULARY) if token not in (0, 1, 7, 9)]


def test_a_longer_row_than_was_tried_is_tried_anew() -> None:
    """A window that the attention ignores, and a first batch of rows that it does not cut."""

    def windowless(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        from lm.logprobs.packing import packed_attention

        return packed_attention(*args, **kwargs)

    from transformers import AttentionInterface

    model = causal_lm("mistral-sliding")
    short, long = ([3, 4], [5, END]), ([3] * (WINDOW + 4), [5, END])
    expected = torch.stack([alone(model, *row) for row in (short, long)])
    wrapped = wrap(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "lm_packed", windowless)
        routes = []
        for rows, right in (([short], expected[:1]), ([short, long], expected)):
            close(wrapped(**batch(rows)).logps.detach(), right)
            routes.append(wrapped.route)
        assert routes == ["packed", "padded"]
        scorer = wrap(causal_lm("mistral-sliding"))
        score_rows(scorer, [short[0]], [short[1]], "short")
        close(score_rows(scorer, [short[0], long[0]], [short[1], long[1]], "long"), expected)
        assert scorer.route == "padded"


@pytest.mark.parametrize("window", [{"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}])
def test_a_window_of_another_name_shows(window: dict[str, Any]) -> None:
    """GPT-Neo's local attention: its mask alone knows of it, and no `sliding_window` does."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    model = GPTNeoForCausalLM(GPTNeoConfig(**shape, **window)).double().eval()
    rows = [([3, 4, 5], [6, END]), (list(range(3, 15)), [7, 8, END])]
    expected = torch.stack([alone(model, *row) for row in rows])
    close(wrap(model)(**batch(rows)).logps.detach(), expected)


class Scaled(LlamaForCausalLM):  # type: ignore[misc]
    """A head with something after it that no name in the config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output


@pytest.mark.parametrize("route", ["packed", "padded"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_head_with_something_after_it_is_the_models_own(plain: bool, route: Route) -> None:
    """Its logits are not computed from the last hidden state, and both routes fit it for that. A plain head is never
    run for whole rows, whose logits would be many times the states' memory."""
    model, runs = causal_lm(), list[Tensor]()
    model.__class__ = type(model) if plain else Scaled
    expected = torch.stack([alone(model, *row) for row in ONE_EACH])
    wrapped = wrap(model, route=route)
    assert wrapped.plain_head
    wrapped.settle(**batch(ONE_EACH))
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: runs.append(logits))
    close(wrapped(**batch(ONE_EACH)).logps.detach(), expected)
    assert (wrapped.route, wrapped.plain_head, bool(runs)) == (route, plain, not plain)


# ---------------------------------------------------------------- precision and copies


@pytest.mark.parametrize("options", [{"autocast": True}, {}], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("architecture", ["mamba", "jamba", "lfm2", "bloom", "llama", "qwen2-sliding"])
def test_low_precision_settles_as_full_precision_does(architecture: str, options: dict[str, Any]) -> None:
    model = causal_lm(architecture).to(torch.float32 if options else torch.bfloat16)
    wrapped = wrap(model, **options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    wrapped.settle(**batch(ONE_EACH))
    assert wrapped.route == ("packed" if architecture in ("llama", "qwen2-sliding") else "padded")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    logps = wrapped(**batch(ONE_EACH)).logps
    exact = torch.stack([alone(causal_lm(architecture), *row) for row in ONE_EACH])
    torch.testing.assert_close(logps.double(), exact.double(), rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("architecture", "reward"),
    [("bloom", False), ("lfm2", False), ("qwen3-next", True), ("llama", True), ("llama", False), ("gemma2", False)],
)
def test_a_model_that_hardly_reacts_is_tried_with_its_weights_shaken(
    architecture: str, reward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As initialised, and smaller: what leaks is far below what rounding may account for."""
    model = (reward_model if reward else causal_lm)(architecture).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.mul_(1e-3)
    wrapped = wrap(model)
    trial = Trial(wrapped, 20, CPU)
    assert trial.subject is not wrapped
    assert trial.blind is None
    with torch.no_grad():
        rows = [(prompt, own) for prompt, own in trial.examples]
        got, right = packed(wrapped, rows, ATTENTION, False), padded(wrapped, rows)
        one, other = (got.rewards, right.rewards) if reward else (got.logps, right.logps)
        assert one is not None
        assert other is not None
        assert float((one - other).abs().max()) < 1e-4, "on the weights as they are, nothing would show"
    wrapped.settle(**batch(ONE_EACH))
    assert wrapped.route == ("packed" if architecture in ("llama", "gemma2") else "padded")


def test_a_large_models_copy_has_the_layers_that_show_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model's own weights, in float32, and nothing of the model itself changed."""
    model = causal_lm("gemma3", num_hidden_layers=6, layer_types=["sliding_attention"] * 3 + ["full_attention"] * 3)
    wrapped = wrap(model.to(torch.bfloat16))
    assert depth_of(model, layers_of(model)) == 4
    assert len(model.base_model.layers) == 6
    whole = precise(wrapped, CPU)
    monkeypatch.setattr(copies, "WHOLE", 0)
    first = precise(wrapped, CPU)
    assert [len(m.model.base_model.layers) for m in (whole, first)] == [6, 4]
    assert len(model.base_model.layers) == 6
    assert first.model.dtype == torch.float32
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).float()), name
        assert parameter.data_ptr() != model.get_parameter(name).data_ptr()
    wrapped.settle(**batch(ONE_EACH))
    assert wrapped.route == "packed"
    # Control: a window ignored in the one kind of layer is seen in the first layers too.
    monkeypatch.setattr(
        Layout, "dense_mask", lambda self, window, dtype, dense=Layout.dense_mask: dense(self, None, dtype)
    )
    long = [([*range(3, 20)], [20, END])]
    other = wrap(model)
    other.settle(**batch(long))
    assert other.route == "padded"


def test_jamba_without_a_setter_of_its_layers_types_is_tried() -> None:
    """Its kinds of layers follow from periods in the config; they are told by what the layers are made of."""
    model = causal_lm("jamba", num_hidden_layers=4)
    assert depth_of(model, layers_of(model)) == 2


def test_a_copy_that_does_not_fit_leads_to_padded_rows_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "free_memory", lambda device: 10_000)
    model = wrap(causal_lm().to(torch.bfloat16))
    with caplog.at_level(logging.WARNING, "lm.logprobs"):
        model.settle(**batch(ONE_EACH))
    assert model.route == "padded"
    assert "a trial needs a copy in float32 of 0.0 GB, and 0.0 GB are free on cpu" in caplog.text
    assert "LlamaForCausalLM takes padded rows that were not tried" in caplog.text
    with pytest.raises(
        ValueError, match=r'logprobs.route "packed" does not fit LlamaForCausalLM: a trial needs a copy'
    ):
        wrap(causal_lm().to(torch.bfloat16), route="packed").settle(**batch(ONE_EACH))


def test_the_model_is_left_as_it_was() -> None:
    model = causal_lm("bloom").train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    wrapped = wrap(model)
    wrapped.settle(**batch(ONE_EACH))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- exceptions


def test_what_a_models_forward_raises_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, forward = causal_lm(), nn.Module.__call__

    def odd(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "packed" in kwargs and type(self).__name__ == "LlamaAttention":
            raise KeyError("no such thing as packed")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", odd)
    wrapped = wrap(model)
    with caplog.at_level(logging.WARNING, "lm.logprobs"):
        wrapped.settle(**batch(ONE_EACH))
    assert wrapped.route == "padded"
    assert "packed rows do not fit it: KeyError: 'no such thing as packed'" in caplog.text


@pytest.mark.parametrize("where", ["dense_mask", "states_C", "read_U"])
def test_a_fault_of_ours_is_no_misfit(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout, or in what of ours runs inside the model's forward."""

    def broken(*args: Any) -> Any:
        raise AttributeError("a slip")

    if where == "states_C":
        monkeypatch.setattr("lm.logprobs.completions.Layout", broken)
    else:
        monkeypatch.setattr(Layout, where, property(broken) if where == "read_U" else broken)
    with pytest.raises(AttributeError, match="a slip"):
        wrap(causal_lm()).settle(**batch(ONE_EACH))


def test_a_lack_of_memory_is_no_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Layout, "dense_mask", full)
    with pytest.raises(torch.OutOfMemoryError):
        wrap(causal_lm()).settle(**batch(ONE_EACH))


def test_a_plain_forward_that_fails_is_an_error_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm()

    def odd(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes\ndiffer")

    monkeypatch.setattr(model, "forward", odd)
    with pytest.raises(ValueError, match="the plain forward of LlamaForCausalLM fails: RuntimeError: shapes differ"):
        wrap(model).settle(**batch(ONE_EACH))


# ---------------------------------------------------------------- padded rows, positions


@pytest.mark.parametrize("route", ["auto", "padded"])
def test_a_model_whose_rows_depend_on_their_batch_is_refused(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither route is exact for it: here, every row sees how long the longest is."""
    model = causal_lm("bloom")
    forward = model.forward

    def crowded(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * (1 + kwargs["input_ids"].shape[1] / 100)
        return output

    monkeypatch.setattr(model, "forward", crowded)
    with pytest.raises(
        ValueError, match=r"BloomForCausalLM: a row's numbers depend on the rows that it is padded to \(lo"
    ):
        wrap(model, route=route).settle(**batch([([3] * 12, [4, END])]))


LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 10,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 10,
    },
}
DYNAMIC = {
    "max_position_embeddings": 10,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize("route", ["auto", "packed", "padded"])
@pytest.mark.parametrize(("architecture", "rope"), [("phi3-sliding", LONGROPE), ("llama", DYNAMIC)])
def test_rows_whose_positions_depend_on_their_neighbours_are_refused(
    architecture: str, rope: dict[str, Any], route: str
) -> None:
    """Up to the original context all is exact; beyond, a row's log-prob is another in other company."""
    model = (
        causal_lm(architecture, sliding_window=None, **rope)
        if "phi3" in architecture
        else causal_lm(architecture, **rope)
    )
    assert position_limit(model.config) == 10
    short, long = ([3, 4, 5], [6, 7, 8, END]), ([3] * 20, [9, END])
    with torch.no_grad():
        rows = torch.tensor([[3, 4, 5, 6, 7, 8, END] + [0] * 15, [3] * 20 + [9, END]])
        company = model(input_ids=rows, use_cache=False).logits[0, 2].log_softmax(-1)[6]
        by_itself = model(input_ids=rows[:1, :7], use_cache=False).logits[0, 2].log_softmax(-1)[6]
    assert abs(float(company - by_itself)) > 1e-3, "the premise"
    expected = alone(model, *short)
    wrapped = wrap(model, route=route)
    close(wrapped(**batch([short, ([2], [3] * 9)])).logps[0].detach(), expected)
    for data in ([long], [short, long]):
        with pytest.raises(
            ValueError, match=r"rows may have 22 tokens, but beyond 10 .*rope_scaling.* must be at most 10"
        ):
            wrapped(**batch(data))
        with pytest.raises(ValueError, match="must be at most 10"):
            score_rows(wrap(model, route=route), [p for p, _ in data], [c for _, c in data], "scores")


def test_other_models_have_no_limit_of_positions() -> None:
    assert position_limit(causal_lm().config) is None
    assert position_limit(causal_lm("gpt2").config) is None


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize("architecture", ["llama", "bloom", "stablelm", "granite"])
def test_the_report_measures_both_routes(architecture: str) -> None:
    model = wrap(causal_lm(architecture))
    report = route_report(model, tokens=20)
    assert report.exact
    assert report.route == model.route == ("padded" if architecture in PADDED else "packed")
    assert report.padded_one is not None
    assert report.padded_one < 1e-6
    assert report.padded_gradient is not None
    assert report.padded_gradient < 1e-6
    if architecture == "bloom":
        assert report.packed_several is not None
        assert report.packed_several > 0.1
        assert report.packed_gradient is not None
        assert report.packed_gradient > 0.1
        assert report.reason is not None
        assert "instead of" in report.reason
    elif architecture == "stablelm":
        assert report.packed_one is report.packed_several is report.packed_gradient is None
        assert report.reason is not None
        assert report.reason.startswith("NotImplementedError: no layout reached")
    else:
        assert report.reason is None
        assert report.packed_several is not None
        assert report.packed_several < 1e-9


def test_the_report_of_a_reward_model_and_of_a_model_that_is_refused() -> None:
    assert route_report(wrap(reward_model("bloom")), tokens=20).exact
    refused = route_report(wrap(causal_lm("bloom"), route="packed"), tokens=20)
    assert refused.route is None
    assert not refused.exact
    assert refused.reason is not None
    assert 'logprobs.route "packed" does not fit' in refused.reason
    assert copy.copy(refused) == refused
