"""The card of a run: all that one would need to have it again, in one file, `card.json`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from headway.data.sources import files_of
from headway.machine import hardware, versions
from headway.recipe import Recipe

PACKAGES = ("numpy", "safetensors", "tokenizers", "msgspec")


def card(recipe: Recipe, spec: dict[str, Any], fingerprint: str, parameters: int, precision: str) -> dict[str, Any]:
    """Spec, recipe, seed, data, versions, hardware, command and commit. `fingerprint` is of every encoded row."""
    named = (recipe.data.source, recipe.data.valid, recipe.data.test)
    files = [file for one in named if one is not None for file in files_of(one)]
    return {
        "name": recipe.name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": recipe.seed,
        "precision": precision,
        "parameters": parameters,
        "data": {
            "fingerprint": fingerprint,
            "files": [{"path": str(f), "bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files],
        },
        "commit": commit(Path.cwd()),
        "versions": {**versions(), **{name: metadata.version(name) for name in PACKAGES}},
        "hardware": hardware(),
        "spec": spec,
        "recipe": msgspec.to_builtins(recipe),
    }


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
