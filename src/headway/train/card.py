"""The card of a run: all that one would need to have it again, in one file, `card.json`."""

from __future__ import annotations

import glob
import hashlib
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from headway.machine import hardware, versions
from headway.recipe import Recipe
from headway.train.loop import Trainer

PACKAGES = ("numpy", "safetensors", "tokenizers", "msgspec")


def card_of(recipe: Recipe, trainer: Trainer, fingerprint: str) -> dict[str, Any]:
    """Spec, recipe, seed, data, versions, hardware, command and commit. `fingerprint` is of every encoded row."""
    named = (recipe.data.source, recipe.data.valid, recipe.data.test)
    files = [file for one in named if one is not None for file in _files(one)]
    return {
        "name": recipe.name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": recipe.seed,
        "precision": recipe.precision if recipe.precision != "auto" else "bf16" if trainer.bf16 else "fp32",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "ranks": trainer.ranks.size,
        "data": {
            "fingerprint": fingerprint,
            "files": [{"path": str(f), "bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(files)],
        },
        "commit": commit(Path.cwd()),
        "versions": {**versions(), **{name: metadata.version(name) for name in PACKAGES}},
        "hardware": hardware(),
        "spec": trainer.spec,
        "recipe": msgspec.to_builtins(recipe),
    }


def _files(source: str) -> list[Path]:
    """The files that a source names, or that lie in its folder; none where it is a built-in set."""
    path = Path(os.path.expanduser(source))
    found = path.rglob("*") if path.is_dir() else [path] if path.is_file() else map(Path, glob.glob(str(path)))
    return [file for file in found if file.is_file()]


def commit(folder: Path) -> dict[str, Any] | None:
    """The git commit that a folder stands at, and whether files differ from it; None where there is no git."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return {"commit": head, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
