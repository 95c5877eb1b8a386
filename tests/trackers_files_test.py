"""What a whole run leaves with its trackers, read back from their files: configs, one group, the final table, the
picture and samples. W&B and trackio write offline; where they are not installed, their tests say so and are skipped."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm.base.options import CONFIGS
from lm.base.store import provenance
from lm.models.loading import SCRATCH
from lm.reporting.results import report
from lm.stages.run import command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

METHODS = ("ipo", "e-dpo")
STEPS = {"sft": 3, "oracle": 3, "reward": 3, "policy": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackers")


def options_of(folder: Path, *trackers: str) -> list[str]:
    lengths = [
        word
        for stage, steps in STEPS.items()
        for word in (f"--{stage}.epochs", "null", f"--{stage}.max_steps", str(steps), f"--{stage}.batch_size", "8")
    ]
    return [
        *("--config", str(CONFIGS / "demo.yaml"), "--device", "cpu", "--output_dir", str(folder)),
        *("--data.world.posts", "60", "--bias.size", "null", "--bias.member_fractions", "[0.2, 0.8]"),
        *("--methods", f"[{', '.join(METHODS)}]", "--report_to", f"[{', '.join(trackers)}]"),
        *("--evaluation.resamples", "50", "--probe.pairs", "8", "--ipo.tau", "0.25", "--seed", "7"),
        *lengths,
    ]


def trained(folder: Path, *trackers: str) -> Path:
    """A whole run, as `lm.train` does it."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 300})
        assert command("lm.train", report, arguments=options_of(folder, *trackers)) == 0
    return folder


def check_config(config: dict[str, Any], name: str, run: Path) -> None:
    """A training's config, of the values that a reader of dashboards looks for."""
    stage = name.partition("-")[0]
    assert config["stage"] == stage
    assert config["group"] == str(run)
    commit = config["commit"]
    assert commit is None if provenance(0)["commit"] is None else re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
    assert config["data"] == config["data.kind"] == "world"
    assert config["rho"] == 0.2
    assert config["run_seed"] == 7
    assert config["max_steps"] == STEPS[stage], "its own options as well"
    if name.startswith("policy-ipo"):
        assert config["method"] == "ipo"
        assert config["tau"] == 0.25
        assert "alpha" not in config
    if name.startswith("policy-e-dpo"):
        assert (config["method"], config["beta"]) == ("e-dpo", 0.1)
        assert config["alpha"] == config["kl.alpha_end"] == 1e-2
        assert config["kl.alpha_start"] == 1e-4


def check_table(columns: list[str], cells: list[list[Any]], run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    assert columns[:2] == ["policy", "advantage"]
    assert [row[0] for row in cells] == ["sft", *METHODS]
    for row in cells[1:]:
        assert float(row[1]) == pytest.approx(found["methods"][row[0]]["advantage"], rel=1e-6)
        assert float(row[columns.index("kl")]) == pytest.approx(found["methods"][row[0]]["kl"], rel=1e-6)


def check_samples(columns: list[str], cells: list[list[Any]], run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    assert columns == ["prompt", "sft", "sft reward", "ipo", "ipo reward", "e-dpo", "e-dpo reward"]
    written = [json.loads(line) for line in (run / found["methods"]["ipo"]["samples"]).read_text().splitlines()]
    assert 0 < len(cells) == min(20, len(written))
    for row, sample in zip(cells, written, strict=False):
        assert row[0].split() == sample["prompt"].split()
        assert row[3].split() == sample["completion"].split()
        assert float(row[4]) == pytest.approx(sample["oracle_reward"], rel=1e-6)


# ---------------------------------------------------------------- TensorBoard


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return trained(folder / "run", "tensorboard")


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0}).Reload()


def text_of(found: EventAccumulator, name: str) -> str:
    (event,) = found.Tensors(f"{name}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


def cells_of(markdown: str) -> tuple[list[str], list[list[str]]]:
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in markdown.splitlines()]
    assert set(lines[1]) == {"---"}
    return lines[0], [[cell.replace("<br>", "\n").replace("\\|", "|") for cell in line] for line in lines[2:]]


def test_tensorboard_has_the_config_of_every_training(run: Path) -> None:
    names = sorted(path.name for path in (run / "logs").iterdir())
    kinds = {name.rpartition("-")[0] for name in names}
    assert kinds >= {"", "sft-policy", "reward-b0.2", "reward-b0.8", "policy-ipo", "policy-e-dpo"}
    for name in names:
        if name == "results":
            continue
        found = events(run / "logs" / name)
        check_config(json.loads(text_of(found, "args")), name, run)
        about = dict(cells_of(text_of(found, "config"))[1])
        assert about["group"] == str(run)
        assert about.get("method") == (name.split("-", 1)[1].rpartition("-")[0] if "policy-" in name[:7] else None)


def test_a_short_training_logs_ten_points_and_a_shorter_one_each_step(run: Path) -> None:
    for path in (run / "logs").iterdir():
        if path.name != "results":
            steps = [event.step for event in events(path).Scalars("train/loss")]
            assert steps == list(range(1, STEPS[path.name.partition("-")[0]] + 1)), path.name


def test_tensorboard_has_the_table_the_picture_and_the_samples(run: Path) -> None:
    found = events(run / "logs" / "results")
    check_table(*cells_of(text_of(found, "results/table")), run)
    check_samples(*cells_of(text_of(found, "results/samples")), run)
    (image,) = found.Images("results/frontier")
    with Image.open(run / "results.png") as picture, Image.open(io.BytesIO(image.encoded_image_string)) as logged:
        assert logged.size == picture.size
        assert logged.convert("RGB").tobytes() == picture.convert("RGB").tobytes()
    (advantage,) = found.Images("results/advantage")
    with Image.open(io.BytesIO(advantage.encoded_image_string)) as drawn:
        assert min(drawn.size) > 200
        assert len(set(drawn.convert("RGB").getdata())) > 10, "not blank"
    results = json.loads((run / "results.json").read_text())
    (scalar,) = found.Scalars("results/e-dpo/advantage")
    assert scalar.value == pytest.approx(results["methods"]["e-dpo"]["advantage"], rel=1e-6)


def test_a_run_that_is_evaluated_again_replaces_what_it_told(run: Path) -> None:
    before = events(run / "logs" / "results").Scalars("results/ipo/kl")
    trained(run, "tensorboard")
    assert len(list((run / "logs" / "results").iterdir())) == 1
    after = events(run / "logs" / "results").Scalars("results/ipo/kl")
    assert [event.value for event in after] == [event.value for event in before]


# ---------------------------------------------------------------- W&B and trackio, offline


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture
def private(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trackers write, and nothing is sent."""
    own = folder / "offline"
    own.mkdir(exist_ok=True)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(own))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return own


def records_of(data: bytes) -> Iterator[bytes]:
    """Of a .wandb file: after a header of 7 bytes, LevelDB's log, blocks of 32 KiB of pieces of records."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


@installed("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_has_configs_one_group_and_the_results(folder: Path, run: Path, private: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    its = trained(folder / "wandb", "wandb")
    told: dict[str, dict[str, Any]] = {}
    for file in sorted(private.rglob("*.wandb")):
        run_of, config, logged = None, {}, {}
        for data in records_of(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                run_of = (record.run.display_name, record.run.run_group, record.run.job_type)
                config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            if record.WhichOneof("record_type") == "config":
                config |= {update.key: json.loads(update.value_json) for update in record.config.update}
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    key, *inner = item.nested_key or [item.key]
                    value = json.loads(item.value_json)
                    if inner:  # of a table or a picture, which are told once
                        logged.setdefault(key, [{}])[0][inner[0]] = value
                    else:
                        logged.setdefault(key, []).append(value)
        assert run_of is not None
        told[run_of[0]] = {"group": run_of[1], "job": run_of[2], "config": config, "logged": logged, "file": file}
    assert {one["group"] for one in told.values()} == {str(its)}
    assert {name.rpartition("-")[0] for name in told} >= {"", "sft-policy", "policy-ipo", "policy-e-dpo"}
    for name, one in told.items():
        if name != "results":
            assert one["job"] == name.partition("-")[0]
            check_config(one["config"], name, its)
            assert len(one["logged"]["train/loss"]) == min(12, STEPS[name.partition("-")[0]])
    assert {"train/rewards/margins", "train/logps/chosen"} <= {
        key for name, one in told.items() if name.startswith("policy") for key in one["logged"]
    }
    results = told["results"]
    kept = results["file"].parent / "files"
    for name, check in (("table", check_table), ("samples", check_samples)):
        (value,) = results["logged"][f"results/{name}"]
        table = json.loads((kept / value["path"]).read_text())
        check(table["columns"], table["data"], its)
    assert (kept / results["logged"]["results/advantage"][0]["path"]).is_file()
    (value,) = results["logged"]["results/frontier"]
    with Image.open(kept / value["path"]) as logged_picture, Image.open(its / "results.png") as picture:
        assert logged_picture.size == picture.size


@installed("trackio")
@pytest.mark.filterwarnings("ignore")
def test_trackio_has_configs_one_group_and_the_results(folder: Path, private: Path) -> None:
    its = trained(folder / "trackio", "trackio")
    (database,) = private.rglob("*.db")
    with sqlite3.connect(database) as connection:
        configs = {name: json.loads(text) for name, text in connection.execute("select run_name, config from configs")}
        logged: dict[str, dict[str, list[Any]]] = {}
        for name, text in connection.execute("select run_name, metrics from metrics"):
            for key, value in json.loads(text).items():
                logged.setdefault(name, {}).setdefault(key, []).append(value)
    assert {config["_Group"] for config in configs.values()} == {str(its)}
    told = f"results of {its}"
    assert {name.rpartition("-")[0] for name in logged if name != told} >= {"sft-policy", "policy-ipo", "policy-e-dpo"}
    for name, config in configs.items():
        if name != told:
            check_config(config, name, its)
            assert len(logged[name]["train/loss"]) == STEPS[name.partition("-")[0]]
    results = logged[told]
    for name, check in (("table", check_table), ("samples", check_samples)):
        (value,) = results[f"results/{name}"]
        rows = value["_value"]
        check(list(rows[0]), [list(row.values()) for row in rows], its)
    assert len(results["results/advantage"]) == 1
    (value,) = results["results/frontier"]
    (file,) = private.rglob(Path(value["file_path"]).name)
    with Image.open(file) as logged_picture, Image.open(its / "results.png") as picture:
        assert logged_picture.size == picture.size
