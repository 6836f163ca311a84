"""Proof of a run: each checkpoint, model and record in its folder, read and summed, and what is wrong with it.

A checkpoint that was set aside as damaged when the run went on is no part of the run any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from headway.store import MANIFEST, read_json, verify_folder

RECORDS = ("recipe.json", "card.json", "result.json", "results.json")


def prove(run: Path) -> Iterator[tuple[Path, int, str | None]]:
    """What there is, its bytes, and what is wrong with it, None where nothing is."""
    folders = {path.parent for path in _below(run, MANIFEST)}
    # where the manifest itself is missing
    folders |= {path for name in ("step-*", "model") for path in _below(run, name) if path.is_dir()}
    records = [path for name in RECORDS for path in _below(run, name) if path.parent not in folders]
    if not folders and not records:
        raise ValueError(f"{run}: holds neither a run nor a model; name the folder that --out named")
    for path in sorted(folders):
        yield path, *_told(path, verify_folder)
    for path in sorted(records):
        yield path, *_told(path, _record)
    for path in sorted(_below(run, "log.jsonl")):
        yield path, *_told(path, _log)


def _below(run: Path, name: str) -> list[Path]:
    hidden = (".", "damaged-")
    found = run.rglob(name)
    return [path for path in found if not any(part.startswith(hidden) for part in path.relative_to(run).parts)]


def _told(path: Path, check: Callable[[Path], int]) -> tuple[int, str | None]:
    try:
        return check(path), None
    except ValueError as error:
        return 0, str(error)


def _record(path: Path) -> int:
    read_json(path, dict)
    return path.stat().st_size


def _log(path: Path) -> int:
    """A line a step, and none missing up to the newest checkpoint; what is behind it may be cut, where a run was."""
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            step = None
        if step != number:
            raise ValueError(f"{path}:{number + 1}: is not the line of step {number}; the steps before it are whole")
    newest = max((path.parent / "checkpoints").glob("step-*"), default=None)
    reached = 0 if newest is None else int(newest.name.removeprefix("step-"))
    if len(lines) < reached:
        raise ValueError(f"{path}: ends with step {len(lines)}, and {newest} is later; its last lines are lost")
    return path.stat().st_size
