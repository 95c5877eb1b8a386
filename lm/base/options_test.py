"""Commands: every option explained, configs that round-trip, and mistakes that are one message and status 2."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from signal import SIGTERM, getsignal
from typing import Any

import pytest

from lm.__main__ import commands
from lm.base.command import as_command, only_run_in
from lm.base.options import CONFIGS, parse, parser_of
from lm.base.store import CorruptArtifact, MissingArtifact, Refused
from lm.config import Config
from lm.objectives import DPO, DRDO, PAPERS, EnsembleDPO, Pessimism
from lm.stages.run import Run, command

ROOT = Path(__file__).parents[2]
OTHERS = ["workflow.job", "workflow.regimes", "workflow.summary", "workflow.tables"]
WITH_OPTIONS_OF_THEIR_OWN = [
    "__main__",
    "bench",
    "card",
    "check",
    "diagnose",
    "estimate",
    "exact",
    "judge",
    "push",
    "report",
]
COMMANDS = ["prepare", "sft", "oracle", "relabel", "bias", "reward", "score", "policy", "train", "evaluate"]
COMMANDS += ["advise", "export", "nondeterministic"]


def config_of(*arguments: str) -> Config:
    return parse("lm.test", "", arguments)[0]


def attempt(folder: Path, *arguments: str, action: Any = lambda run: None) -> int:
    """Exit status, however the command leaves."""
    try:
        return command("lm.test", action, arguments=["--output_dir", str(folder), *arguments])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"lm.{command}", run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m lm.{command}" in out
    paragraph = out.split("\n\n")[1].replace("\n", " ")
    assert not paragraph.startswith("Without --config"), "the module's docstring opens the description"
    assert "--policy.learning_rate" in out


def test_no_other_module_is_a_command() -> None:
    modules = [path for path in CONFIGS.parent.glob("*.py") if not path.stem.endswith("_test")]
    found = {path.stem for path in modules if '__name__ == "__main__"' in path.read_text()}
    assert found == {*COMMANDS, *WITH_OPTIONS_OF_THEIR_OWN}


def test_every_option_is_explained() -> None:
    parser = parser_of("lm.test", "")
    options = {name: action.help for action in parser._actions for name in action.option_strings[-1:]}
    assert len(options) > 80
    assert not [name for name, text in options.items() if not (text or "").strip()]
    assert {"--bias.rho", "--hull_dpo.kl.alpha_end", "--data.world.posts", "--evaluation.prompts"} <= options.keys()


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_a_config(preset: Path) -> None:
    if preset.stem == "exact":  # of `lm.exact`, which has options of its own
        from lm.exact import parse

        assert parse(["--config", str(preset)])[0].prompts > 0
    else:
        under = ["--config", str(CONFIGS / "tldr.yaml")] if preset.stem in ("gpu", "sweep") else []  # laid over another
        assert config_of(*under, "--config", str(preset)).methods


def test_the_demo_is_the_preset_and_options_win_over_it() -> None:
    assert config_of() == config_of("--config", str(CONFIGS / "demo.yaml"))
    assert config_of().methods == list(PAPERS)
    changed = config_of("--dpo.beta=0.5", "--methods", "[dpo, e-dpo]", "--e_dpo.kl.samples", "preferences")
    assert changed.method("dpo") == DPO(beta=0.5)
    assert changed.methods == ["dpo", "e-dpo"]
    assert changed.method("e-dpo") == EnsembleDPO(beta=0.1, kl=Pessimism(samples="preferences")), "beta is the demo's"
    assert changed.method("ipo") == config_of().method("ipo")


def test_a_sweep_replaces_the_options_it_names() -> None:
    swept = config_of("--e_dpo.kl.alpha_end=0.5", "--sweep", "{e-dpo: [{beta: 3}, {kl: {alpha_start: 0.1}}]}")
    first, second = swept.settings("e-dpo")
    assert first == EnsembleDPO(beta=3.0, kl=Pessimism(alpha_end=0.5))
    assert second == EnsembleDPO(beta=0.1, kl=Pessimism(alpha_start=0.1, alpha_end=0.5))
    assert swept.settings("dpo") == [swept.method("dpo")]


def test_print_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dpo.beta", "0.25", "--bias.rho", "null", "--data.limit", "100", "--drdo.gamma", "3"]
    assert attempt(tmp_path / "a", *arguments, "--print_config") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = config_of("--config", str(printed))
    assert again == config_of("--output_dir", str(tmp_path / "a"), *arguments)
    assert (again.method("dpo"), again.bias.rho, again.method("drdo")) == (DPO(beta=0.25), None, DRDO(gamma=3.0))


def test_a_run_writes_its_resolved_config(tmp_path: Path) -> None:
    seen: list[Run] = []
    assert attempt(tmp_path, "--seed", "5", action=seen.append) == 0
    assert config_of("--config", str(tmp_path / "config.yaml")) == seen[0].config
    assert seen[0].config.seed == 5


@pytest.mark.parametrize("there", [False, True])
def test_what_is_refused_before_a_stage_has_begun_leaves_nothing_behind(there: bool, tmp_path: Path) -> None:
    """Neither a model that is nowhere nor a disk that is too small; nor is an earlier run's config written over."""
    folder = tmp_path / "runs" / "x"
    if there:
        folder.mkdir(parents=True)
    found = sorted(tmp_path.rglob("*"))

    def full(_: Run) -> None:
        raise Refused("the disk is full")

    assert attempt(folder, "--model", str(tmp_path / "nowhere")) == 2
    assert sorted(tmp_path.rglob("*")) == found
    assert attempt(folder, action=full) == 1
    assert sorted(tmp_path.rglob("*")) == found

    assert attempt(folder, "--seed", "5", action=lambda run: (run.store.root / "data").mkdir()) == 0
    kept = (folder / "config.yaml").read_text()
    assert attempt(folder, "--model", str(tmp_path / "nowhere")) == 2
    assert (folder / "config.yaml").read_text() == kept
    assert attempt(folder, "--seed", "6", action=full) == 1
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml", "data"]
    assert (folder / "config.yaml").read_text() == kept

    def begun(run: Run) -> None:
        run.store.begun = True
        raise Refused("the disk is full by now")

    assert attempt(folder, "--seed", "6", action=begun) == 1
    assert (folder / "config.yaml").read_text() != kept


def test_what_is_in_a_new_folder_is_nobodys_to_remove(tmp_path: Path) -> None:
    notes = tmp_path / "new" / "notes.txt"

    def refused() -> None:
        with only_run_in(notes.parent):
            notes.write_text("mine")
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "[dpo, rpo]"], "Config.methods must name one or more of dpo, ipo, .*got \\['dpo', 'rpo'\\]"),
        (["--methods", "[]"], "Config.methods must name one or more of"),
        (["--methods", "[dpo, dpo]"], "Config.methods names a method twice"),
        (["--dpo.betta", "0.3"], r"unrecognized arguments: --dpo.betta 0.3; did you mean --dpo.beta\?$"),
        (["--d-dpo.beta=1"], r"unrecognized arguments: --d-dpo.beta=1; did you mean --d_dpo.beta\?$"),
        (["--learning_rate", "1"], r"did you mean --sft.learning_rate or --policy.learning_rate or .* or \.\.\.\?$"),
        (["--unlike", "1"], "unrecognized arguments: --unlike 1$"),
        (["runs/x"], "unrecognized arguments: runs/x; all arguments are options, --OPTION VALUE$"),
        (["--methods", "dpo"], r"--methods must be a list, text each, as in --methods '\[dpo\]', got dpo$"),
        (["--dpo.beta", "x"], "--dpo.beta must be a number, got x$"),
        (["--dpo", "3"], "--dpo is a group of options, got 3; name one of it, as --dpo.beta$"),
        (["--sft.max_steps", "2.5"], "--sft.max_steps must be a whole number or null, got 2.5$"),
        (["--logprobs.compile", "maybe"], "--logprobs.compile must be true or false, got maybe$"),
        (["--sweep", "3"], "--sweep must be a mapping, got 3$"),
        (
            ["--evaluation.out_of_domain.events", "[1]"],
            r"events must be a list of 2, a whole number each, got '\[1\]'$",
        ),
        (["--policy.batch_size", "many"], "--policy.batch_size must be a whole number, got many$"),
        (["--dtype", "float16"], "--dtype must be one of float32, bfloat16, float64, got float16$"),
        (["--dpo.beta", "-1"], "DPO.beta must be a finite number > 0, got -1"),
        (["--ipo.tau", "0"], "IPO.tau must be a finite number > 0, got 0"),
        (["--p_dpo.kl.alpha_end", "-1"], "Pessimism.alpha_end must be a finite number >= 0, got -1"),
        (["--p_dpo.kl.target", "0"], "Pessimism.target must be a finite number > 0, got 0.0"),
        (["--e_dpo.kl.target", ".inf"], "Pessimism.target must be a finite number > 0, got inf"),
        (["--dp_dpo.kl.target", "far"], "--dp_dpo.kl.target must be a number or null, got far$"),
        (["--p_dpo.kl.target", "1", "--p_dpo.kl.rate", "-1"], "Pessimism.rate must be a finite number > 0, got -1.0"),
        (["--p_dpo.kl.rate", "0.1"], "Pessimism.rate is of the ascent to a target: give a target too, got rate 0.1"),
        (
            ["--hull_dpo.kl.target", "1", "--hull_dpo.kl.alpha_end", "0.5"],
            "alpha_start and alpha_end must be left out with a target, .* got 0.0001 and 0.5 with target 1",
        ),
        (
            ["--p_dpo.kl.target", "1", "--p_dpo.kl.alpha_start", "0", "--p_dpo.kl.alpha_end", "0"],
            "or be one number > 0 for it to start at; got 0 and 0 with target 1",
        ),
        (["--dpo.kl.target", "1"], "unrecognized arguments: --dpo.kl.target 1"),
        (["--drdo.kl.target", "1"], "unrecognized arguments: --drdo.kl.target 1"),
        (["--sweep", "{p-dpo: [{kl: {target: true}}]}"], "Pessimism.target must be a finite number > 0, got True"),
        (["--sweep", "{p-dpo: [{kl: {target: far}}]}"], "Pessimism.target must be a finite number > 0, got 'far'"),
        (["--drdo.beta", "1"], 'DRDO.beta goes with reward_estimate "implicit"'),
        (["--snapshots", "0"], "Config.snapshots must be > 0, got 0"),
        (["--snapshots", "1000"], "Config.snapshots must be at most policy.max_steps, got 1000"),
        (["--probe.pairs", "-1"], "ProbeConfig.pairs must be >= 0, got -1"),
        (["--evaluation.valid_prompts", "0"], "EvaluationConfig.valid_prompts must be > 0, got 0"),
        (["--sweep", "{rpo: [{beta: 1}]}"], "Config.sweep maps any of dpo, .*got 'rpo'"),
        (["--sweep", "{dpo: []}"], "Config.sweep maps any of dpo, .*got 'dpo': \\[\\]"),
        (["--sweep", "{dpo: [{tau: 1}]}"], "Config.sweep: dpo: a mapping of any of beta is needed, got {'tau': 1}"),
        (["--sweep", "{dpo: [{beta: 0.5}, {beta: 0.5}]}"], "Config.sweep names a setting of dpo twice"),
        (["--sweep", "{dpo: [{beta: high}]}"], "Config.sweep: dpo: beta must be of type float, got 'high'"),
        (["--sweep", "{p-dpo: [{kl: {alpha: 1}}]}"], "Config.sweep: p-dpo: kl: a mapping of any of alpha_end"),
        (["--sweep", "{p-dpo: [{kl: {alpha_end: -1}}]}"], "Pessimism.alpha_end must be a finite number >= 0"),
        (["--bias.rho", "1.5"], "BiasConfig.rho must be between 0 and 1, got 1.5"),
        (["--bias.rho", "null", "--bias.size", "10"], "BiasConfig.size goes with a rho"),
        (["--bias.length_ratio", "1"], "BiasConfig.length_ratio must be > 1 and finite, got 1"),
        (["--bias.member_fractions", "[0.5]"], "BiasConfig.member_fractions must be two or more shares"),
        (
            ["--policy.epochs", "null", "--policy.max_steps", "null"],
            "exactly one of epochs and max_steps, .* got None and",
        ),
        (["--policy.epochs", "1", "--policy.max_steps", "3"], "null for the other; got 1.0 and 3"),
        (["--policy.max_steps", "0", "--policy.epochs", "null"], "TrainingConfig.max_steps must be > 0, got 0"),
        (
            ["--policy.micro_batch_tokens", "-1"],
            "TrainingConfig.micro_batch_tokens must be > 0, got -1",
        ),
        (["--policy.learning_rate", "0"], "TrainingConfig.learning_rate must be > 0, got 0"),
        (["--policy.warmup_fraction", "2"], "TrainingConfig.warmup_fraction must be between 0 and 1, got 2"),
        (["--data.valid_fraction", "0.5", "--data.test_fraction", "0.5"], "must leave a training split"),
        (["--data.path", "x.jsonl"], "path and sft_path go with kinds other than \"world\", got 'x.jsonl'"),
        (["--data.kind", "hh"], 'DataConfig.path is needed for kind "hh"'),
        (["--data.kind", "tldr", "--data.path", "x.jsonl"], 'sft_path is needed for kind "tldr"'),
        (
            ["--data.kind", "hh", "--data.path", "x", "--data.sft_path", "y"],
            "sft_path is .* not read by \"hh\"; got 'y'",
        ),
        (["--data.rewards", "given"], 'DataConfig.rewards "given" goes with kind "preferences" only, got kind "world"'),
        (["--data.prompt_template", "TL;DR:"], "prompt_template must have {post} once, .* got 'TL;DR:'"),
        (["--data.prompt_template", "{post}{post}"], "prompt_template must have {post} once"),
        (["--data.prompt_template", "{post} {text}"], "beside it only {subreddit} and {title} in braces"),
        (["--data.prompt_template", "{post} }"], "prompt_template must have {post} once"),
        (["--data.limit", "0"], "DataConfig.limit must be > 0, got 0"),
        (["--data.world.max_events", "99"], "WorldConfig.max_events must be at least min_events and at most"),
        (["--sampling.temperature", "0"], "SamplingConfig.temperature must be > 0, got 0"),
        (["--evaluation.confidence", "95"], "EvaluationConfig.confidence must be between 0 and 1, got 95"),
        (["--model", "scratch:huge"], "model 'scratch:huge': the models from scratch are"),
        (["--model", "/no/where"], "model '/no/where': there is no such folder"),
        (["--oracle_model", "/no/where"], "model '/no/where': there is no such folder"),
        (
            ["--config", "/no/where.yaml"],
            "--config: there is no file '/no/where.yaml'; the presets in .* are demo.yaml, ",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_with_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Run] = []
    assert attempt(tmp_path, *arguments, action=started.append) == 2
    assert not started
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo: {bta: 1}", "there is no option --dpo.bta; did you mean --dpo.beta?"),
        ("polici: {epochs: 1}", "there is no option --polici.epochs; did you mean --policy.epochs?"),
        ("sft: {max_steps: 2.5}", "--sft.max_steps must be a whole number or null, got 2.5"),
    ],
)
def test_a_mistake_in_a_file_is_a_message_too(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"{text}\n")
    demo = ["--config", str(CONFIGS / "demo.yaml")]
    assert attempt(tmp_path, *demo, "--config", str(tmp_path / "mine.yaml")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'mine.yaml'}, line 1: {message}\n"


@pytest.mark.parametrize("arguments", [["lm.exact", "--prompts", "1.5"], ["lm.judge", "x", "--resamples", "1.5"]])
def test_commands_with_a_parser_of_their_own_say_it_alike(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(arguments[0]).parse(arguments[1:])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {arguments[-2]} must be a whole number, got 1.5\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError, 2),
        (FileNotFoundError, 2),
        (MissingArtifact, 2),
        (FloatingPointError, 1),
        (CorruptArtifact, 1),
        (OSError, 1),
    ],
)
def test_a_mistake_is_2_a_failure_is_1_and_debug_shows_where_it_came_from(
    error: type[Exception], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Run) -> None:
        raise error("row 5: what is wrong")

    assert attempt(tmp_path, action=fail) == status
    assert capsys.readouterr().err == "error: row 5: what is wrong\n"
    assert attempt(tmp_path, "--debug", action=fail) == status
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: row 5: what is wrong\n")


def test_our_own_faults_keep_their_traceback(tmp_path: Path) -> None:
    def fail(_: Run) -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        attempt(tmp_path, action=fail)


# ---------------------------------------------------------------- every command, whatever its options

WRONG: dict[str, list[str]] = {
    "advise": ["{nowhere}", "--output_dir", "{new}", "--model", "{nowhere}"],
    "bias": ["{nowhere}", "--rho", "0.2", "--out", "{new}"],
    "card": ["{nowhere}", "dpo"],
    "check": ["{nowhere}"],
    "diagnose": ["{nowhere}"],
    "estimate": ["--parameters", "0"],
    "exact": ["--output_dir", "{new}", "--tokens", "1"],
    "export": ["--out", "{new}.jsonl", "--output_dir", "{new}", "--model", "{nowhere}"],
    "judge": ["{nowhere}", "--judge", "oracle"],
    "push": ["{nowhere}", "dpo", "--repo-id", "me/mine"],
    "report": ["{nowhere}"],
    "workflow.job": ["base", "--out", "{new}", "--output_dir", "{new}", "--model", "{nowhere}"],
    "workflow.regimes": ["--runs", "{nowhere}", "--out", "{new}"],
    "workflow.summary": ["{nowhere}", "--out", "{new}"],
    "workflow.tables": ["{nowhere}"],
}
"""Arguments that are well-formed, and name what is not there or out of range; of the other commands, those of a run."""


def call(command: str, *arguments: str) -> int:
    """The exit status of `python -m lm.<command>`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"lm.{command}", run_name="__main__", alter_sys=True)
    assert isinstance(end.value.code, int)
    return end.value.code


EVERY = [*(name.removeprefix("lm.") for name in commands()), *OTHERS]
of_every_command = pytest.mark.parametrize("command", EVERY)
again = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@again
@of_every_command
def test_every_help_has_examples_whose_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    examples = re.findall(rf"^  python -m lm\.{re.escape(command)}(?: (.*))?$", shown, flags=re.MULTILINE)
    assert examples
    assert "exit status: 0 done; 1 failed; 2 a mistake" in shown
    everything = (
        shown if command not in ("estimate", "export", "workflow.job") else shown + parser_of("", "").format_help()
    )
    for option in re.findall(r"(?<!\S)--[\w.-]+", " ".join(examples)):
        assert re.search(rf"(?m)^ +(-\w, )?{option}\b", everything) or f"{option} " in shown.split("\nexamples:")[0], (
            option
        )


@again
@pytest.mark.parametrize("command", ["train", "exact", "report", "score", "judge"])
def test_options_are_not_abbreviated(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [argument.format(nowhere=tmp_path / "nowhere", new=tmp_path / "new") for argument in WRONG.get(command, [])]
    assert call(command, *given, "--debu") == 2
    assert "--debu" in (error := capsys.readouterr().err)
    assert "Traceback" not in error


@again
@of_every_command
def test_an_unknown_option_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--parameters", "1e9"] if command == "estimate" else WRONG.get(command, [])
    given = [argument.format(nowhere=tmp_path / "nowhere", new=tmp_path / "new") for argument in needed]
    assert call(command, *given, "--no-such-option", "1") == 2
    shown = capsys.readouterr()
    assert "--no-such-option" in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out
    assert not (tmp_path / "new").exists()


@again
@of_every_command
def test_a_mistake_has_a_traceback_with_debug_only(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "bench":
        pytest.skip("its only mistakes are those of its options")
    wrong = WRONG.get(command, ["--output_dir", "{new}", "--model", "{nowhere}"])
    given = [argument.format(nowhere=tmp_path / "nowhere", new=tmp_path / "new") for argument in wrong]
    assert call(command, *given) == 2
    shown = capsys.readouterr()
    assert re.match("error: .+", shown.err)
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) == 1
    assert call(command, *given, "--debug") == 2
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert re.search("^error: ", shown.err, flags=re.MULTILINE)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


# ---------------------------------------------------------------- how a command ends; see tests/commands_test.py too


def test_a_command_returns_what_its_function_does_or_0() -> None:
    assert as_command(lambda given: 1 if given else None)(["x"]) == 1
    assert as_command(lambda given: 1 if given else None)([]) == 0


def test_sigterm_is_handled_as_before_when_a_command_has_ended() -> None:
    before = getsignal(SIGTERM)
    seen = []
    assert as_command(lambda _: seen.append(getsignal(SIGTERM)))([]) == 0
    assert seen[0] is not before
    assert getsignal(SIGTERM) is before


# ---------------------------------------------------------------- options of earlier versions


def test_options_that_are_no_more_are_read_where_they_did_nothing(tmp_path: Path) -> None:
    """As in the config.yaml of a finished run."""
    older = tmp_path / "config.yaml"
    older.write_text("output_dir: x\ndata: {subset: null}\nlora: {dropout: 0.0}\ndrdo_oracle_alpha: null\n")
    demo = ["--config", str(CONFIGS / "demo.yaml")]
    assert config_of(*demo, "--config", str(older)) == config_of(*demo, "--output_dir", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {subset: helpful-base}", "option data.subset is no more, got 'helpful-base': name the folder in data"),
        ("lora: {dropout: 0.1}", "option lora.dropout is no more, got 0.1: there is none"),
        ("drdo_oracle_alpha: 0.01", "option drdo_oracle_alpha is no more, got 0.01: it is drdo.oracle_alpha now"),
    ],
)
def test_options_that_are_no_more_and_did_something_are_refused_with_the_cure(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    demo = ["--config", str(CONFIGS / "demo.yaml")]
    assert attempt(tmp_path, *demo, "--config", str(tmp_path / "config.yaml")) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("stage", ["reward", "oracle"])
def test_a_head_needs_no_length_of_an_earlier_source_to_be_taken_back(stage: str, tmp_path: Path) -> None:
    """Neither on the command line nor in a later file: a head is solved for."""
    later = tmp_path / "later.yaml"
    later.write_text(f"{stage}: {{train: head}}\n")
    for words in (["--config", "demo", f"--{stage}.train", "head"], ["--config", "demo", "--config", str(later)]):
        config, _ = parse("lm.train", "", words)
        training = getattr(config, stage)
        assert (training.train, training.epochs, training.max_steps) == ("head", None, None)
    with pytest.raises(ValueError, match=f"Config.{stage}.train .head. .* takes no steps"):
        parse("lm.train", "", ["--config", "demo", f"--{stage}.train", "head", f"--{stage}.epochs", "1"])
