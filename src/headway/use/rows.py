"""Rows: the texts of a file, or the pictures of a folder, read in order, a few at a time; none larger than memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from headway.data.files import texts
from headway.data.folders import PICTURES

CHUNK, CHARACTERS = 512, 2**18  # rows, and characters, of a chunk: seconds of work, so that little is lost


class Scan(NamedTuple):
    """What a source holds: rows, work (characters, or pictures), and a digest of what they are."""

    rows: int
    work: int
    digest: str


class Texts:
    """One text a row, of a file of lines or of one column of a table."""

    def __init__(self, path: Path, field: str) -> None:
        if not path.is_file():
            what = "a folder, and this model reads texts: name a file" if path.is_dir() else "no such file"
            raise ValueError(f"{path}: {what}")
        self.path, self.field = path, field

    def __iter__(self) -> Iterator[str]:
        for line, text, problem in texts(self.path, self.field):
            if problem:
                raise ValueError(f"{self.path}:{line}: {problem}; mend or remove it, for rows and vectors go together")
            yield text

    def work(self, row: Any) -> int:
        return len(row)

    def scan(self) -> Scan:
        """Reads everything once, so that a bad row is known before hours of work."""
        return _scan(self, (text.encode("utf-8", "surrogatepass") for text in self))


class Pictures:
    """The pictures of a folder and those below, by name, or of a file that lists their paths (from where it lies)."""

    def __init__(self, path: Path, field: str) -> None:
        if path.is_dir():
            self.paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
            if not self.paths:
                raise ValueError(f"{path}: no pictures in this folder ({' '.join(PICTURES)})")
        elif path.suffix.lower() in PICTURES:
            self.paths = [path]
        else:
            self.paths = [path.parent / line for line in Texts(path, field)]
        if missing := next((p for p in self.paths if not p.is_file()), None):
            raise ValueError(f"{missing}: no such picture")

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def work(self, row: Any) -> int:
        return 1

    def scan(self) -> Scan:
        """Pictures are known by name, size and time."""
        facts = ((p, p.stat()) for p in self.paths)
        return _scan(self, (f"{p}\0{s.st_size}\0{s.st_mtime_ns}".encode() for p, s in facts))


Source = Texts | Pictures


def _scan(source: Any, rows: Iterator[bytes]) -> Scan:
    digest, count, work = hashlib.blake2b(digest_size=16), 0, 0
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row)
        count += 1
        work += len(row) if isinstance(source, Texts) else 1
    return Scan(count, work, digest.hexdigest())


def chunks(source: Source, start: int = 0, rows: int | None = None, work: int = CHARACTERS) -> Iterator[list[Any]]:
    """The rows from `start` on, at most so many and so much work at a time (or one row)."""
    chunk: list[Any] = []
    held, rows = 0, rows or CHUNK
    for row in islice(source, start, None):
        one = source.work(row)
        if chunk and (len(chunk) == rows or held + one > work):
            yield chunk
            chunk, held = [], 0
        chunk.append(row)
        held += one
    if chunk:
        yield chunk
