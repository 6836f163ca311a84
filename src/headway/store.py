"""Store: a folder of safetensors and JSON, written whole or not at all, and checked on the way back; never pickle.

It is written to a temporary name, flushed to the disk and renamed, so that a crash at any moment leaves
either the old one or the new one, whole. A manifest of SHA-256 sums is written last and checked on the way back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"


def write_folder(folder: Path, tensors: dict[str, dict[str, Tensor]], records: dict[str, Any]) -> None:
    """Writes `NAME.safetensors` and `NAME.json` files as a new folder, or not at all; replaces an older one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        fresh.mkdir()
        for name, group in tensors.items():
            save_file(_unshared(group), fresh / f"{name}.safetensors")
        for name, record in records.items():
            (fresh / f"{name}.json").write_text(json.dumps(record, indent=1), "utf-8")
        sums = {file.name: _sha256(file) for file in sorted(fresh.iterdir())}
        (fresh / MANIFEST).write_text(json.dumps(sums, indent=1), "utf-8")
        for file in fresh.iterdir():
            _flush(file)
        _swap(fresh, folder)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise ValueError(f"{folder}: cannot write ({error.strerror}); what was there before is untouched") from error


def read_folder(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `write_folder` wrote, every byte checked against the manifest."""
    try:
        sums = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, expected in sums.items():
            if Path(name).name != name:
                raise ValueError(f"{folder / MANIFEST}: '{name}' leaves the folder; refuse it and train anew")
            if _sha256(folder / name) != expected:
                raise ValueError(f"{folder / name}: its contents changed since it was written; use an older checkpoint")
        tensors = {n[: -len(".safetensors")]: load_file(folder / n) for n in sums if n.endswith(".safetensors")}
        records = {n[: -len(".json")]: json.loads((folder / n).read_text("utf-8")) for n in sums if n.endswith(".json")}
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: missing; use an older checkpoint or train anew") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, AttributeError) as error:
        raise ValueError(f"{folder}: not readable ({error}); use an older one or train anew") from None
    return tensors, records


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    fresh = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        fresh.write_text(text, "utf-8")
        _flush(fresh)
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot write ({error.strerror}); what was there before is untouched") from error


def restore_model(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Loads strictly: a missing, unexpected or misshapen tensor is an error that names it."""
    own = dict(model.state_dict())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or extra or wrong:
        fault = (
            f"{len(missing)} missing, {len(extra)} unexpected, {len(wrong)} of another shape; "
            f"first: {(missing + extra + sorted(wrong))[0]}"
        )
        raise ValueError(f"{where}: its weights are not this model's ({fault}): spec and weights must come together")
    model.load_state_dict(tensors)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The format stores no shared memory, so that a tied weight is written under each of its names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _swap(fresh: Path, folder: Path) -> None:
    """Puts `fresh` in `folder`'s place; the old one is removed only when the new one stands."""
    if folder.exists():
        old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
        os.rename(folder, old)
        os.rename(fresh, folder)
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
