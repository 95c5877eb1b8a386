"""Files of every type that is read give the same rows, and what is malformed in them is refused with its line."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lm.data.formats import READ
from lm.data.rows import read_rows, write_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": "Sky, or sea?", "chosen": ' "Blue"\nand wide', "rejected": " é", "chosen_reward": 1.5, "worker": "7"},
    {"prompt": "Why?", "chosen": " So.", "rejected": " 42", "chosen_reward": -2, "worker": "ann"},
]


def written(path: Path, rows: list[dict[str, Any]], *, bom: bool = False) -> str:
    """A file of these rows by its name."""
    name = path.name.removesuffix(".gz")
    if path.suffix == ".parquet":
        write_rows(path, rows)
        return str(path)
    if name.endswith((".csv", ".tsv")):
        with path.with_name("plain").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if name.endswith("csv") else "\t")
            table.writeheader()
            table.writerows(rows)
        content = path.with_name("plain").read_bytes()
        path.with_name("plain").unlink()
    elif name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        content = json.dumps(rows, indent=1).encode()
    content = b"\xef\xbb\xbf" * bom + content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("suffix", READ)
@pytest.mark.parametrize("bom", [False, True])
def test_every_type_gives_the_same_rows(suffix: str, bom: bool, tmp_path: Path) -> None:
    path = written(tmp_path / f"rows{suffix}", ROWS, bom=bom)
    assert [row for _, row in read_rows(path)] == ROWS
    assert [row for _, row in read_rows(str(tmp_path))] == ROWS, "and so does its folder"


def test_json_lines_may_stand_in_a_json_file_and_are_named_by_line(tmp_path: Path) -> None:
    """As OpenAI's own release has them."""
    path = tmp_path / "batch.json.gz"
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in ROWS).encode()))
    assert list(read_rows(str(path))) == [(f"{path}, line {i}", row) for i, row in enumerate(ROWS, 1)]


def test_rows_of_a_table_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.tsv", [*ROWS, ROWS[1]])
    assert [where for where, _ in read_rows(path)] == [f"{path}, line {n}" for n in (2, 4, 5)]


def test_numbers_are_read_where_they_are_meant_and_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "prompt,chosen,rejected,margin,chosen_member_rewards,confidence,length\n"
        '1,2,3.0,-1e3,"[1, 2.5]",,12\n'
        "a,b,c,,,7,9\n"
    )
    one, other = (row for _, row in read_rows(str(path)))
    assert one == {
        **{"prompt": "1", "chosen": "2", "rejected": "3.0", "length": "12"},
        **{"margin": -1000.0, "chosen_member_rewards": [1, 2.5], "confidence": None},
    }
    assert (other["margin"], other["chosen_member_rewards"], other["confidence"]) == (None, None, 7)


def test_a_field_longer_than_the_librarys_limit_is_read_and_the_limit_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = written(tmp_path / "rows.csv", [{"prompt": "a" * (before + 5), "chosen": "b", "rejected": "c"}])
    ((_, row),) = read_rows(path)
    assert len(row["prompt"]) == before + 5
    assert csv.field_size_limit() == before


def test_what_libraries_leave_beside_the_rows_is_no_set(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", ROWS)
    (tmp_path / ".cache").mkdir()
    for name in ("dataset_info.json", "state.json", ".cache/rows.jsonl"):
        (tmp_path / name).write_text('{"features": {}}')
    assert [row for _, row in read_rows(str(tmp_path))] == ROWS
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no .* file; a dataset that was saved to disk is read after .to_parq"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"b": 1, "c": {"d": 1, "d": 2}}\n', "line 2: not JSON .*an object has 'd' twice"),
        ("a.json", '[{"a": 1, "a": 1}]', "not JSON that can be read .an object has 'a' twice"),
        ("a.jsonl", '{"a": 1}\nnull\n', "line 2: a JSON object is needed, got NoneType"),
        ("a.json", '[{"a": 1}, null]', "row 1: a JSON object is needed, got NoneType"),
        ("a.json", '[{"a": 1},\n {"a": }]', "line 2: not JSON .Expecting value at column 8"),
        ("a.json", '{"train": [{"chosen": "a"}]}', "line 1: an object whose 'train' holds the rows; give them alone"),
        ("a.json", '{\n "prompt": "a"\n}', "line 1: not JSON .*an object over several lines is not read"),
        ("a.jsonl", '[{"a": 1},\n{"a": 2}]', "line 1: not JSON .*rows in a list are read from a .json file"),
        ("a.json", "", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "prompt,chosen\n", "holds no rows; a line with the columns' names is needed, and one a row"),
        ("a.csv", "prompt,chosen\na,b\nc\n", "line 3: 1 fields, the first line names 2 columns"),
        (
            "a.csv",
            "prompt,chosen\na, b, and c\n",
            'line 2: 3 fields, .*a field with commas, quotes or lines stands in "',
        ),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: column 'prompt' is named twice"),
        ("a.csv", "prompt;chosen\na;b\n", "line 1: one column, 'prompt;chosen': it seems to be separated by ';'"),
        ("a.tsv", "prompt,chosen\na,b\n", "line 1: one column, 'prompt,chosen': it seems to be separated by ','"),
        ("a.csv", 'prompt,chosen\n"a" b,c\n', "line 2: not separated values that can be read"),
        ("a.csv", 'prompt,chosen\na,"b\n', "line 2: not separated values that can be read"),
        (
            "a.csv",
            "prompt,margin\na,inf\n",
            "line 2: 'margin' must be a finite number, or empty where there is none, got",
        ),
        ("a.csv", "prompt,chosen_rewards\na,[1 2]\n", "line 2: 'chosen_rewards' is no JSON list, got"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_malformed_is_named_with_its_place(
    name: str, content: str, message: str, packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}{'.gz' * packed}"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.* ?{message}"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.json", "a.json.gz", "a.jsonl"])
def test_text_that_is_not_utf_8_is_named(name: str, tmp_path: Path) -> None:
    content = "[prompt,chosen\nä,b\n".encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{name}.* cannot be read \('utf-8' codec can't decode byte 0xe4"):
        list(read_rows(str(tmp_path / name)))
