"""Columns of a dataset as Arrow and NumPy have them: as lists of Python's numbers, the token ids of a million pairs
take tens of gigabytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from lm.base import ranks
from theory.records import replacing

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK = 16_384
"""Rows at a time."""


def tables(dataset: Dataset, names: Sequence[str] | None = None, rows: int = BLOCK) -> Iterator[pa.Table]:
    """These columns, or all, so many rows at a time."""
    view = (dataset if names is None else dataset.select_columns(list(names))).with_format("arrow")
    for start in range(0, len(view), rows):
        yield view[start : start + rows]


def written(parts: Iterable[pa.Table], features: Mapping[str, Any], path: Path) -> Dataset:
    """Writes tables to an Arrow file as they come, and opens it memory-mapped."""
    with ArrowWriter(path=str(path), features=Features(features)) as writer:
        for table in parts:
            writer.write_table(table)
        writer.finalize()
    return Dataset.from_file(str(path))


def column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One as a whole: of numbers or short texts."""
    parts = [chunk for table in tables(dataset, [name]) for chunk in table[name].chunks]
    return pa.chunked_array(parts, None if parts else dataset.features.arrow_schema.field(name).type)


def numbers(dataset: Dataset, name: str) -> Floats:
    """[N], float64; NaN where there is none."""
    return np.asarray(pc.cast(column(dataset, name), pa.float64()).to_numpy(), dtype=np.float64)


def is_listed(dataset: Dataset, name: str) -> bool:
    """Whether a column has a list in each row."""
    kind = dataset.features.arrow_schema.field(name).type
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def matrix(dataset: Dataset, name: str) -> Floats:
    """[N, K] of lists of K numbers, NaN where there is none; ValueError where rows differ in K."""
    if len(widths := np.unique(sizes(dataset, name))) > 1:
        raise ValueError(f"{name} has lists of {', '.join(map(str, widths))} values; all rows must have as many")
    flat = [
        pc.cast(pc.list_flatten(table[name].combine_chunks()), pa.float64()).to_numpy(zero_copy_only=False)
        for table in tables(dataset, [name])
    ]
    return np.concatenate([np.empty(0), *flat]).reshape(len(dataset), -1 if len(dataset) else 0)


def listed(values: Floats) -> pa.ListArray:
    """A matrix, [N, K], as a column of lists."""
    ends = pa.array(np.arange(0, values.size + 1, values.shape[1]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(values).reshape(-1)))


def _by_row(dataset: Dataset, name: str, of: Callable[[pa.Array], Any]) -> Ints:
    parts = [np.asarray(of(table[name].combine_chunks()), dtype=np.int64) for table in tables(dataset, [name])]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def sizes(dataset: Dataset, name: str) -> Ints:
    """[N], how long each list is; 0 where there is none."""
    return _by_row(dataset, name, _sizes)


def longest_inside(dataset: Dataset, name: str) -> Ints:
    """[N], of lists of lists the length of each row's longest; 0 where there is none."""
    return _by_row(dataset, name, partial(_inside, np.maximum))


def sizes_inside(dataset: Dataset, name: str) -> Ints:
    """[N], likewise, the lengths of all together."""
    return _by_row(dataset, name, partial(_inside, np.add))


def _inside(gather: np.ufunc, array: pa.Array) -> Ints:
    """[N], of lists of lists: the lengths of each row's lists, gathered."""
    found = np.zeros(len(array), dtype=np.int64)
    gather.at(found, np.repeat(np.arange(len(array)), _sizes(array)), _sizes(pc.list_flatten(array)))
    return found


def _sizes(array: pa.Array) -> Ints:
    return np.asarray(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False), dtype=np.int64)


def counted(dataset: Dataset, name: str) -> Counter[Any]:
    """How many rows have each value of a column of texts or numbers, in order of appearance."""
    found = Counter[Any]()
    if name in dataset.column_names:
        for value in pc.value_counts(column(dataset, name)).to_pylist():
            found[value["values"]] += value["counts"]
    return found


def rows_where(dataset: Dataset, name: str, values: Iterable[str]) -> Ints:
    """Numbers of the rows whose value of a column is one of these."""
    wanted = pa.array(values, pa.string())
    return np.flatnonzero(pc.is_in(column(dataset, name), value_set=wanted).to_numpy())


def places_of(values: Sequence[str] | pa.ChunkedArray, among: Sequence[str] | pa.ChunkedArray) -> Ints:
    """[N], where each value stands among others, the first place; -1 where it does not."""
    value_set = among.combine_chunks() if isinstance(among, pa.ChunkedArray) else pa.array(among, pa.string())
    found = pc.index_in(values if isinstance(values, pa.ChunkedArray) else pa.array(values, pa.string()), value_set)
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)


def texts(dataset: Dataset, name: str) -> Iterator[str]:
    """Those of a column, a block at a time."""
    for table in tables(dataset, [name]):
        yield from table[name].to_pylist()


DIGEST = np.dtype("S32")


def digest(text: str) -> bytes:
    """DIGEST of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest().encode()


def digests(texts: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """[N], equal where the texts are: a dictionary of the texts themselves would take more memory than they do."""
    return np.fromiter(map(digest, texts), dtype=DIGEST)


def kept_arrays(
    path: Path | None, shapes: Mapping[str, tuple[int, ...]], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Arrays by name: from the file where they were kept, or else computed, by all ranks, and kept there.

    Args:
        path: .npz, which the first rank reads and writes; None to compute and keep nothing.
        shapes: of some of the arrays; a file with others is of something else, and made anew.
        compute: makes them.
    """

    def known() -> dict[str, Any] | None:
        if path is None or not path.exists():
            return None
        with np.load(path) as file:
            found = dict(file)
        return found if all(found[name].shape == shape for name, shape in shapes.items()) else None

    found = ranks.from_first(known)
    if found is None:
        found = compute()
        if path is not None and ranks.is_first():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **found)
    return found


def numbered(digests: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """Of values, [N]: a number from 0 of each, equal where they are, in order of appearance, [N]; and the row in which
    each number first stands, [M], ascending."""
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return place[which], first[order].astype(np.int64)


class Rows(Sequence[npt.NDArray[np.int32]]):
    """Lists of token ids, laid end to end.

    Args:
        flat: ids of all rows, [T].
        counts: how many each row has, [R].
    """

    def __init__(self, flat: npt.NDArray[np.int32], counts: npt.NDArray[np.integer[Any]]) -> None:
        self.flat = flat
        self.ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @classmethod
    def of(cls, dataset: Dataset, *names: str) -> Rows:
        """A column of them, or several, one after the other."""
        return cls.joined([cls.of_table(table, name) for name in names for table in tables(dataset, [name])])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """One after the other."""
        flat = np.concatenate([np.empty(0, dtype=np.int32), *(part.flat for part in parts)])
        return cls(flat, np.concatenate([np.empty(0, dtype=np.int64), *(part.counts for part in parts)]))

    @classmethod
    def of_table(cls, table: pa.Table, name: str) -> Rows:
        """A column of a table; a row without a list has none."""
        array = table[name].combine_chunks()
        flat = pc.list_flatten(array).to_numpy(zero_copy_only=False)
        return cls(flat.astype(np.int32, copy=False), _sizes(array))

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int] | npt.NDArray[np.int32]]) -> Rows:
        """Of lists that are there."""
        counts = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = np.empty(int(counts.sum()), dtype=np.int32)
        at = 0
        for one in lists:
            flat[at : at + len(one)] = one
            at += len(one)
        return cls(flat, counts)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def counts(self) -> Ints:
        """Tokens of each, [R]."""
        return np.diff(self.ends)

    @overload
    def __getitem__(self, at: int) -> npt.NDArray[np.int32]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[npt.NDArray[np.int32]]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        at %= len(self)
        return self.flat[self.ends[at] : self.ends[at + 1]]

    def taken(self, at: Iterable[int]) -> Rows:
        """These of them, in this order; one may come several times."""
        return Rows.from_lists([self[i] for i in at])

    def arrow(self) -> pa.ListArray:
        """As a column."""
        return pa.ListArray.from_arrays(pa.array(self.ends, pa.int32()), pa.array(self.flat, pa.int32()))
