"""A run report is one safe page whose numbers are those of results.json, of a folder as a run leaves it."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from figures.record import read
from figures.run_frontier import paths
from lm.base.store import MissingArtifact
from lm.models.loading import load_tokenizer
from lm.objectives import DPO, DRDO, IPO, METHODS, DistilledDPO, EnsembleDPO, Method, Pessimism, PessimisticDPO
from lm.report import main
from lm.reporting.cautions import cautions
from lm.reporting.formulas import formula, objective
from lm.reporting.page import page, visible, write_report
from tests.recorded import recorded
from tests.tiny import causal_lm

HOSTILE = "<script>alert(1)</script> \"'></td></table> \u202edesrever\u0000\x1b[2J\ud800 {{ 7 * 7 }} &amp; --> ]]>"
SETTINGS: dict[str, Method] = {"dpo": DPO(beta=0.37), "e-dpo": EnsembleDPO(), "drdo": DRDO(alpha=0.19)}
VOID = {"meta", "br", "link", "img", "input", "hr"}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))  # ASCII, with escapes for what no file can hold


def make_run(folder: Path, text: str = "plain words") -> Path:
    """What a run of three methods leaves, as far as a report reads it; every text of it is `text`."""
    results = recorded(SETTINGS, text)
    for name in results["methods"]:
        losses = [{"step": step, "loss": 1 / step} for step in (1, 2, 4)]
        write(folder / f"policy/{name}-abc/artifact.json", {"metrics": {"history": [*losses, {"step": 4}]}})
    sampled = {"oracle_reward": 0.123456, "length": 3, "finished": False}
    for name in ("sft", *results["methods"]):
        path = folder / f"evaluate/{name}-abc/samples.jsonl"
        path.parent.mkdir(parents=True)
        rows = [{"prompt": f"{text} {i}", "completion": f"{name} says {text} {i}", **sampled} for i in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "results.json", results)
    (folder / "config.yaml").write_text(f"model: {text}\n", encoding="utf-8", errors="replace")
    return folder


class Parsed(HTMLParser):
    """Tags in their order, attributes and text of a page; asserts that every element is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str | None]:
        return [value for attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def parsed(run: Path) -> Parsed:
    return Parsed(page(run))


def change(run: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the folder whose results.json was edited."""
    made = make_run(folder)
    results = json.loads((run / "results.json").read_text())
    edit(results)
    write(made / "results.json", results)
    return made


def test_the_page_is_well_formed_and_its_ids_are_its_own(parsed: Parsed) -> None:
    ids = Counter(parsed.values("id"))
    assert max(ids.values()) == 1
    assert len(ids) > 50, "those of the figures among them"
    used = {str(link)[1:] for name in ("href", "xlink:href") for link in parsed.values(name)}
    used |= {
        inner
        for name in ("clip-path", "style")
        for v in parsed.values(name)
        for inner in re.findall(r"url\(#(.*?)\)", v or "")
    }
    assert used <= set(ids), "every reference stays on the page"
    assert parsed.tags.count("h1") == parsed.tags.count("main") == 1
    assert parsed.tags.count("svg") == 1 + 1 + 2 + 4 + 1 + 3, "overview, frontier, spread, probes, members, losses"


def test_nothing_is_fetched_and_nothing_runs(parsed: Parsed) -> None:
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    policy = dict(
        entry.strip().split(" ", 1)
        for entry in next(v for v in parsed.values("content") if v and "src" in v).split(";")
    )
    assert policy["default-src"] == "'none'"
    assert set(policy) == {"default-src", "style-src", "base-uri", "form-action"}


def test_the_numbers_are_those_of_the_results(run: Path, parsed: Parsed) -> None:
    results = json.loads((run / "results.json").read_text())
    shown = Counter(map(str, parsed.values("value")))
    expected = Counter[str]()
    for row in results["methods"].values():
        keys = (
            "advantage",
            "oracle_reward",
            "length",
            "kl",
            "chosen_logratio",
            "rejected_logratio",
            "accuracy",
            "step",
        )
        expected.update(repr(row[key]) for key in keys)
        expected.update(map(repr, row["ci"]))
        expected.update(repr(tried[key]) for tried in row["validation"] for key in ("advantage", "kl"))
    for test in results["wald"].values():
        expected.update(repr(test[key]) for key in ("difference", "p") if test[key] is not None)
    for subset in results["bias"].values():
        expected.update(map(repr, subset.values()))
    for name in ("agreement", "ties_dropped", "longer_preferred"):
        expected[repr(results["labels"][name])] += 1
    for classes in (results["oracle"], *results["reward_models"].values()):
        how_sure = classes.pop("calibration", {})
        expected.update(map(repr, how_sure.values()))
        expected.update(repr(kind["accuracy"]) for kind in classes.values() if kind["pairs"])
    assert not expected - shown
    assert expected["0.8181"] == 1, "there is something to miss"
    assert "+0.123" in parsed.text
    assert "-0.011 to +0.333" in parsed.text
    assert "p 0.043" in parsed.text
    assert "p <.001" in parsed.text
    assert "p –" in parsed.text


def test_another_number_is_another_page(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["methods"]["dpo"]["length"] = 98.765

    changed = Parsed(page(change(run, tmp_path / "run", edit)))
    assert "98.765" in changed.values("value")
    assert "98.765" not in parsed.values("value")


def test_what_validation_chose_from_is_said(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        for tried in results["methods"]["dpo"]["validation"]:
            tried["advantage"] = -0.25

    assert "the greatest was chosen." in parsed.text
    assert "Every advantage on validation prompts is negative" not in parsed.text
    changed = Parsed(page(change(run, tmp_path / "run", edit))).text
    assert "the greatest was chosen, the earliest in the list of the 2 that tie." in changed
    assert "Every advantage on validation prompts is negative: none of these is better than SFT." in changed


def test_tests_are_counted(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        del results["methods"]["drdo"], results["wins"]["drdo"], results["looks"]["drdo"]
        results["wald"] = {"dpo - e-dpo": results["wald"]["dpo - e-dpo"]}

    assert "paired by prompt; 3 tests, not corrected for their number." in parsed.text
    assert "paired by prompt; 1 test." in Parsed(page(change(run, tmp_path / "run", edit))).text


def test_the_page_begins_with_what_to_know_before_it_is_believed(run: Path, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["sft"]["utility"] = 2.0
        results["methods"]["drdo"]["utility"] = 1.5

    made = change(run, tmp_path / "run", edit)
    text = Parsed(page(made)).text
    said = cautions(read(made / "results.json"))
    assert len(said) > 5
    places = [text.index(one.line) for one in said]
    assert text.index("Warnings\n") < min(places) <= max(places) < text.index("One sample of each policy")
    assert "drdo: gains oracle reward (+0.370) and loses true utility (-0.500, from 2.000 to 1.500)" in text


def test_what_was_not_recorded_is_said_and_what_was_is_shown(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["best_of_n"] = [{"n": 4, "kl": 0.6363, "advantage": 0.5151, "ci": [0.4, 0.6], "prompts": 32}]
        for tried in results["methods"]["dpo"]["validation"]:
            del tried["kl"]

    assert "No best of n of π_ref as a yardstick: it takes sampling.reference_samples of 2 or more" in parsed.text
    assert "The KL of some of these was not recorded" not in parsed.text
    made = change(run, tmp_path / "run", edit)
    cost = {"wall_seconds": 3725.0, "cpu_seconds": 59.94, "peak_bytes": 3 * 2**29, "resumed": True}
    history = [{"step": 1, "loss": 1.0}, {"step": 1, "train_runtime": 61.0}]
    record = {"stage": "policy", "name": "dpo", "metrics": {"history": history}, "cost": cost}
    write(made / "policy/dpo-abc/artifact.json", {**record, "provenance": {"date": "2026-02-03T04:05:06"}})
    shown = Parsed(page(made))
    assert "The KL of some of these was not recorded; they are not drawn." in shown.text
    assert "The best of n samples of π_ref by the oracle, on 32 held-out prompts" in shown.text
    assert {"0.6363", "0.5151"} <= set(shown.values("value"))
    row = "policydpo2026-02-03T04:05:061 min 01 s1 h 02 min, resumed59.9 s1.50 GiB"
    assert row in shown.text
    assert "policydrdonot recorded–not recordednot recordednot recorded" in shown.text
    assert "accelerator" not in shown.text
    write(made / "policy/drdo-abc/artifact.json", {**record, "cost": {"cuda_peak_bytes": 2**30}})
    assert "peak memory, accelerator" in Parsed(page(made)).text


def test_samples_can_be_filtered_without_a_script(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    path = made / "evaluate/drdo-abc/samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["oracle_reward"] -= 0.1 * (i % 2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = page(made)
    assert "drdo loses to SFT (3)" in Parsed(shown).text
    assert "dpo loses to SFT (0)" in Parsed(shown).text
    assert "a sample is cut off (6)" in parsed.text
    assert "true utility" not in parsed.text, "no filter by what is not known"
    classes = Parsed(shown).values("class")
    assert classes.count("lost-3 cut") == classes.count("cut") == 3
    rule = "#samples-of:has(#only-lost-3:checked) details:not(.lost-3) { display: none }"
    assert rule in shown
    assert "#samples-of:has(#show-4:not(:checked)) .policy-4 { display: none }" in shown
    ids = {str(i) for i in parsed.values("id")}
    assert set(re.findall(r"#((?:show|only)-[\w-]+)", shown)) <= ids


def test_the_lines_of_the_page_load_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere/policy/dpo-abc/step-2"
    made = load_tokenizer("scratch:tiny", ["plain words 1", "dpo says plain words"] * 5, False)
    causal_lm(vocab_size=len(made)).float().save_pretrained(folder)
    made.save_pretrained(folder)
    lines = Parsed(page(make_run(tmp_path / "run", 'plain "words" isn\'t'))).text
    start = lines.index("from transformers", lines.index("Loading\n") + 1)
    code = next(part for part in lines[start:].split("from transformers") if "dpo-abc/step-2" in part)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec("from transformers" + code[: code.index("skip_special_tokens=True))")] + "skip_special_tokens=True))", space)
    assert space["tokenizer"].decode(space["prompt"].input_ids[0]) == 'plain "words" isn\'t 0'
    assert space["prompt"].input_ids.shape[1] < space["ids"].shape[1] <= space["prompt"].input_ids.shape[1] + 3


def test_the_command_can_be_pasted(run: Path, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["provenance"]["command"] = ["python", "-m", "lm.train", "--methods", "[dpo, e-dpo]"]

    assert "python -m lm.train --methods '[dpo, e-dpo]'" in Parsed(page(change(run, tmp_path / "run", edit))).text


def test_no_text_of_a_run_becomes_markup(parsed: Parsed, tmp_path: Path) -> None:
    hostile = Parsed(page(make_run(tmp_path / "run", HOSTILE)))
    assert hostile.tags == parsed.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in parsed.attributes]
    shown = HOSTILE.replace("\u202e", "<U+202E>").replace("\x00", "<U+0000>").replace("\x1b", "<U+001B>")
    shown = shown.replace("\ud800", "<U+D800>")
    for place in (f"{shown} 5", f"dpo says {shown} 0", f"17 {shown}", visible(shlex.join(["train.py", HOSTILE]))):
        assert place in hostile.text
    assert "<script>" not in parsed.text


def test_characters_that_act_unseen_are_written_out() -> None:
    assert visible("a\u200bb\u2028c\rd\u2066e") == "a<U+200B>b<U+2028>c<U+000D>d<U+2066>e"
    assert visible("tab\tline\nمی\u200cخواهم 👩\u200d🔬 é") == "tab\tline\nمی\u200cخواهم 👩\u200d🔬 é"
    assert visible(3.5) == 3.5


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DPO(), "ℓ=log(1+e−Δβ)"),
        (IPO(), "ℓ=(Δ−12τ)2"),
        (DistilledDPO(), "ℓ=(−Δβ+δ)2"),
        (PessimisticDPO(), "ℓ=αKL(y)+log(1+e−Δβ)"),
        (EnsembleDPO(), "ℓ=αKL(y)+(−Δβ+δk)2"),
        (METHODS["hull-dpo"](), "ℓ=αKL(y)+(−Δβ+δ̄)2"),
        (METHODS["cdpo"](), "ℓ=εlog(eΔβ+1)+(1−ε)log(1+e−Δβ)"),
        (METHODS["hinge"](), "ℓ=max(0,−Δβ+1)"),
        (METHODS["dpop"](), "ℓ=log(1+e−β(−λmax(0,−uw)−ul+uw))"),
        (DRDO(), "ℓ=−α(log(πw)−log(1−πl))(1+πwπl)γ+(δ−δ̂)2"),
        (DRDO(reward_estimate="implicit", beta=0.5), "ℓ=−α(log(πw)−log(1−πl))(1+πwπl)γ+(−Δβ+δ)2"),
    ],
)
def test_formulas_are_what_the_methods_compute(method: Method, expected: str) -> None:
    assert Parsed(formula(method)).text.replace("\u2062", "") == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_its_source_and_its_letters(name: str) -> None:
    shown = objective(name, asdict(METHODS[name]()))
    assert re.search(r"\[[FN]\] eq|\b20\d\d\b|ours", shown.says)
    assert ("KL(y)" in " ".join(shown.where)) == ("KL" in Parsed(shown.formula).text)
    assert ("Δ =" in " ".join(shown.where)) == ("Δ" in Parsed(shown.formula).text)


def test_options_that_change_the_objective_change_what_is_said() -> None:
    def where(name: str, method: Method) -> str:
        return " ".join(objective(name, asdict(method)).where)

    assert "per token" in where("ipo", IPO(length_normalised=True))
    assert "per token" not in where("ipo", IPO())
    assert "oracle of its own" in where("drdo", DRDO(oracle_alpha=0.01))
    assert "oracle of its own" not in where("drdo", DRDO())
    assert "by the reward model" in where("drdo", DRDO())
    constant = Pessimism(alpha_start=0.5, alpha_end=0.5, samples="preferences")
    assert "α = 0.5 throughout" in where("p-dpo", PessimisticDPO(kl=constant))
    assert "pair's own completions" in where("p-dpo", PessimisticDPO(kl=constant))
    assert "from 0.0001 at the first step, linearly, to 0.01" in where("p-dpo", PessimisticDPO())
    held = where("p-dpo", PessimisticDPO(kl=Pessimism(target=1.5)))
    assert "α: by dual ascent, so that the mean of KL(y) is 1.5 nats" in held
    assert "first step" not in held


def test_a_target_leaves_the_formula_with_alpha_as_a_letter() -> None:
    assert formula(PessimisticDPO(kl=Pessimism(target=1.5))) == formula(PessimisticDPO())


def test_members_are_drawn_of_methods_that_distil_them(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        for entry in results["methods"]["dpo"]["probe"]:
            entry["member_shares"] = [0.5, 0.5]

    assert Parsed(page(change(run, tmp_path / "run", edit))).tags == parsed.tags


def test_without_a_probe_the_page_says_so(run: Path, parsed: Parsed, tmp_path: Path) -> None:
    def edit(results: dict[str, Any]) -> None:
        for row in results["methods"].values():
            row["probe"] = []

    without = Parsed(page(change(run, tmp_path / "run", edit)))
    assert "No probe was asked for:" in without.text
    assert without.tags.count("svg") == 1 + 1 + 2 + 3
    assert "No probe" not in parsed.text


def renamed(results: dict[str, Any]) -> None:
    """The first method becomes one of another version."""
    text = json.dumps(results).replace('"dpo', '"kto').replace("- dpo", "- kto")
    results.update(json.loads(text))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("wins"), r"results.json lacks wins: it is not whole; .* `python -m lm.evaluate --config /"),
        (
            lambda r: r.pop("version"),
            r"results.json has no version, and version 1 is read here; .* `python -m lm.evaluate",
        ),
        (lambda r: r["sft"].pop("samples"), r"lacks sft.samples: "),
        (lambda r: r["methods"]["drdo"].pop("probe"), r"lacks methods.drdo.probe: "),
        (
            lambda r: [row.pop("ci") for row in r["methods"].values()],
            r"methods.dpo.ci, methods.e-dpo.ci, methods.drdo.ci",
        ),
        (lambda r: r["labels"].pop("longer_preferred"), r"lacks labels.longer_preferred: "),
        (lambda r: r["methods"].update(kto=r["methods"]["dpo"]), r"lacks looks.kto, wins.kto.sft, wald.dpo - kto, "),
        (renamed, r"methods must be among dpo, ipo, .*, which this version has; got kto"),
        (
            lambda r: r["methods"]["dpo"].update(setting={"tau": 1.0}),
            r"methods.dpo.setting does not fit .* \{'tau': 1.0\}",
        ),
        (lambda r: r["sft"].update(samples="../../secret.jsonl"), r"'../../secret.jsonl' leads out of "),
    ],
)
def test_old_or_partial_results_are_refused(edit: Any, message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        page(change(run, tmp_path / "run", edit))


def test_what_is_missing_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*results.json; finish the run"):
        page(tmp_path)
    made = make_run(tmp_path / "run")
    other = made / "evaluate/dpo-abc/samples.jsonl"
    whole = other.read_text()
    other.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"the samples of dpo in .* are of other prompts than those of sft"):
        page(made)
    other.write_text(whole.replace('"length"', '"longth"', 1))
    with pytest.raises(ValueError, match=r"dpo-abc/samples.jsonl, line 1: no length"):
        page(made)
    other.unlink()
    with pytest.raises(MissingArtifact, match=r"there is no .*evaluate/dpo-abc/samples.jsonl, whose samples"):
        page(made)
    other.write_text(whole)
    (made / "policy/drdo-abc/artifact.json").unlink()
    with pytest.raises(MissingArtifact, match=r"there is no .*policy/drdo-abc/artifact.json, whose training"):
        page(made)
    (made / "results.json").write_text("{")
    assert main([str(made)]) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: .*results.json is not JSON \(", error)
    assert "Traceback" not in error
    assert main([str(made), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert not (made / "report.html").exists()


def test_the_command_writes_the_same_page_every_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    path = run / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    written = path.read_text(encoding="utf-8")
    assert write_report(run).read_text(encoding="utf-8") == written == page(run)


def test_the_frontier_joins_the_snapshots_of_a_setting_whose_kl_is_known(run: Path) -> None:
    row = read(run / "results.json").methods["dpo"]
    one, other = row.validation
    elsewhere = replace(one, setting={"beta": 9.0}, kl=0.1)
    unknown = replace(one, setting={"beta": 7.0}, kl=None)
    mixed = replace(row, validation=[other, one, elsewhere, unknown])
    assert paths(mixed) == [[(0.3737, 0.4141), (0.3737, 0.2323)], [(0.1, 0.4141)]]
