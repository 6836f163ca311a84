"""Stream: vectors of a file larger than memory, written as they come, to be gone on with when stopped.

While it runs, OUT.part is a .npy file that grows and OUT.part.json says how far it is and of what. Vectors reach the
disk before the record that counts them, so a stop at any moment loses a chunk at most, and never says too much.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from headway.loaded import Loaded
from headway.models import reads_pictures
from headway.spec import Strict, convert
from headway.store import read_json, write_text
from headway.use.embed import embed
from headway.use.rows import PICTURES, Pictures, Scan, Source, Texts, chunks

TYPE = np.dtype("<f4")
ROW_GROUP = 8192  # rows of a Parquet file's group


class Progress(NamedTuple):
    """How far it is: rows, of how many; the share of all work; seconds left by the pace since it began."""

    rows: int
    total: int
    share: float
    left: float


class State(Strict, frozen=True):
    """What a stopped run leaves: how many rows are written, of how many and how wide, of which file by which model."""

    rows: int
    total: int
    width: int
    file: str
    model: str
    truncate: bool


def embed_file(
    model: Loaded,
    file: Path,
    out: Path,
    *,
    field: str = "text",
    images: bool = False,
    resume: bool = False,
    quantize: str | None = None,
    watch: Callable[[Progress], None] | None = None,
    **how: Any,
) -> tuple[int, int]:
    """The vectors of every row of `file`, in order, into `out`, a .npy (rows x width, float32) or .parquet file that
    appears once it is whole; gives its rows and width.

    `file` has one text a line, or is a .jsonl, .csv, .tsv or .parquet with the text in `field`; for a vision model, and
    with `images`, it is a folder of pictures or a list of their paths. A .parquet out has each row's text or path in
    a column `field` or "path", and the vectors in "embedding". `how`: options of `embed`; `quantize`: as `load` has it,
    for a model loaded without. `resume` goes on with what
    a stopped run left, if model, options and file are still the same.
    """
    if out.suffix.lower() not in (".npy", ".parquet"):
        raise ValueError(f"{out}: vectors are written to a .npy or .parquet file: name one")
    if out.suffix.lower() == ".parquet":
        _pyarrow(out)
    part, record = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.part.json")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: no such folder: make it, or name another")
    if out.exists():
        raise ValueError(f"{out}: is there already: remove it, or name another file")
    if record.exists() and not resume:
        raise ValueError(
            f"{part}: a run was stopped here: --resume goes on with it; to start anew, remove {record.name}"
        )
    listed = images or file.is_dir() or file.suffix.lower() in PICTURES
    sees = reads_pictures(model.kind)
    if listed and not sees and model.kind != "dual":
        raise ValueError(f"{file}: pictures, and this model reads texts: name a file of texts")
    pictured = listed or sees
    source: Source = Pictures(file, field) if pictured else Texts(file, field)
    scan = source.scan()
    if not scan.rows:
        raise ValueError(f"{file}: nothing to embed, it has no rows")
    decides = {"quantize": quantize, **{name: how.get(name) for name in ("normalize", "pooling", "task")}}
    known = fingerprint(model, decides)
    model.pack(quantize)
    state = State(
        rows=0, total=scan.rows, width=0, file=scan.digest, model=known, truncate=bool(how.get("truncate", False))
    )
    if resume and record.exists():
        state = _checked(convert(read_json(record, dict), State, str(record)), state, part, file)
    try:
        state = _write(model, source, part, record, state, how, _Pace(source, scan, state.rows, watch))
    finally:
        if not record.exists():  # not one chunk is whole: there is nothing to go on with
            part.unlink(missing_ok=True)
    _finish(source, out, part, state, "path" if pictured else field)
    record.unlink(missing_ok=True)
    return state.total, state.width


def fingerprint(model: Loaded, how: dict[str, Any]) -> str:
    """What decides the vectors: spec, facts, tokenizer, weights and options."""
    model.unpack()  # weights packed for this machine are no tensors to read
    digest = hashlib.blake2b(digest_size=16)
    image = None if model.image is None else msgspec.to_builtins(model.image)
    tokenizer = None if model.source is None else model.source.record()
    said = [msgspec.to_builtins(model.spec), msgspec.to_builtins(model.facts), image, tokenizer, how]
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(model.net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _checked(old: State, new: State, part: Path, file: Path) -> State:
    """What was left, if it is of this file and this model and as long as it says."""
    for name, what in (("file", f"{file} is not the file that it was then"), ("model", "model or options differ")):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{part}: cannot go on: {what}: remove {part.name}.json, and start anew")
    if old.truncate and not new.truncate:
        raise ValueError(f"{part}: cannot go on: long texts were cut then: pass --truncate, or remove {part.name}.json")
    whole = part.is_file() and part.stat().st_size >= len(_header(old)) + old.rows * old.width * TYPE.itemsize
    if not whole or not 0 < old.rows <= new.total or old.total != new.total:
        raise ValueError(f"{part}: not what its record says: remove {part.name}.json, and start anew")
    return msgspec.structs.replace(old, truncate=new.truncate)


class _Pace:
    """Tells how far it is, within a chunk, too."""

    def __init__(self, source: Source, scan: Scan, rows: int, watch: Callable[[Progress], None] | None) -> None:
        self.scan, self.watch, self.rows = scan, watch, rows
        self.before = self.done = sum(map(source.work, islice(source, rows)))
        self.chunk, self.work = 0, 0
        self.began = time.monotonic()

    def begin(self, chunk: int, work: int) -> None:
        """A chunk of so many rows, and so much work, begins."""
        self.rows, self.done = self.rows + self.chunk, self.done + self.work
        self.chunk, self.work = chunk, work

    def tell(self, done: int, total: int) -> None:
        """So much of the chunk is done."""
        now, seconds = self.done + self.work * done / total, time.monotonic() - self.began
        left = seconds * (self.scan.work - now) / max(now - self.before, 1e-9)
        if self.watch is not None:
            self.watch(Progress(self.rows + self.chunk * done // total, self.scan.rows, now / self.scan.work, left))


def _write(
    model: Loaded, source: Source, part: Path, record: Path, state: State, how: dict[str, Any], pace: _Pace
) -> State:
    """Embeds what is left to do, chunk by chunk."""
    with part.open("r+b" if state.rows else "wb") as written:
        if state.rows:
            written.seek(len(_header(state)) + state.rows * state.width * TYPE.itemsize)
            written.truncate()  # what a stop left behind the last record
        for chunk in chunks(source, state.rows):
            pace.begin(len(chunk), sum(map(source.work, chunk)))
            vectors = embed(model, chunk, watch=pace.tell, **how).cpu().numpy().astype(TYPE)
            if not state.rows:
                state = msgspec.structs.replace(state, width=vectors.shape[1])
                written.write(_header(state))
            written.write(vectors.tobytes())
            written.flush()
            os.fsync(written.fileno())
            state = msgspec.structs.replace(state, rows=state.rows + len(chunk))
            write_text(record, json.dumps(msgspec.to_builtins(state)))
    return state


def _header(state: State) -> bytes:
    """Of a .npy file of all rows."""
    shape = {"descr": TYPE.str, "fortran_order": False, "shape": (state.total, state.width)}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()


def _finish(source: Source, out: Path, part: Path, state: State, column: str) -> None:
    """The whole file takes its name."""
    if out.suffix.lower() == ".npy":
        os.replace(part, out)
        return
    pyarrow = _pyarrow(out)
    vectors = np.load(part, mmap_mode="r")
    kind = pyarrow.list_(pyarrow.float32(), state.width)
    schema = pyarrow.schema([(column, pyarrow.string()), ("embedding", kind)])
    fresh, at = out.with_name(f".{out.name}.part"), 0
    with pyarrow.parquet.ParquetWriter(fresh, schema) as writer:
        for rows in chunks(source, rows=ROW_GROUP, work=2**26):
            flat = pyarrow.array(np.ascontiguousarray(vectors[at : at + len(rows)]).reshape(-1))
            arrays = [pyarrow.array(map(str, rows)), pyarrow.FixedSizeListArray.from_arrays(flat, state.width)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            at += len(rows)
    os.replace(fresh, out)
    part.unlink()


def _pyarrow(out: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{out}: writing Parquet needs pyarrow: pip install 'headway[parquet]'") from None
    return pyarrow
