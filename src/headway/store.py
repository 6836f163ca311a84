"""Store: a folder of safetensors and JSON, written whole or not at all, and checked on the way back; never pickle.

It is written to a temporary name, flushed to the disk and renamed, so that a crash at any moment leaves
either the old one or the new one, whole. A manifest of SHA-256 sums is written last and checked on the way back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headway.header import DTYPES

MANIFEST = "manifest.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # as safetensors calls them


def write_folder(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], records: dict[str, Any]) -> None:
    """Writes `NAME.safetensors` and `NAME.json` files as a new folder, or not at all; replaces an older one. Tensors of
    a lazy mapping (with `shapes` and `dtypes`) are asked for one by one."""
    with replacing(folder) as fresh:
        for name, group in tensors.items():
            file = fresh / f"{name}.safetensors"
            save_file(unshared(group), file) if isinstance(group, dict) else _write_lazily(file, group)
        for name, record in records.items():
            (fresh / f"{name}.json").write_text(json.dumps(record, indent=1), "utf-8")
        sums = {file.name: _sha256(file) for file in sorted(fresh.iterdir())}
        (fresh / MANIFEST).write_text(json.dumps(sums, indent=1), "utf-8")


def _write_lazily(file: Path, tensors: Any) -> None:
    """A safetensors file of tensors that need not stand in memory together."""
    header, end = {}, 0
    for name, dtype in tensors.dtypes.items():
        shape = tensors.shapes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill with files, which takes `folder`'s place once the block is left without an error."""
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for file in (*fresh.rglob("*"), fresh):
            _flush(file)
        _swap(fresh, folder)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        raise ValueError(f"{folder}: cannot write ({error}); what was there before is untouched") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_folder(
    folder: Path, read: Callable[[Path], Mapping[str, Tensor]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_folder` wrote, every byte checked against the manifest; `read` opens its tensors (default: into
    memory, as a dict)."""
    tensors: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for name, expected in read_json(folder / MANIFEST, dict).items():
        file = _file_of(folder, name)
        with _reading(file):
            if _sha256(file) != expected:
                raise ValueError("its contents changed since it was written")
            if file.suffix == ".safetensors" and read is None:
                tensors[file.stem] = load_file(file)
        if file.suffix == ".safetensors" and read is not None:
            tensors[file.stem] = read(file)
        if file.suffix == ".json":
            records[file.stem] = read_json(file, object)
    return tensors, records


def verify_folder(folder: Path) -> int:
    """Proves that a folder is as it was written, without loading it: every byte by its sum, and no file besides.

    Returns its bytes; a ValueError names the file that is at fault."""
    sums, size = read_json(folder / MANIFEST, dict), 0
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in sums and name != MANIFEST:
            raise ValueError(f"{folder / name}: is not in the manifest; remove it if you put it there")
    for name, expected in sums.items():
        file = _file_of(folder, name)
        with _reading(file):
            if _sha256(file) != expected:
                raise ValueError("its contents changed since it was written")
            size += file.stat().st_size
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # reads the header
                    pass
        if file.suffix == ".json":
            read_json(file, object)
    return size


def _file_of(folder: Path, name: Any) -> Path:
    """A file that a manifest names; none outside its folder."""
    file = folder / str(name)
    if file.name != name or file.suffix not in (".json", ".safetensors"):
        raise ValueError(f"{folder / MANIFEST}: {name!r} is no file of such a folder; do not use it")
    return file


def read_json(file: Path, kind: type) -> Any:
    """What a JSON file holds, if it is a `kind`."""
    with _reading(file):
        record = json.loads(file.read_text("utf-8"))
        if not isinstance(record, kind):
            raise ValueError("not an object")
    return record


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong with a file is one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{file}: missing; get it again, or use an older one") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{file}: not readable ({error}); get it again, or use an older one") from None


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    fresh = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        fresh.write_text(text, "utf-8")
        _flush(fresh)
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot write ({error}); what was there before is untouched") from error


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds whole lines to a file, down to the disk."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{path}: cannot write ({error}); make room, and go on with --resume") from error


def sweep(folder: Path) -> None:
    """Removes what a crash left unfinished in a folder."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """The shapes of tensors, without reading those of a mapping that knows them (`shapes`)."""
    known = getattr(tensors, "shapes", None)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()} if known is None else known


def check_fit(model: nn.Module | Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuses tensors that are not this model's, or not those of a state; it may be on the meta device, where it
    costs nothing."""
    own = shapes_of(model.state_dict() if isinstance(model, nn.Module) else model)
    given = shapes_of(tensors)
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = [name for name in own.keys() & given.keys() if own[name] != given[name]]
    if missing or extra or wrong:
        fault = (
            f"{len(missing)} missing, {len(extra)} unexpected, {len(wrong)} of another shape; "
            f"first: {(missing + extra + sorted(wrong))[0]}"
        )
        raise ValueError(f"{where}: its weights are not this model's ({fault}): spec and weights must come together")


def safe_name(name: str) -> str:
    """`name` where it can be a folder of its own, else an error: names come from recipes."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"'{name}' cannot name a folder: use letters, digits, '.', '_' and '-'")
    return name


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The format stores no shared memory, so that a tied weight is written under each of its names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()  # not the tensor's own: parts of one may overlap
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _swap(fresh: Path, folder: Path) -> None:
    """Puts `fresh` in `folder`'s place; the old one is removed only when the new one stands."""
    if folder.exists():
        old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
        os.rename(folder, old)
        try:
            os.rename(fresh, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(fresh, folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
