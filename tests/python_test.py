"""`lm` from Python: the page and the notebook run, and what they show is what the stages made."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from rich.table import Table
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm
from lm.base import progress
from lm.base.command import only_run_in, quietened
from lm.base.options import parse, parse_values
from lm.integrations.python import Loaded, Policy, as_html
from lm.models.loading import SCRATCH
from lm.reporting.cautions import cautions
from lm.stages.policies import policy as stage_of_policy
from lm.stages.scores import export_rows
from tests.docs_test import SMALL, blocks

ROOT = Path(__file__).parents[1]
SHORTER = {'lm.load("demo"': 'lm.load("demo", "small.yaml"', "runs/tour": "runs/python", '"posts": 400': '"posts": 60'}
"""The same code on a very small world, the page's and the notebook's in one folder."""


# ---------------------------------------------------------------- importing


def test_importing_is_cheap() -> None:
    heavy = ["torch", "transformers", "datasets", "numpy", "jsonargparse", "rich", "tqdm"]
    code = "import sys, lm; assert {'load', 'show', 'be_quiet'} <= set(dir(lm)); from lm import be_quiet; "
    code += f"print(*sorted(set({heavy}) & set(sys.modules)), be_quiet.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["lm.base.progress"]
    with pytest.raises(AttributeError, match="no attribute 'lod'; it offers be_quiet, load, show"):
        _ = lm.lod


def test_everything_that_is_offered_is_there() -> None:
    assert sorted(lm.__all__) == sorted(lm.OFFERED)
    for name, module in lm.OFFERED.items():
        assert getattr(lm, name).__module__ == module


# ---------------------------------------------------------------- the page and the notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the page's code runs, quietly, with models of next to no size."""
    made = tmp_path_factory.mktemp("python")
    (made / "small.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        progress.be_quiet()
        yield made
        progress.be_quiet(False)


def shorter(code: str) -> str:
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


def execute(code: str, names: dict[str, Any]) -> Any:
    """The value of the last expression of a cell, as a notebook shows it; None where it ends otherwise."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)  # the repository's own text
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def in_html(value: Any) -> str | None:
    shows = getattr(value, "_repr_html_", None)
    return None if shows is None else shows()


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """What the page's first block leaves behind."""
    (_, first), *_ = blocks(ROOT / "docs" / "python.md", "python")
    found: dict[str, Any] = {}
    execute(shorter(first), found)
    return found


def test_the_page_runs(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (_, first), *others = blocks(ROOT / "docs" / "python.md", "python")
    assert 9 <= len([line for line in first.splitlines() if line and not line.startswith("import")]) <= 10
    shown = [execute(shorter(code), names) for _, code in others]
    printed = capsys.readouterr()
    assert "did you mean dpo.beta?" in printed.out
    assert len(shown) == 6
    assert shown[-2].exists(), "report.html"
    assert progress.is_quiet()
    stages = [line for line in printed.err.splitlines() if line.startswith("[")]
    assert stages in ([], ["[data] world"]), "quiet, but for what asks to hear; the rest was finished"


def test_the_notebook_runs_and_shows_itself(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    own: dict[str, Any] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "outputs are stripped"
            shown.append(execute(shorter("".join(cell["source"])), own))
    said = capsys.readouterr()
    assert said.err == ""
    assert "-> " in said.out
    assert not [value for value in shown if re.search(r"<[\w.]+ object", in_html(value) or repr(value))]
    whole = next(value for value in shown if "<svg" in (in_html(value) or ""))
    assert {"dpo", "d-dpo", "e-dpo"} == set(whole.methods)


def test_nothing_is_said_or_changed_in_a_process_that_is_not_ours(folder: Path) -> None:
    """In an interpreter of its own, as a script has it: conftest has this one speak."""
    code = (
        "import logging, os, sys, warnings, transformers, datasets\n"
        "def state():\n"
        "    return (dict(os.environ), list(warnings.filters), transformers.logging.get_verbosity(),\n"
        "            datasets.are_progress_bars_disabled(), logging.getLogger('accelerate').level)\n"
        "import lm, lm.integrations.python  # others' modules add filters of their own as they are imported\n"
        "before = state()\n"
        "run = lm.load('demo', 'small.yaml', output_dir='runs/quiet', methods=['dpo'])\n"
        "assert state() == before, [(one, was) for one, was in zip(state(), before) if one != was]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- what is shown is what the stages made


def test_it_is_the_stages_that_work(names: dict[str, Any], folder: Path) -> None:
    run, policy, results = names["run"], names["policy"], names["results"]
    assert isinstance(run, Loaded)
    assert isinstance(policy, Policy)
    assert policy.folder == stage_of_policy(run.run, "e-dpo").path
    assert list(run.score()) == list(export_rows(run.run))
    record = json.loads((folder / "runs" / "python" / "results.json").read_text())
    for name, row in results.methods.items():
        assert record["methods"][name]["advantage"] == row.advantage
    written = (folder / "runs" / "python" / "config.yaml").read_text()
    assert yaml.safe_load(written)["data"]["world"]["posts"] == 60
    found = lm.load("runs/python/config.yaml", methods=["dpo", "e-dpo"]).train("e-dpo")
    assert found.folder == policy.folder, "as the file of the run has them"


def test_what_evaluate_returns_shows_its_cautions(names: dict[str, Any]) -> None:
    results = names["results"]
    said = [one.line for one in results.cautions]
    assert said == [one.line for one in cautions(results.results)]
    assert len(said) > 1, "it is a run of 60 posts"
    assert repr(results).endswith("\n".join(f"warning: {line}" for line in said))
    parsed = Cells()
    parsed.feed(results._repr_html_().partition("<svg")[0])
    assert [text for text in parsed.texts if text.startswith("warning: ")] == [f"warning: {line}" for line in said]


def test_evaluate_tells_the_trackers(names: dict[str, Any], folder: Path) -> None:
    lm.load("runs/python/config.yaml", report_to=["tensorboard"]).evaluate()
    found = EventAccumulator(str(folder / "runs" / "python" / "logs" / "results")).Reload()
    told = {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"] if name.endswith("/advantage")}
    methods = names["results"].methods
    assert told == {f"results/{name}/advantage": pytest.approx(row.advantage) for name, row in methods.items()}


def test_log_probs_are_those_of_transformers(names: dict[str, Any]) -> None:
    policy, prompts, completions = names["policy"], names["prompts"], names["completions"]
    model = AutoModelForCausalLM.from_pretrained(policy.folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(policy.folder)
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before = tokenizer(prompt)["input_ids"]
        ids = [*before, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(float(sum(logps[i - 1, ids[i]] for i in range(len(before), len(ids)))))
    assert policy.logps(prompts, completions) == pytest.approx(np.array(expected), rel=1e-5)


def test_samples_are_drawn_by_seed_and_temperature(names: dict[str, Any]) -> None:
    policy, prompts = names["policy"], names["prompts"]
    assert policy.sample(prompts, seed=1) == names["completions"]
    assert policy.sample(prompts, seed=2) != names["completions"]
    coldest = policy.sample(prompts[:2], temperature=1e-6, seed=3)
    assert coldest == policy.sample(prompts[:2], temperature=1e-6, seed=4), "the likeliest tokens, whatever the seed"
    assert policy.sample([]) == []


def test_options_are_the_commands(tmp_path: Path) -> None:
    words = ["--config", "demo", "--output_dir", "x", "--methods", "[dpo, e-dpo]", "--e_dpo.kl.alpha_end", "0.5"]
    words += ["--data.world.posts", "70", "--sweep", "{dpo: [{beta: 1}]}", "--bias.rho", "null", "--device", "cpu"]
    values = {
        "output_dir": Path("x"),
        "methods": ["dpo", "e-dpo"],
        "e_dpo": {"kl": {"alpha_end": 0.5}},
        "data": {"world": {"posts": 70}},
        "sweep": {"dpo": [{"beta": 1}]},
        "bias": {"rho": None},
        "device": "cpu",
    }
    assert parse_values(["demo"], values) == parse("lm.train", "", words)
    assert parse_values([], {"sft": None, "model": "m", "data": {"kind": "hh", "path": "x"}})[0].sft.train == "nothing"


def test_what_is_longer_than_a_models_positions_is_refused(names: dict[str, Any]) -> None:
    """A position that a model has not learnt means nothing."""
    run, prompt = names["run"], "a war " * 400
    policy = run.train("sft")
    most = policy.model.model.config.max_position_embeddings
    message = (
        rf"prompts\[1\] has [\d,]+ tokens: with [\d,]+ of a completion they must be at most the {most:,} positions of"
    )
    with pytest.raises(ValueError, match=f"{message} sft"):
        policy.logps(["a", prompt], ["b", "c"])
    with pytest.raises(ValueError, match=f"{message} sft"):
        policy.sample(["a", prompt])
    with pytest.raises(ValueError, match=f"{message} oracle"):
        run.rewards(["a", prompt], ["b", "c"])
    assert len(policy.logps(["a"], ["b"])) == 1


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        (["dmo"], {}, "config: there is no file 'dmo'; .* did you mean --config demo?"),
        ([], {"sede": 1}, "sede=1; did you mean seed?"),
        ([], {"dpo": {"bta": 1}}, "dpo.bta=1; did you mean dpo.beta?"),
        ([], {"seed": "one"}, "seed must be a whole number, got one"),
        ([], {"output_dir": 3}, "output_dir must be text, got 3"),
        ([], {"model": None}, "model must be text, got None"),
        ([], {"data": {"path": True}}, "data.path must be text or null, got True"),
        ([], {"seed": object()}, "seed must be text, a number, .* got object"),
        ([], {"data": {"path": {1, 2}}}, r"data.path must be text or null, got {1, 2}"),
        ([], {"dpo": {"beta": -1}}, "DPO.beta|beta"),
        ([], {"quiet": True}, "quiet is an option of commands alone; lm.be_quiet"),
        ([], {"methods": ["dpo"], "ipo": {"tau": 1}}, "ipo.tau has no effect: methods are dpo"),
        ([], {"methods": ["dop"]}, "Config.methods must name one or more of dpo"),
        (
            [{"methods": ["dpo"]}],
            {},
            r"configs are presets by name, or files, got {'methods': \['dpo'\]}; options go by name",
        ),
        (["no.yaml", "demo"], {}, "config: there is no file 'no.yaml'"),
    ],
)
def test_mistakes_in_options(configs: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        lm.load(*configs, **options)
    assert "--dpo" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, policy: run.pairs("dev"), "split must be one of train, valid, test, got 'dev'"),
        (lambda run, policy: run.train("ipo"), "method must be one of dpo, e-dpo, sft, got 'ipo'"),
        (
            lambda run, policy: run.rewards(["a"], ["b"], model="b0.3"),
            "model must be one of oracle, rho, b0.2, b0.8, got",
        ),
        (lambda run, policy: run.rewards(["a"], ["b", "c"]), "a completion for each prompt is needed, got 1 and 2"),
        (lambda run, policy: policy.logps(["a"], "b"), "completions must be a list of them, got one text: 'b'"),
        (lambda run, policy: policy.sample("a"), "prompts must be a list of them, got one text: 'a'"),
        (lambda run, policy: policy.sample(["a", ""]), r"prompts\[1\] is empty"),
        (lambda run, policy: policy.sample(["a"], seed=-1), "seed must be >= 0, got -1"),
        (lambda run, policy: policy.sample(["a"], temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda run, policy: policy.sample([[{"role": "user", "content": "a"}]]), r"prompts\[0\]: there are messages"),
    ],
)
def test_mistakes_in_calls(call: Any, message: str, names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call(names["run"], names["policy"])


def test_a_folder_in_use_and_one_without_results(names: dict[str, Any], folder: Path) -> None:
    with only_run_in(folder / "runs" / "python"), pytest.raises(ValueError, match="is in use by another run"):
        names["run"].pairs()
    with pytest.raises(FileNotFoundError, match=r"results.json"):
        lm.show(folder)


# ---------------------------------------------------------------- showing


class Cells(HTMLParser):
    """The texts of a table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_table_in_html_is_text_in_cells() -> None:
    view = Table(title=Text("<i>&[red]"), caption="of [b]it[/b]")
    view.add_column("a<b>")
    view.add_column("c")
    view.add_row(Text("<script>[x]"), "1 & 2")
    parsed = Cells()
    parsed.feed(as_html(view))
    assert parsed.texts == ["<i>&[red]", "a<b>", "c", "<script>[x]", "1 & 2", "of it"]
    assert parsed.tags == ["table", "caption", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "p"]


def test_what_is_printed_in_a_notebook_is_text(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """rich, left to itself, would show it there at once and return nothing."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "preferences" in repr(names["run"])
    assert "e-dpo" in repr(names["results"])
    assert "\x1b" not in repr(names["results"])


def test_libraries_are_as_they_were_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    before = transformers.logging.get_verbosity(), dict(os.environ), list(warnings.filters)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    with pytest.raises(ZeroDivisionError), quietened():
        _ = 1 / 0
    with quietened():
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert (transformers.logging.get_verbosity(), dict(os.environ), list(warnings.filters)) == before
    assert logging.getLogger("accelerate").level == logging.WARNING


def test_a_notebooks_bars_are_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto
    import tqdm.std
    from tqdm.notebook import tqdm_notebook

    class Widget(tqdm_notebook):
        """Without ipywidgets to draw by."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            tqdm.std.tqdm.__init__(self, *arguments, **options)

        def display(self, *_: Any, **__: Any) -> None:
            pass

        close = display
        status_printer = staticmethod(lambda *_: None)

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    monkeypatch.setattr(progress, "_quiet", False)
    with progress.bar("rows", total=2) as bar:
        assert isinstance(bar, Widget)
        assert not bar.disable, "though no terminal is there"
    progress.be_quiet()
    assert progress.bar("rows", total=2).disable
