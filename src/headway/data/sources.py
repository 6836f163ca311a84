"""Rows from a built-in set, from files or from folders of them, split into train, valid and test.

Which part a row belongs to is a pure function of its first text, so that it never moves when data is added,
reordered or repeated, and all the targets of one input stay together. Every mistake of a user is one ValueError line.
Rows are read one after the other, and those that are too many for the memory wait on the disk.
"""

import glob
import hashlib
import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from headway.data import builtin
from headway.data.files import DAMAGED, PACKED, Values, documents, ending, nearest, problem_of, reader
from headway.data.folders import pictures
from headway.data.rows import Rows
from headway.spec import Strict

MAY_BE_EMPTY = ("answer",)  # a question without an answer
FILES = 20  # from so many plain texts on, each is a document of its own
PLAIN = frozenset(
    (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".js", ".ts", ".c", ".h", ".cpp", ".java", ".go", ".rs")
)
_SHOWN = 5  # skipped rows named in the notes of one file


class DataSpec(Strict, frozen=True, kw_only=False):
    """Where the rows are.

    `source` is a built-in set's name, a path, a glob, or a folder: of tables, of plain texts, of pictures. `input` to
    `negative` say which column or JSON key plays which part; an objective reads some (`seq2seq`: input and target).
    `valid` and `test` are files of their own; where one is None, its part is split off `source` by `part_of`:
    `held_out` percent of the rows for each. Rows alike in the column `group` (a file, an author) stay together.
    `train_rows`: train on so many of the rows only, the same whatever the model, and fewer are a part of more.
    `unit`: what of a plain text is a row, the "file", a "paragraph" or a "line" (by default the file where there are
    20 of them, else the paragraph).
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
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    valid: str | None = None
    test: str | None = None
    negative: str = "negative"
    group: str | None = None
    unit: Literal["file", "paragraph", "line"] | None = None
    held_out: Annotated[int, Meta(ge=1, le=45)] = 5
    train_rows: Annotated[int, Meta(ge=1)] | None = None
    lowercase: bool = False
    keep_stress: bool = False
    bad_rows: Literal["refuse", "skip"] = "refuse"


@dataclass(frozen=True)
class Splits:
    """Rows in their order; `notes` says what a reader should know, above all the rows skipped, by file:line."""

    train: Sequence[Values]
    valid: Sequence[Values]
    test: Sequence[Values]
    notes: list[str]


def load_splits(spec: DataSpec, roles: Sequence[str] = ("input", "target")) -> Splits:
    """The rows of all three parts; `roles` are fields of the spec, whose columns make up a row, in their order."""
    if spec.bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows={spec.bad_rows!r} is unknown: use 'refuse' or 'skip'")
    if spec.lowercase and roles[0] == "image":
        raise ValueError("data.lowercase is for texts, and these rows begin with a picture: leave it out")
    notes: list[str] = []
    own = {"valid": spec.valid, "test": spec.test}
    parts = {part: Rows() for part in ("train", "valid", "test")}
    grouped = spec.group is not None or "group" in getattr(_known(spec.source), "COLUMNS", {})
    for row in _cased(_source(spec, (*roles, "group") if grouped else roles, notes), spec):
        part = part_of(row[-1] if grouped else row[0], spec.held_out)
        parts["train" if own.get(part) is not None else part].append(row[: len(roles)])
    for name, pattern in own.items():
        if pattern is not None:
            parts[name] = Rows(_cased(_read(pattern, spec, roles, notes), spec))
    if not parts["train"]:
        raise ValueError(f"{spec.source}: no row falls into train ({100 - 2 * spec.held_out}% do); give more rows")
    notes += [f"{name} is empty: too few rows for a split by hash" for name in parts if not parts[name]]
    train, valid, test = (part.rows for part in parts.values())
    return Splits(fewer(train, spec.train_rows), valid, test, notes=notes)


def part_of(value: Any, held_out: int = 5) -> Literal["train", "valid", "test"]:
    """The part an input belongs to, for ever, by sha256: 90% train, 5% valid, 5% test unless `held_out` is another."""
    percent = int.from_bytes(_digest(value)[:8], "big") % 100
    return "train" if percent < 100 - 2 * held_out else "valid" if percent < 100 - held_out else "test"


def fewer(rows: Sequence[Values], count: int | None) -> Sequence[Values]:
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


def _cased(rows: Iterable[Values], spec: DataSpec) -> Iterable[Values]:
    return ((row[0].lower(), *row[1:]) for row in rows) if spec.lowercase else rows


def _known(source: str) -> Any:
    """The module of a built-in set; None of anything else."""
    return importlib.import_module(f"{builtin.__name__}.{source}") if source in _builtins() else None


def _source(spec: DataSpec, roles: Sequence[str], notes: list[str]) -> Iterable[Values]:
    """A built-in set takes `keep_stress` where its `rows` has that argument, and has the columns that it names."""
    known = _known(spec.source)
    takes_stress = known is not None and "keep_stress" in inspect.signature(known.rows).parameters
    if spec.keep_stress and not takes_stress:
        raise ValueError(f"keep_stress is for the source 'cmudict' only, not for {spec.source!r}: leave it out")
    if known is not None and spec.unit:
        raise ValueError(f"data.unit cuts plain texts, and the rows of {spec.source!r} are cut: leave it out")
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


def _files(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        return _inside(path)
    # a file whose own name holds [ or * is meant literally
    names = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        beside = [str(path.parent / other.name) for other in path.parent.glob("*")]
        near = nearest(str(path), beside + _builtins())
        raise ValueError(f"no file {pattern!r}{near or '.'} Built-in sets: {', '.join(_builtins())}")
    return files


def _inside(folder: Path) -> list[Path]:
    """All tables below a folder, or all plain texts where there is no table."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    tables = [path for path in files if reader(path) is not None]
    found = tables or [path for path in files if ending(path) in PLAIN]
    if not found:
        raise ValueError(f"{folder}: no table (.tsv .csv .jsonl .parquet) and no text ({' '.join(sorted(PLAIN))}) "
                         "in this folder; name its files, for example with a glob")  # fmt: skip
    return found


def _read(pattern: str, spec: DataSpec, roles: Sequence[str], notes: list[str]) -> Iterator[Values]:
    if "image" in roles and (folder := Path(os.path.expanduser(pattern))).is_dir():
        yield from pictures(folder, roles)
        return
    files = _files(pattern)
    plain = [path for path in files if reader(path) is None]
    if spec.unit and not plain:
        raise ValueError(f"data.unit cuts plain texts, and {pattern} holds tables, whose rows are cut: leave it out")
    unit = spec.unit or ("file" if len(plain) >= FILES else "paragraph")
    if plain and spec.unit is None:
        notes.append(f"{pattern}: each {unit} of {len(plain)} plain texts is a row (data.unit)")
    for path in files:
        yield from _rows(path, spec, roles, unit, notes)


def _rows(path: Path, spec: DataSpec, roles: Sequence[str], unit: str, notes: list[str]) -> Iterator[Values]:
    """The rows of one file; bad ones are refused, or counted and told."""
    columns = tuple(getattr(spec, role) for role in roles)
    empty = tuple(column for role, column in zip(roles, columns, strict=True) if role in MAY_BE_EMPTY)
    read = reader(path)
    if read is None and len(roles) > 1:
        what = ending(path) or "a file without an ending"
        raise ValueError(f"{path}: cannot tell what {what!r} is; known: .tsv .csv .jsonl .parquet, "
                         f"all but the last also {' '.join(PACKED)}")  # fmt: skip
    kept, bad = 0, 0
    first: list[str] = []
    try:
        for line, row in documents(path, unit) if read is None else read(path, columns):
            row = row if isinstance(row, str) else _placed(path, row, roles)
            problem = row if isinstance(row, str) else problem_of(row, columns, empty)
            if not isinstance(row, str) and problem is None:
                kept += 1
                yield row
                continue
            if spec.bad_rows == "refuse":
                raise ValueError(f"{path}:{line}: {problem}; mend the row or set bad_rows='skip'")
            bad += 1
            if len(first) < _SHOWN:
                first.append(f"{path}:{line}: {problem}")
    except DAMAGED as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not kept:
        why = f"not one of its {bad} rows can be used, the first: {first[0]}" if bad else "it has no rows"
        raise ValueError(f"{path}: nothing to read, {why}")
    if bad:
        notes.append(f"{path}: skipped {bad} of {bad + kept} rows")
        notes += first + ([f"{path}: ... and {bad - _SHOWN} more"] if bad > _SHOWN else [])


def _placed(path: Path, row: Values, roles: Sequence[str]) -> Values:
    """A picture is named from where its table lies, and a class may be a number."""
    found = []
    for role, value in zip(roles, row, strict=True):
        if role == "image" and isinstance(value, str):
            value = str(path.parent / value)
        elif role == "label" and isinstance(value, int):  # or yes and no
            value = str(value)
        found.append(value)
    return tuple(found)
