"""results.json is read as it was written, or refused with what is wrong and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from figures.paths import RESULTS
from figures.record import VERSION, Calibration, MethodResult, Probe, Results, Tried, of, read
from lm.objectives import DPO, EnsembleDPO
from tests.recorded import recorded


def written(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """results.json of a made-up run, edited."""
    values = recorded({"dpo": DPO(beta=0.37), "e-dpo": EnsembleDPO()})
    edit(values)
    path = folder / "results.json"
    path.write_text(json.dumps(values))
    return path


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = read(path)
    dpo, ensemble = found.methods["dpo"], found.methods["e-dpo"]
    assert isinstance(dpo, MethodResult)
    assert (dpo.setting, dpo.step, dpo.ci) == ({"beta": 0.37}, 2, (-0.0111, 0.3333))
    assert dpo.validation[0] == Tried(setting={"beta": 0.37}, step=2, advantage=0.4141, ci=(0.1, 0.9), kl=0.3737)
    assert isinstance(dpo.probe[0], Probe)
    assert (dpo.probe[0].member_shares, ensemble.probe[0].member_shares) == (None, [0.75, 0.25])
    assert (found.wald["dpo - e-dpo"].p, found.wins["dpo"]["sft"].win) == (0.04321, 0.51)
    assert (found.sft.utility, found.reward_models["rho"].neither.accuracy) == (None, None)
    how_sure = [found.reward_models[name].calibration for name in ("b0.2", "b0.8")]
    assert how_sure == [Calibration(loss=0.6432, calibration_error=0.0717), None], "an earlier version made none"
    assert (found.members, found.looks["e-dpo"].title) == (["b0.2", "b0.8"], "e-DPO")
    again = found.as_json()
    assert of(Results, again) == found
    assert again == json.loads(path.read_text()), "and nothing that there is not"


def test_a_whole_number_is_a_number_and_unknown_names_are_passed_over(tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["methods"]["dpo"] |= {"length": 4, "of_a_later_version": 1}
        values["bias"]["selection"] = values["bias"]["rho"]

    found = read(written(tmp_path, edit))
    assert (found.methods["dpo"].length, type(found.methods["dpo"].length)) == (4.0, float)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("version"), f"has no version, and version {VERSION} is read here"),
        (lambda r: r.update(version=VERSION + 1), f"is of version {VERSION + 1}, and version {VERSION} is read here"),
        (lambda r: r.update(version="1"), "is of version '1'"),
        (lambda r: r.pop("wins"), "lacks wins: it is not whole"),
        (lambda r: r["sft"].pop("samples"), "lacks sft.samples: "),
        (lambda r: [row.pop("ci") for row in r["methods"].values()], "lacks methods.dpo.ci, methods.e-dpo.ci: "),
        (
            lambda r: [r["sft"].pop(name) for name in list(r["sft"])],
            "lacks sft.n, sft.oracle_reward, sft.length, sft.finished and 6 more: ",
        ),
        (lambda r: r["methods"]["dpo"]["probe"][1].pop("step"), "lacks methods.dpo.probe[1].step: "),
        (lambda r: r["looks"].pop("dpo"), "lacks looks.dpo: "),
        (lambda r: r["wins"]["e-dpo"].pop("sft"), "lacks wins.e-dpo.sft: "),
        (lambda r: r["wald"].clear(), "lacks wald.dpo - e-dpo: "),
        (lambda r: r["methods"]["dpo"].update(length="4"), 'has methods.dpo.length "4", where a number is needed: '),
        (lambda r: r["methods"]["dpo"].update(step=2.5), "has methods.dpo.step 2.5, where a whole number is needed: "),
        (lambda r: r["methods"]["dpo"].update(kl=True), "has methods.dpo.kl true, where a number is needed: "),
        (lambda r: r["sft"].update(policy=None), "has sft.policy null, where text is needed: "),
        (lambda r: r["methods"]["dpo"].update(ci=[0.1]), "has methods.dpo.ci [0.1], where a list of 2 is needed: "),
        (lambda r: r["looks"]["dpo"].update(hollow=0), "has looks.dpo.hollow 0, where true or false is needed: "),
        (lambda r: r.update(methods=[]), "has methods [], where an object is needed: "),
        (lambda r: r["methods"]["dpo"].update(validation=3), "has methods.dpo.validation 3, where a list is needed: "),
        (lambda r: r["sft"].update(kl=float("nan")), "is not JSON (NaN is no number in it); "),
    ],
)
def test_what_is_not_a_record_of_this_version_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, edit)
    cure = re.escape(f"write it anew with `python -m lm.evaluate --config {tmp_path / 'config.yaml'}`")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}.*{cure}$"):
        read(path)


@pytest.mark.parametrize("text", ["{", "[]", "3", "null"])
def test_other_json_and_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results.json (is not JSON|has no version).*write it anew with"):
        read(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError, match=r"there is no .*none.json; finish the run with `python -m lm.train`"):
        read(tmp_path / "none.json")


def test_the_committed_run_is_such_a_record() -> None:
    found = read(RESULTS / "demo.json")
    assert found.methods.keys() == found.looks.keys()
    assert len(found.wald) == len(found.methods) * (len(found.methods) - 1) / 2
