"""Weights: published files as a mapping from names to tensors, read as they are asked for, and written whole.

Names, shapes and dtypes are known from checked headers before any data are read. Data are mapped into memory a few
megabytes at a time, so that filling a network takes little more memory than the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from headway.header import FOREIGN, MAX_HEADER, PICKLES, Entry, loads, read_header, refuse_pickle, shown
from headway.store import replacing, unshared

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WINDOW = 2**24  # bytes of a file that are mapped at once: mapped pages count as memory of this process
SHARD = 2 * 2**30


@runtime_checkable
class Streamed(Protocol):
    """Tensors that can be read a run of rows at a time."""

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) in the order of the file; rows hold until the next step."""
        ...


class Weights(Mapping[str, Tensor]):
    """Tensors by name in safetensors files whose headers were checked; each is read when asked for and not kept."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        for _, start, rows in self.stream([name]):
            rowed(tensor)[start : start + len(rows)] = rows
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        """What all of them take, in bytes."""
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows), one file after the other as the data lie there; rows hold until the next step.

        A new mapping every WINDOW bytes: what the old one held leaves this process's memory with it.
        """
        handle: Any = None
        file, mapped = Path(), 0
        for name in sorted(names, key=lambda name: (self.entries[name].file, self.entries[name].begin)):
            entry = self.entries[name]
            for start, stop in _runs(entry):
                takes = (entry.end - entry.begin) * (stop - start) // max(1, _rows(entry))
                if handle is None or file != entry.file or mapped + takes > WINDOW:
                    handle = None  # unmapped before the next
                    handle, file, mapped = _open(entry.file), entry.file, 0
                mapped += takes
                yield name, start, _mapped(handle, entry.file, name, (start, stop) if entry.shape else None)


def open_weights(path: str | Path) -> Weights:
    """The weights in a folder (one file, or shards and their index) or in one safetensors file; headers are checked.

    Refuses pickles, and whatever is not consistent, in one line.
    """
    path = Path(path)
    if not path.is_dir():
        refuse_pickle(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        return Weights(_checked(path))
    if os.path.lexists(path / SINGLE):
        return Weights(_checked(_within(path, SINGLE, path)))
    if os.path.lexists(path / INDEX):
        return Weights(_sharded(path))
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in (*PICKLES, *FOREIGN) and file.name != "training_args.bin":
            refuse_pickle(file)
    raise ValueError(f"{path}: no weights here: neither {SINGLE} nor {INDEX}")


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD, records: Mapping[str, Any] | None = None
) -> None:
    """Writes tensors, and `records` as NAME.json, as a new folder or not at all; replaces an older one."""
    with replacing(Path(folder)) as fresh:
        write_shards(fresh, tensors, shard_bytes)
        for name, record in (records or {}).items():
            (fresh / f"{name}.json").parent.mkdir(exist_ok=True)
            (fresh / f"{name}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD) -> None:
    """Writes model.safetensors into a folder that is there, or shards and their index where it would be larger.

    Tensors are asked for one shard at a time, so that those of a lazy mapping never stand in memory together.
    """
    from safetensors.torch import save_file

    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is 1 or more, not {shard_bytes}")
    sizes = {name: tensors[name].nbytes for name in tensors}
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    for file, names in zip(files if len(groups) > 1 else [SINGLE], groups, strict=True):
        group = {name: tensors[name] for name in names}
        save_file(unshared(group), folder / file, {"format": "pt"})  # transformers asks for this mark
    if len(groups) > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _sharded(folder: Path) -> dict[str, Entry]:
    """All tensors of the shards: each in the one that the index says, and in no other."""
    index = _within(folder, INDEX, folder)
    try:
        if index.stat().st_size > MAX_HEADER:
            raise ValueError(f"more than {MAX_HEADER:,} bytes")
        record = loads(index.read_bytes())
        places = record.get("weight_map") if isinstance(record, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise ValueError("no weight_map from names to files")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: not readable as an index ({error}); get the file again") from None
    entries: dict[str, Entry] = {}
    shards = {name: _within(folder, name, index) for name in sorted(set(places.values()))}
    for name, shard in shards.items():
        for tensor, entry in _checked(shard).items():
            if places.get(tensor) != name:
                said = f"belongs in {shown(places[tensor])}" if tensor in places else "is in no file"
                raise ValueError(f"{shard}: holds {shown(tensor)}, which {said} as {INDEX} says; get both again")
            entries[tensor] = entry
    lost = [name for name in places if name not in entries]
    if lost:
        raise ValueError(
            f"{index}: {len(lost)} tensors are not in the files it names; "
            f"first: {shown(lost[0])} is not in {places[lost[0]]}"
        )
    return {name: entries[name] for name in places}


def _within(folder: Path, name: str, said: Path) -> Path:
    """The file of that plain name in a folder; a link may lead into the blobs of a hub's cache, and nowhere else."""
    if not name.isprintable() or Path(name).name != name or "\\" in name or len(name) > 200:
        raise ValueError(f"{said}: {shown(name)} is no file name; a name with a path could lead out of the folder")
    if not name.endswith((".safetensors", ".json")):
        refuse_pickle(folder / name)
        raise ValueError(f"{said}: {shown(name)} is no safetensors file")
    home, real = os.path.realpath(folder), os.path.realpath(folder / name)
    allowed = {home}
    if os.path.basename(os.path.dirname(home)) == "snapshots":  # models--owner--name/{snapshots/REVISION,blobs}
        allowed.add(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    if os.path.dirname(real) not in allowed:
        raise ValueError(f"{folder / name}: a link that leads out of its folder; copy what it links to into the folder")
    if not os.path.isfile(real):
        raise ValueError(f"{folder / name}: missing or no file; get it again")
    return folder / name


def _checked(file: Path) -> dict[str, Entry]:
    """The header by our checks and by those of the library that will read it."""
    entries = read_header(file)
    if set(_open(file).keys()) != entries.keys():
        raise ValueError(f"{file}: the safetensors library reads other names from its header; get the file again")
    return entries


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not readable as safetensors ({error}); get the file again") from None


def _mapped(handle: Any, file: Path, name: str, run: tuple[int, int] | None) -> Tensor:
    """Some rows of a tensor, or a single number as a row of its own."""
    from safetensors import SafetensorError

    try:
        return handle.get_slice(name)[run[0] : run[1]] if run else handle.get_tensor(name).reshape(1)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file}: {shown(name)} changed while it was read ({str(error).splitlines()[0]})") from None


def rowed(tensor: Tensor) -> Tensor:
    """The same tensor with a first dimension: a single number becomes a row of its own."""
    return tensor if tensor.ndim else tensor.reshape(1)


def _rows(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _runs(entry: Entry) -> Iterator[tuple[int, int]]:
    """Runs of rows of at most WINDOW bytes (a row at least); none of a tensor without elements."""
    rows, takes = _rows(entry), entry.end - entry.begin
    if takes == 0:
        return
    step = max(1, rows * WINDOW // takes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
