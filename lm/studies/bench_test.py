"""The benchmark's arithmetic, its data, and one run of it on a very small model. No speed is asserted."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lm import bench as door
from lm.base import progress
from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.packing import Layout
from lm.studies import bench, bench_plan, bench_workers, loaded, varlen
from lm.studies.bench import Worker
from lm.studies.bench_plan import TLDR, VARIANTS, Job, Shape, Turn, Work, Workload, useful_flops
from lm.training.batches import pair_collator

MICRO = Shape(hidden=16, layers=2, heads=2, intermediate=24, vocabulary=50)
GROUPED = Shape(hidden=16, layers=2, heads=4, kv_heads=2, head_size=8, intermediate=24, vocabulary=50)


def job(name: str = "ours", **changes: Any) -> Job:
    fields = {"shape": MICRO, "workload": TLDR, "turns": 3, "steps": 2, "threads": 1, **changes}
    return Job(variant=VARIANTS[name], **fields)


# ---------------------------------------------------------------- operations


def test_operations_of_one_pair_by_hand() -> None:
    shape = Shape(hidden=2, layers=3, heads=1, intermediate=4, vocabulary=5)
    # A layer: q, k, v, o of 2x2 and gate, up, down of 2x4 are 40 weights, on 5 tokens. Query-key pairs: the prompt's 3;
    # a completion of 1 sees 2 + 1; one of 2 sees 2 + 1 and 2 + 2. Scores, mixing: 2 * 2 operations each.
    layer = 2 * 40 * 5 + 2 * (2 * 2) * (3 + 3 + 7)
    head = 2 * 2 * 5 * 3  # on three completion tokens
    assert useful_flops(shape, 2, [1, 2], head=True, backward=False) == 3 * layer + head
    assert useful_flops(shape, 2, [1, 2], head=False, backward=False) == 3 * layer
    assert useful_flops(shape, 2, [1, 2], head=True, backward=True) == 3 * (3 * layer + head)
    # Control: two prompts instead of one.
    apart = [useful_flops(shape, 2, [count], head=True, backward=False) for count in (1, 2)]
    assert sum(apart) > 3 * layer + head


@pytest.mark.parametrize("shape", [MICRO, GROUPED], ids=["all heads", "grouped"])
def test_operations_are_those_that_torch_counts(shape: Shape) -> None:
    """Products of the real forward and backward; attention by the layout's own rule."""
    prompt, counts = 7, [3, 5]
    batch = collate([[2] * prompt], [[[3] * count for count in counts]])
    model = CompletionModel(bench_workers.make_model(shape, 32), options=LogprobsConfig(onednn="off", allocator=False))
    model.settle(**batch)
    model._last_layer.on = False  # the count is of the plain computation
    with FlopCounterMode(display=False) as counter:
        logps = model(**batch).logps
        assert logps is not None
        logps.sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    layout = Layout(batch["lengths"], torch.device("cpu"))
    tokens = torch.arange(layout.total)
    looks = int(layout.sees(tokens[:, None], tokens[None]).sum())
    attention = 3 * shape.layers * 4 * shape.attention[0] * looks
    assert useful_flops(shape, prompt, counts, head=True, backward=True) == products + attention


@pytest.mark.parametrize("reward", [False, True])
def test_a_pretrained_model_is_taken_with_its_weights_and_must_have_the_shape_that_is_counted(
    reward: bool, tmp_path: Path
) -> None:
    made = bench_workers.make_model(GROUPED, 32)
    made.get_input_embeddings().weight.data.fill_(0.25)
    made.save_pretrained(tmp_path)
    kept = bench_workers.make_model(replace(GROUPED, model=str(tmp_path)), 32, reward=reward)
    assert (kept.get_input_embeddings().weight == 0.25).all()
    with pytest.raises(ValueError, match=r"attention\) \(16, 2, 24, 50, \(32, 16\)\), not Shape.*kv_heads=4"):
        bench_workers.make_model(replace(GROUPED, kv_heads=4, model=str(tmp_path)), 32, reward=reward)


def test_pretrained_models_are_measured_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(plan: bench.Plan, config: str, *_: Any) -> list[dict[str, Any]]:
        ran.append(config)
        return []

    monkeypatch.setattr(bench.Plan, "run", run)
    both = {"micro": MICRO, "known": replace(MICRO, model="real:gpt5")}
    door.main(["--variants", "ours"], configs=both)
    assert ran == ["micro"]
    assert door.main(["--variants", "ours", "--configs", "known"], configs=both) == 2
    assert "model 'real:gpt5': the models from packages are real:smollm2, real:gemma3" in capsys.readouterr().err


# ---------------------------------------------------------------- data


def test_timed_rows_follow_a_batch_that_is_not_and_never_overlap() -> None:
    turns = [list(job().timed(turn)) for turn in range(3)]
    assert turns == [list(range(8, 24)), list(range(32, 48)), list(range(56, 72))]
    assert len(job().data()) == 72


def test_work_of_a_turn_counts_the_rows_of_that_turn() -> None:
    data = job("kl-ours", workload=replace(TLDR, completions=3)).data()
    works = bench_plan.work_of(job("kl-ours", workload=replace(TLDR, completions=3)))
    tokens = [
        sum(
            len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) + len(r["sample_ids"][0]) for r in rows
        )
        for rows in ([data[i] for i in range(32, 48)], [data[i] for i in range(56, 72)])
    ]
    assert [work.tokens for work in works] == tokens
    assert [work.pairs for work in works] == [16, 16]
    assert tokens[0] != tokens[1]  # control: the turns can be told apart


def test_scoring_and_reward_models_count_less() -> None:
    flops = {
        name: bench_plan.work_of(job(name))[0].flops for name in ("ours", "score-ours", "reward-ours", "reward-trl")
    }
    assert flops["ours"] == 3 * flops["score-ours"]
    assert flops["reward-ours"] == flops["reward-trl"] < flops["ours"]


def test_lengths_are_like_tldr_or_all_alike() -> None:
    data = bench_plan.make_pairs(TLDR, 50, 400)
    prompts = sorted(len(row["prompt_ids"]) for row in data)
    assert 150 <= prompts[0] < prompts[200] == pytest.approx(340, rel=0.1)
    assert prompts[-1] <= 500
    alike = bench_plan.make_pairs(Workload(prompt=9, completion=4, completions=4, spread=False), 50, 5)
    assert {(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in alike} == {(9, 4, 4)}
    assert {tuple(map(len, row["sample_ids"])) for row in alike} == {(4, 4)}
    assert list(alike) == list(
        bench_plan.make_pairs(Workload(prompt=9, completion=4, completions=4, spread=False), 50, 5)
    )


def test_unshared_rows_have_the_same_log_probs() -> None:
    data = bench_plan.make_pairs(Workload(prompt=9, completion=4, completions=3, spread=False), 50, 3)
    model = CompletionModel(
        bench_workers.make_model(MICRO, 32).double(), options=LogprobsConfig(onednn="off", allocator=False)
    )
    logps = []
    for collator in (pair_collator(sample=True), bench_workers._unshared(pair_collator(sample=True))):
        batch = collator(list(data))
        logps.append(model(batch["input_ids"], batch["lengths"]).logps)
    assert batch["lengths"] == [[9, 4]] * 9
    torch.testing.assert_close(logps[0], logps[1], rtol=0, atol=1e-6)  # RMSNorm and rotary angles are in float32
    assert (logps[0] - logps[1].roll(1)).abs().max() > 1e-3  # control: the order matters


# ---------------------------------------------------------------- medians and ratios


def test_ratios_are_of_the_same_round_and_rates_are_medians() -> None:
    took = {
        "trl": [Turn(2.0, 100.0), Turn(40.0, 300.0), Turn(8.0, 200.0)],
        "trl-tuned": [Turn(1.0, None), Turn(10.0, None), Turn(2.0, None)],
        "ours": [Turn(1.0, 10.0), Turn(5.0, 30.0), Turn(4.0, 20.0)],
    }
    works = {name: [Work(4, 100, 10**9), Work(8, 100, 10**9), Work(4, 100, 10**9)] for name in took}
    rows = {row["variant"]: row for row in bench.summarise("S8", {n: VARIANTS[n] for n in took}, took, works, {})}
    ours = rows["ours"]
    assert (ours["ratio_trl"], ours["ratio_trl_tuned"]) == (2.0, 1.0)  # of 2, 8, 2, and of 1, 2, 0.5
    assert ours["pairs_per_s"] == 1.6  # of 4, 1.6, 1
    assert ours["tokens_per_s"] == 25.0  # of 100, 20, 25
    assert ours["gflop_per_s"] == 0.25
    assert ours["peak_mb"] == 30.0
    assert ours["of_sustained"] is None
    assert rows["trl"]["ratio_trl"] == 1.0
    assert rows["trl"]["ratio_trl_tuned"] == 0.25
    assert rows["trl-tuned"]["peak_mb"] is None
    assert ours["ratio_unshared"] is None
    assert ours["spread"]["ratio_trl"] == [2.0, 8.0]
    assert ours["spread"]["pairs_per_s"] == [1.0, 4.0]
    assert bench._cell(ours["pairs_per_s"], ".2f", ours["spread"]["pairs_per_s"]) == "1.60 [1.00, 4.00]"
    # Control: the ratio of the medians is another number.
    assert ours["pairs_per_s"] / rows["trl"]["pairs_per_s"] == pytest.approx(3.2)


def test_stages_are_compared_with_their_own_peers() -> None:
    took = {"kl-ours": [Turn(1.0, None)], "kl-ours-unshared": [Turn(3.0, None)]}
    rows = bench.summarise("S8", {n: VARIANTS[n] for n in took}, took, {n: [Work(1, 1, 1)] for n in took}, {})
    assert [row["ratio_unshared"] for row in rows] == [3.0, 1.0]
    assert [row["ratio_trl"] for row in rows] == [None, None]


def test_bfloat16_is_held_against_bfloat16_and_a_rate_against_the_products_of_its_round() -> None:
    names = ["trl-tuned", "trl-tuned-bf16", "ours-bf16"]
    took = {name: [Turn(2.0, None, 4.0), Turn(3.0, None, 1.0)] for name in names}
    took["ours-bf16"] = [Turn(1.0, None, 4.0), Turn(1.0, None, 1.0)]
    works = {name: [Work(1, 1, 10**9)] * 2 for name in names}
    *_, ours = bench.summarise("S8", {n: VARIANTS[n] for n in names}, took, works, {})
    assert ours["spread"]["ratio_trl_tuned"] == [2.0, 3.0]
    assert ours["spread"]["of_sustained"] == [0.25, 1.0]
    del took["trl-tuned-bf16"]
    *_, alone = bench.summarise("S8", {n: VARIANTS[n] for n in took}, took, works, {})
    assert alone["ratio_trl_tuned"] is None, "float32 is another computation"


def test_the_products_of_a_step_are_what_is_counted_without_attention() -> None:
    middle = replace(TLDR, spread=False)
    counted = useful_flops(GROUPED, middle.prompt, [middle.completion] * 2, head=True, backward=False)
    looks = middle.prompt * (middle.prompt + 1) // 2
    looks += 2 * (middle.completion * middle.prompt + middle.completion * (middle.completion + 1) // 2)
    attention = GROUPED.layers * 4 * GROUPED.attention[0] * looks
    done = sum(2 * a * k * b for a, k, b in bench.products_of(job(shape=GROUPED, workload=middle, pairs=3)))
    assert done == 3 * (counted - attention)
    assert bench.sustained(job(shape=GROUPED, workload=replace(middle, prompt=2)), "float32") > 0


def test_sampling_is_compared_by_the_token() -> None:
    took = {"sample-generate": [Turn(2.0, None, 4.0, 10)], "sample-ours": [Turn(1.0, None, 4.0, 20)]}
    works = bench_plan.work_of(job("sample-ours", turns=2))
    theirs, ours = bench.summarise("S8", {n: VARIANTS[n] for n in took}, took, dict.fromkeys(took, works), {})
    assert (theirs["tokens_per_s"], ours["tokens_per_s"], ours["pairs_per_s"]) == (5.0, 20.0, 16.0)
    assert (theirs["ratio_generate"], ours["ratio_generate"]) == (1.0, 4.0)
    assert ours["gflop_per_s"] is ours["of_sustained"] is None
    said = bench._ratios_in_words({name: turns[0] for name, turns in took.items()})
    assert said == "sample-ours 4.00 x sample-generate"


@pytest.mark.parametrize("name", ["sample-generate-tuned", "sample-ours"])
def test_both_ways_of_sampling_draw_as_much(name: str) -> None:
    """Any token may be the last, so that half of the samples have up to 3 tokens; none has more than 6."""
    sent: list[Turn] = []
    lengths = Workload(prompt=6, completion=3, prompts=(2, 9), of_completions=(1, 6))
    own = job(name, workload=lengths, turns=2, steps=1, pairs=50)
    turns = bench_workers.Turns(own, SimpleNamespace(recv=lambda: None, send=sent.append))  # type: ignore[arg-type]
    bench_workers.RUNS[own.variant.run](own, turns)
    chance = 1 - 0.5 ** (1 / 3)
    assert [turn.drawn / 200 for turn in sent if turn.drawn] == pytest.approx([(1 - 0.25) / chance] * 2, abs=0.6)


def test_every_variant_has_the_peers_that_it_is_compared_with() -> None:
    for name, variant in VARIANTS.items():
        if variant.stage != "policy":
            assert name.startswith(f"{variant.stage}-")
        if variant.samples:
            assert {f"{variant.stage}-generate", f"{variant.stage}-generate-tuned"} <= set(VARIANTS)
        elif not variant.stage.startswith("kl"):
            assert ("trl" if variant.stage == "policy" else f"{variant.stage}-trl") in VARIANTS
    assert set(bench_plan.QUICK) | set(bench_plan.CURVES) <= set(VARIANTS)


# ---------------------------------------------------------------- rounds as they come


class Clocked:
    """A `Worker` without a process, whose clock says what a test has it say."""

    SECONDS: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.took = name, list[Turn]()

    def __enter__(self) -> Clocked:
        return self

    def __exit__(self, *_: object) -> None: ...

    def turn(self, product: float | None = None) -> None:
        self.took.append(Turn(self.SECONDS[self.name][len(self.took)], None, product))


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Variant -> seconds of each turn, to be filled in."""
    Clocked.SECONDS = {}
    monkeypatch.setattr(bench, "Worker", Clocked)
    monkeypatch.setattr(bench, "gemm_peak", lambda peaks, *_: peaks.update(dict.fromkeys(peaks, 1.0)))
    monkeypatch.setattr(bench, "sustained", lambda *_: 1.0)
    monkeypatch.setattr(bench, "trl_installed", lambda: True)
    return Clocked.SECONDS


def test_each_round_is_said_when_it_is_over(
    clocks: dict[str, list[float]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_quiet", False)
    clocks |= {"trl-tuned": [9.0, 4.0, 6.0], "ours": [9.0, 2.0, 2.0]}
    bench.run_rounds({name: job(name) for name in clocks}, {"float32": 1.0}, "S8, policy")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "round" in line] == [
        "S8, policy, round 1 of 2: ours 2.00 x trl-tuned",
        "S8, policy, round 2 of 2: ours 3.00 x trl-tuned",
    ], "the first, in which everything warms up, is not counted"
    clocks |= {"ours": [1.0, 1.5, 2.0]}
    bench.run_rounds({"ours": job()}, {"float32": 1.0}, "alone")
    assert "alone, round 1 of 2: ours 1.50 s" in capsys.readouterr().err


def test_pretrained_models_have_a_process_a_turn_and_pairs_of_its_own(
    clocks: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time is in memory, and the first round, which would be to warm up, is left out."""
    clocks |= {"trl-tuned": [4.0], "ours": [2.0]}
    began: list[tuple[str, int, int]] = []

    class Counted(Clocked):
        alive: ClassVar[int] = 0

        def __init__(self, name: str, job: Job) -> None:
            super().__init__(name, job)
            began.append((name, job.turns, job.seed))

        def __enter__(self) -> Counted:
            Counted.alive += 1
            assert Counted.alive == 1
            return self

        def __exit__(self, *_: object) -> None:
            Counted.alive -= 1

    monkeypatch.setattr(bench, "Worker", Counted)
    jobs = {name: job(name, shape=replace(MICRO, model="-")) for name in clocks}
    took = bench.run_rounds(jobs, {"float32": 1.0})
    assert began == [("trl-tuned", 1, 1), ("ours", 1, 1), ("trl-tuned", 1, 2), ("ours", 1, 2)]
    assert {name: len(turns) for name, turns in took.items()} == {"trl-tuned": 2, "ours": 2}
    works = bench_plan.work_of(jobs["ours"])
    rows = [jobs["ours"].only(turn).data().select(range(8, 24)) for turn in (1, 2)]
    assert [work.tokens for work in works] == [
        sum(len(r[name]) for r in each for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for each in rows
    ]
    assert works[0].tokens != works[1].tokens  # control


@pytest.mark.parametrize(("last", "status"), [(3.9, 0), (6.1, 1)])
def test_rounds_that_disagree_by_more_than_half_are_an_error(
    last: float, status: int, clocks: dict[str, list[float]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clocks |= {"trl-tuned": [9.0, 4.0, 4.0, last], "ours": [9.0, 1.0, 1.0, 1.0]}
    results = tmp_path / "results.json"
    options = ["--quick", "--variants", *clocks, "--threads", "1", "--json", str(results)]
    assert door.main(options, configs={"S8": MICRO}) == status
    told = capsys.readouterr().err
    rows = {row["variant"]: row for row in json.loads(results.read_text())["rows"]}
    assert rows["ours"]["spread"]["ratio_trl_tuned"] == [min(4.0, last), max(4.0, last)], (
        "they are written all the same"
    )
    assert ("two rounds disagree by more than half: S8, ours x trl-tuned: from 4.00 to 6.10" in told) == bool(status)


def test_a_loaded_machine_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_quiet", False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(loaded, "STAT", tmp_path / "stat")

    def looked(user: int, steal: int) -> loaded.Ticks | None:
        (tmp_path / "stat").write_text(f"cpu  {user} 0 10 100 5 0 5 {steal} 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
        return loaded.ticks()

    before, after = looked(80, 0), looked(120, 60)
    assert (before, after) == ((200, 0), (300, 60)), "a guest's time is in user's already"
    assert loaded.stolen(before, after) == 0.6
    assert loaded.stolen(None, after) is None
    (tmp_path / "stat").unlink()
    assert loaded.ticks() is None
    for load, share, told in ((0.9, 0.04, 0), (1.0, None, 1), (8.0, 0.6, 2)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        loaded.warn_of_queue()
        loaded.warn_of_steal(share)
        assert capsys.readouterr().err.count("warning") == told
    assert loaded.queue() == 2.0


# ---------------------------------------------------------------- processes


def test_a_worker_that_fails_is_named_with_its_traceback() -> None:
    here, there = multiprocessing.Pipe()
    worker = Worker("ours", job())
    worker.connection, worker.process = here, SimpleNamespace(exitcode=-9, join=lambda: None)  # type: ignore[assignment]
    there.send("Traceback: no such thing")
    with pytest.raises(RuntimeError, match="ours failed:\nTraceback: no such thing"):
        worker.turn()
    there.close()
    with pytest.raises(RuntimeError, match="ours: its process died, exit status -9"):
        worker.turn()
    assert worker.took == []


# ---------------------------------------------------------------- the command


def test_a_process_is_ended_before_it_could_complain_of_its_connection() -> None:
    worker, done = Worker("ours", job()), Mock()
    worker.process, worker.connection = done.process, done.connection
    worker.__exit__(KeyboardInterrupt)
    assert [call[0] for call in done.method_calls] == ["process.terminate", "connection.close", "process.join"]
    done.reset_mock()
    worker.__exit__(None)
    assert [call[0] for call in done.method_calls] == ["connection.close", "process.join"]


@pytest.mark.thorough
@pytest.mark.parametrize("peers", [[], ["trl"]])
def test_quick_run_in_processes_of_their_own(
    peers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{bench.BEGIN_MARK}\nold\n{bench.END_MARK}\nafter\n")
    names = ["ours", *(peers if bench_plan.trl_installed() else [])]
    options = ["--quick", "--rounds", "1", "--steps", "1", "--threads", "1", "--variants", *names]
    assert door.main([*options, "--json", str(results), "--markdown", str(page)], configs={"S8": MICRO}) == 0
    document = json.loads(results.read_text())
    assert [(row["config"], row["variant"], row["stage"]) for row in document["rows"]] == [
        ("S8", name, "policy") for name in names
    ]
    for row in document["rows"]:
        assert row["pairs_per_s"] > 0
        assert row["tokens_per_s"] > 150 * row["pairs_per_s"]
        assert 0 < row["gflop_per_s"] < document["machine"]["gemm_gflop_per_s"]["float32"]
        assert row["peak_mb"] is None or row["peak_mb"] > 50
        assert row["ratio_trl_tuned"] is None
        assert (row["ratio_trl"] is not None) == ("trl" in names)
    assert document["curves"] == []
    assert document["machine"]["threads"] == 1
    table = capsys.readouterr().out
    text = page.read_text()
    assert text == f"before\n{bench.BEGIN_MARK}\n{table.strip()}\n{bench.END_MARK}\nafter\n"
    assert "| S8 " in text
    assert "| ours " in text


def test_without_trl_its_rows_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "trl_installed", lambda: False)
    options = ["--quick", "--variants", "trl", "score-trl", "--threads", "1"]
    assert door.main(options, configs={"S8": MICRO}) == 0
    assert capsys.readouterr().out.count("trl not installed") == 2


def test_bfloat16_is_left_out_where_it_is_slower_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def rounds(jobs: dict[str, Job], *_: Any) -> dict[str, list[Turn]]:
        asked.extend(jobs)
        return {name: [Turn(1.0, None)] * 5 for name in jobs}

    def slow(peaks: dict[str, float], *_: str) -> None:
        peaks.update({name: 2.0 if name == "float32" else 1.0 for name in peaks})

    monkeypatch.setattr(bench, "run_rounds", rounds)
    monkeypatch.setattr(bench, "gemm_peak", slow)
    assert door.main(["--configs", "S8"], configs={"S8": MICRO}) == 0
    assert "ours" in asked
    assert not [name for name in asked if "bf16" in name]
    in_16_bits = [name for name in VARIANTS if "bf16" in name]
    assert capsys.readouterr().out.count("no bfloat16 products") == len(in_16_bits) > 5
    assert door.main(["--configs", "S8", "--variants", "ours-bf16"], configs={"S8": MICRO}) == 0
    assert asked[-1] == "ours-bf16"


def test_curves_run_along_one_length_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Workload, tuple[str, ...]]] = []

    def rounds(jobs: dict[str, Job], *_: Any) -> dict[str, list[Turn]]:
        seen.append((next(iter(jobs.values())).workload, tuple(jobs)))
        return {name: [Turn(2.0 if "un" in name else 1.0, None)] for name in jobs}

    monkeypatch.setattr(bench, "run_rounds", rounds)
    rows = bench.Plan(rounds=1, steps=1, threads=1).curves("S8", MICRO, {"float32": 1.0})
    ours = [row for row in rows if row["variant"] == "ours"]
    assert len(ours) == len(seen) == 13
    for row, (workload, names) in zip(ours, seen, strict=True):
        assert (row["prompt"], row["completion"], row["completions"]) == (
            workload.prompt,
            workload.completion,
            workload.completions,
        )
        assert row["ratio_unshared"] == 2.0
        assert 1 < row["flops_unshared"] < workload.completions
        assert not any("trl" in name for name in names) or workload.completions == 2
    document = {"rows": [], "curves": rows, "machine": bench.machine(1, {"float32": 1.0})}
    text = bench.render(document)
    assert [text.count(f"| {what} ") for what in ("prompt tokens", "completion tokens", "K")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: must be a whole number >= 1, got '0'"),
        (["--steps", "2.5"], "--steps: must be a whole number >= 1, got '2.5'"),
        (["--configs", "XL"], "--configs: invalid choice: 'XL'"),
        (["--variants", "their"], "--variants: invalid choice: 'their'"),
        (
            ["--clock", "cpu", "--threads", "2"],
            "--clock cpu: threads count while they wait for each other; --threads 1",
        ),
        (["--device", "cuda", "--quick"], "--quick is for the CPU"),
        (["--device", "cuda", "--clock", "cpu", "--threads", "1"], "--clock cpu: a process does not have a core while"),
        (["--scale", "0"], "--scale: must be a whole number >= 1, got '0'"),
        (["--scale", "--quick"], "--quick has no effect with --scale"),
        (["--startup", "--scale", "10"], "--scale has no effect with --startup"),
        (["--markdown", "no/such.md"], "--markdown no/such.md: the file must have a line '<!-- lm.bench: begin -->'"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        door.main(options)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("cuda", "message"), [(None, "has no CUDA in it"), ("13.0", "sees no GPU here")])
def test_without_a_gpu_one_is_not_measured(
    cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(SystemExit):
        door.main(["--device", "cuda"])
    assert f"--device cuda: torch {torch.__version__} {message}" in capsys.readouterr().err


def test_on_a_gpu_half_a_billion_parameters_are_measured_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Job] = []

    def rounds(jobs: dict[str, Job], *_: Any) -> dict[str, list[Turn]]:
        asked.extend(jobs.values())
        return {name: [Turn(2.0 if "varlen" in name else 1.0, 100.0, 1e3)] * 5 for name in jobs}

    monkeypatch.setattr(bench, "run_rounds", rounds)
    monkeypatch.setattr(bench, "gemm_peak", lambda peaks, *_: peaks.update(dict.fromkeys(peaks, 1e3)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    assert door.main(["--device", "cuda", "--lengths", "hh", "--pairs", "4"]) == 0
    assert {(job.shape.hidden, job.workload.prompt, job.pairs, job.device) for job in asked} == {(896, 115, 4, "cuda")}
    text = capsys.readouterr().out
    assert text.startswith("H100; ")
    ratios = [line for line in text.splitlines() if line.startswith("| ours-bf16 ") and "2.00 [2.00, 2.00]" in line]
    assert len(ratios) == 1
    assert "x varlen" in text
    assert "x TRL tuned" not in text, "what nothing is held against is left out"


def test_rows_by_flash_attention_have_the_same_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is for CUDA; the definition of what it computes stands in for it."""

    def reference(q: Any, k: Any, v: Any, ends: Any, of_keys: Any, *_: int, **options: Any) -> Any:
        assert (ends.tolist(), options["window_size"]) == (of_keys.tolist(), (-1, 0))
        sizes = ends.diff().tolist()
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        same = {name: options[name] for name in ("scale", "enable_gqa")}
        heads = [states.transpose(0, 1).split(sizes, 1) for states in (q, k, v)]
        rows = [attend(*row, is_causal=True, **same) for row in zip(*heads, strict=True)]
        return torch.cat(rows, 1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    rows = bench_plan.make_pairs(Workload(prompt=9, completion=4, completions=3, spread=False), 50, 3)
    batch = bench_workers._unshared(pair_collator(sample=True))(list(rows))
    model = bench_workers.make_model(GROUPED, 32).double()
    options = LogprobsConfig(onednn="off", allocator=False)
    ours = CompletionModel(model, options=options)(batch["input_ids"], batch["lengths"]).logps
    theirs = CompletionModel(model, options=options)
    varlen.use_varlen(theirs, 32)
    torch.testing.assert_close(theirs(batch["input_ids"], batch["lengths"]).logps, ours, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one completion each"):
        theirs(**collate([[2, 3]], [[[4], [5]]]))


def test_a_page_with_its_marks_the_wrong_way_round_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{bench.END_MARK}\n{bench.BEGIN_MARK}\n")
    with pytest.raises(ValueError, match="and below it"):
        bench.put_between_marks(page, "text")
    assert page.read_text() == f"{bench.END_MARK}\n{bench.BEGIN_MARK}\n"
