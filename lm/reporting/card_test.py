"""A model card says what the smallest real run does; its policy is pushed with it, and loads without our packages."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from figures.record import read
from lm.base.store import CorruptArtifact, MissingArtifact, keyed, policy_folder, verify
from lm.card import main
from lm.config import BiasConfig, Config, DataConfig, EvaluationConfig, SamplingConfig, TrainingConfig, WorldConfig
from lm.logprobs.scoring import score_rows
from lm.models.loading import SCRATCH
from lm.models.opening import open_policy, open_reward_model
from lm.objectives import DPO, DRDO, DistilledDPO, EnsembleDPO, Pessimism, PessimisticDPO
from lm.push import main as push_command
from lm.reporting.card import _data, _method, _reward_models, card, trace
from lm.reporting.hub import push
from lm.reporting.results import results
from lm.reporting.settings import method_of
from lm.stages.data import tokenizer
from lm.stages.labels import labelled_pairs
from lm.stages.policies import policies
from lm.stages.rewards import reward
from lm.stages.run import Run
from tests.startup_test import HEAVY, UNREAD, loaded
from theory.records import write_json

METHODS = ["dpo", "d-dpo", "e-dpo", "drdo"]
"""DRDO distils an oracle of its own."""


def config_of(folder: Path) -> Config:
    one_step = TrainingConfig(max_steps=1, batch_size=8, learning_rate=1e-3)
    return Config(
        output_dir=str(folder),
        model="scratch:tiny",
        methods=METHODS,
        sft=one_step,
        oracle=one_step,
        reward=one_step,
        policy=one_step,
        device="cpu",
        data=DataConfig(
            prompt_template="{post}\n\nTL;DR:",
            max_prompt_length=120,
            max_completion_length=20,
            valid_fraction=0.1,
            test_fraction=0.1,
            world=WorldConfig(posts=40),
        ),
        bias=BiasConfig(rho=0.4, member_fractions=[0.25, 0.5]),
        sampling=SamplingConfig(batch_size=64),
        evaluation=EvaluationConfig(resamples=100),
        options={
            "dpo": DPO(beta=0.37),
            "d-dpo": DistilledDPO(beta=0.43),
            "e-dpo": EnsembleDPO(beta=0.61, kl=Pessimism(alpha_start=0.013, alpha_end=0.017)),
            "drdo": DRDO(alpha=0.19, oracle_alpha=0.01),
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 300})
        write_json(folder / "results.json", results(Run(config_of(folder))).as_json())
    return folder


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


@pytest.mark.parametrize(
    ("name", "values", "source"),
    [
        ("dpo", ["| beta | 0.37 |"], "[F] eq 6"),
        ("e-dpo", ["| beta | 0.61 |", "| kl.alpha_start | 0.013 |", "| kl.alpha_end | 0.017 |"], "[F] eq 11"),
        ("d-dpo", ["| beta | 0.43 |"], "[F] eq 7"),
        ("drdo", ["| alpha | 0.19 |", "| reward_estimate | head |"], "[N] eq 6"),
    ],
)
def test_the_method_its_scales_and_its_source(name: str, values: list[str], source: str, run: Path) -> None:
    method = section(card(run, name), "Method")
    for value in [*values, source]:
        assert value in method
    assert ("2405.19316" in method) == ("[F]" in source)
    assert ("2410.08458" in method) == ("[N]" in source)


def test_under_a_target_the_card_has_the_alpha_that_was_reached_and_no_schedule() -> None:
    method = PessimisticDPO(kl=Pessimism(target=1.5))
    history = [{"step": 5, "alpha": 0.2}, {"step": 10, "alpha": 0.0123456}, {"step": 10, "train_runtime": 1.0}]
    text = "\n".join(_method(method, {"inputs": {"method": keyed(method)}, "metrics": {"history": history}}))
    assert "| kl.target | 1.5 |" in text
    assert "| kl.alpha | by dual ascent; 0.01235 at the last logged step |" in text
    assert "alpha_start" not in text
    assert "alpha_end" not in text


@pytest.mark.parametrize(
    ("name", "models"), [("dpo", []), ("d-dpo", ["rho"]), ("e-dpo", ["b0.25", "b0.5"]), ("drdo", ["its own oracle"])]
)
def test_the_reward_models_are_those_that_the_loss_reads(name: str, models: list[str], run: Path) -> None:
    text = section(card(run, name), "Reward models")
    assert re.findall(r"^\| (rho|b[\d.]+|its own oracle) \|", text, re.MULTILINE) == models
    assert ("None enters the loss" in text) == (not models)
    recorded = json.loads((run / "results.json").read_text())["reward_models"]
    for model in models:
        accuracy = recorded[name if model == "its own oracle" else model]["all"]["accuracy"]
        assert re.search(rf"^\| {model} \| .* \| {accuracy:.1%} \|$", text, re.MULTILINE)


def test_the_results_are_those_of_the_run(run: Path) -> None:
    recorded = json.loads((run / "results.json").read_text())
    for name in METHODS:
        row = recorded["methods"][name]
        text = section(card(run, name), "Results")
        assert f"| {name} | {row['advantage']:+.3f} | {row['ci'][0]:+.3f} to {row['ci'][1]:+.3f} |" in text
        assert f"On {recorded['sft']['n']} held-out prompts" in text
        assert not any(f"| {other} |" in text for other in METHODS if other != name)


def test_data_training_and_provenance(run: Path) -> None:
    text = card(run, "dpo")
    scores = json.loads(next(run.glob("score/pairs-*/artifact.json")).read_text())["metrics"]
    assert f"{scores['pairs']:,} preference pairs on {scores['prompts']:,} prompts" in section(text, "Data")
    assert "a share of 0.4 was imposed" in section(text, "Data")
    assert r"{post}\n\nTL;DR:" in section(text, "Data")
    assert "| max_steps | 1 |" in section(text, "Training")
    assert not [name for name in TrainingConfig.INDIFFERENT if name in section(text, "Training")], "keys do not tell"
    assert "| base model | scratch:tiny |" in section(text, "Training")
    assert "| transformers |" in section(text, "Provenance")
    assert "reward_head.safetensors" not in text
    assert "reward_head.safetensors" in section(card(run, "drdo"), "Use")


def test_pairs_that_are_none_of_the_sets_own_and_noise_are_told(run: Path) -> None:
    row = read(run / "results.json").methods["d-dpo"]
    method = method_of("d-dpo", row.setting)
    made = trace(run, verify(policy_folder(run, row.policy)), method)
    data = made.data["inputs"]["data"]
    before = " ".join(_data(made, data, {}))
    assert "sampl" not in before
    assert "without labels" not in before
    labels = {**made.labels, "inputs": {**made.labels["inputs"], "on_policy": {"pairs": "instead", "completions": 4}}}
    more = replace(made, labels=labels, unlabelled={"metrics": {"pairs": 1200, "prompts": 200}})
    said = " ".join(_data(more, data, {}))
    assert "In place of the set's own they are pairs of 4 samples of pi_ref a training prompt." in said
    assert "1,200 pairs without labels on 200 prompts" in said
    inputs = {**made.bias["inputs"], "rewards": "oracle", "reward_noise": 0.5}
    exact = replace(made, teachers=[], bias={**made.bias, "inputs": inputs})
    assert list(_reward_models(method, exact))[1].endswith("gives, with normal noise of standard deviation 0.5.")


def test_a_snapshot_is_named_by_its_step_and_found_in_its_artifact(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    results = json.loads((folder / "results.json").read_text())
    row = results["methods"]["dpo"]
    last = row["step"]
    row["policy"], row["step"] = f"{row['policy']}/step-7", 7
    write_json(folder / "results.json", results)
    text = card(folder, "dpo")
    assert "| step | 7 |" in section(text, "Training")
    assert text.replace("| step | 7 |", f"| step | {last} |") == card(run, "dpo")


def test_the_head_is_the_hubs_metadata(run: Path) -> None:
    head = yaml.safe_load(card(run, "e-dpo").split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert "e-dpo" in head["tags"]
    assert "base_model" not in head, "scratch:tiny is on no hub"


@pytest.mark.parametrize(
    ("path", "sft_path", "named"),
    [
        ("/home/ada/secret/pairs.jsonl", "../secret/references", ["pairs.jsonl", "references"]),
        ("ada/secret-pairs", "~/ada/of mine.parquet", ["secret-pairs", "of mine.parquet"]),  # the first as on the hub
        ("../..", None, ["a folder"]),
    ],
)
def test_local_files_are_named_without_their_folders(
    path: str, sft_path: str | None, named: list[str], run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    digests = [part * 32 if value else None for part, value in (("ab", path), ("cd", sft_path))]
    with_inputs(run, folder, path, sft_path, digests, base="ef" * 32)
    text = card(folder, "e-dpo")
    assert text.splitlines().count(f"# e-dpo on {named[0]}") == 1
    rows = re.findall(r"^\| (?:path|sft_path) \| (.*) \|$", section(text, "Data"), re.MULTILINE)
    assert rows == named
    told = ", ".join(f"{option} {part * 6}" for option, part in (("path", "ab"), ("sft_path", "cd"))[: len(named)])
    assert f"Local files are named without their folders; SHA-256 of their contents begins: {told}.\n" in text
    assert "| base model | a local one, efefefefefef by content |" in text
    assert not re.search(r"\b(home|ada|secret/)", text)
    assert not {"datasets", "base_model"} & yaml.safe_load(text.split("---\n")[1]).keys()


def test_names_on_the_hub_stay_whole(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with_inputs(run, folder, "ada/pairs", "ada/references/part", ["ada/pairs", "ada/references/part"], base="ada/model")
    text = card(folder, "e-dpo")
    assert "# e-dpo on ada/pairs\n" in text
    assert "| sft_path | ada/references/part |" in text
    assert "| base model | ada/model |" in text
    assert "Local files" not in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["datasets"]) == ("ada/model", "ada/pairs")


def with_inputs(
    run: Path, folder: Path, path: str, sft_path: str | None, content: list[str | None], *, base: str
) -> None:
    """A copy of the run, as if it had been made from these."""
    shutil.copytree(run, folder)
    for stage, inputs in (("data/*", {"content": content}), ("policy/e-dpo-*", {"base": base})):
        (file,) = folder.glob(f"{stage}/artifact.json")
        record = json.loads(file.read_text())
        assert inputs.keys() <= record["inputs"].keys()
        record["inputs"] |= inputs
        if "data" in record["inputs"]:
            record["inputs"]["data"] |= {"kind": "preferences", "path": path, "sft_path": sft_path}
        write_json(file, record)


def test_the_same_folder_gives_the_same_card_wherever_it_is(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "elsewhere")
    assert card(tmp_path / "elsewhere", "e-dpo") == card(run, "e-dpo")


def test_what_is_missing_or_changed_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*results.json; finish the run"):
        card(tmp_path, "dpo")
    with pytest.raises(ValueError, match=r"method must be one of dpo, d-dpo, e-dpo, drdo, as .* has them; got 'ipo'"):
        card(run, "ipo")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(next(copy.glob("reward/rho-*")))
    with pytest.raises(MissingArtifact, match=r"\(reward model rho\), which the policy was made from; it was deleted"):
        card(copy, "d-dpo")
    card(copy, "e-dpo"), card(copy, "drdo")  # which do not distil it
    shutil.rmtree(next(copy.glob("bias/rows-*")))
    with pytest.raises(MissingArtifact, match=r"has no artifact [0-9a-f]{12} \(bias\), which the policy was made from"):
        card(copy, "dpo")
    next(copy.glob("policy/dpo-*/config.json")).write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"config.json has changed"):
        card(copy, "dpo")


def test_a_card_a_report_and_the_oracles_verdict_import_no_torch(run: Path, tmp_path: Path) -> None:
    card_of = ("lm.card", str(run), "dpo", "--output", str(tmp_path / "card.md"))
    report_of, verdict_of = ("lm.report", str(run)), ("lm.judge", str(run), "--judge", "oracle", "--out")
    for packages in loaded(card_of, report_of, (*verdict_of, str(tmp_path / "judge.json")), status=(*UNREAD, 0)):
        assert not packages & set(HEAVY)
    assert (tmp_path / "card.md").stat().st_size > 1000
    assert (tmp_path / "judge.json").stat().st_size > 100


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "dpo"]) == 0
    assert capsys.readouterr().out == card(run, "dpo") + "\n"
    assert main([str(run), "dpo", "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == card(run, "dpo") + "\n"
    assert main([str(run), "ipo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: method must be one of")
    assert "Traceback" not in error
    assert main([str(run), "ipo", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


# ---------------------------------------------------------------- without our packages

WITHOUT_US = """
import importlib.abc, json, sys
import torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lm", "theory", "bandits", "figures"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import lm
    sys.exit("our packages can be imported")
except ModuleNotFoundError:
    pass
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

policy, reward, prompt, completion = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy)
prompt, completion = json.loads(prompt), json.loads(completion)
ids = torch.tensor([prompt + completion])
with torch.no_grad():
    model, missing = AutoModelForCausalLM.from_pretrained(policy, output_loading_info=True)
    logps = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
    classifier, lost = AutoModelForSequenceClassification.from_pretrained(reward, output_loading_info=True)
    print(json.dumps({
        "logp": logps.double().sum().item(),
        "reward": classifier(ids).logits.item(),
        "labels": classifier.config.num_labels,
        "text": tokenizer.decode(prompt),
        "missing": [*missing["missing_keys"], *lost["missing_keys"]],
    }))
"""


@pytest.mark.thorough
def test_policies_and_reward_models_load_in_transformers_alone(run: Path, tmp_path: Path) -> None:
    made = Run(config_of(run))
    row = labelled_pairs(made, "test")[0]
    prompt, completion = row["prompt_ids"], row["chosen_ids"]
    policy, model = policies(made, "e-dpo")[0].path, reward(made, "b0.5").path
    inputs = [str(policy), str(model), json.dumps(prompt), json.dumps(completion)]
    alone = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *inputs], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr
    found = json.loads(alone.stdout)
    expected = {
        "logp": open_policy(policy, tokenizer(made), made.config),
        "reward": open_reward_model(model, made.config),
    }
    for name, ours in expected.items():
        assert found[name] == pytest.approx(score_rows(ours, [prompt], [completion], name).item(), rel=1e-4), name
    assert (found["labels"], found["missing"]) == (1, [])
    assert found["text"] == row["prompt"]


# ---------------------------------------------------------------- the hub, by a stand-in that speaks its protocol

TOKEN = "hf_a-secret-of-mine"


class Hub(ThreadingHTTPServer):
    """Takes commits of the real client, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.repositories: dict[str, bool] = {}
        """Whether each is private."""
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        """Repository, and files by path."""
        self.tokens: set[str | None] = set()
        self.refuses = False


class Exchange(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """What is known of a repository."""
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if name in self.server.repositories:
            self._answer({"id": name, "private": self.server.repositories[name], "siblings": [], "tags": []})
        else:
            self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        """Making a repository, asking how files are to be sent, and sending them."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self._answer({"error": "you may not write here"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, asked.get("visibility") == "private")
            self._answer(
                {"url": f"http://{self.headers['Host']}/{name}", "error": "you have it"}, 409 if known else 200
            )
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            ways = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._answer({"files": ways})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.server.commits.append((name, {v["path"]: base64.b64decode(v["content"]) for v in values}))
            self._answer({"commitOid": "c0ffee", "commitUrl": f"http://{self.headers['Host']}/{name}/commit/c0ffee"})
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def test_a_policy_is_pushed_in_one_commit_with_its_card(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push_command([str(run), "drdo", "--repo-id", "my-lab/mine", "--private"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("/my-lab/mine/commit/c0ffee\n")
    assert TOKEN not in shown.out + shown.err
    assert hub.repositories == {"my-lab/mine": True}
    [(name, files)] = hub.commits
    policy = next(run.glob("policy/drdo-*"))
    assert name == "my-lab/mine"
    assert files.pop("README.md").decode() == card(run, "drdo", "my-lab/mine") + "\n"
    expected = {path.name: path.read_bytes() for path in policy.iterdir() if path.name != "artifact.json"}
    assert files == expected
    assert {"model.safetensors", "config.json", "tokenizer.json", "reward_head.safetensors"} <= files.keys()
    assert not [name for name, content in files.items() if str(run).encode() in content], "where it was made"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert push(run, "drdo", "my-lab/mine", private=True), "again, into the same repository"
    assert len(hub.commits) == 2


def test_of_a_snapshot_its_own_files_are_pushed(run: Path, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    values = json.loads((folder / "results.json").read_text())
    policy = next(folder.glob("policy/dpo-*"))
    (policy / "step-7").mkdir()
    (policy / "step-7" / "config.json").write_text('{"of": 7}')
    push(folder, "dpo", "me/last")
    values["methods"]["dpo"]["policy"] += "/step-7"
    write_json(folder / "results.json", values)
    push(folder, "dpo", "me/seven")
    last, seven = (files for _, files in hub.commits)
    assert not any("step-7" in name for name in last)
    assert seven.keys() == {"README.md", "config.json"}
    assert seven["config.json"] == b'{"of": 7}'
    assert hub.repositories == {"me/last": False, "me/seven": False}


@pytest.mark.parametrize(
    "name",
    ["mine", "a/b/c", "me/", "/mine", "me/../mine", "me/my model", "me/mine.git", "https://huggingface.co/me/mine"],
)
def test_a_bad_repository_is_refused_before_anything_is_sent(name: str, run: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"--repo-id must be owner/name, .*; got " + re.escape(repr(name))):
        push(run, "dpo", name)
    assert not hub.tokens


def test_what_cannot_be_pushed_is_refused(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*results.json; finish the run"):
        push(tmp_path, "dpo", "me/mine")
    with pytest.raises(ValueError, match=r"method must be one of .* got 'ipo'"):
        push(run, "ipo", "me/mine")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    next(copy.glob("policy/dpo-*/config.json")).write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"config.json has changed"):
        push(copy, "dpo", "me/mine")
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(ValueError, match="the hub needs a token: set HF_TOKEN, or log in"):
            push(run, "dpo", "me/mine")
    assert not hub.tokens, "nothing was sent until here"
    hub.repositories["me/mine"] = False
    with pytest.raises(ValueError, match=r"--private: me/mine is there and is public"):
        push(run, "dpo", "me/mine", private=True)
    hub.refuses = True
    assert push_command([str(run), "dpo", "--repo-id", "me/mine", "--debug"]) == 1
    shown = capsys.readouterr()
    assert "you may not write here" in shown.err
    assert TOKEN not in shown.out + shown.err
    assert not hub.commits
