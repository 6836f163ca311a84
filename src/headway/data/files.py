"""Files as rows: tables (.tsv .csv .jsonl .parquet) and plain text, compressed or not (.gz .bz2 .xz .zst).

A .tsv is taken literally (no quoting); a .csv may quote. Both have a header row. A file is read as it is needed, a few
rows at a time. What cannot be read is told by file and line.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

Values = tuple[Any, ...]  # of one row; texts, or what a built-in set has for a picture
# A reader yields the line (parquet: the row) and its values, or a str that says why there are none.
Row = tuple[int, Values | str]
Reader = Callable[[Path, tuple[str, ...]], Iterator[Row]]
PACKED = (".gz", ".bz2", ".xz", ".zst")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # no right to read, a damaged archive


def reader(path: Path) -> Reader | None:
    """What reads a table of this ending; None where it is none."""
    known: dict[str, Reader] = {".tsv": _table, ".csv": _table, ".jsonl": _jsonl}
    return _parquet if path.suffix.lower() == ".parquet" else known.get(ending(path))


def ending(path: Path) -> str:
    """The ending that says what a file is, without that of the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[:-1][-1:] if suffixes and suffixes[-1] in PACKED else suffixes[-1:])


def opened(path: Path) -> Any:
    """The bytes of a file, unpacked where its ending says that it is packed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            try:
                import zstandard
            except ModuleNotFoundError:
                raise ValueError(f"{path}: reading .zst needs zstandard: pip install zstandard") from None
            return zstandard.open(path, "rb")
    return path.open("rb")


def documents(path: Path, unit: str) -> Iterator[Row]:
    """A plain text as rows of one value: the whole "file", each "paragraph" (what stands between blank lines), or each
    "line"; each with the line it begins on."""
    lines = Lines(path)
    held: list[str] = []
    first = 1
    for line in lines:
        if lines.undecoded[0] == lines.number:
            yield lines.undecoded
            continue
        if unit != "line":
            held.append(line)
        if unit == "line" and line.strip():
            yield lines.number, (line.rstrip("\r\n"),)
        elif unit == "paragraph" and not line.strip():
            if text := "".join(held).strip("\r\n"):
                yield first, (text,)
            held, first = [], lines.number + 1
    if text := "".join(held).strip("\r\n"):
        yield first, (text,)


def texts(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Each row's line (parquet: row), its text in that column, and what is wrong with it, "" where nothing is.

    A file that is none of .tsv .csv .jsonl .parquet is plain text, one a line; there, an empty line is wrong too.
    """
    read = reader(path)
    if read is None:
        lines = Lines(path)
        for line in lines:
            bad = lines.undecoded[1] if lines.undecoded[0] == lines.number else "" if line.strip() else "an empty line"
            yield lines.number, line.rstrip("\r\n"), bad
        return
    for number, row in read(path, (column,)):
        problem = row if isinstance(row, str) else problem_of(row, (column,))
        yield number, "" if problem else row[0], problem or ""


def problem_of(row: Values, columns: tuple[str, ...], empty: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a row of texts: one that is none, or one that is blank and not among `empty`."""
    for column, value in zip(columns, row, strict=True):
        if not isinstance(value, str):
            what = "null" if value is None else f"of type {type(value).__name__}"
            return f"{column!r} is {what}, not a text"
        if not value.strip() and column not in empty:
            return f"{column!r} is empty"
    return None


def nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}  # "Word" for "word" is the commonest slip
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""


class Lines:
    """The lines of a UTF-8 file, packed or not, with their ends kept. `number` is the last one given, and `undecoded`
    the last that is not UTF-8 with what is wrong; it is still given, patched up, so that the reader stays in step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.undecoded = (0, "")

    def __iter__(self) -> Iterator[str]:
        with opened(self.path) as file:
            for self.number, line in enumerate(file, 1):
                if self.number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that Excel writes
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    what = f"not UTF-8 (0x{line[error.start]:02x} is byte {error.start + 1} of the line)"
                    self.undecoded = (self.number, what)
                    yield line.decode(errors="replace")


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    lines = Lines(path)
    tabs = ending(path) == ".tsv"
    # strict: otherwise a quote that is never closed swallows the rest of the file without a word
    rows = csv.reader(
        iter(lines), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
    )
    try:
        header = next((row for row in rows if row), None)
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.number}: the header cannot be read ({error})") from None
    if header is None:
        raise ValueError(f"{path}: the file is empty; its first line should name the columns")
    if lines.undecoded[0]:
        raise ValueError(f"{path}:{lines.number}: the header is {lines.undecoded[1]}; save the file as UTF-8")
    places = [_column(path, column, header) for column in columns]
    while True:
        start = lines.number + 1
        try:
            row = next(rows, None)
            problem = row and f"{len(row)} field{'s' * (len(row) != 1)}, the header has {len(header)}"
        except csv.Error as error:
            row, problem = [], f"cannot be read ({error})"
        if row is None:
            return
        if lines.undecoded[0] >= start:
            yield lines.undecoded
        elif len(row) == len(header):
            yield start, tuple(row[place] for place in places)
        elif problem:  # a blank line has none and is nothing
            swallowed = f"; the row runs to line {lines.number}, is a quote left open?" if lines.number > start else ""
            yield start, problem + swallowed


def _column(path: Path, column: str, names: list[str]) -> int:
    if names.count(column) > 1:
        raise ValueError(f"{path}: {names.count(column)} columns are called {column!r}; rename all but one")
    if column not in names:
        raise ValueError(f"{path}: no column {column!r}{nearest(column, names) or '.'} It has: {', '.join(names)}")
    return names.index(column)


def _jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    lines = Lines(path)
    for line in lines:
        if not line.strip():
            continue
        if lines.undecoded[0] == lines.number:
            yield lines.undecoded
            continue
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            yield lines.number, f"not valid JSON ({error})"
            continue
        yield lines.number, _values(record, columns)
    if lines.number == 0:
        raise ValueError(f"{path}: the file is empty")


def _values(record: object, columns: tuple[str, ...]) -> Values | str:
    """The values of a JSON record, or why it has none."""
    if not isinstance(record, dict):
        keys = " and ".join(map(repr, columns))
        return f"a JSON {type(record).__name__}, not an object with the keys {keys}"
    for column in columns:
        if column not in record:
            return f"no key {column!r}{nearest(column, record) or '.'} It has: {', '.join(record)}"
    return tuple(record[column] for column in columns)


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'headway[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                _column(path, column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for record in batch.to_pylist():
                    number += 1
                    yield number, _values(record, columns)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
