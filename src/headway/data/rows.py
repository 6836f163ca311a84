"""Rows that are too many for the memory wait on the disk, as MessagePack; fewer are a list."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import msgspec

from headway.data.files import Values

SPILL = 1 << 29  # characters of text that stay in memory, over all rows of a part


class Rows:
    """Rows as they come; `rows` is all of them, in their order."""

    def __init__(self, rows: Iterable[Values] = ()) -> None:
        self.rows: list[Values] | OnDisk = []
        self._size = 0
        for row in rows:
            self.append(row)

    def append(self, row: Values) -> None:
        self._size += sum(len(value) for value in row if isinstance(value, str))
        if self._size > SPILL and isinstance(self.rows, list) and all(isinstance(value, str) for value in row):
            self.rows = OnDisk(self.rows)
        self.rows.append(row)

    def __bool__(self) -> bool:
        return len(self.rows) > 0


class OnDisk(Sequence[Values]):
    """Rows of texts in a temporary file, which is gone with them."""

    def __init__(self, rows: Iterable[Values]) -> None:
        self._file: Any = tempfile.TemporaryFile(prefix="headway-")  # noqa: SIM115 (lives as long as we do)
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        for row in rows:
            self.append(row)

    def append(self, row: Values) -> None:
        self._file.seek(self._ends[-1])
        self._file.write(msgspec.msgpack.encode(row))
        self._ends.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> Values: ...
    @overload
    def __getitem__(self, i: slice) -> list[Values]: ...
    def __getitem__(self, i: int | slice) -> Values | list[Values]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        begin = self._ends[i % len(self)]
        self._file.seek(begin)
        return tuple(msgspec.msgpack.decode(self._file.read(self._ends[i % len(self) + 1] - begin)))

    def __iter__(self) -> Iterator[Values]:
        return (self[i] for i in range(len(self)))
