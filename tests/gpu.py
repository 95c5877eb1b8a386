"""Every check that needs an accelerator, in under ten minutes: `python -m tests.gpu [--only WORD]`.

Prints pass, FAIL or not applicable for each, by name, and exits with 1 where one fails. Where there is no accelerator
none applies. A check is a function of the device, so `tests/gpu_test.py` runs them on the CPU. References are float64,
on the CPU, by transformers' plain forward.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm.config import Config, DataConfig, LogprobsConfig
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.generation import cache_size
from lm.logprobs.packing import Layout
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_rows
from lm.models.loading import load_tokenizer, state_of
from lm.objectives import DPO
from lm.studies.parity import Example, examples, plain_logps, rows_of, values
from lm.training.batches import pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from tests.tiny import END, PACKED, VOCABULARY, causal_lm, pairs, training

SECONDS = 540
"""After which no further check is begun."""
OFF, OFF_16 = 1e-3, 0.05
"""Nats a token that float32, and products in bfloat16, may be off."""
ON_THE_GPU = (*PACKED, "bloom", "mamba", "lfm2")
LONG = 8192
"""Tokens of a long row."""

Check = Callable[[torch.device], str]
"""Returns what it measured; AssertionError where it does not hold, NotApplicable where there is nothing to check."""


class NotApplicable(Exception):
    """Says why a check has nothing to check here."""


# ---------------------------------------------------------------- numbers


def tried(prompt: int = 20) -> list[Example]:
    """Examples of several completions."""
    return examples(range(2, VOCABULARY), END, completions=3, prompt=prompt)


def here(architecture: str, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model."""
    return causal_lm(architecture).to(device=device, dtype=dtype)


def a_token(got: Tensor, right: Tensor, rows: Sequence[Example]) -> float:
    """The largest difference, nats a token and in proportion to the number's size."""
    counts = torch.tensor([len(own) for _, own in rows_of(rows)])
    return float(((got.detach().cpu().double() - right).abs() / (counts + right.abs())).max())


def settled(model: CompletionModel, rows: Sequence[Example]) -> CompletionModel:
    """With its route, by a trial on these rows."""
    batch = collate([prompt for prompt, _ in rows], [own for _, own in rows])
    model.settle(batch["input_ids"], batch["lengths"])
    return model


def route(device: torch.device, architecture: str) -> str:
    """Log-probs by the route that is settled are those of the plain forward on the CPU, and it is the fast one."""
    rows = tried()
    with torch.no_grad():
        right = plain_logps(causal_lm(architecture), rows)
        model = settled(CompletionModel(here(architecture, device)), rows)
        assert model.route is not None
        off = a_token(values(model, rows, model.route), right, rows)
    assert off < OFF, f"off by {off:.2g} nats a token, {model.route}"
    expected = "packed" if architecture in PACKED else "padded"
    assert model.route == expected, f"takes the {model.route} route: {model.reason}"
    return f"{model.route} by {model.model.config._attn_implementation}, off by {off:.1g} nats a token"


def gradient(device: torch.device, architecture: str) -> str:
    """Gradients of packed rows are those of plain forwards on the CPU."""
    rows, exact = tried(), causal_lm(architecture)
    (-plain_logps(exact, rows).sum()).backward()
    model = settled(CompletionModel(here(architecture, device)), rows)
    assert model.route == "packed", model.reason
    (-values(model, rows, "packed").sum()).backward()
    right = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in right.values())
    off = max(
        float((p.grad.cpu().double() - right[name]).abs().max()) / scale
        for name, p in model.model.named_parameters()
        if p.grad is not None
    )
    assert off < OFF, f"off by {off:.2g} of the largest entry"
    return f"off by {off:.1g} of the largest entry"


def autocast(device: torch.device, architecture: str) -> str:
    """Products in bfloat16 over float32 parameters: near the exact numbers, summed in float32, distinct."""
    rows = tried()
    with torch.no_grad():
        right = plain_logps(causal_lm(architecture), rows)
        model = CompletionModel(here(architecture, device), options=LogprobsConfig(autocast=True, allocator=False))
        settled(model, rows)
        assert model.route == "packed", model.reason
        got = values(model, rows, "packed")
    assert got.dtype == torch.float32, f"log-probs are {got.dtype}"
    off = a_token(got, right, rows)
    assert 1e-6 < off < OFF_16, f"off by {off:.2g} nats a token"
    return f"off by {off:.1g} nats a token"


def compiled(device: torch.device) -> str:
    """FlexAttention stays compiled for two kinds of mask, both modes and many shapes of Gemma 3."""
    if device.type != "cuda":
        raise NotApplicable("FlexAttention is for CUDA")
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with tempfile.TemporaryDirectory(), _warnings_of("torch._dynamo") as said:
        for name in ("gemma2", "gemma3"):
            model = settled(CompletionModel(here(name, device)), tried())
            for prompt in (18, 40, 70, 100):
                for mode in (True, False):
                    rows = tried(prompt)
                    with torch.set_grad_enabled(mode):
                        got = values(model.train(mode), rows, "packed").sum()
                    if mode:
                        got.backward()
    assert not any("recompile_limit" in line for line in said), said[0]
    return f"{len(said)} warnings of the compiler"


def mask_memory(device: torch.device) -> str:
    """The mask of a long row is made in far less memory than one int64 for each pair of tokens."""
    layout = Layout([[LONG // 2, LONG // 4, LONG // 4]], device)
    peak = peak_of(device, lambda: layout.flex_mask(None))
    assert peak < LONG**2 * 2, f"{peak / 2**20:.0f} MiB for {LONG} tokens"
    return f"{peak / 2**20:.0f} MiB for {LONG} tokens"


def peak_of(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that work takes at most, beside what is there."""
    if device.type != "cuda":
        raise NotApplicable(f"{device} does not tell the peak of its memory")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)


# ---------------------------------------------------------------- training, sampling, saving


def trained(device: torch.device) -> str:
    """Three steps of DPO end where they end on the CPU in float64."""
    ends = []
    for where, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        with tempfile.TemporaryDirectory() as folder:
            model = CompletionModel(here("llama", where, dtype))
            kind = "cpu" if where.type == "cpu" else "auto"
            arguments = training_arguments(training(max_steps=3), Path(folder), seed=3, device=kind)
            history = fit(PolicyTrainer, model, pairs(8), pair_collator(), arguments, method=DPO())
        ends.append([line["loss"] for line in history if "loss" in line])
    off = max(abs(one - other) / (1 + abs(other)) for one, other in zip(*reversed(ends), strict=True))
    assert len(ends[0]) == 3
    assert off < OFF, f"losses {ends[1]} instead of {ends[0]}"
    return f"losses off by {off:.1g}"


def released(device: torch.device) -> str:
    """A model is gone, and its memory free, when the next one is opened after its training."""

    def stage(folder: Path) -> weakref.ref[CompletionModel]:
        model = CompletionModel(here("llama", device))
        kind = "cpu" if device.type == "cpu" else "auto"
        arguments = training_arguments(training(), folder, seed=3, device=kind)
        fit(PolicyTrainer, model, pairs(8), pair_collator(), arguments, method=DPO())
        return weakref.ref(model)

    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            model = stage(Path(folder) / str(turn))
            gc.collect()  # as `lm.models.loading.open_weights` does
            assert model() is None, "a model is alive after its training"
            sizes.append(torch.cuda.memory_allocated() if device.type == "cuda" else 0)
    assert sizes[1] <= sizes[0], f"bytes after each training: {sizes}"
    return f"{sizes[1]:,} bytes after each training"


def tied(device: torch.device) -> str:
    """Tied tensors are copied from the device once, and saved once."""
    model = causal_lm("llama", tie_word_embeddings=True).to(device)
    state = state_of(model)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr(), "two copies of one"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state)
        saved = safetensors.torch.load_file(Path(folder) / "model.safetensors")
    both = {"lm_head.weight", "model.embed_tokens.weight"} & saved.keys()
    assert len(both) == 1, f"saved are {sorted(both)}"
    return f"saved as {both.pop()}"


def scored(device: torch.device) -> str:
    """Scores are float64 on the CPU, also from devices that have none (MPS), and the exact ones."""
    rows = tried()
    prompts, own = zip(*rows_of(rows), strict=True)
    with torch.no_grad():
        right = plain_logps(causal_lm(), rows)
    got = score_rows(CompletionModel(here("llama", device)), prompts, own, "scores")
    assert (got.dtype, got.device.type) == (torch.float64, "cpu"), (
        f"scores are {got.dtype} on {got.device}, not float64"
    )
    off = a_token(got, right, rows)
    assert off < OFF, f"off by {off:.2g} nats a token"
    return f"off by {off:.1g} nats a token"


def sampled(device: torch.device, *, draws: int = 4096) -> str:
    """Samples of prompts of unequal lengths in one batch have the probabilities of the plain forward; the same seed
    draws the same; nothing else that is drawn shifts."""
    model, exact = CompletionModel(here("llama", device)), causal_lm()
    tokenizer, options = load_tokenizer("scratch:tiny", ("a b",), False), _run(sampling_tokens=1)
    tokenizer.eos_token_id, tokenizer.pad_token_id = END, 0  # of the tiny vocabulary
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    many = [prompt for prompt in prompts for _ in range(draws // 2)]
    before = torch.random.get_rng_state(), _accelerators_state(device)
    first = sample_completions(model, many, tokenizer, options, seed=7, what="samples")
    again = sample_completions(model, many, tokenizer, options, seed=7, what="samples")
    assert first == again, "the same seed draws other samples"
    assert torch.equal(before[0], torch.random.get_rng_state()), "the CPU's generator was moved"
    assert torch.equal(before[1], _accelerators_state(device)), "the device's generator was moved"
    off = 0.0
    for at, prompt in enumerate(prompts):
        with torch.no_grad():
            probs = exact(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(0)
        drawn = torch.tensor([tokens[0] for tokens in first[at * draws // 2 : (at + 1) * draws // 2]])
        share = torch.bincount(drawn, minlength=VOCABULARY).double() / (draws // 2)
        off = max(off, float((share - probs).abs().sum()) / 2)
    expected = (VOCABULARY / (draws // 2)) ** 0.5  # the total variation of so many draws is about half of that
    assert off < expected, f"total variation {off:.3f}, chance explains {expected / 2:.3f}"
    return f"total variation {off:.3f}, chance explains {expected / 2:.3f}"


def sampled_autocast(device: torch.device) -> str:
    """Under `logprobs.autocast` sampling multiplies in bfloat16, as scoring does."""
    model = CompletionModel(here("llama", device), options=LogprobsConfig(autocast=True, allocator=False))
    tokenizer, seen = load_tokenizer("scratch:tiny", ("a b",), False), set[torch.dtype]()
    tokenizer.eos_token_id, tokenizer.pad_token_id = END, 0
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    hook = layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    try:
        sample_completions(model, [[5, 6, 7], [8, 9]], tokenizer, _run(sampling_tokens=3), seed=0, what="samples")
    finally:
        hook.remove()
    # The trial before the draws computes in float32, by a copy or without autocast.
    assert torch.bfloat16 in seen, f"products are in {seen}"
    return "products are in bfloat16"


def cache_estimate(device: torch.device) -> str:
    """What the cache of a batch is thought to take, by which `sampling.batch_size` is cut, is what it takes."""
    rows, tokens = 64, 512
    model = causal_lm(hidden_size=64, num_attention_heads=2, num_hidden_layers=16, max_position_embeddings=2 * tokens)
    model = model.to(device=device, dtype=torch.float32)
    estimate = rows * cache_size(model.config, tokens, 4)
    ids = torch.full((rows, tokens - 2), 5, device=device)
    mask = torch.ones_like(ids)
    peak = peak_of(
        device, lambda: model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    )
    assert estimate / 2 < peak < 4 * estimate, f"{peak / 2**20:.0f} MiB, thought {estimate / 2**20:.0f}"
    return f"{peak / 2**20:.0f} MiB, thought {estimate / 2**20:.0f}"


def _accelerators_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.random.get_rng_state()
    state: Tensor = getattr(torch, device.type).get_rng_state()
    return state


def _run(sampling_tokens: int) -> Config:
    once: Any = training()
    return Config(
        output_dir="-",
        model="scratch:tiny",
        sft=once,
        oracle=once,
        reward=once,
        policy=once,
        data=DataConfig(max_completion_length=sampling_tokens),
    )


# ---------------------------------------------------------------- all of them

CHECKS: dict[str, Check] = {
    **{f"route {name}": partial(route, architecture=name) for name in ON_THE_GPU},
    **{f"gradient {name}": partial(gradient, architecture=name) for name in ("llama", "gemma3", "qwen3-moe")},
    **{f"autocast {name}": partial(autocast, architecture=name) for name in ("llama", "gemma2", "gpt-oss")},
    "flex-attention stays compiled": compiled,
    "mask of a long row": mask_memory,
    "training as on the CPU": trained,
    "memory between stages": released,
    "tied tensors saved once": tied,
    "scores": scored,
    "samples": sampled,
    "samples under autocast": sampled_autocast,
    "cache of a batch": cache_estimate,
}


class _warnings_of:
    """The warnings that a logger gives inside."""

    def __init__(self, name: str) -> None:
        self.logger, self.said = logging.getLogger(name), list[str]()
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]

    def __enter__(self) -> list[str]:
        self.logger.addHandler(self.handler)
        return self.said

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self.handler)


def run(checks: dict[str, Check], device: torch.device | None) -> int:
    """Prints a line for each check; the exit status.

    Args:
        checks: by name.
        device: None where there is no accelerator.
    """
    began, failed = time.monotonic(), 0
    for name, check in checks.items():
        start = time.monotonic()
        try:
            if device is None:
                raise NotApplicable("there is no accelerator")
            if start - began > SECONDS:
                raise AssertionError(f"not begun: {SECONDS} s are over")
            outcome, said = "pass", check(device)
        except NotApplicable as why:
            outcome, said = "not applicable", str(why)
        except Exception as error:  # whatever a device makes of it, the other checks go on
            failed += 1
            outcome, said = "FAIL", f"{type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        print(f"{outcome:14}  {name:32}  {time.monotonic() - start:5.1f} s  {said}", flush=True)
    print(f"{len(checks)} checks, {failed} failed")
    return int(failed > 0)


def main(arguments: Iterable[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", metavar="WORD", default="", help="checks with this in their name")
    options = parser.parse_args(None if arguments is None else list(arguments))
    chosen = {name: check for name, check in CHECKS.items() if options.only in name}
    if not chosen:
        parser.error(f"--only {options.only}: there are {', '.join(CHECKS)}")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return run(chosen, torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None)


if __name__ == "__main__":
    sys.exit(main())
