"""Examples: what rows became, as integers; kept flat, and on the disk where there are too many for the memory.

An example is a tuple of fields, each a vector of integers: ids of a text, a label, the pixels of a small picture or the
bytes of a large one's path.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

Example = tuple[Sequence[Any] | np.ndarray, ...]
SPILL = 1 << 26  # integers that a field keeps in memory; what is more goes to a temporary file


class Field:
    """One field of every example: all integers one after the other, and where each begins."""

    def __init__(self) -> None:
        self._held = array("i")
        self._ends = array("q")
        self._count = 0
        self._file: Any = None
        self._flat: np.ndarray | None = None

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        assert self._flat is None, "a field that was read takes no more"
        self._held.extend(values if isinstance(values, list | tuple) else [int(value) for value in values])
        self._count += len(values)
        self._ends.append(self._count)
        if len(self._held) >= SPILL:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="headway-")  # noqa: SIM115 (lives as long as we do)
                weakref.finalize(self, self._file.close)
            self._held.tofile(self._file)
            self._held = array("i")

    @property
    def flat(self) -> np.ndarray:
        """All integers, mapped where they lie on the disk."""
        if self._flat is None:
            if self._file is None:
                self._flat = np.frombuffer(self._held, np.int32)
            else:
                self._held.tofile(self._file)
                self._file.flush()
                self._flat = np.memmap(self._file, np.int32, "r")
            self._bounds = (
                np.concatenate([[0], np.frombuffer(self._ends, np.int64)]) if self._ends else np.zeros(1, int)
            )
        return self._flat

    def __getitem__(self, i: int) -> np.ndarray:
        flat = self.flat
        return flat[self._bounds[i] : self._bounds[i + 1]]


class Examples(Sequence[Example]):
    """Examples of equally many fields, in the order they were added."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._fields: list[Field] = []
        self._count = 0
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        if not self._fields:
            self._fields = [Field() for _ in example]
        for field, values in zip(self._fields, example, strict=True):
            field.append(values)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._count))]
        if not -self._count <= i < self._count:
            raise IndexError(i)
        return tuple(field[i % self._count] for field in self._fields)

    def fingerprint(self) -> str:
        """SHA-256 of everything in it."""
        found = hashlib.sha256()
        for field in self._fields:
            found.update(np.ascontiguousarray(field.flat).data)
            found.update(np.frombuffer(field._ends, np.int64).data)
        return found.hexdigest()
