"""What the documentation tells readers to type runs, or is marked as needing what a test has not; the site builds."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.base.options import parser_of
from lm.models.loading import SCRATCH

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),  # a command is run a second time
]

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "theory/README.md", "bandits/README.md", "lm/workflow/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MARKS = ("needs GPUs", "needs the hub", "needs a cluster", "takes hours")
"""Titles of blocks that are understood, but not run."""
BY_HAND = "by hand"
"""Title of a block that says what the Makefile does; .ci/run does that."""

STAGES_OF_STEPS = ("sft", "oracle", "reward", "policy")
SMALL = {
    "model": "scratch:tiny",
    "methods": ["dpo", "d-dpo", "p-dpo", "e-dpo", "drdo"],
    "data": {"world": {"posts": 60}},
    "bias": {"size": None, "member_fractions": [0.2, 0.8]},
    "probe": {"pairs": 8, "times": 1},
    **{stage: {"epochs": None, "max_steps": 2, "batch_size": 8, "train": None} for stage in STAGES_OF_STEPS},
    "evaluation": {"prompts": None, "resamples": 100},
    "snapshots": 2,
}
"""Laid over the presets of a command; a page's own config, and its other options, win over it."""
OF_A_RUN = [
    f"lm.{name}"
    for name in "train prepare sft oracle relabel bias reward score policy evaluate export nondeterministic".split()
]
"""Commands with the options of a run; `bias` and `score` have another form, for a set by itself."""
SHORTER = {"posts=2000": "posts=60"}
"""In what the pages run besides."""


# ---------------------------------------------------------------- what the pages say


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


of_every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(python\s-m\s[^`]+)`(?!`)")


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """(title or "", code) of each fenced block."""
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        if fence[1] == language:
            yield fence[2] or "", fence[3]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a block; variables that it sets are put in."""
    variables = {"PWD": "."}
    for line in code.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, value = words.pop(0).split("=", 1)
            variables[name] = value
        if words:
            yield words


def inline(page: Path) -> Iterator[list[str]]:
    """The words of each `python -m ...` in running text, without the brackets of what may be left out."""
    for match in INLINE.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        yield re.sub(r"[\[\]]|\.\.\.", " ", match[1]).split()


def own_form(words: Sequence[str]) -> tuple[str, ...]:
    """What makes `bias` or `score` take the other form."""
    if words[2] not in OF_A_RUN:
        return ()
    if "--data" in words:
        return ("--data", "x", "--out", "x")
    return ("x",) if words[3:] and not words[3].startswith("-") else ()


def is_of_a_run(words: Sequence[str]) -> bool:
    """Whether a command takes the options of a run."""
    return list(words[:2]) == ["python", "-m"] and words[2] in OF_A_RUN and not own_form(words)


def run_module(name: str, arguments: Sequence[str]) -> int:
    """The exit status of `python -m <name>`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


# ---------------------------------------------------------------- commands that run


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in, with the configs and without a network; models are of next to no size."""
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "configs").symlink_to(ROOT / "lm" / "configs")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
    return tmp_path


HEREDOC = re.compile(r"(.*)<<'(\w+)'\n(.*\n)?\2\n", re.DOTALL)


def follow(code: str) -> None:
    """Runs a page's blocks; AssertionError where a command fails, or does not although `||` says what happens then.

    Python runs in this process, a run with SMALL behind the presets; bash has the rest.
    """
    rest = ""
    for line in code.replace("\\\n", " ").splitlines(keepends=True):
        words = [] if rest else shlex.split(line, comments=True)
        if words[:2] != ["python", "-m"] or {">", "|", "&&"} & set(words):
            rest += line
            document = HEREDOC.fullmatch(rest)
            if "<<" in rest and not document:
                continue
            if document and document[1].split() == ["python", "-"]:
                exec(document[3], {"__name__": "__main__"})  # the repository's own text
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", rest], check=True)
            rest = ""
            continue
        fails = "||" in words
        words = words[: words.index("||")] if fails else words
        if is_of_a_run(words):
            if "--config" not in words:  # the command would leave its preset out
                words[3:3] = ["--config", "lm/configs/demo.yaml"]
            at = max(at for at, word in enumerate(words) if word.startswith("lm/configs/"))
            words[at + 1 : at + 1] = ["--config", "small.yaml"]
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        status = run_module(words[2], words[3:])
        assert bool(status) == fails, f"exit status {status}: {shlex.join(words)}"
    assert not rest


WALKS = [page for page in PAGES if any(not title for title, _ in blocks(page, "sh"))]
LONG_WALKS = {
    "docs/choosing.md",
    "docs/losses.md",
    "docs/many-gpus.md",
    "docs/own-data.md",
    "docs/reward-models.md",
    "docs/scored-files.md",
    "docs/tutorial.md",
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page_id(page), marks=[pytest.mark.thorough] * (page_id(page) in LONG_WALKS))
        for page in WALKS
    ],
)
def test_the_commands_of_a_page_run_in_its_order(page: Path) -> None:
    code = "".join(code for title, code in blocks(page, "sh") if not title)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    follow(code)


def test_a_wrong_command_ends_a_walk(reader: Path) -> None:
    follow("cat > rows.txt <<'EOF'\none\nEOF\n# a remark\ncp rows.txt more.txt  # another\n")
    assert (reader / "more.txt").read_text() == "one\n"
    follow("python - <<'EOF'\nfrom pathlib import Path\nPath('most.txt').touch()\nEOF\n")
    assert (reader / "most.txt").exists()
    with pytest.raises(AssertionError, match="exit status 2"):
        follow("python -m lm.prepare --no-such-option 1\ntouch afterwards\n")
    with pytest.raises(AssertionError, match="exit status 0"):
        follow("python -m lm || touch afterwards\n")
    with pytest.raises(ZeroDivisionError):
        follow("python - <<'EOF'\n1 / 0\nEOF\ntouch afterwards\n")
    with pytest.raises(subprocess.CalledProcessError):
        follow("cp none.txt more.txt\ntouch afterwards\n")
    assert not (reader / "afterwards").exists()


# ---------------------------------------------------------------- commands that are understood only


@functools.cache
def help_of(module: str, before: tuple[str, ...] = ()) -> str:
    """What `--help` prints, with the options of a run where it refers to them. ValueError for no command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = run_module(module, [*before, "--help"])
        except ImportError as error:
            raise ValueError(f"{module} is no command: {error}") from None
    if status:
        raise ValueError(f"{module} --help: exit status {status}")
    of_a_run = module in OF_A_RUN or module in ("lm.advise", "lm.estimate", "lm.workflow.job")
    return printed.getvalue() + (parser_of("", "").format_help() if of_a_run else "")


def check_words(words: Sequence[str], helps: str) -> None:
    """ValueError for an option that a help text lacks, and for a file of this repository that is not there."""
    for word in words:
        option = word.split("=")[0]
        if word.startswith("--") and not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps):
            raise ValueError(f"{option} is no option")
        check_file(word)


def check_file(word: str) -> None:
    """ValueError for a file of this repository that is not there."""
    if word.startswith(("lm/", "theory/", "bandits/", "figures/", "docs/")) and not (ROOT / word).exists():
        raise ValueError(f"{word} does not exist")


def launcher(words: Sequence[str]) -> tuple[ArgumentParser, int]:
    """The parser of torchrun or accelerate launch, and how many words name it."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        return get_args_parser(), 1
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser(), 2


def understand(words: Sequence[str]) -> None:
    """ValueError or SystemExit for a command with an option or a file that does not exist."""
    for word in words:
        check_file(word)
    if words[0] in ("torchrun", "accelerate"):
        parser, named = launcher(words)
        at = words.index("-m")
        parser.parse_args([*words[named:at], "-m", words[at + 1]])
        understand(["python", *words[at:]])
    elif is_of_a_run(words):
        given = list(words[3 : words.index(">")] if ">" in words else words[3:])
        parser_of("", "").parse_args([word for word in given if word != "--print_config"])
    elif list(words[:2]) == ["python", "-m"]:
        check_words(words[3:], help_of(words[2], own_form(words)))
    elif words[0] == "make":
        made = subprocess.run(["make", "-n", *words[1:]], check=False, capture_output=True, text=True, cwd=ROOT)
        if made.returncode:
            raise ValueError(made.stderr)
    elif words[0] == "snakemake":
        check_words(words[1:], help_of("snakemake"))
    elif words[0] not in ("pip", "cp", "vllm", "tensorboard"):
        raise ValueError(f"{words[0]}: no way to check it")


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_root")
@of_every_page
def test_commands_that_are_not_run_are_marked_and_understood(page: Path) -> None:
    for title, code in blocks(page, "sh"):
        assert title in ("", BY_HAND, *MARKS), f"a block that is not run is marked as one of {MARKS}; got {title!r}"
        if title in MARKS:
            for words in commands(code):
                understand(words)


@pytest.mark.usefixtures("at_root")
@of_every_page
def test_commands_in_the_text_exist_and_have_these_options(page: Path) -> None:
    for words in inline(page):
        check_words(words[3:], help_of(words[2], own_form(words)))


RUN_BY = {
    "bandits.bench": "bandits/commands_test.py",
    "bandits.certify": "bandits/certify_test.py",
    "bandits.degeneration": "bandits/commands_test.py",
    "bandits.pessimism": "bandits/commands_test.py",
    "bandits.transitive": "bandits/commands_test.py",
    "figures": "figures/figures_test.py",
    "lm": "lm/base/options_test.py",
    "lm.advise": "lm/studies/advice_test.py",
    "lm.bench": "lm/studies/bench_test.py",
    "lm.check": "lm/studies/model_check_test.py",
    "lm.diagnose": "lm/studies/diagnosis_test.py",
    "lm.estimate": "lm/studies/estimate_test.py",
    "lm.exact": "lm/studies/exact_test.py",
    "lm.judge": "lm/judging/llm_test.py",
    "lm.nondeterministic": "lm/studies/nondeterministic_test.py",
    "lm.push": "lm/reporting/card_test.py",
    "lm.report": "lm/reporting/page_test.py",
    "lm.workflow.job": "lm/workflow/workflow_test.py",
    "lm.workflow.regimes": "lm/workflow/regimes_test.py",
    "lm.workflow.tables": "lm/workflow/tables_test.py",
    "tests.gpu": "tests/gpu_test.py",
    "tests.slurm": "tests/beyond_one_machine_test.py",
    "tests.two_hosts": "tests/beyond_one_machine_test.py",
    "lm.workflow.verdicts": "lm/workflow/verdicts_test.py",
    "theory": "theory/ledger_test.py",
    "theory.mutation": "theory/mutation_test.py",
}
"""Commands in the text that the walks do not run -> the test that does."""
STAGES = [name for name in OF_A_RUN if name not in ("lm.train", "lm.nondeterministic")]


def test_every_command_in_the_text_is_run_by_a_test() -> None:
    named = {words[2] for page in PAGES for words in inline(page)}
    assert named - set(STAGES) - {"lm.train"} == set(RUN_BY)
    for module, path in RUN_BY.items():
        *package, name = module.split(".")
        called = rf"-m {module}\b|\"{module}\"|from {'.'.join(package) or '__main__'} import .*\b{name}\b"
        called += rf"|from {module}(\.__main__)? import"
        assert re.search(called, (ROOT / path).read_text()), f"{path} does not run {module}"


@pytest.mark.thorough
@pytest.mark.usefixtures("reader")
def test_every_stage_is_a_command() -> None:
    follow("".join(f"python -m {name} {'--out out.jsonl' * (name == 'lm.export')}\n" for name in STAGES))


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(
    "line",
    [
        "python -m lm.train --config lm/configs/tldr.yml",
        "python -m lm.train --policy.learning_rates 1",
        "torchrun --nproc-per-nod 8 -m lm.train",
        "torchrun --nproc-per-node 8 -m lm.train --betas 1",
        "accelerate launch --config_file lm/configs/accelerate/fsdp3.yaml -m lm.train",
        "python -m lm.judge RUN --tusk helpfulness",
        "python -m lm.nothing",
        "snakemake -s lm/workflow/Snakefile --directories runs/grid",
        "make gird",
        "rm -rf runs",
    ],
)
def test_what_does_not_exist_is_not_understood(line: str) -> None:
    with pytest.raises((ValueError, SystemExit)), contextlib.redirect_stderr(io.StringIO()):
        understand(next(commands(line)))


def test_the_words_of_blocks_and_of_text(tmp_path: Path) -> None:
    code = 'OPTIONS="--a 1 --b"\ntorchrun -m x $OPTIONS \\\n    --c  # why\n'
    assert list(commands(code)) == [["torchrun", "-m", "x", "--a", "1", "--b", "--c"]]
    page = tmp_path / "page.md"
    page.write_text("`python -m x [--a FILE]` and\n```sh\npython -m y\n```\n`python\n-m z ...`, `x`\n")
    assert list(inline(page)) == [["python", "-m", "x", "--a", "FILE"], ["python", "-m", "z"]]


def test_what_is_done_by_hand_is_what_the_makefile_does() -> None:
    recipes = (
        (ROOT / "Makefile")
        .read_text()
        .replace("$(PIP)", "pip install -c constraints.txt")
        .replace("$(BIN)/", "")
        .replace("$(PYTHON)", "python3")
    )
    recipes = recipes.replace("$(VENV)", ".venv").replace("--quiet --disable-pip-version-check ", "")
    by_hand = "".join(code for page in PAGES for title, code in blocks(page, "sh") if title == BY_HAND)
    found = list(commands(by_hand.replace(" && ", "\n")))
    assert len(found) > 3
    for words in found:
        assert words[0] == "." or shlex.join(words) in recipes, shlex.join(words)


def test_the_example_of_the_solvers_runs() -> None:
    (_, example), *_ = blocks(ROOT / "bandits" / "README.md", "python")
    names: dict[str, Any] = {}
    exec(example, names)  # the repository's own text
    assert names["result"].certificate
    assert names["result"].probs.sum() == pytest.approx(1)


# ---------------------------------------------------------------- the site


def build(folder: Path, site: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, on a copy of the configuration with changes."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    path = folder / "mkdocs.yml"
    path.write_text(yaml.safe_dump({**config, **changes}))
    recipe = re.search(r"\$\(BIN\)/mkdocs build(.*)", (ROOT / "Makefile").read_text())
    assert recipe
    command = [sys.executable, "-m", "mkdocs", "build", *shlex.split(recipe[1])]
    command += ["--config-file", str(path), "--site-dir", str(site)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("dead", ["pages.md", "page.md#none"])
def test_a_dead_link_stops_the_site(tmp_path: Path, dead: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    reduced = {"docs_dir": str(docs), "nav": None, "hooks": [], "plugins": [], "extra_javascript": [], "extra_css": []}
    (docs / "index.md").write_text("[a page](page.md)\n")
    (docs / "page.md").write_text("# A page\n")
    done = build(tmp_path, tmp_path / "site", **reduced)
    assert done.returncode == 0, done.stderr
    (docs / "index.md").write_text(f"[a page]({dead})\n")
    done = build(tmp_path, tmp_path / "site", **reduced)
    assert done.returncode == 1
    assert dead in done.stderr
