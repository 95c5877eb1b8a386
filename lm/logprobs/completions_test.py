"""Every route gives the plain forward's log-probs and rewards, one unpadded sequence at a time, and its gradients."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel, Route, collate
from lm.logprobs.packing import Layout, packed_attention
from tests.tiny import (
    ARCHITECTURES,
    END,
    PACKED,
    PADDED,
    VOCABULARY,
    WINDOW,
    causal_lm,
    close,
    completion,
    reward_model,
)

Examples = list[tuple[list[int], list[list[int]]]]
ROUTES: tuple[Route, ...] = ("packed", "padded")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Some architectures say that they lack a fast kernel, or that they do not take an attention function."""
    transformers_log = logging.getLogger("transformers")
    level = transformers_log.level
    transformers_log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers_log.setLevel(level)


def examples(seed: int = 0) -> Examples:
    """Prompts and completions of very unequal length, 1 to 4 completions a prompt, some of a single token."""
    rng = random.Random(seed)
    drawn = [(completion(rng, 1, 12)[:-1], [completion(rng) for _ in range(k)]) for k in (2, 1, 4, 3)]
    return [*drawn, ([7], [completion(rng), [END]]), (completion(rng, 9, 9)[:-1], [[END], completion(rng)])]


def flat(data: Examples) -> list[tuple[list[int], list[int]]]:
    return [(prompt, tokens) for prompt, own in data for tokens in own]


def values_of(model: CompletionModel, data: Examples, *, rewards: bool = False) -> Tensor:
    """[R], by the code under test."""
    output = model(**collate([p for p, _ in data], [c for _, c in data]))
    values = output.rewards if rewards else output.logps
    assert isinstance(values, Tensor)
    return values


def plain_logps(model: PreTrainedModel, data: Examples, shift: int = 1) -> Tensor:
    """[R], the definition: one sequence, full logits, log-softmax, gather. `shift` 1 is right, others are controls."""
    values = []
    for prompt, tokens in flat(data):
        logprobs = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0].log_softmax(-1)
        values.append(sum(logprobs[len(prompt) + i - shift, token] for i, token in enumerate(tokens)))
    return torch.stack(values)


def plain_states(model: PreTrainedModel, data: Examples) -> Tensor:
    """[R, H], the last hidden state at the last token of one unpadded sequence."""
    sequences = [torch.tensor([[*prompt, *tokens]]) for prompt, tokens in flat(data)]
    return torch.stack([model.base_model(input_ids=s, use_cache=False).last_hidden_state[0, -1] for s in sequences])


def wrap(model: PreTrainedModel, route: str = "auto", **options: Any) -> CompletionModel:
    return CompletionModel(model, options=LogprobsConfig(route=route, allocator=False), **options)  # type: ignore[arg-type]


def gradients(model: nn.Module, values: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum that weighs every row differently."""
    model.zero_grad()
    result = values()
    torch.autograd.backward((result * torch.linspace(0.5, 2, len(result), dtype=result.dtype)).sum())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_and_every_parameters_gradient_equal_the_plain_forward(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every architecture by the route that it settles on, and it settles on packed rows where it can."""
    # Norms, routers and softmaxes that transformers computes in float32 whatever the dtype: in float64 here.
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, data = causal_lm(architecture), examples()
    assert max(len(p) + len(c) for p, c in flat(data)) > WINDOW
    close(plain_logps(model, data), plain_logps(model, data), what="the model is deterministic")
    expected, plain = plain_logps(model, data).detach(), gradients(model, lambda: plain_logps(model, data))
    wrapped = wrap(model)
    close(values_of(wrapped, data).detach(), expected)
    ours = gradients(model, lambda: values_of(wrapped, data))
    assert wrapped.route == ("packed" if architecture in PACKED else "padded")
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        close(gradient, plain[name], tolerance=1e-9, what=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_tied_embeddings_gradient_is_added_to_the_heads_row_by_row(
    architecture: str, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to what a step before has left; no gradient of all rows, mostly zeros, is made of it. With a reward head,
    whose gradient may come without that of the language-model head, it is: optimizers need all rows."""
    monkeypatch.setattr("lm.logprobs.completions.LARGE_HEAD", 1)
    dense: list[int] = []
    plainly = torch.ops.aten.embedding_dense_backward.default

    class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            dense.extend([1] if function is plainly else [])
            return function(*args, **(kwargs or {}))

    seen: Callable[[], Any] = Seen
    model, data = causal_lm(architecture, tie_word_embeddings=True), examples()
    weight = model.get_input_embeddings().weight
    assert weight is model.get_output_embeddings().weight
    torch.autograd.backward(plain_logps(model, data).sum())
    once = weight.grad.clone()
    weight.grad = None
    wrapped = wrap(model, route)
    for times in (1, 2):
        with seen():
            torch.autograd.backward(values_of(wrapped, data).sum())
        assert weight.grad.layout is torch.strided
        close(weight.grad, times * once, tolerance=1e-9)
    assert not dense
    with_rewards = wrap(causal_lm(architecture, tie_word_embeddings=True), route, reward_head=True)
    with seen():
        torch.autograd.backward(values_of(with_rewards, data, rewards=True).sum())
    assert with_rewards.model.get_input_embeddings().weight.grad.layout is torch.strided
    assert dense


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2-sliding"])
def test_rewards_are_read_at_the_completions_last_token(architecture: str, route: Route) -> None:
    model, data = reward_model(architecture), examples()
    expected = model.score(plain_states(model, data))[:, 0]
    plain = gradients(model, lambda: model.score(plain_states(model, data))[:, 0])
    earlier = [(p, [c[:-1] for c in own if len(c) > 1]) for p, own in data]
    control = model.score(plain_states(model, earlier))[:, 0]
    wrapped = wrap(model, route)
    close(values_of(wrapped, data, rewards=True), expected)
    for name, gradient in gradients(model, lambda: values_of(wrapped, data, rewards=True)).items():
        close(gradient, plain[name], what=name)
    # Control: one token earlier is another number.
    later = [(p, [c for c in own if len(c) > 1]) for p, own in data]
    assert not torch.isclose(control, values_of(wrapped, later, rewards=True)).any()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_a_policys_reward_head_reads_the_last_hidden_state_at_end_of_text(architecture: str, route: Route) -> None:
    """Granite scales its logits, so its own head is used, and the states come another way."""
    model, data = causal_lm(architecture), examples()
    states, logps = plain_states(model, data), plain_logps(model, data)
    wrapped = wrap(model, route, reward_head=True)
    assert wrapped.reward_head is not None
    close(values_of(wrapped, data, rewards=True), wrapped.reward_head(states)[:, 0])
    close(values_of(wrapped, data), logps)
    assert "reward_head.weight" in gradients(wrapped, lambda: values_of(wrapped, data, rewards=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_the_last_layer_works_only_where_its_state_is_read(architecture: str) -> None:
    """Of a prompt its feed-forward network gets the last token alone; all other layers get everything."""
    model, data = causal_lm(architecture), examples()
    wrapped, plain = wrap(model, "packed"), plain_logps(model, data)
    values_of(wrapped, data)
    seen: list[int] = []
    for layer in next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)):
        network = layer.mlp
        assert isinstance(network, nn.Module)
        network.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    close(values_of(wrapped, data), plain)
    *others, last = seen
    everything = sum(len(prompt) + sum(map(len, own)) for prompt, own in data)
    assert set(others) == {everything}
    assert last == everything - sum(len(prompt) - 1 for prompt, _ in data)


def test_a_last_layer_that_misses_a_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: then the model takes packed rows with the whole last layer."""
    monkeypatch.setattr(Layout, "read_U", property(lambda layout: layout.targets_C))
    model, data = causal_lm("llama"), examples()
    wrapped, plain = wrap(model), plain_logps(model, data)
    close(values_of(wrapped, data), plain)
    assert wrapped.route == "packed"
    assert not wrapped._last_layer.on
    wrapped._last_layer.on = True
    assert not torch.isclose(values_of(wrapped, data), plain).all()


@pytest.mark.thorough
def test_compiled_layers_give_the_same_values_and_gradients() -> None:
    model, data = causal_lm("llama"), examples()
    values, plain = plain_logps(model, data).detach(), gradients(model, lambda: plain_logps(model, data))
    compiled = CompletionModel(model, options=LogprobsConfig(route="packed", allocator=False, compile=True))
    close(values_of(compiled, data).detach(), values)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    for name, gradient in gradients(model, lambda: values_of(compiled, data)).items():
        close(gradient, plain[name], tolerance=1e-9, what=name)
    before = dict(torch._dynamo.utils.counters["stats"])
    with compiled.stock() as policy:  # a cache, whose layers would each be compiled
        policy.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    assert dict(torch._dynamo.utils.counters["stats"]) == before


CALLS: dict[str, dict[str, int]] = {
    "one masked call": {},
    "blocks": {"DENSE_LIMIT": 0},
    "small blocks": {"DENSE_LIMIT": 0, "QUERY_ROWS": 3},
    "fused, two calls an example": {"DENSE_LIMIT": 0, "KEPT_SCORES": 0},
}
"""How the attention over a row may be computed, and the limits of `lm.logprobs.packing` that lead there."""


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gemma2"])
def test_every_way_to_attend_gives_the_same_values_and_gradients(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = examples(), wrap(causal_lm(architecture), "packed")
    expected = gradients(model, lambda: values_of(model, data))
    for how, limits in CALLS.items():
        for name, value in limits.items():
            monkeypatch.setattr(f"lm.logprobs.packing.{name}", value)
        for name, gradient in gradients(model, lambda: values_of(model, data)).items():
            close(gradient, expected[name], what=f"{how}: {name}")


def test_under_autocast_blocks_attend_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel, which rounds to 16 bits, is what it would be told apart from."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 40, 8, generator=generator)
    layout, module = Layout([[10, 6, 4], [12, 8]], query.device), nn.Module()

    def attended(autocast: bool) -> list[Tensor]:
        leaves = [states.clone().requires_grad_() for states in (query, key, value)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, _ = packed_attention(module, *leaves, None, packed=layout)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    def distance() -> float:
        return max(float((a - b).abs().max()) for a, b in zip(attended(True), attended(False), strict=True))

    monkeypatch.setattr("lm.logprobs.packing.DENSE_LIMIT", 0)
    assert distance() == 0
    monkeypatch.setattr("lm.logprobs.packing.KEPT_SCORES", 0)
    assert distance() > 1e-3


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from(list(CALLS)),
    st.integers(0, 2**20),
)
def test_any_lengths_number_of_completions_and_window(
    shape: list[tuple[int, list[int]]], window: int | None, how: str, seed: int
) -> None:
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(count)]

    data = [(tokens(prompt), [tokens(count) for count in counts]) for prompt, counts in shape]
    model = MODELS[window]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CALLS[how].items():
            patch.setattr(f"lm.logprobs.packing.{name}", value)
        got = values_of(model, data)
    with model.stock() as plain, torch.no_grad():
        close(got.detach(), plain_logps(plain, data))


MODELS = {w: wrap(causal_lm("mistral-sliding", sliding_window=w), "packed") for w in (None, 1, 2, 5)}


def test_the_mask_of_the_gpu_route_is_the_one_definition() -> None:
    """FlexAttention's block mask, unrolled, says what the definition says, token by token."""
    lengths = [[5, 3, 1], [1, 2], [130, 4, 4, 4]]
    layout = Layout(lengths, torch.device("cpu"))
    blocks = [(n, k, i) for n, e in enumerate(lengths) for k, count in enumerate(e) for i in range(count)]
    position = [i if k == 0 else lengths[n][0] + i for n, k, i in blocks]
    for window in (None, 4):
        mask = layout.flex_mask(window)
        tokens = torch.arange(layout.total)
        unrolled = mask.mask_mod(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None, :])
        expected = torch.tensor(
            [
                [
                    n == m and k2 in (0, k) and 0 <= position[q] - position[t] < (window or layout.total)
                    for t, (m, k2, _) in enumerate(blocks)
                ]
                for q, (n, k, _) in enumerate(blocks)
            ]
        )
        assert torch.equal(unrolled, expected)


@pytest.mark.parametrize("lengths", [[[5, 3, 1], [130, 4, 4]], [[400, 100, 37], [3, 300]], [[100, 28]]])
@pytest.mark.parametrize("window", [None, 4, 200])
def test_the_gpu_routes_mask_in_pieces_is_torchs(
    lengths: list[list[int]], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block as `create_block_mask` has it, which looks at all pairs of tokens at once."""
    for cells in (2**25, 3 * 128 * 128):
        monkeypatch.setattr("lm.logprobs.packing.MASK_CELLS", cells)
        layout = Layout(lengths, torch.device("cpu"))
        mask = layout.flex_mask(window)
        size = layout.total
        whole = flex_attention.create_block_mask(mask.mask_mod, None, None, size, size, device="cpu")
        assert mask.shape == whole.shape
        for kind in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
            for name in (kind, f"full_{kind}"):
                ours, theirs = getattr(mask, name), getattr(whole, name)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs), name


def test_two_kinds_of_layers_are_compiled_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one function torch compiles 8 versions; where FlexAttention is taken, more are allowed."""
    model = wrap(causal_lm())
    with torch._dynamo.config.patch(recompile_limit=8):
        model.settle(**collate([[2]], [[[3]]]))
        assert torch._dynamo.config.recompile_limit == 8
        # No accelerator here: the first way that one would try, and what comes of taking it.
        monkeypatch.setattr("lm.logprobs.completions.Trial", lambda *args: SimpleNamespace(packed=lambda *args: None))
        monkeypatch.setattr(model.model, "set_attn_implementation", lambda name: None)
        model.settle(**collate([[2]], [[[3]]]), device=torch.device("cuda"))
        assert model.sharing == ("flex_attention", False)
        assert torch._dynamo.config.recompile_limit == 64


@pytest.mark.parametrize("architecture", ["mistral-sliding", "gemma2", "gemma3"])
def test_the_gpu_route_gives_the_plain_forwards_values(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, not compiled, on the CPU (where it has no backward). With the wrong window it is caught."""

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        return flex_attention.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    model, data = causal_lm(architecture), examples()
    with torch.no_grad():
        expected = plain_logps(model, data)
        wrapped = wrap(model, "packed")
        wrapped._shared_attention = "flex_attention"
        wrapped.route = "packed"
        with wrapped._attention("flex_attention"):
            torch.testing.assert_close(values_of(wrapped, data), expected, rtol=1e-5, atol=1e-5)
            if WINDOW in (model.config.get_text_config().to_dict().get("sliding_window"),):
                flex_mask = Layout.flex_mask
                monkeypatch.setattr(Layout, "flex_mask", lambda self, window: flex_mask(self, None))
                assert ((values_of(wrapped, data) - expected).abs() > 1e-3).any()


# ---------------------------------------------------------------- controls


def test_a_completion_that_sees_its_sibling_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: Layout, query: Any, key: Any, window: int | None = None) -> Any:
        return (self.positions_T[query] >= self.positions_T[key]) & (self.examples_T[query] == self.examples_T[key])

    data = examples()
    right = values_of(wrap(causal_lm(), "packed"), data)
    monkeypatch.setattr(Layout, "sees", leaky)
    model = causal_lm()
    with pytest.raises(ValueError, match=r'logprobs.route "packed" does not fit LlamaForCausalLM: logps .* instead of'):
        values_of(wrap(model, "packed"), data)
    wrapped = wrap(model)
    close(values_of(wrapped, data), right)  # the trial notices, and the padded route is taken
    assert wrapped.route == "padded"
    wrapped.route = "packed"
    model.set_attn_implementation("lm_packed")
    assert ((values_of(wrapped, data) - right).abs() > 1e-3).any()


def test_a_window_shorter_than_the_rows_is_seen_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that ignores the window passes on short rows and is caught on long ones: the longest are tried."""

    def windowless(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return packed_attention(*args, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "lm_packed", windowless)
    short, long = [([3, 4], [[5, END], [6]])], [([3] * 9, [[5, END], [6]])]
    for data, route in ((short, "packed"), (long, "padded")):
        model = wrap(causal_lm("mistral-sliding"))
        values_of(model, data)
        assert model.route == route


@pytest.mark.parametrize("architecture", PADDED)
def test_an_architecture_that_cannot_be_packed_says_so(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    model = wrap(causal_lm(architecture))
    with caplog.at_level(logging.WARNING, "lm.logprobs"):
        values_of(model, examples())
    assert f"{type(model.model).__name__} takes the padded route, packed rows do not fit it: " in caplog.text
    with pytest.raises(ValueError, match=r'logprobs.route "packed" does not fit'):
        values_of(wrap(causal_lm(architecture), "packed"), examples())


@pytest.mark.parametrize("route", ROUTES)
def test_a_shifted_mask_is_noticed(route: Route) -> None:
    data = [row for row in examples() if len(row[0]) > 1]
    expected = {shift: plain_logps(causal_lm(), data, shift) for shift in (0, 2)}
    ours = values_of(wrap(causal_lm(), route), data)
    for other in expected.values():
        assert ((ours - other).abs() > 1e-3).all()


@pytest.mark.parametrize("route", ROUTES)
def test_the_sliding_window_is_honoured(route: Route) -> None:
    """The same weights without a window give other numbers, so the parity above says something about windows."""
    data = [(p, own) for p, own in examples() if len(p) > WINDOW + 2]
    windowed, full = causal_lm("mistral-sliding"), causal_lm("mistral-sliding", sliding_window=None)
    assert all(torch.equal(a, b) for a, b in zip(windowed.parameters(), full.parameters(), strict=True))
    difference = values_of(wrap(windowed, route), data) - values_of(wrap(full, route), data)
    assert (difference.abs() > 1e-3).all()


# ---------------------------------------------------------------- invariants


@pytest.mark.parametrize("route", ROUTES)
def test_order_company_and_sharing_change_nothing(route: Route) -> None:
    model, data = wrap(causal_lm(), route), examples()
    values = values_of(model, data)
    close(torch.cat([values_of(model, [row]) for row in data]), values)
    close(torch.cat([values_of(model, [(p, [c])]) for p, c in flat(data)]), values)
    turned = values_of(model, [(p, own[::-1]) for p, own in data[::-1]])
    close(turned.flip(0), values)


def test_lengths_count_completion_tokens_with_end_of_text() -> None:
    data = examples()
    for route in ROUTES:
        output = wrap(causal_lm(), route)(**collate([p for p, _ in data], [c for _, c in data]))
        assert output.lengths.tolist() == [len(c) for _, c in flat(data)]
        assert output.rewards is None


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_weights_sum_in_float32(dtype: torch.dtype, route: str) -> None:
    model = wrap(causal_lm().to(dtype), route)
    values = values_of(model, examples())
    assert values.dtype == torch.float32
    assert model.route == ("padded" if route == "padded" else "packed")
    exact = values_of(wrap(causal_lm()), examples())
    torch.testing.assert_close(values.double(), exact, rtol=0.05 if dtype.itemsize == 2 else 1e-4, atol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_keeps_float32_parameters_and_sums(route: Route) -> None:
    model = CompletionModel(causal_lm().float(), options=LogprobsConfig(route=route, autocast=True, allocator=False))
    values = values_of(model, examples())
    exact = values_of(wrap(causal_lm(), route), examples())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=0.05, atol=0)
    assert not torch.allclose(values.double(), exact, rtol=1e-6), "something was computed in bfloat16"
    assert all(g.dtype == torch.float32 for g in gradients(model, lambda: values_of(model, examples())).values())


@pytest.mark.parametrize("route", ROUTES)
def test_activation_checkpointing_changes_nothing(route: Route) -> None:
    model = wrap(causal_lm(), route).train()
    without = gradients(model, lambda: values_of(model, examples()))
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    for name, gradient in gradients(model, lambda: values_of(model, examples())).items():
        close(gradient, without[name], what=name)


@pytest.mark.parametrize("route", ROUTES)
def test_every_completion_of_two_tokens_has_its_share_of_probability(route: Route) -> None:
    """Referee without a second forward: the probabilities of all first tokens sum to one, and so do those of all
    second tokens after a first one."""
    model = wrap(causal_lm(), route)
    for prefix in ([], [9]):
        total = values_of(model, [([3, 4], [[*prefix, token] for token in range(VOCABULARY)])]).exp().sum()
        expected = values_of(model, [([3, 4], [prefix])]).exp().sum() if prefix else torch.ones((), dtype=torch.float64)
        close(total, expected)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompt", "own", "side"), [([], [[1]], "prompt"), ([2], [[]], "completion"), ([2], [], "completion")]
)
def test_an_empty_side_is_refused(prompt: list[int], own: list[list[int]], side: str) -> None:
    with pytest.raises(ValueError, match=f"row 1 has an empty {side}; prompt and completion need at least one token"):
        collate([[2], prompt], [[[1]], own])


def test_models_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="a reward model has one label, but LlamaForSequenceClassification has 2"):
        CompletionModel(reward_model(num_labels=2))
    with pytest.raises(ValueError, match="LlamaModel has neither a language-model head nor a `score` head"):
        CompletionModel(causal_lm().base_model)
