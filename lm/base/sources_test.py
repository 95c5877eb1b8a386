"""Options from files and the command line: which wins, what is refused with its file and line, what has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm.base import progress
from lm.base.effects import in_force
from lm.base.options import CONFIGS, parse
from lm.config import Config
from lm.exact import parse as parse_exact

DEMO = ("--config", str(CONFIGS / "demo.yaml"))
SET = ("--data.kind", "preferences", "--data.path", "mine.jsonl")


def config_of(*arguments: str, command: str = "lm.test", **more: Any) -> Config:
    return parse(command, "", arguments, **more)[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "lm.test") -> str:
    """The one line of a mistake."""
    with pytest.raises((SystemExit, ValueError)) as end:
        parse(command, "", arguments)
    if isinstance(end.value, ValueError):  # the command makes a line of it
        return str(end.value)
    assert isinstance(end.value, SystemExit)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    """Writes a file of options, and returns how it is named on the command line."""
    count = iter(range(9))

    def write(text: str) -> tuple[str, str]:
        path = tmp_path / f"mine{next(count)}.yaml"
        path.write_text(text, encoding="utf-8")
        return "--config", str(path)

    return write


# ---------------------------------------------------------------- which wins


def test_the_command_line_wins_over_files_wherever_it_stands(mine: Any) -> None:
    file = mine("seed: 9\ndpo: {beta: 0.7}\n")
    for arguments in (
        ("--seed", "5", "--dpo.beta=0.2", *DEMO, *file),
        (*DEMO, "--seed", "5", *file, "--dpo.beta", "0.2"),
        ("--seed=5", f"--config={DEMO[1]}", "--dpo.beta=0.2", "=".join(file)),
    ):
        config = config_of(*arguments)
        assert (config.seed, config.method("dpo")) == (5, config_of("--dpo.beta", "0.2").method("dpo")), arguments
    exact = parse_exact(["--tokens", "5", *mine("tokens: 6\nseed: 3\n")])[0]
    assert (exact.tokens, exact.seed) == (5, 3), "of lm.exact as well"


def test_of_files_the_later_wins(mine: Any) -> None:
    one, other = mine("seed: 1\nsnapshots: 2\n"), mine("seed: 2\n")
    assert [config_of(*DEMO, *both).seed for both in ((*one, *other), (*other, *one))] == [2, 1]
    assert config_of(*DEMO, *one, *other).snapshots == 2


@pytest.mark.parametrize("preset", ["tldr", "helpfulness", "demo", "nondeterministic", "preferences", "grid"])
def test_every_preset_starts_under_scratch(preset: str) -> None:
    config = config_of("--config", str(CONFIGS / f"{preset}.yaml"), "--config", str(CONFIGS / "scratch.yaml"))
    trainings = (config.sft, config.oracle, config.reward, config.policy)
    assert [(training.epochs, training.max_steps) for training in trainings] == [(1.0, None)] * 4


def test_a_length_in_one_unit_replaces_that_in_the_other(mine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert config_of("--policy.epochs", "2").policy.max_steps is None
    assert config_of("--oracle", "{max_steps: 7}").oracle.epochs is None
    assert config_of(*DEMO, *mine("reward: {max_steps: 7}\n")).reward.epochs is None
    both = mine("reward: {max_steps: 7, epochs: 1}\n")
    assert refused(capsys, *DEMO, *both).endswith("null for the other; got 1.0 and 7 for reward")
    assert "got None and None for sft" in refused(capsys, "--sft.max_steps", "null")


def test_a_mistake_names_the_training_or_method_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--reward.learning_rate", "-1").endswith("learning_rate must be > 0, got -1.0 for reward")
    assert refused(capsys, "--hull_dpo.kl.alpha_start", "-1").endswith("got -1.0 for hull_dpo")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsft:\n  max_steps: 1\n  batch_size: 2\n  max_steps: 3\n", "line 5: 'max_steps' stands twice, first"),
        ("seed: 1\nmethods: [dpo]\nseed: 1\n", "line 3: 'seed' stands twice, first in line 1; leave one"),
        ("sweep:\n  dpo: [{beta: 1}, {beta: 2, beta: 3}]\n", "line 2: 'beta' stands twice"),
        ("seed: 1\ndata: {kind: hh\nmodel: x\n", "line 3: did not find expected ',' or '}'"),
        ("seed: 1\n\tmodel: x\n", "line 2: found a tab character"),
        ("seed: 1\n\nmodel: *x\n", "line 3: "),
        ("seed: 1\nprobe:\n  pears: 3\n", "line 3: there is no option --probe.pears; did you mean --probe.pairs?"),
        ("seed: 1\nprobe:\n  pairs: few\n", "line 3: --probe.pairs must be a whole number, got few"),
        (
            "seed: 1\nlora:\n  rank: 1\n  dropout: 0.5\n",
            "line 4: option lora.dropout is no more, got 0.5: there is none",
        ),
        ("seed: 1\nquiet: true\n", "line 2: quiet is an option of the command line alone"),
        ("config: other.yaml\n", "line 1: config is an option of the command line alone"),
        ("- seed: 1\n", "must hold a mapping of options, as `seed: 1`, got list"),
        ("", "must hold a mapping of options, as `seed: 1`, got nothing"),
    ],
)
def test_a_mistake_in_a_file_has_its_place(
    text: str, message: str, mine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mine(text)
    said = refused(capsys, *mine("seed: 4\n"), *DEMO, *file)
    assert file[1] in said
    assert message in said


def test_the_command_line_is_read_as_strictly(capsys: pytest.CaptureFixture[str], mine: Any) -> None:
    assert refused(capsys, "--sweep", "{ipo: [{tau: 1, tau: 2}]}").startswith("--sweep, line 1: 'tau' stands twice")
    file = mine("probe: {pairs: 3}\n")
    assert refused(capsys, *DEMO, *file, "--probe.pairs", "few") == "--probe.pairs must be a whole number, got few"


def test_what_is_no_file_is_said_in_our_words(tmp_path: Path, mine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mine("seed: 1\n")
    assert refused(capsys, "--config", str(tmp_path)).endswith(
        f"--config: {tmp_path} is a folder, and a YAML file is needed; those in it: mine0.yaml"
    )
    assert refused(capsys, "--seed", "1", "--config") == "--config needs a file"
    (tmp_path / "latin.yaml").write_bytes("model: ä\n".encode("latin-1"))
    assert "latin.yaml is not text in UTF-8" in refused(capsys, "--config", str(tmp_path / "latin.yaml"))


def test_paths_have_the_home_and_variables_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", "/sets")
    file = mine("output_dir: $SETS/run\noracle_model: ~/judge\ndata: {sft_path: '${SETS}/sft'}\n")
    monkeypatch.setenv("WHERE", file[1])
    config = config_of("--config", "$WHERE", *SET[:2], "--data.path", "~/mine.jsonl", *DEMO[:1], PRESET)
    assert config.data.path == f"{tmp_path}/mine.jsonl"
    assert (config.data.sft_path, config.oracle_model) == ("/sets/sft", f"{tmp_path}/judge")
    again = config_of(*DEMO[:1], PRESET, *file, *SET)
    assert again.output_dir == "/sets/run"
    said = refused(capsys, "--output_dir", "$NO_SUCH/x")
    assert said == "path '$NO_SUCH/x': the environment has no variable NO_SUCH"


PRESET = str(CONFIGS / "scratch.yaml")


# ---------------------------------------------------------------- a set of one's own


@pytest.mark.parametrize("kind", ["preferences", "hh", "tldr"])
def test_a_set_that_is_read_keeps_its_labels_and_pairs(kind: str) -> None:
    own = ["--data.kind", kind, "--data.path", "mine.jsonl", *(["--data.sft_path", "s"] if kind == "tldr" else [])]
    for more in ([], ["--config", PRESET], ["--model", "me/base"]):
        config = config_of(*own, *more)
        assert (config.data.labels, config.bias.rho, config.data.rewards) == ("given", None, "models")
        assert (config.data.max_prompt_length, config.data.max_completion_length) == (None, None)
        assert config.policy.learning_rate == (1e-6 if "me/base" in more else 3e-4), "a pretrained model's"
    said = "mine.jsonl: the set's own labels; no bias is drawn; prompts of a length that 99% of the rows have"
    assert in_force(config_of(*own)).startswith(said)


def test_a_file_or_option_says_otherwise(mine: Any) -> None:
    file = mine("data: {kind: hh, path: x, labels: oracle, max_prompt_length: 9}\nbias: {rho: 0.3}\n")
    config = config_of("--config", PRESET, *file, "--data.max_completion_length", "8")
    assert (config.data.labels, config.bias.rho) == ("oracle", 0.3)
    assert (config.data.max_prompt_length, config.data.max_completion_length) == (9, 8)
    for text in ("labelled again by the oracle", "30% prefer the longer", "prompts of at most 9 tokens"):
        assert text in in_force(config)
    for preset in ("tldr", "helpfulness"):
        assert config_of("--config", str(CONFIGS / f"{preset}.yaml")).data.labels == "oracle", "these are the papers'"
    assert config_of().data.labels == "oracle", "the embedded world's"


# ---------------------------------------------------------------- no effect


@pytest.mark.parametrize(
    ("arguments", "option", "why"),
    [
        (["--dpo.beta", "3", "--sweep", "{dpo: [{beta: 1}, {beta: 2}]}"], "dpo.beta", "in sweep replaces it"),
        (
            ["--sweep", "{e-dpo: [{kl: {alpha_end: 1}}, {beta: 2, kl: {alpha_end: 3}}]}", "--e_dpo.kl.alpha_end=4"],
            "e_dpo.kl.alpha_end",
            "in sweep replaces it",
        ),
        (["--ipo.tau", "1", "--methods", "[dpo]"], "ipo.tau", "methods are dpo"),
        (["--sweep", "{ipo: [{tau: 1}]}", "--methods", "[dpo]"], "sweep.ipo", "methods are dpo"),
        ([*SET, "--methods", "[d-dpo]", "--data.rewards", "given", "--reward.epochs", "2"], "reward.epochs", "given"),
        ([*SET, "--methods", "[d-dpo]", "--data.rewards", "given", "--bias.member_size", "2"], "bias.member_size", ""),
        (["--methods", "[dpo, ipo]", "--reward", "{epochs: 2}"], "reward.epochs", "which distil no rewards"),
        ([*SET, "--oracle_model", "me/judge", "--oracle.epochs", "2"], "oracle.epochs", "none is trained"),
        ([*SET, "--data.world.posts", "2"], "data.world.posts", "data.kind is preferences"),
        ([*SET, "--data.prompt_template", "{post}"], "data.prompt_template", "data.kind is preferences"),
        (["--lora.alpha", "2"], "lora.alpha", "lora.rank is null"),
        (["--train_together", "off"], "train_together", "there is one setting a method"),
        (["--probe.pairs", "0", "--probe.times", "3"], "probe.times", "probe.pairs is 0"),
        (
            ["--snapshots", "1", "--evaluation.best_of", "null", "--evaluation.valid_prompts", "3"],
            "evaluation.valid_prompts",
            "nothing to choose from",
        ),
        (["--evaluation.temperatures", "[1]"], "evaluation.temperatures", "only lm.nondeterministic reads it"),
        (["--sampling.engine", "vllm", "--sampling.batch_size", "2"], "sampling.batch_size", "schedules by itself"),
        (["--methods", "[dpo]", "--sampling.reference_samples", "2"], "sampling.reference_samples", "KL term"),
    ],
)
def test_an_option_without_effect_is_refused(
    arguments: list[str], option: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *arguments)
    assert said.startswith(f"--{option} has no effect: ")
    assert why in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--e_dpo.beta", "3", "--sweep", "{e-dpo: [{beta: 1}, {kl: {alpha_end: 2}}]}"],
        ["--drdo.gamma", "3", "--sweep", "{drdo: [{alpha: 1}]}"],
        ["--evaluation.valid_prompts", "3", "--snapshots", "2"],
        ["--lora.alpha", "2", "--lora.rank", "4"],
        [*SET, "--methods", "[drdo]", "--data.rewards", "given", "--drdo.oracle_alpha", "0.1", "--reward.epochs", "2"],
    ],
)
def test_an_option_with_some_effect_is_taken(arguments: list[str]) -> None:
    assert config_of(*arguments).methods


def test_options_of_several_runs_may_be_about_others() -> None:
    """As the grid's, each of whose jobs is of one method."""
    assert config_of("--ipo.tau", "1", "--methods", "[dpo]", shared=True).methods == ["dpo"]
    assert config_of("--evaluation.temperatures", "[1]", command="lm.nondeterministic")


def test_a_file_may_be_for_other_runs_too_which_is_said(mine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    progress.be_quiet(False)
    file = mine("methods: [dpo]\nipo: {tau: 3}\np_dpo: {beta: 0.1}\nsweep: {ipo: [{tau: 1}]}\n")
    assert config_of(*DEMO, *file).methods == ["dpo"]
    said = capsys.readouterr().err.splitlines()
    assert "without effect in this run: ipo, as methods are dpo" in said
    assert "without effect in this run: sweep.ipo, as methods are dpo" in said
    swept = mine("\ndpo: {beta: 3}\nsweep: {dpo: [{beta: 1}, {beta: 2}]}\n")
    assert refused(capsys, *DEMO, *swept).startswith(
        f"{swept[1]}, line 2: dpo.beta has no effect: every setting of dpo"
    )


# ---------------------------------------------------------------- presets by name


@pytest.mark.parametrize("name", ["tldr", "tldr.yaml", "helpfulness", "preferences.yaml"])
def test_a_preset_goes_by_its_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # as results are called; no folder is a file of options
    path = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    assert config_of("--config", name, "--seed", "3") == config_of("--config", str(path), "--seed", "3")
    assert config_of(f"--config={name}", "--config", "scratch").model == "scratch:tiny"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tldr", "tldr.yaml"])
def test_a_file_wins_over_a_preset_and_that_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("seed: 41\n")
    assert config_of("--config", "demo", "--config", name).seed == 41
    said = capsys.readouterr().err
    assert said == f"--config {name} is the file {tmp_path / name}, and not the preset {CONFIGS / 'tldr.yaml'}\n"
    monkeypatch.chdir(CONFIGS)
    assert config_of("--config", "tldr.yaml").output_dir == "runs/tldr"
    assert capsys.readouterr().err == "", "it is the preset"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("helpfulnes", "helpfulness"),
        ("lm/configs/tldr.yaml", "tldr"),
        ("../tldr.yml", "tldr"),
        ("nothing-like-it", None),
    ],
)
def test_what_is_no_preset_is_told_with_those_that_are(
    name: str, hint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "--config", name)
    assert said.startswith(f"--config: there is no file {name!r}; the presets in {CONFIGS} are demo.yaml, exact.yaml, ")
    assert said.endswith(f"; did you mean --config {hint}?" if hint else "each known by its name as well")
