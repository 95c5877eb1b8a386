"""What breaks a run is noticed and named, and loses no finished work: kills, damage, full disks, signals, bad numbers.

Whole runs are killed by `tests/kill.py`, whose comparison is tested here.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from lm.base import ranks
from lm.base.command import only_run_in
from lm.base.files import inside
from lm.base.store import SEAL, Refused, Store, damage, last_checkpoint, policy_folder, provenance, seal
from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.scoring import score_pairs
from lm.models.loading import check_reward_model
from lm.objectives import DPO, Method
from lm.stages.run import command
from lm.stages.trainings import sft
from lm.training.batches import pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from tests.kill import differences
from tests.ranks_test import torchrun
from tests.tiny import VOCABULARY, causal_lm, completion, pairs, reward_model, training
from theory.records import write_json, write_text

ROOT = Path(__file__).parents[1]

Run = tuple[dict[str, Tensor], list[dict[str, Any]]]
"""Parameters after training, and the log."""


def train(folder: Path, *callbacks: TrainerCallback, method: Method | None = None, **options: Any) -> Run:
    """Seven steps on ten pairs, four at a time: a checkpoint every two steps, a log line every three, three probes."""
    method = DPO() if method is None else method
    torch.manual_seed(0)
    model = CompletionModel(causal_lm(), reward_head=method.needs_reward_head)
    config = training(**{"max_steps": 7, "batch_size": 4, "save_steps": 2, "logging_steps": 3, **options})
    arguments = training_arguments(config, folder, seed=3, device="cpu", probes=2)
    extra: dict[str, Any] = {"method": method, "eval_dataset": pairs(5, seed=9), "callbacks": list(callbacks)}
    history = fit(PolicyTrainer, model, pairs(10), pair_collator(sample=method.needs_samples), arguments, **extra)
    timeless = [{k: v for k, v in entry.items() if not k.startswith("train_")} for entry in history]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, timeless


def same(one: Run, other: Run) -> bool:
    """Whether two runs are the same to the last bit, log included."""
    return one[1] == other[1] and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


class Crash(TrainerCallback):  # type: ignore[misc]
    """Ends a run after so many steps, and what is saved at that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("whole"))


def crashed(folder: Path, step: int = 5) -> Path:
    """The folder of a run that ended after so many steps."""
    with pytest.raises(KeyboardInterrupt):
        train(folder, Crash(step))
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_that_is_gone_on_with_has_the_same_log_and_parameters(step: int, whole: Run, tmp_path: Path) -> None:
    assert same(train(crashed(tmp_path, step)), whole)


def test_a_run_that_ended_after_its_last_step_takes_no_step_more(whole: Run, tmp_path: Path) -> None:
    """A kill after training and before the artifact is finished: the last step is in the middle of an epoch."""
    train(tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-7"]
    assert same(train(tmp_path), whole)


def test_another_step_is_noticed(whole: Run, tmp_path: Path) -> None:
    assert not same(train(tmp_path, max_steps=8), whole)


def test_an_artifact_that_was_finished_leaves_no_work(tmp_path: Path) -> None:
    store = Store(tmp_path, seed=0)
    artifact = store.get("policy", "dpo", {}, lambda folder, scratch: {})
    left = tmp_path / ".work" / f"policy-dpo-{artifact.key}" / "scratch"
    left.mkdir(parents=True)
    assert store.get("policy", "dpo", {}, lambda folder, scratch: {}) == artifact
    assert not left.parent.exists()


def a_run(folder: Path) -> Path:
    """Files of the kinds that a run leaves."""
    artifact = folder / "policy" / "dpo-0123"
    history = [{"loss": 0.5, "step": 1}, {"train_runtime": 1.0, "step": 1}]
    record = {"metrics": {"history": history}, "provenance": {"date": "today", "commit": "a", "seed": 0}}
    (artifact / "pairs").mkdir(parents=True)
    write_json(artifact / "artifact.json", {**record, "files": {"pairs/state.json": "12", "weights": "34"}})
    write_json(artifact / "pairs" / "state.json", {"_fingerprint": "ab", "_data_files": []})
    (artifact / "weights").write_bytes(bytes(100))
    write_json(folder / "results.json", {"methods": {"dpo": 0.5}, "provenance": record["provenance"]})
    (folder / "report.html").write_text("today, commit a")
    (folder / ".lock").touch()
    return folder


def edited(path: Path, *keys: Any, value: Any) -> None:
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))


def test_runs_of_other_times_are_not_told_apart(tmp_path: Path) -> None:
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other")
    for path in (other / "results.json", other / "policy" / "dpo-0123" / "artifact.json"):
        edited(path, "provenance", "date", value="tomorrow")
    edited(other / "policy" / "dpo-0123" / "artifact.json", "metrics", "history", 1, "train_runtime", value=2.0)
    edited(other / "policy" / "dpo-0123" / "artifact.json", "files", "pairs/state.json", value="56")
    edited(other / "policy" / "dpo-0123" / "pairs" / "state.json", "_fingerprint", value="cd")
    (other / "report.html").write_text("tomorrow, commit a")
    assert differences(one, other) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda run: (run / "policy/dpo-0123/weights").write_bytes(bytes(99) + b"\1"),
            "policy/dpo-0123/weights: bytes",
        ),
        (lambda run: (run / "policy/dpo-0123/weights").unlink(), "policy/dpo-0123/weights: only in "),
        (lambda run: (run / "policy/dpo-0123/more").touch(), "policy/dpo-0123/more: only in "),
        (
            lambda run: edited(run / "results.json", "methods", "dpo", value=0.25),
            "results.json: methods.dpo 0.5 | 0.25",
        ),
        (
            lambda run: edited(run / "results.json", "provenance", "seed", value=1),
            "results.json: provenance.seed 0 | 1",
        ),
        (
            lambda run: edited(run / "policy/dpo-0123/artifact.json", "metrics", "history", 0, "loss", value=0.25),
            "policy/dpo-0123/artifact.json: metrics.history[0].loss 0.5 | 0.25",
        ),
        (
            lambda run: edited(run / "policy/dpo-0123/artifact.json", "files", "weights", value="0"),
            "policy/dpo-0123/artifact.json: files.weights 34 | 0",
        ),
        (lambda run: (run / "report.html").write_text("today, commit a!"), "report.html: bytes"),
        (lambda run: (run / ".work" / "policy-dpo").mkdir(parents=True), "left over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_byte_that_differs_between_two_runs_is_found(change: Any, found: str, tmp_path: Path) -> None:
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other")
    change(other)
    (difference,) = differences(one, other)
    assert found in difference


# ---------------------------------------------------------------- signals


class Terminated(BaseException):
    """What the handler raises that SIGTERM has before."""


class Signal(TrainerCallback):  # type: ignore[misc]
    """SIGTERM to this process, in the middle of the step after so many."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def terminable() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    yield
    assert signal.getsignal(signal.SIGTERM) is end, "it was put back"
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize(("step", "save_steps"), [(2, 2), (4, None), (6, None)])
def test_sigterm_ends_training_after_a_checkpoint_of_the_step(
    step: int, save_steps: int | None, whole: Run, tmp_path: Path
) -> None:
    with pytest.raises(Terminated):
        train(tmp_path, Signal(step), save_steps=save_steps)
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step + 1}")
    assert same(train(tmp_path, save_steps=save_steps), whole)


@pytest.mark.usefixtures("terminable")
def test_all_ranks_stop_where_one_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "from_all", lambda asked: [asked, True])  # the other one was, at the first step
    with pytest.raises(Terminated):
        train(tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-1"]


# ---------------------------------------------------------------- memory, space, access


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def policy(folder: Path, scratch: Path) -> dict[str, Any]:
    """Makes an artifact as a stage does."""
    parameters, history = train(scratch)
    torch.save(parameters, folder / "parameters.pt")
    return {"history": history}


@pytest.mark.parametrize("size", [15_000, 60_000])
def test_a_disk_that_is_full_while_training_loses_nothing(size: int, tmp_path: Path, whole: Run) -> None:
    """By a limit on the size of a file: weights do not fit, or the optimizer's state does not."""
    store = Store(tmp_path, seed=0)
    with longest_file(size), pytest.raises(Refused, match=r"\[policy\] dpo in .*: no space to write \(.*free some"):
        store.get("policy", "dpo", {}, policy)
    assert not (tmp_path / "policy").exists()
    made = store.get("policy", "dpo", {}, policy)
    assert same((torch.load(made.path / "parameters.pt", weights_only=True), made.metrics["history"]), whole)


FULL = """
import subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from lm.base.store import Refused, Store
from theory.records import write_text

disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
    sys.exit(77)
big = {"weights": torch.zeros(1_000_000)}
writers = {
    "torch": lambda path: torch.save(big, path),
    "safetensors": lambda path: save_file(big, path),
    "text": lambda path: write_text(path, "x" * 4_000_000),
}
def make(writer):
    return lambda folder, scratch: writer(folder / "file") or {}
for name, writer in writers.items():
    try:
        Store(disk / "run", seed=0).get("policy", name, {}, make(writer))
    except Refused as refused:
        print(refused)
assert not (disk / "run" / "policy").exists()
subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
for name, writer in writers.items():
    print(Store(disk / "run", seed=0).get("policy", name, {}, make(writer)).path.name)
"""


def test_a_full_disk_is_told_and_nothing_half_written_counts(tmp_path: Path) -> None:
    """A tmpfs of 1 MB, in a mount namespace of its own, for files of 4."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this system gives no mount namespace")
    command = ["unshare", "-rm", sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode == 77:
        pytest.skip("this system mounts no tmpfs")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for name, line in zip(("torch", "safetensors", "text"), told[:3], strict=True):
        assert line.startswith(f"[policy] {name} in {tmp_path}/run: no space to write (")
    assert [line.split("-")[0] for line in told[3:]] == ["torch", "safetensors", "text"]


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    write_text(tmp_path / "results.json", "old")
    with longest_file(15_000), pytest.raises(OSError, match=f"File too large: '{tmp_path}/results.json'"):
        write_text(tmp_path / "results.json", "x" * 20_000)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="this system has no folder that nobody can write to")
@pytest.mark.parametrize("below", ["run", "a/run"])
def test_a_folder_that_cannot_be_written_is_named(below: str, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Any] = []
    assert command("lm.test", started.append, arguments=["--output_dir", f"/sys/{below}"]) != 0
    assert not started
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert f": '/sys/{below.split('/')[0]}" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory; lower micro_batch_tokens"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), r"out of memory \(Tried to allocate 2 GiB\); lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), r"out of memory \(DefaultCPUAllocator"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"no space to write \(\[Errno 28\] No space left on device\)",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x"), r"no access \(.*Read-only file system: '/x'\)"),
    ],
)
def test_what_the_machine_refuses_names_the_stage(error: Exception, told: str, tmp_path: Path) -> None:
    def fail(folder: Path, scratch: Path) -> dict[str, Any]:
        (folder / "half").touch()
        raise error

    with pytest.raises(Refused, match=rf"\[policy\] dpo in {tmp_path}: {told}"):
        Store(tmp_path, seed=0).get("policy", "dpo", {}, fail)
    assert not (tmp_path / "policy").exists()


RANK_WITHOUT_MEMORY = """
import sys
from lm.base import ranks
from lm.stages.run import command

def make(folder, scratch):
    if ranks.index() == 1:
        raise MemoryError
    (folder / "half").touch()
    return {"ranks": ranks.from_all(1)}

sys.exit(command("lm.test", lambda p: p.store.get("policy", "dpo", {}, make), arguments=["--output_dir", sys.argv[1]]))
"""


@pytest.mark.thorough
def test_a_rank_without_memory_ends_all_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(RANK_WITHOUT_MEMORY)
    done = torchrun(str(tmp_path / "command.py"), str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: [policy] dpo in ") == 1
    assert done.stderr.count("out of memory; lower micro_batch_tokens") == 1
    assert not (tmp_path / "run" / "policy").exists()


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    def fail(folder: Path, scratch: Path) -> dict[str, Any]:
        raise ValueError("row 5")

    with pytest.raises(ValueError, match=r"^row 5$"):
        Store(tmp_path, seed=0).get("policy", "dpo", {}, fail)


def test_the_second_run_in_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Any] = []
    arguments = ["--output_dir", str(tmp_path)]
    with only_run_in(tmp_path):
        assert command("lm.test", started.append, arguments=arguments) == 2
    assert not started
    assert f"error: output_dir {tmp_path} is in use by another run; wait for it" in capsys.readouterr().err
    assert command("lm.test", started.append, arguments=arguments) == 0
    assert started


# ---------------------------------------------------------------- numbers that are none


class Spoil(TrainerCallback):  # type: ignore[misc]
    """Makes one parameter's gradient NaN or infinite after so many steps."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if state.global_step == self.step:
            parameter = next(model.parameters())
            parameter.register_hook(lambda gradient: gradient * self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(value: float, whole: Run, tmp_path: Path) -> None:
    told = r"gradient norm is (nan|inf) at step 5, mini-batch of rows row\d, row\d"
    with pytest.raises(FloatingPointError, match=told):
        train(tmp_path, Spoil(5, value))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4"), "the last good one is kept"
    assert same(train(tmp_path), whole)


@pytest.mark.parametrize(("row", "side"), [(2, "chosen"), (1, "rejected")])
def test_a_reward_that_is_not_finite_names_its_pair(row: int, side: str) -> None:
    model = CompletionModel(reward_model(), options=LogprobsConfig(route="padded", allocator=False))
    data = pairs(4)
    strange = VOCABULARY - 1
    assert strange not in data[row][f"{side}_ids"]

    def with_strange(one: dict[str, Any]) -> dict[str, Any]:
        return {f"{side}_ids": [strange, 1]} if one["id"] == f"row{row}" else {}

    def without(ids: list[int]) -> list[int]:
        return [token if token != strange else 2 for token in ids]

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = data.map(lambda one: {name: without(one[name]) for name in columns}).map(with_strange)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[strange] = float("nan")
    told = f"rewards: the score of the {side} completion of pair row{row} is nan; every score must be finite"
    with pytest.raises(FloatingPointError, match=told):
        score_pairs(model, data, "rewards")


@pytest.mark.parametrize("length", [16, 256, 2048])
@pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "activations"])
def test_bfloat16_log_probs_of_long_completions_are_summed_in_float32(length: int, autocast: bool) -> None:
    """The error against float64 does not grow with the length as that of a bfloat16 sum does.

    Measured with this model, relative to the sum: docs/reliability.md.
    """
    rng = random.Random(length)
    prompt, own = completion(rng, 8, 8), completion(rng, length - 1, length - 1)
    batch = collate([prompt], [[own]])
    low = causal_lm(seed=0, max_position_embeddings=4096).to(torch.float32 if autocast else torch.bfloat16)
    exact = CompletionModel(causal_lm(seed=0, max_position_embeddings=4096), options=LogprobsConfig(allocator=False))
    exact.model.load_state_dict(low.state_dict())  # the same numbers: what differs is the arithmetic
    with torch.no_grad():
        value = CompletionModel(low, options=LogprobsConfig(autocast=autocast, allocator=False))(**batch)
        true = exact(**batch).logps.item()
        with exact.stock() as plain:
            logits = plain(torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1]
        tokens = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None])[:, 0]
    assert value.logps.dtype == torch.float32
    assert float(tokens.sum()) == pytest.approx(true, rel=1e-9)
    error = abs(value.logps.item() - true) / abs(true)
    in_bfloat16 = torch.zeros(1, dtype=torch.bfloat16).index_add(0, torch.zeros(length).long(), tokens.bfloat16())
    error_of_sum = abs(in_bfloat16.item() - true) / abs(true)
    print(
        f"bf16 {'activations' if autocast else 'parameters'}, {length} tokens: {error:.2e}; summed: {error_of_sum:.2e}"
    )
    assert error < 0.01
    if length == 2048:
        assert error_of_sum > 0.1 > 10 * error, "a sum in bfloat16 stands still"


# ---------------------------------------------------------------- input that is not trusted


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_checkpoints_pickle_runs_no_code(broken_off: Path, tmp_path: Path) -> None:
    folder, touched = tmp_path / "run", tmp_path / "touched"
    pickle.loads(pickle.dumps(Payload(touched)))
    assert touched.exists(), "it would"
    touched.unlink()
    shutil.copytree(broken_off, folder)
    torch.save(Payload(touched), folder / "checkpoint-4" / "optimizer.pt")
    seal(folder / "checkpoint-4")  # whoever writes it can write its checksum
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(folder)
    assert not touched.exists()


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"])
def test_yaml_tags_run_no_code(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.yaml").write_text(f"output_dir: !!{tag} [{tmp_path}/made]\n")
    started: list[Any] = []
    for arguments in (["--config", str(tmp_path / "evil.yaml")], ["--sweep", f"!!{tag} [{tmp_path}/made]"]):
        with pytest.raises(SystemExit) as end:
            command("lm.test", started.append, arguments=arguments)
        assert end.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert not started
    assert not (tmp_path / "made").exists()


def test_a_run_names_no_file_outside_it(tmp_path: Path) -> None:
    own = tmp_path / "run"
    own.mkdir()
    (tmp_path / "secret").write_text("secret")
    (own / "link").symlink_to(tmp_path / "secret")
    assert inside(own, "evaluate/dpo/samples.jsonl") == own / "evaluate" / "dpo" / "samples.jsonl"
    for name in ("../secret", str(tmp_path / "secret"), "link", "a/../../secret"):
        with pytest.raises(ValueError, match=rf"'{name}' leads out of {own}"):
            inside(own, name)
    assert policy_folder(own, "/elsewhere/policy/dpo-0123") == own / "policy" / "dpo-0123"


def test_keys_of_the_environment_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"secret-{name}")
    assert command("lm.test", lambda _: None, arguments=["--output_dir", str(tmp_path)]) == 0
    write_json(tmp_path / "provenance.json", provenance(0))
    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert len(texts) >= 3
    assert not [text for text in texts if "secret-" in text]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts that a connection was asked for, of which none is made."""
    hosts: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        hosts.append(str(arguments[-2] if isinstance(arguments[0], str) else arguments[1]))
        raise OSError(errno.ENETUNREACH, "no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts


def test_nothing_asks_the_network_but_for_a_hub_name(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, tokenizer and pi_ref of the embedded world."""
    small = ["--data.world.posts", "30", "--sft.max_steps", "1", "--output_dir", str(tmp_path)]
    assert command("lm.test", sft, arguments=small) == 0
    assert (tmp_path / "sft").is_dir()
    assert asked == []
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
    with pytest.raises(ValueError, match="oracle_model 'no-one/nothing': its config cannot be loaded"):
        check_reward_model("no-one/nothing", False)
    assert asked, "a hub name does"


# ---------------------------------------------------------------- damaged files

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda path: flip(path / "model.safetensors"),
    "a bit of the optimizer": lambda path: flip(path / "optimizer.pt"),
    "a file cut short": lambda path: (path / "trainer_state.json").write_text("{"),
    "a missing file": lambda path: (path / "scheduler.pt").unlink(),
    "the checksums": lambda path: (path / SEAL).write_text("{"),
    "checksums of no files": lambda path: (path / SEAL).write_text("[]"),
}


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = crashed(tmp_path_factory.mktemp("broken"), 5)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    what: str, broken_off: Path, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    DAMAGE[what](folder / "checkpoint-4")
    assert same(train(folder), whole)
    name = {"the weights": "model.safetensors", "the optimizer": "optimizer.pt", "short": "trainer_state.json"}
    name |= {"missing file": "scheduler.pt", "checksums": SEAL, "no files": SEAL}
    (file,) = {file for key, file in name.items() if what.endswith(key)}
    state = "is missing" if what == "a missing file" else "has changed"
    said = f"warning: {folder}/checkpoint-4/{file} {state} since it was written; this checkpoint is not used\n"
    assert said in capsys.readouterr().err


def test_a_run_without_a_whole_checkpoint_starts_anew(broken_off: Path, whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    for name in checkpoints(folder):
        flip(folder / name / "model.safetensors")
    assert same(train(folder), whole)


def test_a_checkpoint_that_was_cut_short_is_no_checkpoint(
    broken_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    (folder / "checkpoint-4" / SEAL).unlink()
    (folder / "checkpoint-6").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert checkpoints(folder) == ["checkpoint-2"]
    assert capsys.readouterr().err == "", "nothing is wrong with it: a kill has ended its writing"
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_seal_holds_for_every_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("1")
    assert damage(tmp_path) == f"{tmp_path / SEAL} is missing"
    seal(tmp_path)
    assert damage(tmp_path) is None
    seal(tmp_path)
    assert damage(tmp_path) is None, "its own checksum is not among them"
    (tmp_path / "a" / "b").write_text("2")
    assert damage(tmp_path) == f"{tmp_path}/a/b has changed"
