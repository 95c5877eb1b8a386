"""What the commands share at their doors: files are not overwritten, names are printed as they are, on any terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lm.advise
import lm.bias
import lm.card
import lm.diagnose
import lm.export
import lm.judge
import lm.score
from lm.base.command import only_run_in
from lm.base.files import write_jsonl
from theory.shell import as_command

MARKUP = "[bold]x[/bold]:dog:.jsonl"
"""A file name that rich would take for its own."""


def pairs(folder: Path, name: str = "pairs.jsonl") -> str:
    """A set with rows of every length class."""
    rows = [{"prompt": f"{i}?", "chosen": " a" * (1 + i % 3), "rejected": " b" * (1 + (i + 1) % 3)} for i in range(12)]
    write_jsonl(folder / name, rows)
    return str(folder / name)


WRITING: dict[str, tuple[Callable[..., int], list[str]]] = {
    "advise": (lm.advise.main, ["{pairs}", "--json", "{file}", "--output_dir", "{folder}/run", "--model", "/no/where"]),
    "bias": (lm.bias.main, ["{pairs}", "--rho", "0.5", "--out", "{file}"]),
    "diagnose": (lm.diagnose.main, ["{pairs}", "--json", "{file}"]),
    "card": (lm.card.main, ["{folder}/run", "dpo", "--output", "{file}"]),
    "export": (lm.export.main, ["--out", "{file}", "--output_dir", "{folder}/run", "--model", "/no/where"]),
    "judge": (lm.judge.main, ["{samples}", "{samples}", "--judge", "oracle", "--out", "{file}"]),
    "score": (lm.score.main, ["--data", "{pairs}", "--reward-model", "/no/where", "--out", "{file}"]),
}


@pytest.mark.parametrize("command", WRITING)
def test_a_file_that_is_there_is_overwritten_by_force_alone(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = WRITING[command]
    file = tmp_path / "there.jsonl"
    file.write_text('{"mine": 1}\n')
    write_jsonl(tmp_path / "samples.jsonl", [{"prompt": "p", "completion": "c", "oracle_reward": 1.0}])
    named = {"pairs": pairs(tmp_path), "file": file, "folder": tmp_path, "samples": tmp_path / "samples.jsonl"}
    filled = [argument.format(**named) for argument in arguments]
    assert main(filled) == 2
    wording = f"{file} exists; name another file, or remove it, or overwrite it by --force\n"
    assert capsys.readouterr().err.endswith(wording)
    assert file.read_text() == '{"mine": 1}\n'
    forced = main([*filled, "--force"])
    assert "exists" not in capsys.readouterr().err
    if command in ("bias", "diagnose", "judge"):  # the others have nothing to write here
        assert forced == 0
        assert file.read_text() != '{"mine": 1}\n'
    folder = [str(tmp_path) if argument == str(file) else argument for argument in filled]
    assert main([*folder, "--force"]) == 2
    assert f"{tmp_path} is a folder; a file is needed" in capsys.readouterr().err


def test_the_data_is_not_overwritten_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pairs(tmp_path)
    for main, arguments in ((lm.bias.main, [data, "--rho", "0.5"]), (lm.score.main, ["--data", data])):
        model = ["--reward-model", "/no/where"] if main is lm.score.main else []
        assert main([*arguments, *model, "--out", data, "--force"]) == 2
        assert "is the data itself; name another file" in capsys.readouterr().err


def test_a_report_of_lm_judge_is_kept_up_to_date(tmp_path: Path) -> None:
    for name, reward in (("one", 1.0), ("other", 0.0)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "p", "completion": "c", "oracle_reward": reward}])
    arguments = [*(str(tmp_path / f"{name}.jsonl") for name in ("one", "other")), "--judge", "oracle", "--out"]
    for _ in range(2):
        assert lm.judge.main([*arguments, str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["wins"]


def test_seeds_are_not_negative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pairs(tmp_path)
    assert lm.bias.main([data, "--rho", "0.5", "--seed", "-1", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err == "error: --seed must be >= 0, got -1\n"
    assert lm.judge.main(["run", "--judge", "oracle", "--seed", "-3"]) == 2
    assert capsys.readouterr().err == "error: --seed must be >= 0, got -3\n"
    assert lm.export.main(["--out", str(tmp_path / "out.jsonl"), "--seed", "-1"]) == 2
    assert "Config.seed must be >= 0, got -1" in capsys.readouterr().err


def test_paths_of_commands_take_the_home_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    assert lm.bias.main(["~/pairs.jsonl", "--rho", "0.5", "--out", "$HERE/out.jsonl"]) == 0
    assert (tmp_path / "out.jsonl").exists()
    assert lm.diagnose.main(["${HERE}/pairs.jsonl", "--json", "~/report.json"]) == 0
    assert (tmp_path / "report.json").exists()
    with pytest.raises(SystemExit, match="2"):
        lm.bias.main(["$NOT_SET/pairs.jsonl", "--rho", "0.5", "--out", "x.jsonl"])
    assert "the environment has no variable NOT_SET" in capsys.readouterr().err


# ---------------------------------------------------------------- terminals


def on_ascii(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> str:
    """What is printed on a terminal of ASCII alone."""
    shown = io.BytesIO()
    with monkeypatch.context() as patch:
        terminals = {
            name: io.TextIOWrapper(shown, encoding="ascii", write_through=True) for name in ("stdout", "stderr")
        }
        for name, terminal in terminals.items():
            patch.setattr(sys, name, terminal)
        run()
        return shown.getvalue().decode("ascii")


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_run_is_not_written_where_a_file_is(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    taken = only_run_in(Path(f"{tmp_path}/file{below}"))
    with pytest.raises(ValueError, match=r"output_dir .*file is a file; a folder is needed"):
        taken.__enter__()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("name", [MARKUP, "paires-été.jsonl", "[red]Δ.jsonl"])
def test_names_are_printed_as_they_are_on_any_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    pairs(tmp_path, name)
    samples = [{"prompt": "p", "completion": "c", "oracle_reward": 1.0}]
    for file in (f"one{name}", f"two{name}"):
        write_jsonl(tmp_path / file, samples)
    expected = name.replace("Δ", "D").encode("ascii", "backslashreplace").decode()
    for main, arguments in (
        (lm.bias.main, [name, "--rho", "0.5", "--out", f"out{name}"]),
        (lm.diagnose.main, [name]),
        (lm.judge.main, [f"one{name}", f"two{name}", "--judge", "oracle", "--out", "report.json"]),
        (lm.bias.main, [f"no{name}", "--rho", "0.5", "--out", "no.jsonl"]),
    ):
        shown = on_ascii(monkeypatch, partial(main, arguments))
        assert expected in shown.replace("\n", ""), main


def test_every_command_prints_what_a_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    @as_command
    def main(_: Any) -> None:
        print("Δ of café, \udcff")

    assert on_ascii(monkeypatch, lambda: main([])) == "D of caf\\xe9, \\udcff\n"


def test_nothing_is_to_be_removed_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(pairs(tmp_path))
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "x", "chosen": " a", "rejected": " a"}) + "\n")
    assert lm.diagnose.main([str(data)]) == 0
    said = capsys.readouterr().out
    assert "Remove 1 row with identical completions." in said
    assert "0 with" not in said
