"""Rows of texts from a built-in set or from files (.tsv .csv .jsonl .parquet), split into train, valid and test.

Which part a row belongs to is a pure function of its first text, so that it never moves when data is added,
reordered or repeated, and all the targets of one input stay together. Every mistake of a user is one ValueError line.
A .tsv is taken literally (no quoting); a .csv may quote. Both have a header row. Text files may end in .gz.
"""

import csv
import difflib
import glob
import gzip
import hashlib
import importlib
import inspect
import os
import pkgutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headway.data import builtin
from headway.data.folders import pictures
from headway.spec import Strict

Values = tuple[Any, ...]  # of one row; texts, or what a built-in set has for a picture
MAY_BE_EMPTY = ("answer",)  # a question without an answer
_SHOWN = 5  # skipped rows named in the notes of one file


class DataSpec(Strict, frozen=True, kw_only=False):
    """Where the rows are.

    `source` is a built-in set's name, a path, a glob, or a folder of pictures. `input` to `negative` say which column
    or JSON key plays which part; an objective reads some of them (`seq2seq`: input and target).
    `valid` and `test` are files of their own; where one is None, its part is split off `source` by `part_of`:
    `held_out` percent of the rows for each. Rows alike in the column `group` (a file, an author) stay together.
    `train_rows`: train on so many of the rows only, the same whatever the model, and fewer are a part of more.
    `lowercase` changes the first text only: in a target, case may carry meaning (X-SAMPA). `keep_stress` is cmudict's.
    """

    source: str
    input: str = "input"
    target: str = "target"
    text: str = "text"
    second: str = "second"
    label: str = "label"
    image: str = "image"
    question: str = "question"
    context: str = "context"
    answer: str = "answer"
    valid: str | None = None
    test: str | None = None
    negative: str = "negative"
    group: str | None = None
    held_out: Annotated[int, Meta(ge=1, le=45)] = 5
    train_rows: Annotated[int, Meta(ge=1)] | None = None
    lowercase: bool = False
    keep_stress: bool = False
    bad_rows: Literal["refuse", "skip"] = "refuse"


@dataclass(frozen=True)
class Splits:
    """Lists of rows; `notes` says what a reader should know, above all the rows skipped, by file:line."""

    train: list[Values]
    valid: list[Values]
    test: list[Values]
    notes: list[str]


def load_splits(spec: DataSpec, roles: Sequence[str] = ("input", "target")) -> Splits:
    """The rows of all three parts; `roles` are fields of the spec, whose columns make up a row, in their order."""
    if spec.bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows={spec.bad_rows!r} is unknown: use 'refuse' or 'skip'")
    if spec.lowercase and roles[0] == "image":
        raise ValueError("data.lowercase is for texts, and these rows begin with a picture: leave it out")
    notes: list[str] = []
    own = {"valid": spec.valid, "test": spec.test}
    parts: dict[str, list[Values]] = {"train": [], "valid": [], "test": []}
    grouped = spec.group is not None or "group" in _columns_of(spec.source)
    for row in _cased(_source(spec, (*roles, "group") if grouped else roles, notes), spec):
        part = part_of(row[-1] if grouped else row[0], spec.held_out)
        parts["train" if own.get(part) is not None else part].append(row[: len(roles)])
    for name, pattern in own.items():
        if pattern is not None:
            parts[name] = list(_cased(_read(pattern, spec, roles, notes), spec))
    if not parts["train"]:
        raise ValueError(f"{spec.source}: no row falls into train ({100 - 2 * spec.held_out}% do); give more rows")
    notes += [f"{name} is empty: too few rows for a split by hash" for name in parts if not parts[name]]
    return Splits(**{**parts, "train": fewer(parts["train"], spec.train_rows)}, notes=notes)


def part_of(value: Any, held_out: int = 5) -> Literal["train", "valid", "test"]:
    """The part an input belongs to, for ever, by sha256: 90% train, 5% valid, 5% test unless `held_out` is another."""
    percent = int.from_bytes(_digest(value)[:8], "big") % 100
    return "train" if percent < 100 - 2 * held_out else "valid" if percent < 100 - held_out else "test"


def fewer(rows: list[Values], count: int | None) -> list[Values]:
    """So many of the rows, in their order: those whose inputs have the smallest hashes; all where there are no more."""
    if count is None or count >= len(rows):
        return rows
    digests = [_digest(row[0]) for row in rows]
    kept = sorted(sorted(range(len(rows)), key=lambda i: (digests[i][8:], i))[:count])
    return [rows[i] for i in kept]


def _digest(value: Any) -> bytes:
    return hashlib.sha256(value.encode() if isinstance(value, str) else memoryview(value).tobytes()).digest()


def references(pairs: Iterable[Values]) -> dict[str, list[str]]:
    """Every distinct target listed for each input, in order: any of them counts as a right answer."""
    found: dict[str, dict[str, None]] = {}
    for source, target in pairs:
        found.setdefault(source, {})[target] = None
    return {source: list(targets) for source, targets in found.items()}


def texts(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Each row's line (parquet: row), its text in that column, and what is wrong with it, "" where nothing is.

    A file that is none of .tsv .csv .jsonl .parquet is plain text, one a line; there, an empty line is wrong too.
    """
    if _ending(path) not in _readers():
        lines = _Lines(path)
        for line in lines:
            bad = lines.undecoded[1] if lines.undecoded[0] == lines.number else "" if line.strip() else "an empty line"
            yield lines.number, line.rstrip("\r\n"), bad
        return
    for number, row in _reader(path)(path, (column,)):
        problem = row if isinstance(row, str) else _blank(row, (column,))
        yield number, "" if problem else row[0], problem or ""


def _cased(rows: Iterable[Values], spec: DataSpec) -> Iterable[Values]:
    return ((row[0].lower(), *row[1:]) for row in rows) if spec.lowercase else rows


def _columns_of(source: str) -> dict[str, str]:
    """A built-in set's columns by role; none of anything else."""
    known = importlib.import_module(f"{builtin.__name__}.{source}") if source in _builtins() else None
    return getattr(known, "COLUMNS", {})


def _source(spec: DataSpec, roles: Sequence[str], notes: list[str]) -> Iterable[Values]:
    """A built-in set takes `keep_stress` where its `rows` has that argument, and has the columns that it names."""
    known = importlib.import_module(f"{builtin.__name__}.{spec.source}") if spec.source in _builtins() else None
    takes_stress = known is not None and "keep_stress" in inspect.signature(known.rows).parameters
    if spec.keep_stress and not takes_stress:
        raise ValueError(f"keep_stress is for the source 'cmudict' only, not for {spec.source!r}: leave it out")
    if known is None:
        return _read(spec.source, spec, roles, notes)
    # of a built-in set, each role has its own column: {"input": "word"}
    named: dict[str, str] = getattr(known, "COLUMNS", {role: role for role in roles})
    order = list(named.values())
    chosen = []
    for role in roles:
        given = getattr(spec, role)
        wanted = named.get(role) if given in (role, None) else given
        if wanted not in order:
            raise ValueError(f"{spec.source}: no column {given!r}; it has {', '.join(map(repr, order))}")
        chosen.append(order.index(wanted))
    rows = known.rows(keep_stress=spec.keep_stress) if takes_stress else known.rows()
    return (tuple(row[i] for i in chosen) for row in rows)


def _builtins() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(builtin.__path__))


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}  # "Word" for "word" is the commonest slip
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""


def _files(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        raise ValueError(f"{pattern} is a folder: name its files, for example '{path}/*.tsv'")
    # a file whose own name holds [ or * is meant literally
    names = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        beside = [str(path.parent / other.name) for other in path.parent.glob("*")]
        nearest = _nearest(str(path), beside + _builtins())
        raise ValueError(f"no file {pattern!r}{nearest or '.'} Built-in sets: {', '.join(_builtins())}")
    return files


# A reader yields the line (parquet: the row) and its values, or a str that says why there are none.
Row = tuple[int, Values | str]


def _read(pattern: str, spec: DataSpec, roles: Sequence[str], notes: list[str]) -> list[Values]:
    if "image" in roles and (folder := Path(os.path.expanduser(pattern))).is_dir():
        return pictures(folder, roles)
    columns = tuple(getattr(spec, role) for role in roles)
    needed = tuple("" if role in MAY_BE_EMPTY else column for role, column in zip(roles, columns, strict=True))
    rows: list[Values] = []
    for path in _files(pattern):
        reader = _reader(path)
        kept: list[Values] = []
        bad: list[str] = []
        try:
            for line, row in reader(path, columns):
                problem = row if isinstance(row, str) else _blank(row, needed)
                if not isinstance(row, str) and problem is None:
                    # a picture is named from where the file lies
                    values = zip(roles, row, strict=True)
                    kept.append(tuple(str(path.parent / v) if role == "image" else v for role, v in values))
                elif spec.bad_rows == "skip":
                    bad.append(f"{path}:{line}: {problem}")
                else:
                    raise ValueError(f"{path}:{line}: {problem}; mend the row or set bad_rows='skip'")
        except (OSError, EOFError, zlib.error) as error:  # no right to read, a damaged .gz
            raise ValueError(f"{path}: cannot be read ({error})") from None
        if not kept:
            why = f"not one of its {len(bad)} rows can be used, the first: {bad[0]}" if bad else "it has no rows"
            raise ValueError(f"{path}: nothing to read, {why}")
        if bad:
            notes.append(f"{path}: skipped {len(bad)} of {len(bad) + len(kept)} rows")
            notes += bad[:_SHOWN] + ([f"{path}: ... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else [])
        rows += kept
    return rows


def _blank(row: Values, columns: tuple[str, ...]) -> str | None:
    named = zip(columns, row, strict=True)
    return next((f"{column!r} is empty" for column, text in named if column and not text.strip()), None)


def _readers() -> dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]]:
    known: dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]] = {
        ".tsv": _table,
        ".csv": _table,
        ".jsonl": _jsonl,
    }
    return known | {f"{text}.gz": reader for text, reader in known.items()} | {".parquet": _parquet}


def _reader(path: Path) -> Callable[[Path, tuple[str, ...]], Iterator[Row]]:
    ending, known = _ending(path), _readers()
    if ending not in known:
        raise ValueError(
            f"{path}: cannot tell what {ending or 'a file without an ending'!r} is; known: {' '.join(known)}"
        )
    return known[ending]


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


class _Lines:
    """The lines of a UTF-8 file, .gz or not, with their ends kept. `number` is the last one given, and `undecoded`
    the last that is not UTF-8 with what is wrong; it is still given, patched up, so that the reader stays in step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.undecoded = (0, "")

    def __iter__(self) -> Iterator[str]:
        with gzip.open(self.path) if self.path.suffix.lower() == ".gz" else self.path.open("rb") as file:
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
    lines = _Lines(path)
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]
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
        raise ValueError(f"{path}: no column {column!r}{_nearest(column, names) or '.'} It has: {', '.join(names)}")
    return names.index(column)


def _jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    lines = _Lines(path)
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
        yield lines.number, _texts(record, columns)
    if lines.number == 0:
        raise ValueError(f"{path}: the file is empty")


def _texts(record: object, columns: tuple[str, ...]) -> Values | str:
    """The texts of a JSON record, or why it has none."""
    if not isinstance(record, dict):
        keys = " and ".join(map(repr, columns))
        return f"a JSON {type(record).__name__}, not an object with the keys {keys}"
    for column in columns:
        if column not in record:
            return f"no key {column!r}{_nearest(column, record) or '.'} It has: {', '.join(record)}"
        if not isinstance(record[column], str):
            what = "null" if record[column] is None else f"of type {type(record[column]).__name__}"
            return f"{column!r} is {what}, not a text"
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
                    yield number, _texts(record, columns)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
